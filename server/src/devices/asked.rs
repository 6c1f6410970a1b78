//! The devices that `--device` asks for: one, several with commas between them, those of a file, or all.
//!
//! Invariant: who is named is there or refused, with the name; `all` takes what there is, and `auto` the best of it.

use adapters::GpuKind;
use fullbore_engine::backend::{DeviceInfo, wgpu as adapters};

use super::DeviceChoiceError;
use super::cores::{self, Cores, Pinned};
use super::cuda;
use super::file::{self, Listed};
use crate::args::DeviceArgs;

/// One of them.
#[derive(Clone, Debug)]
pub struct Asked {
    /// As it was named, cores included.
    pub title: String,
    /// Without its cores.
    pub args: DeviceArgs,
    pub cores: Option<Cores>,
    /// What a file says of it alone.
    pub listed: Option<Listed>,
    /// Whether the others go on without it.
    pub is_optional: bool,
    /// Another way to the same device, where this one fails.
    pub otherwise: Option<String>,
}

/// At least one. `+` is between them where `--model` has its own commas.
pub fn asked(args: &DeviceArgs) -> Result<Vec<Asked>, DeviceChoiceError> {
    let one = |title: String| Asked::named(args, title);
    if file::is_file(&args.name) {
        let listed = file::read(&args.name).map_err(DeviceChoiceError::File)?;
        return Ok(listed.into_iter().map(|own| Asked { listed: Some(own.clone()), ..one(own.name) }).collect());
    }
    if args.name == "all" {
        let (gpus, no_cuda) = every_gpu(args);
        tell(no_cuda);
        let mut all: Vec<Asked> = gpus.into_iter().map(|gpu| gpu.asked(args)).collect();
        all.extend(all.is_empty().then(|| Asked { is_optional: true, ..one("cpu".to_owned()) }));
        return Ok(all);
    }
    Ok(args.name.split([',', '+']).map(|name| one(name.trim().to_owned())).collect())
}

/// What `auto` means to a server: every GPU of the best kind that there is, and where that is no more than one, what it
/// means to everybody else.
pub fn asked_by_auto(args: &DeviceArgs) -> Vec<Asked> {
    let (gpus, no_cuda) = every_gpu(args);
    by_auto(args, gpus, no_cuda)
}

fn by_auto(args: &DeviceArgs, gpus: Vec<Gpu>, no_cuda: Option<String>) -> Vec<Asked> {
    let (best, others) = of_best_kind(gpus);
    for Gpu { id, kind, .. } in &others {
        tracing::info!(device = id, ?kind, "auto leaves this GPU to --device all, because there is a better kind");
    }
    match best.len() {
        // Which asks CUDA again, and tells.
        0 | 1 => vec![Asked::named(args, args.name.clone())],
        _ => {
            tell(no_cuda);
            best.into_iter().map(|gpu| gpu.asked(args)).collect()
        }
    }
}

fn tell(no_cuda: Option<String>) {
    if let Some(reason) = no_cuda {
        tracing::info!("going on without CUDA: {reason}");
    }
}

/// A hardware GPU, by the way to it that is tried first.
#[derive(Clone, Debug, PartialEq)]
struct Gpu {
    id: String,
    kind: GpuKind,
    otherwise: Option<String>,
}

impl Gpu {
    fn asked(self, args: &DeviceArgs) -> Asked {
        Asked { is_optional: true, otherwise: self.otherwise, ..Asked::named(args, self.id) }
    }
}

/// And why CUDA gives none.
fn every_gpu(args: &DeviceArgs) -> (Vec<Gpu>, Option<String>) {
    let hardware = adapters::hardware(args.any_driver);
    let kind = |id: &String| hardware.iter().find(|(known, _)| known == id).map(|(_, kind)| *kind);
    let by_api = adapters::devices().into_iter().filter_map(|device| Some((kind(&device.id)?, device))).collect();
    let (by_cuda, no_cuda) = match cuda::devices() {
        Ok(by_cuda) => (by_cuda, None),
        Err(reason) => (Vec::new(), Some(reason)),
    };
    (every_once(by_cuda, by_api), no_cuda)
}

/// Each once, by CUDA where that gives it. What CUDA gives counts as discrete where no other way to it tells.
fn every_once(cuda: Vec<DeviceInfo>, mut others: Vec<(GpuKind, DeviceInfo)>) -> Vec<Gpu> {
    let mut all = Vec::with_capacity(cuda.len() + others.len());
    for by_cuda in cuda {
        let same = others.iter().position(|(_, other)| is_one(&by_cuda, other, by_cuda.name == other.name));
        let same = same.map(|place| others.remove(place));
        let (kind, otherwise) = same.map_or((GpuKind::Discrete, None), |(kind, other)| (kind, Some(other.id)));
        all.push(Gpu { id: by_cuda.id, kind, otherwise });
    }
    all.extend(others.into_iter().map(|(kind, device)| Gpu { id: device.id, kind, otherwise: None }));
    all
}

