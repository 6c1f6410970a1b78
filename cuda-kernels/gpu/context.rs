//! A context of one's own on a GPU. What others of this process have on the same GPU is in theirs, and stays when this
//! one ends.

use std::ffi::c_int;

use cudarc::driver::result as cuda;
use cudarc::driver::sys;

use super::{lost, not_there};
use crate::CudaError;

/// Null once it has ended.
pub struct Context(sys::CUcontext);

impl Context {
    /// On the device of that number; of the calls of this thread from now on.
    pub fn new(ordinal: c_int) -> Result<Context, CudaError> {
        let device = cuda::device::get(ordinal).map_err(not_there)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device is from `get`.
        unsafe { sys::cuCtxCreate_v2(&raw mut context, 0, device) }.result().map_err(not_there)?;
        Ok(Context(context))
    }

    /// Of the calls of this thread from now on.
    pub fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: it is open, or none, with which other calls fail.
        unsafe { cuda::ctx::set_current(self.0) }.map_err(lost)
    }

    /// All that was made in it goes with it, memory of the host too, as far as the device still answers.
    pub fn end(&mut self) {
        let context = std::mem::replace(&mut self.0, std::ptr::null_mut());
        if !context.is_null() {
            // SAFETY: it was made here, and is used no more.
            let _ = unsafe { sys::cuCtxDestroy_v2(context) }.result();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.end();
    }
}
