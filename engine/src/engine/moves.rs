//! KV blocks on their way from one engine's prefix cache into another's, through the host's memory.
//!
//! The two ends of a move share a channel and nothing else. The engine that has the blocks holds them until they are
//! read, a chunk at a time, between two steps. The other one promises them to its prefix cache, so that whoever begins
//! with them waits; a chunk that has come is written between two steps and findable from then on. Invariants: nobody
//! waits for the other end but for a time that was set when the move began, and either end may be gone at any time:
//! what has not come by then is computed, as is what there is no room for beside sequences that run. Where blocks are
//! copied, no step is in flight.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::{Engine, EngineStats};
use crate::backend::DeviceError;
use crate::limits::Phase;
use crate::memory::{BlockChain, BlockTable};
use crate::model::{KvLayout, PortableBlocks};
use crate::request::Request;

/// What a step may wait for: a few milliseconds of copies at most.
pub const CHUNK_BYTES: usize = 8 << 20;
/// Moves to one engine at a time; the host holds three chunks of each at most.
const MAX_IMPORTS: usize = 4;
/// Blocks that are read and written to see what that takes.
const MEASURED_BLOCKS: u32 = 8;

/// What a device takes to have a block read, and to have one written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovePrices {
    pub layout: KvLayout,
    pub out_ns: u64,
    pub in_ns: u64,
}

/// The end of a move that is for the engine that has the blocks.
pub struct Export(Prefix, ToImport);

/// The end that is for the engine that is to have them, before the request that begins with them.
pub struct Import(Prefix, FromExport);

struct ToImport {
    chunks: SyncSender<PortableBlocks>,
    /// Gone with the other end.
    is_wanted: Weak<()>,
}

struct FromExport {
    chunks: Receiver<PortableBlocks>,
    _wants: Arc<()>,
}

/// Some blocks of those that a request's prompt begins with.
#[derive(Clone)]
struct Prefix {
    request: Arc<Request>,
    /// Ends with the last of them.
    chain: BlockChain,
    blocks: Range<u32>,
    /// The time that the move may take.
    within: Duration,
}

/// A move of `blocks` of a request's prompt, of which `chain` has the names; it is given up after `within`.
pub fn block_move(request: Arc<Request>, chain: &BlockChain, blocks: Range<u32>, within: Duration) -> (Export, Import) {
    assert!(!blocks.is_empty(), "no block is to move");
    let prefix = Prefix { request, chain: chain.head(blocks.end as usize), blocks, within };
    let (to, from) = sync_channel(1);
    let wants = Arc::new(());
    let to = ToImport { chunks: to, is_wanted: Arc::downgrade(&wants) };
    (Export(prefix.clone(), to), Import(prefix, FromExport { chunks: from, _wants: wants }))
}

/// What stands between the two ends of a move whose engines have clocks of their own: what the one has handed over
/// comes to the other when it is passed on.
pub struct Relay {
    from: FromExport,
    to: ToImport,
    /// Taken and not handed on.
    chunk: Option<PortableBlocks>,
}

/// What came of passing on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    Nothing,
    Some,
    /// One of the ends is gone, or all has been passed on.
    All,
}

/// The same as [`block_move`], by way of a relay.
pub fn relayed_move(
    request: Arc<Request>,
    chain: &BlockChain,
    blocks: Range<u32>,
    within: Duration,
) -> (Export, Relay, Import) {
    let (export, Import(_, from)) = block_move(request.clone(), chain, blocks.clone(), within);
    let (Export(_, to), import) = block_move(request, chain, blocks, within);
    (export, Relay { from, to, chunk: None }, import)
}

impl Relay {
    /// Hands on what was taken; first, if it `takes`, takes what has been handed over.
    pub fn pass(&mut self, takes: bool) -> Passed {
        let mut passed = Passed::Nothing;
        loop {
            if takes && self.chunk.is_none() {
                self.chunk = match self.from.chunks.try_recv() {
                    Ok(chunk) => Some(chunk),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Passed::All,
                };
            }
            let Some(chunk) = self.chunk.take() else { break };
            match self.to.chunks.try_send(chunk) {
                Ok(()) => passed = Passed::Some,
                Err(TrySendError::Full(chunk)) => {
                    self.chunk = Some(chunk);
                    break;
                }
                Err(TrySendError::Disconnected(_)) => return Passed::All,
            }
        }
        if self.to.is_wanted.strong_count() > 0 { passed } else { Passed::All }
    }
}

