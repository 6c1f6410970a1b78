//! Any device, with the time that it says it worked, and the time that the engine was blocked waiting for it: two views
//! from outside the engine of how much of the wall time the device was idle.
//!
//! Invariant: while the engine is blocked in `wait` the device works, but for the moment of waking up. So what is left
//! of the wall time is about the most that the device can have been idle, on a device whose `submit` does not block.

use std::ops::{Range, Sub};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, RowSource, Ticket, WeightSpec};
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::{BufferId, Weight, WeightFormat};
use fullbore_engine::tuning::{MatMulKernel, MatMulLine, MatMulShape};

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
    pub fn new(inner: Box<dyn Backend>) -> Stopwatch {
        Stopwatch { inner, dial: Dial::default() }
    }

    pub fn dial(&self) -> Dial {
        self.dial.clone()
    }
}

impl Backend for Stopwatch {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        self.inner.alloc(label, size_bytes)
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        self.inner.alloc_host(label, size_bytes)
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.inner.write(buffer, offset_bytes, data)
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        self.inner.load_weight(spec, source)
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        self.inner.weight_bytes(spec)
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

    fn settle(&mut self) -> LoadTimes {
        self.inner.settle()
    }

    fn reopen(&mut self) -> Result<(), DeviceError> {
        self.inner.reopen()
    }

    fn mat_mul_kernels(&self, format: WeightFormat) -> Vec<MatMulKernel> {
        self.inner.mat_mul_kernels(format)
    }

    fn mat_mul_table(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        self.inner.mat_mul_table(shape)
    }

    fn set_mat_mul_table(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        self.inner.set_mat_mul_table(shape, table)
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }
}
