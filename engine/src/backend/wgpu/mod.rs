//! The backend for GPUs: a recording becomes one upload, its copies, one compute pass and one submit; where that would
//! keep the device longer than a submission may, several passes, each with a submit of its own.
//!
//! Invariant: a step creates no buffer, and a bind group or a pipeline of the KV cache only when a kernel first meets
//! these buffers or this head size. Weights stay packed. For one (N, K, format) every matmul variant adds in the same
//! order.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

pub use fullbore_shaders::Tier;
pub use wgpu::Features;
use wgpu::{BindGroup, BufferUsages};

use crate::backend::packing::packed_bytes;
use crate::backend::{
    Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, MAX_IN_FLIGHT, ModelKernels, RowSource, Ticket, WeightSpec,
};
use crate::recording::Recording;
use crate::tensor::{BufferId, Weight, WeightFormat, WeightId};
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

mod adapters;
mod arithmetic;
mod budget;
mod buffers;
mod denied;
mod device;
mod encode;
mod first_dispatch;
mod kill_switch;
mod mat_mul_tables;
mod pace;
mod params;
mod pipeline_cache;
pub mod pipelines;
mod stamps;

pub use adapters::{GpuKind, hardware, software};
pub use arithmetic::ArithmeticChoice;
pub use budget::free_bytes;
use buffers::{Buffers, Readback};
use device::Device;
pub use device::{Fault, OpenError, WgpuOptions, devices, mask_to_webgpu};
use encode::{Dispatch, Encoder, MAX_BUFFERS, MAX_PARAMS, Partials, Shard};
pub use kill_switch::KillSwitch;
use mat_mul_tables::MatMulTables;
use pace::Pace;
pub use pipeline_cache::NAGA_VERSION;
use pipeline_cache::PipelineCache;
use pipelines::{Kernel, Pipelines, uniform_layout};
use stamps::Stamps;

/// Dispatches of a submission at most: as many have room for their parameters where these lie in a buffer.
const MAX_DISPATCHES: usize = 4096;
/// What products that share K may leave to be added up, in elements: four spans of 64 rows of 8,192 columns.
const MAX_PARTIALS: u32 = 4 * 64 * 8192;
/// Workgroups along one dimension at most (WebGPU's guarantee).
const MAX_WORKGROUPS: u32 = 65_535;

pub struct WgpuBackend {
    options: WgpuOptions,
    device: Device,
    buffers: Buffers,
    /// By weight id.
    weights: Vec<Vec<Shard>>,
    mat_muls: MatMulTables,
    /// On tiers whose products may share K.
    partials: Option<Partials>,
    pipelines: Pipelines,
    bind_groups: HashMap<(Kernel, [BufferId; MAX_BUFFERS]), BindGroup>,
    /// Where parameters lie on tiers without immediates.
    uniforms: Option<Uniforms>,
    /// One for each recording in flight.
    readbacks: [Readback; MAX_IN_FLIGHT],
    /// Where the device can tell the time.
    stamps: Option<Stamps>,
    in_flight: VecDeque<InFlight>,
    /// When it had done what was waited for last.
    free_at: Option<Instant>,
    num_submitted: u64,
    num_submissions: u64,
    pace: Pace,
    /// Refilled each step.
    dispatches: Vec<Dispatch>,
}

struct InFlight {
    /// In their order: each may take its time.
    submissions: Vec<wgpu::SubmissionIndex>,
    submitted_at: Instant,
    work: u64,
}

/// The parameters of a recording's dispatches, `stride` bytes apart.
struct Uniforms {
    buffer: wgpu::Buffer,
    group: BindGroup,
    stride: usize,
    /// Refilled each step.
    bytes: Vec<u8>,
}

