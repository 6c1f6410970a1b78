//! What is missing in results, in sentences: what makes them doubtful, what was not measured, and what is not known of
//! what was.

use std::collections::{BTreeMap, BTreeSet};

use super::names::{Names, vendor};
use super::view::{Named, load_of, machine};
use crate::result::{BenchResult, Device, Measurement, Target};

/// Benches that every device should have.
const WANTED: [(&str, &str); 6] = [
    ("latency", "batch 1 (`bench latency`)"),
    ("serve", "a server under load (`bench serve`)"),
    ("sweep", "the knee (`bench sweep`)"),
    ("startup", "the start (`bench startup`)"),
    ("ops", "single ops beside the roofline (`bench ops`)"),
    ("doctor", "what limits it (`bench doctor`)"),
];

pub fn missing(results: &[Named], names: &Names) -> Vec<String> {
    let mut sentences = Vec::new();
    for (file, result) in results.iter().filter(|(_, result)| !result.valid) {
        sentences.push(format!("{file} is not valid: {}.", result.invalid.join("; ")));
    }
    let mut devices: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (_, result) in results {
        for target in result.targets.iter().filter(|target| target.device.is_some()) {
            let benches = devices.entry(names.call(target)).or_default();
            benches.extend(result.valid.then_some(result.bench.as_str()));
        }
    }
    for (device, benches) in &devices {
        let lacks: Vec<&str> =
            WANTED.iter().filter(|(bench, _)| !benches.contains(bench)).map(|(_, title)| *title).collect();
        if !lacks.is_empty() {
            sentences.push(format!("Not measured on {device}: {}.", lacks.join(", ")));
        }
    }
    if results.iter().all(|(_, result)| result.comparisons.is_empty()) {
        sentences.push("No other engine was measured beside this one (`--against URL`).".to_owned());
    }
    if devices.len() == 1 {
        sentences.push("One device alone was measured.".to_owned());
    }
    let machines: BTreeSet<String> = results.iter().map(|(_, result)| machine(result)).collect();
    if machines.len() == 1 {
        sentences.push(format!("One machine alone was measured: {}.", machines.into_iter().collect::<String>()));
    }
    sentences.extend(clients(results, names));
    sentences.extend(unknown(results, names));
    sentences
}

/// Of a core: from here on a client is told of in words. Above [`MAX_CLIENT_SHARE`](crate::serve::tally) its run is not
/// valid.
const NOTABLE_CLIENT_SHARE: f64 = 0.5;

/// Clients that may have been the limit.
fn clients(results: &[Named], names: &Names) -> Vec<String> {
    let busiest = |(file, result): &Named| {
        let share = |of: &Measurement| Some(of.summary.get("client_core_share")?.max);
        let all = result.measurements.iter().filter_map(|of| Some((share(of)?, of)));
        let (share, of) = all.max_by(|left, right| left.0.total_cmp(&right.0))?;
        let target = result.target(&of.target).map_or(of.target.clone(), |target| names.call(target));
        let (percent, load) = (share * 100.0, load_of(result, of));
        (share >= NOTABLE_CLIENT_SHARE).then(|| {
            format!(
                "The client may have held {target} back in {file}: its one thread was busy for up to {percent:.0} % of \
                 the time ({load})."
            )
        })
    };
    results.iter().filter_map(busiest).collect()
}

/// Whether something is known of what a target was measured at.
type Has<'a> = &'a dyn Fn(&Target, &Measurement) -> bool;

/// What results lack that there could be, each with the files that lack it.
fn unknown(results: &[Named], names: &Names) -> Vec<String> {
    const OVER_HTTP: &[&str] = &["serve", "sweep"];
    const PROMPTS: &[&str] = &["serve", "sweep", "latency", "offline", "doctor"];
    const ANSWERS: &[&str] = &["serve", "sweep", "latency", "offline", "doctor", "startup"];
    let has = |metric: &'static str| move |_: &Target, of: &Measurement| of.summary.contains_key(metric);
    let has_hash = |_: &Target, of: &Measurement| of.runs.iter().all(|run| run.output_hash.is_some());
    let has_files = |of: &Target, _: &Measurement| of.device.is_none() || is_known(of);
    let lacking: [(&str, &[&str], Has); 4] = [
        ("a hash of output tokens, by which two results can be held to each other", ANSWERS, &has_hash),
        ("the share of prompts that came from a cache", PROMPTS, &has("cached_share")),
        ("how much of a core the client took", OVER_HTTP, &has("client_core_share")),
        ("the model's file with its sha256", ANSWERS, &has_files),
    ];
    let of_runs = lacking.into_iter().map(|(what, benches, has)| {
        let of = results.iter().filter(|(_, result)| benches.contains(&result.bench.as_str()));
        (what, of.filter_map(|named| lacks(named, names, has)).collect())
    });
    let files = |lacks: &dyn Fn(&BenchResult) -> bool| -> Vec<String> {
        results.iter().filter(|(_, result)| lacks(result)).map(|(file, _)| file.clone()).collect()
    };
    let of_machines = [
        ("the processor's clock", files(&|result| result.machine.cpu_mhz.is_none())),
        ("the device's own clock, which is read nowhere", files(&|of| of.targets.iter().any(has_own_clock))),
        ("the commit of the program", files(&|result| result.software.commit.is_none())),
    ];
    let all = of_runs.chain(of_machines).filter(|(_, files): &(_, Vec<String>)| !files.is_empty());
    all.map(|(what, files)| format!("Not known: {what} ({}).", files.join("; "))).collect()
}

/// The file if all of its targets lack something in some measurement, with their names if some do.
fn lacks((file, result): &Named, names: &Names, has: Has) -> Option<String> {
    let is_whole = |target: &Target| {
        let mut of = result.measurements.iter().filter(|measurement| measurement.target == target.name);
        of.all(|measurement| has(target, measurement))
    };
    let lacking: Vec<String> =
        result.targets.iter().filter(|target| !is_whole(target)).map(|of| names.call(of)).collect();
    match lacking.len() {
        0 => None,
        all if all == result.targets.len() => Some(file.clone()),
        _ => Some(format!("{file}: {}", lacking.join(", "))),
    }
}

/// What is measured of a model that is made up has no file.
fn is_known(target: &Target) -> bool {
    let has_hash = !target.model_files.is_empty() && target.model_files.iter().all(|file| file.sha256.is_some());
    has_hash || target.device.as_ref().is_some_and(|device| device.id == "sim")
}

/// A device that is neither the processor, nor drawn by it, nor made up.
fn has_own_clock(target: &Target) -> bool {
    let is_other = |device: &Device| !device.id.starts_with("cpu") && device.id != "sim";
    target.device.as_ref().is_some_and(is_other) && vendor(target) != "In software"
}
