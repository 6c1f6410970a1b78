//! Adapters, and the choice among them.
//!
//! Invariant: a device is chosen by the selector alone, never replaced by another one; software Vulkan only by name.

use wgpu::{InstanceFlags, MemoryBudgetThresholds};

use super::denied::{Denied, denied};
use super::device::OpenError;
use crate::backend::is_one_pci_place;

/// What a hardware GPU is to the machine, the better one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GpuKind {
    /// It has memory of its own.
    Discrete,
    /// Its memory, and the way there, is the host's.
    Integrated,
    Virtual,
}

/// Ids of hardware GPUs, the best first. Each is there once: those of the API that finds the most of them. Those whose
/// driver is on the deny list are left out with a warning, unless it is to be `any_driver`.
pub fn hardware(any_driver: bool) -> Vec<(String, GpuKind)> {
    let all = adapters(MemoryBudgetThresholds::default());
    hardware_of(all.into_iter().map(|(id, adapter)| (id, adapter.get_info())).collect(), any_driver)
}

/// Ids of those that compute on the cpu: lavapipe, SwiftShader, WARP.
pub fn software() -> Vec<String> {
    let all = adapters(MemoryBudgetThresholds::default()).into_iter();
    all.filter(|(_, adapter)| adapter.get_info().device_type == wgpu::DeviceType::Cpu).map(|(id, _)| id).collect()
}

fn hardware_of(mut all: Vec<(String, wgpu::AdapterInfo)>, any_driver: bool) -> Vec<(String, GpuKind)> {
    all.retain(|(id, info)| kind(info).is_some() && (any_driver || is_trusted(id, info)));
    let count = |api: wgpu::Backend| all.iter().filter(|(_, info)| info.backend == api).count();
    let most = all.iter().map(|(_, info)| info.backend).rev().max_by_key(|&api| count(api));
    all.retain(|(_, info)| Some(info.backend) == most);
    let mut all: Vec<_> = all.into_iter().filter_map(|(id, info)| Some((id, kind(&info)?))).collect();
    all.sort_by_key(|(_, kind)| *kind);
    all
}

/// Whether nothing is known against a device's driver; what is known is told.
fn is_trusted(id: &str, info: &wgpu::AdapterInfo) -> bool {
    let known = check_driver(id, info);
    known.as_ref().err().into_iter().for_each(|error| tracing::warn!("going on without a device: {error}"));
    known.is_ok()
}

fn check_driver(id: &str, info: &wgpu::AdapterInfo) -> Result<(), OpenError> {
    let Some(Denied { fault, remedy, reference, .. }) = denied(info) else { return Ok(()) };
    let driver = format!("{} {}", info.driver, info.driver_info);
    Err(OpenError::Denied { device: id.to_owned(), driver, fault, remedy, reference })
}

/// Adapters by id, `vulkan:0` and so on, in the driver's order.
pub fn adapters(budget: MemoryBudgetThresholds) -> Vec<(String, wgpu::Adapter)> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.memory_budget_thresholds = budget;
    descriptor.backends = wgpu::Backends::PRIMARY;
    descriptor.flags = InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    let found = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    let mut counts = std::collections::HashMap::new();
    let named = found.into_iter().map(|adapter| {
        let api = adapter.get_info().backend.to_str();
        let count = counts.entry(api).or_insert(0);
        let id = format!("{api}:{count}");
        *count += 1;
        (id, adapter)
    });
    named.collect()
}

fn matches(selector: &str, id: &str, info: &wgpu::AdapterInfo) -> bool {
    let Some((api, rest)) = selector.split_once(':') else { return selector == info.backend.to_str() };
    let rest = rest.to_lowercase();
    let within = |text: &str| text.to_lowercase().contains(&rest);
    selector == id
        || (api == info.backend.to_str()
            && rest.parse::<u32>().is_err()
            && (within(&info.name) || within(&info.driver_info) || is_one_pci_place(&rest, &info.device_pci_bus_id)))
}

/// None of what is no hardware.
fn kind(info: &wgpu::AdapterInfo) -> Option<GpuKind> {
    match info.device_type {
        wgpu::DeviceType::DiscreteGpu => Some(GpuKind::Discrete),
        wgpu::DeviceType::IntegratedGpu => Some(GpuKind::Integrated),
        wgpu::DeviceType::VirtualGpu => Some(GpuKind::Virtual),
        _ => None,
    }
}

