//! `/v1/models`: the one model there is. Invariant: `memory_bytes` is the total of the table printed at start.

use serde_json::{Value, json};

use super::ServedModel;

pub fn list(model: &ServedModel) -> Value {
    let card = json!({
        "id": model.name,
        "object": "model",
        "created": model.loaded_at,
        "owned_by": "fullbore",
        "max_model_len": model.engine.config().max_model_len,
        "kv_type": model.engine.config().kv_type.name(),
        "device": model.engine.device().name,
        "memory_bytes": model.memory.total(),
    });
    json!({"object": "list", "data": [card]})
}
