//! What vLLM's dashboards and the routers that speak its dialect read: its names, from the engine's own numbers.
//! Invariant: a name means here what it means there; what Fullbore alone knows has its own name, in the parent module.

use prometheus::{Gauge, GaugeVec, IntCounter, Opts, Registry};

use super::register;
use super::steps::{Counts, register_histogram};
use crate::api::ServedModel;

/// Of all devices of a model together: routers read one series of each name, and take its engine for the worker.
pub fn register_model(registry: &Registry, model: &ServedModel) {
    let (stats, config) = (model.engine.stats(), model.engine.config());
    let options = |name: &str, help: &str| {
        Opts::new(name, help).const_label("model_name", &model.name).const_label("engine", "0")
    };
    let num_waiting = model.engine.num_waiting() as f64;
    let usage = model.engine.kv_usage();
    let gauges = [
        ("vllm:num_requests_running", "Sequences that hold a slot.", f64::from(stats.num_running)),
        ("vllm:num_requests_waiting", "Sequences that wait for admission.", num_waiting),
        ("vllm:kv_cache_usage_perc", "Share of the KV blocks that running sequences hold, 1 being all.", usage),
        ("vllm:gpu_cache_usage_perc", "The same under vLLM's older name.", usage),
    ];
    for (name, help, value) in gauges {
        register(registry, Gauge::with_opts(options(name, help))).set(value);
    }
    let waiting = options("vllm:num_requests_waiting_by_reason", "Those by what they wait for: nothing defers them.");
    let waiting = register(registry, GaugeVec::new(waiting, &["reason"]));
    waiting.with_label_values(&["capacity"]).set(num_waiting);
    waiting.with_label_values(&["deferred"]).set(0.0);
    let counters = [
        ("vllm:num_preemptions_total", "Sequences sent back to wait for others.", stats.num_preemptions),
        ("vllm:generation_tokens_total", "Tokens generated.", stats.generated_tokens),
        ("vllm:corrupted_requests_total", "Sequences that output which was not finite ended.", stats.num_not_finite),
    ];
    for (name, help, value) in counters {
        register(registry, IntCounter::with_opts(options(name, help))).inc_by(value);
    }
    let of_steps =
        options("vllm:iteration_tokens_total", "Tokens of a step, those of prompts and of answers together.");
    let tokens = &stats.step_tokens;
    register_histogram(registry, of_steps, vec![Counts::doubling(None, 1.0, &tokens.num_steps, tokens.sum as f64)]);
    let cache = options("vllm:cache_config_info", "How the KV cache is laid out; always 1.");
    let cache = register(registry, GaugeVec::new(cache, &["block_size", "num_gpu_blocks", "enable_prefix_caching"]));
    let prefix = if config.prefix_cache { "True" } else { "False" };
    let sizes = [config.block_size, config.num_blocks].map(|size| size.to_string());
    cache.with_label_values(&[&sizes[0], &sizes[1], prefix]).set(1.0);
}
