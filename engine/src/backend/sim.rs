//! The simulator: a device that is true about memory and makes a hash where a model makes a token.
//!
//! Each row of activations is one 64-bit hash in the row's first eight bytes. `RopeKv` writes hashes into the real
//! cache slots, whatever the cache's element type; attention walks the block table that lies on this device and hashes
//! every cell that an item covers and its row can see, positions included; the next token is that hash, and the hash of
//! all sampler state that the row has. So any mistake in slots, tables, sharing, preemption, chunking, slot reuse or
//! token counts changes ids, and a test is `assert_eq!` with the request run alone. Invariant: no chance, no arithmetic
//! on weights, and no time but what a [`CostModel`] says: the device works its queue off in order on a [`SimClock`].

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::backend::{
    Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, MAX_IN_FLIGHT, RowSource, Ticket, WeightSpec, copy_words,
};
use crate::cost::{CostModel, StepShape};
use crate::op::{
    ATTENTION_CUT, ATTENTION_ITEM_WORDS, ATTENTION_MERGE_WORDS, AddNorm, Attention, MatMul, NON_FINITE, NONE, Op,
    RopeKv, SAMPLED_BY_SLOT,
};
use crate::recording::Recording;
use crate::tensor::{BufferId, DType, Tensor, Weight, WeightId};

mod sample;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fidelity {
    /// Attention hashes every visible cell.
    Exact,
    /// The layers are passed over and the cache is not touched: for host costs and predictions, where ids do not
    /// matter. Each is drawn from the token before it alone.
    Cost,
}

#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    pub fidelity: Fidelity,
    /// What each recording takes, by its shape.
    pub cost: CostModel,
    /// Nanoseconds a megabyte that is copied between blocks, or read of them, beside what `cost` says.
    pub ns_per_copied_megabyte: f64,
    /// Whether `wait` takes as long as the cost model says, for servers that people and clients talk to.
    pub sleeps: bool,
    /// Inputs with this id give a row that is not finite.
    pub poisonous_token: Option<u32>,
}

impl Default for SimOptions {
    fn default() -> SimOptions {
        SimOptions {
            fidelity: Fidelity::Exact,
            cost: CostModel::UNKNOWN,
            ns_per_copied_megabyte: 0.0,
            sleeps: false,
            poisonous_token: None,
        }
    }
}

/// Virtual time, shared by the device and whoever drives the engine; it never goes back. `wait` moves it on to the end
/// of what is waited for; the driver moves it on by what the host does, or to the next arrival.
#[derive(Clone, Debug, Default)]
pub struct SimClock(Arc<AtomicU64>);

impl SimClock {
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.now_ns())
    }

    /// Nothing happens before `time`.
    pub fn advance_to(&self, time: Duration) {
        self.0.fetch_max(time.as_nanos() as u64, Ordering::AcqRel);
    }

    /// The host is busy for so long.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_nanos() as u64, Ordering::AcqRel);
    }

    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

pub struct SimBackend {
    options: SimOptions,
    info: DeviceInfo,
    clock: SimClock,
    /// Buffers as words.
    buffers: Vec<Vec<u32>>,
    weights: Vec<Weight>,
    num_submitted: u64,
    /// Zero of the clock.
    started_at: Instant,
    /// When the device has worked off all that was submitted, on the clock, in nanoseconds.
    free_at_ns: u64,
    in_flight: VecDeque<InFlight>,
}

struct InFlight {
    ticket: u64,
    /// On the clock, in nanoseconds.
    done_at_ns: u64,
    /// In real time, where the device sleeps.
    done_at: Option<Instant>,
    cost_ns: u64,
    downloads: Vec<u8>,
}

impl SimBackend {
    pub fn new(options: SimOptions) -> SimBackend {
        let info = DeviceInfo {
            id: "sim".to_owned(),
            name: "simulated device".to_owned(),
            driver: "none".to_owned(),
            tier: match options.fidelity {
                Fidelity::Exact => "exact".to_owned(),
                Fidelity::Cost => "cost".to_owned(),
            },
            arithmetic: "f32".to_owned(),
            kernels: String::new(),
            pci_bus_id: None,
            memory_bytes: None,
            max_buffer_bytes: u64::MAX,
        };
        SimBackend {
            options,
            info,
            clock: SimClock::default(),
            buffers: Vec::new(),
            weights: Vec::new(),
            num_submitted: 0,
            started_at: Instant::now(),
            free_at_ns: 0,
            in_flight: VecDeque::new(),
        }
    }

    pub fn clock(&self) -> SimClock {
        self.clock.clone()
    }

    fn words(&self, tensor: Tensor) -> &[u32] {
        let start = tensor.offset as usize;
        &self.buffers[tensor.buffer.0 as usize][start..start + tensor.num_elements() as usize]
    }

