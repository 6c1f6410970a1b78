//! Fullbore's CUDA kernels as text, and the devices that run them: a GPU by its driver, or the host in tests.
//!
//! Invariant: a kernel is written once and needs no header; formats differ by constants alone. Nothing of CUDA is
//! needed to build this, nor to run what does not open a GPU. This crate knows no type of the engine: memory is
//! addresses, parameters are bytes.

mod gpu;
pub mod host;
pub mod ptx;
mod source;

use std::time::Duration;

pub use gpu::compile::compile;
pub use gpu::{Gpu, GpuInfo, gpus};
pub use source::{Module, all_texts};

/// Bytes of a kernel's parameters at most.
pub const MAX_PARAMS: usize = 192;

/// A kernel that a device has loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Function(pub(crate) u32);

/// A kernel on its way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    pub function: Function,
    /// In one dimension.
    pub blocks: u32,
    pub params: [u8; MAX_PARAMS],
}

/// Bytes at one address, to go to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    pub from: u64,
    pub to: u64,
    pub size_bytes: u64,
}

/// What is done in one go, in the order of the fields.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    pub upload_to: u64,
    pub upload: &'a [u8],
    pub copies: &'a [Copied],
    pub launches: &'a [Launch],
    /// Addresses and sizes in bytes.
    pub downloads: &'a [(u64, u64)],
}

#[derive(Clone, Debug, Default)]
pub struct DeviceInfo {
    /// As people call it: "NVIDIA H100 80GB HBM3".
    pub name: String,
    pub driver: String,
    /// Compute capability, as in sm_90: 90. 0 for the host.
    pub architecture: u32,
    pub num_multiprocessors: u32,
    /// Free bytes when it was opened.
    pub free_bytes: Option<u64>,
}

#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CudaError {
    #[error("{needed_bytes} bytes more do not fit into the device's memory")]
    OutOfMemory { needed_bytes: u64 },
    /// All that was on the device is gone.
    #[error("{0}")]
    Lost(String),
    #[error("kernel {kernel}: {reason}")]
    Kernel { kernel: String, reason: String },
    #[error("{0}")]
    NotThere(String),
}

/// Where kernels run. Addresses are the device's own; that they are valid is the caller's responsibility.
pub trait Device: Send {
    fn info(&self) -> &DeviceInfo;

    /// The address of so much zeroed memory; nothing is freed before the device is.
    fn alloc(&mut self, size_bytes: u64) -> Result<u64, CudaError>;

    /// The same in memory of the host that the device copies from and to.
    fn alloc_host(&mut self, size_bytes: u64) -> Result<u64, CudaError>;

    /// Memory of the host for so many pieces of work at a time, and so many bytes of each to the device and back, which
    /// `submit` then need not take.
    fn stage(&mut self, places: usize, upload_bytes: u64, download_bytes: u64) -> Result<(), CudaError>;

    /// Has happened when this returns.
    fn write(&mut self, to: u64, data: &[u8]) -> Result<(), CudaError>;

    /// Loads a module of kernels, compiled for this device, once.
    fn function(&mut self, module: &Module, kernel: &str) -> Result<Function, CudaError>;

    /// Begins `work` after all earlier work. `place` is the caller's name for it until it is waited for, from 0 on.
    fn submit(&mut self, place: usize, work: &Work) -> Result<(), CudaError>;

    /// Blocks until the work at `place` is done, appends its downloads to `out`, and says how long the device took.
    fn wait(&mut self, place: usize, out: &mut Vec<u8>) -> Result<Duration, CudaError>;

    /// The same device anew, with nothing on it, after it was lost.
    fn reopen(&mut self) -> Result<(), CudaError>;
}
