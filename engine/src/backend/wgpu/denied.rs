//! Drivers that are not used unless somebody says so: those whose faults no check at start can find, because they end
//! the process, or because only some runs are wrong.
//!
//! Invariant: each entry names where its fault is written down, and the versions that were seen to have it.

use std::ops::Range;

use wgpu::{AdapterInfo, Backend};

#[derive(Debug, PartialEq)]
pub(super) struct Denied {
    api: Backend,
    /// As the driver calls itself.
    driver: &'static str,
    versions: Range<[u32; 3]>,
    pub fault: &'static str,
    pub remedy: &'static str,
    pub reference: &'static str,
}

const DENIED: [Denied; 2] = [
    Denied {
        api: Backend::Vulkan,
        driver: "llvmpipe",
        versions: [26, 0, 0]..[26, 1, 3],
        fault: "it was seen to end the process while it compiles compute shaders",
        remedy: "install Mesa 25.3, or 26.1.3 or later",
        reference: "gfx-rs/wgpu#9903, mmozeiko/build-mesa#20, cataclysmbn/Cataclysm-BN#9470",
    },
    Denied {
        api: Backend::Vulkan,
        driver: "V3DV Mesa",
        versions: [0, 0, 0]..[24, 2, 9],
        fault: "its compute shaders were seen to give wrong results",
        remedy: "install a later Mesa, of which nothing is known",
        reference: "gfx-rs/wgpu#1583",
    },
];

/// What is known against an adapter's driver.
pub(super) fn denied(info: &AdapterInfo) -> Option<&'static Denied> {
    let version = version(&info.driver_info)?;
    let is_meant = |denied: &&Denied| {
        (denied.api, denied.driver) == (info.backend, info.driver.as_str()) && denied.versions.contains(&version)
    };
    DENIED.iter().find(is_meant)
}

/// The first number with a dot in a driver's own words, such as `Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6)`.
fn version(text: &str) -> Option<[u32; 3]> {
    let words = text.split(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let word = words.into_iter().find(|word| word.contains('.') && word.starts_with(|letter: char| letter != '.'))?;
    let mut parts = word.split('.').map(|part| part.parse().unwrap_or(0));
    Some(std::array::from_fn(|_| parts.next().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use wgpu::DeviceType;

    use super::*;

    fn adapter(driver: &str, driver_info: &str) -> AdapterInfo {
        let mut info = AdapterInfo::new(DeviceType::Cpu, Backend::Vulkan);
        (info.driver, info.driver_info) = (driver.to_owned(), driver_info.to_owned());
        info
    }

    #[test]
    fn a_driver_is_denied_by_its_name_and_version() {
        let is_denied = |driver, version| denied(&adapter(driver, version)).is_some();
        for version in ["Mesa 26.0.0 (LLVM 22.1.6)", "Mesa 26.0.6-2", "Mesa 26.1.2"] {
            assert!(is_denied("llvmpipe", version) && !is_denied("radv", version), "{version}");
        }
        let fine =
            ["Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6)", "Mesa 22.3.6 (LLVM 15.0.6)", "Mesa 26.1.3", "Mesa", "", "26"];
        assert!(fine.iter().all(|version| !is_denied("llvmpipe", version)));
        assert!(is_denied("V3DV Mesa", "Mesa 24.2.8-1~bpo12+rpt2") && !is_denied("V3DV Mesa", "Mesa 24.3.0"));
        let elsewhere = AdapterInfo { backend: Backend::Gl, ..adapter("llvmpipe", "Mesa 26.0.0") };
        assert_eq!(denied(&elsewhere), None);
    }

    #[test]
    fn versions_are_read_from_what_drivers_say() {
        assert_eq!(version("Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6)"), Some([25, 0, 7]));
        assert_eq!(version("535.129.03"), Some([535, 129, 3]));
        assert_eq!(version("101.8860"), Some([101, 8860, 0]));
        assert_eq!((version(""), version("Mesa 26"), version("a.b 99999999999.1")), (None, None, Some([0, 1, 0])));
    }
}
