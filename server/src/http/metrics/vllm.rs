//! What vLLM's dashboards and the routers that speak its dialect read: its names, from the engine's own numbers.
//! Invariant: a name means here what it means there; what Fullbore alone knows has its own name, in the parent module.

use fullbore_engine::engine::StepTokens;
use fullbore_engine::fleet::ReplicaId;
use fullbore_engine::worker::EngineHandle;
use prometheus::core::{Collector, Desc, Describer};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Gauge, GaugeVec, IntCounter, Opts, Registry};

use super::register;
use crate::api::ServedModel;

pub fn register_engines(registry: &Registry, model: &ServedModel) {
    for (replica, engine) in (0..).map(ReplicaId).zip(model.engine.engines()) {
        register_engine(registry, model, replica, engine);
    }
}

/// By the number that it has among the model's.
fn register_engine(registry: &Registry, model: &ServedModel, replica: ReplicaId, engine: &EngineHandle) {
    let stats = engine.stats();
    let number = replica.0.to_string();
    let options = |name: &str, help: &str| {
        Opts::new(name, help).const_label("model_name", &model.name).const_label("engine", &number)
    };
    let num_waiting = model.engine.num_waiting_at(replica) as f64;
    let blocks = stats.blocks;
    let num_blocks = blocks.free + blocks.cached + blocks.referenced;
    let gauges = [
        ("vllm:num_requests_running", "Sequences that hold a slot.", f64::from(stats.num_running)),
        ("vllm:num_requests_waiting", "Sequences that wait for admission.", num_waiting),
        (
            "vllm:kv_cache_usage_perc",
            "Share of the KV blocks that running sequences hold, 1 being all.",
            f64::from(blocks.referenced) / f64::from(num_blocks.max(1)),
        ),
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
    register(registry, of_steps.describe().map(|desc| StepHistogram { desc, tokens: stats.step_tokens }));
    let config = engine.config();
    let cache = options("vllm:cache_config_info", "How the KV cache is laid out; always 1.");
    let cache = register(registry, GaugeVec::new(cache, &["block_size", "num_gpu_blocks", "enable_prefix_caching"]));
    let prefix = if config.prefix_cache { "True" } else { "False" };
    let sizes = [config.block_size, config.num_blocks].map(|size| size.to_string());
    cache.with_label_values(&[&sizes[0], &sizes[1], prefix]).set(1.0);
}

/// What the engine counts in buckets of its own.
#[derive(Clone)]
struct StepHistogram {
    desc: Desc,
    tokens: StepTokens,
}

impl Collector for StepHistogram {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut num_steps = 0;
        let mut buckets = Vec::new();
        for (exponent, &more) in self.tokens.num_steps.iter().enumerate() {
            num_steps += more;
            // The last has no bound.
            if exponent + 1 < StepTokens::NUM_BUCKETS {
                let mut bucket = Bucket::default();
                bucket.set_upper_bound((1_u64 << exponent) as f64);
                bucket.set_cumulative_count(num_steps);
                buckets.push(bucket);
            }
        }
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets);
        histogram.set_sample_count(num_steps);
        histogram.set_sample_sum(self.tokens.sum as f64);
        let mut labels: Vec<LabelPair> = self.desc.const_label_pairs.clone();
        labels.sort();
        let mut metric = Metric::from_label(labels);
        metric.set_histogram(histogram);
        let mut family = MetricFamily::default();
        family.set_name(self.desc.fq_name.clone());
        family.set_help(self.desc.help.clone());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(vec![metric]);
        vec![family]
    }
}
