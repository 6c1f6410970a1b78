//! What a body would have the model read, as token ids: `/v1/completions/render` and `/v1/chat/completions/render`, as
//! vLLM has them for routers that look prompts up before they choose a worker. Invariant: ids and refusals are those of
//! the endpoint that generates; nothing is queued here.

use serde_json::{Value, json};

use super::completions::{self, Input};
use super::fields::Fields;
use super::openai::OpenAiAnswer;
use super::sampling::{MAX_CHOICES, Sampling};
use super::{Answer, Constraint, Endpoint, ServedModel, chat_completions};
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::start::random;

/// A list, for there may be several prompts.
pub fn completions(model: &ServedModel, fields: &Fields) -> Result<Value, ApiError> {
    let rendered = |input: &Input| {
        let ids = completions::ids(model, "prompt", input)?;
        let prompt = completions::text(model, input, &ids);
        let ids: Vec<u32> = ids.iter().map(|id| id.0).collect();
        Ok(json!({"prompt": prompt, "prompt_token_ids": ids}))
    };
    let inputs = completions::inputs(fields, "prompt", MAX_CHOICES)?;
    inputs.iter().map(rendered).collect::<Result<Vec<_>, ApiError>>().map(Value::from)
}

pub fn chat(model: &ServedModel, fields: &Fields) -> Result<Value, ApiError> {
    let answer = OpenAiAnswer::read(Endpoint::Chat, "", model, fields)?;
    let (chat, sampling, _) = chat_completions::read(model, &Client::default(), fields)?;
    chat.constraint.clone().map(Constraint::check).transpose()?;
    let ids = chat.render(model, model.max_model_len() as usize)?.ids;
    let max_tokens = sampling.max_tokens(|| Sampling::rest_of_context(model, ids.len()))?;
    let ids: Vec<u32> = ids.iter().map(|id| id.0).collect();
    Ok(json!({
        "request_id": format!("chatcmpl-{:016x}", random()),
        "model": model.name,
        "token_ids": ids,
        "sampling_params": sampling.told(max_tokens),
        "stream": answer.is_streamed(),
        "stream_options": fields.get("stream_options"),
        "cache_salt": fields.get("cache_salt"),
        "priority": sampling.priority(),
    }))
}
