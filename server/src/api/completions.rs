//! `/v1/completions`: prompts as text, as token ids, or lists of either. Invariant: text of a prompt is read as
//! llama.cpp and vLLM read it, special tokens included, after a BOS token where the model wants one.

use fullbore_engine::request::TokenId;
use fullbore_engine::text::{Detokenizer, Special};
use serde_json::Value;

use super::ServedModel;
use super::constraint::Constraint;
use super::fields::{Fields, wrong};
use super::generation::Jobs;
use super::sampling::{MAX_CHOICES, MAX_LOGPROBS, Prompt, Sampling, token_id};
use crate::http::access::Client;
use crate::http::error::ApiError;

/// As OpenAI has it.
const DEFAULT_MAX_TOKENS: u32 = 16;

pub fn jobs(model: &ServedModel, id: &str, client: &Client, fields: &Fields) -> Result<Jobs, ApiError> {
    let echo = fields.bool("echo")?.unwrap_or(false);
    let logprobs = fields.integer("logprobs", 0..=MAX_LOGPROBS)?.map(|logprobs| logprobs as u32);
    // Nothing but the prompt's own log-probabilities is a use of its own.
    let sampling = Sampling::read(model, client, fields, if echo { 0 } else { 1 })?;
    let inputs = inputs(fields.get("prompt"))?;
    let constraint = Constraint::read(fields)?;
    let places = sampling.reserve(model, inputs.len())?;
    let grammar = constraint.map(|constraint| constraint.compile(model)).transpose()?;
    let prompt = |input: Input| {
        let ids = ids(model, &input)?;
        let default = || DEFAULT_MAX_TOKENS.min(Sampling::rest_of_context(model, ids.len()));
        let max_tokens = sampling.max_tokens.unwrap_or_else(default);
        let echo = echo.then(|| text(model, &input, &ids));
        Ok(Prompt { ids, max_tokens, logprobs, echo, grammar: grammar.clone(), reply: None })
    };
    let prompts = inputs.into_iter().map(prompt).collect::<Result<_, ApiError>>()?;
    Ok(Jobs { jobs: sampling.jobs(id, prompts), places })
}

enum Input<'a> {
    Text(&'a str),
    Ids(&'a [Value]),
}

fn inputs<'a>(value: Option<&'a Value>) -> Result<Vec<Input<'a>>, ApiError> {
    const EXPECTED: &str = "a string, a list of token ids, or a list of such prompts";
    let value =
        value.ok_or_else(|| ApiError::invalid("prompt", format!("prompt is missing; it must be {EXPECTED}")))?;
    match value {
        Value::String(text) => Ok(vec![Input::Text(text)]),
        Value::Array(items) if items.iter().all(Value::is_number) => Ok(vec![Input::Ids(items)]),
        Value::Array(items) if items.len() > MAX_CHOICES => {
            let message = format!("prompt has {} prompts; at most {MAX_CHOICES} are taken at once", items.len());
            Err(ApiError::invalid("prompt", message))
        }
        Value::Array(items) => {
            let input = |item: &'a Value| match item {
                Value::String(text) => Ok(Input::Text(text)),
                Value::Array(ids) => Ok(Input::Ids(ids)),
                _ => Err(wrong("prompt", value, EXPECTED)),
            };
            items.iter().map(input).collect()
        }
        _ => Err(wrong("prompt", value, EXPECTED)),
    }
}

fn ids(model: &ServedModel, input: &Input) -> Result<Vec<TokenId>, ApiError> {
    match input {
        Input::Ids(ids) => ids.iter().map(|id| token_id(model, "prompt", id)).collect(),
        Input::Text(text) => text_ids(model, "prompt", text, true),
    }
}

/// A prompt's text in field `param` as ids, after a BOS token where the model wants one.
pub fn text_ids(model: &ServedModel, param: &str, text: &str, with_bos: bool) -> Result<Vec<TokenId>, ApiError> {
    model.check_text(param, text)?;
    let tokenizer = &model.tokenizer;
    let mut ids = tokenizer.encode(text, Special::Parse);
    let bos = tokenizer.bos().filter(|bos| with_bos && tokenizer.add_bos() && ids.first() != Some(bos));
    ids.splice(0..0, bos);
    Ok(ids)
}

/// What `echo` repeats.
fn text(model: &ServedModel, input: &Input, ids: &[TokenId]) -> String {
    match input {
        Input::Text(text) => (*text).to_owned(),
        Input::Ids(_) => text_of(model, ids),
    }
}

/// The text of ids, control tokens spelled out.
pub fn text_of(model: &ServedModel, ids: &[TokenId]) -> String {
    let mut detokenizer = Detokenizer::new(model.tokenizer.clone()).with_special(true);
    let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    text += &detokenizer.finish();
    text
}
