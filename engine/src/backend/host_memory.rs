//! How much of this machine's memory is there for the process. Invariant: never more than its cgroups let it have, so
//! that what is planned by it, in a container too, is not what the system ends the process for. Known on Linux alone.

use std::fs::read_to_string;
use std::path::Path;

/// All that there is.
pub fn total_bytes() -> Option<u64> {
    bytes(Path::new("/"), "MemTotal:")
}

/// What the system could still hand out, where it says so.
#[cfg(feature = "wgpu")]
pub fn available_bytes() -> Option<u64> {
    bytes(Path::new("/"), "MemAvailable:")
}

fn bytes(root: &Path, field: &str) -> Option<u64> {
    let text = read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib.checked_mul(1024)?.min(cgroup_limit(root).unwrap_or(u64::MAX)))
}

/// The tightest limit of the process's cgroups and of all above them, of either version. A container sees its own
/// cgroup at the top, whatever its path is called outside, so that folders that are not there are passed over.
fn cgroup_limit(root: &Path) -> Option<u64> {
    let text = read_to_string(root.join("proc/self/cgroup")).ok()?;
    let limit = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let groups = Path::new(path.trim_start_matches('/')).ancestors();
        let limits = groups.filter_map(|group| read_to_string(root.join(mount).join(group).join(file)).ok());
        // Where there is no limit it says `max`.
        limits.filter_map(|limit| limit.trim().parse::<u64>().ok()).min()
    };
    text.lines().filter_map(limit).min()
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, remove_dir_all, write};

    use super::*;

    /// What a machine of 64 GiB with these files says.
    fn told(name: &str, files: &[(&str, &str)]) -> [Option<u64>; 2] {
        let root = std::env::temp_dir().join(format!("fullbore-host-memory-{name}-{}", std::process::id()));
        let meminfo = ("proc/meminfo", "MemTotal:       67108864 kB\nMemAvailable:   50331648 kB\n");
        for (path, text) in [meminfo].iter().chain(files) {
            let path = root.join(path);
            create_dir_all(path.parent().expect("a folder")).expect("a folder");
            write(path, text).expect("written");
        }
        let told = ["MemTotal:", "MemAvailable:"].map(|field| bytes(&root, field).map(|bytes| bytes >> 30));
        remove_dir_all(root).expect("removed");
        told
    }

    #[test]
    fn a_process_has_what_the_tightest_of_its_cgroups_lets_it_have() {
        let gib = |count: u64| (count << 30).to_string();
        let (two, four, six, eight, huge) = (gib(2), gib(4), gib(6), gib(8), "9223372036854771712");
        assert_eq!(told("none", &[]), [Some(64), Some(48)]);
        let own = ("proc/self/cgroup", "0::/user.slice/a.service\n");
        let of_unit = "sys/fs/cgroup/user.slice/a.service/memory.max";
        let of_slice = "sys/fs/cgroup/user.slice/memory.max";
        let no_limit = [own, (of_unit, "max\n"), (of_slice, "max\n")];
        assert_eq!(told("free", &no_limit), [Some(64), Some(48)]);
        assert_eq!(told("unit", &[own, (of_unit, &eight), (of_slice, "max\n")]), [Some(8); 2]);
        assert_eq!(told("slice", &[own, (of_unit, &eight), (of_slice, &six)]), [Some(6); 2]);
        let above = gib(60);
        assert_eq!(told("wide", &[own, (of_unit, &above)]), [Some(60), Some(48)]);
        // In containers the mount is the cgroup, by its namespace's path or by that of the machine.
        let mount = "sys/fs/cgroup/memory.max";
        for (name, path) in [("private", "0::/\n"), ("machine", "0::/kubepods/pod1/c\n")] {
            assert_eq!(told(name, &[("proc/self/cgroup", path), (mount, &four)]), [Some(4); 2]);
        }
        // Of the older kind, with others beside it, which say nothing.
        let older = ("proc/self/cgroup", "9:cpu:/a\n4:hugetlb,memory:/docker/a\n1:name=systemd:/a\n0::/\n");
        let (top, inner) =
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes");
        assert_eq!(told("older-free", &[older, (top, huge), (inner, huge)]), [Some(64), Some(48)]);
        assert_eq!(told("older", &[older, (top, huge), (inner, &two)]), [Some(2); 2]);
    }
}
