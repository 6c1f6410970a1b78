//! The folder that a frontend reads to tokenize for a model: `config.json`, `tokenizer.json`, `tokenizer_config.json`
//! and `generation_config.json`, as Hugging Face has them. A model that came as such a folder has its own; of a GGUF
//! file they are written into the cache.
//!
//! Invariant: a written folder is named by all that is in it, so that servers of one model share it, and none is ever
//! changed.

use std::io;
use std::path::{Path, PathBuf};

use fullbore_engine::model::{Family, ModelConfig};
use fullbore_engine::op::Activation;
use fullbore_engine::request::TokenId;
use serde_json::{Value, json};

use crate::api::ServedModel;
use crate::api::worker::tokenizer_info;
use crate::files;

#[derive(Debug, thiserror::Error)]
pub enum ModelFolderError {
    #[error("cannot write what frontends read of the model to {}: {source}; set FULLBORE_CACHE to another folder",
        path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot find the model's folder {}: {source}", path.display())]
    Gone { path: PathBuf, source: io::Error },
}

/// The model's own folder, or one below `cache`.
pub fn model_folder(model: &ServedModel, cache: &Path) -> Result<PathBuf, ModelFolderError> {
    match &model.folder {
        // Frontends have another current directory.
        Some(path) => path.canonicalize().map_err(|source| ModelFolderError::Gone { path: path.clone(), source }),
        None => write(model, &cache.join("frontends")),
    }
}

fn write(model: &ServedModel, folders: &Path) -> Result<PathBuf, ModelFolderError> {
    let files = [
        ("config.json", config(model)),
        ("generation_config.json", generation_config(model)),
        ("tokenizer.json", model.tokenizer.to_json()),
        ("tokenizer_config.json", tokenizer_info(model)),
    ];
    let files = files.map(|(name, value)| (name, value.to_string()));
    let content: Vec<&str> = files.iter().map(|(_, text)| text.as_str()).collect();
    let folder = folders.join(files::name_of(&content).trim_end_matches(".json"));
    for (name, text) in &files {
        let path = folder.join(name);
        if !path.is_file() {
            files::write_whole(&path, text).map_err(|source| ModelFolderError::Write { path, source })?;
        }
    }
    Ok(folder)
}

/// What there is to know without computing: a frontend runs no model.
fn config(model: &ServedModel) -> Value {
    let ModelConfig { family, num_layers, dim, num_heads, num_kv_heads, head_dim, ffn_dim, .. } = model.shape;
    let (architecture, model_type) = match family {
        Family::Llama => ("LlamaForCausalLM", "llama"),
        Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Family::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
    };
    let activation = match model.shape.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    json!({
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": num_layers,
        "hidden_size": dim,
        "intermediate_size": ffn_dim,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": activation,
        "hidden_activation": activation,
        "rms_norm_eps": model.shape.norm_eps,
        "rope_theta": model.shape.rope.base,
        "sliding_window": model.shape.windows.iter().flatten().next(),
        "vocab_size": model.shape.vocab_size,
        "max_position_embeddings": model.shape.max_positions,
        "bos_token_id": model.tokenizer.bos().map(|id| id.0),
        "eos_token_id": stop_ids(model),
    })
}

fn generation_config(model: &ServedModel) -> Value {
    let defaults = &model.defaults;
    json!({
        "bos_token_id": model.tokenizer.bos().map(|id| id.0),
        "eos_token_id": stop_ids(model),
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
    })
}

fn stop_ids(model: &ServedModel) -> Vec<u32> {
    model.stop_ids.iter().map(|TokenId(id)| *id).collect()
}