impl WgpuBackend {
    pub fn open(options: &WgpuOptions) -> Result<WgpuBackend, OpenError> {
        let device = Device::open(options)?;
        let layout = (device.tier == Tier::Base).then(|| uniform_layout(&device.device));
        let uniforms = layout.as_ref().map(|layout| Uniforms::new(&device, layout)).transpose();
        let cache = options.cache_folder.as_ref().and_then(|folder| PipelineCache::open(&device.device, folder));
        let refused =
            |error: DeviceError| OpenError::Refused { device: device.info.id.clone(), reason: error.to_string() };
        let mut buffers = Buffers::new(&device);
        let num_elements = if device.tier == Tier::Lavapipe { 0 } else { MAX_PARTIALS };
        let buffer = (num_elements > 0).then(|| buffers.alloc("partial products", u64::from(num_elements) * 4));
        let buffer = buffer.transpose().map_err(refused)?;
        Ok(WgpuBackend {
            options: options.clone(),
            uniforms: uniforms.map_err(refused)?,
            buffers,
            partials: buffer.map(|buffer| Partials { buffer, num_elements }),
            weights: Vec::new(),
            mat_muls: MatMulTables::new(device.tier, device.arithmetic),
            pipelines: Pipelines::new(&device, layout, cache),
            bind_groups: HashMap::new(),
            readbacks: std::array::from_fn(|_| Readback::new()),
            stamps: Stamps::new(&device).map_err(refused)?,
            in_flight: VecDeque::new(),
            free_at: None,
            num_submitted: 0,
            num_submissions: 0,
            pace: Pace::new(options.max_submit.unwrap_or(Duration::MAX)),
            dispatches: Vec::new(),
            device,
        })
    }

    /// Submissions so far, of which a recording may be several.
    pub fn num_submissions(&self) -> u64 {
        self.num_submissions
    }

    /// Lets go of all that is on the device.
    fn release(&mut self) {
        self.in_flight.clear();
        self.bind_groups.clear();
        self.weights.clear();
        self.buffers.clear();
        self.pipelines.clear();
        self.readbacks = std::array::from_fn(|_| Readback::new());
        (self.uniforms, self.stamps) = (None, None);
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    /// Makes what the dispatches need and does not exist yet.
    fn prepare(&mut self) -> Result<(), DeviceError> {
        self.pipelines.compile_all(self.dispatches.iter().map(|dispatch| dispatch.kernel))?;
        for dispatch in &self.dispatches {
            let key = (dispatch.kernel, dispatch.buffers);
            if self.bind_groups.contains_key(&key) {
                continue;
            }
            let pipeline = self.pipelines.get(dispatch.kernel);
            let entries: Vec<_> = (0..pipeline.num_buffers)
                .map(|binding| wgpu::BindGroupEntry {
                    binding: binding as u32,
                    resource: self.buffers.get(dispatch.buffers[binding]).as_entire_binding(),
                })
                .collect();
            let group = self.device.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.storage,
                entries: &entries,
            });
            self.bind_groups.insert(key, group);
        }
        Ok(())
    }

    /// What is submitted next.
    fn record_pass(&mut self, dispatches: Range<usize>, encoder: &mut wgpu::CommandEncoder) {
        if let Some(uniforms) = &mut self.uniforms {
            uniforms.write(&self.device.queue, &self.dispatches[dispatches.clone()]);
        }
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        for (index, dispatch) in self.dispatches[dispatches].iter().enumerate() {
            pass.set_pipeline(&self.pipelines.get(dispatch.kernel).pipeline);
            pass.set_bind_group(0, &self.bind_groups[&(dispatch.kernel, dispatch.buffers)], &[]);
            match &self.uniforms {
                Some(uniforms) => pass.set_bind_group(1, &uniforms.group, &[(index * uniforms.stride) as u32]),
                None => pass.set_immediates(0, bytemuck::cast_slice(&dispatch.params[..dispatch.num_params])),
            }
            let y = dispatch.workgroups.div_ceil(MAX_WORKGROUPS);
            pass.dispatch_workgroups(dispatch.workgroups.div_ceil(y), y, 1);
        }
    }
}

/// Pipelines of rare shapes are made while it serves.
impl Drop for WgpuBackend {
    fn drop(&mut self) {
        self.pipelines.keep();
    }
}

