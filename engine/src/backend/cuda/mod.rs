//! The backend for NVIDIA GPUs through CUDA: a recording becomes one upload, its copies and launches on one stream.
//!
//! Invariant: what a model is known to take is allocated, and its kernels are loaded, before its first step. Weights
//! stay packed, as on other GPUs. For one (N, K, format) every matmul kernel adds in the same order. Where kernels run
//! is the device's: a GPU, or the host in tests.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::time::Instant;

use fullbore_cuda_kernels::{Copied, CudaError, Device, Function, Gpu, GpuInfo, Launch, Work, all_texts, gpus};
use siphasher::sip::SipHasher13;

use crate::backend::packing::{pack_rows, packed_bytes};
use crate::backend::{
    Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, MAX_IN_FLIGHT, Needs, RowSource, Ticket, WeightSpec,
    is_one_pci_place,
};
use crate::recording::Recording;
use crate::tensor::{BufferId, Weight, WeightFormat, WeightId};
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

mod arena;
mod encode;
pub mod kernel;
mod mat_mul_tables;
mod params;

use arena::{Arenas, Holds};
use encode::{Encoded, Encoder, SplitK, halves_bytes};
pub use kernel::Arithmetic;
use kernel::Kernel;
use mat_mul_tables::MatMulTables;
use params::Address;

/// What CUDA devices begin with: `cuda`, `cuda:0`, `cuda:GPU-...`.
pub const PREFIX: &str = "cuda";
/// Along K, of the products that `mul_add_matrix.cu` has in a round.
const MATRIX_SIZE: u32 = 16;

pub struct CudaBackend {
    device: Box<dyn Device>,
    info: DeviceInfo,
    /// By buffer id.
    buffers: Vec<Address>,
    /// By weight id.
    weights: Vec<Address>,
    mat_muls: MatMulTables,
    /// Where products that are split leave their parts, from the first weight on.
    parts: Option<Address>,
    /// Where activations of few rows lie in f16, and of how many columns at most.
    halves: (Address, u32),
    memory: Arenas,
    functions: HashMap<Kernel, Function>,
    /// When each recording in flight was submitted.
    in_flight: VecDeque<Instant>,
    /// When it had done what was waited for last.
    free_at: Option<Instant>,
    num_submitted: u64,
    times: LoadTimes,
    /// Refilled each step.
    encoded: Vec<Encoded>,
    launches: Vec<Launch>,
}

/// Why a GPU cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(String);

impl From<CudaError> for OpenError {
    fn from(error: CudaError) -> OpenError {
        OpenError(error.to_string())
    }
}

/// The GPUs that CUDA gives, as `--device` takes them; an error says why there is none.
pub fn devices() -> Result<Vec<DeviceInfo>, OpenError> {
    Ok(well(gpus()?)?.iter().map(|gpu| describe(gpu, Some(gpu.memory_bytes))).collect())
}

/// Those of which the driver tells all; of each other the log says why not, and the error where it is all there is.
fn well(found: Vec<Result<GpuInfo, CudaError>>) -> Result<Vec<GpuInfo>, OpenError> {
    let (mut well, mut unwell) = (Vec::new(), Vec::new());
    for gpu in found {
        match gpu {
            Ok(gpu) => well.push(gpu),
            Err(error) => unwell.push(error),
        }
    }
    if well.is_empty() {
        let none = || OpenError("CUDA gives this process no GPU: see CUDA_VISIBLE_DEVICES".to_owned());
        return Err(unwell.first().cloned().map_or_else(none, OpenError::from));
    }
    unwell.iter().for_each(|error| tracing::warn!("going on without a GPU: {error}"));
    Ok(well)
}

/// What `selector` names: nothing for the first, a number, a place on the PCI bus, or the begin of a UUID.
fn choose(found: Vec<Result<GpuInfo, CudaError>>, selector: &str) -> Result<GpuInfo, OpenError> {
    let ordinal = selector.parse::<i32>().ok();
    let unwell = ordinal.and_then(|ordinal| found.get(usize::try_from(ordinal).ok()?)?.as_ref().err());
    if let Some(error) = unwell {
        return Err(error.clone().into());
    }
    let well = well(found)?;
    let is_meant = |gpu: &&GpuInfo| match ordinal {
        Some(ordinal) => gpu.ordinal == ordinal,
        None if is_one_pci_place(selector, &gpu.pci_bus_id) => true,
        None => gpu.uuid.to_lowercase().starts_with(&selector.to_lowercase()),
    };
    let named = well.iter().map(|gpu| format!("{PREFIX}:{} ({}, {})", gpu.ordinal, gpu.name, gpu.uuid));
    let unknown = || OpenError(format!("CUDA has {}", named.collect::<Vec<_>>().join(", ")));
    well.iter().find(is_meant).cloned().ok_or_else(unknown)
}