/// Moves that an engine has a part in.
#[derive(Default)]
pub(super) struct Moves {
    /// Blocks that are copied at a time, at most.
    chunk_blocks: usize,
    exports: Vec<End<ToImport>>,
    imports: Vec<End<FromExport>>,
}

struct End<Channel> {
    /// Whose promises are this end's.
    id: u64,
    /// Its blocks are those that were not copied yet.
    prefix: Prefix,
    /// The blocks that are here of those that the prompt begins with, held.
    table: BlockTable,
    until: Instant,
    channel: Channel,
    /// Between the device and the channel.
    chunk: Option<PortableBlocks>,
    /// Blocks that were given up.
    num_missed: u32,
}

impl Moves {
    pub fn is_empty(&self) -> bool {
        self.exports.is_empty() && self.imports.is_empty()
    }

    /// Whether anything could be copied now.
    pub fn are_due(&self) -> bool {
        self.next_export().is_some() || self.next_import().is_some()
    }

    pub fn tables(&self) -> impl Iterator<Item = &BlockTable> {
        let imported = self.imports.iter().map(|import| &import.table);
        self.exports.iter().map(|export| &export.table).chain(imported)
    }

    fn next_export(&self) -> Option<usize> {
        self.exports.iter().position(|export| export.chunk.is_none() && !export.prefix.blocks.is_empty())
    }

    fn next_import(&self) -> Option<usize> {
        self.imports.iter().position(|import| import.chunk.is_some())
    }
}

impl EngineStats {
    /// Counts blocks that will be computed instead of coming from another engine.
    fn miss_blocks(&mut self, num_blocks: usize, why: &str) {
        if num_blocks > 0 {
            self.num_missed_blocks += num_blocks as u64;
            tracing::debug!(num_blocks, "KV blocks of another device are computed here: {why}");
        }
    }
}

impl<Channel> End<Channel> {
    fn is_over(&self, now: Instant) -> bool {
        now >= self.until || self.prefix.blocks.is_empty() && self.chunk.is_none()
    }

    fn give_up(&mut self) {
        self.num_missed += self.prefix.blocks.len() as u32;
        self.prefix.blocks.start = self.prefix.blocks.end;
        self.chunk = None;
    }
}

impl Engine {
    /// Measures what it takes to read blocks and to write them, and lets them go to other engines and come from there
    /// from now on, where the device can: `chunk_bytes` at a time, or one by one where a block has more. While nothing
    /// runs: it writes blocks.
    pub fn enable_moves(&mut self, chunk_bytes: usize) -> Result<(), DeviceError> {
        if !self.can_move() {
            return Ok(());
        }
        assert!(self.is_idle(), "blocks are in use");
        let blocks: Vec<u32> = (0..self.config.num_blocks.min(MEASURED_BLOCKS)).collect();
        let (mut out, mut back) = (Duration::MAX, Duration::MAX);
        // The first touches memory that nothing has touched before.
        for _ in 0..3 {
            let begun = self.backend.now();
            let words = self.read_blocks(&blocks)?;
            let read = self.backend.now();
            self.write_blocks(&blocks, &words)?;
            (out, back) = (out.min(read - begun), back.min(self.backend.now() - read));
        }
        self.turn_from_step();
        let [out_ns, in_ns] = [out, back].map(|time| time.as_nanos() as u64 / blocks.len() as u64);
        self.enable_moves_at(out_ns, in_ns, chunk_bytes);
        Ok(())
    }

    /// The same where it is known what reading a block takes, and writing one.
    pub fn enable_moves_at(&mut self, out_ns: u64, in_ns: u64, chunk_bytes: usize) {
        if self.can_move() {
            let layout = self.model.kv_layout();
            self.moves.chunk_blocks = (chunk_bytes / (4 * layout.block_words())).max(1);
            self.move_prices = Some(MovePrices { layout, out_ns, in_ns });
        }
    }

