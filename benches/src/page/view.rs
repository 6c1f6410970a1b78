//! What the page says, in whatever form it is written: tables by device, ratios, figures, and what is missing.

use std::collections::BTreeMap;

use super::missing::missing;
use super::names::{Names, vendor};
use crate::result::table::{grouped, loads, number, resent, retokenized};
use crate::result::{BenchResult, Measurement, ModelFile, Run, Spread, Target};

/// All that result files come to.
pub struct View {
    pub heads: Vec<Head>,
    pub devices: Vec<DeviceTable>,
    pub ratios: Table,
    pub diagnoses: Table,
    pub starts: Table,
    /// Sentences.
    pub missing: Vec<String>,
    pub sources: Vec<Source>,
}

/// A device or a peer in a few numbers.
pub struct Head {
    pub name: String,
    /// A number with its unit, and what it is.
    pub facts: Vec<(String, String)>,
}

/// What was measured on one device, or of one peer.
pub struct DeviceTable {
    /// Whose adapter it is; of several tables only the first of a vendor says so.
    pub vendor: Option<&'static str>,
    pub name: String,
    /// Driver, kernels and machine.
    pub about: String,
    pub table: Table,
}

#[derive(Default)]
pub struct Table {
    pub head: Vec<String>,
    pub rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Default)]
pub struct Cell {
    pub text: String,
    /// The spread of the runs.
    pub spread: Option<String>,
    pub is_number: bool,
}

/// A result file, and everything needed to repeat it.
pub struct Source {
    pub file: String,
    pub facts: Vec<(&'static str, String)>,
    pub invalid: Vec<String>,
}

/// The columns of a device's table, where it has any of it.
const COLUMNS: [(&str, &str); 11] = [
    ("output_tokens_per_s", "output tokens/s"),
    ("goodput_requests_per_s", "good requests/s"),
    ("prefill_tokens_per_s", "prefill tokens/s"),
    ("decode_tokens_per_s", "decode tokens/s"),
    ("ttft_p50_ms", "first token, ms"),
    ("ttft_p99_ms", "p99"),
    ("tpot_p50_ms", "a token, ms"),
    ("itl_p99_ms", "gap p99, ms"),
    ("e2e_p50_ms", "request, ms"),
    ("cached_share", "from cache"),
    ("client_core_share", "client, of a core"),
];

const RATIOS: [(&str, &str); 5] = [
    ("output_tokens_per_s", "output tokens/s"),
    ("goodput_requests_per_s", "good requests/s"),
    ("ttft_p50_ms", "first token"),
    ("tpot_p50_ms", "a token"),
    ("e2e_p50_ms", "request"),
];

/// What the numbers of `View::ratios` are.
pub const OF_RATIOS: &str = "Each number is a ratio, of what the target reaches to what the one beside it does, on the \
    same requests in the same run, turn and turn about: 2 is twice. For rates more is better, for times less.";

pub type Named = (String, BenchResult);

impl View {
    pub fn of(results: &[Named], names: &Names) -> View {
        View {
            heads: heads(results, names),
            devices: devices(results, names),
            ratios: ratios(results, names),
            diagnoses: diagnoses(results, names),
            starts: starts(results, names),
            missing: missing(results, names),
            sources: results.iter().map(source).collect(),
        }
    }
}

/// What is asked, in few words.
pub fn load_of(result: &BenchResult, measurement: &Measurement) -> String {
    let lengths = result.workload.get("lengths").and_then(|lengths| lengths.as_str()).map(str::to_owned);
    let tokens = |name: &str| result.workload.get(name).and_then(|value| value.as_u64());
    let lengths = lengths.or_else(|| {
        let (prompt, output) = (tokens("prompt_tokens")?, tokens("output_tokens")?);
        Some(format!("{prompt} + {output} tokens"))
    });
    let at = loads(&measurement.at).trim_start_matches(", ").to_owned();
    let at = if result.bench == "latency" { "batch 1".to_owned() } else { at };
    let subject = measurement.subject.clone().unwrap_or_default();
    [lengths.unwrap_or_default(), at, subject]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(", ")
}

/// A number, and the load that gave it.
type Best = Option<(f64, String)>;

/// The most that each reached, what it gives a single request, and how soon it is ready.
fn heads(results: &[Named], names: &Names) -> Vec<Head> {
    let mut heads: BTreeMap<String, [Best; 3]> = BTreeMap::new();
    for (_, result) in results.iter().filter(|(_, result)| result.valid) {
        for measurement in &result.measurements {
            let Some(target) = result.target(&measurement.target) else { continue };
            let facts = heads.entry(names.call(target)).or_default();
            let load = load_of(result, measurement);
            let metrics = [("output_tokens_per_s", false), ("decode_tokens_per_s", false), ("ready_s", true)];
            for (fact, (metric, is_less_better)) in facts.iter_mut().zip(metrics) {
                let Some(Spread { median, .. }) = measurement.summary.get(metric) else { continue };
                let is_better = |(best, _): &(f64, String)| (median < best) == is_less_better && median != best;
                if fact.as_ref().is_none_or(is_better) {
                    *fact = Some((*median, load.clone()));
                }
            }
        }
    }
    let head = |(name, [most, alone, ready]): (String, [Best; 3])| {
        let rate = |(rate, load): (f64, String)| (format!("{} tokens/s", number(rate)), load);
        let ready = ready.map(|(seconds, _)| (format!("{} s", number(seconds)), "until ready".to_owned()));
        Head { name, facts: most.map(rate).into_iter().chain(alone.map(rate)).chain(ready).collect() }
    };
    heads.into_iter().map(head).filter(|head| !head.facts.is_empty()).collect()
}

/// What a line of a table is made of.
type Row<'a> = (&'a Named, &'a Measurement, &'a Target);

