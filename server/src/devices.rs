//! Which device a name means. Invariant: the choice is a pure function of the name and the list, it is logged by the
//! caller, and there is never a silent fall-back: a name that fits nothing is an error that lists what there is.

use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::backend::wgpu::{WgpuBackend, WgpuOptions};
use fullbore_engine::backend::{self, Backend, DeviceError, DeviceInfo};
use fullbore_engine::memory::capacity::human_bytes;

#[derive(Debug, thiserror::Error)]
pub enum DeviceChoiceError {
    #[error("there is no device {wanted}; `--device` takes auto, cpu, sim{}", found.iter().map(|id| format!(", {id}")).collect::<String>())]
    Unknown { wanted: String, found: Vec<String> },
    #[error(transparent)]
    Open(#[from] DeviceError),
}

/// Every device of this machine but the simulator.
pub fn all() -> Vec<DeviceInfo> {
    backend::devices()
}

/// The id of the device that `wanted` means: the best hardware GPU for `auto`, else the CPU; software only by name.
pub fn choose<'a>(wanted: &'a str, devices: &'a [DeviceInfo]) -> Result<&'a str, DeviceChoiceError> {
    if matches!(wanted, "cpu" | "sim") {
        return Ok(wanted);
    }
    let found = match wanted {
        "auto" => {
            let hardware = devices.iter().filter(|device| device.id != "cpu" && !is_software(device));
            return Ok(hardware.max_by_key(|device| device.memory_bytes).map_or("cpu", |device| &device.id));
        }
        _ => devices.iter().find(|device| device.id == wanted).or_else(|| {
            let (api, part) = wanted.split_once(':')?;
            let part = part.to_lowercase();
            let fits = |device: &&DeviceInfo| {
                device.id.split(':').next() == Some(api) && device.name.to_lowercase().contains(&part)
            };
            devices.iter().filter(|_| !part.is_empty() && part.parse::<u32>().is_err()).find(fits)
        }),
    };
    found.map(|device| device.id.as_str()).ok_or_else(|| DeviceChoiceError::Unknown {
        wanted: wanted.to_owned(),
        found: devices.iter().map(|device| device.id.clone()).filter(|id| id != "cpu").collect(),
    })
}

/// Opens the device that `wanted` means.
pub fn open(wanted: &str) -> Result<Box<dyn Backend>, DeviceChoiceError> {
    let devices = if matches!(wanted, "cpu" | "sim") { Vec::new() } else { all() };
    Ok(match choose(wanted, &devices)? {
        "cpu" => Box::new(CpuBackend::new(CpuOptions::default())),
        "sim" => Box::new(SimBackend::new(SimOptions::default())),
        id => Box::new(WgpuBackend::open(&WgpuOptions { device: id.to_owned(), ..WgpuOptions::default() })?),
    })
}

/// What `fullbore devices` prints.
pub fn table(devices: &[DeviceInfo]) -> String {
    let cells = |device: &DeviceInfo| {
        let memory = device.memory_bytes.map_or_else(|| "unknown".to_owned(), human_bytes);
        [device.id.clone(), device.name.clone(), memory, device.tier.clone(), device.driver.clone()]
    };
    let head = ["device", "name", "memory", "tier", "driver"].map(str::to_owned);
    let rows: Vec<[String; 5]> = std::iter::once(head).chain(devices.iter().map(cells)).collect();
    let widths: [usize; 5] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; 5]| {
        let padded: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn is_software(device: &DeviceInfo) -> bool {
    let name = device.name.to_lowercase();
    device.tier == "lavapipe" || ["llvmpipe", "lavapipe", "swiftshader", "basic render"].iter().any(|software| name.contains(software))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str, name: &str, memory_bytes: u64) -> DeviceInfo {
        let (id, name) = (id.to_owned(), name.to_owned());
        DeviceInfo { id, name, memory_bytes: Some(memory_bytes), ..DeviceInfo::default() }
    }

    #[test]
    fn software_is_taken_only_by_name() {
        let software = [device("cpu", "EPYC", 9), device("vulkan:0", "llvmpipe (LLVM 19)", 9)];
        assert_eq!(choose("auto", &software).expect("a device"), "cpu");
        assert_eq!(choose("vulkan:llvmpipe", &software).expect("a device"), "vulkan:0");
        assert_eq!(choose("vulkan:0", &software).expect("a device"), "vulkan:0");
        let both = [device("vulkan:0", "llvmpipe", 9), device("vulkan:1", "Radeon", 5), device("vulkan:2", "Arc", 6)];
        assert_eq!(choose("auto", &both).expect("a device"), "vulkan:2");
        assert_eq!(choose("vulkan:radeon", &both).expect("a device"), "vulkan:1");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let one = [device("vulkan:0", "Radeon 9", 5)];
        for wrong in ["vulkan:9", "vulkan:", "metal:radeon", "cuda", ""] {
            let sentence = choose(wrong, &one).expect_err("no such device").to_string();
            assert!(sentence.contains("vulkan:0"), "{sentence}");
        }
        assert!(table(&one).contains("Radeon 9"));
    }
}
