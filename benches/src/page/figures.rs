//! Which plots there are, and of what. One without data is not drawn, and is told among what is missing.

use std::collections::BTreeMap;

use super::names::Names;
use super::plot::{Axis, Bar, NUM_COLOURS, Point, Series, bars, lines};
use super::view::{Named, load_of};
use crate::result::table::{loads, number};
use crate::result::{BenchResult, Measurement, Spread};

/// A plot with its words around it.
pub struct Figure {
    pub title: String,
    /// What to see in it.
    pub caption: String,
    /// Names, in the order of the colours.
    pub legend: Vec<String>,
    pub svg: String,
}

/// All that there is valid data for, and sentences about those that there is none for.
pub fn figures(results: &[Named], names: &Names) -> (Vec<Figure>, Vec<String>) {
    let valid: Vec<Named> = results.iter().filter(|(_, result)| result.valid).cloned().collect();
    let results = &valid[..];
    let kinds: [(&str, Vec<Figure>); 5] = [
        ("no sweep: no throughput against latency (`bench sweep`)", sweeps(results, names)),
        ("no server of ours under load: not where its device's time went (`bench serve`)", times(results, names)),
        ("no op: no share of the roofline (`bench ops`)", rooflines(results, names)),
        ("no plan of memory", memory(results, names)),
        ("no start (`bench startup`)", starts(results, names)),
    ];
    let missing = kinds.iter().filter(|(_, found)| found.is_empty()).map(|(what, _)| format!("There is {what}."));
    let missing = missing.collect();
    (kinds.into_iter().flat_map(|(_, found)| found).collect(), missing)
}

/// Two plots for each workload: what latency a rate costs, and what rate a load brings.
fn sweeps(results: &[Named], names: &Names) -> Vec<Figure> {
    let mut groups: BTreeMap<String, Vec<&BenchResult>> = BTreeMap::new();
    for (_, result) in results.iter().filter(|(_, result)| result.bench == "sweep") {
        let load = load_of(result, &Measurement::default());
        let model = result.targets.first().and_then(|target| target.model.clone()).unwrap_or_default();
        groups.entry(format!("{model}, {load}")).or_default().push(result);
    }
    let both = groups.into_iter().flat_map(|(group, results)| {
        let by_rate = figure(&group, &results, names, "Throughput against latency", [RATE, LATENCY], false);
        let load = load_axis(&results);
        [by_rate, figure(&group, &results, names, "What more load brings", [load, RATE], true)]
    });
    both.flatten().collect()
}

type Metric = (&'static str, &'static str);
const RATE: Metric = ("output_tokens_per_s", "output tokens a second");
const LATENCY: Metric = ("tpot_p50_ms", "ms for a token after the first, median");

fn load_axis(results: &[&BenchResult]) -> Metric {
    let mut loads =
        results.iter().flat_map(|result| &result.measurements).flat_map(|measurement| measurement.at.keys());
    match loads.any(|name| name == "rate_per_s") {
        true => ("rate_per_s", "requests a second"),
        false => ("concurrency", "clients at once"),
    }
}

fn figure(
    group: &str,
    results: &[&BenchResult],
    names: &Names,
    title: &str,
    [x, y]: [Metric; 2],
    x_is_log: bool,
) -> Option<Figure> {
    let mut series: Vec<Series> = Vec::new();
    for result in results {
        for target in &result.targets {
            let of = result.measurements.iter().filter(|measurement| measurement.target == target.name);
            let points: Vec<Point> = of.filter_map(|measurement| point(measurement, x, y)).collect();
            if !points.is_empty() {
                series.push(Series { name: names.call(target), points });
            }
        }
    }
    let legend: Vec<String> = series.iter().map(|series| series.name.clone()).collect();
    let axis = |(_, label): Metric, is_log| Axis { label, is_log };
    let svg = lines(&series, &axis(x, x_is_log), &axis(y, false));
    let caption = format!("{group}. A point is the median of the runs, its line from the least to the most.");
    (!series.is_empty()).then(|| Figure { title: title.to_owned(), caption, legend, svg })
}

fn point(measurement: &Measurement, (x, _): Metric, (y, y_label): Metric) -> Option<Point> {
    let at = measurement.at.get(x).copied().or_else(|| Some(measurement.summary.get(x)?.median))?;
    let Spread { median, min, max } = *measurement.summary.get(y)?;
    let title = format!("{} {y_label} at {}", number(median), loads(&measurement.at).trim_start_matches(", "));
    Some(Point { x: at, y: median, y_min: min, y_max: max, title })
}

/// A bar for each measurement: seconds by cause.
fn times(results: &[Named], names: &Names) -> Vec<Figure> {
    let served =
        results.iter().filter(|(_, result)| ["serve", "sweep", "offline", "doctor"].contains(&result.bench.as_str()));
    let measured = served.flat_map(|(_, result)| result.measurements.iter().map(move |of| (result, of)));
    let rows: Vec<_> = measured.map(|(result, of)| (label(result, of, names), prefixed(of, "device_"))).collect();
    let caption = "What the device's seconds are charged to, over each run: work, or what kept it from work.";
    stacked("Where the device's time went", caption, rows, true, |_| String::new())
}

