//! Software Vulkan makes machine code of a kernel when it is dispatched first, for a second or more, and one kernel
//! after another. Here kernels are dispatched over no workgroups before they are needed, on devices of their own beside
//! one another, for what one has made lies in the driver's own cache on disk, where every device finds it.
//!
//! Invariant: nothing is computed. Where the driver keeps no cache, what another device has compiled was for nothing,
//! and is compiled again when it is needed.

use std::cmp::Reverse;
use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fullbore_shaders::Arithmetic;
use wgpu::{BufferUsages, CommandEncoderDescriptor, ComputePassDescriptor};

use super::arithmetic::ArithmeticChoice;
use super::device::{Device, WgpuOptions};
use super::kill_switch::KillSwitch;
use super::pipelines::{Kernel, Pipeline, Pipelines};
use super::{MAX_PARAMS, buffers};
use crate::backend::DeviceError;

/// More devices would each have little to do.
const MAX_DEVICES: usize = 8;
/// A kernel that takes so long is being compiled: the smallest takes 30 ms, one that is found on disk 2 ms at most.
const LEAST_COMPILE: Duration = Duration::from_millis(15);
/// No smaller than what a kernel asks of a binding.
const BINDING_BYTES: u64 = 256;

/// Whether a driver has so much to do at a first dispatch.
pub(super) fn compiles(device: &Device) -> bool {
    device.takes_immediates() && device.device.adapter_info().device_type == wgpu::DeviceType::Cpu
}

/// Has the driver compile `kernels`, all of them `pipelines` of `device`, on as many threads as there are cores. Where
/// it has them on disk, one is enough.
pub(super) fn compile(
    device: &Device,
    pipelines: &Pipelines,
    options: &WgpuOptions,
    mut kernels: Vec<Kernel>,
) -> Result<(), DeviceError> {
    let mut seen = HashSet::new();
    kernels.retain(|kernel| seen.insert(*kernel));
    kernels.sort_by_key(|kernel| Reverse(size(kernel)));
    let own = |kernel| dispatch_none(device, pipelines.get(kernel));
    while let Some(smallest) = kernels.pop() {
        let begun = Instant::now();
        own(smallest)?;
        if begun.elapsed() >= LEAST_COMPILE {
            break;
        }
    }
    let num_cores = thread::available_parallelism().map_or(1, usize::from);
    let num_devices = num_cores.min(MAX_DEVICES).min(kernels.len());
    let left = Mutex::new(VecDeque::from(kernels));
    let largest = || left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    thread::scope(|scope| {
        for _ in 1..num_devices {
            scope.spawn(|| help(device, options, &largest));
        }
        let compiled = std::iter::from_fn(&largest).try_for_each(own);
        // Nobody waits for what is not to be used.
        left.lock().unwrap_or_else(PoisonError::into_inner).clear();
        compiled
    })
}

/// How long it takes to compile, about: attention and sampling seconds, a product a tenth of one for each row.
fn size(kernel: &Kernel) -> u32 {
    match kernel {
        Kernel::Attention(_) | Kernel::Sample => u32::MAX,
        Kernel::MatMul(_, variant) => variant.rows(),
        _ => 0,
    }
}

/// Who cannot help leaves a kernel to be compiled when it is needed.
fn help(helped: &Device, options: &WgpuOptions, next: &impl Fn() -> Option<Kernel>) {
    // What was not granted is not asked for again.
    let arithmetic = if helped.arithmetic == Arithmetic::F32 { ArithmeticChoice::F32 } else { options.arithmetic };
    let (selector, tier, kill_switch) = (helped.info.id.clone(), Some(helped.tier), KillSwitch::default());
    let options = WgpuOptions { selector, tier, arithmetic, kill_switch, cache_folder: None, ..options.clone() };
    let Ok(device) = Device::open(&options) else { return };
    let pipelines = Pipelines::new(&device, None, None);
    while let Some(kernel) = next() {
        let dispatched = pipelines.build(kernel).and_then(|pipeline| dispatch_none(&device, &pipeline));
        if let Err(error) = dispatched {
            tracing::debug!(?kernel, %error, "not compiled ahead");
            return;
        }
    }
}

fn dispatch_none(device: &Device, pipeline: &Pipeline) -> Result<(), DeviceError> {
    let usage = BufferUsages::STORAGE;
    let buffers = (0..pipeline.num_buffers)
        .map(|_| buffers::create(device, "nothing", BINDING_BYTES, usage))
        .collect::<Result<Vec<_>, DeviceError>>()?;
    let entries: Vec<_> = buffers
        .iter()
        .enumerate()
        .map(|(binding, buffer)| wgpu::BindGroupEntry { binding: binding as u32, resource: buffer.as_entire_binding() })
        .collect();
    let group = device.device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.storage,
        entries: &entries,
    });
    let mut encoder = device.device.create_command_encoder(&CommandEncoderDescriptor::default());
    let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
    pass.set_pipeline(&pipeline.pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.set_immediates(0, &[0; MAX_PARAMS * 4][..pipeline.params_bytes as usize]);
    pass.dispatch_workgroups(0, 1, 1);
    drop(pass);
    let submission = device.queue.submit([encoder.finish()]);
    device.wait(Some(submission))
}
