//! `/v1/limits`: where the device's time went, and what holds it back. Invariant: the seconds of a tally are a
//! partition of its `wall_s`; the same names as in the metrics.

use std::sync::Arc;

use fullbore_engine::fleet::ReplicaId;
use fullbore_engine::limits::{Cause, Tally};
use fullbore_engine::worker::EngineHandle;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::ServedModel;

#[derive(Debug, Default, Deserialize)]
pub struct LimitsQuery {
    /// Of this one alone.
    pub model: Option<String>,
}

/// Of one model on one device its report, of several a list of them.
pub fn reports(models: &[Arc<ServedModel>]) -> Value {
    let of_model = |model: &Arc<ServedModel>| {
        let engines = (0..).map(ReplicaId).zip(model.engine.engines());
        engines.map(|(replica, engine)| report(model, replica, engine)).collect::<Vec<_>>()
    };
    let mut reports: Vec<Value> = models.iter().flat_map(of_model).collect();
    match reports.len() {
        1 => reports.swap_remove(0),
        _ => json!({"object": "list", "data": reports}),
    }
}

fn report(model: &ServedModel, replica: ReplicaId, engine: &EngineHandle) -> Value {
    let stats = engine.stats();
    let verdict = engine.verdict(&stats);
    let limits = &stats.limits;
    let device = engine.device();
    let knee = limits.knee.map(|knee| json!({"num_seqs": knee.batch, "step_ms": knee.step_ns as f64 / 1e6}));
    let mut report = json!({
        "object": "limits",
        "model": model.name,
        "device": {"id": device.id, "name": device.name},
        "limit": verdict.cause.name(),
        "verdict": verdict.sentence,
        "knee": knee,
        "window": tally(&limits.window),
        "total": tally(&limits.total),
    });
    if let Some(charged) = model.engine.imbalance(replica) {
        let seconds = charged.map(|(idle, time)| (idle.name().to_owned(), json!(time.as_secs_f64())));
        report["imbalance"] = Value::Object(seconds.into_iter().collect());
    }
    report
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
