//! NVIDIA GPUs through the CUDA driver, which is opened when it is first asked for.
//!
//! Invariant: an open device has one context, which is nobody else's, and one stream; an error other than of memory
//! voids it, and says so. A list of launches whose kernels came before is launched as one graph, which is made ready
//! before its work's clock begins.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::time::{Duration, Instant};

use cudarc::driver::result::{self as cuda, DriverError};
use cudarc::driver::sys;

use crate::{CudaError, Device, DeviceInfo, Function, Launch, Module, Work, ptx};

pub mod compile;
mod context;
mod driver;
mod graphs;
mod image;

use context::Context;
use driver::start;
use graphs::Graphs;

/// Turing, for whose instructions the kernels are written.
const MIN_ARCHITECTURE: u32 = 75;
/// A device that is at one piece of work for so long hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// Most work is done within this, and is waited for without sleeping.
const SPIN: Duration = Duration::from_micros(300);

/// A GPU that could be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// As in `cuda:0`.
    pub ordinal: i32,
    pub name: String,
    /// As `nvidia-smi -L` has it: `GPU-`, or `MIG-` of a part of one, and 32 hexadecimal digits in five groups.
    pub uuid: String,
    /// Domain, bus, device and function, as in `0000:0b:00.0`.
    pub pci_bus_id: String,
    pub architecture: u32,
    pub num_multiprocessors: u32,
    /// All of it, in use or not.
    pub memory_bytes: u64,
    pub driver: String,
}

/// The GPUs of this machine by their number, each with what it is, or why it cannot be had; an error says why there is
/// none.
pub fn gpus() -> Result<Vec<Result<GpuInfo, CudaError>>, CudaError> {
    let driver = start()?;
    let count = cuda::device::get_count().map_err(not_there)?;
    let unwell = |ordinal, error| CudaError::NotThere(format!("GPU {ordinal}: {error}"));
    Ok((0..count).map(|ordinal| GpuInfo::of(ordinal, &driver).map_err(|error| unwell(ordinal, error))).collect())
}

impl GpuInfo {
    fn of(ordinal: c_int, driver: &str) -> Result<GpuInfo, CudaError> {
        let device = cuda::device::get(ordinal).map_err(not_there)?;
        let name = cuda::device::get_name(device).map_err(not_there)?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // The first form of this call says of a part which GPU it is of.
        // SAFETY: the device is from `get`.
        unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) }.result().map_err(not_there)?;
        let hex: String = compile::bytes(&uuid.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let groups = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        let attribute = |which| {
            // SAFETY: the device is from `get`.
            unsafe { cuda::device::get_attribute(device, which) }.map_err(not_there)
        };
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let architecture = (major * 10 + minor).unsigned_abs();
        let num_multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let num_multiprocessors = num_multiprocessors.unsigned_abs();
        let domain = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
        let bus = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
        let slot = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
        let pci_bus_id = format!("{domain:04x}:{bus:02x}:{slot:02x}.0");
        // SAFETY: as above.
        let memory_bytes = unsafe { cuda::device::total_mem(device) }.map_err(not_there)? as u64;
        let kind = if name.contains(" MIG ") { "MIG" } else { "GPU" };
        let (uuid, driver) = (format!("{kind}-{}", groups.join("-")), driver.to_owned());
        Ok(GpuInfo { ordinal, name, uuid, pci_bus_id, architecture, num_multiprocessors, memory_bytes, driver })
    }
}

/// 75 is 7.5.
fn capability(architecture: u32) -> String {
    format!("compute capability {}.{}", architecture / 10, architecture % 10)
}

fn text(error: DriverError) -> String {
    let name = error.error_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    let what = error.error_string().map_or(String::new(), |what| what.to_string_lossy().into_owned());
    format!("{what} ({name})")
}

fn not_there(error: DriverError) -> CudaError {
    CudaError::NotThere(format!("the CUDA driver says: {}", text(error)))
}

fn lost(error: DriverError) -> CudaError {
    CudaError::Lost(format!("the CUDA driver says: {}", text(error)))
}

