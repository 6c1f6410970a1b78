//! What a device must do for the engine, and which devices there are.
//!
//! The contract of [`Backend`], all of it:
//! - A backend holds buffers and weights and runs recordings, in submission order.
//! - `submit` returns before the work is done. The recording's upload takes effect after all earlier recordings and
//!   before its own copies, and those one by one before its first op; ops see the writes of earlier ops; there are no
//!   barriers in the interface.
//! - `wait` blocks until the recording of that ticket is done and delivers its downloads, and when the device was at
//!   it, as exactly as it can tell: not before the one before it was done, nor after `wait` has returned. Tickets are
//!   waited for once each and in order; at most [`MAX_IN_FLIGHT`] are open.
//! - Shapes, ranges and lifetimes are the caller's responsibility, asserted by `Recording`; a backend that meets a
//!   violation panics, because it is a bug above.
//! - `alloc`, `alloc_host`, `write` and `load_weight` are for loading, before the first step; only what verifies a
//!   device submits before. Buffers start zeroed. There is no free: everything is allocated at start, and a step
//!   creates no buffer.
//! - Errors are only what a caller cannot foresee: out of memory, device lost, a kernel that the driver cannot build.
//! - A backend packs each weight format once, into one layout used by all its kernels, and never holds a dequantised
//!   copy of a quantised weight.
//!
//! A backend knows no scheduler, memory manager, sequence or request: it cannot know what a user is.

use std::io;
use std::ops::{AddAssign, Range};
use std::time::{Duration, Instant};

use crate::format::FormatError;
use crate::recording::{BufferCopy, Recording};
use crate::tensor::{BufferId, KvType, Weight, WeightFormat};
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

pub mod around;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod host_memory;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod packing;
pub mod sim;
pub mod split;
#[cfg(feature = "wgpu")]
pub mod wgpu;

/// Recordings submitted and not yet waited for, at most: a step is one, or two where masks come late.
pub const MAX_IN_FLIGHT: usize = 4;

pub trait Backend: Send {
    fn info(&self) -> &DeviceInfo;

    /// Says before a model is loaded what it will take, so that a device can take it in few pieces, and no step has to
    /// wait for it. What comes beyond it is taken when it comes.
    fn prepare(&mut self, needs: &Needs) -> Result<(), DeviceError> {
        let _ = needs;
        Ok(())
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError>;

    /// Says of what comes next, until it is said again, where in a model's pass it is used: a backend that is several
    /// devices has to know. Loading begins [`Place::Throughout`].
    fn place(&mut self, place: Place) {
        let _ = place;
    }

    /// Whether what is at one end of a model is out of reach at the other, so that both need a copy.
    fn are_ends_apart(&self) -> bool {
        false
    }

    /// A buffer in memory of the host, for copies alone. `None` where the device cannot copy to such memory.
    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError>;

    /// Fills part of a buffer while loading.
    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError>;

    /// Pulls the rows of a weight out of `source`, in order and each once, and packs them.
    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError>;

    /// Bytes that `load_weight` would take, once packed.
    fn weight_bytes(&self, spec: &WeightSpec) -> u64;

    /// Bytes beside all weights that products with them take, of which none has more than `cols` columns.
    fn beside_weights_bytes(&self, cols: u32) -> u64 {
        let _ = cols;
        0
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError>;

    /// Appends the downloads of the ticket's recording to `out`, and says from when until when the device was at it, on
    /// its clock.
    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError>;

    /// Keeps what makes the next start faster, and says what loading took since this was asked last.
    fn settle(&mut self) -> LoadTimes;

    /// Opens the same device anew after it was lost: nothing is on it, and every id and ticket of before is void. After
    /// an error it may be tried again, and nothing else.
    fn reopen(&mut self) -> Result<(), DeviceError>;

    /// The kernels among which a table for weights of `format` may choose; none where there is no choice. All give the
    /// same bits.
    fn mat_mul_kernels(&self, format: WeightFormat) -> Vec<MatMulKernel> {
        let _ = format;
        Vec::new()
    }

    /// Makes the kernels that a model calls for, all at once, where there is anything to make. What is not foreseen is
    /// made when it is met.
    fn make_kernels(&mut self, of: &ModelKernels) -> Result<(), DeviceError> {
        let _ = of;
        Ok(())
    }

    /// Whether that kernel has the memory beside it that it takes for so many rows; where not, another goes in its
    /// place.
    fn has_room(&self, shape: MatMulShape, kernel: &str, rows: u32) -> bool {
        let _ = (shape, kernel, rows);
        true
    }

    /// Rows of the square matrices that products go to, where they go to matrix units and [`MulAdd`](crate::op::MulAdd)
    /// does too: each of its rounds is then so many multiply-adds an element.
    fn matrix_size(&self) -> Option<u32> {
        None
    }

    /// By how much attention may differ from the plain cpu's, relative to the largest.
    fn attention_tolerance(&self) -> f32 {
        2e-5
    }

    /// The table in use.
    fn mat_mul_table(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        let _ = shape;
        Vec::new()
    }

    /// Chooses the kernels for weights of `shape` from the next submission on, also after the device was lost; no line
    /// at all brings back what the device would choose by itself. Given before such a weight is loaded, no request
    /// waits for a kernel to be compiled. An error says what is wrong with the table, and nothing has changed.
    fn set_mat_mul_table(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        let _ = (shape, table);
        Ok(())
    }

    /// The time on this device's clock: the machine's own, but for a simulator, whose time is virtual.
    fn now(&self) -> Instant;
}

/// A copy where buffers are words of the host's memory.
fn copy_words(copy: BufferCopy, buffers: &mut [Vec<u32>]) {
    let places = [copy.from.0 as usize, copy.to.0 as usize];
    let [from, to] = buffers.get_disjoint_mut(places).expect("two buffers of this backend");
    let words = |bytes: u64| bytes as usize / 4;
    let from = &from[words(copy.from_bytes)..][..words(copy.size_bytes)];
    to[words(copy.to_bytes)..][..from.len()].copy_from_slice(from);
}

/// Where in a model's pass something is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// By every layer, or by what is between two ops of one.
    #[default]
    Throughout,
    /// What the host writes for a step. It comes after the stream.
    Inputs,
    /// What one layer hands to the next: f32, a row a token.
    Stream,
    /// The choices: written by the last op, read by the first one of the next step.
    Choices,
    /// By what is before all layers.
    First,
    Layer(u32),
    /// By what is behind all layers.
    Last,
}

/// The claim on a recording between `submit` and `wait`.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// A weight about to be loaded: N rows of K elements.
#[derive(Clone, Debug)]
pub struct WeightSpec {
    pub name: String,
    pub rows: u32,
    pub cols: u32,
    pub format: WeightFormat,
}

/// What the host was at while a model was loaded. Each is a sum over the time that was spent on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadTimes {
    /// Waiting for rows of the file.
    pub read: Duration,
    pub pack: Duration,
    /// Handing them to the device.
    pub upload: Duration,
    /// Making pipelines of kernels.
    pub pipelines: Duration,
    pub num_pipelines: u32,
}

