//! A device under test: tensors with seeded contents, and ops run one recording at a time.
//!
//! Invariant: every tensor lies behind words that no op may touch, at an offset of its own, so that an op that mixes up
//! offsets reads something else. Nothing is freed before the backend is.

use super::random::Random;
use crate::backend::{Backend, DeviceError, LoadError, WeightSpec};
use crate::model::Checkpoint;
use crate::op::Op;
use crate::recording::Recording;
use crate::tensor::{BufferId, KvTensor, KvType, Tensor, Weight, WeightFormat};

/// Offsets are multiples of this many words, and below `NUM_OFFSETS` of them.
const OFFSET_WORDS: u32 = 16;
const NUM_OFFSETS: u32 = 13;
/// Of a product in f32.
pub const MAT_MUL_TOLERANCE: f32 = 1e-5;

pub struct Device {
    backend: Box<dyn Backend>,
    upload: BufferId,
    num_tensors: u32,
}

impl Device {
    pub fn new(mut backend: Box<dyn Backend>) -> Result<Device, DeviceError> {
        let upload = backend.alloc("upload", 4)?;
        Ok(Device { backend, upload, num_tensors: 0 })
    }

    pub fn backend(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    pub fn into_backend(self) -> Box<dyn Backend> {
        self.backend
    }

    /// By how much a product with such weights may differ from the plain cpu's.
    pub fn mat_mul_tolerance(&self, format: WeightFormat) -> f32 {
        let kernels = self.backend.mat_mul_kernels(format);
        kernels.iter().map(|kernel| kernel.tolerance).fold(MAT_MUL_TOLERANCE, f32::max)
    }

    pub fn f32(&mut self, rows: u32, cols: u32, values: &[f32]) -> Result<Tensor, DeviceError> {
        self.tensor(Tensor::f32(self.upload, rows, cols), bytemuck::cast_slice(values))
    }

    pub fn u32(&mut self, rows: u32, cols: u32, values: &[u32]) -> Result<Tensor, DeviceError> {
        self.tensor(Tensor::u32(self.upload, rows, cols), bytemuck::cast_slice(values))
    }

    /// Starts as NaN, so that an element that an op does not write is seen.
    pub fn unwritten(&mut self, rows: u32, cols: u32) -> Result<Tensor, DeviceError> {
        self.f32(rows, cols, &vec![f32::NAN; (rows * cols) as usize])
    }

    pub fn random(&mut self, rows: u32, cols: u32, random: &mut Random) -> Result<Tensor, DeviceError> {
        self.f32(rows, cols, &random.floats((rows * cols) as usize))
    }

    pub fn weight(&mut self, format: WeightFormat, rows: u32, cols: u32, seed: u64) -> Result<Weight, DeviceError> {
        let (format, mut source) = match (Checkpoint::Random { seed, format }).open("weight", rows, cols) {
            Ok(opened) => opened,
            Err(error) => panic!("random rows: {error}"),
        };
        let spec = WeightSpec { name: "weight".to_owned(), rows, cols, format };
        match self.backend.load_weight(&spec, source.as_mut()) {
            Ok(weight) => Ok(weight),
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
        let k = self.backend.alloc("k", size_bytes)?;
        let v = self.backend.alloc("v", size_bytes)?;
        Ok(KvTensor { k, v, kv_type, num_blocks, block_size, num_kv_heads, head_dim })
    }

    /// Runs `ops` and reads tensors back as words.
    pub fn run(&mut self, ops: &[Op], downloads: &[Tensor]) -> Result<Vec<u32>, DeviceError> {
        let mut recording = Recording::new(self.upload);
        ops.iter().for_each(|op| recording.push(*op));
        recording.downloads.extend_from_slice(downloads);
        let ticket = self.backend.submit(&recording)?;
        let mut bytes = Vec::new();
        self.backend.wait(ticket, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }

    fn tensor(&mut self, shape: Tensor, data: &[u8]) -> Result<Tensor, DeviceError> {
        let offset = OFFSET_WORDS * (1 + self.num_tensors % NUM_OFFSETS);
        self.num_tensors += 1;
        let tensor = Tensor { offset, ..shape };
        let buffer = self.backend.alloc("verified", tensor.offset_bytes() + tensor.size_bytes())?;
        self.backend.write(buffer, tensor.offset_bytes(), data)?;
        Ok(Tensor { buffer, ..tensor })
    }
}