impl Uniforms {
    fn new(device: &Device, layout: &wgpu::BindGroupLayout) -> Result<Uniforms, DeviceError> {
        let params_bytes = MAX_PARAMS * 4;
        let alignment = device.device.limits().min_uniform_buffer_offset_alignment as usize;
        let stride = params_bytes.next_multiple_of(alignment);
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let buffer = buffers::create(device, "params", (MAX_DISPATCHES * stride) as u64, usage)?;
        let size = std::num::NonZeroU64::new(params_bytes as u64);
        let binding = wgpu::BufferBinding { buffer: &buffer, offset: 0, size };
        let group = device.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("params"),
            layout,
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(binding) }],
        });
        Ok(Uniforms { buffer, group, stride, bytes: Vec::new() })
    }

    /// Takes effect before the next submit, after all earlier ones.
    fn write(&mut self, queue: &wgpu::Queue, dispatches: &[Dispatch]) {
        assert!(dispatches.len() <= MAX_DISPATCHES, "{} dispatches in one submission", dispatches.len());
        self.bytes.clear();
        for dispatch in dispatches {
            self.bytes.extend_from_slice(bytemuck::cast_slice(&dispatch.params));
            self.bytes.resize(self.bytes.len().next_multiple_of(self.stride), 0);
        }
        queue.write_buffer(&self.buffer, 0, &self.bytes);
    }
}

