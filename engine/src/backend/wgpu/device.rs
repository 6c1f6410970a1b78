//! What an adapter has and lacks, and an open device with what can go wrong with it.
//!
//! Invariant: a device is the one that was chosen, with kernels that it can run; its loss is noted once.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fullbore_shaders::{Arithmetic, MAX_GROUP_BYTES, MAX_GROUP_LANES, Tier};
use wgpu::{Features, Limits, MemoryBudgetThresholds, PollError, PollType, SubmissionIndex};

use super::MAX_WORKGROUPS;
use super::adapters::{adapters, choose};
use super::arithmetic::{self, Abilities, ArithmeticChoice};
use super::encode::{MAX_BUFFERS, MAX_PARAMS};
use super::kill_switch::KillSwitch;
use super::pipeline_cache;
use crate::backend::{DeviceError, DeviceInfo, host_memory};

/// Weights are split so that no buffer is larger; drivers grow slow or wrong beyond.
const MAX_SHARD_BYTES: u64 = 1 << 30;
/// What Vulkan guarantees of a storage binding: caches, logits and counts are bound whole.
const MIN_BINDING_BYTES: u64 = 128 << 20;
/// To read the device's clock between commands.
pub(super) const STAMP_FEATURES: Features = Features::TIMESTAMP_QUERY.union(Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);

#[derive(Clone, Debug, Default)]
pub struct WgpuOptions {
    /// `vulkan:0`, `metal`, or `vulkan:` and a part of the adapter's name or driver; empty for the best hardware GPU.
    pub selector: String,
    /// Instead of the tier that the adapter's features give.
    pub tier: Option<Tier>,
    /// What matmuls shall compute with, where the device has it; else f32, with a warning.
    pub arithmetic: ArithmeticChoice,
    /// Splits weights into smaller shards than the device asks for.
    pub max_binding_bytes: Option<u64>,
    /// Whether shaders are compiled with bounds checks.
    pub checked: bool,
    /// Whether drivers on the deny list are used too.
    pub any_driver: bool,
    /// Takes away from the limits that the adapter has, so that wgpu refuses what goes beyond; for tests.
    pub mask: Option<fn(&mut Limits)>,
    /// Spoils kernels, for tests of what finds them.
    pub faults: Vec<Fault>,
    /// Where compiled pipelines are kept between runs; `None` keeps none.
    pub cache_folder: Option<PathBuf>,
    /// What a submission may take, about; `None` for as long as it takes.
    pub max_submit: Option<Duration>,
    /// What a submission may take before the device counts as hung, which is a loss; `None` for as long as it takes.
    pub max_wait: Option<Duration>,
    /// Memory that the device has for us, where it shall have no more; for tests.
    pub max_memory_bytes: Option<u64>,
    /// Features that it shall not have, for tests.
    pub without: Features,
    /// Takes the device away, for tests of what comes after.
    pub kill_switch: KillSwitch,
}

/// A change to the text of one kernel on one tier.
#[derive(Clone, Debug)]
pub struct Fault {
    pub tier: Tier,
    /// Its file, without `.wgsl`.
    pub kernel: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

impl Fault {
    pub(super) fn apply(&self, tier: Tier, kernel: &str, text: String) -> String {
        if (self.tier, self.kernel) != (tier, kernel) {
            return text;
        }
        assert!(text.contains(self.from), "{kernel}.wgsl has no {}", self.from);
        text.replace(self.from, self.to)
    }
}

/// Leaves what WebGPU guarantees everywhere, and the 128 bytes of immediates that every native API has.
pub fn mask_to_webgpu(limits: &mut Limits) {
    let immediates = limits.max_immediate_size.min(128);
    *limits = Limits { max_immediate_size: immediates, ..limits.clone().or_worse_values_from(&Limits::defaults()) };
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("no device answers to {selector:?}; there is {found}")]
    NotFound { selector: String, found: String },
    #[error("device {device} cannot run the {tier} tier, which needs {needs}; leave the tier to it, or choose base")]
    Tier { device: String, tier: &'static str, needs: String },
    #[error(
        "device {device} is below what the {tier} tier needs, {needed} {what}: it has {available}; choose another \
         one, or --device cpu"
    )]
    BelowMinimum { device: String, tier: &'static str, what: &'static str, needed: u64, available: u64 },
    #[error(
        "device {device} has the driver {driver}, which is on the deny list: {fault} ({reference}); {remedy}, choose \
         another device, or say --any-driver to use it all the same"
    )]
    Denied { device: String, driver: String, fault: &'static str, remedy: &'static str, reference: &'static str },
    #[error("device {device} cannot be opened: {reason}")]
    Refused { device: String, reason: String },
}

