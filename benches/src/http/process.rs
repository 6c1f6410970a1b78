//! What this process takes, as Linux tells it: the CPU time of its threads by name, and its memory. Elsewhere, and
//! where `/proc` says something else, there is nothing to tell.

use std::collections::BTreeMap;
use std::fs;

/// CPU time since its start, in nanoseconds, of the threads that are alive, by their names.
#[derive(Clone, Debug, Default)]
pub struct CpuTimes(BTreeMap<String, u64>);

impl CpuTimes {
    pub fn now() -> CpuTimes {
        let mut times = BTreeMap::new();
        for thread in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            let on_cpu = read("schedstat").split(' ').next().and_then(|ns| ns.parse::<u64>().ok());
            *times.entry(read("comm").trim().to_owned()).or_default() += on_cpu.unwrap_or(0);
        }
        CpuTimes(times)
    }

    /// What each has taken since `before`.
    pub fn since(&self, before: &CpuTimes) -> BTreeMap<String, u64> {
        let taken = |(name, ns): (&String, &u64)| {
            let ns = ns.saturating_sub(before.0.get(name).copied().unwrap_or(0));
            (ns > 0).then(|| (name.clone(), ns))
        };
        self.0.iter().filter_map(taken).collect()
    }
}

/// Bytes of memory that this process has resident.
pub fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}