impl AddAssign for LoadTimes {
    fn add_assign(&mut self, other: LoadTimes) {
        self.read += other.read;
        self.pack += other.pack;
        self.upload += other.upload;
        self.pipelines += other.pipelines;
        self.num_pipelines += other.num_pipelines;
    }
}

/// What a model takes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Of all weights, packed, and of what products take beside them.
    pub weights_bytes: u64,
    /// Columns of the widest weight.
    pub weight_cols: u32,
    /// Of the cache, activations and tables.
    pub buffers_bytes: u64,
    /// To the device in a step, at most.
    pub upload_bytes: u64,
    /// And back, at most, but for hidden states and blocks of the cache, which few steps bring back.
    pub download_bytes: u64,
    pub kv_type: KvType,
    pub head_dim: u32,
}

/// What decides which kernels a model runs.
#[derive(Clone, Debug)]
pub struct ModelKernels {
    pub formats: Vec<WeightFormat>,
    pub kv_type: KvType,
    pub head_dim: u32,
    /// Query heads of a KV head.
    pub group: u32,
}

/// Rows of a weight in the file's own layout, `format.row_bytes(cols)` bytes each.
pub trait RowSource {
    /// Fills `out`, a whole number of rows, with the rows that come next.
    fn read_rows(&mut self, out: &mut [u8]) -> io::Result<()>;
}

#[derive(Clone, Debug, Default)]
pub struct DeviceInfo {
    /// As given to `--device`: `cpu`, `vulkan:0`, `sim`.
    pub id: String,
    /// What people call it: "AMD EPYC, 2 threads", "llvmpipe (LLVM 19.1.7, 256 bits)".
    pub name: String,
    pub driver: String,
    /// Kernel tier in use: `base`, `subgroup`, `lavapipe`, `avx2`, `plain`.
    pub tier: String,
    /// What matmuls compute with: `f32` unless other arithmetic was asked for and is there.
    pub arithmetic: String,
    /// What the tier's kernels are written like; empty where no choice among them is ever kept.
    pub kernels: String,
    /// Where it is on the PCI bus, as in `0000:0b:00.0`, if it is and says so: the same through every driver.
    pub pci_bus_id: Option<String>,
    /// Memory the device has for us, where it can be asked.
    pub memory_bytes: Option<u64>,
    /// The largest buffer that an op may bind whole. Weights are sharded below this by the backend itself.
    pub max_buffer_bytes: u64,
}

/// Whether both are one place on the PCI bus: `0000:0b:00.0`, of which `lspci` leaves domain 0 out, and `nvidia-smi`
/// writes it longer.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn is_one_pci_place(a: &str, b: &str) -> bool {
    let place = |text: &str| {
        let (slot, function) = text.rsplit_once('.')?;
        let number = |digits: &str| u32::from_str_radix(digits, 16).ok();
        let mut numbers: Vec<u32> = slot.split(':').map(number).collect::<Option<_>>()?;
        if numbers.len() == 2 {
            numbers.insert(0, 0);
        }
        (numbers.len() == 3).then_some((numbers, number(function)?))
    };
    place(a).is_some_and(|place_of_a| place(b) == Some(place_of_a))
}

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(
        "device {device} is out of memory: {what} needs {needed_bytes} bytes more, and {taken_bytes} are taken already"
    )]
    OutOfMemory { device: String, what: String, needed_bytes: u64, taken_bytes: u64 },
    #[error("{what} needs {needed_bytes} bytes in one piece, and device {device} takes pieces of {max_bytes} at most")]
    BufferTooLarge { device: String, what: String, needed_bytes: u64, max_bytes: u64 },
    #[error("device {device} was lost: {reason}")]
    Lost { device: String, reason: String },
    #[error("the driver of device {device} cannot build kernel {kernel}: {reason}")]
    Kernel { device: String, kernel: String, reason: String },
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot read weight {name}: {source}")]
    Read { name: String, source: io::Error },
    #[error("weight {name} {problem}")]
    Shape { name: String, problem: String },
    #[error(transparent)]
    Format(#[from] FormatError),
}
