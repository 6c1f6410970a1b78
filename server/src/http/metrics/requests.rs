//! What requests took and how they ended, by vLLM's names. Invariant: a name means here what it means there; what of a
//! sequence is told once is told by its [`super::Observer`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

use super::{BucketCounts, register};

pub struct RequestMetrics {
    pub(super) model: String,
    pub(super) first_token: Histogram,
    pub(super) next_token: Histogram,
    pub(super) each_token: Histogram,
    pub(super) whole: Histogram,
    pub(super) queue: Histogram,
    pub(super) prefill: Histogram,
    pub(super) decode: Histogram,
    pub(super) inference: Histogram,
    pub(super) prompt_tokens: Histogram,
    pub(super) computed_tokens: Histogram,
    pub(super) generated_tokens: Histogram,
    pub(super) max_tokens: Histogram,
    longest: Histogram,
    num_choices: Histogram,
    prompts: IntCounter,
    prompts_by_source: IntCounterVec,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    ended: IntCounterVec,
    aborted: IntCounterVec,
    /// Sequences that have not ended.
    num_open: AtomicU64,
}

/// Seconds: from a step of a small model to a long answer of a large one; close together, for percentiles are read off
/// them, and with those that vLLM's dashboard holds answers to.
const SECONDS: [f64; 34] = [
    0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3,
    0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0,
];
const TOKENS: [f64; 12] = [1.0, 8.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0];
const CHOICES: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

/// vLLM's sources of prompt tokens; nothing comes from elsewhere here.
const SOURCES: [&str; 3] = ["local_compute", "local_cache_hit", "external_kv_transfer"];
/// Its ends of sequences, but for `repetition`, which nobody looks for here.
const ENDS: [&str; 4] = ["stop", "length", "abort", "error"];

