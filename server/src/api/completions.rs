//! `/v1/completions`: prompts as text, as token ids, or lists of either. Invariant: text of a prompt is read as
//! llama.cpp and vLLM read it, special tokens included, after a BOS token where the model wants one.

use fullbore_engine::request::TokenId;
use fullbore_engine::text::{Detokenizer, Special};
use serde_json::Value;

use super::constraint::Constraint;
use super::fields::{Fields, wrong};
use super::generation::{Echo, Jobs};
use super::sampling::{MAX_CHOICES, MAX_LOGPROBS, Prompt, Sampling, token_id};
use super::{ServedModel, openai};
use crate::http::access::Client;
use crate::http::error::ApiError;

/// As OpenAI has it.
const DEFAULT_MAX_TOKENS: u32 = 16;

pub fn jobs(model: &ServedModel, id: &str, client: &Client, fields: &Fields) -> Result<Jobs, ApiError> {
    fields.refuse(&openai::UNSUPPORTED)?;
    fields.refuse_unless("add_special_tokens", true)?;
    let echo = fields.bool("echo")?.unwrap_or(false);
    let logprobs = fields.integer("logprobs", 0..=MAX_LOGPROBS)?.map(|logprobs| logprobs as u32);
    let prompt_logprobs = openai::prompt_logprobs(fields)?;
    // Nothing but the prompt's own log-probabilities is a use of its own.
    let least_tokens = if echo || prompt_logprobs.is_some() { 0 } else { 1 };
    let mut own = openai::own(fields, least_tokens)?;
    let best_of = best_of(fields)?;
    own.n = best_of.map_or(own.n, |(_, best_of)| best_of);
    let sampling = Sampling::read(model, client, fields, own)?;
    let inputs = inputs(fields, "prompt", MAX_CHOICES)?;
    let form = Constraint::read(fields)?.map(Constraint::check).transpose()?;
    let mut places = sampling.reserve(model, inputs.len())?;
    let prompt = |input: Input| {
        let ids = ids(model, "prompt", &input)?;
        let default = || DEFAULT_MAX_TOKENS.min(Sampling::rest_of_context(model, ids.len()));
        let max_tokens = sampling.max_tokens(default)?;
        let echo = echo.then(|| Echo { text: text(model, &input, &ids), logprobs });
        // The best are found by it.
        let logprobs = logprobs.or(best_of.map(|_| 0));
        Ok(Prompt { ids, max_tokens, logprobs, prompt_logprobs, echo, reply: None })
    };
    let prompts = inputs.into_iter().map(prompt).collect::<Result<_, ApiError>>()?;
    let jobs = sampling.jobs(model, id, prompts, &mut places)?;
    Ok(Jobs { jobs, places, in_turn: false, form })
}

/// How many choices are told of how many that are made, where more are made.
pub fn best_of(fields: &Fields) -> Result<Option<(u32, u32)>, ApiError> {
    const NAME: &str = "best_of";
    let n = openai::own(fields, 0)?.n;
    let best_of = fields.integer(NAME, i64::from(n)..=MAX_CHOICES as i64)?.map(|best_of| best_of as u32);
    match best_of.filter(|best_of| *best_of > n) {
        Some(_) if fields.bool("stream")? == Some(true) => {
            Err(ApiError::invalid(NAME, "best_of is not for streams: which is the best is known at the end"))
        }
        best_of => Ok(best_of.map(|best_of| (n, best_of))),
    }
}

pub enum Input<'a> {
    Text(&'a str),
    Ids(&'a [Value]),
}

/// The prompts in field `param`.
pub fn inputs<'a>(fields: &Fields<'a>, param: &str, max_inputs: usize) -> Result<Vec<Input<'a>>, ApiError> {
    const EXPECTED: &str = "a string, a list of token ids, or a list of such prompts";
    let missing = || ApiError::invalid(param, format!("{param} is missing; it must be {EXPECTED}"));
    let value = fields.get(param).ok_or_else(missing)?;
    match value {
        Value::String(text) => Ok(vec![Input::Text(text)]),
        Value::Array(items) if items.iter().all(Value::is_number) => Ok(vec![Input::Ids(items)]),
        Value::Array(items) if items.len() > max_inputs => {
            let message = format!("{param} has {} prompts; at most {max_inputs} are taken at once", items.len());
            Err(ApiError::invalid(param, message))
        }
        Value::Array(items) => {
            let input = |item: &'a Value| match item {
                Value::String(text) => Ok(Input::Text(text)),
                Value::Array(ids) => Ok(Input::Ids(ids)),
                _ => Err(wrong(param, value, EXPECTED)),
            };
            items.iter().map(input).collect()
        }
        _ => Err(wrong(param, value, EXPECTED)),
    }
}

/// A prompt of field `param` as ids.
pub fn ids(model: &ServedModel, param: &str, input: &Input) -> Result<Vec<TokenId>, ApiError> {
    match input {
        Input::Ids(ids) => ids.iter().map(|id| token_id(model, param, id)).collect(),
        Input::Text(text) => text_ids(model, param, text, Special::Parse, true, model.max_model_len() as usize),
    }
}

/// A prompt's text in field `param` as ids, `max_tokens` at most, after a BOS token where the model wants one.
pub fn text_ids(
    model: &ServedModel,
    param: &str,
    text: &str,
    special: Special,
    with_bos: bool,
    max_tokens: usize,
) -> Result<Vec<TokenId>, ApiError> {
    let tokenizer = &model.tokenizer;
    model.check_tokens(param, tokenizer.least_tokens(text.len()), max_tokens)?;
    let mut ids = tokenizer.encode_at_most(text, special, max_tokens);
    model.check_tokens(param, ids.len(), max_tokens)?;
    let bos = tokenizer.bos().filter(|bos| with_bos && tokenizer.add_bos() && ids.first() != Some(bos));
    ids.splice(0..0, bos);
    Ok(ids)
}

/// The text of a prompt, which `echo` repeats.
pub fn text(model: &ServedModel, input: &Input, ids: &[TokenId]) -> String {
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
