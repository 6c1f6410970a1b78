//! What `/metrics` counts, and that vLLM's dashboards find there what they read.

use super::*;

#[test]
fn metrics_count_what_happened() {
    let server = Setup::default().start();
    for _ in 0..2 {
        server.complete(json!({"prompt": "count these tokens, all of them", "max_tokens": 10, "ignore_eos": true}));
    }
    server.get("/nothing");
    let reply = server.get("/metrics");
    assert!(reply.head.contains("content-type: text/plain"), "{}", reply.head);
    let text = reply.text();
    let known = ["#", "fullbore_", "vllm:", "http_request"];
    assert!(text.lines().all(|line| known.iter().any(|start| line.starts_with(start))), "{text}");
    // A client may have its answer before the engine has told of the step.
    server.wait_for("20 tokens", |server| server.metric("fullbore_tokens_generated_total") == 20.0);
    assert_eq!(server.metric("fullbore_requests_finished_total{reason=\"length\"}"), 2.0);
    assert_eq!(server.metric("fullbore_requests_running"), 0.0);
    assert_eq!(server.metric("fullbore_requests_waiting"), 0.0);
    assert_eq!(server.metric("fullbore_http_responses_total{status=\"404\"}"), 1.0);
    let of_model = |name: &str| server.metric(&format!("vllm:{name}{{engine=\"0\",model_name=\"sim-model\"}}"));
    for (name, count) in [
        ("time_to_first_token_seconds_count", 2.0),
        ("inter_token_latency_seconds_count", 18.0),
        ("e2e_request_latency_seconds_count", 2.0),
        ("request_queue_time_seconds_count", 2.0),
        ("request_prefill_time_seconds_count", 2.0),
        ("request_decode_time_seconds_count", 2.0),
        ("request_generation_tokens_sum", 20.0),
        ("generation_tokens_total", 20.0),
        ("num_requests_running", 0.0),
        ("num_requests_waiting", 0.0),
        ("kv_cache_usage_perc", 0.0),
    ] {
        assert_eq!(of_model(name), count, "{name}");
    }
    let parts = ["request_queue_time", "request_prefill_time", "request_decode_time"];
    let parts: f64 = parts.iter().map(|part| of_model(&format!("{part}_seconds_sum"))).sum();
    let whole = of_model("e2e_request_latency_seconds_sum");
    assert!((parts - whole).abs() < 1e-6, "{parts} of {whole}");
    assert!(of_model("prefix_cache_hits_total") > 0.0);
    assert!(server.metric("fullbore_steps_total") >= 20.0);
    assert!(server.metric("fullbore_prefix_cache_hit_tokens_total") > 0.0);
    let blocks =
        ["free", "cached", "used"].map(|state| server.metric(&format!("fullbore_kv_blocks{{state=\"{state}\"}}")));
    assert_eq!(blocks.iter().sum::<f64>(), 1024.0);
}

/// What vLLM's own Grafana dashboards read (`examples/observability` of its repository, November 2026), but for what is
/// not here at all: adapters, speculation, images, caches elsewhere.
const READ_BY_VLLM_DASHBOARDS: [(&str, &str); 22] = [
    ("vllm:num_requests_running", "gauge"),
    ("vllm:num_requests_waiting", "gauge"),
    ("vllm:num_requests_waiting_by_reason", "gauge"),
    ("vllm:kv_cache_usage_perc", "gauge"),
    ("vllm:prompt_tokens_total", "counter"),
    ("vllm:prompt_tokens_by_source_total", "counter"),
    ("vllm:generation_tokens_total", "counter"),
    ("vllm:prefix_cache_queries_total", "counter"),
    ("vllm:prefix_cache_hits_total", "counter"),
    ("vllm:num_preemptions_total", "counter"),
    ("vllm:request_success_total", "counter"),
    ("vllm:time_to_first_token_seconds", "histogram"),
    ("vllm:inter_token_latency_seconds", "histogram"),
    ("vllm:request_time_per_output_token_seconds", "histogram"),
    ("vllm:e2e_request_latency_seconds", "histogram"),
    ("vllm:request_queue_time_seconds", "histogram"),
    ("vllm:request_prefill_time_seconds", "histogram"),
    ("vllm:request_decode_time_seconds", "histogram"),
    ("vllm:request_prompt_tokens", "histogram"),
    ("vllm:request_generation_tokens", "histogram"),
    ("vllm:request_max_num_generation_tokens", "histogram"),
    ("vllm:iteration_tokens_total", "histogram"),
];

