//! Spans as OTLP's JSON has them: ids as hexadecimal, times as nanoseconds since 1970 in strings. Names of attributes
//! are OpenTelemetry's for generative models where it has one.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Traced;
use crate::start::random;
use crate::version::VERSION;

const KIND_INTERNAL: u32 = 1;
const KIND_SERVER: u32 = 2;
const STATUS_ERROR: u32 = 2;

/// The body of a post to `/v1/traces`; `clock` is the same moment on both clocks.
pub fn request(batch: &[Traced], clock: (Instant, SystemTime)) -> Value {
    let spans: Vec<Value> = batch.iter().flat_map(|traced| spans(traced, clock)).collect();
    let resource = json!({"attributes": [text("service.name", "fullbore"), text("service.version", VERSION)]});
    let scope = json!({"name": "fullbore", "version": VERSION});
    json!({"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": scope, "spans": spans}]}]})
}

/// A sequence's own span, and those of the stages that it came to; they follow one another.
fn spans(traced: &Traced, clock: (Instant, SystemTime)) -> Vec<Value> {
    let sequence = &traced.sequence;
    let own = random();
    let span = |id: u64, parent: Option<u64>, name: &str, kind: u32, from: Instant, until: Instant| {
        let mut span = json!({
            "traceId": format!("{:032x}", traced.trace_id),
            "spanId": format!("{id:016x}"),
            "name": name,
            "kind": kind,
            "startTimeUnixNano": unix_nanos(from, clock),
            "endTimeUnixNano": unix_nanos(until, clock),
        });
        if let Some(parent) = parent {
            span["parentSpanId"] = json!(format!("{parent:016x}"));
        }
        span
    };
    let mut whole = span(own, traced.parent, "generate", KIND_SERVER, sequence.arrived, sequence.ended);
    whole["attributes"] = json!([
        text("gen_ai.response.id", &sequence.request),
        text("gen_ai.request.model", &traced.model),
        json!({"key": "gen_ai.response.finish_reasons", "value": {"arrayValue": {"values": [
            {"stringValue": sequence.reason},
        ]}}}),
        integer("gen_ai.usage.input_tokens", sequence.prompt_tokens),
        integer("gen_ai.usage.output_tokens", sequence.generated_tokens),
        integer("fullbore.cached_tokens", sequence.cached_tokens),
    ]);
    if sequence.has_failed {
        whole["status"] = json!({"code": STATUS_ERROR, "message": sequence.reason});
    }
    let begins = [("queue", Some(sequence.arrived)), ("prefill", sequence.started), ("decode", sequence.first_token)];
    let ends = [sequence.started, sequence.first_token, None].map(|end| end.unwrap_or(sequence.ended));
    let stages = begins
        .into_iter()
        .zip(ends)
        .filter_map(|((name, from), until)| Some(span(random(), Some(own), name, KIND_INTERNAL, from?, until)));
    std::iter::once(whole).chain(stages).collect()
}

fn text(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

fn integer(key: &str, value: u64) -> Value {
    json!({"key": key, "value": {"intValue": value.to_string()}})
}

fn unix_nanos(at: Instant, (instant, system): (Instant, SystemTime)) -> String {
    let system = match at.checked_duration_since(instant) {
        Some(after) => system + after,
        None => system - (instant - at),
    };
    system.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos()).to_string()
}