fn starts(results: &[Named], names: &Names) -> Vec<Figure> {
    let startups = results.iter().filter(|(_, result)| result.bench == "startup");
    let measured = startups.flat_map(|(_, result)| result.measurements.iter().map(move |of| (result, of)));
    let rows: Vec<_> = measured.map(|(result, of)| (label(result, of, names), prefixed(of, "start_"))).collect();
    let seconds = |total: f64| format!("{} s", number(total));
    stacked("From nothing to ready", "Seconds, phase by phase; medians of the runs.", rows, false, seconds)
}

fn memory(results: &[Named], names: &Names) -> Vec<Figure> {
    let mut planned: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    for (file, result) in results {
        for target in result.targets.iter().filter(|target| !target.memory_bytes.is_empty()) {
            let parts = target.memory_bytes.iter().map(|(name, bytes)| (name.clone(), *bytes as f64 / MIB));
            let model = target.model.as_deref().unwrap_or_default();
            let (mut name, parts) = (format!("{}, {model}", names.call(target)), parts.collect());
            // Several plans of one model are told apart by their files.
            if planned.get(&name).is_some_and(|before| *before != parts) {
                name += &format!(", {file}");
            }
            planned.insert(name, parts);
        }
    }
    let mib = |total: f64| format!("{} MiB", number(total));
    let caption = "MiB of the device's memory that each model takes, as planned at its start.";
    stacked("Memory", caption, planned.into_iter().collect(), false, mib)
}

const MIB: f64 = 1_048_576.0;

fn rooflines(results: &[Named], names: &Names) -> Vec<Figure> {
    let ops = results.iter().filter(|(_, result)| result.bench == "ops");
    let figure = |(_, result): &Named| {
        let bar = |of: &Measurement| {
            let share = of.summary.get("roofline_share")?.median;
            let name = format!("{}{}", of.subject.as_deref().unwrap_or_default(), loads(&of.at));
            Some(Bar { label: name, parts: vec![share], total: format!("{:.0} %", share * 100.0) })
        };
        let rows: Vec<Bar> = result.measurements.iter().filter_map(bar).collect();
        let device = result.targets.first().map(|target| names.call(target)).unwrap_or_default();
        let caption = format!(
            "{device}. What an op reaches of the bandwidth and the arithmetic that were measured there with plain ones."
        );
        let svg = bars(&rows, &["of the roofline".to_owned()], false);
        (!rows.is_empty()).then(|| Figure { title: "Ops beside the roofline".to_owned(), caption, legend: vec![], svg })
    };
    ops.filter_map(figure).collect()
}

fn label(result: &BenchResult, measurement: &Measurement, names: &Names) -> String {
    let target = result.target(&measurement.target);
    let name = target.map_or(measurement.target.clone(), |target| names.call(target));
    let load = load_of(result, measurement);
    if load.is_empty() { name } else { format!("{name}, {load}") }
}

/// Medians of metrics in seconds whose names begin so, by the rest of their names.
fn prefixed(measurement: &Measurement, prefix: &str) -> BTreeMap<String, f64> {
    let named = measurement.summary.iter().filter_map(|(name, spread)| {
        let name = name.strip_prefix(prefix)?.strip_suffix("_s")?;
        Some((name.replace('_', " "), spread.median))
    });
    named.collect()
}

fn stacked(
    title: &str,
    caption: &str,
    rows: Vec<(String, BTreeMap<String, f64>)>,
    are_shares: bool,
    total: impl Fn(f64) -> String,
) -> Vec<Figure> {
    let rows: Vec<_> = rows.into_iter().filter(|(_, parts)| parts.values().sum::<f64>() > 0.0).collect();
    let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
    for (name, part) in rows.iter().flat_map(|(_, parts)| parts) {
        *sums.entry(name).or_default() += part;
    }
    // The largest first; what is nothing anywhere has no colour.
    let mut names: Vec<(&str, f64)> = sums.into_iter().filter(|(_, sum)| *sum > 0.0).collect();
    names.sort_by(|left, right| right.1.total_cmp(&left.1));
    let mut legend: Vec<String> = names.iter().map(|(name, _)| (*name).to_owned()).collect();
    // No colour stands for two; what is least has one together.
    let num_named = if legend.len() > NUM_COLOURS { NUM_COLOURS - 1 } else { legend.len() };
    let rest = legend.split_off(num_named);
    let bar = |(label, parts): &(String, BTreeMap<String, f64>)| {
        let part = |name: &String| parts.get(name).copied().unwrap_or(0.0);
        let mut parts: Vec<f64> = legend.iter().map(part).collect();
        parts.extend((!rest.is_empty()).then(|| rest.iter().map(part).sum::<f64>()));
        let sum = parts.iter().sum();
        Bar { label: label.clone(), parts, total: total(sum) }
    };
    let all: Vec<Bar> = rows.iter().map(bar).collect();
    if all.is_empty() {
        return Vec::new();
    }
    legend.extend((!rest.is_empty()).then(|| format!("other ({})", rest.join(", "))));
    let svg = bars(&all, &legend, are_shares);
    vec![Figure { title: title.to_owned(), caption: caption.to_owned(), legend, svg }]
}
