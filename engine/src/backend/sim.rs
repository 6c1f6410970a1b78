//! The simulator: a device that is true about memory and makes a hash where a model makes a token.
//!
//! Each row of activations is one 64-bit hash in the row's first eight bytes. `StoreKv` writes hashes into the real
//! cache slots, whatever the cache's element type; attention walks the block table that lies on this device and hashes
//! every cell it can see, positions included; the next token is that hash, and the hash of all sampler state that the
//! row has. So any mistake in slots, tables, sharing, preemption, chunking, slot reuse or token counts changes ids, and
//! a test is `assert_eq!` with the request run alone. Invariant: no chance, no arithmetic on weights, and no time but
//! what a [`CostModel`] says: the device works its queue off in order on a [`SimClock`].

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::backend::{
    Backend, DeviceError, DeviceInfo, LoadError, MAX_IN_FLIGHT, RowSource, Ticket, WeightSpec, copy_words,
};
use crate::cost::{CostModel, StepShape};
use crate::op::{Attention, NON_FINITE, Op, SAMPLED_BY_SLOT, StoreKv};
use crate::recording::Recording;
use crate::tensor::{BufferId, Tensor, Weight, WeightId};

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
    /// Nanoseconds a megabyte that is copied between blocks, beside what `cost` says.
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
            Op::MatMul(op) => self.map_rows(op.x, op.out, |x| mix(3 + u64::from(op.weight.id.0), x)),
            Op::Rope(op) => {
                for i in 0..op.x.rows {
                    let position = self.words(op.positions)[i as usize];
                    let value = mix(self.row(op.x, i), u64::from(position));
                    self.set_row(op.x, i, value);
                }
            }
            Op::StoreKv(op) => self.store_kv(op),
            Op::Attention(op) => self.attention(op),
            Op::GatedAct(op) => self.zip_rows(op.gate, op.up, op.out),
            Op::Add(op) => self.zip_rows(op.x, op.y, op.x),
            Op::GatherRows(op) => {
                for i in 0..op.out.rows {
                    let row = self.words(op.rows)[i as usize];
                    assert!(row < op.x.rows, "row {row} of {}", op.x.rows);
                    self.set_row(op.out, i, self.row(op.x, row));
                }
            }
            Op::ResetCounts(op) => self.reset_counts(op),
            Op::Sample(op) => self.sample(op),
            Op::MulAdd(op) => self.map_rows(op.x, op.x, |x| mix(u64::from(op.rounds), x)),
        }
    }

    fn map_rows(&mut self, x: Tensor, out: Tensor, f: impl Fn(u64) -> u64) {
        for row in 0..out.rows {
            let value = self.row(x, row);
            self.set_row(out, row, if value == POISON { POISON } else { f(value) });
        }
    }

    fn zip_rows(&mut self, a: Tensor, b: Tensor, out: Tensor) {
        for row in 0..out.rows {
            let value = mix(self.row(a, row), self.row(b, row));
            self.set_row(out, row, value);
        }
    }

    fn store_kv(&mut self, op: StoreKv) {
        for i in 0..op.slots.rows {
            let slot = self.words(op.slots)[i as usize];
            let (k, v) = (self.row(op.k, i), self.row(op.v, i));
            let cell = op.cache.head_at(slot / op.cache.block_size, 0, slot % op.cache.block_size);
            write(&mut self.buffers[op.cache.k.0 as usize], cell, k);
            write(&mut self.buffers[op.cache.v.0 as usize], cell, v);
        }
    }

    fn attention(&mut self, op: Attention) {
        for item in 0..op.items.rows as usize {
            let words = &self.words(op.items)[4 * item..4 * item + 4];
            let [first_row, num_rows, table_row, first] = [words[0], words[1], words[2], words[3]];
            for i in 0..num_rows {
                let position = first + i;
                let query = self.row(op.q, first_row + i);
                let value = self.attend(&op, table_row, position, query);
                self.set_row(op.out, first_row + i, value);
            }
        }
    }

    /// The hash of a query and everything it sees.
    fn attend(&self, op: &Attention, table_row: u32, position: u32, query: u64) -> u64 {
        let start = match op.window {
            0 => 0,
            window => (position + 1).saturating_sub(window),
        };
        let cache = op.cache;
        let table = &self.words(op.table)[(table_row * op.table.cols) as usize..];
        (start..=position).fold(query, |hash, seen| {
            let block = table[(seen / cache.block_size) as usize];
            assert!(block < cache.num_blocks, "block {block} of {}", cache.num_blocks);
            let cell = cache.head_at(block, 0, seen % cache.block_size);
            let k = read(&self.buffers[cache.k.0 as usize], cell);
            let v = read(&self.buffers[cache.v.0 as usize], cell);
            mix(mix(hash, k), v)
        })
    }

    /// What a recording's time depends on, read off its ops; all layers attend alike.
    fn shape(&self, recording: &Recording) -> StepShape {
        let (mut num_tokens, mut num_logit_rows, mut seen) = (0, 0, StepShape::default());
        for op in &recording.ops {
            match *op {
                Op::Embed(op) => num_tokens = op.out.rows,
                Op::Attention(op) if seen.num_tokens == 0 => {
                    // Consecutive items of one row of the table are one slice.
                    let items: &[[u32; 4]] = bytemuck::cast_slice(self.words(op.items));
                    for slice in items.chunk_by(|left, right| left[2] == right[2]) {
                        let num_rows = slice.iter().map(|[_, num_rows, ..]| num_rows).sum();
                        seen = seen.with_slice(slice[0][3], num_rows, 0);
                    }
                }
                Op::GatherRows(op) => num_logit_rows = op.out.rows,
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
            downloads.extend_from_slice(bytemuck::cast_slice(self.words(tensor)));
        }
        self.num_submitted += 1;
        let copied: u64 = recording.copies.iter().map(|copy| copy.size_bytes).sum();
        let copies_ns = (copied as f64 / 1e6 * self.options.ns_per_copied_megabyte) as u64;
        let cost_ns = self.options.cost.predict_ns(&self.shape(recording)) + copies_ns;
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

    /// Real time where the device sleeps, for then host and device share it; else the clock's.
    fn now(&self) -> Instant {
        match self.options.sleeps {
            true => Instant::now(),
            false => self.started_at + self.clock.now(),
        }
    }
}

/// All of a pass but what its layers compute for every row, before the rows that get logits are gathered.
fn without_layers(ops: &[Op]) -> impl Iterator<Item = &Op> {
    let end = ops.iter().position(|op| matches!(op, Op::GatherRows(_))).unwrap_or(ops.len());
    let of_a_layer = |op: &Op| {
        let mixes = matches!(op, Op::RmsNorm(_) | Op::MatMul(_) | Op::GatedAct(_) | Op::Add(_));
        mixes || matches!(op, Op::Rope(_) | Op::StoreKv(_) | Op::Attention(_))
    };
    ops[..end].iter().filter(move |op| !of_a_layer(op)).chain(&ops[end..])
}

/// The hash of a row that is not finite; every row that sees one is one.
const POISON: u64 = u64::MAX;

/// SplitMix64's output function (Steele, Lea and Flood 2014) over both.
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
