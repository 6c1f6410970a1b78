//! What `/metrics` counts.

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
    let known = ["#", "fullbore_", "vllm:"];
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