/// What the kernels are written like: a hash of all texts.
fn kernels() -> String {
    let mut hasher = SipHasher13::new();
    all_texts().hash(&mut hasher);
    format!("cuda {:016x}", hasher.finish())
}

fn describe(gpu: &GpuInfo, memory_bytes: Option<u64>) -> DeviceInfo {
    DeviceInfo {
        id: format!("{PREFIX}:{}", gpu.ordinal),
        name: gpu.name.clone(),
        driver: format!("{}; {}", gpu.driver, gpu.uuid),
        tier: format!("sm_{}", gpu.architecture),
        arithmetic: Arithmetic::F32.name().to_owned(),
        kernels: kernels(),
        pci_bus_id: Some(gpu.pci_bus_id.clone()),
        memory_bytes,
        max_buffer_bytes: u64::MAX,
    }
}

impl CudaBackend {
    /// Opens the GPU that `selector` names: nothing for the first, a number, a place on the PCI bus, or the begin of a
    /// UUID. In f32 where there are no kernels for `wanted`: Turing takes those of tensor cores from NVRTC alone.
    pub fn open(selector: &str, wanted: Arithmetic) -> Result<CudaBackend, OpenError> {
        let gpu = choose(gpus()?, selector)?;
        let mut device = Gpu::open(&gpu)?;
        let info = describe(&gpu, device.info().free_bytes);
        let (module, name) = Kernel::MulAddMatrix.source();
        let arithmetic = match wanted {
            Arithmetic::MatrixUnits => device.function(&module, name).map(|_| wanted).unwrap_or_else(|lacks| {
                tracing::warn!(device = info.id, "--arithmetic {} lacks {lacks}: going on in f32", wanted.name());
                Arithmetic::F32
            }),
            Arithmetic::F32 => wanted,
        };
        Ok(CudaBackend::on(Box::new(device), info, arithmetic))
    }

    /// On a device that is open.
    pub fn on(device: Box<dyn Device>, info: DeviceInfo, arithmetic: Arithmetic) -> CudaBackend {
        CudaBackend {
            device,
            info: DeviceInfo { arithmetic: arithmetic.name().to_owned(), kernels: kernels(), ..info },
            mat_muls: MatMulTables::new(arithmetic),
            buffers: Vec::new(),
            weights: Vec::new(),
            parts: None,
            halves: (0, 0),
            memory: Arenas::default(),
            functions: HashMap::new(),
            in_flight: VecDeque::new(),
            free_at: None,
            num_submitted: 0,
            times: LoadTimes::default(),
            encoded: Vec::new(),
            launches: Vec::new(),
        }
    }

    fn error(&self, error: CudaError, what: &str) -> DeviceError {
        let device = self.info.id.clone();
        match error {
            CudaError::OutOfMemory { needed_bytes } => {
                let (what, taken_bytes) = (what.to_owned(), self.memory.taken_bytes);
                DeviceError::OutOfMemory { device, what, needed_bytes, taken_bytes }
            }
            CudaError::Kernel { kernel, reason } => DeviceError::Kernel { device, kernel, reason },
            CudaError::Lost(reason) | CudaError::NotThere(reason) => DeviceError::Lost { device, reason },
        }
    }

    fn take(&mut self, label: &str, size_bytes: u64, holds: Holds) -> Result<Address, DeviceError> {
        let taken = self.memory.take(holds, size_bytes.max(4), self.device.as_mut());
        taken.map_err(|error| self.error(error, label))
    }

    /// For products with a weight of `cols` columns on tensor cores: `beside_weights_bytes`, where no narrower one came
    /// before.
    fn make_room(&mut self, cols: u32) -> Result<(), DeviceError> {
        if self.mat_muls.arithmetic() != Arithmetic::MatrixUnits {
            return Ok(());
        }
        if self.parts.is_none() {
            let size_bytes = SplitK::bytes(self.device.info().num_multiprocessors);
            self.parts = Some(self.take("parts of products", size_bytes, Holds::Weights)?);
        }
        if self.halves.1 < cols {
            self.halves = (self.take("activations in f16", halves_bytes(cols), Holds::Weights)?, cols);
        }
        Ok(())
    }

