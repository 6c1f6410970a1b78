//! `fullbore simulate --fleet`: a file that says which devices there are, in; a report by each rule, out.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io};

use fullbore_bench::fleet::life::Life;
use fullbore_bench::fleet::{FleetDevice, simulate_fleet};
use serde::Deserialize;

use super::{SimulateCommandError, device, requests};
use crate::args::SimulateArgs;

#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {problem}", path.display())]
    Bad { path: PathBuf, problem: String },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FleetFile {
    device: Vec<Kind>,
}

/// Devices that are alike.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kind {
    profile: PathBuf,
    name: Option<String>,
    #[serde(default = "one")]
    count: u32,
    speed: Option<f64>,
    /// To the host's memory, in GB/s; KV goes to other devices and comes from there where it is given.
    link: Option<f64>,
    /// In seconds, as the next two.
    #[serde(default)]
    joins_at: f64,
    #[serde(default)]
    lost_at: Vec<f64>,
    back_after: Option<f64>,
}

impl Kind {
    /// What is wrong with it.
    fn problem(&self) -> Option<String> {
        let is_speed = |speed: f64| speed.is_finite() && (1e-3..=1e3).contains(&speed);
        if let Some(speed) = self.speed.filter(|speed| !is_speed(*speed)) {
            return Some(format!("a `speed` of {speed}; it is between 0.001 and 1000"));
        }
        if let Some(link) = self.link.filter(|link| !(1e-3..=1e6).contains(link)) {
            return Some(format!("a `link` of {link} GB/s; it is between 0.001 and 1000000"));
        }
        let times = [self.joins_at].into_iter().chain(self.lost_at.iter().copied()).chain(self.back_after);
        let mut wrong = times.filter(|seconds| !(0.0..=MAX_SECONDS).contains(seconds));
        if let Some(seconds) = wrong.next() {
            return Some(format!("a time of {seconds} s; times are between 0 and {MAX_SECONDS}"));
        }
        let is_ordered = self.lost_at.is_sorted();
        (!is_ordered).then(|| "times in `lost_at` that go back".to_owned())
    }

    fn life(&self) -> Life {
        let seconds = Duration::from_secs_f64;
        Life {
            joins: seconds(self.joins_at),
            losses: self.lost_at.iter().copied().map(seconds).collect(),
            away: self.back_after.map(seconds),
        }
    }
}

/// Thirty years.
const MAX_SECONDS: f64 = 1e9;

fn one() -> u32 {
    1
}

/// Devices of a fleet at most.
const MAX_DEVICES: usize = 10_000;

pub fn simulate(path: &Path, args: &SimulateArgs) -> Result<(), SimulateCommandError> {
    let devices = open(path, args)?;
    let requests = requests(&args.play.workload)?;
    for &rule in &args.rule {
        let begun = Instant::now();
        let report = simulate_fleet(&devices, &requests, rule, args.play.workload.seed)?;
        eprintln!("{report}\nsimulated in {:.2} s\n", begun.elapsed().as_secs_f64());
        println!("{}", serde_json::json!(report));
    }
    Ok(())
}

fn open(path: &Path, args: &SimulateArgs) -> Result<Vec<FleetDevice>, SimulateCommandError> {
    let bad = |problem: String| FleetError::Bad { path: path.to_owned(), problem };
    let text = fs::read_to_string(path).map_err(|source| FleetError::Read { path: path.to_owned(), source })?;
    let file = parse(&text).map_err(bad)?;
    let mut devices = Vec::new();
    for kind in file.device {
        let (mut profile, config) = device(&path.parent().unwrap_or(Path::new("")).join(&kind.profile), args)?;
        if let Some(speed) = kind.speed {
            profile.cost = profile.cost.faster(speed);
        }
        if let Some(link) = kind.link {
            profile.ns_per_copied_megabyte = 1e6 / link;
        }
        let (life, moves_kv) = (kind.life(), kind.link.is_some());
        let name = kind.name.unwrap_or_else(|| profile.device.name.clone());
        for number in 1..=kind.count {
            let name = if kind.count > 1 { format!("{name} {number}") } else { name.clone() };
            devices.push(FleetDevice { name, profile: profile.clone(), config, life: life.clone(), moves_kv });
        }
    }
    let block_size = |device: &FleetDevice| device.config.block_size;
    match devices.iter().find(|device| block_size(device) != block_size(&devices[0])) {
        Some(other) => Err(bad(format!(
            "{} has blocks of {} tokens and {} of {}; give --block-size",
            devices[0].name,
            block_size(&devices[0]),
            other.name,
            block_size(other)
        ))
        .into()),
        None => Ok(devices),
    }
}

fn parse(text: &str) -> Result<FleetFile, String> {
    let file: FleetFile = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    let count = file.device.iter().map(|kind| kind.count as usize).fold(0, usize::saturating_add);
    if count == 0 || count > MAX_DEVICES {
        return Err(format!("it has {count} devices; a fleet has 1 to {MAX_DEVICES}"));
    }
    match file.device.iter().find_map(Kind::problem) {
        Some(problem) => Err(problem),
        None => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_is_read_or_refused_by_a_sentence() {
        let file = parse("[[device]]\nprofile = \"a.json\"\ncount = 3\nspeed = 2.5\n[[device]]\nprofile = \"b.json\"");
        let kinds = file.expect("it is right").device;
        assert_eq!((kinds.len(), kinds[0].count, kinds[0].speed, kinds[1].count), (2, 3, Some(2.5), 1));
        let life = "[[device]]\nprofile = \"a\"\njoins_at = 2\nlost_at = [3, 9.5]\nback_after = 4";
        let life = parse(life).expect("it is right").device[0].life();
        assert_eq!((life.joins, life.away), (Duration::from_secs(2), Some(Duration::from_secs(4))));
        assert_eq!(life.losses, [Duration::from_secs(3), Duration::from_millis(9500)]);
        for (text, word) in [
            ("[[device]]\nprofile = \"a\"\nlost_at = [9, 3]", "go back"),
            ("[[device]]\nprofile = \"a\"\njoins_at = -1", "a time of -1 s"),
            ("[[device]]\nprofile = \"a\"\nback_after = inf", "a time of inf s"),
            ("", "device"),
            ("device = []", "0 devices"),
            ("[[device]]\nname = \"x\"", "profile"),
            ("[[device]]\nprofile = \"a\"\nspede = 2", "spede"),
            ("[[device]]\nprofile = \"a\"\ncount = -1", "count"),
            ("[[device]]\nprofile = \"a\"\ncount = 4000000000", "4000000000 devices"),
            ("[[device]]\nprofile = \"a\"\nspeed = 0", "`speed` of 0"),
            ("[[device]]\nprofile = \"a\"\nspeed = nan", "`speed` of NaN"),
            ("[[device]]\nprofile = \"a\"\nlink = 0", "`link` of 0 GB/s"),
            ("[[device", "device"),
        ] {
            let sentence = parse(text).expect_err("it is wrong");
            assert!(sentence.contains(word), "{text:?}: {sentence}");
        }
    }
}
