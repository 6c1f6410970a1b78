//! `/v1/limits`: where the device's time went, and what holds it back. Invariant: the seconds of a tally are a
//! partition of its `wall_s`; the same names as in the metrics.

use std::sync::Arc;

use fullbore_engine::limits::{Cause, Tally};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::ServedModel;

#[derive(Debug, Default, Deserialize)]
pub struct LimitsQuery {
    /// Of this one alone.
    pub model: Option<String>,
}

/// Of one model its report, of several a list of them.
pub fn reports(models: &[Arc<ServedModel>]) -> Value {
    match models {
        [model] => report(model),
        models => json!({"object": "list", "data": models.iter().map(|model| report(model)).collect::<Vec<_>>()}),
    }
}

fn report(model: &ServedModel) -> Value {
    let stats = model.engine.stats();
    let verdict = model.engine.verdict(&stats);
    let limits = &stats.limits;
    let device = model.engine.device();
    let knee = limits.knee.map(|knee| json!({"num_seqs": knee.batch, "step_ms": knee.step_ns as f64 / 1e6}));
    json!({
        "object": "limits",
        "model": model.name,
        "device": {"id": device.id, "name": device.name},
        "limit": verdict.cause.name(),
        "verdict": verdict.sentence,
        "knee": knee,
        "window": tally(&limits.window),
        "total": tally(&limits.total),
    })
}

fn tally(tally: &Tally) -> Value {
    let by_cause = |value: &dyn Fn(Cause) -> f64| -> Map<String, Value> {
        Cause::ALL.into_iter().map(|cause| (cause.name().to_owned(), json!(value(cause)))).collect()
    };
    let wall_s = tally.wall_ns() as f64 / 1e9;
    json!({
        "wall_s": wall_s,
        "idle_s": tally.idle_ns as f64 / 1e9,
        "num_tokens": tally.num_tokens,
        "seconds": by_cause(&|cause| tally.seconds(cause)),
        "shares": by_cause(&|cause| tally.share(tally.ns(cause))),
    })
}