    fn function(&mut self, kernel: Kernel) -> Result<Function, DeviceError> {
        if let Some(&function) = self.functions.get(&kernel) {
            return Ok(function);
        }
        let begun = Instant::now();
        let (module, name) = kernel.source();
        let function = self.device.function(&module, name).map_err(|error| self.error(error, name))?;
        self.times.pipelines += begun.elapsed();
        self.times.num_pipelines += 1;
        self.functions.insert(kernel, function);
        Ok(function)
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// An arena for all weights and one for all buffers, memory of the host for as many steps as are in flight, and the
    /// kernels.
    fn prepare(&mut self, needs: &Needs) -> Result<(), DeviceError> {
        for (what, holds, size_bytes) in
            [("weights", Holds::Weights, needs.weights_bytes), ("buffers", Holds::Buffers, needs.buffers_bytes)]
        {
            let reserved = self.memory.reserve(holds, size_bytes, self.device.as_mut());
            reserved.map_err(|error| self.error(error, what))?;
        }
        self.make_room(needs.weight_cols)?;
        let staged = self.device.stage(MAX_IN_FLIGHT, needs.upload_bytes, needs.download_bytes);
        staged.map_err(|error| self.error(error, "steps in flight"))?;
        let kernels = Kernel::beside_products(needs.kv_type, needs.head_dim, self.mat_muls.arithmetic());
        kernels.into_iter().try_for_each(|kernel| self.function(kernel).map(drop))
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        let address = self.take(label, size_bytes, Holds::Buffers)?;
        self.buffers.push(address);
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        let address = self.device.alloc_host(size_bytes.max(4)).map_err(|error| self.error(error, label))?;
        self.buffers.push(address);
        Ok(Some(BufferId(self.buffers.len() as u32 - 1)))
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let to = self.buffers[buffer.0 as usize] + offset_bytes;
        self.device.write(to, data).map_err(|error| self.error(error, "a write"))
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        let variants: Vec<_> = self.mat_muls.variants().collect();
        variants.into_iter().try_for_each(|variant| self.function(Kernel::MatMul(spec.format, variant)).map(drop))?;
        self.function(Kernel::Embed(spec.format))?;
        self.make_room(spec.cols)?;
        let address = self.take(&spec.name, self.weight_bytes(spec), Holds::Weights)?;
        let mut times = self.times;
        pack_rows(spec, spec.rows, source, &mut times, |offset_bytes, words| {
            self.device.write(address + offset_bytes, words).map_err(|error| self.error(error, &spec.name))
        })?;
        self.times = times;
        self.weights.push(address);
        let id = WeightId(self.weights.len() as u32 - 1);
        Ok(Weight { id, rows: spec.rows, cols: spec.cols, format: spec.format })
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        packed_bytes(spec.format, spec.rows, spec.cols)
    }

    fn beside_weights_bytes(&self, cols: u32) -> u64 {
        match self.mat_muls.arithmetic() {
            Arithmetic::F32 => 0,
            Arithmetic::MatrixUnits => SplitK::bytes(self.device.info().num_multiprocessors) + halves_bytes(cols),
        }
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        assert!(self.in_flight.len() < MAX_IN_FLIGHT, "{MAX_IN_FLIGHT} recordings are in flight");
        self.encoded.clear();
        let (buffers, weights, mat_muls) = (&self.buffers[..], &self.weights[..], &self.mat_muls);
        let num_multiprocessors = self.device.info().num_multiprocessors;
        let split_k = SplitK { parts: self.parts.unwrap_or(0), num_multiprocessors };
        let (halves, in_halves, out) = (self.halves.0, None, &mut self.encoded);
        let mut encoder = Encoder { buffers, weights, mat_muls, split_k, halves, in_halves, out };
        encoder.ops(&recording.ops);
        self.launches.clear();
        for index in 0..self.encoded.len() {
            let Encoded { kernel, blocks, params } = self.encoded[index];
            let function = self.function(kernel)?;
            self.launches.push(Launch { function, blocks, params });
        }
        let at = |buffer: BufferId| self.buffers[buffer.0 as usize];
        let copies = recording.copies.iter().map(|copy| {
            let (from, to) = (at(copy.from) + copy.from_bytes, at(copy.to) + copy.to_bytes);
            Copied { from, to, size_bytes: copy.size_bytes }
        });
        let downloads = recording.downloads.iter().map(|tensor| {
            let from = at(tensor.buffer) + tensor.offset_bytes();
            (from, tensor.size_bytes())
        });
        let (copies, downloads): (Vec<_>, Vec<_>) = (copies.collect(), downloads.collect());
        let work = Work {
            upload_to: at(recording.upload_buffer),
            upload: bytemuck::cast_slice(&recording.upload),
            copies: &copies,
            launches: &self.launches,
            downloads: &downloads,
        };
        let place = self.num_submitted as usize % MAX_IN_FLIGHT;
        let submitted_at = Instant::now();
        self.device.submit(place, &work).map_err(|error| self.error(error, "a step"))?;
        self.in_flight.push_back(submitted_at);
        self.num_submitted += 1;
        Ok(Ticket(self.num_submitted - 1))
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let num_waited = self.num_submitted - self.in_flight.len() as u64;
        assert_eq!(ticket.0, num_waited, "tickets are waited for once each and in order");
        let submitted_at = self.in_flight.pop_front().expect("a recording is in flight");
        let place = ticket.0 as usize % MAX_IN_FLIGHT;
        let took = self.device.wait(place, out).map_err(|error| self.error(error, "a step"))?;
        let begun = self.free_at.map_or(submitted_at, |free_at| free_at.max(submitted_at));
        let ended = (begun + took).min(Instant::now()).max(begun);
        self.free_at = Some(ended);
        Ok(begun..ended)
    }

    fn settle(&mut self) -> LoadTimes {
        std::mem::take(&mut self.times)
    }

    fn reopen(&mut self) -> Result<(), DeviceError> {
        self.buffers.clear();
        self.weights.clear();
        self.parts = None;
        self.halves = (0, 0);
        self.functions.clear();
        self.in_flight.clear();
        self.memory = Arenas::default();
        (self.free_at, self.num_submitted) = (None, 0);
        self.device.reopen().map_err(|error| self.error(error, "the device"))
    }

    fn matrix_size(&self) -> Option<u32> {
        (self.mat_muls.arithmetic() == Arithmetic::MatrixUnits).then_some(MATRIX_SIZE)
    }

    fn mat_mul_kernels(&self, _: WeightFormat) -> Vec<MatMulKernel> {
        self.mat_muls.kernels()
    }

    fn attention_tolerance(&self) -> f32 {
        match self.mat_muls.arithmetic() {
            Arithmetic::F32 => 2e-5,
            Arithmetic::MatrixUnits => 2e-3,
        }
    }

    fn mat_mul_table(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        self.mat_muls.lines(shape)
    }

    fn set_mat_mul_table(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        self.mat_muls.set(shape, table)
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(ordinal: i32, uuid: &str) -> Result<GpuInfo, CudaError> {
        let [name, uuid, driver] = ["a GPU", uuid, "CUDA 12.2"].map(str::to_owned);
        let pci_bus_id = format!("0000:0{ordinal}:00.0");
        let (architecture, num_multiprocessors, memory_bytes) = (90, 132, 1 << 36);
        Ok(GpuInfo { ordinal, name, uuid, pci_bus_id, architecture, num_multiprocessors, memory_bytes, driver })
    }

    #[test]
    fn a_gpu_that_is_unwell_hides_no_other() {
        let unwell = || Err(CudaError::NotThere("GPU 0: it is unwell".to_owned()));
        let found = || vec![unwell(), gpu(1, "GPU-3f2a"), gpu(2, "MIG-77aa")];
        let chosen = |selector| choose(found(), selector).map(|gpu| gpu.ordinal).map_err(|error| error.to_string());
        assert_eq!(["", "1", "gpu-3f", "2", "mig-77AA"].map(chosen), [1, 1, 1, 2, 2].map(Ok));
        assert_eq!(["0000:02:00.0", "02:00.0", "00000000:02:00.0"].map(chosen), [2; 3].map(Ok));
        assert_eq!(chosen("0"), Err("GPU 0: it is unwell".to_owned()));
        let others = "CUDA has cuda:1 (a GPU, GPU-3f2a), cuda:2 (a GPU, MIG-77aa)";
        let unknown = ["3", "-1", "GPU-0", "0000:03:00.0", "0001:02:00.0"];
        assert_eq!(unknown.map(chosen), [others; 5].map(|others| Err(others.to_owned())));
        assert_eq!(well(found()).expect("two are well").len(), 2);
        for (found, reason) in [(vec![unwell()], "GPU 0: it is unwell"), (vec![], "no GPU: see CUDA_VISIBLE_DEVICES")] {
            let error = well(found).expect_err("none is well").to_string();
            assert!(error.ends_with(reason), "{error}");
        }
    }
}
