//! What a played workload measured, on a simulated device or on a real one: the same numbers, so that the one can be
//! held against the other. Nothing here runs anything.

use std::collections::BTreeMap;
use std::fmt;

use fullbore_engine::engine::Engine;
use fullbore_engine::limits::{Cause, Snapshot};
use fullbore_engine::memory::capacity::human_bytes;
use serde::Serialize;

use crate::result::Run;
use crate::statistics::{Histogram, is_told};

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServingReport {
    pub num_requests: u32,
    pub num_completed: u32,
    /// Requests that no engine with this model length can run.
    pub too_long: LeftOut,
    /// Requests turned away because the queue was full.
    pub refused: LeftOut,
    /// From the first arrival to the last token.
    pub duration_s: f64,
    pub num_steps: u64,
    /// Of requests that were completed.
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    /// Output tokens of all requests a second.
    pub output_tokens_per_s: f64,
    /// Tokens that went through the model a second: prefill, decoding and what was computed again.
    pub scheduled_tokens_per_s: f64,
    /// Rows of a step on average.
    pub mean_rows: f64,
    /// Share of the time in which a step ran.
    pub busy_share: f64,
    /// From arrival to first token, waiting included.
    pub ttft_ms: Percentiles,
    /// Gaps between the tokens of a request.
    pub itl_ms: Percentiles,
    /// From arrival to last token.
    pub total_ms: Percentiles,
    pub num_preemptions: u64,
    /// Of those, the ones whose KV was kept on the host.
    pub num_swaps: u64,
    pub kv: KvUse,
    /// Share of the prompt tokens of completed requests that the prefix cache had.
    pub prefix_hit_share: f64,
    /// Requests that waited at most at a time, outside the running set.
    pub max_waiting: u32,
    /// Of all answers.
    pub output_hash: String,
    pub limits: LimitsReport,
}

/// What held the device back over the run, in the words of a server's `/v1/limits`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LimitsReport {
    /// The cause that took the most.
    pub limit: &'static str,
    pub verdict: String,
    /// Of the device's time, by cause.
    pub shares: BTreeMap<&'static str, f64>,
    pub seconds: BTreeMap<&'static str, f64>,
}

/// Requests that did not run, named by their rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LeftOut {
    pub count: u32,
    /// The first few.
    pub rows: Vec<u32>,
}

/// Of an empty sample, 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

/// Of the KV pool, by blocks that running requests hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct KvUse {
    pub num_blocks: u32,
    pub block_size: u32,
    pub pool_bytes: u64,
    /// Over time.
    pub mean_share: f64,
    pub max_share: f64,
    /// Of the slots that requests hold, those that hold nothing, over time.
    pub unused_share: f64,
}

/// Rows that [`LeftOut`] names.
const MAX_ROWS_NAMED: usize = 8;

impl LimitsReport {
    /// Of an engine's time since what it said of it `before`.
    pub fn of(engine: &Engine, before: &Snapshot) -> LimitsReport {
        let (Snapshot { window, .. }, verdict) = engine.limits_since(before);
        let share = |cause: Cause| (cause.name(), window.share(window.ns(cause)));
        let shares = Cause::ALL.into_iter().map(share).collect();
        let seconds = Cause::ALL.into_iter().map(|cause| (cause.name(), window.seconds(cause))).collect();
        LimitsReport { limit: verdict.cause.name(), verdict: verdict.sentence, shares, seconds }
    }
}

