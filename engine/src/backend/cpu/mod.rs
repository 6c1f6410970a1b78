//! The cpu backend: the twin that every kernel is held against, and the device of a machine without a GPU.
//!
//! One file an op; each holds the plain twin, which is the reference. Matmul, attention and `mul_add` have a fast
//! variant, by the inner loops of `avx2.rs`, equal to the twin bit for bit. Invariant: a number depends on its own row
//! alone, never on how many rows, threads or chunks there are.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::backend::{
    Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, MAX_IN_FLIGHT, RowSource, Ticket, WeightSpec, copy_words,
    host_memory,
};
use crate::op::Op;
use crate::recording::Recording;
use crate::tensor::{BufferId, Tensor, Weight, WeightId};

mod add_norm;
mod attention;
mod avx2;
mod embed;
mod exp;
mod gated_act;
mod kv_head;
mod mat_mul;
mod mul_add;
mod packed;
mod reset_counts;
mod rms_norm;
mod rope_kv;
pub(super) mod sample;
mod update_table;
mod worker;

use avx2::Avx2;
use packed::PackedWeight;
use worker::{Job, Worker};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// 0 for one a core.
    pub num_threads: usize,
    /// Whether to run the plain twin of everything, for tests.
    pub plain: bool,
}

pub struct CpuBackend {
    options: CpuOptions,
    info: DeviceInfo,
    pool: Arc<ThreadPool>,
    /// The worker holds it while it runs a recording.
    memory: Arc<Mutex<Memory>>,
    worker: Worker,
    num_submitted: u64,
    num_waited: u64,
}

/// What ops work on.
#[derive(Default)]
struct Memory {
    /// Buffers as words.
    buffers: Vec<Vec<u32>>,
    weights: Vec<PackedWeight>,
    mat_mul: mat_mul::Scratch,
}

impl CpuBackend {
    pub fn new(options: CpuOptions) -> Result<CpuBackend, DeviceError> {
        let name = |index| format!("cpu {index}");
        let builder = ThreadPoolBuilder::new().num_threads(options.num_threads).thread_name(name);
        let lost = |error: rayon::ThreadPoolBuildError| DeviceError::Lost {
            device: "cpu".to_owned(),
            reason: format!("its threads cannot be started: {error}"),
        };
        let pool = builder.build().map_err(lost)?;
        let avx2 = if options.plain { None } else { Avx2::detect() };
        let num_threads = pool.current_num_threads();
        let info = DeviceInfo {
            id: "cpu".to_owned(),
            name: format!("{}, {num_threads} threads", cpu_name()),
            driver: format!("fullbore {}", env!("CARGO_PKG_VERSION")),
            tier: if avx2.is_some() { "avx2" } else { "plain" }.to_owned(),
            arithmetic: "f32".to_owned(),
            kernels: String::new(),
            pci_bus_id: None,
            memory_bytes: host_memory::total_bytes(),
            max_buffer_bytes: u64::MAX,
        };
        let (pool, memory) = (Arc::new(pool), Arc::new(Mutex::new(Memory::default())));
        let (workers, shared) = (pool.clone(), memory.clone());
        // The whole pass runs on a thread of the pool, so that an op costs no hand-over from outside.
        let run = move |job: &mut Job| workers.install(|| lock(&shared).run_all(job, avx2));
        let no_thread = |error: std::io::Error| DeviceError::Lost {
            device: "cpu".to_owned(),
            reason: format!("its thread cannot be started: {error}"),
        };
        let worker = Worker::spawn(run).map_err(no_thread)?;
        Ok(CpuBackend { options, info, pool, memory, worker, num_submitted: 0, num_waited: 0 })
    }
}

