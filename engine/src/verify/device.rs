//! A device under test: tensors with seeded contents, and ops run one recording at a time.
//!
//! Invariant: every tensor lies behind words that no op may touch, at an offset of its own, so that an op that mixes up
//! offsets reads something else. Nothing is freed before the backend is: a weight is there once, and what a case has
//! taken is taken again by those after it.

use std::collections::HashMap;

use super::random::Random;
use crate::backend::{Backend, DeviceError, LoadError, WeightSpec};
use crate::model::Checkpoint;
use crate::op::Op;
use crate::recording::Recording;
use crate::tensor::{BufferId, DType, KvTensor, KvType, Tensor, Weight, WeightFormat};

/// Offsets are multiples of this many words, and below `NUM_OFFSETS` of them.
const OFFSET_WORDS: u32 = 16;
const NUM_OFFSETS: u32 = 13;
/// Of a product in f32.
pub const MAT_MUL_TOLERANCE: f32 = 1e-5;

pub struct Device {
    backend: Box<dyn Backend>,
    /// Once something was run.
    upload: Option<BufferId>,
    num_tensors: u32,
    /// By what they were made of.
    weights: HashMap<(WeightFormat, u32, u32, u64), Weight>,
    /// With their sizes in bytes: those of tensors, and those that are free again.
    taken: Vec<(u64, BufferId)>,
    free: Vec<(u64, BufferId)>,
}

impl Device {
    pub fn new(backend: Box<dyn Backend>) -> Device {
        let (weights, taken, free) = (HashMap::new(), Vec::new(), Vec::new());
        Device { backend, upload: None, num_tensors: 0, weights, taken, free }
    }

    pub fn backend(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    pub fn into_backend(self) -> Box<dyn Backend> {
        self.backend
    }

    /// What `work` returns, of whose tensors none is used after it.
    pub(super) fn within<T>(&mut self, work: impl FnOnce(&mut Device) -> T) -> T {
        let num_taken = self.taken.len();
        let out = work(self);
        self.free.extend(self.taken.drain(num_taken..));
        out
    }

    /// By how much a product with such weights may differ from the plain cpu's.
    pub fn mat_mul_tolerance(&self, format: WeightFormat) -> f32 {
        let kernels = self.backend.mat_mul_kernels(format);
        kernels.iter().map(|kernel| kernel.tolerance).fold(MAT_MUL_TOLERANCE, f32::max)
    }

    pub fn f32(&mut self, rows: u32, cols: u32, values: &[f32]) -> Result<Tensor, DeviceError> {
        self.tensor(rows, cols, DType::F32, bytemuck::cast_slice(values))
    }

    pub fn u32(&mut self, rows: u32, cols: u32, values: &[u32]) -> Result<Tensor, DeviceError> {
        self.tensor(rows, cols, DType::U32, bytemuck::cast_slice(values))
    }

    /// Starts as NaN, so that an element that an op does not write is seen.
    pub fn unwritten(&mut self, rows: u32, cols: u32) -> Result<Tensor, DeviceError> {
        self.f32(rows, cols, &vec![f32::NAN; (rows * cols) as usize])
    }

    pub fn random(&mut self, rows: u32, cols: u32, random: &mut Random) -> Result<Tensor, DeviceError> {
        self.f32(rows, cols, &random.floats((rows * cols) as usize))
    }

    pub fn weight(&mut self, format: WeightFormat, rows: u32, cols: u32, seed: u64) -> Result<Weight, DeviceError> {
        let made_of = (format, rows, cols, seed);
        if let Some(weight) = self.weights.get(&made_of) {
            return Ok(*weight);
        }
        let (format, mut source) = match (Checkpoint::Random { seed, format }).open("weight", rows, cols) {
            Ok(opened) => opened,
            Err(error) => panic!("random rows: {error}"),
        };
        let spec = WeightSpec { name: "weight".to_owned(), rows, cols, format };
        match self.backend.load_weight(&spec, source.as_mut()) {
            Ok(weight) => {
                self.weights.insert(made_of, weight);
                Ok(weight)
            }
            Err(LoadError::Device(error)) => Err(error),
            Err(error) => panic!("random rows: {error}"),
        }
    }

    /// An empty cache.
    pub fn kv_cache(
        &mut self,
        kv_type: KvType,
        num_blocks: u32,
        block_size: u32,
        num_kv_heads: u32,
        head_dim: u32,
    ) -> Result<KvTensor, DeviceError> {
        let size_bytes = u64::from(num_blocks) * KvTensor::block_bytes(kv_type, block_size, num_kv_heads, head_dim);
        let (k, v, zeros) = (self.buffer(size_bytes)?, self.buffer(size_bytes)?, vec![0; size_bytes as usize]);
        self.backend.write(k, 0, &zeros)?;
        self.backend.write(v, 0, &zeros)?;
        Ok(KvTensor { k, v, kv_type, num_blocks, block_size, num_kv_heads, head_dim })
    }

    /// Runs `ops` and reads tensors back as words.
    pub fn run(&mut self, ops: &[Op], downloads: &[Tensor]) -> Result<Vec<u32>, DeviceError> {
        let upload = match self.upload {
            Some(upload) => upload,
            None => *self.upload.insert(self.backend.alloc("upload", 4)?),
        };
        let mut recording = Recording::new(upload);
        ops.iter().for_each(|op| recording.push(*op));
        recording.downloads.extend_from_slice(downloads);
        let ticket = self.backend.submit(&recording)?;
        let mut bytes = Vec::new();
        self.backend.wait(ticket, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }

    fn tensor(&mut self, rows: u32, cols: u32, dtype: DType, data: &[u8]) -> Result<Tensor, DeviceError> {
        let offset = OFFSET_WORDS * (1 + self.num_tensors % NUM_OFFSETS);
        self.num_tensors += 1;
        // Of any offset, so that it fits the next of that shape too.
        let needed = data.len() as u64 + u64::from(4 * OFFSET_WORDS * NUM_OFFSETS);
        let buffer = self.buffer(needed)?;
        let tensor = Tensor { buffer, offset, rows, cols, dtype };
        self.backend.write(buffer, tensor.offset_bytes(), data)?;
        Ok(tensor)
    }

    /// The smallest that is free and large enough, or a new one.
    fn buffer(&mut self, needed: u64) -> Result<BufferId, DeviceError> {
        let fits = self.free.iter().enumerate().filter(|(_, (size, _))| *size >= needed);
        let found = fits.min_by_key(|(_, (size, _))| *size).map(|(index, _)| index);
        let taken = match found {
            Some(index) => self.free.swap_remove(index),
            None => (needed, self.backend.alloc("verified", needed)?),
        };
        self.taken.push(taken);
        Ok(taken.1)
    }
}
