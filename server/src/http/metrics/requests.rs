//! What requests took: histograms by vLLM's names, and a line of the log for each. Invariant: a sequence is counted and
//! logged once, in the histograms where it ended well; times are taken where the engine hands its events over, so that
//! a client that reads slowly lengthens nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fullbore_engine::request::{Event, FinishReason, Request};
use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry};

use super::{BucketCounts, register};
use crate::traces::{EndedSequence, Trace};

pub struct RequestMetrics {
    model: String,
    first_token: Histogram,
    next_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    generated_tokens: Histogram,
    aborted: IntCounterVec,
}

/// Seconds: from a step of a small model to a long answer of a large one; close together, for percentiles are read off
/// them.
const SECONDS: [f64; 31] = [
    0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0,
];
const TOKENS: [f64; 12] = [1.0, 8.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0];

impl RequestMetrics {
    pub fn new(model: &str) -> RequestMetrics {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let options = options.const_label("model_name", model).const_label("engine", "0");
            Histogram::with_opts(options).expect("a valid name")
        };
        let aborted =
            Opts::new("fullbore_requests_aborted_total", "Sequences whose client left, by what they were at.");
        let aborted = aborted.const_label("model_name", model);
        let aborted = IntCounterVec::new(aborted, &["phase"]).expect("a valid name");
        for phase in ["queue", "prefill", "decode"] {
            // It is there from the start, at 0.
            aborted.with_label_values(&[phase]);
        }
        let seconds = |name, help| histogram(name, help, &SECONDS);
        let tokens = |name, help| histogram(name, help, &TOKENS);
        RequestMetrics {
            first_token: seconds("vllm:time_to_first_token_seconds", "From a request's body to its first token."),
            next_token: seconds("vllm:inter_token_latency_seconds", "Between two tokens of a sequence."),
            whole: seconds("vllm:e2e_request_latency_seconds", "From a request's body to its end."),
            queue: seconds("vllm:request_queue_time_seconds", "From a request's body to its first step."),
            prefill: seconds("vllm:request_prefill_time_seconds", "From its first step to its first token."),
            decode: seconds("vllm:request_decode_time_seconds", "From its first token to its end."),
            prompt_tokens: tokens("vllm:request_prompt_tokens", "Tokens of a prompt."),
            generated_tokens: tokens("vllm:request_generation_tokens", "Tokens of an answer."),
            aborted,
            model: model.to_owned(),
        }
    }

    pub(super) fn register(&self, registry: &Registry) {
        let times = [&self.first_token, &self.next_token, &self.whole, &self.queue, &self.prefill, &self.decode];
        for histogram in times.into_iter().chain([&self.prompt_tokens, &self.generated_tokens]) {
            register(registry, Ok(histogram.clone()));
        }
        register(registry, Ok(self.aborted.clone()));
    }

    /// Times to the first token, and between two.
    pub fn latencies(&self) -> [BucketCounts; 2] {
        [&self.first_token, &self.next_token].map(BucketCounts::of)
    }
}

/// Watches one sequence's events, and ends with a line of the log. Dropped before the end it tells of a client that
/// left.
pub struct Observer {
    metrics: Arc<RequestMetrics>,
    /// As clients know it; choices of one request share it.
    request: String,
    num_prompt_tokens: usize,
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    cached_tokens: u32,
    num_tokens: u32,
    /// Set where the text has ended before the engine's sequence did.
    stopped: Arc<AtomicBool>,
    is_ended: bool,
    /// Where somebody collects traces.
    trace: Option<Trace>,
}

impl Observer {
    pub fn new(metrics: Arc<RequestMetrics>, request: &Request, arrived: Instant, trace: Option<Trace>) -> Observer {
        Observer {
            metrics,
            request: request.id.clone(),
            num_prompt_tokens: request.prompt.len(),
            arrived,
            started: None,
            first_token: None,
            last_token: None,
            cached_tokens: 0,
            num_tokens: 0,
            stopped: Arc::default(),
            is_ended: false,
            trace,
        }
    }