/// A panic while it was held has ended the worker, which `wait` tells.
fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    fn u32(&self, tensor: Tensor) -> &[u32] {
        &self.buffers[tensor.buffer.0 as usize][range(tensor)]
    }

    fn f32(&self, tensor: Tensor) -> &[f32] {
        bytemuck::cast_slice(self.u32(tensor))
    }

    /// Lets `work` write one tensor while it reads any that lies in another buffer.
    fn write_f32(&mut self, out: Tensor, work: impl FnOnce(&Memory, &mut [f32])) {
        let mut words = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        work(self, bytemuck::cast_slice_mut(&mut words[range(out)]));
        self.buffers[out.buffer.0 as usize] = words;
    }

    fn write_u32(&mut self, out: Tensor, work: impl FnOnce(&Memory, &mut [u32])) {
        let mut words = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        work(self, &mut words[range(out)]);
        self.buffers[out.buffer.0 as usize] = words;
    }

    fn run_all(&mut self, job: &mut Job, avx2: Option<Avx2>) {
        let recording = &job.recording;
        self.buffers[recording.upload_buffer.0 as usize][..recording.upload.len()].copy_from_slice(&recording.upload);
        recording.copies.iter().for_each(|&copy| copy_words(copy, &mut self.buffers));
        recording.ops.iter().for_each(|op| self.run(op, avx2));
        for &tensor in &recording.downloads {
            job.downloads.extend_from_slice(bytemuck::cast_slice(self.u32(tensor)));
        }
    }

    fn run(&mut self, op: &Op, avx2: Option<Avx2>) {
        match *op {
            Op::UpdateTable(op) => update_table::run(op, self),
            Op::Embed(op) => embed::run(op, self),
            Op::RmsNorm(op) => rms_norm::run(op, self),
            Op::MatMul(op) => mat_mul::run(op, self, avx2),
            Op::RopeKv(op) => rope_kv::run(op, self),
            Op::Attention(op) => attention::run(op, self, avx2),
            Op::GatedAct(op) => gated_act::run(op, self),
            Op::AddNorm(op) => add_norm::run(op, self),
            Op::ResetCounts(op) => reset_counts::run(op, self),
            Op::Sample(op) => sample::run(op, self),
            Op::MulAdd(op) => mul_add::run(op, self, avx2),
        }
    }
}

fn range(tensor: Tensor) -> std::ops::Range<usize> {
    let start = tensor.offset as usize;
    start..start + tensor.num_elements() as usize
}

/// Calls `work` with each row of `out`, on all threads where there is enough to do.
fn for_rows(out: &mut [f32], cols: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    const WORTH_A_HAND_OVER: usize = 1 << 14;
    match out.len() < WORTH_A_HAND_OVER {
        true => out.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| work(row, out)),
        false => out.par_chunks_exact_mut(cols).enumerate().for_each(|(row, out)| work(row, out)),
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory {
            device: self.info.id.clone(),
            what: label.to_owned(),
            needed_bytes: size_bytes,
            taken_bytes: lock(&self.memory).buffers.iter().map(|words| words.len() as u64 * 4).sum(),
        };
        let num_words = usize::try_from(size_bytes.div_ceil(4)).map_err(|_| out_of_memory())?;
        if self.info.memory_bytes.is_some_and(|memory_bytes| size_bytes > memory_bytes) {
            return Err(out_of_memory());
        }
        // Zeroed pages come from the system when they are first touched.
        let mut memory = lock(&self.memory);
        memory.buffers.push(vec![0; num_words]);
        Ok(BufferId(memory.buffers.len() as u32 - 1))
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        self.alloc(label, size_bytes).map(Some)
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let mut memory = lock(&self.memory);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory.buffers[buffer.0 as usize]);
        bytes[offset_bytes as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        let packed = PackedWeight::load(spec, source, &self.pool)?;
        let mut memory = lock(&self.memory);
        memory.weights.push(packed);
        let id = WeightId(memory.weights.len() as u32 - 1);
        Ok(Weight { id, rows: spec.rows, cols: spec.cols, format: spec.format })
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        PackedWeight::size_bytes(spec)
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        assert!(self.num_submitted - self.num_waited < MAX_IN_FLIGHT as u64, "too many recordings in flight");
        self.worker.submit(recording);
        self.num_submitted += 1;
        Ok(Ticket(self.num_submitted))
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        self.num_waited += 1;
        assert_eq!(self.num_waited, ticket.0, "tickets are waited for in order");
        Ok(self.worker.wait(out))
    }

    /// It compiles nothing, and does not tell reading from packing.
    fn settle(&mut self) -> LoadTimes {
        LoadTimes::default()
    }

    fn reopen(&mut self) -> Result<(), DeviceError> {
        *self = CpuBackend::new(self.options)?;
        Ok(())
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// What Linux calls the processor; the architecture elsewhere.
fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}
