//! `/v1/chat/completions` as OpenAI has it, with what vLLM adds: a body becomes a [`Chat`].

use serde_json::{Map, Value};

use super::chat::{Chat, ChatOptions};
use super::constraint::Constraint;
use super::fields::{Fields, wrong};
use super::generation::Jobs;
use super::sampling::{MAX_LOGPROBS, Sampling};
use super::tools::Tools;
use super::{ServedModel, messages, openai};
use crate::http::access::Client;
use crate::http::error::ApiError;

const MAX_VARIABLES: usize = 64;
const MAX_VARIABLES_BYTES: usize = 16 << 10;

pub fn jobs(model: &ServedModel, id: &str, client: &Client, fields: &Fields) -> Result<Jobs, ApiError> {
    let (chat, sampling, options) = read(model, client, fields)?;
    chat.jobs(model, id, &sampling, options)
}

/// All of a body but how it is answered.
pub fn read(model: &ServedModel, client: &Client, fields: &Fields) -> Result<(Chat, Sampling, ChatOptions), ApiError> {
    fields.refuse(&openai::UNSUPPORTED)?;
    fields.refuse(&["best_of", "echo"])?;
    // A template writes its own.
    fields.refuse_unless("add_special_tokens", false)?;
    let sampling = Sampling::read(model, client, fields, openai::own(fields, 1)?)?;
    let options = ChatOptions { logprobs: logprobs(fields)?, prompt_logprobs: openai::prompt_logprobs(fields)? };
    Ok((chat(fields)?, sampling, options))
}

/// What goes through the template.
pub fn chat(fields: &Fields) -> Result<Chat, ApiError> {
    Ok(Chat {
        param: "messages",
        add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(true),
        messages: messages::read(fields.get("messages"))?,
        tools: Tools::read(fields)?,
        constraint: Constraint::read(fields)?,
        variables: variables(fields)?,
    })
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

/// What the request adds to the template's variables: vLLM's `chat_template_kwargs`, and OpenAI's `reasoning_effort`.
fn variables(fields: &Fields) -> Result<Map<String, Value>, ApiError> {
    let mut variables = template_variables(fields)?;
    if let Some(effort) = fields.string("reasoning_effort")? {
        variables.entry("reasoning_effort").or_insert(effort.into());
        skip_thought(effort, &mut variables);
    }
    Ok(variables)
}

/// Has an answer begin with no thought where the effort for one is none, unless the request says otherwise by name.
pub fn skip_thought(effort: &str, variables: &mut Map<String, Value>) {
    if effort == "none" {
        variables.entry("enable_thinking").or_insert(false.into());
    }
}

/// vLLM's `chat_template_kwargs`.
pub fn template_variables(fields: &Fields) -> Result<Map<String, Value>, ApiError> {
    const NAME: &str = "chat_template_kwargs";
    const RESERVED: [&str; 7] =
        ["messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt", "chat_template"];
    let Some(asked) = fields.object(NAME)? else { return Ok(Map::new()) };
    if let Some(name) = RESERVED.iter().find(|name| asked.0.contains_key(**name)) {
        return Err(ApiError::invalid(NAME, format!("{NAME} has {name}, which is not for requests to set")));
    }
    let value = fields.get(NAME).unwrap_or(&Value::Null);
    if asked.0.len() > MAX_VARIABLES || value.to_string().len() > MAX_VARIABLES_BYTES {
        let expected = format!("at most {MAX_VARIABLES} values of {MAX_VARIABLES_BYTES} bytes together");
        return Err(wrong(NAME, value, expected));
    }
    Ok(asked.0.clone())
}