    /// To be set by who finds a stop string: the sequence then ends because it is left, and has ended well.
    pub fn stopped(&self) -> Arc<AtomicBool> {
        self.stopped.clone()
    }

    pub fn event(&mut self, event: &Event) {
        let now = Instant::now();
        match event {
            Event::Started { cached_tokens } => {
                self.started.get_or_insert(now);
                self.cached_tokens = *cached_tokens;
            }
            Event::Prompt(_) | Event::Pooled(_) => {}
            Event::Token { .. } => {
                self.num_tokens += 1;
                match self.last_token.replace(now) {
                    Some(last) => observe(&self.metrics.next_token, now - last),
                    None => observe(&self.metrics.first_token, now - self.arrived),
                }
                self.first_token.get_or_insert(now);
            }
            Event::Finished { reason, .. } => self.end(reason.into(), now),
        }
    }

    fn end(&mut self, end: End, now: Instant) {
        self.is_ended = true;
        let (started, first_token) = (self.started.unwrap_or(now), self.first_token.unwrap_or(now));
        match end {
            End::Stop | End::Length => {
                observe(&self.metrics.queue, started - self.arrived);
                observe(&self.metrics.prefill, first_token - started);
                observe(&self.metrics.decode, now - first_token);
                observe(&self.metrics.whole, now - self.arrived);
                self.metrics.prompt_tokens.observe(self.num_prompt_tokens as f64);
                self.metrics.generated_tokens.observe(f64::from(self.num_tokens));
            }
            End::Aborted(phase) => self.metrics.aborted.with_label_values(&[phase]).inc(),
            End::Error | End::DeviceLost => {}
        }
        let since_arrival = |then: Instant| (then - self.arrived).as_millis() as u64;
        tracing::info!(
            target: "fullbore::request",
            model = self.metrics.model,
            request = self.request,
            reason = end.name(),
            phase = end.phase(),
            prompt_tokens = self.num_prompt_tokens,
            cached_tokens = self.cached_tokens,
            generated_tokens = self.num_tokens,
            queue_ms = self.started.map(since_arrival),
            first_token_ms = self.first_token.map(since_arrival),
            total_ms = since_arrival(now),
            "finished"
        );
        if let Some(trace) = self.trace.take() {
            trace.end(self.ended(end, now));
        }
    }

    fn ended(&self, end: End, ended: Instant) -> EndedSequence {
        EndedSequence {
            request: self.request.clone(),
            arrived: self.arrived,
            started: self.started,
            first_token: self.first_token,
            ended,
            reason: end.name(),
            has_failed: matches!(end, End::Error | End::DeviceLost),
            prompt_tokens: self.num_prompt_tokens as u64,
            cached_tokens: u64::from(self.cached_tokens),
            generated_tokens: u64::from(self.num_tokens),
        }
    }

    /// What the sequence is at.
    fn phase(&self) -> &'static str {
        match (self.started, self.first_token) {
            (None, _) => "queue",
            (Some(_), None) => "prefill",
            (Some(_), Some(_)) => "decode",
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        if !self.is_ended {
            let stopped = self.stopped.load(Ordering::Relaxed);
            self.end(if stopped { End::Stop } else { End::Aborted(self.phase()) }, Instant::now());
        }
    }
}

/// How a sequence ended.
#[derive(Clone, Copy)]
enum End {
    Stop,
    Length,
    /// Its client left while it was at this.
    Aborted(&'static str),
    Error,
    DeviceLost,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            End::Stop => "stop",
            End::Length => "length",
            End::Aborted(_) => "aborted",
            End::Error => "error",
            End::DeviceLost => "device_lost",
        }
    }

    fn phase(self) -> Option<&'static str> {
        if let End::Aborted(phase) = self { Some(phase) } else { None }
    }
}

impl From<&FinishReason> for End {
    fn from(reason: &FinishReason) -> End {
        match reason {
            FinishReason::Stop => End::Stop,
            FinishReason::Length => End::Length,
            FinishReason::Error(_) => End::Error,
            FinishReason::DeviceLost(_) => End::DeviceLost,
        }
    }
}

fn observe(histogram: &Histogram, time: Duration) {
    histogram.observe(time.as_secs_f64());
}
