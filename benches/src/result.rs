//! One run of a bench as a file: what was measured, on what, everything needed to repeat it, and whether to believe it.
//!
//! Invariant: `docs/results.schema.json` describes these types, and a test holds results to it. A spread is of whole
//! runs alone, and what makes a run doubtful stands in words beside its numbers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::serve::endpoint::without_password;
use crate::serve::knee;
use crate::statistics::median;
pub use clocks::Clocks;
pub use diagnosis::{Advice, Change, Diagnosis};
pub use machine::{Machine, Software, rfc3339};

mod clocks;
mod diagnosis;
mod machine;
pub mod table;

/// Of the form below; raised whenever a reader of the old form would misread the new one.
pub const SCHEMA_VERSION: u32 = 1;
pub const SCHEMA: &str = include_str!("../../docs/results.schema.json");

const INTERRUPTED: &str = "interrupted: only what was whole by then is here";

/// Fewer say nothing of how much a machine wavers.
pub const MIN_RUNS: usize = 3;
/// Of prompt tokens that come from a cache unasked.
const MAX_CACHED_SHARE: f64 = 0.01;
/// The subject of what a process does once, so that no spread of it can be asked for.
pub const FIRST_START: &str = "first start";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchResult {
    pub schema_version: u32,
    /// `serve`, `sweep`, `latency`, `offline`, `startup`, `ops` or `doctor`.
    pub bench: String,
    /// RFC 3339, UTC.
    pub begun_at: String,
    pub command: Vec<String>,
    pub seed: u64,
    pub software: Software,
    pub machine: Machine,
    pub targets: Vec<Target>,
    /// What was asked of each target, by name.
    pub workload: BTreeMap<String, Value>,
    pub measurements: Vec<Measurement>,
    /// The first target beside each other one.
    pub comparisons: Vec<Comparison>,
    /// Of the doctor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
    pub valid: bool,
    /// Why it is not; of all measurements together.
    pub invalid: Vec<String>,
    /// When it began, where it was not read from a file.
    #[serde(skip)]
    clocks: Option<Clocks>,
}

/// An engine that was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Unique in the file.
    pub name: String,
    /// Where it answers, if it was measured over HTTP and is not this process.
    pub url: Option<String>,
    /// As it names itself.
    pub version: Option<String>,
    /// How it was built and started, in the words of whoever did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    pub model: Option<String>,
    /// Its files of weights, where it is of this process and they are read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub model_files: Vec<ModelFile>,
    /// Of weights: a format or a data type.
    pub weights: Option<String>,
    pub device: Option<Device>,
    /// Its flags and bounds, as far as they are known.
    pub limits: BTreeMap<String, Value>,
    /// Planned, by what it is for.
    pub memory_bytes: BTreeMap<String, u64>,
}

/// By which others can see whether theirs is the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFile {
    pub name: String,
    pub size_bytes: u64,
    /// In hexadecimal; `None` where the files are too large to be read for it at each start.
    pub sha256: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    pub id: String,
    /// Adapter.
    pub name: String,
    pub driver: String,
    /// Of kernels.
    pub tier: String,
    pub arithmetic: String,
    pub memory_bytes: Option<u64>,
}

/// One target under one load, or one op at one shape.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    pub target: String,
    /// What was measured, where a file has several kinds: an op with its shape, or a change of flags.
    pub subject: Option<String>,
    /// What was varied, such as `concurrency` or `rate_per_s`.
    pub at: BTreeMap<String, f64>,
    pub runs: Vec<Run>,
    /// Over the runs.
    pub summary: BTreeMap<String, Spread>,
}

/// Names of metrics end in their units.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub metrics: BTreeMap<String, f64>,
    /// Requests by how they ended, and tokens.
    pub counts: BTreeMap<String, u64>,
    /// FNV-1a, 64 bits, over the same hash of each answer's token ids, in the order of requests, where ids are known.
    pub output_hash: Option<String>,
    pub invalid: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// Ratios of a target's metrics to another's, run by run: what drifted meanwhile drifted for both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub target: String,
    pub against: String,
    pub at: BTreeMap<String, f64>,
    pub ratios: BTreeMap<String, Spread>,
}

