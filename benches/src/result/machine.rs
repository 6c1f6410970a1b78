//! The machine and the program that measured, as far as they say. Nothing is guessed: what cannot be read is left out.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Software {
    pub version: String,
    /// `release` or `debug`.
    pub build: String,
    /// That it was built from; `-dirty` where what was compiled differs from it.
    pub commit: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub system: String,
    pub cpu: Option<String>,
    /// Threads that this process may use.
    pub num_threads: usize,
    pub memory_bytes: Option<u64>,
    /// Of the first core, when the bench began.
    pub cpu_mhz: Option<f64>,
    /// Mean number of threads that wanted to run in the minute before the bench began.
    pub load_average: Option<f64>,
}

impl Software {
    pub fn this(commit: Option<&str>) -> Software {
        Software {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build: if cfg!(debug_assertions) { "debug" } else { "release" }.to_owned(),
            commit: commit.map(str::to_owned),
        }
    }
}

impl Machine {
    pub fn this() -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpu_info, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let field = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim_start().trim_start_matches(':').trim().to_owned())
        };
        let release = read("/proc/sys/kernel/osrelease");
        let system = format!("{} {} {}", std::env::consts::OS, release.trim(), std::env::consts::ARCH);
        let memory = field(&memory, "MemTotal:").and_then(|text| text.strip_suffix(" kB")?.parse::<u64>().ok());
        Machine {
            system: system.split_whitespace().collect::<Vec<_>>().join(" "),
            cpu: field(&cpu_info, "model name"),
            num_threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory.map(|kib| kib << 10),
            cpu_mhz: field(&cpu_info, "cpu MHz").and_then(|mhz| mhz.parse().ok()),
            load_average: read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()),
        }
    }
}

/// `2026-11-28T16:51:22Z`; the day by Hinnant's `civil_from_days`.
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // From March on, so that a leap day is the last of its year.
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month < 3);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_time_is_written_as_calendars_have_it() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_795_884_682, "2026-11-28T16:51:22Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn this_machine_is_told() {
        let machine = Machine::this();
        assert!(machine.num_threads > 0 && machine.system.contains(std::env::consts::ARCH), "{machine:?}");
        if cfg!(target_os = "linux") {
            assert!(machine.memory_bytes.is_some_and(|bytes| bytes > 1 << 28), "{machine:?}");
        }
    }
}