#[test]
fn what_vllms_dashboards_read_is_there() {
    let server = Setup::default().start();
    server.complete(json!({"prompt": "x", "max_tokens": 2}));
    let text = server.get("/metrics").text();
    let of_http = [("http_requests_total", "counter"), ("http_request_duration_seconds", "histogram")];
    for (name, kind) in READ_BY_VLLM_DASHBOARDS.into_iter().chain(of_http) {
        assert!(text.contains(&format!("\n# TYPE {name} {kind}\n")), "{name}, a {kind}, in:\n{text}");
        let samples = text.lines().filter(|line| line.starts_with(name));
        let is_of_model = |line: &str| line.contains("model_name=\"sim-model\"") && line.contains("engine=\"0\"");
        assert!(samples.into_iter().all(|line| is_of_model(line) || name.starts_with("http")), "{name}");
    }
    // Whoever looks for one finds what it is.
    let told = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md")).expect("a page");
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    for name in names {
        assert!(told.contains(&format!("`{name}`")), "docs/metrics.md does not have {name}");
    }
    // Values that their expressions ask for; of a histogram, bounds that an answer may be held to.
    let of = |name: &str, label: &str, values: &[&str]| {
        for value in values {
            server.metric(&format!("{name}{{{label}=\"{value}\"}}"));
        }
    };
    of("vllm:request_success_total", "finished_reason", &["stop", "length", "abort", "error"]);
    of("vllm:num_requests_waiting_by_reason", "reason", &["capacity", "deferred"]);
    of("vllm:prompt_tokens_by_source_total", "source", &["local_compute", "local_cache_hit", "external_kv_transfer"]);
    of("vllm:time_to_first_token_seconds_bucket", "le", &["0.1", "0.25", "0.5", "0.75", "1", "2.5", "5", "10"]);
    let bounds = ["0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5"];
    of("vllm:request_time_per_output_token_seconds_bucket", "le", &bounds);
    of("http_requests_total", "status", &["2xx"]);
}

#[test]
fn vllms_names_mean_what_they_mean_there() {
    let server = Setup::default().start();
    let metric = |name: &str| server.metric(&format!("vllm:{name}"));
    let body = json!({"prompt": vec![50; 100], "max_tokens": 8, "ignore_eos": true});
    server.complete(body.clone());
    let again = server.complete(json!({"prompt": vec![50; 100], "max_tokens": 5, "ignore_eos": true, "n": 3}));
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 96);
    server.wait_for("both to end", |server| server.metric("vllm:request_params_n_count") == 2.0);
    // Of every choice, cached or not; a sequence is a request there.
    assert_eq!(metric("prompt_tokens_total"), 400.0);
    let sources = ["local_compute", "local_cache_hit"];
    let sources = sources.map(|source| metric(&format!("prompt_tokens_by_source_total{{source=\"{source}\"}}")));
    assert_eq!((sources, metric("request_prefill_kv_computed_tokens_sum")), ([112.0, 288.0], 112.0));
    assert_eq!((metric("prefix_cache_queries_total"), metric("prefix_cache_hits_total")), (400.0, 288.0));
    assert_eq!((metric("request_params_n_sum"), metric("request_max_num_generation_tokens_sum")), (4.0, 13.0));
    assert_eq!((metric("request_generation_tokens_sum"), metric("request_params_max_tokens_sum")), (23.0, 23.0));
    let steps = server.metric("fullbore_steps_total");
    assert_eq!(
        (metric("iteration_tokens_total_count"), metric("iteration_tokens_total_bucket{le=\"16384\"}")),
        (steps, steps)
    );
    // A prompt's tokens once, and each answer's but the last, at least.
    assert!(metric("iteration_tokens_total_sum") >= 112.0 + 19.0);
    let times = ["request_prefill_time_seconds_sum", "request_decode_time_seconds_sum"];
    let inference = metric("request_inference_time_seconds_sum");
    assert!((times.iter().map(|name| metric(name)).sum::<f64>() - inference).abs() < 1e-6);
    // A step is of one kind, and each was read back.
    let of_parts =
        |name: &str| ["prefill", "decode", "mixed"].map(|part| server.metric(&format!("{name}{{part=\"{part}\"}}")));
    let passes: f64 = of_parts("fullbore_step_part_seconds_count").iter().sum();
    let read_back = server.metric("fullbore_step_part_seconds_count{part=\"read_back\"}");
    assert_eq!((passes, read_back), (steps, steps));
    for part in ["prefill", "decode", "mixed", "sampling", "read_back"] {
        let below = |bound: &str| {
            server.metric(&format!("fullbore_step_part_seconds_bucket{{le=\"{bound}\",part=\"{part}\"}}"))
        };
        let bounds = ["0.000015625", "0.001", "0.016", "1.024", "4.096", "+Inf"].map(below);
        let count = server.metric(&format!("fullbore_step_part_seconds_count{{part=\"{part}\"}}"));
        assert!(bounds.is_sorted() && bounds[5] == count, "{part}: {bounds:?} of {count}");
    }
    // A text that a stop string ends has ended well.
    let stops = json!(["a", "e", "i", "o", "u", " ", "s", "t", "r", "n"]);
    server.complete(json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stop": stops}));
    let ended = |reason: &str| metric(&format!("request_success_total{{finished_reason=\"{reason}\"}}"));
    server.wait_for("the third to end", |server| server.metric("vllm:request_params_n_count") == 3.0);
    assert_eq!((ended("length"), ended("stop"), ended("abort"), ended("error")), (4.0, 1.0, 0.0, 0.0));
}