#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no result of a bench: {problem}", path.display())]
    Form { path: PathBuf, problem: String },
    #[error("{} has schema version {found}, and this program reads {SCHEMA_VERSION}", path.display())]
    Version { path: PathBuf, found: Value },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl BenchResult {
    /// Of a bench that begins now, on this machine, in a program that was built from `commit`.
    pub fn begin(bench: &str, seed: u64, commit: Option<&str>) -> BenchResult {
        let clocks = Clocks::now();
        BenchResult {
            schema_version: SCHEMA_VERSION,
            bench: bench.to_owned(),
            begun_at: rfc3339(clocks.wall),
            command: without_secrets(std::env::args()).map(|word| without_folder(&word)).collect(),
            seed,
            software: Software::this(commit),
            machine: Machine::this(),
            targets: Vec::new(),
            workload: BTreeMap::new(),
            measurements: Vec::new(),
            comparisons: Vec::new(),
            diagnosis: None,
            valid: true,
            invalid: Vec::new(),
            clocks: Some(clocks),
        }
    }

    pub fn read(path: &Path) -> Result<BenchResult, ResultError> {
        let form = |problem: String| ResultError::Form { path: path.to_owned(), problem };
        let text = fs::read_to_string(path).map_err(|source| ResultError::Read { path: path.to_owned(), source })?;
        let value: Value = serde_json::from_str(&text).map_err(|error| form(format!("it is not JSON: {error}")))?;
        match &value["schema_version"] {
            Value::Null => return Err(form("it has no schema_version".to_owned())),
            found if *found != SCHEMA_VERSION => {
                return Err(ResultError::Version { path: path.to_owned(), found: found.clone() });
            }
            _ => {}
        }
        serde_json::from_value(value).map_err(|error| form(error.to_string()))
    }

    pub fn write(&self, path: &Path) -> Result<(), ResultError> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let written = folder.map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, self.to_json() + "\n"));
        written.map_err(|source| ResultError::Write { path: path.to_owned(), source })
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("names are strings, and numbers are finite")
    }

    pub fn target(&self, name: &str) -> Option<&Target> {
        self.targets.iter().find(|target| target.name == name)
    }

    /// Sums up what was whole when the bench was interrupted.
    pub fn interrupt(&mut self) {
        self.cut_short(INTERRUPTED.to_owned());
    }

    /// Sums up what was whole before it could not go on.
    pub fn cut_short(&mut self, reason: String) {
        self.measurements.retain(|measurement| !measurement.runs.is_empty());
        self.invalid.push(reason);
        self.finish();
    }

    /// The load at which a target of a sweep gives about all that it can: of good requests, where there are bounds.
    pub fn knee(&self, target: &str) -> Option<&Measurement> {
        let of_good = "goodput_requests_per_s";
        let has_bounds = self.measurements.iter().any(|measurement| measurement.summary.contains_key(of_good));
        let metric = if has_bounds { of_good } else { "output_tokens_per_s" };
        (self.bench == "sweep").then(|| knee(target, metric, &self.measurements)).flatten()
    }

    pub fn was_interrupted(&self) -> bool {
        self.invalid.iter().any(|reason| reason == INTERRUPTED)
    }

    /// Sums up: spreads, ratios of the first target to each other, and the verdict on the whole.
    pub fn finish(&mut self) {
        for measurement in &mut self.measurements {
            measurement.summary = spreads(measurement.runs.iter().map(|run| &run.metrics));
        }
        self.compare();
        let mut reasons = std::mem::take(&mut self.invalid);
        let repeated = self.measurements.iter().filter(|of| of.subject.as_deref() != Some(FIRST_START));
        let few = repeated.map(|measurement| measurement.runs.len()).min().unwrap_or(0);
        if few < MIN_RUNS {
            reasons.push(format!("{few} whole runs; {MIN_RUNS} are the fewest that show how much they differ"));
        }
        if self.software.build == "debug" {
            reasons.push("measured with a debug build".to_owned());
        }
        reasons.extend(self.clocks.and_then(|begun| begun.step_until(Clocks::now())));
        for Measurement { target, runs, .. } in &self.measurements {
            reasons.extend(runs.iter().flat_map(|run| &run.invalid).map(|reason| format!("{target}: {reason}")));
        }
        let mut seen = std::collections::HashSet::new();
        reasons.retain(|reason| seen.insert(reason.clone()));
        (self.valid, self.invalid) = (reasons.is_empty(), reasons);
    }

    fn compare(&mut self) {
        self.comparisons.clear();
        let Some(first) = self.targets.first() else { return };
        let (own, others): (Vec<_>, Vec<_>) = self.measurements.iter().partition(|m| m.target == first.name);
        for other in others {
            let Some(own) = own.iter().find(|own| own.at == other.at && own.subject == other.subject) else { continue };
            let pairs = own.runs.iter().zip(&other.runs);
            let whole = pairs.filter(|(own, other)| own.has_answered_all() && other.has_answered_all());
            let ratios: Vec<_> = whole.map(|(own, other)| ratios(own, other)).collect();
            if ratios.is_empty() {
                continue;
            }
            self.comparisons.push(Comparison {
                target: own.target.clone(),
                against: other.target.clone(),
                at: own.at.clone(),
                ratios: spreads(ratios.iter()),
            });
        }
    }
}