    fn words_mut(&mut self, tensor: Tensor) -> &mut [u32] {
        let start = tensor.offset as usize;
        &mut self.buffers[tensor.buffer.0 as usize][start..start + tensor.num_elements() as usize]
    }

    /// The hash that stands for row `row` of an f32 tensor.
    fn row(&self, tensor: Tensor, row: u32) -> u64 {
        read(self.words(tensor), (row * tensor.cols) as usize)
    }

    fn set_row(&mut self, tensor: Tensor, row: u32, value: u64) {
        write(self.words_mut(tensor), (row * tensor.cols) as usize, value);
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::UpdateTable(op) => {
                for i in 0..op.entries.rows as usize {
                    let (index, value) = (self.words(op.entries)[2 * i], self.words(op.entries)[2 * i + 1]);
                    self.words_mut(op.table)[index as usize] = value;
                }
            }
            Op::Embed(op) => {
                for i in 0..op.out.rows {
                    let id = match self.words(op.ids)[i as usize] {
                        id if id & SAMPLED_BY_SLOT != 0 => self.words(op.sampled)[(id & !SAMPLED_BY_SLOT) as usize],
                        id => id,
                    };
                    assert!(id < op.table.rows || id == NON_FINITE, "token {id} of {}", op.table.rows);
                    let poisonous = id == NON_FINITE || self.options.poisonous_token == Some(id);
                    self.set_row(op.out, i, if poisonous { POISON } else { mix(1, u64::from(id)) });
                }
            }
            Op::RmsNorm(op) => self.map_rows(op.x, op.out, |x| mix(2, x)),
            Op::MatMul(op) => self.mat_mul(op),
            Op::RopeKv(op) => self.rope_kv(op),
            Op::Attention(op) => self.attention(op),
            Op::GatedAct(op) => self.map_rows(op.gate_up, op.out, |x| mix(3, x)),
            Op::AddNorm(op) => self.add_norm(op),
            Op::ResetCounts(op) => self.reset_counts(op),
            Op::Sample(op) => self.sample(op),
            Op::MulAdd(op) => self.map_rows(op.x, op.x, |x| mix(u64::from(op.rounds), x)),
        }
    }

    fn map_rows(&mut self, x: Tensor, out: Tensor, f: impl Fn(u64) -> u64) {
        for row in 0..out.rows {
            let value = self.row(x, row);
            self.set_row(out, row, f(value));
        }
    }

    fn add_norm(&mut self, op: AddNorm) {
        for i in 0..op.out.rows {
            let row = op.rows.map_or(i, |rows| self.words(rows)[i as usize]);
            assert!(row < op.x.rows, "row {row} of {}", op.x.rows);
            let sum = mix(self.row(op.x, row), self.row(op.y, row));
            self.set_row(op.x, row, sum);
            self.set_row(op.out, i, mix(2, sum));
        }
    }

    /// A product that begins at the first column begins a row; one of later columns is mixed into what is there.
    fn mat_mul(&mut self, op: MatMul) {
        for row in 0..op.out.rows {
            let value = mix(4 + u64::from(op.weight.id.0), self.row(op.x, row));
            let value = if op.first_col == 0 { value } else { mix(self.row(op.out, row), value) };
            self.set_row(op.out, row, value);
        }
    }

    /// The three hashes of a row differ, and those of q and k depend on the position.
    fn rope_kv(&mut self, op: RopeKv) {
        for i in 0..op.q.rows {
            let (row, slot) = (self.row(op.qkv, i), self.words(op.slots)[i as usize]);
            let rotated = mix(row, u64::from(self.words(op.positions)[i as usize]));
            self.set_row(op.q, i, mix(1, rotated));
            let cell = op.cache.head_at(slot / op.cache.block_size, 0, slot % op.cache.block_size);
            write(&mut self.buffers[op.cache.k.0 as usize], cell, mix(2, rotated));
            write(&mut self.buffers[op.cache.v.0 as usize], cell, mix(3, row));
        }
    }

    /// As on any device a row goes cut by cut, in its items or in those of others that are merged.
    fn attention(&mut self, op: Attention) {
        let items: Vec<[u32; ATTENTION_ITEM_WORDS as usize]> = bytemuck::pod_collect_to_vec(self.words(op.items));
        for [first_row, num_rows, table_row, position, begin, end, partial] in items {
            for i in 0..num_rows {
                let mut seen = Seen { hash: self.row(op.q, first_row + i), num_positions: 0 };
                for cut in begin / ATTENTION_CUT..end.div_ceil(ATTENTION_CUT) {
                    let positions = begin.max(cut * ATTENTION_CUT)..end.min((cut + 1) * ATTENTION_CUT);
                    let part = self.attend(&op, table_row, position + i, positions);
                    seen.add(part);
                    if partial != NONE {
                        let row = partial + cut - begin / ATTENTION_CUT;
                        let words = &mut self.words_mut(op.partials)[(row * op.partials.cols) as usize..];
                        write(words, 0, part.hash);
                        words[2] = part.num_positions;
                    }
                }
                if partial == NONE {
                    assert_eq!(seen.num_positions, num_seen(&op, position + i), "of row {}", first_row + i);
                    self.set_row(op.out, first_row + i, seen.hash);
                } else {
                    // Until it is merged.
                    self.set_row(op.out, first_row, u64::from(position));
                }
            }
        }
        let merges: Vec<[u32; ATTENTION_MERGE_WORDS as usize]> = bytemuck::pod_collect_to_vec(self.words(op.merges));
        for [row, first, num_cuts] in merges {
            let mut seen = Seen { hash: self.row(op.q, row), num_positions: 0 };
            for cut in first..first + num_cuts {
                let words = &self.words(op.partials)[(cut * op.partials.cols) as usize..];
                seen.add(Seen { hash: read(words, 0), num_positions: words[2] });
            }
            let position = self.row(op.out, row) as u32;
            assert_eq!(seen.num_positions, num_seen(&op, position), "of row {row}, which was split");
            self.set_row(op.out, row, seen.hash);
        }
    }

    /// The hash of what a row sees of some positions.
    fn attend(&self, op: &Attention, table_row: u32, position: u32, positions: Range<u32>) -> Seen {
        let visible = positions.start.max(position + 1 - num_seen(op, position))..positions.end.min(position + 1);
        let cache = op.cache;
        let table = &self.words(op.table)[(table_row * op.table.cols) as usize..];
        let num_positions = visible.len() as u32;
        let hash = visible.fold(0, |hash, seen| {
            let block = table[(seen / cache.block_size) as usize];
            assert!(block < cache.num_blocks, "block {block} of {}", cache.num_blocks);
            let cell = cache.head_at(block, 0, seen % cache.block_size);
            let k = read(&self.buffers[cache.k.0 as usize], cell);
            let v = read(&self.buffers[cache.v.0 as usize], cell);
            mix(mix(hash, k), v)
        });
        Seen { hash, num_positions }
    }

    /// What a recording's time depends on, read off its ops; all layers attend alike. One that only samples is the end
    /// of a pass whose rows have been counted.
    fn shape(&self, recording: &Recording) -> StepShape {
        let (mut num_tokens, mut num_logit_rows, mut seen) = (0, 0, StepShape::default());
        for op in &recording.ops {
            match *op {
                Op::Embed(op) => num_tokens = op.out.rows,
                Op::Attention(op) if seen.num_tokens == 0 => {
                    // Consecutive items of one row of the table are one slice; those of a split row are one item.
                    let items: &[[u32; ATTENTION_ITEM_WORDS as usize]] = bytemuck::cast_slice(self.words(op.items));
                    for slice in items.chunk_by(|left, right| left[2] == right[2]) {
                        let last = &slice[slice.len() - 1];
                        seen = seen.with_slice(slice[0][3], last[0] + last[1] - slice[0][0], 0);
                    }
                }
                Op::AddNorm(AddNorm { rows: Some(rows), .. }) => num_logit_rows = rows.rows,
                _ => {}
            }
        }
        StepShape { num_tokens, num_logit_rows, ..seen }
    }
}

