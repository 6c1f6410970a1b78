//! Device memory: buffers by id, weights by shard, and the two buffers that results come back through.
//!
//! Invariant: allocated at start; a step creates none, except that a readback grows when a recording first asks for
//! more than any before it. Buffers start zeroed (wgpu's guarantee).

use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{BufferUsages, Features, MapMode};

use super::device::Device;
use super::encode::{Shard, rows_per_shard};
use super::stamps::STAMPS_BYTES;
use crate::backend::packing::{Layout, pack_rows, packed_bytes};
use crate::backend::{DeviceError, LoadError, LoadTimes, RowSource, WeightSpec};
use crate::tensor::{BufferId, Tensor};

pub(super) struct Buffers {
    device: Device,
    buffers: Vec<wgpu::Buffer>,
    /// Of loading, but for pipelines.
    pub times: LoadTimes,
}

impl Buffers {
    pub fn new(device: &Device) -> Buffers {
        Buffers { device: device.clone(), buffers: Vec::new(), times: LoadTimes::default() }
    }

    pub fn get(&self, id: BufferId) -> &wgpu::Buffer {
        &self.buffers[id.0 as usize]
    }

    pub fn clear(&mut self) {
        self.buffers.clear();
    }

    pub fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let buffer = create(&self.device, label, size_bytes.max(4), usage)?;
        self.buffers.push(buffer);
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    /// That it could be mapped for reading, which it never is, is what puts it into cached memory of the host.
    pub fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        if !self.device.device.features().contains(Features::MAPPABLE_PRIMARY_BUFFERS) {
            return Ok(None);
        }
        let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let buffer = create(&self.device, label, size_bytes.max(4), usage)?;
        self.buffers.push(buffer);
        Ok(Some(BufferId(self.buffers.len() as u32 - 1)))
    }

    pub fn write(&mut self, id: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.device.queue.write_buffer(self.get(id), offset_bytes, data);
        self.flush()
    }

    /// Packs a weight shard by shard, a few tiles of rows at a time.
    pub fn load(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Vec<Shard>, LoadError> {
        let tile_words = Layout::of(spec.format).tile_words(spec.cols);
        let shard_rows = rows_per_shard(tile_words, self.device.max_shard_bytes);
        let mut shards = Vec::new();
        for first_row in (0..spec.rows).step_by(shard_rows as usize) {
            let num_rows = shard_rows.min(spec.rows - first_row);
            let buffer = self.alloc(&spec.name, packed_bytes(spec.format, num_rows, spec.cols))?;
            let mut times = self.times;
            pack_rows(spec, num_rows, source, &mut times, |offset_bytes, words| {
                self.write(buffer, offset_bytes, words)
            })?;
            self.times = times;
            shards.push(Shard { buffer, first_row, num_rows });
        }
        Ok(shards)
    }

    /// Hands over what has been written, so that staging memory does not pile up while loading.
    fn flush(&self) -> Result<(), DeviceError> {
        self.device.queue.submit([]);
        self.device.wait(None)
    }
}

/// A buffer, or the reason why there is none.
pub(super) fn create(
    device: &Device,
    label: &str,
    size_bytes: u64,
    usage: BufferUsages,
) -> Result<wgpu::Buffer, DeviceError> {
    let max_bytes = match usage.contains(BufferUsages::STORAGE) {
        true => device.info.max_buffer_bytes,
        false => device.device.limits().max_buffer_size,
    };
    if size_bytes > max_bytes {
        let (device, what) = (device.info.id.clone(), label.to_owned());
        return Err(DeviceError::BufferTooLarge { device, what, needed_bytes: size_bytes, max_bytes });
    }
    if !device.take(size_bytes) {
        return Err(device.out_of_memory(label, size_bytes));
    }
    let scope = device.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let descriptor = wgpu::BufferDescriptor { label: Some(label), size: size_bytes, usage, mapped_at_creation: false };
    let buffer = device.device.create_buffer(&descriptor);
    match pollster::block_on(scope.pop()) {
        Some(_) => Err(device.out_of_memory(label, size_bytes)),
        None => device.check().map(|()| buffer),
    }
}

/// Takes the downloads of one recording at a time back to the host.
pub(super) struct Readback {
    buffer: Option<wgpu::Buffer>,
    size_bytes: u64,
    /// Of these, at the end.
    stamps_bytes: u64,
    mapped: Arc<Mutex<Option<Result<(), wgpu::BufferAsyncError>>>>,
}

impl Readback {
    pub fn new() -> Readback {
        Readback { buffer: None, size_bytes: 0, stamps_bytes: 0, mapped: Arc::default() }
    }

    /// Records the copies of `downloads`, one after another, and of the stamps behind them.
    pub fn record(
        &mut self,
        device: &Device,
        downloads: &[Tensor],
        stamps: Option<(&wgpu::Buffer, u64)>,
        buffers: &Buffers,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<(), DeviceError> {
        self.stamps_bytes = if stamps.is_some() { STAMPS_BYTES } else { 0 };
        self.size_bytes = downloads.iter().map(|tensor| tensor.size_bytes()).sum::<u64>() + self.stamps_bytes;
        if self.size_bytes == 0 {
            return Ok(());
        }
        let capacity = self.buffer.as_ref().map_or(0, wgpu::Buffer::size);
        if capacity < self.size_bytes {
            let size_bytes = self.size_bytes.next_power_of_two().max(1 << 16);
            let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
            self.buffer = Some(create(device, "readback", size_bytes, usage)?);
        }
        if let Some(buffer) = &self.buffer {
            let mut to = 0;
            for tensor in downloads.iter().filter(|tensor| tensor.size_bytes() > 0) {
                let from = buffers.get(tensor.buffer);
                encoder.copy_buffer_to_buffer(from, tensor.offset_bytes(), buffer, to, tensor.size_bytes());
                to += tensor.size_bytes();
            }
            if let Some((from, offset)) = stamps {
                encoder.copy_buffer_to_buffer(from, offset, buffer, to, STAMPS_BYTES);
            }
        }
        Ok(())
    }

    /// To be called after the submit that holds the copies.
    pub fn map(&self) {
        let Some(buffer) = self.buffer.as_ref().filter(|_| self.size_bytes > 0) else { return };
        let mapped = self.mapped.clone();
        buffer.map_async(MapMode::Read, ..self.size_bytes, move |result| {
            *mapped.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        });
    }

    /// Appends the downloads to `out` and returns the stamps, zeros where there are none; the submission is done.
    pub fn take(&mut self, device: &Device, out: &mut Vec<u8>) -> Result<[u64; 2], DeviceError> {
        let Some(buffer) = self.buffer.as_ref().filter(|_| self.size_bytes > 0) else { return Ok([0; 2]) };
        match self.mapped.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Ok(())) => {}
            Some(Err(error)) => return Err(device.lost(&error.to_string())),
            None => return Err(device.lost("results were not mapped when their submission was done")),
        }
        let view = buffer.get_mapped_range(..self.size_bytes).map_err(|error| device.lost(&error.to_string()))?;
        let (downloads, stamps) = view.split_at((self.size_bytes - self.stamps_bytes) as usize);
        out.extend_from_slice(downloads);
        let mut stamped = [0u64; 2];
        bytemuck::bytes_of_mut(&mut stamped)[..stamps.len()].copy_from_slice(stamps);
        drop(view);
        buffer.unmap();
        Ok(stamped)
    }
}