impl Backend for WgpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.device.info
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        self.buffers.alloc(label, size_bytes)
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        self.buffers.alloc_host(label, size_bytes)
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.buffers.write(buffer, offset_bytes, data)
    }

    fn make_kernels(&mut self, of: &ModelKernels) -> Result<(), DeviceError> {
        let &ModelKernels { kv_type, head_dim, group, .. } = of;
        let own =
            |format| self.mat_muls.own_of(format).iter().map(move |choice| Kernel::MatMul(format, choice.variant));
        let of_format = |&format: &WeightFormat| own(format).chain([Kernel::Embed(format)]);
        let of_formats = of.formats.iter().flat_map(of_format);
        let of_cache = Kernel::of_cache(self.device.tier, kv_type, head_dim, group);
        let kernels: Vec<Kernel> = Kernel::GENERAL.into_iter().chain(of_cache).chain(of_formats).collect();
        self.pipelines.compile_all(kernels.iter().copied())?;
        if first_dispatch::compiles(&self.device) {
            first_dispatch::compile(&self.device, &self.pipelines, &self.options, kernels)?;
        }
        Ok(())
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        let id = WeightId(self.weights.len() as u32);
        let weight = Weight { id, rows: spec.rows, cols: spec.cols, format: spec.format };
        let choices = self.mat_muls.of(MatMulShape::of(weight));
        let sum = choices.iter().any(|choice| choice.spreads).then_some(Kernel::MatMulSum);
        let mat_muls = choices.iter().map(|choice| Kernel::MatMul(spec.format, choice.variant));
        self.pipelines.compile_all(mat_muls.chain([Kernel::Embed(spec.format)]).chain(sum).chain(Kernel::GENERAL))?;
        self.weights.push(self.buffers.load(spec, source)?);
        Ok(weight)
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        packed_bytes(spec.format, spec.rows, spec.cols)
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        assert!(self.in_flight.len() < MAX_IN_FLIGHT, "{MAX_IN_FLIGHT} recordings are in flight");
        self.device.check()?;
        if !recording.upload.is_empty() {
            let upload = self.buffers.get(recording.upload_buffer);
            self.device.queue.write_buffer(upload, 0, bytemuck::cast_slice(&recording.upload));
        }
        self.dispatches.clear();
        let (tier, mat_muls, max_work) = (self.device.tier, &self.mat_muls, self.pace.max_work());
        let (weights, partials, out) = (&self.weights, self.partials, &mut self.dispatches);
        Encoder { tier, mat_muls, weights, recording, max_work, partials, out }.ops(&recording.ops);
        self.prepare()?;
        let place = self.num_submitted as usize % MAX_IN_FLIGHT;
        let mut encoder = self.encoder();
        if let Some(stamps) = &self.stamps {
            stamps.begin(place, &mut encoder);
        }
        for copy in &recording.copies {
            let (from, to) = (self.buffers.get(copy.from), self.buffers.get(copy.to));
            encoder.copy_buffer_to_buffer(from, copy.from_bytes, to, copy.to_bytes, copy.size_bytes);
        }
        let mut parts = pace::submissions(&self.dispatches, max_work, MAX_DISPATCHES);
        let last = parts.pop().expect("there is always one");
        self.num_submissions += parts.len() as u64 + 1;
        let mut begun = None;
        let mut submissions = Vec::new();
        for dispatches in parts {
            self.record_pass(dispatches, &mut encoder);
            let commands = std::mem::replace(&mut encoder, self.encoder()).finish();
            begun.get_or_insert_with(Instant::now);
            submissions.push(self.device.queue.submit([commands]));
        }
        self.record_pass(last, &mut encoder);
        let stamps = self.stamps.as_ref().map(|stamps| stamps.end(place, &mut encoder));
        let readback = &mut self.readbacks[place];
        readback.record(&self.device, &recording.downloads, stamps, &self.buffers, &mut encoder)?;
        let commands = encoder.finish();
        // A software device may have done it before `submit` returns.
        let submitted_at = begun.unwrap_or_else(Instant::now);
        submissions.push(self.device.queue.submit([commands]));
        let work = self.dispatches.iter().fold(0, |work: u64, dispatch| work.saturating_add(dispatch.work));
        self.in_flight.push_back(InFlight { submissions, submitted_at, work });
        readback.map();
        self.num_submitted += 1;
        Ok(Ticket(self.num_submitted - 1))
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let num_waited = self.num_submitted - self.in_flight.len() as u64;
        assert_eq!(ticket.0, num_waited, "tickets are waited for once each and in order");
        let InFlight { submissions, submitted_at, work } =
            self.in_flight.pop_front().expect("a recording is in flight");
        submissions.into_iter().try_for_each(|submission| self.device.wait(Some(submission)))?;
        let seen = Instant::now();
        let place = ticket.0 as usize % MAX_IN_FLIGHT;
        let stamped = self.readbacks[place].take(&self.device, out)?;
        let begun = self.free_at.map_or(submitted_at, |free_at| free_at.max(submitted_at));
        let took = self.stamps.as_ref().and_then(|stamps| stamps.took(&stamped));
        let ended = took.map_or(seen, |took| (begun + took).min(seen).max(begun));
        self.free_at = Some(ended);
        self.pace.learn(work, ended - begun);
        Ok(begun..ended)
    }

    fn settle(&mut self) -> LoadTimes {
        self.pipelines.keep();
        let mut times = std::mem::take(&mut self.buffers.times);
        (times.pipelines, times.num_pipelines) = self.pipelines.take_times();
        times
    }

    fn reopen(&mut self) -> Result<(), DeviceError> {
        // The new one needs the memory of the old one.
        self.release();
        self.device.device.destroy();
        let DeviceInfo { id, name, .. } = self.device.info.clone();
        let options = WgpuOptions { selector: id, tier: Some(self.device.tier), ..self.options.clone() };
        let mut opened = WgpuBackend::open(&options).map_err(|error| self.device.lost(&error.to_string()))?;
        if opened.device.info.name != name {
            return Err(self.device.lost(&format!("{name} is gone, and {} is in its place", opened.device.info.name)));
        }
        std::mem::swap(&mut opened.mat_muls, &mut self.mat_muls);
        *self = opened;
        Ok(())
    }

    fn matrix_size(&self) -> Option<u32> {
        self.mat_muls.matrix_units().map(|units| units.size)
    }

    fn mat_mul_kernels(&self, format: WeightFormat) -> Vec<MatMulKernel> {
        self.mat_muls.kernels(format)
    }

    fn has_room(&self, shape: MatMulShape, kernel: &str, rows: u32) -> bool {
        self.partials
            .is_none_or(|partials| self.mat_muls.num_partials(shape, kernel, rows) <= partials.num_elements.into())
    }

    fn mat_mul_table(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        self.mat_muls.lines(shape)
    }

    fn set_mat_mul_table(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        self.mat_muls.set(shape, table)
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}