pub fn choose(selector: &str, any_driver: bool) -> Result<(String, wgpu::Adapter), OpenError> {
    let mut all = adapters(MemoryBudgetThresholds::default());
    let found = all.iter().map(|(id, adapter)| format!("{id} ({})", adapter.get_info().name)).collect::<Vec<_>>();
    let found = if found.is_empty() { "none at all".to_owned() } else { found.join(", ") };
    all.retain(|(id, adapter)| {
        let info = adapter.get_info();
        match selector.is_empty() {
            true => kind(&info).is_some() && (any_driver || is_trusted(id, &info)),
            false => matches(selector, id, &info),
        }
    });
    // Software last.
    all.sort_by_key(|(_, adapter)| kind(&adapter.get_info()).map_or((1, None), |kind| (0, Some(kind))));
    let not_found = || OpenError::NotFound { selector: selector.to_owned(), found };
    let (id, adapter) = all.into_iter().next().ok_or_else(not_found)?;
    if !any_driver {
        check_driver(&id, &adapter.get_info())?;
    }
    Ok((id, adapter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(device_type: wgpu::DeviceType) -> wgpu::AdapterInfo {
        wgpu::AdapterInfo::new(device_type, wgpu::Backend::Vulkan)
    }

    #[test]
    fn hardware_is_there_once_and_the_best_first() {
        use wgpu::{Backend, DeviceType};
        let gpu =
            |id: &str, device_type, backend| (id.to_owned(), wgpu::AdapterInfo { backend, ..adapter(device_type) });
        let (vulkan, dx12) = (Backend::Vulkan, Backend::Dx12);
        let both = |api: &str, backend| {
            let integrated = gpu(&format!("{api}:0"), DeviceType::IntegratedGpu, backend);
            [integrated, gpu(&format!("{api}:1"), DeviceType::DiscreteGpu, backend)]
        };
        let software = gpu("vulkan:2", DeviceType::Cpu, vulkan);
        let all = both("vulkan", vulkan).into_iter().chain([software]).chain(both("dx12", dx12)).collect();
        let expected = [("vulkan:1", GpuKind::Discrete), ("vulkan:0", GpuKind::Integrated)];
        assert_eq!(hardware_of(all, false), expected.map(|(id, kind)| (id.to_owned(), kind)));
        assert!(hardware_of(vec![gpu("vulkan:0", DeviceType::Cpu, vulkan)], false).is_empty());
    }

    #[test]
    fn a_gpu_is_named_by_number_words_or_its_place_on_the_bus() {
        let mut info = adapter(wgpu::DeviceType::DiscreteGpu);
        info.name = "AMD Radeon RX 7900 XTX".to_owned();
        (info.driver_info, info.device_pci_bus_id) = ("Mesa 25.0.7".to_owned(), "0000:0b:00.0".to_owned());
        let meant = |selectors: [&'static str; 6]| {
            selectors.into_iter().filter(|selector| matches(selector, "vulkan:1", &info)).collect::<Vec<_>>()
        };
        let its = ["vulkan", "vulkan:1", "vulkan:7900 xtx", "vulkan:mesa 25", "vulkan:0000:0b:00.0", "vulkan:0B:00.0"];
        assert_eq!(meant(its), its);
        let others =
            ["vulkan:0", "vulkan:11", "vulkan:RTX", "vulkan:0000:0b:00.1", "vulkan:0001:0b:00.0", "dx12:0000:0b:00.0"];
        assert_eq!(meant(others), [""; 0]);
        info.device_pci_bus_id = String::new();
        assert!(!matches("vulkan:0000:0b:00.0", "vulkan:1", &info), "it does not say");
    }

    #[test]
    fn a_denied_driver_is_refused_with_a_reason_and_left_out_where_all_are_asked_for() {
        let mut info = adapter(wgpu::DeviceType::IntegratedGpu);
        (info.driver, info.driver_info) = ("V3DV Mesa".to_owned(), "Mesa 24.2.8-1~bpo12+rpt2".to_owned());
        let told = check_driver("vulkan:0", &info).expect_err("it is on the list").to_string();
        let parts =
            ["device vulkan:0 has the driver V3DV Mesa Mesa 24.2.8", "wrong results", "install", "--any-driver"];
        assert!(parts.iter().all(|part| told.contains(part)), "{told}");
        let all = || vec![("vulkan:0".to_owned(), info.clone())];
        assert_eq!(hardware_of(all(), false), []);
        assert_eq!(hardware_of(all(), true).len(), 1);
        assert!(check_driver("vulkan:0", &adapter(wgpu::DeviceType::DiscreteGpu)).is_ok());
    }
}