impl Backend for SimBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, _label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        self.buffers.push(vec![0; size_bytes.div_ceil(4) as usize]);
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        self.alloc(label, size_bytes).map(Some)
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffers[buffer.0 as usize]);
        bytes[offset_bytes as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    /// Takes the shape alone: no arithmetic is done on weights here.
    fn load_weight(&mut self, spec: &WeightSpec, _source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        let id = WeightId(self.weights.len() as u32);
        let weight = Weight { id, rows: spec.rows, cols: spec.cols, format: spec.format };
        self.weights.push(weight);
        Ok(weight)
    }

    fn weight_bytes(&self, _spec: &WeightSpec) -> u64 {
        0
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        assert!(self.in_flight.len() < MAX_IN_FLIGHT, "too many recordings in flight");
        self.buffers[recording.upload_buffer.0 as usize][..recording.upload.len()].copy_from_slice(&recording.upload);
        if self.options.fidelity == Fidelity::Exact {
            recording.copies.iter().for_each(|&copy| copy_words(copy, &mut self.buffers));
        }
        match self.options.fidelity {
            Fidelity::Exact => recording.ops.iter().for_each(|op| self.run(op)),
            Fidelity::Cost => without_layers(&recording.ops).for_each(|op| self.run(op)),
        }
        let mut downloads = Vec::with_capacity(recording.download_bytes() as usize);
        for &tensor in &recording.downloads {
            match tensor.dtype {
                // Of a row's hash, numbers that are finite.
                DType::F32 => downloads.extend(self.words(tensor).iter().flat_map(|word| number(*word).to_le_bytes())),
                _ => downloads.extend_from_slice(bytemuck::cast_slice(self.words(tensor))),
            }
        }
        self.num_submitted += 1;
        let mut copied: u64 = recording.copies.iter().map(|copy| copy.size_bytes).sum();
        if recording.ops.is_empty() {
            // What is read of blocks.
            copied += downloads.len() as u64;
        }
        let copies_ns = (copied as f64 / 1e6 * self.options.ns_per_copied_megabyte) as u64;
        let shape = self.shape(recording);
        let only_samples = matches!(recording.ops.as_slice(), [Op::Sample(_)]);
        let pass_ns = if only_samples { 0 } else { self.options.cost.predict_ns(&shape) };
        let cost_ns = pass_ns + copies_ns;
        self.free_at_ns = self.free_at_ns.max(self.clock.now_ns()) + cost_ns;
        let begins =
            self.in_flight.back().and_then(|before| before.done_at).max(self.options.sleeps.then(Instant::now));
        self.in_flight.push_back(InFlight {
            ticket: self.num_submitted,
            done_at_ns: self.free_at_ns,
            done_at: begins.map(|begins| begins + Duration::from_nanos(cost_ns)),
            cost_ns,
            downloads,
        });
        Ok(Ticket(self.num_submitted))
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let oldest = self.in_flight.pop_front().expect("a recording is in flight");
        assert_eq!(oldest.ticket, ticket.0, "tickets are waited for in order");
        self.clock.advance_to(Duration::from_nanos(oldest.done_at_ns));
        if let Some(done_at) = oldest.done_at {
            std::thread::sleep(done_at.saturating_duration_since(Instant::now()));
        }
        out.extend_from_slice(&oldest.downloads);
        let done_at = oldest.done_at.unwrap_or(self.started_at + Duration::from_nanos(oldest.done_at_ns));
        Ok(done_at - Duration::from_nanos(oldest.cost_ns)..done_at)
    }

    fn settle(&mut self) -> LoadTimes {
        LoadTimes::default()
    }

    /// Its clock goes on.
    fn reopen(&mut self) -> Result<(), DeviceError> {
        self.buffers.clear();
        self.weights.clear();
        self.in_flight.clear();
        self.free_at_ns = self.clock.now_ns();
        Ok(())
    }

    /// Real time where the device sleeps, for then host and device share it; else the clock's.
    fn now(&self) -> Instant {
        match self.options.sleeps {
            true => Instant::now(),
            false => self.started_at + self.clock.now(),
        }
    }
}

