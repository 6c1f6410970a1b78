//! What vLLM's dashboards and the routers that speak its dialect read: its names, from the engine's own numbers.
//! Invariant: a name means here what it means there; what Fullbore alone knows has its own name, in the parent module.

use prometheus::{Gauge, GaugeVec, IntCounter, IntCounterVec, Opts, Registry};

use super::register;
use crate::api::ServedModel;

pub fn register_engine(registry: &Registry, model: &ServedModel) {
    let stats = model.engine.stats();
    let options = |name: &str, help: &str| {
        Opts::new(name, help).const_label("model_name", &model.name).const_label("engine", "0")
    };
    let blocks = stats.blocks;
    let num_blocks = blocks.free + blocks.cached + blocks.referenced;
    let gauges = [
        ("vllm:num_requests_running", "Sequences that hold a slot.", f64::from(stats.num_running)),
        ("vllm:num_requests_waiting", "Sequences that wait for admission.", model.engine.num_waiting() as f64),
        (
            "vllm:kv_cache_usage_perc",
            "Share of the KV blocks that running sequences hold, 1 being all.",
            f64::from(blocks.referenced) / f64::from(num_blocks.max(1)),
        ),
    ];
    for (name, help, value) in gauges {
        register(registry, Gauge::with_opts(options(name, help))).set(value);
    }
    let counters = [
        ("vllm:num_preemptions_total", "Sequences sent back to wait for others.", stats.num_preemptions),
        ("vllm:prompt_tokens_total", "Tokens computed for prompts, again ones included.", stats.prefill_tokens),
        ("vllm:generation_tokens_total", "Tokens generated.", stats.generated_tokens),
        ("vllm:prefix_cache_queries_total", "Prompt tokens of sequences that have ended.", stats.prompt_tokens),
        ("vllm:prefix_cache_hits_total", "Those that the prefix cache had.", stats.cached_tokens),
    ];
    for (name, help, value) in counters {
        register(registry, IntCounter::with_opts(options(name, help))).inc_by(value);
    }
    let ended = options("vllm:request_success_total", "Sequences that ended well, by how.");
    let ended = register(registry, IntCounterVec::new(ended, &["finished_reason"]));
    for (reason, count) in [("stop", stats.num_stopped), ("length", stats.num_length), ("abort", stats.num_aborted)] {
        ended.with_label_values(&[reason]).inc_by(count);
    }
    let config = model.engine.config();
    let cache = options("vllm:cache_config_info", "How the KV cache is laid out; always 1.");
    let cache = register(registry, GaugeVec::new(cache, &["block_size", "num_gpu_blocks", "enable_prefix_caching"]));
    let prefix = if config.prefix_cache { "True" } else { "False" };
    let sizes = [config.block_size, config.num_blocks].map(|size| size.to_string());
    cache.with_label_values(&[&sizes[0], &sizes[1], prefix]).set(1.0);
}