impl RequestMetrics {
    pub fn new(model: &str) -> RequestMetrics {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let options = options.const_label("model_name", model).const_label("engine", "0");
            Histogram::with_opts(options).expect("a valid name")
        };
        let options = |name: &str, help: &str| Opts::new(name, help).const_label("model_name", model);
        let of_vllm = |name, help| options(name, help).const_label("engine", "0");
        let counter = |name, help| IntCounter::with_opts(of_vllm(name, help)).expect("a valid name");
        let counters = |options: Opts, label, values: &[&str]| {
            let counters = IntCounterVec::new(options, &[label]).expect("a valid name");
            // They are there from the start, at 0.
            values.iter().for_each(|value| drop(counters.with_label_values(&[value])));
            counters
        };
        let seconds = |name, help| histogram(name, help, &SECONDS);
        let tokens = |name, help| histogram(name, help, &TOKENS);
        let by_source = of_vllm("vllm:prompt_tokens_by_source_total", "Prompt tokens by where their KV came from.");
        let ended = of_vllm("vllm:request_success_total", "Sequences that have ended, by how.");
        let aborted = options("fullbore_requests_aborted_total", "Sequences whose client left, by what they were at.");
        RequestMetrics {
            first_token: seconds("vllm:time_to_first_token_seconds", "From a request's body to its first token."),
            next_token: seconds("vllm:inter_token_latency_seconds", "Between two tokens of a sequence."),
            each_token: seconds(
                "vllm:request_time_per_output_token_seconds",
                "Mean time of a sequence's tokens after its first; 0 where there is one alone.",
            ),
            whole: seconds("vllm:e2e_request_latency_seconds", "From a request's body to its end."),
            queue: seconds("vllm:request_queue_time_seconds", "From a request's body to its first step."),
            prefill: seconds("vllm:request_prefill_time_seconds", "From its first step to its first token."),
            decode: seconds("vllm:request_decode_time_seconds", "From its first token to its end."),
            inference: seconds("vllm:request_inference_time_seconds", "From its first step to its end."),
            prompt_tokens: tokens("vllm:request_prompt_tokens", "Tokens of a prompt."),
            computed_tokens: tokens(
                "vllm:request_prefill_kv_computed_tokens",
                "Tokens of a prompt that the prefix cache did not have.",
            ),
            generated_tokens: tokens("vllm:request_generation_tokens", "Tokens of an answer."),
            max_tokens: tokens("vllm:request_params_max_tokens", "Tokens that an answer was allowed."),
            longest: tokens("vllm:request_max_num_generation_tokens", "Tokens of the longest answer to a prompt."),
            num_choices: histogram("vllm:request_params_n", "Answers to a prompt that were asked for.", &CHOICES),
            prompts: counter(
                "vllm:prompt_tokens_total",
                "Tokens of prompts that have been read, cached ones included.",
            ),
            prompts_by_source: counters(by_source, "source", &SOURCES),
            prefix_queries: counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
            prefix_hits: counter("vllm:prefix_cache_hits_total", "Those of them that it had."),
            ended: counters(ended, "finished_reason", &ENDS),
            aborted: counters(aborted, "phase", &["queue", "prefill", "decode"]),
            num_open: AtomicU64::new(0),
            model: model.to_owned(),
        }
    }

    pub(super) fn register(&self, registry: &Registry) {
        let times = [&self.first_token, &self.next_token, &self.each_token, &self.whole];
        let phases = [&self.queue, &self.prefill, &self.decode, &self.inference];
        let tokens = [&self.prompt_tokens, &self.computed_tokens, &self.generated_tokens, &self.max_tokens];
        let of_prompts = [&self.longest, &self.num_choices];
        for histogram in times.into_iter().chain(phases).chain(tokens).chain(of_prompts) {
            register(registry, Ok(histogram.clone()));
        }
        for counter in [&self.prompts, &self.prefix_queries, &self.prefix_hits] {
            register(registry, Ok(counter.clone()));
        }
        for counters in [&self.prompts_by_source, &self.ended, &self.aborted] {
            register(registry, Ok(counters.clone()));
        }
    }

    /// Sequences that run or wait, as of now.
    pub fn num_open(&self) -> u64 {
        self.num_open.load(Ordering::Relaxed)
    }

    pub(super) fn count_begin(&self) {
        self.num_open.fetch_add(1, Ordering::Relaxed);
    }

    /// Times to the first token, and between two.
    pub fn latencies(&self) -> [BucketCounts; 2] {
        [&self.first_token, &self.next_token].map(BucketCounts::of)
    }

    /// A sequence has its first slot, and the prefix cache was asked for its prompt.
    pub(super) fn count_start(&self, num_prompt_tokens: usize, cached_tokens: u32) {
        self.prefix_queries.inc_by(num_prompt_tokens as u64);
        self.prefix_hits.inc_by(u64::from(cached_tokens));
    }

    /// A sequence's prompt has been read.
    pub(super) fn count_prompt(&self, num_prompt_tokens: usize, cached_tokens: u32) {
        let (num_tokens, cached) = (num_prompt_tokens as u64, u64::from(cached_tokens));
        self.prompts.inc_by(num_tokens);
        let of = |source| self.prompts_by_source.with_label_values(&[source]);
        of("local_compute").inc_by(num_tokens.saturating_sub(cached));
        of("local_cache_hit").inc_by(cached);
    }

    /// A sequence neither runs nor waits any more.
    pub(super) fn count_left(&self) {
        self.num_open.fetch_sub(1, Ordering::Relaxed);
    }

    /// How a sequence ended: one of [`ENDS`], and where its client left what it was at.
    pub(super) fn count_end(&self, end: &str, phase: Option<&str>) {
        self.ended.with_label_values(&[end]).inc();
        if let Some(phase) = phase {
            self.aborted.with_label_values(&[phase]).inc();
        }
    }
}

/// The choices of one prompt, whose sequences are observed one by one: told together, when the last of them is gone and
/// any has ended well.
pub struct Choices {
    metrics: Arc<RequestMetrics>,
    num_choices: AtomicU32,
    /// Tokens of the longest that ended well; 0 where none has.
    longest: AtomicU32,
}

impl Choices {
    pub fn new(metrics: Arc<RequestMetrics>) -> Choices {
        Choices { metrics, num_choices: AtomicU32::new(0), longest: AtomicU32::new(0) }
    }

    pub(super) fn metrics(&self) -> &RequestMetrics {
        &self.metrics
    }

    pub(super) fn count(&self) {
        self.num_choices.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn ended_well(&self, num_tokens: u32) {
        self.longest.fetch_max(num_tokens, Ordering::Relaxed);
    }
}

impl Drop for Choices {
    fn drop(&mut self) {
        let longest = *self.longest.get_mut();
        if longest > 0 {
            self.metrics.longest.observe(f64::from(longest));
            self.metrics.num_choices.observe(f64::from(*self.num_choices.get_mut()));
        }
    }
}