/// By vendor, then by name.
fn devices(results: &[Named], names: &Names) -> Vec<DeviceTable> {
    let mut found: BTreeMap<(&'static str, String, String), Vec<Row>> = BTreeMap::new();
    for named in results.iter().filter(|(_, result)| !["ops", "startup"].contains(&result.bench.as_str())) {
        let (_, result) = named;
        for measurement in &result.measurements {
            let Some(target) = result.target(&measurement.target) else { continue };
            let key = (vendor(target), names.call(target), about(result, target));
            found.entry(key).or_default().push((named, measurement, target));
        }
    }
    let mut last = None;
    let table = |((vendor, name, about), rows): ((&'static str, String, String), Vec<_>)| {
        let vendor = (last.replace(vendor) != Some(vendor)).then_some(vendor);
        DeviceTable { vendor, name, about, table: device_rows(&rows) }
    };
    found.into_iter().map(table).collect()
}

fn about(result: &BenchResult, target: &Target) -> String {
    let device = target.device.as_ref().map(|device| {
        let [driver, tier, arithmetic] = [&device.driver, &device.tier, &device.arithmetic];
        format!("{driver}; {tier} kernels, {arithmetic}")
    });
    let engine = target.version.clone().unwrap_or_default();
    let started = target.about.clone().unwrap_or_default();
    let parts = [device.unwrap_or(engine), started, machine(result)];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

pub(super) fn machine(result: &BenchResult) -> String {
    let cpu = result.machine.cpu.clone().unwrap_or_else(|| result.machine.system.clone());
    format!("{cpu}, {} threads", result.machine.num_threads)
}

fn device_rows(rows: &[Row]) -> Table {
    let has = |name: &str| rows.iter().any(|(_, measurement, _)| spread_of(measurement, name).is_some());
    let columns: Vec<_> = COLUMNS.into_iter().filter(|(name, _)| has(name)).collect();
    let mut head = vec!["bench".to_owned(), "model".to_owned(), "load".to_owned()];
    head.extend(columns.iter().map(|(_, title)| (*title).to_owned()));
    head.push("valid".to_owned());
    let row = |((file, result), measurement, target): &Row| {
        let is_knee = result.knee(&target.name).is_some_and(|knee| knee.at == measurement.at);
        let load = match load_of(result, measurement) {
            load if is_knee => format!("{load} (the knee)"),
            load if result.bench == "doctor" => format!("{file}: {load}"),
            load => load,
        };
        let model = [&target.model, &target.weights].into_iter().flatten().cloned().collect::<Vec<_>>().join(" ");
        let mut cells = vec![word(&result.bench), word(&model), word(&load)];
        cells.extend(columns.iter().map(|(name, _)| cell(spread_of(measurement, name))));
        cells.push(validity(result));
        cells
    };
    Table { head, rows: rows.iter().map(row).collect() }
}

/// Benches that know no median of a token's time have its mean.
fn spread_of<'a>(measurement: &'a Measurement, name: &str) -> Option<&'a Spread> {
    let mean = || measurement.summary.get("tpot_mean_ms").filter(|_| name == "tpot_p50_ms");
    measurement.summary.get(name).or_else(mean)
}

fn validity(result: &BenchResult) -> Cell {
    word(if result.valid { "yes" } else { "no" })
}

fn word(text: &str) -> Cell {
    Cell { text: text.to_owned(), ..Cell::default() }
}

fn cell(spread: Option<&Spread>) -> Cell {
    let Some(Spread { median, min, max }) = spread else { return Cell { text: "–".to_owned(), ..Cell::default() } };
    let spread = (min != max).then(|| format!("{} to {}", number(*min), number(*max)));
    Cell { text: number(*median), spread, is_number: true }
}

fn ratios(results: &[Named], names: &Names) -> Table {
    let all = || results.iter().flat_map(|(_, result)| result.comparisons.iter().map(move |of| (result, of)));
    let columns: Vec<_> =
        RATIOS.into_iter().filter(|(name, _)| all().any(|(_, of)| of.ratios.contains_key(*name))).collect();
    let mut head: Vec<String> = ["target", "beside", "load"].map(str::to_owned).into();
    head.extend(columns.iter().map(|(_, title)| (*title).to_owned()));
    head.push("valid".to_owned());
    let row = |(result, of): (&BenchResult, &crate::result::Comparison)| {
        let called = |name: &str| result.target(name).map_or(name.to_owned(), |target| names.call(target));
        let at = Measurement { at: of.at.clone(), ..Measurement::default() };
        let mut cells = vec![word(&called(&of.target)), word(&called(&of.against)), word(&load_of(result, &at))];
        cells.extend(columns.iter().map(|(name, _)| cell(of.ratios.get(*name))));
        cells.push(validity(result));
        cells
    };
    Table { head, rows: all().map(row).collect() }
}

/// What limits a device, and what the doctor's advice was predicted to bring and brought.
fn diagnoses(results: &[Named], names: &Names) -> Table {
    let titles = [
        "result",
        "device",
        "output tokens/s",
        "what limits it",
        "change",
        "predicted",
        "measured",
        "error",
        "then",
        "valid",
    ];
    let row = |(file, result): &Named| {
        let diagnosis = result.diagnosis.as_ref()?;
        let times = |gain: f64| Cell { text: format!("{} x", number(gain)), spread: None, is_number: true };
        let mut cells = vec![
            word(file),
            word(&result.targets.first().map(|target| names.call(target)).unwrap_or_default()),
            Cell { text: number(diagnosis.output_tokens_per_s), spread: None, is_number: true },
            word(&diagnosis.verdict),
        ];
        cells.extend(match &diagnosis.advice {
            Some(advice) => [
                word(&advice.change),
                times(advice.predicted_gain),
                advice.measured_gain.map_or_else(|| word("not tried"), times),
                advice.error().map_or_else(|| word("–"), |error| word(&format!("{:+.0} %", error * 100.0))),
                word(&advice.then),
            ],
            None => ["nothing", "–", "–", "–", "–"].map(word),
        });
        cells.push(validity(result));
        Some(cells)
    };
    Table { head: titles.map(str::to_owned).into(), rows: results.iter().filter_map(row).collect() }
}

fn starts(results: &[Named], names: &Names) -> Table {
    let head = ["device", "model", "start", "ready, s", "first token, s", "valid"].map(str::to_owned).into();
    let startups = results.iter().filter(|(_, result)| result.bench == "startup");
    let rows = startups.flat_map(|(_, result)| {
        result.measurements.iter().map(|measurement| {
            let target = result.target(&measurement.target);
            let model = target.and_then(|target| target.model.clone()).unwrap_or_default();
            let [ready, first] = ["ready_s", "first_token_s"].map(|name| cell(measurement.summary.get(name)));
            vec![
                word(&target.map_or(measurement.target.clone(), |of| names.call(of))),
                word(&model),
                word(measurement.subject.as_deref().unwrap_or("later")),
                ready,
                first,
                validity(result),
            ]
        })
    });
    Table { head, rows: rows.collect() }
}

fn source((file, result): &Named) -> Source {
    let BenchResult { software, machine: of, .. } = result;
    let commit = software.commit.as_deref().unwrap_or("unknown");
    let load = of.load_average.map_or(String::new(), |load| format!(", load average {load} when it began"));
    let num_runs = result.measurements.iter().map(|measurement| measurement.runs.len()).min().unwrap_or(0);
    let runs: Vec<Run> = result.measurements.iter().flat_map(|measurement| measurement.runs.clone()).collect();
    let hashes: Vec<&str> = runs.iter().filter_map(|run| run.output_hash.as_deref()).take(MAX_HASHES).collect();
    let mut facts = vec![
        ("bench", format!("{}, {num_runs} runs, seed {}", result.bench, result.seed)),
        ("begun", result.begun_at.clone()),
        ("command", result.command.join(" ")),
        ("program", format!("fullbore {}, {} build, commit {commit}", software.version, software.build)),
        ("machine", format!("{}; {}{load}", machine(result), of.system)),
        ("texts tokenized again", retokenized(&runs).unwrap_or_else(|| "no".to_owned())),
        ("output", if hashes.is_empty() { "no token ids".to_owned() } else { hashes.join(", ") }),
    ];
    facts.extend(result.targets.iter().flat_map(|target| &target.model_files).map(|file| ("model file", told(file))));
    facts.extend(resent(&runs).map(|sentence| ("sent again", sentence)));
    Source { file: file.clone(), facts, invalid: result.invalid.clone() }
}

/// Of one file, shown.
const MAX_HASHES: usize = 4;

fn told(file: &ModelFile) -> String {
    let hash = file.sha256.as_deref().unwrap_or("not read");
    format!("{}, {} bytes, sha256 {hash}", file.name, grouped(file.size_bytes as f64))
}
