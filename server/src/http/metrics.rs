//! `/metrics` in Prometheus' text format: vLLM's names where it has one for a thing, then ours. Invariant: the engine's
//! numbers are read when asked for and kept nowhere else; only what the engine cannot know (HTTP answers, and times
//! from the arrival of a body on) is counted here. What is of a model has its name as the label `model_name`, and
//! what is of one of its engines the id of its device as `device`.

use fullbore_engine::engine::{EngineStats, Part, StepParts};
use fullbore_engine::fleet::ReplicaId;
use fullbore_engine::limits::Cause;
use fullbore_engine::worker::EngineHandle;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};
use warp::http;
use warp::http::header::{CONTENT_TYPE, HeaderValue};
use warp::reply::Response;

use super::App;
use super::error::{ApiError, Refusal};
use crate::api::ServedModel;
use crate::log::Log;

mod asked;
mod observer;
mod quantiles;
mod requests;
mod steps;
mod vllm;

use steps::{Counts, register_histogram};

pub use asked::Asked;
pub use observer::{End, Observer, ToldEnd};
pub use quantiles::{BucketCounts, Quantiles};
pub use requests::{Choices, RequestMetrics};

pub struct HttpMetrics {
    registry: Registry,
    responses: IntCounterVec,
    refused_connections: IntCounter,
    refused_requests: IntCounterVec,
    requests: IntCounterVec,
    durations: HistogramVec,
    panics: IntCounter,
}

/// What vLLM's dashboard takes means of.
const REQUEST_SECONDS: [f64; 9] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

impl Default for HttpMetrics {
    fn default() -> HttpMetrics {
        let registry = Registry::new();
        let responses = Opts::new("fullbore_http_responses_total", "HTTP responses by status.");
        let refused = "Connections refused because too many were open.";
        let refusals = Opts::new(
            "fullbore_requests_refused_total",
            "Requests answered with an error, late in a stream too, by its cause.",
        );
        let requests = Opts::new("http_requests_total", "Requests of the API that were answered.");
        let durations =
            HistogramOpts::new("http_request_duration_seconds", "From their heads to the end of the answer.");
        let durations = durations.buckets(REQUEST_SECONDS.to_vec());
        HttpMetrics {
            responses: register(&registry, IntCounterVec::new(responses, &["status"])),
            panics: register(&registry, IntCounter::new("fullbore_panics_total", "Requests that met a bug of ours.")),
            refused_connections: register(&registry, IntCounter::new("fullbore_connections_refused_total", refused)),
            refused_requests: register(&registry, IntCounterVec::new(refusals, &["cause"])),
            requests: register(&registry, IntCounterVec::new(requests, &["handler", "method", "status"])),
            durations: register(&registry, HistogramVec::new(durations, &["handler", "method"])),
            registry,
        }
    }
}

impl HttpMetrics {
    pub fn count_response<B>(&self, asked: &Asked, response: &http::Response<B>) {
        let status = response.status();
        self.responses.with_label_values(&[status.as_str()]).inc();
        if let Some(Refusal(cause)) = response.extensions().get() {
            self.refused_requests.with_label_values(&[*cause]).inc();
        }
        if let Some(labels) = asked.labels() {
            let class = format!("{}xx", status.as_u16() / 100);
            self.requests.with_label_values(&[labels[0], labels[1], class.as_str()]).inc();
        }
    }

    /// An error that ends a stream, after the status of its answer has been told.
    pub fn count_late_error(&self, error: &ApiError) {
        self.refused_requests.with_label_values(&[error.refusal().0]).inc();
    }

    /// The last of its answer has been sent, or is not wanted any more.
    pub fn count_sent(&self, asked: &Asked) {
        if let Some(labels) = asked.labels() {
            self.durations.with_label_values(&labels).observe(asked.since.elapsed().as_secs_f64());
        }
    }

    /// A panic while a request was prepared or answered; it is in the log.
    pub fn count_panic(&self) {
        self.panics.inc();
    }

    pub fn num_panics(&self) -> u64 {
        self.panics.get()
    }

    pub fn count_refused_connection(&self) {
        self.refused_connections.inc();
    }
}

pub fn metrics(app: &App) -> Response {
    let mut families = app.metrics.registry.gather();
    families.extend(server_families(app));
    if let Some(tracer) = &app.tracer {
        families.extend(tracer.registry.gather());
    }
    // One for all models: families of one name are told together.
    let registry = Registry::new();
    for model in app.models() {
        vllm::register_model(&registry, model);
        model.metrics.register(&registry);
        register_model(&registry, model);
        for (replica, engine) in (0..).map(ReplicaId).zip(model.engine.engines()) {
            register_engine(&registry, model, replica, engine);
        }
    }
    families.extend(registry.gather());
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text).expect("metrics are valid text");
    let mut response = Response::new(text.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(prometheus::TEXT_FORMAT));
    response
}

