//! From a module's text to what a GPU loads: by NVRTC, NVIDIA's compiler as a library, which needs no GPU.

use std::ffi::{CString, c_char, c_void};

use cudarc::nvrtc::result::{self as nvrtc, NvrtcError};
use cudarc::nvrtc::sys;

use crate::Module;

/// Products and sums are rounded one by one, so that all kernels of an op give the same bits.
const OPTIONS: [&str; 4] = ["--std=c++17", "--fmad=false", "-default-device", "-diag-suppress=177"];

const NO_NVRTC: &str = "NVRTC, which compiles kernels, was not found (libnvrtc.so.12): install NVIDIA's CUDA toolkit, \
                        or PyPI's nvidia-cuda-nvrtc-cu12 with its folder in LD_LIBRARY_PATH";

/// Every function of it that is called, here or in cudarc. One that a library lacks would end the process when it is
/// called.
const CALLED: [&str; 7] = [
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetPTX",
    "nvrtcGetPTXSize",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
];

/// Where it is `0`, NVRTC is left alone though it is there: of a toolkit that is newer than the driver, say.
const SWITCH: &str = "FULLBORE_NVRTC";

/// PTX for compute capability `architecture` (80 is 8.0), ending in a zero. A newer driver takes it for any newer GPU.
pub fn compile(module: &Module, architecture: u32) -> Result<Vec<u8>, String> {
    if std::env::var_os(SWITCH).is_some_and(|value| value == "0") {
        return Err(format!("NVRTC is not to be asked ({SWITCH}=0)"));
    }
    // SAFETY: it looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(NO_NVRTC.to_owned());
    }
    if let Some(missing) = CALLED.into_iter().find(|function| !has(function)) {
        return Err(format!("NVRTC (libnvrtc.so.12) has no {missing}: install it anew, or set {SWITCH}=0"));
    }
    let text = CString::new(module.text()).expect("no zero in a text");
    let name = CString::new(module.name()).expect("no zero in a name");
    let failed = |error: NvrtcError| format!("NVRTC says {error}");
    let program = nvrtc::create_program(&text, Some(&name)).map_err(failed)?;
    // A compiler that is older than the GPU takes the newest that it knows.
    let compiled = [architecture, 90, 80, 75].into_iter().find_map(|target| {
        if target > architecture {
            return None;
        }
        let target = format!("--gpu-architecture=compute_{target}");
        let options: Vec<&str> = OPTIONS.into_iter().chain([target.as_str()]).collect();
        // SAFETY: the program was made above.
        match unsafe { nvrtc::compile_program(program, &options) } {
            Err(NvrtcError(sys::nvrtcResult::NVRTC_ERROR_INVALID_OPTION)) => None,
            compiled => Some(compiled),
        }
    });
    // SAFETY: as above; it is destroyed once, at the end.
    unsafe {
        let compiled = match compiled {
            None => Err(format!("NVRTC knows no GPU as old as compute capability {architecture}")),
            Some(Ok(())) => nvrtc::get_ptx(program).map(|ptx| bytes(&ptx)).map_err(failed),
            Some(Err(error)) => {
                let log = nvrtc::get_program_log(program).map(|log| bytes(&log)).unwrap_or_default();
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
                Err(format!("{}: {log}", failed(error)))
            }
        };
        nvrtc::destroy_program(program).map_err(failed)?;
        compiled
    }
}

fn has(function: &str) -> bool {
    // SAFETY: the library is there, and the address is not used.
    unsafe { sys::culib().get::<*const c_void>(function.as_bytes()).is_ok() }
}

/// Whether C's `char` has a sign, as on x86, or none, as on Arm.
pub(super) fn bytes(chars: &[c_char]) -> Vec<u8> {
    chars.iter().flat_map(|char| char.to_ne_bytes()).collect()
}
