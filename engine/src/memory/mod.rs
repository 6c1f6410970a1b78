//! The paged memory manager: who owns which KV blocks.
//!
//! Invariants, asserted by [`KvCache::check`]: free + referenced = total; a block's reference count is the number of
//! tables that hold it; only published (full) blocks are in more than one table. Nothing here knows a device.

use std::collections::HashMap;

use crate::request::TokenId;

pub mod block_pool;
pub mod block_table;
pub mod capacity;
pub mod kv_events;
pub mod miss;
pub mod prefix_cache;
pub mod swap;

pub use block_pool::{BlockId, BlockPool};
pub use block_table::BlockTable;
use kv_events::KvEventSender;
use prefix_cache::PrefixCache;
pub use prefix_cache::{BlockChain, BlockEvent, BlockHash, BlockHasher};

/// Too few free blocks: an ordinary branch of the scheduler, never an error to a running request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBlocks;

#[derive(Debug)]
pub struct KvCache {
    block_size: u32,
    pool: BlockPool,
    /// `None` where the user switched it off.
    prefixes: Option<PrefixCache>,
    /// Blocks that the prefix cache knows and nobody references.
    num_cached: u32,
    /// Emptied lists of freed tables, so that a new table takes no memory.
    spare: Vec<Vec<BlockId>>,
    /// Grows whenever blocks are freed.
    version: u64,
}

/// Blocks of a pool by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    pub total: u32,
    /// In some sequence's table.
    pub referenced: u32,
    /// Unreferenced, and findable by later requests until evicted.
    pub cached: u32,
    /// Neither.
    pub free: u32,
}

/// The longest cached prefix of a list of tokens, in full blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CachedPrefix {
    pub num_blocks: u32,
    /// Those that nobody holds: holding them takes them off the free list.
    pub num_unreferenced: u32,
    /// Whether somebody is about to compute the block that comes next.
    pub next_is_promised: bool,
}

impl KvCache {
    /// `hash_key` is drawn by the caller at start; `None` switches the prefix cache off.
    pub fn new(num_blocks: u32, block_size: u32, hash_key: Option<(u64, u64)>) -> KvCache {
        assert!(block_size > 0);
        KvCache {
            block_size,
            pool: BlockPool::new(num_blocks),
            prefixes: hash_key.map(|key| PrefixCache::new(num_blocks, block_size, key)),
            num_cached: 0,
            spare: Vec::new(),
            version: 0,
        }
    }

    /// Takes the host memory for `num_tables` tables of up to `max_blocks` blocks, so that growing takes none.
    pub fn reserve_tables(&mut self, num_tables: u32, max_blocks: u32) {
        let max_blocks = max_blocks as usize;
        self.spare.resize_with(num_tables as usize, || Vec::with_capacity(max_blocks));
    }

    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    pub fn num_blocks(&self) -> u32 {
        self.pool.num_blocks()
    }

