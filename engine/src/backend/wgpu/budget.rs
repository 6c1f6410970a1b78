//! How much memory a GPU could still give, found by taking it.
//!
//! wgpu has no word for this. It can be told, though, to refuse what would go beyond the driver's own budget
//! (VK_EXT_memory_budget on Vulkan, DXGI's on DX12); where a driver has none, its allocations fail by themselves.
//! Invariant: all that was taken is given back, and it was never more than the budget.

use wgpu::{BufferUsages, DeviceType, ErrorFilter, MemoryBudgetThresholds};

use super::adapters::adapters;
use crate::backend::host_memory;

/// What is looked for in steps of this size; what may be missed.
const LEAST_BYTES: u64 = 16 << 20;
const STEP_BYTES: u64 = 1 << 30;
/// A driver that gives this much gives anything: nothing is known then.
const MOST_BYTES: u64 = 1 << 40;

/// Bytes that the adapter of this id (`vulkan:0`) has left, less at most 16 MiB; `None` where it does not say.
pub fn free_bytes(id: &str) -> Option<u64> {
    let within_budget = MemoryBudgetThresholds { for_resource_creation: Some(100), for_device_loss: None };
    let (_, adapter) = adapters(within_budget).into_iter().find(|(found, _)| found == id)?;
    let host = host_memory::available_bytes();
    let most = match adapter.get_info().device_type {
        DeviceType::Cpu => return host,
        // Its memory is the host's.
        DeviceType::IntegratedGpu => host.unwrap_or(MOST_BYTES),
        _ => MOST_BYTES,
    };
    let required_limits = adapter.limits();
    let step = STEP_BYTES.min(required_limits.max_buffer_size);
    let descriptor = wgpu::DeviceDescriptor {
        required_limits,
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        ..wgpu::DeviceDescriptor::default()
    };
    let (device, _queue) = pollster::block_on(adapter.request_device(&descriptor)).ok()?;
    let total = largest_total(step, most, hold(&device));
    device.destroy();
    total
}

/// Takes memory of `device`, a buffer a call, and says whether it was there. Gives all of it back when dropped.
fn hold(device: &wgpu::Device) -> impl FnMut(u64) -> bool {
    let mut held = Vec::new();
    move |size| {
        let scope = device.push_error_scope(ErrorFilter::OutOfMemory);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some("budget"), size, usage, mapped_at_creation: false };
        held.push(device.create_buffer(&descriptor));
        pollster::block_on(scope.pop()).is_none()
    }
}

/// The sum of what `takes` could have before it had no more, in steps from `step` down to `LEAST_BYTES`.
fn largest_total(step: u64, most: u64, mut takes: impl FnMut(u64) -> bool) -> Option<u64> {
    let (mut step, mut total) = (step, 0);
    while step >= LEAST_BYTES && total < most {
        match takes(step.min(most - total)) {
            true => total += step.min(most - total),
            false => step /= 2,
        }
    }
    (total < MOST_BYTES).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_to_the_last_step() {
        for there in [0, 5 << 20, 100 << 20, 1 << 30, (80 << 30) - 1, 79_650 << 20] {
            let mut left = there;
            let takes = |size: u64| {
                let fits = size <= left;
                left -= if fits { size } else { 0 };
                fits
            };
            let total = largest_total(STEP_BYTES, MOST_BYTES, takes).expect("it ends");
            assert!(total <= there && there - total < LEAST_BYTES, "{total} of {there}");
        }
        assert_eq!(largest_total(STEP_BYTES, MOST_BYTES, |_| true), None, "who gives anything says nothing");
        assert_eq!(largest_total(STEP_BYTES, 3 << 29, |_| true), Some(3 << 29), "no more than the host has");
    }
}