    fn can_move(&self) -> bool {
        !self.backend.are_ends_apart() && self.model.max_parts_written() > 0 && self.config.prefix_cache
    }

    /// What a block takes to go to another engine or come from there; `None` where none does.
    pub fn move_prices(&self) -> Option<MovePrices> {
        self.move_prices
    }

    /// Holds the blocks that are here of those that are asked for, until they are handed over.
    pub fn export(&mut self, Export(prefix, channel): Export) {
        if !self.is_device_lost {
            let mut export = self.end_of_move(prefix, channel);
            export.prefix.blocks.end = export.table.num_blocks();
            self.moves.exports.push(export);
        }
    }

    /// Has whoever begins with the blocks wait for them, if they are to go on from what is here.
    pub fn import(&mut self, Import(prefix, channel): Import) {
        if self.is_device_lost || self.moves.imports.len() == MAX_IMPORTS {
            let why = if self.is_device_lost { "the device is lost" } else { "as many others are on their way" };
            return self.stats.miss_blocks(prefix.blocks.len(), why);
        }
        let first = prefix.blocks.start;
        let import = self.end_of_move(prefix, channel);
        // Somebody may be about to compute them here.
        let is_known = self.cache.is_known(import.prefix.chain.hashes()[first as usize]);
        if import.table.num_blocks() != first || is_known {
            if !is_known {
                self.stats.miss_blocks(import.prefix.blocks.len(), "those before them are not here");
            }
            return self.cache.free(import.table, &import.prefix.chain, import.id);
        }
        self.cache.promise(&import.table, &import.prefix.chain, import.id);
        self.moves.imports.push(import);
    }

    fn end_of_move<Channel>(&mut self, prefix: Prefix, channel: Channel) -> End<Channel> {
        let id = self.next_id;
        self.next_id += 1;
        let max_tokens = prefix.blocks.end * self.config.block_size;
        let table = self.cache.open(&prefix.chain, &prefix.request.prompt, max_tokens);
        End { id, until: self.backend.now() + prefix.within, prefix, table, channel, chunk: None, num_missed: 0 }
    }

    /// Copies a chunk of what is to leave, and one that has come, if no step is in flight. Says whether there was one.
    pub(super) fn move_blocks(&mut self) -> Result<bool, DeviceError> {
        if self.moves.is_empty() {
            return Ok(false);
        }
        self.turn_channels();
        // Copies that were planned come before what is copied here.
        if !self.in_flight.is_empty() || self.scheduler.has_copies() {
            return Ok(false);
        }
        let has_exported = self.export_chunk()?;
        let has_imported = self.import_chunk()?;
        if has_exported || has_imported {
            self.turn_channels();
        }
        Ok(has_exported || has_imported)
    }

    /// Lets go of all moves: the other ends see that nobody is there.
    pub(super) fn drop_moves(&mut self) {
        self.moves.exports.iter_mut().for_each(End::give_up);
        self.moves.imports.iter_mut().for_each(End::give_up);
        self.end_moves();
    }

    /// Hands on what was read, takes in what has come, and ends what is done, too late, or has no other end.
    fn turn_channels(&mut self) {
        for export in &mut self.moves.exports {
            if export.channel.is_wanted.strong_count() == 0 {
                export.give_up();
            }
            match export.chunk.take().map(|chunk| export.channel.chunks.try_send(chunk)) {
                None | Some(Ok(())) => {}
                Some(Err(TrySendError::Full(chunk))) => export.chunk = Some(chunk),
                Some(Err(TrySendError::Disconnected(_))) => export.give_up(),
            }
        }
        for import in self.moves.imports.iter_mut().filter(|import| import.chunk.is_none()) {
            match import.channel.chunks.try_recv() {
                Ok(chunk) => import.chunk = Some(chunk),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => import.give_up(),
            }
        }
        self.end_moves();
    }

