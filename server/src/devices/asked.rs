//! The devices that `--device` asks for: one, several with commas between them, those of a file, or all.
//!
//! Invariant: who is named is there or refused, with the name; `all` takes what there is.

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
}

/// At least one. `+` is between them where `--model` has its own commas.
pub fn asked(args: &DeviceArgs) -> Result<Vec<Asked>, DeviceChoiceError> {
    let one = |title: String| {
        let (name, cores) = cores::split(&title);
        let args = DeviceArgs { name: name.to_owned(), ..args.clone() };
        Asked { args, cores, listed: None, is_optional: false, title }
    };
    if file::is_file(&args.name) {
        let listed = file::read(&args.name).map_err(DeviceChoiceError::File)?;
        return Ok(listed.into_iter().map(|own| Asked { listed: Some(own.clone()), ..one(own.name) }).collect());
    }
    if args.name == "all" {
        let mut names = every_gpu(args.any_driver);
        names.extend(names.is_empty().then(|| "cpu".to_owned()));
        return Ok(names.into_iter().map(|name| Asked { is_optional: true, ..one(name) }).collect());
    }
    Ok(args.name.split([',', '+']).map(|name| one(name.trim().to_owned())).collect())
}

/// Each once, by CUDA where that gives it.
fn every_gpu(any_driver: bool) -> Vec<String> {
    let cuda = cuda::devices().unwrap_or_default();
    let hardware: Vec<String> = adapters::hardware(any_driver).into_iter().map(|(id, _)| id).collect();
    let is_known =
        |device: &DeviceInfo| cuda.iter().any(|by_cuda| is_one(by_cuda, device, by_cuda.name == device.name));
    let others = adapters::devices().into_iter().filter(|device| hardware.contains(&device.id) && !is_known(device));
    let ids: Vec<String> = others.map(|device| device.id).collect();
    cuda.iter().map(|device| device.id.clone()).chain(ids).collect()
}

/// Whether two are one physical device: what the bus says, else `otherwise`.
fn is_one(a: &DeviceInfo, b: &DeviceInfo, otherwise: bool) -> bool {
    match (&a.pci_bus_id, &b.pci_bus_id) {
        (Some(a), Some(b)) => a == b,
        _ => otherwise,
    }
}

impl Asked {
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