pub struct Gpu {
    gpu: GpuInfo,
    info: DeviceInfo,
    stream: sys::CUstream,
    modules: HashMap<Module, sys::CUmodule>,
    functions: Vec<Loaded>,
    places: Vec<Place>,
    graphs: Graphs,
    /// With which everything of the driver's goes that is here.
    context: Context,
}

/// # Safety
/// The driver's handles belong to a process, not to a thread; each call makes the context current first.
unsafe impl Send for Gpu {}

#[derive(Clone, Copy)]
struct Loaded {
    function: sys::CUfunction,
    threads: u32,
}

/// Of one piece of work: what it brings to the device and back, and when it began and ended there.
struct Place {
    upload: Pinned,
    download: Pinned,
    download_bytes: usize,
    begin: sys::CUevent,
    end: sys::CUevent,
}

/// Memory of the host that the device reads and writes without a detour.
struct Pinned {
    at: *mut c_void,
    size_bytes: usize,
}

impl Pinned {
    const NONE: Pinned = Pinned { at: std::ptr::null_mut(), size_bytes: 0 };

    /// At least so much, with nothing kept.
    fn grow(&mut self, size_bytes: usize) -> Result<(), CudaError> {
        if size_bytes <= self.size_bytes {
            return Ok(());
        }
        let wanted = size_bytes.next_power_of_two().max(1 << 16);
        let old = std::mem::replace(self, Pinned::NONE);
        // SAFETY: the old memory is no longer used: its work was waited for.
        unsafe {
            if !old.at.is_null() {
                cuda::free_host(old.at).map_err(lost)?;
            }
            self.at = cuda::malloc_host(wanted, 0).map_err(|error| of_memory(error, wanted as u64))?;
        }
        self.size_bytes = wanted;
        Ok(())
    }
}

fn of_memory(error: DriverError, needed_bytes: u64) -> CudaError {
    match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { needed_bytes },
        _ => lost(error),
    }
}

impl Gpu {
    pub fn open(gpu: &GpuInfo) -> Result<Gpu, CudaError> {
        start()?;
        if gpu.architecture < MIN_ARCHITECTURE {
            let [has, least] = [gpu.architecture, MIN_ARCHITECTURE].map(capability);
            let reason = format!("{} has {has}; {least} or newer is needed", gpu.name);
            return Err(CudaError::NotThere(reason));
        }
        let context = Context::new(gpu.ordinal)?;
        let (free_bytes, _) = cuda::mem_get_info().map_err(not_there)?;
        let stream = cuda::stream::create(cuda::stream::StreamKind::NonBlocking).map_err(not_there)?;
        let info = DeviceInfo {
            name: gpu.name.clone(),
            driver: gpu.driver.clone(),
            architecture: gpu.architecture,
            num_multiprocessors: gpu.num_multiprocessors,
            free_bytes: Some(free_bytes as u64),
        };
        let mut opened = Gpu {
            gpu: gpu.clone(),
            info,
            stream,
            modules: HashMap::new(),
            functions: Vec::new(),
            places: Vec::new(),
            graphs: Graphs::default(),
            context,
        };
        // A driver that takes no kernel is found out here, where another device can still be chosen.
        let smallest = Module { parts: &["mul_add"], constants: Vec::new() };
        opened.function(&smallest, "mul_add").map_err(|error| CudaError::NotThere(error.to_string()))?;
        Ok(opened)
    }

    /// As NVRTC compiles it now, or, where there is none or it does not go with the driver, as it was compiled
    /// beforehand.
    fn load(&self, module: &Module) -> Result<sys::CUmodule, String> {
        compile::compile(module, self.gpu.architecture).and_then(|ptx| image::load(&ptx)).or_else(|reason| {
            let architecture = self.gpu.architecture;
            let none = || format!("there is none for {}", capability(architecture));
            let shipped = ptx::find(module, architecture).ok_or_else(none);
            let loaded = shipped.and_then(|ptx| image::load(&[ptx.text.as_bytes(), b"\0"].concat()));
            loaded.map_err(|beforehand| format!("{reason}; as it was compiled beforehand: {beforehand}"))
        })
    }

