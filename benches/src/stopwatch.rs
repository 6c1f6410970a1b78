//! Any device, with the time that it says it worked, and the time that the engine was blocked waiting for it: two views
//! from outside the engine of how much of the wall time the device was idle.
//!
//! Invariant: while the engine is blocked in `wait` the device works, but for the moment of waking up. So what is left
//! of the wall time is about the most that the device can have been idle, on a device whose `submit` does not block.

use std::ops::{Range, Sub};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::{Backend, DeviceError, Ticket};
use fullbore_engine::recording::Recording;

/// What a [`Stopwatch`] shows; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Dial(Arc<Mutex<Reading>>);

#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// The device worked, by its own account.
    pub busy: Duration,
    /// The engine was blocked in `wait`.
    pub blocked: Duration,
    /// The engine was inside `submit` or `wait`: what a simulated device takes on the host.
    pub inside: Duration,
}

impl Sub for Reading {
    type Output = Reading;

    fn sub(self, before: Reading) -> Reading {
        Reading {
            busy: self.busy - before.busy,
            blocked: self.blocked - before.blocked,
            inside: self.inside - before.inside,
        }
    }
}

impl Dial {
    pub fn read(&self) -> Reading {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Stopwatch {
    inner: Box<dyn Backend>,
    dial: Dial,
}

impl Stopwatch {
    /// Adds to what `dial` shows, which several devices may share.
    pub fn new(inner: Box<dyn Backend>, dial: &Dial) -> Stopwatch {
        Stopwatch { inner, dial: dial.clone() }
    }
}

impl Around for Stopwatch {
    fn inner(&self) -> &dyn Backend {
        &*self.inner
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut *self.inner
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        let begun = Instant::now();
        let ticket = self.inner.submit(recording)?;
        self.dial.0.lock().unwrap_or_else(PoisonError::into_inner).inside += begun.elapsed();
        Ok(ticket)
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let begun = Instant::now();
        let ran = self.inner.wait(ticket, out)?;
        let mut reading = self.dial.0.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = begun.elapsed();
        reading.blocked += elapsed;
        reading.inside += elapsed;
        reading.busy += ran.end - ran.start;
        Ok(ran)
    }
}
