//! Whether a model was made to embed, and how: what its files say. Invariant: what they do not say is not guessed; ways
//! that are not ours (a token of its own, a reranker's score, layers behind the pooling) are none.

use serde_json::Value;

use crate::format::FormatError;
use crate::format::gguf::Gguf;
use crate::format::safetensors::SafetensorsDir;
use crate::request::Pooling;

/// llama.cpp's numbers.
const GGUF_MEAN: u32 = 1;
const GGUF_LAST: u32 = 3;

pub(super) fn of_gguf(file: &Gguf) -> Result<Option<Pooling>, FormatError> {
    let Some(architecture) = file.str("general.architecture")? else { return Ok(None) };
    Ok(match file.u32(&format!("{architecture}.pooling_type"))? {
        Some(GGUF_MEAN) => Some(Pooling::Mean),
        Some(GGUF_LAST) => Some(Pooling::Last),
        _ => None,
    })
}

pub(super) fn of_safetensors(dir: &SafetensorsDir) -> Option<Pooling> {
    let modules = dir.modules_json()?.as_array()?;
    let is_ours = |module: &Value| {
        let kind = module["type"].as_str().and_then(|kind| kind.rsplit('.').next());
        matches!(kind, Some("Transformer" | "Pooling" | "Normalize"))
    };
    of_json(dir.pooling_json()?).filter(|_| modules.iter().all(is_ours))
}

fn of_json(config: &Value) -> Option<Pooling> {
    let modes: Vec<&str> = match config["pooling_mode"].as_str() {
        Some(mode) => vec![mode],
        None => {
            let fields = config.as_object()?.iter().filter(|(_, value)| **value == Value::Bool(true));
            fields.filter_map(|(name, _)| name.strip_prefix("pooling_mode_")).collect()
        }
    };
    match modes[..] {
        ["mean" | "mean_tokens"] => Some(Pooling::Mean),
        ["lasttoken"] => Some(Pooling::Last),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_known_mode_is_taken() {
        let cases = [
            (json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}), Some(Pooling::Mean)),
            (json!({"pooling_mode_lasttoken": true, "include_prompt": true}), Some(Pooling::Last)),
            (json!({"pooling_mode": "lasttoken"}), Some(Pooling::Last)),
            (json!({"pooling_mode": "cls"}), None),
            (json!({"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": true}), None),
            (json!({}), None),
        ];
        for (config, pooling) in cases {
            assert_eq!(of_json(&config), pooling, "{config}");
        }
    }
}
