//! How one HTTP request is answered: the JSON around its choices, whole or in chunks.
//!
//! Invariant: a whole choice is made by the same function as a chunk's, from all its deltas appended.

use serde_json::{Value, json};

use super::fields::Fields;
use super::generation::{Delta, Generation};
use super::reply::CallPiece;
use super::{Endpoint, ServedModel, logprobs, unix_seconds};
use crate::http::error::ApiError;
use crate::start::random;

pub struct Exchange {
    endpoint: Endpoint,
    pub id: String,
    created: u64,
    model: String,
    pub stream: bool,
    include_usage: bool,
    return_token_ids: bool,
    logprobs: bool,
}

#[derive(Clone, Copy)]
enum Form {
    Whole,
    Chunk,
}

impl Exchange {
    pub fn read(endpoint: Endpoint, model: &ServedModel, fields: &Fields) -> Result<Exchange, ApiError> {
        let options = fields.object("stream_options")?;
        let include_usage = options.map(|options| options.bool("include_usage")).transpose()?.flatten();
        let prefix = match endpoint {
            Endpoint::Completions => "cmpl",
            Endpoint::Chat => "chatcmpl",
        };
        Ok(Exchange {
            endpoint,
            id: format!("{prefix}-{:016x}", random()),
            created: unix_seconds(),
            model: model.name.clone(),
            stream: fields.bool("stream")?.unwrap_or(false),
            include_usage: include_usage.unwrap_or(false),
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            logprobs: fields.get("logprobs").is_some_and(|logprobs| *logprobs != false),
        })
    }

    /// What a stream begins with: a chat's roles.
    pub fn first_chunks(&self, generation: &Generation) -> Vec<Value> {
        let role = |index| {
            let delta = json!({"role": "assistant", "content": ""});
            let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
            let mut chunk = self.envelope(Form::Chunk, vec![choice]);
            if self.return_token_ids && index == 0 {
                chunk["prompt_token_ids"] = generation.prompt().iter().map(|id| id.0).collect();
            }
            chunk
        };
        match self.endpoint {
            Endpoint::Completions => Vec::new(),
            Endpoint::Chat => (0..generation.num_choices()).map(role).collect(),
        }
    }

    pub fn chunk(&self, model: &ServedModel, delta: &Delta) -> Value {
        self.envelope(Form::Chunk, vec![self.choice(model, delta, Form::Chunk)])
    }

    /// The last chunk, where the client asked for it.
    pub fn usage_chunk(&self, generation: &Generation) -> Option<Value> {
        self.include_usage.then(|| {
            let mut chunk = self.envelope(Form::Chunk, Vec::new());
            chunk["usage"] = usage(generation);
            chunk
        })
    }

    /// Waits for all choices.
    pub async fn collect(&self, model: &ServedModel, mut generation: Generation) -> Result<Value, ApiError> {
        let empty = |index| Delta { index, ..Delta::default() };
        let mut choices: Vec<Delta> = (0..generation.num_choices()).map(empty).collect();
        while let Some(delta) = generation.next().await {
            let delta = delta?;
            choices[delta.index].append(delta);
        }
        let whole = choices.iter().map(|choice| self.choice(model, choice, Form::Whole)).collect();
        let mut value = self.envelope(Form::Whole, whole);
        value["usage"] = usage(&generation);
        if self.return_token_ids && self.endpoint == Endpoint::Chat {
            value["prompt_token_ids"] =
                choices.iter().take(1).flat_map(|choice| &choice.prompt).map(|id| id.0).collect();
        }
        Ok(value)
    }

    fn envelope(&self, form: Form, choices: Vec<Value>) -> Value {
        let object = match (self.endpoint, form) {
            (Endpoint::Completions, _) => "text_completion",
            (Endpoint::Chat, Form::Whole) => "chat.completion",
            (Endpoint::Chat, Form::Chunk) => "chat.completion.chunk",
        };
        let mut value = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if self.include_usage {
            value["usage"] = Value::Null;
        }
        value
    }

    fn choice(&self, model: &ServedModel, delta: &Delta, form: Form) -> Value {
        let tokenizer = &model.tokenizer;
        let mut choice = json!({"index": delta.index});
        match self.endpoint {
            Endpoint::Completions => {
                choice["text"] = json!(delta.text);
                choice["logprobs"] =
                    if self.logprobs { logprobs::completion(tokenizer, &delta.entries) } else { Value::Null };
            }
            Endpoint::Chat => {
                match form {
                    Form::Whole => choice["message"] = message(delta),
                    Form::Chunk => choice["delta"] = said(delta),
                }
                choice["logprobs"] =
                    if self.logprobs { logprobs::chat(tokenizer, &delta.entries) } else { Value::Null };
            }
        }
        choice["finish_reason"] = json!(delta.finish_reason);
        if self.return_token_ids {
            choice["token_ids"] = delta.token_ids.iter().map(|id| id.0).collect();
            if self.endpoint == Endpoint::Completions && !delta.prompt.is_empty() {
                choice["prompt_token_ids"] = delta.prompt.iter().map(|id| id.0).collect();
            }
        }
        choice
    }
}

/// A chat's whole answer.
fn message(delta: &Delta) -> Value {
    // An answer that only calls says nothing.
    let content = (!delta.text.is_empty() || delta.calls.is_empty()).then_some(&delta.text);
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !delta.reasoning.is_empty() {
        message["reasoning_content"] = json!(delta.reasoning);
    }
    if !delta.calls.is_empty() {
        message["tool_calls"] = delta.calls.iter().map(|piece| call(piece, Form::Whole)).collect();
    }
    message
}

/// What a chunk adds to it.
fn said(delta: &Delta) -> Value {
    let mut said = json!({});
    if !delta.reasoning.is_empty() {
        said["reasoning_content"] = json!(delta.reasoning);
    }
    if !delta.text.is_empty() {
        said["content"] = json!(delta.text);
    }
    if !delta.calls.is_empty() {
        said["tool_calls"] = delta.calls.iter().map(|piece| call(piece, Form::Chunk)).collect();
    }
    said
}

fn call(piece: &CallPiece, form: Form) -> Value {
    let mut call = match form {
        Form::Whole => json!({}),
        Form::Chunk => json!({"index": piece.index}),
    };
    call["function"] = json!({});
    if let Some((id, name)) = &piece.begin {
        call["id"] = json!(id);
        call["type"] = json!("function");
        call["function"]["name"] = json!(name);
    }
    call["function"]["arguments"] = json!(piece.arguments);
    call
}

fn usage(generation: &Generation) -> Value {
    let usage = generation.usage();
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}