impl Run {
    pub fn metric(&mut self, name: &str, value: f64) {
        assert!(value.is_finite(), "{name} is {value}");
        self.metrics.insert(name.to_owned(), value);
    }

    pub fn count(&mut self, name: &str, count: u64) {
        self.counts.insert(name.to_owned(), count);
    }

    /// Doubts what computed less than it was asked to, where no prefix is shared on purpose.
    pub fn doubt_cache(&mut self, shares_prefixes: bool) {
        let share = self.metrics.get("cached_share").copied().unwrap_or(0.0);
        if share > MAX_CACHED_SHARE && !shares_prefixes {
            self.invalid.push(format!("{:.1} % of prompt tokens came from a cache, unasked", share * 100.0));
        }
    }

    /// Where answers are counted at all.
    pub fn has_answered_all(&self) -> bool {
        let completed = self.counts.get("completed");
        completed.is_none_or(|completed| self.counts.get("requests") == Some(completed))
    }
}

/// A result is shown to others.
fn without_secrets(words: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
    let mut is_secret = false;
    words.map(move |word| {
        let was_asked = std::mem::replace(&mut is_secret, word == SECRET);
        match word.split_once('=') {
            _ if was_asked => "...".to_owned(),
            Some((SECRET, _)) => format!("{SECRET}=..."),
            _ => without_password(&word),
        }
    })
}

const SECRET: &str = "--api-key";

/// The folders of one machine repeat nothing on another.
fn without_folder(word: &str) -> String {
    let (flag, value) = word.split_once('=').filter(|_| word.starts_with("--")).unwrap_or(("", word));
    let path = Path::new(value);
    let name = path.file_name().filter(|_| path.is_absolute()).map(|name| name.to_string_lossy().into_owned());
    name.map_or(word.to_owned(), |name| if flag.is_empty() { name } else { format!("{flag}={name}") })
}

/// Of every metric that all of them have.
fn spreads<'a>(runs: impl Iterator<Item = &'a BTreeMap<String, f64>>) -> BTreeMap<String, Spread> {
    let runs: Vec<_> = runs.collect();
    let Some(first) = runs.first() else { return BTreeMap::new() };
    let spread = |name: &String| {
        let mut values: Vec<f64> = runs.iter().map(|run| run.get(name).copied()).collect::<Option<_>>()?;
        let median = median(&mut values)?;
        Some((name.clone(), Spread { median, min: *values.first()?, max: *values.last()? }))
    };
    first.keys().filter_map(spread).collect()
}

fn ratios(own: &Run, other: &Run) -> BTreeMap<String, f64> {
    let ratio = |(name, own): (&String, &f64)| {
        let ratio = own / other.metrics.get(name)?;
        ratio.is_finite().then(|| (name.clone(), ratio))
    };
    own.metrics.iter().filter_map(ratio).collect()
}

/// Fowler, Noll and Vo's hash 1a, 64 bits, of token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenHash(u64);

impl TokenHash {
    /// Of what is hashed already: of answers, in the order of their requests.
    pub fn of_answers(answers: impl Iterator<Item = TokenHash>) -> TokenHash {
        let mut all = TokenHash::default();
        answers.for_each(|TokenHash(one)| all.add_bytes(&one.to_le_bytes()));
        all
    }

    pub fn add(&mut self, id: u32) {
        self.add_bytes(&id.to_le_bytes());
    }

    fn add_bytes(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    }
}

/// Of an answer.
impl FromIterator<u32> for TokenHash {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> TokenHash {
        let mut hash = TokenHash::default();
        ids.into_iter().for_each(|id| hash.add(id));
        hash
    }
}

