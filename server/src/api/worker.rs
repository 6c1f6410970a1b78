//! What routers ask of a worker in vLLM's and SGLang's words: `/version`, `/load`, `/v1/loads`, `/tokenizer_info`.
//! Invariant: numbers are those of `/metrics`; what is not known is left out.

use std::sync::Arc;

use fullbore_engine::request::TokenId;
use fullbore_engine::worker::EngineHandle;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ServedModel, unix_seconds};
use crate::version::VERSION;

#[derive(Debug, Default, Deserialize)]
pub struct WorkerQuery {
    /// This one [default: the first].
    pub model: Option<String>,
}

pub fn version() -> Value {
    json!({"version": VERSION})
}

/// Sequences that run or wait, whichever model they are for.
pub fn load(models: &[Arc<ServedModel>]) -> Value {
    json!({"server_load": models.iter().map(|model| model.metrics.num_open()).sum::<u64>()})
}

/// All devices are one rank, as they are one worker to who routes to it.
pub fn loads(model: &ServedModel) -> Value {
    let (stats, block_size) = (model.engine.stats(), model.engine.config().block_size);
    let there = || model.engine.there().map(EngineHandle::config);
    let (num_blocks, max_num_seqs): (u32, u32) =
        (there().map(|config| config.num_blocks).sum(), there().map(|config| config.max_num_seqs).sum());
    let num_waiting = model.engine.num_waiting();
    let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let tokens = |num_blocks: u32| u64::from(num_blocks) * u64::from(block_size);
    let token_usage = model.engine.kv_usage();
    let slot_usage = share(stats.num_running.into(), max_num_seqs.into());
    let mut rank = json!({
        "dp_rank": 0,
        "num_running_reqs": stats.num_running,
        "num_waiting_reqs": num_waiting,
        "num_total_reqs": u64::from(stats.num_running) + num_waiting,
        "num_used_tokens": tokens(stats.blocks.referenced),
        "max_total_num_tokens": tokens(num_blocks),
        "token_usage": token_usage,
        "cache_hit_rate": share(stats.cached_tokens, stats.prompt_tokens),
        "utilization": token_usage.max(slot_usage),
        "max_running_requests": max_num_seqs,
    });
    if let Some(frame) = model.history.after(0).last() {
        rank["gen_throughput"] = (frame.generated_tokens as f64 / frame.period.as_secs_f64()).into();
    }
    json!({"timestamp": unix_seconds(), "dp_rank_count": 1, "loads": [rank]})
}

/// As transformers' configuration of a tokenizer has it.
pub fn tokenizer_info(model: &ServedModel) -> Value {
    let spelled = |id: Option<TokenId>| id.and_then(|id| model.tokenizer.token(id));
    let eos = spelled(model.tokenizer.eos());
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelled(model.tokenizer.bos()),
        "eos_token": eos,
        // Nothing is ever padded here.
        "pad_token": eos,
        "add_bos_token": model.tokenizer.add_bos(),
        "model_max_length": model.max_model_len(),
        "chat_template": model.chat_template.as_ref().map(|template| template.source()),
    })
}