/// Those of the best kind, and the rest: an integrated GPU beside a discrete one is slow, and takes the host's memory.
fn of_best_kind(all: Vec<Gpu>) -> (Vec<Gpu>, Vec<Gpu>) {
    let best = all.iter().map(|gpu| gpu.kind).min();
    all.into_iter().partition(|gpu| Some(gpu.kind) == best)
}

/// Whether two are one physical device: what the bus says, else `otherwise`.
fn is_one(a: &DeviceInfo, b: &DeviceInfo, otherwise: bool) -> bool {
    match (&a.pci_bus_id, &b.pci_bus_id) {
        (Some(a), Some(b)) => a == b,
        _ => otherwise,
    }
}

impl Asked {
    fn named(args: &DeviceArgs, title: String) -> Asked {
        let (name, cores) = cores::split(&title);
        let args = DeviceArgs { name: name.to_owned(), ..args.clone() };
        Asked { args, cores, listed: None, is_optional: false, otherwise: None, title }
    }

    /// The same device by the other way to it, where there is one.
    pub fn other_way(&self) -> Option<Asked> {
        let name = self.otherwise.clone()?;
        Some(Asked { is_optional: self.is_optional, ..Asked::named(&self.args, name) })
    }

    /// See [`cores::pin`].
    pub fn pin(&self) -> Result<Option<Pinned>, DeviceChoiceError> {
        cores::pin(self.cores.as_ref(), &self.title)
    }
}

