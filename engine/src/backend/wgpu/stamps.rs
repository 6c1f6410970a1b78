//! When the device was at a recording, by its own clock, where it has one that can be read between commands.
//!
//! Invariant: of a recording's two stamps only their difference means anything here; a pair that does not rise is none.

use std::time::Duration;

use wgpu::BufferUsages;

use super::buffers;
use super::device::{Device, STAMP_FEATURES};
use crate::backend::{DeviceError, MAX_IN_FLIGHT};

/// A pair of stamps.
pub(super) const STAMPS_BYTES: u64 = 16;
/// Bytes between the pairs, as queries are resolved to.
const STRIDE: u64 = wgpu::QUERY_RESOLVE_BUFFER_ALIGNMENT;

pub(super) struct Stamps {
    /// Two for each recording in flight.
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    ns_per_tick: f64,
}

impl Stamps {
    pub fn new(device: &Device) -> Result<Option<Stamps>, DeviceError> {
        if !device.device.features().contains(STAMP_FEATURES) {
            return Ok(None);
        }
        let queries = device.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("stamps"),
            ty: wgpu::QueryType::Timestamp,
            count: 2 * MAX_IN_FLIGHT as u32,
        });
        let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
        let resolved = buffers::create(device, "stamps", STRIDE * MAX_IN_FLIGHT as u64, usage)?;
        Ok(Some(Stamps { queries, resolved, ns_per_tick: f64::from(device.queue.get_timestamp_period()) }))
    }

    pub fn begin(&self, place: usize, encoder: &mut wgpu::CommandEncoder) {
        encoder.write_timestamp(&self.queries, 2 * place as u32);
    }

    /// Returns where the pair will be, to be read back.
    pub fn end(&self, place: usize, encoder: &mut wgpu::CommandEncoder) -> (&wgpu::Buffer, u64) {
        let (first, offset) = (2 * place as u32, STRIDE * place as u64);
        encoder.write_timestamp(&self.queries, first + 1);
        encoder.resolve_query_set(&self.queries, first..first + 2, &self.resolved, offset);
        (&self.resolved, offset)
    }

    /// What lies between two stamps.
    pub fn took(&self, &[begun, ended]: &[u64; 2]) -> Option<Duration> {
        let ticks = ended.checked_sub(begun).filter(|&ticks| ticks > 0)?;
        Some(Duration::from_nanos((ticks as f64 * self.ns_per_tick) as u64))
    }
}
