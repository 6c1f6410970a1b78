//! What requests took, as histograms by vLLM's names. Invariant: a request is counted once, when it ends well; times
//! are taken where the engine hands its events over, so that a client that reads slowly lengthens nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fullbore_engine::request::{Event, FinishReason};
use prometheus::{Histogram, HistogramOpts, Registry};

use super::{BucketCounts, register};

pub struct RequestMetrics {
    pub(super) registry: Registry,
    first_token: Histogram,
    next_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    generated_tokens: Histogram,
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
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let options = options.const_label("model_name", model).const_label("engine", "0");
            register(&registry, Histogram::with_opts(options))
        };
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
            registry,
        }
    }

    /// Times to the first token, and between two.
    pub fn latencies(&self) -> [BucketCounts; 2] {
        [&self.first_token, &self.next_token].map(BucketCounts::of)
    }
}

/// Watches one sequence's events.
pub struct Observer {
    metrics: Arc<RequestMetrics>,
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Observer {
    pub fn new(metrics: Arc<RequestMetrics>, arrived: Instant) -> Observer {
        Observer { metrics, arrived, started: None, first_token: None, last_token: None }
    }

    pub fn event(&mut self, event: &Event) {
        let now = Instant::now();
        match event {
            Event::Started { .. } => self.started = Some(now),
            Event::Prompt(_) | Event::Pooled(_) => {}
            Event::Token { .. } => {
                match self.last_token.replace(now) {
                    Some(last) => observe(&self.metrics.next_token, now - last),
                    None => observe(&self.metrics.first_token, now - self.arrived),
                }
                self.first_token.get_or_insert(now);
            }
            Event::Finished { reason: FinishReason::Error(_) | FinishReason::DeviceLost(_), .. } => {}
            Event::Finished { usage, .. } => {
                let started = self.started.unwrap_or(now);
                let first_token = self.first_token.unwrap_or(now);
                observe(&self.metrics.queue, started - self.arrived);
                observe(&self.metrics.prefill, first_token - started);
                observe(&self.metrics.decode, now - first_token);
                observe(&self.metrics.whole, now - self.arrived);
                self.metrics.prompt_tokens.observe(f64::from(usage.prompt_tokens));
                self.metrics.generated_tokens.observe(f64::from(usage.completion_tokens));
            }
        }
    }
}

fn observe(histogram: &Histogram, time: Duration) {
    histogram.observe(time.as_secs_f64());
}