    fn place(&mut self, place: usize) -> Result<&mut Place, CudaError> {
        let event = || cuda::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(lost);
        while self.places.len() <= place {
            let (begin, end) = (event()?, event()?);
            let (upload, download) = (Pinned::NONE, Pinned::NONE);
            self.places.push(Place { upload, download, download_bytes: 0, begin, end });
        }
        Ok(&mut self.places[place])
    }

    /// Lets go of what went with its context.
    fn forget(&mut self) {
        self.modules.clear();
        self.functions.clear();
        self.places.clear();
        self.graphs.forget();
        self.stream = std::ptr::null_mut();
    }
}

/// # Safety
/// Addresses in the parameters are of memory that is there.
unsafe fn launch_one(functions: &[Loaded], stream: sys::CUstream, launch: &Launch) -> Result<(), CudaError> {
    let Loaded { function, threads } = functions[launch.function.0 as usize];
    let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
    let (grid, block) = ((launch.blocks, 1, 1), (threads, 1, 1));
    unsafe { cuda::launch_kernel(function, grid, block, 0, stream, &mut params) }.map_err(lost)
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What they were made from is in no context.
        if self.context.enter().is_ok() {
            self.graphs.destroy();
        }
    }
}

impl Device for Gpu {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, size_bytes: u64) -> Result<u64, CudaError> {
        self.context.enter()?;
        // SAFETY: memory of that size is filled before anyone has its address.
        unsafe {
            let at = cuda::malloc_sync(size_bytes as usize).map_err(|error| of_memory(error, size_bytes))?;
            cuda::memset_d8_async(at, 0, size_bytes as usize, self.stream).map_err(lost)?;
            cuda::stream::synchronize(self.stream).map_err(lost)?;
            Ok(at)
        }
    }

    fn alloc_host(&mut self, size_bytes: u64) -> Result<u64, CudaError> {
        self.context.enter()?;
        // SAFETY: as in `alloc`.
        unsafe {
            let at = cuda::malloc_host(size_bytes as usize, 0).map_err(|error| of_memory(error, size_bytes))?;
            std::ptr::write_bytes(at.cast::<u8>(), 0, size_bytes as usize);
            Ok(at as u64)
        }
    }

    fn stage(&mut self, places: usize, upload_bytes: u64, download_bytes: u64) -> Result<(), CudaError> {
        self.context.enter()?;
        for place in 0..places {
            let Place { upload, download, .. } = self.place(place)?;
            upload.grow(upload_bytes as usize)?;
            download.grow(download_bytes as usize)?;
        }
        Ok(())
    }

    fn write(&mut self, to: u64, data: &[u8]) -> Result<(), CudaError> {
        self.context.enter()?;
        // On the stream of all work, which does not wait for what other streams are at.
        // SAFETY: the address is the caller's to know, and the data is there until it has arrived.
        unsafe {
            cuda::memcpy_htod_async(to, data, self.stream).map_err(lost)?;
            cuda::stream::synchronize(self.stream).map_err(lost)
        }
    }

    fn function(&mut self, module: &Module, kernel: &str) -> Result<Function, CudaError> {
        self.context.enter()?;
        let failed = |reason: String| CudaError::Kernel { kernel: format!("{} {kernel}", module.name()), reason };
        let (threads, _) = module.kernel(kernel).ok_or_else(|| failed("it is not in its module".to_owned()))?;
        let loaded = match self.modules.get(module) {
            Some(&loaded) => loaded,
            None => {
                let loaded = self.load(module).map_err(failed)?;
                self.modules.insert(module.clone(), loaded);
                loaded
            }
        };
        let name = CString::new(kernel).expect("no zero in a name");
        // SAFETY: the module stays loaded.
        let function = unsafe { cuda::module::get_function(loaded, name) }.map_err(|error| failed(text(error)))?;
        self.functions.push(Loaded { function, threads });
        Ok(Function(self.functions.len() as u32 - 1))
    }

    fn submit(&mut self, place: usize, work: &Work) -> Result<(), CudaError> {
        self.context.enter()?;
        let stream = self.stream;
        let Place { upload, download, download_bytes, begin, end } = self.place(place)?;
        upload.grow(work.upload.len())?;
        *download_bytes = work.downloads.iter().map(|(_, size_bytes)| *size_bytes as usize).sum();
        download.grow(*download_bytes)?;
        let (staged, results, begin, end) = (upload.at, download.at, *begin, *end);
        // SAFETY: addresses on the device are the caller's to know.
        let launch = |launch: &Launch| unsafe { launch_one(&self.functions, stream, launch) };
        // SAFETY: as above; the context is current.
        let graph = unsafe { self.graphs.of(work.launches, &self.functions)? };
        // SAFETY: staged memory is as long as what goes there and is not touched until `wait`; addresses on the device
        // are the caller's to know.
        unsafe {
            cuda::event::record(begin, stream).map_err(lost)?;
            if !work.upload.is_empty() {
                std::ptr::copy_nonoverlapping(work.upload.as_ptr(), staged.cast(), work.upload.len());
                let staged = std::slice::from_raw_parts(staged.cast::<u8>(), work.upload.len());
                cuda::memcpy_htod_async(work.upload_to, staged, stream).map_err(lost)?;
            }
            for copied in work.copies {
                let size_bytes = copied.size_bytes as usize;
                sys::cuMemcpyAsync(copied.to, copied.from, size_bytes, stream).result().map_err(lost)?;
            }
            match graph {
                Some(graph) => cuda::graph::launch(graph, stream).map_err(lost)?,
                None => work.launches.iter().try_for_each(launch)?,
            }
            let mut to = results.cast::<u8>();
            for &(from, size_bytes) in work.downloads.iter().filter(|(_, size_bytes)| *size_bytes > 0) {
                let part = std::slice::from_raw_parts_mut(to, size_bytes as usize);
                cuda::memcpy_dtoh_async(part, from, stream).map_err(lost)?;
                to = to.add(size_bytes as usize);
            }
            cuda::event::record(end, stream).map_err(lost)
        }
    }

    fn wait(&mut self, place: usize, out: &mut Vec<u8>) -> Result<Duration, CudaError> {
        self.context.enter()?;
        let Place { download, download_bytes, begin, end, .. } = &self.places[place];
        let begun = Instant::now();
        loop {
            // SAFETY: the event was recorded by `submit`.
            match unsafe { cuda::event::query(*end) } {
                Ok(()) => break,
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) if begun.elapsed() > PATIENCE => {
                    let reason = format!("it has been at one step for {} s: it hangs", PATIENCE.as_secs());
                    return Err(CudaError::Lost(reason));
                }
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) if begun.elapsed() > SPIN => {
                    std::thread::sleep(Duration::from_micros(50));
                }
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => std::thread::yield_now(),
                Err(error) => return Err(lost(error)),
            }
        }
        // SAFETY: all copies into it have ended.
        out.extend_from_slice(match download_bytes {
            0 => &[],
            _ => unsafe { std::slice::from_raw_parts(download.at.cast::<u8>(), *download_bytes) },
        });
        // SAFETY: both were recorded, on one stream.
        let took_ms = unsafe { cuda::event::elapsed(*begin, *end) }.map_err(lost)?;
        Ok(Duration::from_secs_f32(took_ms.max(0.0) / 1e3))
    }

    fn reopen(&mut self) -> Result<(), CudaError> {
        // All that it has goes with its context. To free it piece by piece would wait for what hangs.
        self.context.end();
        self.forget();
        let gpu = gpus()?.into_iter().flatten().find(|gpu| gpu.uuid == self.gpu.uuid);
        let gone = || CudaError::NotThere(format!("{} ({}) is gone", self.gpu.name, self.gpu.uuid));
        *self = Gpu::open(&gpu.ok_or_else(gone)?)?;
        Ok(())
    }
}