impl ServingReport {
    /// As a result file has it.
    pub fn to_run(&self) -> Run {
        let mut run = Run { output_hash: Some(self.output_hash.clone()), ..Run::default() };
        let tokens = self.prompt_tokens + self.output_tokens;
        run.metric("duration_s", self.duration_s);
        run.metric("output_tokens_per_s", self.output_tokens_per_s);
        run.metric("total_tokens_per_s", tokens as f64 / self.duration_s.max(1e-9));
        run.metric("cached_share", self.prefix_hit_share);
        let (requests, gaps) = (self.num_completed as usize, self.output_tokens as usize);
        for (name, num_values, Percentiles { mean, p50, p90, p99 }) in
            [("ttft", requests, self.ttft_ms), ("itl", gaps, self.itl_ms), ("e2e", requests, self.total_ms)]
        {
            for (label, share, value) in [("mean", 0.0, mean), ("p50", 0.5, p50), ("p90", 0.9, p90), ("p99", 0.99, p99)]
            {
                if is_told(share, num_values) {
                    run.metric(&format!("{name}_{label}_ms"), value);
                }
            }
        }
        for (name, count) in [
            ("requests", u64::from(self.num_requests)),
            ("completed", u64::from(self.num_completed)),
            ("prompt_tokens", self.prompt_tokens),
            ("output_tokens", self.output_tokens),
            ("preemptions", self.num_preemptions),
        ] {
            run.count(name, count);
        }
        self.limits.seconds.iter().for_each(|(cause, seconds)| run.metric(&format!("device_{cause}_s"), *seconds));
        let num_missing = self.num_requests - self.num_completed;
        run.invalid.extend(
            (num_missing > 0).then(|| {
                format!("{num_missing} of {} requests got no answer: refused, or too long", self.num_requests)
            }),
        );
        run
    }
}

impl LeftOut {
    pub fn add(&mut self, row: u32) {
        self.count += 1;
        if self.rows.len() < MAX_ROWS_NAMED {
            self.rows.push(row);
        }
    }
}

impl From<&Histogram> for Percentiles {
    fn from(histogram: &Histogram) -> Percentiles {
        let quantile = |share| histogram.quantile_ms(share).unwrap_or(0.0);
        Percentiles {
            mean: histogram.mean_ms().unwrap_or(0.0),
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
        }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<String> = self.rows.iter().map(u32::to_string).collect();
        let more = if self.count as usize > rows.len() { ", .." } else { "" };
        match self.count {
            0 => write!(f, "0"),
            count => write!(f, "{count} (rows {}{more})", rows.join(", ")),
        }
    }
}

impl fmt::Display for ServingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let KvUse { num_blocks, block_size, pool_bytes, mean_share, max_share, unused_share } = self.kv;
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        writeln!(f, "{:<18}{} of {}", "completed", self.num_completed, self.num_requests)?;
        writeln!(f, "{:<18}{}", "too long", self.too_long)?;
        writeln!(f, "{:<18}{}", "refused", self.refused)?;
        let busy = percent(self.busy_share);
        writeln!(f, "{:<18}{:.1} s, a step ran in {busy} of it", "time", self.duration_s)?;
        writeln!(f, "{:<18}{}, {:.1} rows on average", "steps", self.num_steps, self.mean_rows)?;
        writeln!(f, "{:<18}{:.1} tokens/s", "output", self.output_tokens_per_s)?;
        writeln!(f, "{:<18}{:.1} tokens/s", "scheduled", self.scheduled_tokens_per_s)?;
        writeln!(f, "{:<18}{:>12}{:>12}{:>12}{:>12}", "ms", "mean", "p50", "p90", "p99")?;
        let lines = [("first token", self.ttft_ms), ("between tokens", self.itl_ms), ("whole request", self.total_ms)];
        for (name, Percentiles { mean, p50, p90, p99 }) in lines {
            writeln!(f, "{name:<18}{mean:>12.1}{p50:>12.1}{p90:>12.1}{p99:>12.1}")?;
        }
        writeln!(f, "{:<18}{}, {} to the host", "preemptions", self.num_preemptions, self.num_swaps)?;
        writeln!(f, "{:<18}{} at most", "waiting", self.max_waiting)?;
        let pool = format!("{num_blocks} blocks of {block_size} tokens, {}", human_bytes(pool_bytes));
        let [mean, most, unused] = [mean_share, max_share, unused_share].map(percent);
        writeln!(f, "{:<18}{pool}: {mean} held on average, {most} at most; {unused} of that unused", "KV")?;
        writeln!(f, "{:<18}{} of prompt tokens", "prefix hits", percent(self.prefix_hit_share))?;
        write!(f, "{:<18}{}", "limit", self.limits.verdict)
    }
}