/// Refuses one that is there twice; what computes on cores may be, each time on others.
pub fn check_apart(devices: &[(&Asked, &DeviceInfo)]) -> Result<(), DeviceChoiceError> {
    for (index, (asked, info)) in devices.iter().enumerate() {
        let is_on_cores = (info.memory_bytes.is_some() && !cuda::is_meant(&info.id)) || info.id == "sim";
        let is_apart = |other: &Asked| {
            let both = asked.cores.as_ref().zip(other.cores.as_ref());
            is_on_cores && both.is_some_and(|(own, others)| !own.overlap(others))
        };
        let is_same = |known: &DeviceInfo| known.id == info.id || is_one(known, info, false);
        let earlier = devices[..index].iter().find(|(other, known)| is_same(known) && !is_apart(other));
        if let Some((other, _)) = earlier {
            let (first, second) = (other.title.clone(), asked.title.clone());
            let remedy = if is_on_cores { ", or give each its own cores, as in cpu@0,cpu@1" } else { "" };
            return Err(DeviceChoiceError::Twice { first, second, remedy });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::logged;
    use super::*;

    fn sentence(names: &str, ids: &[&str], memory_bytes: Option<u64>) -> Option<String> {
        let asked = asked(&DeviceArgs::new(names)).expect("no file");
        let info = |id: &&str| DeviceInfo { id: (*id).to_owned(), memory_bytes, ..DeviceInfo::default() };
        let infos: Vec<DeviceInfo> = ids.iter().map(info).collect();
        check_apart(&asked.iter().zip(&infos).collect::<Vec<_>>()).err().map(|error| error.to_string())
    }

    #[test]
    fn a_device_is_there_once_or_each_time_on_other_cores() {
        assert_eq!(sentence("cpu@0,cpu@1", &["cpu", "cpu"], Some(1)), None);
        assert_eq!(sentence("vulkan:0,vulkan:1", &["vulkan:0", "vulkan:1"], None), None);
        let twice = sentence("vulkan:0,cpu,vulkan:GPU", &["vulkan:0", "cpu", "vulkan:0"], None).expect("one device");
        assert!(twice.contains("vulkan:0 and vulkan:GPU are one device") && !twice.contains("cores"), "{twice}");
        for names in ["cpu,cpu", "cpu@0-1,cpu@1", "cpu@0,cpu"] {
            let twice = sentence(names, &["cpu", "cpu"], Some(1)).expect("one device");
            assert!(twice.contains("give each its own cores"), "{twice}");
        }
        // What a GPU is called depends on who asks it.
        let through = |id: &str, pci: &str| DeviceInfo {
            id: id.to_owned(),
            pci_bus_id: Some(pci.to_owned()),
            ..DeviceInfo::default()
        };
        let listed = asked(&DeviceArgs::new("cuda:0,vulkan:0")).expect("no file");
        let apart = |pci: &str| {
            let infos = [through("cuda:0", "0000:0b:00.0"), through("vulkan:0", pci)];
            check_apart(&listed.iter().zip(&infos).collect::<Vec<_>>()).map_err(|error| error.to_string())
        };
        assert_eq!(apart("0000:0c:00.0"), Ok(()));
        assert_eq!(apart("0000:0b:00.0"), Err("cuda:0 and vulkan:0 are one device: leave one out".to_owned()));
        // Cores of the host do not make two of a GPU.
        assert!(sentence("vulkan:0@0,vulkan:0@1", &["vulkan:0", "vulkan:0"], None).is_some());
    }

    /// One alone is opened as it is named, and whoever opens it tells.
    #[test]
    fn auto_says_of_several_gpus_why_none_is_by_cuda() {
        let gpu = |id: &str| Gpu { id: id.to_owned(), kind: GpuKind::Discrete, otherwise: None };
        let chosen = |ids: &[&str]| {
            let (gpus, reason) = (ids.iter().map(|id| gpu(id)).collect(), Some("no driver".to_owned()));
            let (asked, log) = logged(|| by_auto(&DeviceArgs::new("auto"), gpus, reason));
            (
                asked.into_iter().map(|one| one.title).collect::<Vec<_>>(),
                log.contains("going on without CUDA: no driver"),
            )
        };
        assert_eq!(chosen(&["vulkan:0"]), (vec!["auto".to_owned()], false));
        assert_eq!(chosen(&["vulkan:0", "vulkan:1"]), (["vulkan:0", "vulkan:1"].map(str::to_owned).to_vec(), true));
    }

    #[test]
    fn auto_takes_each_gpu_of_the_best_kind_once_and_by_cuda_where_that_has_it() {
        let device = |id: &str, name: &str, pci: Option<&str>| DeviceInfo {
            id: id.to_owned(),
            name: name.to_owned(),
            pci_bus_id: pci.map(str::to_owned),
            ..DeviceInfo::default()
        };
        let (slots, nvidia) = (["0000:01:00.0", "0000:02:00.0"], "NVIDIA");
        let cuda = || vec![device("cuda:0", nvidia, Some(slots[0])), device("cuda:1", nvidia, Some(slots[1]))];
        let others = || {
            vec![
                (GpuKind::Discrete, device("vulkan:1", nvidia, Some(slots[0]))),
                (GpuKind::Discrete, device("vulkan:2", nvidia, Some(slots[1]))),
                (GpuKind::Discrete, device("vulkan:3", "Arc", Some("0000:03:00.0"))),
                (GpuKind::Integrated, device("vulkan:0", "UHD", Some("0000:00:02.0"))),
            ]
        };
        let gpu = |id: &str, kind, otherwise: Option<&str>| {
            let otherwise = otherwise.map(str::to_owned);
            Gpu { id: id.to_owned(), kind, otherwise }
        };
        let discrete = |id, otherwise| gpu(id, GpuKind::Discrete, otherwise);
        let expected = vec![discrete("cuda:0", Some("vulkan:1")), discrete("cuda:1", Some("vulkan:2"))];
        let integrated = gpu("vulkan:0", GpuKind::Integrated, None);
        let (best, rest) = of_best_kind(every_once(cuda(), others()));
        assert_eq!(best, [expected, vec![discrete("vulkan:3", None)]].concat());
        assert_eq!(rest.iter().collect::<Vec<_>>(), [&integrated]);
        let plain = ["vulkan:1", "vulkan:2", "vulkan:3"].map(|id| discrete(id, None));
        assert_eq!(of_best_kind(every_once(Vec::new(), others())).0, plain);
        assert_eq!(of_best_kind(vec![integrated.clone()]), (vec![integrated], Vec::new()));
        let asked = plain[0].clone().asked(&DeviceArgs::new("auto"));
        assert_eq!((asked.title.as_str(), asked.args.name.as_str()), ("vulkan:1", "vulkan:1"));
        assert!(asked.is_optional && asked.other_way().is_none());
        let otherwise = discrete("cuda:0", Some("vulkan:1")).asked(&DeviceArgs::new("auto")).other_way();
        assert_eq!(otherwise.map(|asked| (asked.args.name, asked.is_optional)), Some(("vulkan:1".to_owned(), true)));
    }

    #[test]
    fn commas_and_in_a_model_plus_signs_are_between_devices() {
        let all = |names| asked(&DeviceArgs::new(names)).expect("no file");
        let titles = |names| all(names).into_iter().map(|asked| asked.title).collect::<Vec<_>>();
        assert_eq!(titles("vulkan:0, cpu@1-2"), ["vulkan:0", "cpu@1-2"]);
        assert_eq!(titles("sim@0+sim@1"), ["sim@0", "sim@1"]);
        let [one] = &all("cpu@3")[..] else { panic!("one") };
        assert_eq!((one.args.name.as_str(), one.is_optional), ("cpu", false));
        assert!(all("all").iter().all(|asked| asked.is_optional));
        let missing = asked(&DeviceArgs::new("no-such.toml")).expect_err("no file").to_string();
        assert!(missing.contains("no-such.toml"), "{missing}");
    }
}