/// An open device; clones share it.
#[derive(Clone)]
pub(super) struct Device {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub info: DeviceInfo,
    pub tier: Tier,
    pub arithmetic: Arithmetic,
    pub checked: bool,
    pub faults: Vec<Fault>,
    pub max_shard_bytes: u64,
    max_wait: Option<Duration>,
    max_memory_bytes: u64,
    /// By buffers; of a device that is open nothing is given back.
    taken_bytes: Arc<AtomicU64>,
    loss: Loss,
}

/// All adapters, with the tier that each would use.
pub fn devices() -> Vec<DeviceInfo> {
    adapters(MemoryBudgetThresholds::default())
        .iter()
        .map(|(id, adapter)| {
            let tier = natural_tier(adapter.features(), &adapter.get_info());
            describe(id, adapter, tier, &adapter.limits())
        })
        .collect()
}

fn describe(id: &str, adapter: &wgpu::Adapter, tier: Tier, limits: &Limits) -> DeviceInfo {
    let info = adapter.get_info();
    let mut features = vec![];
    if adapter.features().contains(Features::SUBGROUP) {
        features.push(format!("subgroups of {} to {}", info.subgroup_min_size, info.subgroup_max_size));
    }
    for (feature, name) in [(Features::SHADER_F16, "f16"), (Features::IMMEDIATES, "immediates")] {
        if adapter.features().contains(feature) {
            features.push(name.to_owned());
        }
    }
    DeviceInfo {
        id: id.to_owned(),
        name: info.name,
        driver: format!("{} {}; {}", info.driver, info.driver_info, features.join(", ")),
        tier: tier.name().to_owned(),
        arithmetic: ArithmeticChoice::F32.name().to_owned(),
        kernels: pipeline_cache::kernels(),
        pci_bus_id: Some(info.device_pci_bus_id.to_lowercase()).filter(|id| !id.is_empty()),
        memory_bytes: (info.device_type == wgpu::DeviceType::Cpu).then(host_memory::available_bytes).flatten(),
        max_buffer_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
    }
}

/// The first that an adapter with these features lacks of what a tier needs, in words. The subgroup tier's kernels take
/// subgroups of any width from 4 on; a workgroup of the lavapipe tier's is one subgroup of 8.
fn missing_feature(tier: Tier, features: Features, info: &wgpu::AdapterInfo) -> Option<String> {
    if tier == Tier::Base {
        return None;
    }
    for (feature, name) in [(Features::IMMEDIATES, "immediates"), (Features::SUBGROUP, "subgroups")] {
        if !features.contains(feature) {
            return Some(format!("{name}, which it does not have"));
        }
    }
    let (least, most) = (info.subgroup_min_size, info.subgroup_max_size);
    let (needed, fits) = match tier {
        Tier::Lavapipe => ("subgroups of 8 lanes", (least, most) == (8, 8)),
        // A sum of four lanes or more has a place in workgroup memory.
        _ => ("subgroups of 4 lanes or more", least >= 4),
    };
    (!fits).then(|| format!("{needed}: it has {least} to {most}"))
}

fn natural_tier(features: Features, info: &wgpu::AdapterInfo) -> Tier {
    let is_software = info.device_type == wgpu::DeviceType::Cpu;
    let mut tiers = [Tier::Lavapipe, Tier::Subgroup].into_iter().skip(usize::from(!is_software));
    tiers.find(|&tier| missing_feature(tier, features, info).is_none()).unwrap_or(Tier::Base)
}

