//! What targets are called on the page: by their adapters, and where several drivers drive one adapter, or several ways
//! lead to it, by those too.

use std::collections::{BTreeMap, BTreeSet};

use super::view::Named;
use crate::result::{Device, Target};

pub struct Names {
    /// Adapters that were measured by more than one driver.
    shared: BTreeSet<String>,
}

impl Names {
    pub fn of(results: &[Named]) -> Names {
        let mut drivers: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for device in results.iter().flat_map(|(_, result)| &result.targets).filter_map(|of| of.device.as_ref()) {
            drivers.entry(&device.name).or_default().insert(driver(device));
        }
        let shared = drivers.into_iter().filter(|(_, drivers)| drivers.len() > 1);
        Names { shared: shared.map(|(name, _)| name.to_owned()).collect() }
    }

    /// Its adapter; of what is known by its URL alone, its own name.
    pub fn call(&self, target: &Target) -> String {
        match &target.device {
            Some(device) if self.shared.contains(&device.name) => format!("{}, {}", device.name, driver(device)),
            Some(device) => device.name.clone(),
            None => target.name.clone(),
        }
    }
}

/// Whose adapter it is, by what it and its driver are called.
pub fn vendor(target: &Target) -> &'static str {
    let Some(device) = &target.device else { return "Other engines" };
    let name = format!("{} {}", device.name, device.driver).to_lowercase();
    // What is drawn in software names the processor or its compiler too.
    let known = [
        ("In software", &["llvmpipe", "lavapipe", "swiftshader"][..]),
        ("NVIDIA", &["nvidia", "cuda", "geforce"]),
        ("AMD", &["amd", "radeon", "radv"]),
        ("Intel", &["intel"]),
        ("Apple", &["apple"]),
        ("Qualcomm", &["qualcomm", "adreno"]),
        ("Arm", &["mali"]),
    ];
    let is_named = |(_, words): &(&str, &[&str])| words.iter().any(|word| name.contains(word));
    known.into_iter().find(is_named).map_or("Other vendors", |(vendor, _)| vendor)
}

/// Without what follows its version, and without the adapter's name, with which some begin.
fn driver(device: &Device) -> &str {
    let driver = device.driver.split(';').next().unwrap_or_default().trim();
    let adapter = device.name.split(' ').next().unwrap_or_default();
    driver.strip_prefix(adapter).filter(|rest| rest.starts_with(' ')).map_or(driver, str::trim_start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::BenchResult;

    fn named(name: &str, driver: &str) -> (Named, Target) {
        let (tier, arithmetic) = ("base".to_owned(), "f32".to_owned());
        let (name, driver) = (name.to_owned(), driver.to_owned());
        let device = Device { id: "vulkan:0".to_owned(), name, driver, tier, arithmetic, memory_bytes: None };
        let target = Target { device: Some(device), ..Target::default() };
        let mut result = BenchResult::begin("serve", 1, None);
        result.targets.push(target.clone());
        (("a.json".to_owned(), result), target)
    }

    #[test]
    fn adapters_are_told_apart_by_their_drivers_where_there_are_several() {
        let all = [
            named("soft (LLVM 15)", "soft Mesa 22 (LLVM 15); subgroups of 8"),
            named("soft (LLVM 15)", "soft Mesa 25 (LLVM 15); subgroups of 8"),
            named("hard", "NVIDIA 570"),
            named("hard", "NVIDIA 570; subgroups of 32"),
        ];
        let (results, targets): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        let names = Names::of(&results);
        let called: Vec<String> = targets.iter().map(|target| names.call(target)).collect();
        assert_eq!(
            targets.iter().map(vendor).collect::<Vec<_>>(),
            ["Other vendors", "Other vendors", "NVIDIA", "NVIDIA"]
        );
        let (_, software) = named("llvmpipe (LLVM 15, AMD EPYC)", "llvmpipe Mesa 25");
        assert_eq!((vendor(&software), vendor(&Target::default())), ("In software", "Other engines"));
        assert_eq!(called, ["soft (LLVM 15), Mesa 22 (LLVM 15)", "soft (LLVM 15), Mesa 25 (LLVM 15)", "hard", "hard"]);
    }
}
