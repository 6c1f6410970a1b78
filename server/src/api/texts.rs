//! Text and token ids without a model's step: `/tokenize`, `/detokenize` and [`render`] as vLLM has them, the first two
//! as llama-server has them too, `/apply-template` as that does, `/v1/messages/count_tokens` as Anthropic does.
//! Invariant: what a prompt is here it is for the endpoints that generate.

use serde_json::{Value, json};

use super::chat_completions::chat;
use super::fields::{Fields, wrong};
use super::sampling::token_id;
use super::{ServedModel, anthropic, completions, fields_of, render};
use crate::http::error::ApiError;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextEndpoint {
    Tokenize,
    Detokenize,
    ApplyTemplate,
    CountTokens,
    RenderCompletions,
    RenderChat,
}

/// Tokens of one detokenized text at most, in contexts of the model.
const MAX_CONTEXTS: usize = 4;

pub fn answer(endpoint: TextEndpoint, model: &ServedModel, body: &Value) -> Result<Value, ApiError> {
    let fields = fields_of(body)?;
    match endpoint {
        TextEndpoint::Tokenize => tokenize(model, &fields),
        TextEndpoint::Detokenize => detokenize(model, &fields),
        TextEndpoint::CountTokens => anthropic::count_tokens(model, &fields),
        TextEndpoint::RenderCompletions => render::completions(model, &fields),
        TextEndpoint::RenderChat => render::chat(model, &fields),
        TextEndpoint::ApplyTemplate => Ok(json!({"prompt": chat(&fields)?.render(model)?.text})),
    }
}

/// A prompt as text, or a chat.
fn tokenize(model: &ServedModel, fields: &Fields) -> Result<Value, ApiError> {
    let with_bos = fields.bool("add_special_tokens")?.unwrap_or(true);
    // llama-server's, and off there unless asked for.
    let content_with_bos = fields.bool("add_special")?.unwrap_or(false);
    let ids = match (fields.string("prompt")?, fields.string("content")?) {
        (Some(prompt), _) => completions::text_ids(model, "prompt", prompt, with_bos)?,
        (None, Some(content)) => completions::text_ids(model, "content", content, content_with_bos)?,
        (None, None) if fields.get("messages").is_some() => chat(fields)?.render(model)?.ids,
        (None, None) => {
            return Err(ApiError::invalid("prompt", "prompt is missing; it must be a text, or messages a chat"));
        }
    };
    let tokens: Vec<u32> = ids.iter().map(|id| id.0).collect();
    let mut answer = json!({"count": tokens.len(), "max_model_len": model.max_model_len(), "tokens": tokens});
    if fields.bool("return_token_strs")?.unwrap_or(false) {
        answer["token_strs"] = ids.iter().map(|id| model.tokenizer.token(*id)).collect();
    }
    Ok(answer)
}

fn detokenize(model: &ServedModel, fields: &Fields) -> Result<Value, ApiError> {
    const NAME: &str = "tokens";
    let max_tokens = MAX_CONTEXTS * model.max_model_len() as usize;
    let value = fields.get(NAME).unwrap_or(&Value::Null);
    let items = value.as_array().filter(|items| items.len() <= max_tokens);
    let items = items.ok_or_else(|| wrong(NAME, value, format!("a list of at most {max_tokens} token ids")))?;
    let ids = items.iter().map(|item| token_id(model, NAME, item)).collect::<Result<Vec<_>, _>>()?;
    let text = completions::text_of(model, &ids);
    // As vLLM calls it, and as llama-server does.
    Ok(json!({"prompt": text, "content": text}))
}