/// What a tier needs of an adapter's limits and does not have, the first of it: its name, what is needed and what is
/// there. The largest kernels of every tier need the same.
fn lacking(tier: Tier, limits: &Limits) -> Option<(&'static str, u64, u64)> {
    let (groups, scalars) = match tier {
        Tier::Base => {
            (2, ("uniform buffers with an offset", 1, limits.max_dynamic_uniform_buffers_per_pipeline_layout))
        }
        Tier::Subgroup | Tier::Lavapipe => {
            (1, ("bytes of immediates", MAX_PARAMS as u32 * 4, limits.max_immediate_size))
        }
    };
    let counts = [
        scalars,
        ("bind groups", groups, limits.max_bind_groups),
        ("storage buffers in a shader", MAX_BUFFERS as u32, limits.max_storage_buffers_per_shader_stage),
        ("invocations in a workgroup", MAX_GROUP_LANES, limits.max_compute_invocations_per_workgroup),
        ("invocations in a row of a workgroup", MAX_GROUP_LANES, limits.max_compute_workgroup_size_x),
        ("bytes of workgroup memory", MAX_GROUP_BYTES, limits.max_compute_workgroup_storage_size),
        ("workgroups in a row of a dispatch", MAX_WORKGROUPS, limits.max_compute_workgroups_per_dimension),
    ];
    let sizes = [
        ("bytes in a storage binding", MIN_BINDING_BYTES, limits.max_storage_buffer_binding_size),
        ("bytes in a buffer", MIN_BINDING_BYTES, limits.max_buffer_size),
    ];
    let counts = counts.map(|(what, needed, available)| (what, u64::from(needed), u64::from(available)));
    counts.into_iter().chain(sizes).find(|(_, needed, available)| available < needed)
}

/// Why a device was lost, once it was; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Loss(Arc<Mutex<Option<String>>>);

impl Loss {
    /// The first reason stays.
    pub fn note(&self, reason: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
    }

    fn reason(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Where the loss of a device will be noted. What the driver fails at on its own is a loss too; what wgpu refuses is a
/// bug of ours, unless it refuses work on a device that is gone.
fn watch(device: &wgpu::Device) -> Loss {
    let loss = Loss::default();
    let (on_loss, on_error) = (loss.clone(), loss.clone());
    device.set_device_lost_callback(move |reason, message| {
        on_loss.note(if message.is_empty() { format!("{reason:?}") } else { message });
    });
    device.on_uncaptured_error(Arc::new(move |error| match error {
        wgpu::Error::OutOfMemory { .. } | wgpu::Error::Internal { .. } => on_error.note(error.to_string()),
        wgpu::Error::Validation { .. } => assert!(on_error.reason().is_some(), "{error}"),
    }));
    loss
}

impl Device {
    pub fn open(options: &WgpuOptions) -> Result<Device, OpenError> {
        let (id, adapter) = choose(&options.selector, options.any_driver)?;
        let (features, adapter_info) = (adapter.features() - options.without, adapter.get_info());
        let tier = options.tier.unwrap_or_else(|| natural_tier(features, &adapter_info));
        let mut limits = adapter.limits();
        if let Some(mask) = options.mask {
            mask(&mut limits);
        }
        let mut info = describe(&id, &adapter, tier, &limits);
        if let Some(needs) = missing_feature(tier, features, &adapter_info) {
            return Err(OpenError::Tier { device: info.id, tier: tier.name(), needs });
        }
        if let Some((what, needed, available)) = lacking(tier, &limits) {
            return Err(OpenError::BelowMinimum { device: info.id, tier: tier.name(), what, needed, available });
        }
        let arithmetic = match Abilities::of(&adapter, features, &limits).grant(options.arithmetic, tier) {
            Ok(arithmetic) => {
                info.arithmetic = options.arithmetic.name().to_owned();
                arithmetic
            }
            Err(needs) => {
                let asked = options.arithmetic.name();
                tracing::warn!(device = info.id, "--arithmetic {asked} needs {needs}: going on in f32");
                Arithmetic::F32
            }
        };
        let needed = arithmetic::features(arithmetic)
            | if tier == Tier::Base { Features::empty() } else { Features::SUBGROUP | Features::IMMEDIATES };
        // Where they are there: blocks of the KV cache can be swapped to the host, and steps are timed.
        let stamps = if features.contains(STAMP_FEATURES) { STAMP_FEATURES } else { Features::empty() };
        let features = needed | stamps | features & (Features::MAPPABLE_PRIMARY_BUFFERS | Features::PIPELINE_CACHE);
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("fullbore"),
            required_features: features,
            required_limits: Limits {
                max_immediate_size: if tier == Tier::Base { 0 } else { limits.max_immediate_size.min(128) },
                ..limits
            },
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            experimental_features: arithmetic::token(arithmetic),
            ..Default::default()
        });
        let refused = |reason: String| OpenError::Refused { device: id.clone(), reason };
        options.kill_switch.check().map_err(refused)?;
        let (device, queue) = pollster::block_on(request).map_err(|error| refused(error.to_string()))?;
        let loss = watch(&device);
        options.kill_switch.opened(&device, &loss);
        let largest = info.max_buffer_bytes.min(MAX_SHARD_BYTES);
        let max_shard_bytes = options.max_binding_bytes.map_or(largest, |bytes| bytes.min(largest));
        let (checked, faults) = (options.checked, options.faults.clone());
        Ok(Device {
            device,
            queue,
            info,
            tier,
            arithmetic,
            checked,
            faults,
            max_shard_bytes,
            max_wait: options.max_wait,
            max_memory_bytes: options.max_memory_bytes.unwrap_or(u64::MAX),
            taken_bytes: Arc::default(),
            loss,
        })
    }