    fn end_moves(&mut self) {
        let now = self.backend.now();
        let Engine { moves, cache, stats, .. } = self;
        let mut free = |table, chain: &BlockChain, id| cache.free(table, chain, id);
        moves.exports.extract_if(.., |end| end.is_over(now)).for_each(|end| free(end.table, &end.prefix.chain, end.id));
        for mut end in moves.imports.extract_if(.., |end| end.is_over(now)) {
            end.give_up();
            stats.miss_blocks(end.num_missed as usize, "they did not come, in time or at all, or had no room");
            free(end.table, &end.prefix.chain, end.id);
        }
        self.update_counts();
    }

    fn export_chunk(&mut self) -> Result<bool, DeviceError> {
        let Some(index) = self.moves.next_export() else { return Ok(false) };
        let layout = self.model.kv_layout();
        let End { prefix, table, .. } = &mut self.moves.exports[index];
        // What a step that failed has left is no longer findable.
        let Range { start, end } = &mut prefix.blocks;
        *end = (*end).min(self.cache.num_findable(table)).max(*start);
        let (start, end) = (*start, *end);
        if start == end {
            return Ok(false);
        }
        let blocks: Vec<u32> = table.blocks()[start as usize..end as usize].iter().map(|block| block.0).collect();
        let blocks = &blocks[..blocks.len().min(self.moves.chunk_blocks)];
        let words = self.read_blocks(blocks)?;
        let export = &mut self.moves.exports[index];
        export.prefix.blocks.start += blocks.len() as u32;
        export.chunk = Some(PortableBlocks { layout, words });
        Ok(true)
    }

    fn import_chunk(&mut self) -> Result<bool, DeviceError> {
        let Some(index) = self.moves.next_import() else { return Ok(false) };
        let (layout, block_size) = (self.model.kv_layout(), self.config.block_size);
        let import = &mut self.moves.imports[index];
        let Some(chunk) = import.chunk.take() else { return Ok(false) };
        let num_blocks = chunk.words.len() / layout.block_words();
        let end = import.prefix.blocks.start + num_blocks as u32;
        let is_fit = chunk.layout == layout && end <= import.prefix.blocks.end;
        // Who runs was admitted for blocks that it has not taken yet.
        let num_left = self.cache.num_available().saturating_sub(self.scheduler.promised_blocks(&self.cache));
        if !is_fit || num_blocks as u32 > num_left {
            import.give_up();
            return Ok(true);
        }
        self.cache.grow(&mut import.table, end * block_size).expect("there are as many, and more");
        let blocks = &import.table.blocks()[import.prefix.blocks.start as usize..];
        let blocks: Vec<u32> = blocks.iter().map(|block| block.0).collect();
        self.write_blocks(&blocks, &chunk.words)?;
        let End { prefix, table, .. } = &mut self.moves.imports[index];
        self.cache.publish(table, &prefix.chain, &prefix.request.prompt, end * block_size);
        prefix.blocks.start = end;
        self.stats.num_fetched_blocks += num_blocks as u64;
        Ok(true)
    }

    fn read_blocks(&mut self, blocks: &[u32]) -> Result<Vec<u32>, DeviceError> {
        self.recording.clear();
        self.model.record_reading(blocks, &mut self.recording);
        self.run_copies(Phase::ReadBack)?;
        Ok(bytemuck::pod_collect_to_vec(&self.downloads))
    }

    fn write_blocks(&mut self, blocks: &[u32], words: &[u32]) -> Result<(), DeviceError> {
        let num_parts = blocks.len() * self.model.kv_layout().parts_per_block();
        let max_parts = self.model.max_parts_written();
        for first in (0..num_parts).step_by(max_parts) {
            self.recording.clear();
            let parts = first..num_parts.min(first + max_parts);
            self.model.record_writing(blocks, parts, words, &mut self.recording);
            self.run_copies(Phase::Upload)?;
        }
        Ok(())
    }

    /// Has the device do what is recorded, which computes nothing, and waits for it.
    fn run_copies(&mut self, phase: Phase) -> Result<(), DeviceError> {
        self.turn_to(phase);
        let ticket = self.backend.submit(&self.recording)?;
        self.downloads.clear();
        let ran = self.backend.wait(ticket, &mut self.downloads)?;
        self.device_free_at = self.device_free_at.max(ran.end);
        Ok(())
    }
}
