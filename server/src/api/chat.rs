//! `/v1/chat/completions`: messages through the model's template. Invariant: what is written in a message never becomes
//! a special token; the template sees to that.

use fullbore_engine::text::{ChatMessage, TextError};
use serde_json::Value;

use super::ServedModel;
use super::fields::{Fields, wrong};
use super::generation::Jobs;
use super::sampling::{MAX_LOGPROBS, Prompt, Sampling};
use crate::http::error::ApiError;

pub fn jobs(model: &ServedModel, id: &str, key: Option<&str>, fields: &Fields) -> Result<Jobs, ApiError> {
    let sampling = Sampling::read(model, key, fields, 1)?;
    let logprobs = logprobs(fields)?;
    let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
    let messages = messages(fields.get("messages"))?;
    let Some(template) = &model.chat_template else {
        let message = format!("{} has no chat template; use /v1/completions", model.name);
        return Err(ApiError::invalid("messages", message));
    };
    let places = sampling.reserve(model, 1)?;
    let max_model_len = model.max_model_len();
    let max_tokens = max_model_len as usize;
    let ids = template.encode_at_most(&model.tokenizer, &messages, add_generation_prompt, max_tokens);
    let ids = ids.map_err(|error| match error {
        TextError::TooLong { least_tokens } => ApiError::too_long("messages", least_tokens, max_model_len),
        // No fault of these messages.
        TextError::TemplateTime { .. } => ApiError::not_yet(&error.to_string()),
        error => ApiError::invalid("messages", error.to_string()),
    })?;
    let max_tokens = sampling.max_tokens.unwrap_or_else(|| Sampling::rest_of_context(model, ids.len()));
    Ok(Jobs { jobs: sampling.jobs(id, vec![Prompt { ids, max_tokens, logprobs, echo: None, grammar: None }]), places })
}

fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let num_top = fields.integer("top_logprobs", 0..=MAX_LOGPROBS)?;
    match (wanted, num_top) {
        (true, num_top) => Ok(Some(num_top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

fn messages(value: Option<&Value>) -> Result<Vec<ChatMessage>, ApiError> {
    const EXPECTED: &str = "a list of at least one {\"role\": ..., \"content\": ...}";
    let Some(value) = value else {
        return Err(ApiError::invalid("messages", format!("messages is missing; it must be {EXPECTED}")));
    };
    let items = value.as_array().filter(|items| !items.is_empty());
    items.ok_or_else(|| wrong("messages", value, EXPECTED))?.iter().enumerate().map(message).collect()
}

fn message((index, value): (usize, &Value)) -> Result<ChatMessage, ApiError> {
    let name = |field: &str| format!("messages[{index}]{field}");
    let object = value.as_object().ok_or_else(|| wrong(&name(""), value, "an object with role and content"))?;
    let role = object.get("role").unwrap_or(&Value::Null);
    let role = role.as_str().ok_or_else(|| wrong(&name(".role"), role, "a string"))?;
    let content = match object.get("content").unwrap_or(&Value::Null) {
        // An assistant that only called a tool says nothing.
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let part = |(nth, part)| text_of(part).ok_or_else(|| part_error(&name(&format!(".content[{nth}]")), part));
            parts.iter().enumerate().map(part).collect::<Result<Vec<_>, _>>()?.join("\n")
        }
        other => return Err(wrong(&name(".content"), other, "a string or a list of text parts")),
    };
    Ok(ChatMessage { role: role.to_owned(), content })
}

fn text_of(part: &Value) -> Option<&str> {
    part.get("type").is_none_or(|kind| kind == "text").then(|| part.get("text")?.as_str()).flatten()
}

fn part_error(name: &str, part: &Value) -> ApiError {
    match part.get("type").and_then(Value::as_str) {
        Some(kind) if kind != "text" => {
            ApiError::invalid(name, format!("{name} is of type {kind}; this server reads text only"))
        }
        _ => wrong(name, part, "{\"type\": \"text\", \"text\": ...}"),
    }
}