impl Default for TokenHash {
    fn default() -> TokenHash {
        TokenHash(0xcbf2_9ce4_8422_2325)
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measurement(target: &str, rates: &[f64]) -> Measurement {
        let run = |&rate: &f64| Run { metrics: [("tokens_per_s".to_owned(), rate)].into(), ..Run::default() };
        Measurement { target: target.to_owned(), runs: rates.iter().map(run).collect(), ..Measurement::default() }
    }

    fn result(measurements: Vec<Measurement>) -> BenchResult {
        let mut result = BenchResult::begin("serve", 1, None);
        let target = |m: &Measurement| Target { name: m.target.clone(), ..Target::default() };
        (result.targets, result.measurements) = (measurements.iter().map(target).collect(), measurements);
        result.software.build = "release".to_owned();
        result.finish();
        result
    }

    #[test]
    fn ratios_are_of_runs_that_were_neighbours() {
        // The machine drifts to half its speed; the ratio stays.
        let result = result(vec![measurement("a", &[40.0, 30.0, 20.0]), measurement("b", &[20.0, 15.0, 10.0])]);
        assert_eq!(result.measurements[0].summary["tokens_per_s"], Spread { median: 30.0, min: 20.0, max: 40.0 });
        let [ratio] = &result.comparisons[..] else { panic!("one pair") };
        assert_eq!((ratio.target.as_str(), ratio.against.as_str()), ("a", "b"));
        assert_eq!(ratio.ratios["tokens_per_s"], Spread { median: 2.0, min: 2.0, max: 2.0 });
        assert!(result.valid && result.invalid.is_empty());
    }

    #[test]
    fn what_failed_has_no_ratio() {
        let failed = |rates: &[f64], completed: u64| {
            let mut measurement = measurement("a", rates);
            measurement.runs[0].counts = [("requests".to_owned(), 4), ("completed".to_owned(), completed)].into();
            measurement
        };
        let other = || measurement("b", &[20.0, 15.0, 10.0]);
        let some = result(vec![failed(&[400.0, 30.0, 20.0], 3), other()]);
        assert_eq!(some.comparisons[0].ratios["tokens_per_s"].max, 2.0);
        assert_eq!(result(vec![failed(&[40.0, 30.0, 20.0], 4), other()]).comparisons[0].ratios.len(), 1);
        assert!(result(vec![failed(&[40.0], 0), other()]).comparisons.is_empty());
    }

    #[test]
    fn a_clock_that_was_set_makes_a_result_doubtful() {
        let mut result = BenchResult::begin("serve", 1, None);
        result.clocks = Some(Clocks { wall: std::time::UNIX_EPOCH, ..Clocks::now() });
        result.finish();
        assert!(result.invalid.iter().any(|reason| reason.contains("clock moved")), "{:?}", result.invalid);
    }

    #[test]
    fn a_command_is_kept_without_its_secrets() {
        let words = ["fullbore", "--api-key", "secret", "--api-key=secret", "--url=a=http://me:secret@b/v1", "a@b"];
        let kept: Vec<String> = without_secrets(words.into_iter().map(str::to_owned)).collect();
        assert_eq!(kept, ["fullbore", "--api-key", "...", "--api-key=...", "--url=a=http://b/v1", "a@b"]);
    }

    #[test]
    fn a_command_is_kept_without_the_folders_of_its_machine() {
        let kept = ["/usr/bin/fullbore", "--trace=/data/a.csv", "--rate=4", "results/a.json"].map(without_folder);
        assert_eq!(kept, ["fullbore", "--trace=a.csv", "--rate=4", "results/a.json"]);
    }

    #[test]
    fn what_is_doubtful_is_said_once() {
        let mut doubtful = measurement("a", &[1.0, 2.0]);
        doubtful.runs.iter_mut().for_each(|run| run.invalid = vec!["1 request was refused".to_owned()]);
        let result = result(vec![doubtful]);
        assert!(!result.valid);
        assert!(result.invalid[0].starts_with("2 whole runs; 3"), "{:?}", result.invalid);
        assert_eq!(result.invalid[1..], ["a: 1 request was refused"]);
    }

    #[test]
    fn a_result_is_read_as_it_was_written_and_nothing_else_is() {
        let folder = std::env::temp_dir().join(format!("fullbore-result-{}", std::process::id()));
        let path = folder.join("a.json");
        let written = result(vec![measurement("a", &[1.0, 2.0, 4.0])]);
        written.write(&path).expect("a file");
        let read = BenchResult::read(&path).expect("read back");
        assert_eq!(read, BenchResult { clocks: None, ..written });
        for (text, part) in [
            ("{", "not JSON"),
            ("{\"rows\": []}", "no schema_version"),
            ("{\"schema_version\": 99}", "has schema version 99, and this program reads 1"),
            ("{\"schema_version\": 1}", "missing field"),
        ] {
            fs::write(&path, text).expect("a file");
            let sentence = BenchResult::read(&path).expect_err("no result").to_string();
            assert!(sentence.contains("a.json") && sentence.contains(part), "{sentence}");
        }
        fs::remove_dir_all(&folder).expect("it is ours");
    }
}