    /// Whether parameters are immediates, and no uniforms.
    pub fn takes_immediates(&self) -> bool {
        self.tier != Tier::Base
    }

    /// An error if the device is gone.
    pub fn check(&self) -> Result<(), DeviceError> {
        self.loss.reason().map_or(Ok(()), |reason| Err(self.lost(&reason)))
    }

    /// Until the device has done `submission`, or all that it was given.
    pub fn wait(&self, submission: Option<SubmissionIndex>) -> Result<(), DeviceError> {
        let done = self.device.poll(PollType::Wait { submission_index: submission, timeout: self.max_wait });
        self.check()?;
        match done {
            Ok(_) => Ok(()),
            Err(PollError::Timeout) => Err(self.hung()),
            Err(error) => Err(self.lost(&error.to_string())),
        }
    }

    /// It is left as it is: to let go of a device waits until it is idle, which a hung one never is.
    fn hung(&self) -> DeviceError {
        std::mem::forget((self.device.clone(), self.queue.clone()));
        let reason = format!("it has not done one submission in {:?}", self.max_wait.unwrap_or_default());
        self.loss.note(reason.clone());
        self.lost(&reason)
    }

    pub fn lost(&self, reason: &str) -> DeviceError {
        DeviceError::Lost { device: self.info.id.clone(), reason: reason.to_owned() }
    }

    /// For a kernel that the driver cannot build.
    pub fn unbuilt(&self, kernel: &str, reason: &str) -> DeviceError {
        DeviceError::Kernel { device: self.info.id.clone(), kernel: kernel.to_owned(), reason: reason.to_owned() }
    }

    /// Notes that a buffer takes so many bytes, unless that is more than a test lets the device have.
    pub fn take(&self, size_bytes: u64) -> bool {
        let fits = self.taken_bytes.load(Ordering::Relaxed).saturating_add(size_bytes) <= self.max_memory_bytes;
        if fits {
            self.taken_bytes.fetch_add(size_bytes, Ordering::Relaxed);
        }
        fits
    }

    pub fn out_of_memory(&self, what: &str, needed_bytes: u64) -> DeviceError {
        let (device, what) = (self.info.id.clone(), what.to_owned());
        DeviceError::OutOfMemory { device, what, needed_bytes, taken_bytes: self.taken_bytes.load(Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(device_type: wgpu::DeviceType, least: u32, most: u32) -> wgpu::AdapterInfo {
        let mut info = wgpu::AdapterInfo::new(device_type, wgpu::Backend::Vulkan);
        (info.subgroup_min_size, info.subgroup_max_size) = (least, most);
        info
    }

    /// What GPUs have: 4 (some Mali), 8 to 32 (Intel), 32, 32 to 64 (RDNA), 64 (GCN, CDNA), 128 (Adreno).
    const WIDTHS: [(u32, u32); 8] = [(4, 4), (8, 8), (8, 32), (16, 16), (32, 32), (32, 64), (64, 64), (128, 128)];

    #[test]
    fn a_gpu_gets_the_subgroup_tier_whatever_its_width() {
        let features = Features::SUBGROUP | Features::IMMEDIATES;
        for (least, most) in WIDTHS {
            for device_type in [wgpu::DeviceType::DiscreteGpu, wgpu::DeviceType::IntegratedGpu] {
                let gpu = adapter(device_type, least, most);
                assert_eq!(natural_tier(features, &gpu), Tier::Subgroup, "{least} to {most}");
                assert_eq!(natural_tier(Features::SUBGROUP, &gpu), Tier::Base, "no immediates");
                assert_eq!(natural_tier(Features::IMMEDIATES, &gpu), Tier::Base, "no subgroups");
            }
            assert_eq!(
                natural_tier(features, &adapter(wgpu::DeviceType::DiscreteGpu, 1, most)),
                Tier::Base,
                "1 to {most}"
            );
            let software = natural_tier(features, &adapter(wgpu::DeviceType::Cpu, least, most));
            assert_eq!(software == Tier::Lavapipe, (least, most) == (8, 8), "{least} to {most}");
            assert!(software != Tier::Base, "{least} to {most}");
        }
    }
}