    pub fn blocks_for(&self, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.block_size)
    }

    /// Blocks that could be handed out now, cached ones included.
    pub fn num_available(&self) -> u32 {
        self.pool.num_free()
    }

    /// Blocks that only `table` holds. O(blocks of the table).
    pub fn num_exclusive(&self, table: &BlockTable) -> u32 {
        table.blocks.iter().filter(|&&block| self.pool.references(block) == 1).count() as u32
    }

    pub fn counts(&self) -> BlockCounts {
        let total = self.pool.num_blocks();
        let num_free = self.pool.num_free();
        BlockCounts { total, referenced: total - num_free, cached: self.num_cached, free: num_free - self.num_cached }
    }

    /// While this stays the same, no block has been freed.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What names blocks; `None` where the prefix cache is off.
    pub fn hasher(&self) -> Option<BlockHasher> {
        self.prefixes.as_ref().map(|prefixes| *prefixes.hasher())
    }

    /// The keys of a new list of tokens.
    pub fn chain(&self, tokens: &[TokenId], salt: u64) -> BlockChain {
        let Some(prefixes) = &self.prefixes else { return BlockChain::default() };
        let mut chain = prefixes.hasher().chain(salt);
        prefixes.hasher().extend(&mut chain, tokens);
        chain
    }

    /// Adds the keys of blocks that `tokens`, grown since, fill. O(new blocks).
    pub fn extend(&self, chain: &mut BlockChain, tokens: &[TokenId]) {
        if let Some(prefixes) = &self.prefixes {
            prefixes.hasher().extend(chain, tokens);
        }
    }

    /// From now on keeps which blocks become findable and cease to be, for [`KvCache::block_events`].
    pub fn keep_block_events(&mut self) {
        self.prefixes.iter_mut().for_each(PrefixCache::keep_events);
    }

    /// What happened since the last call.
    pub fn block_events(&mut self) -> impl Iterator<Item = BlockEvent> + '_ {
        self.prefixes.iter_mut().flat_map(PrefixCache::events)
    }

    /// From now on tells others which blocks are findable; before any is. Nobody is told anything where the prefix
    /// cache is off.
    pub fn tell_kv_events_to(&mut self, sender: KvEventSender) {
        self.prefixes.iter_mut().for_each(|prefixes| prefixes.tell_kv_events_to(sender.clone()));
    }

    /// Tells them what happened since the last call, as far as there is room for it.
    pub fn send_kv_events(&mut self) {
        self.prefixes.iter_mut().for_each(PrefixCache::send_kv_events);
    }

    /// Names of the findable blocks.
    pub fn findable(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.prefixes.iter().flat_map(PrefixCache::names)
    }

    /// What `open` would find now, without holding it.
    pub fn find(&self, chain: &BlockChain, tokens: &[TokenId], max_tokens: u32) -> CachedPrefix {
        let mut found = CachedPrefix::default();
        let Some(prefixes) = &self.prefixes else { return found };
        let usable = &tokens[..tokens.len().min(max_tokens as usize)];
        for (chunk, &hash) in usable.chunks_exact(self.block_size as usize).zip(chain.hashes()) {
            let Some(block) = prefixes.find(hash, chunk) else {
                found.next_is_promised = prefixes.is_promised(hash);
                break;
            };
            found.num_blocks += 1;
            found.num_unreferenced += u32::from(self.pool.references(block) == 0);
        }
        found
    }

    /// A table that holds, referenced, the longest cached prefix of `tokens` in full blocks, at most `max_tokens` long.
    ///
    /// ```text
    /// [0, n)            cached blocks, shared, n = table.num_blocks() * block_size
    /// [n, tokens.len()) to be computed; grow() gives it blocks
    /// ```
    pub fn open(&mut self, chain: &BlockChain, tokens: &[TokenId], max_tokens: u32) -> BlockTable {
        let mut table = BlockTable { blocks: self.spare.pop().unwrap_or_default(), ..BlockTable::default() };
        let Some(prefixes) = &self.prefixes else { return table };
        let usable = &tokens[..tokens.len().min(max_tokens as usize)];
        for (chunk, &hash) in usable.chunks_exact(self.block_size as usize).zip(chain.hashes()) {
            let Some(block) = prefixes.find(hash, chunk) else { break };
            self.num_cached -= u32::from(self.pool.references(block) == 0);
            self.pool.reference(block);
            table.blocks.push(block);
            table.num_published += 1;
        }
        table
    }

    /// `owner`, which holds `table`, is going to compute the rest of `chain`: others may wait for it.
    pub fn promise(&mut self, table: &BlockTable, chain: &BlockChain, owner: u64) {
        let Some(prefixes) = &mut self.prefixes else { return };
        for &hash in &chain.hashes()[table.num_published as usize..] {
            prefixes.promise(hash, owner);
        }
    }

    /// Gives `table` blocks for `num_tokens` tokens in all: all of them or none.
    pub fn grow(&mut self, table: &mut BlockTable, num_tokens: u32) -> Result<(), OutOfBlocks> {
        let needed = self.blocks_for(num_tokens).saturating_sub(table.num_blocks());
        if needed > self.pool.num_free() {
            return Err(OutOfBlocks);
        }
        for _ in 0..needed {
            let block = self.pool.alloc().expect("counted above");
            if let Some(prefixes) = &mut self.prefixes {
                self.num_cached -= u32::from(prefixes.evict(block));
            }
            table.blocks.push(block);
        }
        Ok(())
    }

    /// Makes the blocks of `table` that the first `num_computed` of `tokens` fill findable by later requests. They may
    /// still be on their way: a device runs its recordings in order. O(blocks that became full since the last call).
    pub fn publish(&mut self, table: &mut BlockTable, chain: &BlockChain, tokens: &[TokenId], num_computed: u32) {
        let Some(prefixes) = &mut self.prefixes else { return };
        let block_size = self.block_size as usize;
        let num_full = (num_computed as usize / block_size).min(chain.hashes().len());
        for index in table.num_published as usize..num_full {
            let chunk = &tokens[index * block_size..(index + 1) * block_size];
            prefixes.insert(chain, index, chunk, table.blocks[index]);
            table.num_published += 1;
        }
    }

    /// Makes all that `chain` names unfindable, whoever holds it or held it last: it is not to be trusted. Sequences
    /// that share it already keep it.
    pub fn withdraw(&mut self, chain: &BlockChain) {
        let Some(prefixes) = &mut self.prefixes else { return };
        for &hash in chain.hashes() {
            let Some(block) = prefixes.named(hash) else { continue };
            prefixes.forget(block);
            if self.pool.references(block) == 0 {
                self.num_cached -= 1;
                // To the begin of the free list: its contents are worth nothing.
                self.pool.reference(block);
                self.pool.release(block, false);
            }
        }
    }

    /// Makes nothing findable, when all that was computed is gone; nobody holds a table.
    pub fn forget_all(&mut self) {
        assert_eq!(self.counts().referenced, 0, "somebody holds blocks of what is gone");
        let Some(prefixes) = &mut self.prefixes else { return };
        prefixes.forget_all();
        self.num_cached = 0;
        self.version += 1;
    }

    /// Whether a block called `hash` is findable, or somebody is about to compute it.
    pub fn is_known(&self, hash: BlockHash) -> bool {
        let is_known = |prefixes: &PrefixCache| prefixes.named(hash).is_some() || prefixes.is_promised(hash);
        self.prefixes.as_ref().is_some_and(is_known)
    }

    /// Blocks that `table` begins with and that are findable. O(blocks of the table).
    pub fn num_findable(&self, table: &BlockTable) -> u32 {
        let Some(prefixes) = &self.prefixes else { return 0 };
        table.blocks.iter().take_while(|block| prefixes.contains(**block)).count() as u32
    }

    /// Blocks that `table` begins with and that are still findable once it is freed: others hold them, or so many other
    /// blocks are free that these are not handed out soon. O(blocks of the table).
    pub fn num_lasting(&self, table: &BlockTable) -> u32 {
        let Some(prefixes) = &self.prefixes else { return 0 };
        let is_roomy = self.pool.num_free() >= table.num_blocks();
        let lasts = |block: &&BlockId| prefixes.contains(**block) && (is_roomy || self.pool.references(**block) > 1);
        table.blocks.iter().take_while(lasts).count() as u32
    }

    /// Returns the table's blocks; published ones stay findable until they are handed out again. What `owner` promised
    /// of `chain` is no longer promised.
    pub fn free(&mut self, mut table: BlockTable, chain: &BlockChain, owner: u64) {
        self.version += 1;
        if let Some(prefixes) = self.prefixes.as_mut().filter(|prefixes| prefixes.num_promised() > 0) {
            let rest = chain.hashes().get(table.num_published as usize..).unwrap_or_default();
            rest.iter().for_each(|&hash| prefixes.break_promise(hash, owner));
        }
        for &block in table.blocks.iter().rev() {
            let cached = self.prefixes.as_ref().is_some_and(|prefixes| prefixes.contains(block));
            self.pool.release(block, cached);
            self.num_cached += u32::from(cached && self.pool.references(block) == 0);
        }
        table.blocks.clear();
        self.spare.push(table.blocks);
    }

    /// Asserts every invariant; `tables` are all tables there are. O(blocks).
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        self.pool.check();
        if let Some(prefixes) = &self.prefixes {
            prefixes.check();
        }
        let mut holders: HashMap<BlockId, u32> = HashMap::new();
        for table in tables {
            for (index, &block) in table.blocks.iter().enumerate() {
                *holders.entry(block).or_default() += 1;
                let shared = self.pool.references(block) > 1;
                assert!(!shared || (index as u32) < table.num_published, "block {} is shared but not full", block.0);
            }
        }
        for block in (0..self.num_blocks()).map(BlockId) {
            let expected = holders.get(&block).copied().unwrap_or(0);
            assert_eq!(self.pool.references(block), expected, "block {} has a wrong reference count", block.0);
        }
        let unreferenced = |block: &BlockId| self.pool.references(*block) == 0;
        let num_cached = self.prefixes.iter().flat_map(PrefixCache::blocks).filter(unreferenced).count();
        assert_eq!(num_cached as u32, self.num_cached);
        let counts = self.counts();
        assert_eq!(counts.free + counts.cached + counts.referenced, counts.total);
    }
}
