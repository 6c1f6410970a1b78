//! Offline throughput: all requests at once, tokens a second until the last has ended.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use fullbore_engine::engine::EngineStats;
use fullbore_engine::fleet::{Fleet, Handed, SubmitError};
use fullbore_engine::limits::Cause;
use fullbore_engine::request::{Event, FinishReason, Flow, Request, Sink};

use crate::result::{Run, TokenHash};
use crate::statistics::{is_told, quantile};
use crate::stopwatch::{Dial, Reading};
use crate::workload::PlannedRequest;

/// What a run measured.
#[derive(Clone, Debug, Default)]
pub struct OfflineReport {
    pub num_requests: u32,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub elapsed_s: f64,
    /// Output tokens of all requests a second, prefill included.
    pub output_tokens_per_s: f64,
    /// The same while all requests decode: from the latest first token until the first request ends. None where they
    /// never do.
    pub steady_tokens_per_s: Option<f64>,
    pub ttft_ms_p50: f64,
    pub ttft_ms_p99: f64,
    /// Mean gap between the tokens of a request, over all requests.
    pub tpot_ms_mean: f64,
    /// Tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// The workload asks for some; else a run with any did not measure what it says.
    pub shares_prefixes: bool,
    /// So that a faster run can be seen to do the same work.
    pub output_hash: TokenHash,
    /// Of `elapsed_s`, in which the device waited for the host, as the engine's limits say.
    pub host_waiting_share: f64,
    /// Of `elapsed_s`, what is left beside the time that the device says it worked.
    pub not_busy_share: f64,
    /// Of `elapsed_s`, in which the engine was not blocked waiting for the device: about the most that the device can
    /// have waited, where `submit` does not block.
    pub not_blocked_share: f64,
    /// Seconds of the run by what they are charged to.
    pub device_seconds: BTreeMap<&'static str, f64>,
    pub verdict: String,
}

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("the engine refused a request: {0}")]
    Refused(#[from] SubmitError),
    #[error("request {index} ended early: {reason}")]
    Failed { index: usize, reason: String },
    #[error("the engine ended before all requests had")]
    EngineGone,
}

/// Submits all of `planned`, with prompts drawn from `seed`, to an idle engine, whose device is behind the stopwatch of
/// `dial`, and waits for their end. Arrivals do not count; a turn of a conversation comes when the one before it has
/// ended.
pub fn run(engine: &Fleet, planned: &[PlannedRequest], seed: u64, dial: &Dial) -> Result<OfflineReport, BenchError> {
    let mut followers: HashMap<Option<u32>, Vec<usize>> = HashMap::new();
    planned.iter().enumerate().for_each(|(index, of)| followers.entry(of.follows).or_default().push(index));
    let vocab_size = engine.vocab_size();
    let with_sink = |index: usize, sender| -> Handed {
        (Arc::new(planned[index].request(vocab_size, seed)), Box::new(Timestamps { index, sender }))
    };
    let (sender, receiver) = mpsc::channel();
    let first = followers.remove(&None).unwrap_or_default();
    let first: Vec<Handed> = first.into_iter().map(|index| with_sink(index, sender.clone())).collect();
    drop(sender);
    let (before, charged) = (dial.read(), engine.stats().limits.total);
    let start = Instant::now();
    let mut traces: Vec<Trace> = vec![Trace::new(start); planned.len()];
    // All at once, so that all of an empty queue is theirs.
    let Request { tenant, share, .. } = Request::default();
    engine.submit(engine.reserve(tenant, share, first.len() as u32)?, first)?;
    let mut num_left = planned.len();
    while num_left > 0 {
        let Told { index, at, event, sender } = receiver.recv().map_err(|_| BenchError::EngineGone)?;
        let trace = &mut traces[index];
        match event {
            Event::Started { .. } | Event::Prompt(_) | Event::Pooled(_) => {}
            Event::Token { id, .. } => {
                trace.times.push(at);
                trace.hash.add(id.0);
            }
            Event::Finished { reason: FinishReason::Error(reason) | FinishReason::DeviceLost(reason), .. } => {
                return Err(BenchError::Failed { index, reason });
            }
            Event::Finished { usage, .. } => {
                trace.cached_tokens = u64::from(usage.cached_tokens);
                num_left -= 1;
                for follower in followers.remove(&Some(planned[index].row)).unwrap_or_default() {
                    let (request, sink) = with_sink(follower, sender.clone().expect("it comes with the last event"));
                    traces[follower].begun = Instant::now();
                    engine.submit_one(request, sink)?;
                }
            }
        }
    }
    let elapsed = start.elapsed();
    let Reading { busy, blocked, .. } = dial.read() - before;
    // Shares are of the time of all devices.
    let device_s = elapsed.as_secs_f64() * engine.engines().len() as f64;
    let rest = |part: Duration| 1.0 - part.as_secs_f64() / device_s;
    let stats = idle(engine);
    let total = &stats.limits.total;
    Ok(OfflineReport {
        host_waiting_share: (total.host_ns() - charged.host_ns()) as f64 / 1e9 / device_s,
        not_busy_share: rest(busy),
        not_blocked_share: rest(blocked),
        device_seconds: Cause::ALL
            .into_iter()
            .map(|cause| (cause.name(), total.seconds(cause) - charged.seconds(cause)))
            .collect(),
        verdict: engine.verdict(&stats).sentence,
        ..report(&traces, planned, elapsed)
    })
}

