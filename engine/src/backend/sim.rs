//! The simulator: a device that is true about memory and makes a hash where a model makes a token.
//!
//! Each row of activations is one 64-bit hash in the row's first eight bytes. `StoreKv` writes hashes into the real
//! cache slots; attention walks the block table that lies on this device and hashes every cell it can see, positions
//! included; the next token is that hash, and the hash of all sampler state that the row has. So any mistake in slots,
//! tables, sharing, preemption, chunking, slot reuse or token counts changes ids, and a test is `assert_eq!` with the
//! request run alone. Invariant: no clock, no chance, no arithmetic on weights; time is a sum in [`SimClock`], from a
//! cost model.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::backend::{Backend, DeviceError, DeviceInfo, LoadError, MAX_IN_FLIGHT, RowSource, Ticket, WeightSpec};
use crate::op::{Attention, NON_FINITE, Op, SAMPLED_BY_SLOT, StoreKv};
use crate::recording::Recording;
use crate::tensor::{BufferId, KvTensor, Tensor, Weight, WeightId};

mod sample;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fidelity {
    /// Attention hashes every visible cell.
    Exact,
    /// The cache is not touched: for host costs and predictions, where ids do not matter.
    Cost,
}

#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    pub fidelity: Fidelity,
    pub cost: CostModel,
    /// Whether `wait` takes as long as the cost model says, for servers that people and clients talk to.
    pub sleeps: bool,
    /// Inputs with this id give a row that is not finite.
    pub poisonous_token: Option<u32>,
}

impl Default for SimOptions {
    fn default() -> SimOptions {
        SimOptions { fidelity: Fidelity::Exact, cost: CostModel::FREE, sleeps: false, poisonous_token: None }
    }
}

/// What a step takes on the simulated device, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Each submission.
    pub ns_per_step: f64,
    /// Each row of each matmul, per million elements of its weight.
    pub ns_per_mega_mac: f64,
    /// Each weight matrix read, per megabyte.
    pub ns_per_weight_megabyte: f64,
    /// Each position that an attention row sees.
    pub ns_per_attended_token: f64,
}

impl CostModel {
    pub const FREE: CostModel =
        CostModel { ns_per_step: 0.0, ns_per_mega_mac: 0.0, ns_per_weight_megabyte: 0.0, ns_per_attended_token: 0.0 };
}

/// The device's own time, readable while an engine owns the device.
#[derive(Clone, Debug, Default)]
pub struct SimClock(Arc<AtomicU64>);

impl SimClock {
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Acquire))
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
    in_flight: VecDeque<(u64, Duration, Vec<u8>)>,
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
        if self.options.fidelity == Fidelity::Cost {
            return;
        }
        for i in 0..op.slots.rows {
            let slot = self.words(op.slots)[i as usize];
            let (k, v) = (self.row(op.k, i), self.row(op.v, i));
            let cell = cell(op.cache, slot / op.cache.block_size, slot % op.cache.block_size);
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
                let value = match self.options.fidelity {
                    Fidelity::Exact => self.attend(&op, table_row, position, query),
                    Fidelity::Cost => mix(query, u64::from(position)),
                };
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
            let cell = cell(cache, block, seen % cache.block_size);
            let k = read(&self.buffers[cache.k.0 as usize], cell);
            let v = read(&self.buffers[cache.v.0 as usize], cell);
            mix(mix(hash, k), v)
        })
    }

    fn cost(&self, recording: &Recording) -> Duration {
        let cost = self.options.cost;
        let op_ns = |op: &Op| match *op {
            Op::MatMul(op) => {
                let mega_macs = f64::from(op.weight.rows) * f64::from(op.weight.cols) / 1e6;
                let megabytes = op.weight.format.row_bytes(op.weight.cols) as f64 * f64::from(op.weight.rows) / 1e6;
                mega_macs * f64::from(op.x.rows) * cost.ns_per_mega_mac + megabytes * cost.ns_per_weight_megabyte
            }
            Op::Attention(op) => {
                let items = self.words(op.items).chunks_exact(4);
                let seen = items.map(|item| f64::from(item[1]) * (f64::from(item[3]) + f64::from(item[1] + 1) / 2.0));
                seen.sum::<f64>() * cost.ns_per_attended_token
            }
            _ => 0.0,
        };
        Duration::from_nanos((cost.ns_per_step + recording.ops.iter().map(op_ns).sum::<f64>()) as u64)
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
        recording.ops.iter().for_each(|op| self.run(op));
        let mut downloads = Vec::with_capacity(recording.download_bytes() as usize);
        for &tensor in &recording.downloads {
            downloads.extend_from_slice(bytemuck::cast_slice(self.words(tensor)));
        }
        self.num_submitted += 1;
        self.in_flight.push_back((self.num_submitted, self.cost(recording), downloads));
        Ok(Ticket(self.num_submitted))
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        let (oldest, cost, downloads) = self.in_flight.pop_front().expect("a recording is in flight");
        assert_eq!(oldest, ticket.0, "tickets are waited for in order");
        self.clock.0.fetch_add(cost.as_nanos() as u64, Ordering::AcqRel);
        if self.options.sleeps {
            std::thread::sleep(cost);
        }
        out.extend_from_slice(&downloads);
        Ok(())
    }
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

/// Where the hash of a cache slot lies, in words: the first bytes of the token's first head.
fn cell(cache: KvTensor, block: u32, token: u32) -> usize {
    assert!(cache.head_dim >= 4, "the simulator needs eight bytes a head");
    (block * cache.num_kv_heads * cache.block_size + token) as usize * (cache.head_dim / 2) as usize
}

fn read(words: &[u32], at: usize) -> u64 {
    u64::from(words[at]) | u64::from(words[at + 1]) << 32
}

fn write(words: &mut [u32], at: usize, value: u64) {
    (words[at], words[at + 1]) = (value as u32, (value >> 32) as u32);
}
