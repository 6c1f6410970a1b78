//! Traces of requests, as a collector gets them that speaks OTLP over HTTP with JSON.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use fullbore::traces::Tracer;
use fullbore_engine::config::EngineConfig;
use serde_json::{Value, json};

use super::{Harness, Pace, Setup, post, read_reply};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// A server, and the spans that its collector gets.
fn traced(setup: Setup) -> (Harness, Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let (spans, received) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream);
            // One connection carries several posts.
            while let Some(body) = post_body(&mut reader) {
                let scope = &body["resourceSpans"][0]["scopeSpans"][0];
                assert_eq!(body["resourceSpans"][0]["resource"]["attributes"][0]["value"]["stringValue"], "fullbore");
                for span in scope["spans"].as_array().expect("spans") {
                    // A test that has seen enough is gone.
                    let _ = spans.send(span.clone());
                }
                let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
                reader.get_mut().write_all(answer.as_bytes()).expect("the server listens");
            }
        }
    });
    let server = Setup { tracer: Some(Tracer::start(&endpoint)), ..setup }.start();
    (server, received)
}

fn post_body(reader: &mut impl BufRead) -> Option<Value> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if reader.read_until(b'\n', &mut head).ok()? == 0 {
            return None;
        }
    }
    let head = String::from_utf8(head).expect("a head in ASCII").to_lowercase();
    assert!(
        head.starts_with("post /v1/traces http/1.1\r\n") && head.contains("content-type: application/json"),
        "{head}"
    );
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse().expect("a length");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a whole body");
    Some(serde_json::from_slice(&body).expect("JSON"))
}

/// Asks for three tokens, in the trace that `parent` names.
fn ask(server: &Harness, parent: Option<&str>) -> Value {
    let body = json!({"prompt": "hello", "max_tokens": 3, "ignore_eos": true}).to_string();
    let request = String::from_utf8(post("/v1/completions", body.as_bytes())).expect("ASCII");
    let header = parent.map(|parent| format!("\r\ntraceparent: {parent}\r\n\r\n"));
    let request = header.map_or(request.clone(), |header| request.replacen("\r\n\r\n", &header, 1));
    read_reply(server.send(request)).ok()
}

/// The next spans, by name.
fn next(received: &Receiver<Value>, names: &[&str]) -> Vec<Value> {
    let next = |name: &&str| {
        let span = received.recv_timeout(Duration::from_secs(20)).expect("a span");
        assert_eq!(span["name"], *name, "{span}");
        span
    };
    names.iter().map(next).collect()
}

fn nanos(span: &Value, end: &str) -> u64 {
    span[end].as_str().and_then(|text| text.parse().ok()).expect("nanoseconds")
}

fn attribute<'a>(span: &'a Value, key: &str) -> &'a Value {
    let attributes = span["attributes"].as_array().expect("attributes");
    &attributes.iter().find(|attribute| attribute["key"] == key).unwrap_or_else(|| panic!("no {key}: {span}"))["value"]
}

#[test]
fn a_requests_stages_are_spans_of_the_clients_trace() {
    let (server, received) = traced(Setup::default());
    let reply = ask(&server, Some(&format!("00-{TRACE}-{SPAN}-01")));
    let spans = next(&received, &["generate", "queue", "prefill", "decode"]);
    assert!(spans.iter().all(|span| span["traceId"] == TRACE), "{spans:?}");
    let whole = &spans[0];
    assert_eq!((&whole["parentSpanId"], &whole["kind"]), (&json!(SPAN), &json!(2)));
    assert_eq!(attribute(whole, "gen_ai.response.id")["stringValue"], reply["id"]);
    assert_eq!(attribute(whole, "gen_ai.request.model")["stringValue"], "sim-model");
    assert_eq!(attribute(whole, "gen_ai.usage.output_tokens")["intValue"], "3");
    assert_eq!(attribute(whole, "gen_ai.response.finish_reasons")["arrayValue"]["values"][0]["stringValue"], "length");
    // The stages make up the whole, one after the other.
    let mut at = nanos(whole, "startTimeUnixNano");
    for stage in &spans[1..] {
        assert_eq!(stage["parentSpanId"], whole["spanId"]);
        assert_eq!(nanos(stage, "startTimeUnixNano"), at);
        at = nanos(stage, "endTimeUnixNano");
    }
    assert_eq!(at, nanos(whole, "endTimeUnixNano"));
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("later");
    assert!((since_1970.as_nanos() as u64).abs_diff(at) < 60_000_000_000, "within a minute of now");
}

#[test]
fn a_request_without_a_trace_has_one_of_its_own_and_an_unsampled_one_none() {
    let (server, received) = traced(Setup::default());
    ask(&server, Some(&format!("00-{TRACE}-{SPAN}-00")));
    for header in [None, Some("00-no-trace-at-all")] {
        ask(&server, header);
        let spans = next(&received, &["generate", "queue", "prefill", "decode"]);
        assert_ne!(spans[0]["traceId"], TRACE);
        assert_eq!(spans[0]["traceId"].as_str().map(str::len), Some(32));
        assert!(spans[0].get("parentSpanId").is_none(), "{}", spans[0]);
    }
    server.wait_for("the collector's answer", |server| server.metric("fullbore_traces_sent_total") == 2.0);
    assert_eq!(server.metric("fullbore_traces_dropped_total"), 0.0);
}

#[test]
fn a_client_that_leaves_while_it_waits_came_as_far_as_the_queue() {
    let config = EngineConfig { max_num_seqs: 1, ..Setup::default().config };
    let (server, received) = traced(Setup { config, pace: Pace::Each(Duration::from_millis(5)), ..Setup::default() });
    let body = json!({"prompt": "hello", "max_tokens": 900, "stream": true}).to_string();
    let begin = || {
        let mut stream = server.send(post("/v1/completions", body.as_bytes()));
        // An answer that has begun is of a request that the engine has.
        stream.read_exact(&mut [0]).expect("a head");
        stream
    };
    let runs = begin();
    drop(begin());
    let spans = next(&received, &["generate", "queue"]);
    let reason = &attribute(&spans[0], "gen_ai.response.finish_reasons")["arrayValue"]["values"][0]["stringValue"];
    assert_eq!(reason, "aborted");
    assert!(spans[0].get("status").is_none(), "it has not failed: {}", spans[0]);
    drop(runs);
    next(&received, &["generate", "queue", "prefill", "decode"]);
}

/// Nobody is at the collector's address.
#[test]
fn a_collector_that_is_gone_costs_requests_nothing_but_their_traces() {
    let gone = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address");
    let server = Setup { tracer: Some(Tracer::start(&format!("http://{gone}"))), ..Setup::default() }.start();
    let begun = Instant::now();
    for _ in 0..20 {
        ask(&server, None);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "requests wait for a collector");
    server.wait_for("all to be dropped", |server| server.metric("fullbore_traces_dropped_total") == 20.0);
}
