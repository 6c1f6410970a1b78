//! Batch 1: one request after the other on an idle engine, prefill and decode told apart.

use fullbore_engine::fleet::Fleet;

use crate::offline::{self, BenchError, OfflineReport};
use crate::result::{Run, TokenHash};
use crate::statistics::median;
use crate::stopwatch::Dial;
use crate::workload::PlannedRequest;

/// Runs each of `planned`, with prompts drawn from `seed`, alone; medians over them.
pub fn run(engine: &Fleet, planned: &[PlannedRequest], seed: u64, dial: &Dial) -> Result<Run, BenchError> {
    let reports = planned.iter().map(|one| offline::run(engine, std::slice::from_ref(one), seed, dial));
    let reports: Vec<OfflineReport> = reports.collect::<Result<_, _>>()?;
    let of = |value: fn(&OfflineReport) -> f64| median(&mut reports.iter().map(value).collect::<Vec<_>>());
    let mut run = Run::default();
    for (name, value) in [
        ("ttft_p50_ms", of(|report| report.ttft_ms_p50)),
        ("tpot_p50_ms", of(|report| report.tpot_ms_mean)),
        ("e2e_p50_ms", of(|report| report.elapsed_s * 1e3)),
        ("prefill_tokens_per_s", of(|report| report.prompt_tokens as f64 / report.ttft_ms_p50.max(1e-6) * 1e3)),
        ("decode_tokens_per_s", of(|report| 1e3 / report.tpot_ms_mean.max(1e-6))),
    ] {
        value.into_iter().for_each(|value| run.metric(name, value));
    }
    let sum = |count: fn(&OfflineReport) -> u64| reports.iter().map(count).sum::<u64>();
    let prompt_tokens = sum(|report| report.prompt_tokens);
    run.metric("cached_share", sum(|report| report.cached_tokens) as f64 / prompt_tokens.max(1) as f64);
    run.count("requests", reports.len() as u64);
    run.count("prompt_tokens", prompt_tokens);
    run.count("output_tokens", sum(|report| report.output_tokens));
    run.doubt_cache(planned.iter().any(PlannedRequest::shares_prefix));
    run.output_hash = Some(TokenHash::of_answers(reports.iter().map(|report| report.output_hash)).to_string());
    Ok(run)
}
