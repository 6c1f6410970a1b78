//! Which device a name means. Invariant: the choice is logged by the caller, and there is no silent fall-back: only
//! `auto` may end at the CPU, and a name that fits nothing is an error that lists what there is.

use std::io;

use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo, wgpu as adapters};
use fullbore_engine::limits::neighbours::Membership;
use fullbore_engine::memory::capacity::human_bytes;

use crate::args::DeviceArgs;
use crate::fetch;

pub mod asked;
pub mod cores;
mod cuda;
pub mod file;

#[derive(Debug, thiserror::Error)]
pub enum DeviceChoiceError {
    #[error("there is no device {wanted}; there is {known}")]
    Unknown { wanted: String, known: String },
    #[error("device {wanted} cannot be had: {reason}; there is {known}")]
    Cuda { wanted: String, reason: String, known: String },
    #[error(transparent)]
    Gpu(#[from] adapters::OpenError),
    #[error(transparent)]
    Cpu(#[from] DeviceError),
    #[error("{first} and {second} are one device: leave one out{remedy}")]
    Twice { first: String, second: String, remedy: &'static str },
    #[error("{device} has no kernels of tier {tier}: --tier is of what Vulkan, Metal and DX12 give")]
    NoTier { device: String, tier: &'static str },
    #[error("{device} cannot run on those cores: {source}")]
    Cores { device: String, source: io::Error },
    #[error("{0}")]
    File(String),
    #[error("--device {asked}: this command drives one device, on all cores")]
    NotOne { asked: String },
}

/// Every device of this machine; the simulator is none.
pub fn all() -> Result<Vec<DeviceInfo>, DeviceChoiceError> {
    let cpu = cpu()?.info().clone();
    let cuda = cuda::devices().unwrap_or_default();
    Ok(std::iter::once(cpu).chain(cuda).chain(adapters::devices()).collect())
}

/// Opens the device that `wanted` means: for `auto` the first GPU that CUDA gives, else the best hardware GPU, else the
/// CPU; software Vulkan only by name.
pub fn open(wanted: &DeviceArgs) -> Result<Box<dyn Backend>, DeviceChoiceError> {
    open_at(wanted, None)
}

/// The same with kernels of `tier`, which not every device has.
pub fn open_at(wanted: &DeviceArgs, tier: Option<adapters::Tier>) -> Result<Box<dyn Backend>, DeviceChoiceError> {
    let backend = open_any(wanted, tier)?;
    let (asked, info) = (wanted.arithmetic.name(), backend.info());
    if let Some(tier) = tier.map(adapters::Tier::name).filter(|tier| info.tier != *tier) {
        return Err(DeviceChoiceError::NoTier { device: info.id.clone(), tier });
    }
    if asked != info.arithmetic {
        tracing::warn!(device = info.id, "this device has no --arithmetic {asked}: going on in {}", info.arithmetic);
    }
    Ok(backend)
}

fn open_any(wanted: &DeviceArgs, tier: Option<adapters::Tier>) -> Result<Box<dyn Backend>, DeviceChoiceError> {
    let open_gpu = |selector: &str| gpu(selector, tier, wanted);
    match wanted.name.as_str() {
        "cpu" => Ok(cpu()?),
        // Host and device share the machine's time, as they do on a real one.
        "sim" => Ok(Box::new(SimBackend::new(SimOptions { sleeps: true, ..SimOptions::default() }))),
        "auto" => match cuda::open("", wanted.arithmetic) {
            Ok(cuda) if tier.is_none() => Ok(cuda),
            other => {
                if let Err(reason) = other {
                    tracing::info!("going on without CUDA: {reason}");
                }
                match open_gpu("") {
                    Err(adapters::OpenError::NotFound { .. }) => Ok(cpu()?),
                    opened => Ok(opened?),
                }
            }
        },
        // An empty selector would mean the best there is.
        "" => Err(unknown("")),
        name if !is_one(wanted) => Err(DeviceChoiceError::NotOne { asked: name.to_owned() }),
        name if cuda::is_meant(name) => {
            let selector = name.strip_prefix("cuda:").unwrap_or_default();
            cuda::open(selector, wanted.arithmetic).map_err(|reason| {
                let (wanted, known) = (name.to_owned(), known());
                DeviceChoiceError::Cuda { wanted, reason, known }
            })
        }
        name => open_gpu(name).map_err(|error| match error {
            adapters::OpenError::NotFound { .. } => unknown(name),
            error => error.into(),
        }),
    }
}

/// Whether a name means one device, whatever its cores.
fn is_one(wanted: &DeviceArgs) -> bool {
    matches!(asked::asked(wanted).as_deref(), Ok([one]) if one.args.name == wanted.name)
}

/// A device once more, opened as `wanted` says, with the kernels that it had.
pub fn again(device: &DeviceInfo, wanted: &DeviceArgs) -> Result<Box<dyn Backend>, DeviceChoiceError> {
    let arithmetic = arithmetic_of(&device.arithmetic);
    let wanted = DeviceArgs { name: device.id.clone(), arithmetic, ..wanted.clone() };
    open_at(&wanted, tier_of(&device.tier))
}

fn tier_of(name: &str) -> Option<adapters::Tier> {
    adapters::Tier::ALL.into_iter().find(|tier| tier.name() == name)
}

fn arithmetic_of(name: &str) -> adapters::ArithmeticChoice {
    adapters::ArithmeticChoice::ALL.into_iter().find(|choice| choice.name() == name).unwrap_or_default()
}

/// The same device as `device`, opened as `wanted` says, with plainer kernels, where it has some: in f32 first, then of
/// a plainer tier.
pub fn plainer(device: &DeviceInfo, wanted: &DeviceArgs) -> Option<Result<Box<dyn Backend>, DeviceChoiceError>> {
    let wanted = DeviceArgs { name: device.id.clone(), arithmetic: adapters::ArithmeticChoice::F32, ..wanted.clone() };
    Some(match Plainer::of(device)? {
        Plainer::Cpu => {
            let plain = CpuBackend::new(CpuOptions { plain: true, ..CpuOptions::default() });
            plain.map(|backend| Box::new(backend) as Box<dyn Backend>).map_err(DeviceChoiceError::Cpu)
        }
        Plainer::Gpu(tier) => open_at(&wanted, tier),
    })
}

/// Whether there are such kernels.
pub fn has_plainer(device: &DeviceInfo) -> bool {
    Plainer::of(device).is_some()
}

/// What [`plainer`] opens.
#[derive(Debug, PartialEq, Eq)]
enum Plainer {
    Cpu,
    /// In f32; without a tier where the device has none, as by CUDA.
    Gpu(Option<adapters::Tier>),
}

impl Plainer {
    fn of(device: &DeviceInfo) -> Option<Plainer> {
        let is_f32 = arithmetic_of(&device.arithmetic) == adapters::ArithmeticChoice::F32;
        match tier_of(&device.tier) {
            _ if device.tier == "avx2" => Some(Plainer::Cpu),
            tier if !is_f32 => Some(Plainer::Gpu(tier)),
            tier => Some(Plainer::Gpu(Some(tier?.plainer()?))),
        }
    }
}

/// Memory that the device has for us: asked, else tried; `None` where neither says.
pub fn memory_bytes(device: &DeviceInfo) -> Option<u64> {
    match device.id.as_str() {
        "sim" => None,
        id => device.memory_bytes.or_else(|| adapters::free_bytes(id)),
    }
}

/// More than the caches of the largest GPUs hold, which have 256 MB.
const COLD_BYTES: u64 = 512 << 20;
/// Memory of a GPU that some such pieces fit.
const ROOMY_BYTES: u64 = 8 << 30;

/// What no cache of the device holds, as far as its memory goes; `usual` where a processor computes.
pub fn cold_bytes(device: &DeviceInfo, usual: u64) -> u64 {
    let is_gpu = cuda::is_meant(&device.id) || device.memory_bytes.is_none() && device.id != "sim";
    let is_roomy = || memory_bytes(device).is_none_or(|bytes| bytes >= ROOMY_BYTES);
    if is_gpu && is_roomy() { COLD_BYTES } else { usual }
}

/// An engine's place among those of this process that share the device, or the cores of it that `title` names; a
/// simulated one is nobody else's.
pub fn share(device: &DeviceInfo, title: &str, engine_name: &str) -> Option<Membership> {
    (device.id != "sim").then(|| Membership::join(title, engine_name))
}

fn unknown(wanted: &str) -> DeviceChoiceError {
    DeviceChoiceError::Unknown { wanted: wanted.to_owned(), known: known() }
}

/// What `--device` takes here.
fn known() -> String {
    let found = cuda::devices().unwrap_or_default().into_iter().chain(adapters::devices());
    let gpus = found.map(|device| format!("{} ({})", device.id, device.name));
    let known: Vec<String> = ["auto", "cpu", "sim"].map(str::to_owned).into_iter().chain(gpus).collect();
    known.join(", ")
}

fn cpu() -> Result<Box<dyn Backend>, DeviceError> {
    Ok(Box::new(CpuBackend::new(CpuOptions::default())?))
}

fn gpu(
    selector: &str,
    tier: Option<adapters::Tier>,
    wanted: &DeviceArgs,
) -> Result<Box<dyn Backend>, adapters::OpenError> {
    let options = adapters::WgpuOptions {
        selector: selector.to_owned(),
        tier,
        arithmetic: wanted.arithmetic,
        cache_folder: fetch::cache_folder().ok().map(|folder| folder.join("pipelines")),
        max_submit: wanted.max_submit(),
        max_wait: wanted.max_wait(),
        checked: wanted.safe_shaders,
        any_driver: wanted.any_driver,
        ..adapters::WgpuOptions::default()
    };
    Ok(Box::new(adapters::WgpuBackend::open(&options)?))
}

/// One line about a device and the kernels that it has.
pub fn title(device: &DeviceInfo) -> String {
    let DeviceInfo { id, name, driver, tier, arithmetic, .. } = device;
    format!("{id}, {name}, {driver}, tier {tier}, {arithmetic}")
}

/// What `fullbore devices` prints.
pub fn list() -> Result<String, DeviceChoiceError> {
    Ok(table(&all()?, &adapters::software()))
}

/// `software` are ids of GPUs that are programs.
fn table(devices: &[DeviceInfo], software: &[String]) -> String {
    let cells = |device: &DeviceInfo| {
        let kind = match device.id.as_str() {
            "cpu" => "cpu",
            id if software.iter().any(|one| one == id) => "software",
            _ => "gpu",
        };
        let memory = device.memory_bytes.map_or_else(|| "unknown".to_owned(), human_bytes);
        let place = device.pci_bus_id.as_ref().map_or_else(String::new, |place| format!("; PCI {place}"));
        let driver = format!("{}{place}", device.driver);
        [&device.id, kind, &device.name, &memory, &device.tier, &driver].map(str::to_owned)
    };
    let head = ["device", "kind", "name", "memory", "tier", "driver and features"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(devices.iter().map(cells)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |row: &[String; 6]| {
        let padded: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn names_mean_devices() {
        for name in ["cpu", "sim"] {
            assert_eq!(open(&DeviceArgs::new(name)).expect("always there").info().id, name);
        }
        assert!(memory_bytes(cpu().expect("always there").info()).is_some());
        assert_eq!(memory_bytes(open(&DeviceArgs::new("sim")).expect("always there").info()), None);
        for wanted in ["", "gpu", "vulkan:no-such-device"] {
            let sentence = open(&DeviceArgs::new(wanted)).err().expect("not there").to_string();
            let expected = format!("there is no device {wanted}; there is auto, cpu, sim");
            assert!(sentence.starts_with(&expected), "{sentence}");
        }
        for wanted in ["cuda:99", "cuda:GPU-no-such"] {
            let sentence = open(&DeviceArgs::new(wanted)).err().expect("not there").to_string();
            let begin = format!("device {wanted} cannot be had: ");
            assert!(sentence.starts_with(&begin) && sentence.contains("CUDA"), "{sentence}");
            assert!(sentence.contains("there is auto, cpu, sim"), "{sentence}");
        }
    }

    /// Lines of a log, in memory.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no writer panics").write(line)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What something gives, and what it logs.
    pub fn logged<T>(something: impl FnOnce() -> T) -> (T, String) {
        let lines = Lines::default();
        let own = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || own.clone()).finish();
        let given = tracing::subscriber::with_default(subscriber, something);
        let text = String::from_utf8(lines.0.lock().expect("no writer panics").clone()).expect("text");
        (given, text)
    }

    #[test]
    fn auto_says_why_it_goes_on_without_cuda() {
        let (opened, text) = logged(|| open(&DeviceArgs::new("auto")));
        let device = opened.expect("there is always the cpu").info().id.clone();
        match cuda::open("", adapters::ArithmeticChoice::default()) {
            Ok(_) => assert!(cuda::is_meant(&device), "{device}"),
            Err(reason) => {
                assert!(!cuda::is_meant(&device), "{device}");
                assert!(text.contains(&format!("going on without CUDA: {reason}")), "{text}");
            }
        }
    }

    #[test]
    fn in_f32_what_has_no_tiers_has_nothing_plainer() {
        let [base, subgroup] = ["base", "subgroup"].map(|name| Plainer::Gpu(tier_of(name)));
        for (id, tier, arithmetic, expected) in [
            ("cpu", "avx2", "f32", Some(Plainer::Cpu)),
            ("cpu", "plain", "f32", None),
            ("cuda:0", "sm_90", "matrix-units", Some(Plainer::Gpu(None))),
            ("cuda:0", "sm_90", "f32", None),
            ("vulkan:0", "subgroup", "f16", Some(subgroup)),
            ("vulkan:0", "subgroup", "f32", Some(base)),
            ("vulkan:0", "base", "f32", None),
        ] {
            let [id, tier, arithmetic] = [id, tier, arithmetic].map(str::to_owned);
            let device = DeviceInfo { id, tier, arithmetic, ..DeviceInfo::default() };
            assert_eq!(Plainer::of(&device), expected, "{device:?}");
        }
    }

    #[test]
    fn a_tier_that_a_device_has_not_is_refused() {
        let sentence = open_at(&DeviceArgs::new("cpu"), tier_of("base")).err().expect("the cpu has none").to_string();
        let expected = "cpu has no kernels of tier base: --tier is of what Vulkan, Metal and DX12 give";
        assert_eq!(sentence, expected);
    }

    #[test]
    fn what_is_measured_does_not_fit_the_cache_of_a_gpu() {
        let device = |id: &str, memory_bytes| DeviceInfo { id: id.to_owned(), memory_bytes, ..DeviceInfo::default() };
        let size = |id, memory_bytes| cold_bytes(&device(id, memory_bytes), 1);
        assert_eq!([size("cuda:0", Some(1 << 36)), size("cuda:0", Some(1 << 31))], [512 << 20, 1]);
        assert_eq!([size("cpu", Some(1 << 36)), size("vulkan:0", Some(1 << 36)), size("sim", None)], [1; 3]);
    }

    #[test]
    fn columns_stand_below_each_other() {
        let device = |id: &str| DeviceInfo { id: id.to_owned(), tier: "plain".to_owned(), ..DeviceInfo::default() };
        let mut devices = ["cpu", "vulkan:0", "vulkan:1"].map(device);
        devices[1].pci_bus_id = Some("0000:0b:00.0".to_owned());
        let text = table(&devices, &["vulkan:1".to_owned()]);
        assert_eq!(
            text.lines().map(|line| line.contains("PCI 0000:0b:00.0")).collect::<Vec<_>>(),
            [false, false, true, false]
        );
        let columns: Vec<_> = text.lines().skip(1).map(|line| line.find("plain")).collect();
        assert_eq!(columns, [text.find("tier"); 3]);
        let kinds: Vec<_> = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(kinds, ["cpu", "gpu", "software"], "{text}");
    }
}
