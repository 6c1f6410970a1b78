//! The CUDA driver as a library: whether it is there, new enough and whole, before the first call.

use std::ffi::c_void;

use cudarc::driver::result as cuda;
use cudarc::driver::sys;

use super::not_there;
use crate::CudaError;

/// CUDA 12.0, whose functions are used.
const MIN_DRIVER: i32 = 12_000;

/// Every function that is called, here or in cudarc. One that a driver lacks would end the process when it is called.
const CALLED: [&str; 37] = [
    "cuCtxCreate_v2",
    "cuCtxDestroy_v2",
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceTotalMem_v2",
    "cuEventCreate",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuEventRecord",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphAddKernelNode_v2",
    "cuGraphCreate",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyAsync",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadDataEx",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuDriverGetVersion",
];

/// Opens the driver and says what it is. Nothing of it is called before it is known to be there.
pub fn start() -> Result<String, CudaError> {
    // SAFETY: it looks for the library.
    if !unsafe { sys::is_culib_present() } {
        let reason = "there is no CUDA driver (libcuda.so.1, nvcuda.dll): NVIDIA's driver is not installed";
        return Err(CudaError::NotThere(reason.to_owned()));
    }
    find("cuDriverGetVersion")?;
    let mut version = 0;
    // SAFETY: the function is there.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(not_there)?;
    let name = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    if version < MIN_DRIVER {
        let reason = format!("the CUDA driver is for {name}; 12.0 or newer is needed: update NVIDIA's driver");
        return Err(CudaError::NotThere(reason));
    }
    CALLED.into_iter().try_for_each(find)?;
    cuda::init().map_err(not_there)?;
    Ok(name)
}

fn find(function: &str) -> Result<(), CudaError> {
    // SAFETY: the library is there, and the address is not used.
    let found = unsafe { sys::culib().get::<*const c_void>(function.as_bytes()).is_ok() };
    let missing = || CudaError::NotThere(format!("the CUDA driver has no {function}: install NVIDIA's driver anew"));
    found.then_some(()).ok_or_else(missing)
}