/// What is told of an engine once nothing runs: its last step is told to clients first.
fn idle(engine: &Fleet) -> EngineStats {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let stats = engine.stats();
        if stats.num_running + stats.num_waiting == 0 || Instant::now() > deadline {
            return stats;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn report(traces: &[Trace], planned: &[PlannedRequest], elapsed: Duration) -> OfflineReport {
    let output_tokens: u64 = traces.iter().map(|trace| trace.times.len() as u64).sum();
    let firsts = traces.iter().filter_map(|trace| Some(*trace.times.first()? - trace.begun));
    let mut ttft_ms: Vec<f64> = firsts.map(|took| took.as_secs_f64() * 1e3).collect();
    let gaps: Vec<f64> = traces.iter().filter_map(Trace::mean_gap_ms).collect();
    OfflineReport {
        num_requests: planned.len() as u32,
        prompt_tokens: planned.iter().map(|of| u64::from(of.prompt_tokens)).sum(),
        output_tokens,
        elapsed_s: elapsed.as_secs_f64(),
        output_tokens_per_s: output_tokens as f64 / elapsed.as_secs_f64(),
        steady_tokens_per_s: steady_tokens_per_s(traces),
        ttft_ms_p50: quantile(&mut ttft_ms, 0.5).unwrap_or(0.0),
        ttft_ms_p99: quantile(&mut ttft_ms, 0.99).unwrap_or(0.0),
        tpot_ms_mean: gaps.iter().sum::<f64>() / gaps.len().max(1) as f64,
        cached_tokens: traces.iter().map(|trace| trace.cached_tokens).sum(),
        shares_prefixes: planned.iter().any(PlannedRequest::shares_prefix),
        output_hash: TokenHash::of_answers(traces.iter().map(|trace| trace.hash)),
        ..OfflineReport::default()
    }
}

fn steady_tokens_per_s(traces: &[Trace]) -> Option<f64> {
    let begin = *traces.iter().filter_map(|trace| trace.times.first()).max()?;
    let end = *traces.iter().filter_map(|trace| trace.times.last()).min()?;
    let num_tokens = traces.iter().flat_map(|trace| &trace.times).filter(|&&at| begin < at && at <= end).count();
    (num_tokens > 0).then(|| num_tokens as f64 / (end - begin).as_secs_f64())
}

#[derive(Clone)]
struct Trace {
    begun: Instant,
    /// Of its tokens.
    times: Vec<Instant>,
    hash: TokenHash,
    cached_tokens: u64,
}

impl OfflineReport {
    /// As a result file has it.
    pub fn to_run(&self) -> Run {
        let mut run = Run { output_hash: Some(self.output_hash.to_string()), ..Run::default() };
        for (name, value) in [
            ("duration_s", self.elapsed_s),
            ("output_tokens_per_s", self.output_tokens_per_s),
            ("total_tokens_per_s", (self.prompt_tokens + self.output_tokens) as f64 / self.elapsed_s),
            ("ttft_p50_ms", self.ttft_ms_p50),
            ("tpot_mean_ms", self.tpot_ms_mean),
            ("cached_share", self.cached_share()),
            ("host_waiting_share", self.host_waiting_share),
            ("not_busy_share", self.not_busy_share),
            ("not_blocked_share", self.not_blocked_share),
        ] {
            run.metric(name, value);
        }
        self.steady_tokens_per_s.into_iter().for_each(|rate| run.metric("steady_tokens_per_s", rate));
        if is_told(0.99, self.num_requests as usize) {
            run.metric("ttft_p99_ms", self.ttft_ms_p99);
        }
        self.device_seconds.iter().for_each(|(cause, seconds)| run.metric(&format!("device_{cause}_s"), *seconds));
        run.count("requests", u64::from(self.num_requests));
        run.count("prompt_tokens", self.prompt_tokens);
        run.count("output_tokens", self.output_tokens);
        run.doubt_cache(self.shares_prefixes);
        run
    }

    fn cached_share(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64
    }
}

impl Trace {
    fn new(begun: Instant) -> Trace {
        Trace { begun, times: Vec::new(), hash: TokenHash::default(), cached_tokens: 0 }
    }

    fn mean_gap_ms(&self) -> Option<f64> {
        let span = *self.times.last()? - *self.times.first()?;
        (self.times.len() > 1).then(|| span.as_secs_f64() * 1e3 / (self.times.len() - 1) as f64)
    }
}

/// An event of a request, and when it came.
struct Told {
    index: usize,
    at: Instant,
    event: Event,
    /// With the last event, for those that follow: nobody else keeps one, so that an engine that is gone is seen.
    sender: Option<mpsc::Sender<Told>>,
}

/// Stamps events on the engine thread, so that waiting for the channel is not measured.
struct Timestamps {
    index: usize,
    sender: mpsc::Sender<Told>,
}

impl Sink for Timestamps {
    fn event(&mut self, event: Event) -> Flow {
        let sender = matches!(event, Event::Finished { .. }).then(|| self.sender.clone());
        match self.sender.send(Told { index: self.index, at: Instant::now(), event, sender }) {
            Ok(()) => Flow::Continue,
            Err(_) => Flow::Stop,
        }
    }

    fn is_closed(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steady_rate_is_of_steps_that_all_requests_are_in() {
        let start = Instant::now();
        let trace = |times: &[u64]| {
            let times = times.iter().map(|ms| start + Duration::from_millis(*ms)).collect();
            Trace { times, ..Trace::new(start) }
        };
        // One prompt after the other; from 300 ms on both decode, until the first ends.
        let traces = [trace(&[100, 300, 400, 500]), trace(&[300, 400, 500, 600, 700])];
        let rate = steady_tokens_per_s(&traces).expect("they decode together");
        assert!((rate - 4.0 / 0.2).abs() < 1e-6, "{rate}");
        assert_eq!(steady_tokens_per_s(&[trace(&[100, 200]), trace(&[300, 400])]), None);
        assert_eq!(steady_tokens_per_s(&[]), None);
    }
}
