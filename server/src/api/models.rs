//! `/v1/models`: what is served, all of it or by name. Invariant: `memory_bytes` is the total of the model's
//! tables printed at start, one for each device.

use std::sync::Arc;

use fullbore_engine::memory::capacity::MemoryTable;
use serde_json::{Value, json};

use super::ServedModel;

pub fn list(models: &[Arc<ServedModel>]) -> Value {
    json!({"object": "list", "data": models.iter().map(|model| card(model)).collect::<Vec<_>>()})
}

pub fn card(model: &ServedModel) -> Value {
    let config = model.engine.config();
    let device = model.engine.device();
    json!({
        "id": model.name,
        "object": "model",
        "created": model.loaded_at,
        // Routers that know a worker by it find none of theirs, and ask `/version`.
        "owned_by": "fullbore",
        "root": model.name,
        "parent": null,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_queued_requests": config.max_queued_requests,
        "max_queued_tokens": config.max_queued_tokens,
        "dtype": model.dtype.name(),
        "kv_type": config.kv_type.name(),
        "device": device.name,
        "device_id": device.id,
        "memory_bytes": model.memory.iter().map(MemoryTable::total).sum::<u64>(),
    })
}
