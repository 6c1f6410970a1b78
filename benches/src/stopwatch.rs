//! Any device, with the time that the engine was blocked waiting for it: an outside view of how often it waits.
//!
//! Invariant: while the engine is blocked in `wait` the device runs, but for the moment of waking up. So what is left
//! of the wall time is about the most that the device can have waited for the host, whatever the engine itself says.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo, LoadError, RowSource, Ticket, WeightSpec};
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::{BufferId, Weight};

/// How long a [`Stopwatch`] has been waited for; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Waited(Arc<AtomicU64>);

impl Waited {
    pub fn so_far(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Acquire))
    }
}

pub struct Stopwatch {
    inner: Box<dyn Backend>,
    waited: Waited,
}

impl Stopwatch {
    pub fn new(inner: Box<dyn Backend>) -> Stopwatch {
        Stopwatch { inner, waited: Waited::default() }
    }

    pub fn waited(&self) -> Waited {
        self.waited.clone()
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
        self.inner.submit(recording)
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Instant, DeviceError> {
        let begun = Instant::now();
        let done_at = self.inner.wait(ticket, out);
        self.waited.0.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::AcqRel);
        done_at
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }
}
