//! Text and token ids without a model's step: `/tokenize`, `/detokenize` and [`render`] as vLLM has them, the first two
//! as llama-server has them too, `/apply-template` as that does, `/v1/messages/count_tokens` as Anthropic does.
//! Invariant: what a prompt is here it is for the endpoints that generate.

use std::slice;

use fullbore_engine::request::TokenId;
use fullbore_engine::text::Special;
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

/// Tokens of one text at most, in contexts of the model.
const MAX_CONTEXTS: usize = 4;

pub fn max_tokens(model: &ServedModel) -> usize {
    MAX_CONTEXTS * model.max_model_len() as usize
}

pub fn answer(endpoint: TextEndpoint, model: &ServedModel, body: &Value) -> Result<Value, ApiError> {
    let fields = fields_of(body)?;
    match endpoint {
        TextEndpoint::Tokenize => tokenize(model, &fields),
        TextEndpoint::Detokenize => detokenize(model, &fields),
        TextEndpoint::CountTokens => anthropic::count_tokens(model, &fields),
        TextEndpoint::RenderCompletions => render::completions(model, &fields),
        TextEndpoint::RenderChat => render::chat(model, &fields),
        TextEndpoint::ApplyTemplate => Ok(json!({"prompt": chat(&fields)?.render(model, max_tokens(model))?.text})),
    }
}

/// A prompt as text, or a chat.
fn tokenize(model: &ServedModel, fields: &Fields) -> Result<Value, ApiError> {
    let with_bos = fields.bool("add_special_tokens")?.unwrap_or(true);
    let content = Content::read(fields)?;
    let with_pieces = fields.bool("with_pieces")?.unwrap_or(false);
    let ids = match (fields.string("prompt")?, content) {
        (Some(prompt), _) => {
            completions::text_ids(model, "prompt", prompt, Special::Parse, with_bos, max_tokens(model))?
        }
        (None, Some(content)) => content.ids(model)?,
        (None, None) if fields.get("messages").is_some() => chat(fields)?.render(model, max_tokens(model))?.ids,
        (None, None) => {
            return Err(ApiError::invalid("prompt", "prompt is missing; it must be a text, or messages a chat"));
        }
    };
    let token = |id: &TokenId| if with_pieces { piece(model, *id) } else { id.0.into() };
    let tokens: Vec<Value> = ids.iter().map(token).collect();
    let mut answer = json!({"count": tokens.len(), "max_model_len": model.max_model_len(), "tokens": tokens});
    if fields.bool("return_token_strs")?.unwrap_or(false) {
        answer["token_strs"] = ids.iter().map(|id| model.tokenizer.token(*id)).collect();
    }
    Ok(answer)
}

/// What llama-server's clients have as tokens: texts and token ids, one after another.
struct Content<'a> {
    parts: &'a [Value],
    /// Whether a BOS token comes first, where the model wants one and a text begins it.
    with_bos: bool,
    special: Special,
}

impl<'a> Content<'a> {
    const NAME: &'static str = "content";

    fn read(fields: &Fields<'a>) -> Result<Option<Content<'a>>, ApiError> {
        let with_bos = fields.bool("add_special")?.unwrap_or(false);
        let is_parsed = fields.bool("parse_special")?.unwrap_or(true);
        let special = if is_parsed { Special::Parse } else { Special::AsText };
        let Some(value) = fields.get(Self::NAME) else { return Ok(None) };
        let parts = match value {
            Value::Array(parts) => parts.as_slice(),
            text => slice::from_ref(text),
        };
        let is_part = |part: &Value| part.is_string() || part.is_number() && value.is_array();
        match parts.iter().all(is_part) {
            true => Ok(Some(Content { parts, with_bos, special })),
            false => Err(wrong(Self::NAME, value, "a text, or a list of texts and token ids")),
        }
    }

    fn ids(&self, model: &ServedModel) -> Result<Vec<TokenId>, ApiError> {
        let max_tokens = max_tokens(model);
        let num_bytes = self.parts.iter().filter_map(Value::as_str).map(str::len).sum();
        model.check_tokens(Self::NAME, model.tokenizer.least_tokens(num_bytes), max_tokens)?;
        let mut ids = Vec::new();
        for (index, part) in self.parts.iter().enumerate() {
            match part.as_str() {
                Some(text) => {
                    let with_bos = self.with_bos && index == 0;
                    ids.extend(completions::text_ids(model, Self::NAME, text, self.special, with_bos, max_tokens)?);
                }
                None => ids.push(token_id(model, Self::NAME, part)?),
            }
            model.check_tokens(Self::NAME, ids.len(), max_tokens)?;
        }
        Ok(ids)
    }
}

/// A token with what it stands for: a text, or bytes that are no text by themselves.
fn piece(model: &ServedModel, id: TokenId) -> Value {
    let piece = match String::from_utf8(model.tokenizer.token_bytes(id)) {
        Ok(text) => json!(text),
        Err(error) => json!(error.into_bytes()),
    };
    json!({"id": id.0, "piece": piece})
}

fn detokenize(model: &ServedModel, fields: &Fields) -> Result<Value, ApiError> {
    const NAME: &str = "tokens";
    let max_tokens = max_tokens(model);
    let value = fields.get(NAME).unwrap_or(&Value::Null);
    let items = value.as_array().filter(|items| items.len() <= max_tokens);
    let items = items.ok_or_else(|| wrong(NAME, value, format!("a list of at most {max_tokens} token ids")))?;
    let ids = items.iter().map(|item| token_id(model, NAME, item)).collect::<Result<Vec<_>, _>>()?;
    let text = completions::text_of(model, &ids);
    // As vLLM calls it, and as llama-server does.
    Ok(json!({"prompt": text, "content": text}))
}