#[test]
fn errors_late_in_a_stream_are_counted_by_cause() {
    let tokenizer = Bundle::simulated().tokenizer;
    let poisonous_token = (0..).find(|id| tokenizer.token(TokenId(*id)) == Some("I")).expect("a letter's token");
    let sim = SimOptions { poisonous_token: Some(poisonous_token), ..SimOptions::default() };
    // So slow that no answer ends before the error of another.
    let server = Setup { sim, pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    let said = json!([{"role": "user", "content": "I"}]);
    let asked = [
        ("/v1/completions", json!({"prompt": "I"})),
        ("/v1/chat/completions", json!({"messages": said})),
        ("/v1/messages", json!({"messages": said, "max_tokens": 4})),
        ("/v1/responses", json!({"input": "I"})),
    ];
    for (index, (path, mut body)) in asked.into_iter().enumerate() {
        body["stream"] = json!(true);
        let reply = server.post(path, &body);
        assert!(reply.status == 200 && reply.text().contains("not finite"), "{reply:?}");
        let count = (index + 1) as f64;
        assert_eq!(server.metric("fullbore_requests_refused_total{cause=\"internal_error\"}"), count, "{path}");
        assert_eq!(server.metric("vllm:request_success_total{finished_reason=\"error\"}"), count, "{path}");
    }
    // Of two choices the one that is left has no client that left.
    let prompts = [[20, poisonous_token], [20, 21]];
    let both = json!({"prompt": prompts, "max_tokens": 900, "ignore_eos": true, "stream": true});
    assert!(server.post("/v1/completions", &both).text().contains("not finite"));
    let ended = |reason: &str| server.metric(&format!("vllm:request_success_total{{finished_reason=\"{reason}\"}}"));
    server.wait_for("both ends", |_| ended("error") == 6.0);
    assert_eq!((ended("abort"), ended("stop"), ended("length")), (0.0, 0.0, 0.0));
}

#[test]
fn refusals_are_counted_by_cause_and_rows_that_are_not_finite_are_counted() {
    let sim = SimOptions { poisonous_token: Some(77), ..SimOptions::default() };
    let server = Setup { sim, ..Setup::default() }.start();
    let post = |body: Value| server.post("/v1/completions", &body).status;
    assert_eq!(post(json!({"prompt": "x", "temperature": -1})), 400);
    assert_eq!(post(json!({"prompt": "x", "top_p": 7})), 400);
    assert_eq!(post(json!({"prompt": "x", "model": "another"})), 404);
    assert_eq!(post(json!({"prompt": vec![20; 2000]})), 400);
    assert_eq!(server.post_bytes("/v1/completions", b"{").status, 400);
    server.get("/nothing").error(404);
    assert_eq!(server.metric("vllm:corrupted_requests_total"), 0.0);
    assert_eq!(post(json!({"prompt": [20, 77], "max_tokens": 4})), 500);
    assert_eq!(post(json!({"prompt": [20, 21], "max_tokens": 4})), 200);
    for (cause, count) in [
        ("invalid_field", 2.0),
        ("model_not_found", 1.0),
        ("context_length_exceeded", 1.0),
        ("invalid_json", 1.0),
        ("not_found", 1.0),
        ("internal_error", 1.0),
    ] {
        assert_eq!(server.metric(&format!("fullbore_requests_refused_total{{cause=\"{cause}\"}}")), count, "{cause}");
    }
    server.wait_for("it to be counted", |server| server.metric("vllm:corrupted_requests_total") == 1.0);
    assert_eq!(server.metric("vllm:request_success_total{finished_reason=\"error\"}"), 1.0);
    for (status, count) in [("2xx", 1.0), ("4xx", 5.0), ("5xx", 1.0)] {
        let labels = format!("handler=\"/v1/completions\",method=\"POST\",status=\"{status}\"");
        assert_eq!(server.metric(&format!("http_requests_total{{{labels}}}")), count, "{status}");
    }
    assert_eq!(server.metric("http_requests_total{handler=\"none\"}"), 1.0);
    assert!(server.metric("http_request_duration_seconds_count{handler=\"/v1/completions\"}") >= 6.0);
}