/// A hash of what was seen, and of how many positions.
#[derive(Clone, Copy)]
struct Seen {
    hash: u64,
    num_positions: u32,
}

impl Seen {
    /// A cut in which there was something to see.
    fn add(&mut self, cut: Seen) {
        if cut.num_positions > 0 {
            self.hash = mix(self.hash, cut.hash);
            self.num_positions += cut.num_positions;
        }
    }
}

/// Positions that a row at `position` sees.
fn num_seen(op: &Attention, position: u32) -> u32 {
    match op.window {
        0 => position + 1,
        window => window.min(position + 1),
    }
}

/// All of a pass but what its layers compute for every row, before the norm of the rows that get logits.
fn without_layers(ops: &[Op]) -> impl Iterator<Item = &Op> {
    let is_last_norm = |op: &Op| matches!(op, Op::AddNorm(AddNorm { rows: Some(_), .. }));
    let end = ops.iter().position(is_last_norm).unwrap_or(ops.len());
    let of_a_layer = |op: &Op| {
        let mixes = matches!(op, Op::RmsNorm(_) | Op::MatMul(_) | Op::GatedAct(_) | Op::AddNorm(_));
        mixes || matches!(op, Op::RopeKv(_) | Op::Attention(_))
    };
    ops[..end].iter().filter(move |op| !of_a_layer(op)).chain(&ops[end..])
}

/// The hash of a row that is not finite; every row that sees one is one.
const POISON: u64 = u64::MAX;

/// SplitMix64's output function (Steele, Lea and Flood 2014) over both.
/// From -1 to 1.
fn number(word: u32) -> f32 {
    word.cast_signed() as f32 / 2f32.powi(31)
}

fn mix(a: u64, b: u64) -> u64 {
    if a == POISON || b == POISON {
        return POISON;
    }
    let mut z = a.rotate_left(23).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_add(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) & (POISON >> 1)
}

fn read(words: &[u32], at: usize) -> u64 {
    u64::from(words[at]) | u64::from(words[at + 1]) << 32
}

fn write(words: &mut [u32], at: usize, value: u64) {
    (words[at], words[at + 1]) = (value as u32, (value >> 32) as u32);
}