/// What is told of `name`, where the labels have `label`.
#[cfg(test)]
pub async fn value(app: &App, name: &str, label: &str) -> Option<f64> {
    use http_body_util::BodyExt;

    let told = metrics(app).into_body().collect().await.ok()?.to_bytes();
    let mut lines = std::str::from_utf8(&told).ok()?.lines();
    let line = lines.find(|line| line.starts_with(name) && line.contains(label))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Of the server, whatever its models.
fn server_families(app: &App) -> Vec<MetricFamily> {
    let registry = Registry::new();
    let held = Gauge::new("fullbore_body_bytes", "Of request bodies whose text is not read yet.");
    register(&registry, held).set(app.bodies.num_bytes() as f64);
    let dropped = IntCounter::new("fullbore_log_lines_dropped_total", "Lines of the log that were not read in time.");
    register(&registry, dropped).inc_by(app.log.as_ref().map_or(0, Log::num_dropped));
    registry.gather()
}

/// Of a model, whatever its devices.
fn register_model(registry: &Registry, model: &ServedModel) {
    let help = "Compilations of forms that answers follow.";
    let compiled = Opts::new("fullbore_grammars_compiled_total", help).const_label("model_name", &model.name);
    register(registry, IntCounter::with_opts(compiled)).inc_by(model.grammars.num_compiled());
}

fn register_engine(registry: &Registry, model: &ServedModel, replica: ReplicaId, engine: &EngineHandle) {
    let stats = engine.stats();
    let options = |name: &str, help: &str| {
        Opts::new(name, help).const_label("model_name", &model.name).const_label("device", &engine.device().id)
    };
    let waiting = model.engine.num_waiting_at(replica);
    let gauges: [(&str, &str, f64); 5] = [
        ("fullbore_requests_running", "Sequences that hold a slot.", f64::from(stats.num_running)),
        ("fullbore_requests_waiting", "Sequences that wait for admission.", waiting as f64),
        ("fullbore_grammar_bytes", "What forms of answers that have begun take.", stats.grammar_bytes as f64),
        ("fullbore_last_step_seconds", "The last step, from submission to its results.", stats.last_step_ms / 1e3),
        ("fullbore_stalled_seconds", "How long work has waited for a step.", engine.stalled_for().as_secs_f64()),
    ];
    for (name, help, value) in gauges {
        register(registry, Gauge::with_opts(options(name, help))).set(value);
    }
    for (name, help, value) in counters(&stats) {
        register(registry, IntCounter::with_opts(options(name, help))).inc_by(value);
    }
    let blocks = options("fullbore_kv_blocks", "KV blocks by state; cached ones are free for others to take.");
    let blocks = register(registry, GaugeVec::new(blocks, &["state"]));
    for (state, count) in
        [("free", stats.blocks.free), ("cached", stats.blocks.cached), ("used", stats.blocks.referenced)]
    {
        blocks.with_label_values(&[state]).set(f64::from(count));
    }
    let seconds = options("fullbore_device_seconds_total", "Wall time of the device by what it is charged to.");
    let seconds = register(registry, CounterVec::new(seconds, &["cause"]));
    for cause in Cause::ALL {
        seconds.with_label_values(&[cause.name()]).inc_by(stats.limits.total.seconds(cause));
    }
    imbalance(registry, &options, model, replica);
    let parts = options("fullbore_step_part_seconds", "Time of steps, by what is known apart.");
    step_parts(registry, parts, &stats.step_parts);
    let finished = options("fullbore_requests_finished_total", "Sequences by how they ended.");
    let finished = register(registry, IntCounterVec::new(finished, &["reason"]));
    let reasons = [
        ("stop", stats.num_stopped),
        ("length", stats.num_length),
        ("error", stats.num_failed),
        ("aborted", stats.num_aborted),
    ];
    for (reason, count) in reasons {
        finished.with_label_values(&[reason]).inc_by(count);
    }
}

/// Of one device alone there is none.
fn imbalance(registry: &Registry, options: &dyn Fn(&str, &str) -> Opts, model: &ServedModel, replica: ReplicaId) {
    let Some(charged) = model.engine.imbalance(replica) else { return };
    let seconds =
        options("fullbore_imbalance_seconds_total", "Idle time of the device while requests waited on others.");
    let seconds = register(registry, CounterVec::new(seconds, &["cause"]));
    for (idle, time) in charged {
        seconds.with_label_values(&[idle.name()]).inc_by(time.as_secs_f64());
    }
}

/// Of what is not known apart there is no time; `StepParts` says what is.
fn step_parts(registry: &Registry, options: Opts, parts: &StepParts) {
    let StepParts { prefill, decode, mixed, sampling, read_back } = parts;
    let parts =
        [("prefill", prefill), ("decode", decode), ("mixed", mixed), ("sampling", sampling), ("read_back", read_back)];
    let seconds = |ns: u64| ns as f64 / 1e9;
    let counts = parts.map(|(name, part)| {
        Counts::doubling(Some(("part", name)), seconds(Part::LEAST_NS), &part.num_by_time, seconds(part.ns))
    });
    register_histogram(registry, options, counts.into());
}

fn counters(stats: &EngineStats) -> [(&'static str, &'static str, u64); 11] {
    [
        ("fullbore_steps_total", "Steps done.", stats.num_steps),
        ("fullbore_tokens_generated_total", "Tokens generated.", stats.generated_tokens),
        ("fullbore_tokens_prefilled_total", "Tokens computed for prompts, again ones included.", stats.prefill_tokens),
        ("fullbore_prompt_tokens_total", "Prompt tokens of sequences that have ended.", stats.prompt_tokens),
        ("fullbore_prefix_cache_hit_tokens_total", "Those that the prefix cache had.", stats.cached_tokens),
        ("fullbore_preemptions_total", "Sequences sent back to wait for others.", stats.num_preemptions),
        ("fullbore_device_losses_total", "Times that the device was lost and made anew.", stats.num_device_losses),
        ("fullbore_requests_moved_total", "Sequences that went on to another device.", stats.num_moved),
        ("fullbore_kv_blocks_moved_total", "KV blocks that came from another device.", stats.num_fetched_blocks),
        ("fullbore_kv_blocks_missed_total", "KV blocks that were to come, and did not.", stats.num_missed_blocks),
        ("fullbore_swaps_total", "Those of them whose KV went to the host's memory.", stats.num_swaps),
    ]
}

/// Names and labels are constants of these files, and models have names of their own, so a refusal is a bug.
pub(crate) fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("a valid name");
    registry.register(Box::new(metric.clone())).expect("a name used once");
    metric
}
