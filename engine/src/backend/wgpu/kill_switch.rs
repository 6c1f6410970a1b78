//! A device taken away while it is used, for tests of what comes after.
//!
//! Invariant: who holds no switch of a device cannot tell that there are any.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::Loss;

/// Clones share it; a device is bound to the switch that it was opened with.
#[derive(Clone, Debug, Default)]
pub struct KillSwitch(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The one that was opened last, and where its loss is noted.
    device: Option<(wgpu::Device, Loss)>,
    num_opened: u32,
    num_refused: u32,
}

impl KillSwitch {
    /// Destroys the device, in the middle of whatever it does.
    pub fn destroy(&self) {
        if let Some((device, loss)) = self.lock().device.take() {
            // wgpu says so at the next poll only, and refuses work from now on.
            loss.note("Destroyed".to_owned());
            device.destroy();
        }
    }

    /// Destroys the device and tells nobody: that it is lost comes from wgpu, when it is waited for next.
    pub fn destroy_unnoted(&self) {
        if let Some((device, _)) = self.lock().device.take() {
            device.destroy();
        }
    }

    /// The next `num_times` that the device is to be opened it is not there.
    pub fn refuse(&self, num_times: u32) {
        self.lock().num_refused = num_times;
    }

    /// How often a device was opened.
    pub fn num_opened(&self) -> u32 {
        self.lock().num_opened
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let mut state = self.lock();
        match state.num_refused.checked_sub(1) {
            Some(left) => {
                state.num_refused = left;
                Err("a test does not let it be".to_owned())
            }
            None => Ok(()),
        }
    }

    pub(super) fn opened(&self, device: &wgpu::Device, loss: &Loss) {
        let mut state = self.lock();
        state.num_opened += 1;
        state.device = Some((device.clone(), loss.clone()));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
