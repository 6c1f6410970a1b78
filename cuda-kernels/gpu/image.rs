//! PTX on its way into the driver, whose own compiler takes it from there.

use std::ffi::{CStr, c_void};

use cudarc::driver::sys;

use super::text;

/// Bytes of what the driver's compiler says against a module, at most.
const LOG_BYTES: usize = 8192;

/// What the driver makes of PTX, which ends in a zero; where it takes it not, with what its compiler says.
pub fn load(ptx: &[u8]) -> Result<sys::CUmodule, String> {
    assert_eq!(ptx.last(), Some(&0), "the driver reads up to a zero");
    let mut log = vec![0u8; LOG_BYTES];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // A size is given in the place of a pointer.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image is a whole one and ends in a zero; two options have two values, and the log is as long as said.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(
            &raw mut module,
            ptx.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    loaded.result().map(|()| module).map_err(|error| {
        let said = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        let separator = if said.is_empty() { "" } else { ": " };
        format!("{}{separator}{}", text(error), said.trim_end())
    })
}
