//! A device to be timed: recordings of one op many times over, and the device's own account of how long each took.
//!
//! Invariant: one recording at a time. Nothing here knows what an op does.

use std::time::Instant;

use fullbore_engine::backend::{Backend, DeviceError, LoadError, WeightSpec};
use fullbore_engine::memory::capacity::human_bytes;
use fullbore_engine::model::Checkpoint;
use fullbore_engine::op::Op;
use fullbore_engine::recording::{BufferCopy, Recording};
use fullbore_engine::tensor::{Tensor, Weight};

use super::OpsError;
use crate::workload::SplitMix64;

/// What a recording should take, about: long beside a submission, short beside a watchdog.
const RECORDING_NS: f64 = 2e7;
/// Ops of a recording at most.
const MAX_REPEATS: usize = 1000;
/// Copies of a weight at most.
const MAX_COPIES: u64 = 64;
/// Share of the device's memory that weights may take.
const MEMORY_SHARE: f64 = 0.7;

pub struct Rig<'a> {
    pub backend: &'a mut dyn Backend,
    recording: Recording,
    /// By weights.
    loaded_bytes: u64,
}

/// What a recording took: the device by its own account, and the host to hand it over.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    pub device_ns: f64,
    pub submit_ns: f64,
}

impl Rig<'_> {
    pub fn new(backend: &mut dyn Backend) -> Result<Rig<'_>, DeviceError> {
        let upload = backend.alloc("upload", 4)?;
        Ok(Rig { backend, recording: Recording::new(upload), loaded_bytes: 0 })
    }

    /// A tensor of values between -1 and 1.
    pub fn random(&mut self, rows: u32, cols: u32) -> Result<Tensor, DeviceError> {
        let tensor = self.zeros(rows, cols)?;
        let mut random = SplitMix64(1);
        let value = |_| (random.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0).to_le_bytes();
        let bytes: Vec<u8> = (0..tensor.num_elements()).flat_map(value).collect();
        self.backend.write(tensor.buffer, 0, &bytes)?;
        Ok(tensor)
    }

    pub fn zeros(&mut self, rows: u32, cols: u32) -> Result<Tensor, DeviceError> {
        let size_bytes = u64::from(rows) * u64::from(cols) * 4;
        Ok(Tensor::f32(self.backend.alloc("activations", size_bytes)?, rows, cols))
    }

    pub fn words(&mut self, cols: u32, words: &[u32]) -> Result<Tensor, DeviceError> {
        let rows = words.len() as u32 / cols;
        let tensor = Tensor::u32(self.backend.alloc("step data", words.len() as u64 * 4)?, rows, cols);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.backend.write(tensor.buffer, 0, &bytes)?;
        Ok(tensor)
    }

    /// As many equal weights as are `cold_bytes`, so that no cache holds them when their turn comes again; or why there
    /// is none.
    pub fn cold_weights(
        &mut self,
        spec: &WeightSpec,
        cold_bytes: u64,
    ) -> Result<Result<Vec<Weight>, String>, OpsError> {
        if !spec.format.has_whole_blocks(spec.cols) {
            let (cols, format) = (spec.cols, spec.format);
            return Ok(Err(format!(
                "rows of {cols} do not fill blocks of {} of {}",
                format.block_len(),
                format.name()
            )));
        }
        let size_bytes = self.backend.weight_bytes(spec).max(1);
        let memory_bytes = self.backend.info().memory_bytes;
        let free_bytes = memory_bytes.map_or(u64::MAX, |bytes| (bytes as f64 * MEMORY_SHARE) as u64);
        let mut weights = Vec::new();
        for copy in 0..cold_bytes.div_ceil(size_bytes).clamp(1, MAX_COPIES) {
            if self.loaded_bytes.saturating_add(size_bytes) > free_bytes {
                break;
            }
            match self.weight(spec, copy) {
                Ok(weight) => weights.push(weight),
                Err(LoadError::Device(DeviceError::OutOfMemory { .. })) => break,
                Err(error) => return Err(error.into()),
            }
            self.loaded_bytes += size_bytes;
        }
        let reason = || format!("{} do not fit the device's memory", human_bytes(size_bytes));
        Ok(if weights.is_empty() { Err(reason()) } else { Ok(weights) })
    }

    fn weight(&mut self, spec: &WeightSpec, seed: u64) -> Result<Weight, LoadError> {
        let checkpoint = Checkpoint::Random { seed, format: spec.format };
        let (_, mut rows) = checkpoint.open(&spec.name, spec.rows, spec.cols)?;
        self.backend.load_weight(spec, rows.as_mut())
    }

    /// Runs `repeats` of `ops`, in turns.
    pub fn run(&mut self, ops: &[Op], repeats: usize) -> Result<Took, OpsError> {
        self.recording.clear();
        (0..repeats).for_each(|index| self.recording.push(ops[index % ops.len()]));
        self.submit()
    }

    pub fn copy(&mut self, copy: BufferCopy, repeats: usize) -> Result<Took, OpsError> {
        self.recording.clear();
        (0..repeats).for_each(|_| self.recording.copy(copy));
        self.submit()
    }

    /// How many times `num` of `ops` make a recording, once they have been warmed up.
    pub fn repeats(&mut self, ops: &[Op], num: usize) -> Result<usize, OpsError> {
        self.run(ops, ops.len().min(2 * num))?;
        let one_ns = self.run(ops, num)?.device_ns;
        Ok(((RECORDING_NS / one_ns) as usize).clamp(1, MAX_REPEATS))
    }

    fn submit(&mut self) -> Result<Took, OpsError> {
        let begun = Instant::now();
        let ticket = self.backend.submit(&self.recording)?;
        let submit_ns = begun.elapsed().as_nanos() as f64;
        let ran = self.backend.wait(ticket, &mut Vec::new())?;
        let device_ns = (ran.end - ran.start).as_nanos() as f64;
        if device_ns == 0.0 {
            return Err(OpsError::NoTime { device: self.backend.info().id.clone() });
        }
        Ok(Took { device_ns, submit_ns })
    }
}
