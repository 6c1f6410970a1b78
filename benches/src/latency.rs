//! Batch 1: one request after the other on an idle engine, prefill and decode told apart.

use fullbore_engine::fleet::Fleet;

use crate::offline::{self, BenchError, OfflineReport};
use crate::result::{Run, hash_of};
use crate::statistics::median;
use crate::stopwatch::Dial;
use crate::workload::Workload;

/// Runs `num_requests` requests of `each`'s lengths, on prompts of their own; medians over them.
pub fn run(engine: &Fleet, each: Workload, dial: &Dial) -> Result<Run, BenchError> {
    let one = |nth: u32| Workload { num_requests: 1, seed: each.seed ^ (u64::from(nth) << 40), ..each };
    let reports = (0..each.num_requests).map(|nth| offline::run(engine, one(nth), dial));
    let reports: Vec<OfflineReport> = reports.collect::<Result<_, _>>()?;
    let of = |value: fn(&OfflineReport) -> f64| median(&mut reports.iter().map(value).collect::<Vec<_>>());
    let (ttft_ms, tpot_ms) = (of(|report| report.ttft_ms_p50), of(|report| report.tpot_ms_mean));
    let (ttft_ms, tpot_ms) = (ttft_ms.unwrap_or(0.0), tpot_ms.unwrap_or(0.0));
    let mut run = Run::default();
    run.metric("ttft_p50_ms", ttft_ms);
    run.metric("tpot_p50_ms", tpot_ms);
    run.metric("e2e_p50_ms", of(|report| report.elapsed_s * 1e3).unwrap_or(0.0));
    run.metric("prefill_tokens_per_s", f64::from(each.prompt_tokens) / ttft_ms.max(1e-6) * 1e3);
    run.metric("decode_tokens_per_s", 1e3 / tpot_ms.max(1e-6));
    let sum = |count: fn(&OfflineReport) -> u64| reports.iter().map(count).sum::<u64>();
    run.count("requests", reports.len() as u64);
    run.count("prompt_tokens", sum(|report| report.prompt_tokens));
    run.count("output_tokens", sum(|report| report.output_tokens));
    let cached = sum(|report| report.cached_tokens);
    run.invalid.extend((cached > 0).then(|| format!("{cached} tokens came from a cache")));
    let hashes = reports.iter().flat_map(|report| report.output_hash.bytes());
    run.output_hash = Some(hash_of(hashes.map(u32::from)));
    Ok(run)
}
