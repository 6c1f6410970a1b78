//! Anthropic's `/v1/messages`: a body becomes a [`Chat`], and its answer a message of content blocks, whole or as
//! Anthropic's events. Invariant: every stream is `message_start`, `ping`, its blocks one after another,
//! `message_delta`, `message_stop`; an error ends it.

use serde_json::{Value, json};

use super::answer::{Answer, Event};
use super::chat::{Chat, ChatOptions};
use super::constraint::Constraint;
use super::fields::{Fields, wrong};
use super::generation::{Delta, Generation, Jobs, Usage};
use super::parts::{Change, Part, PartKind, Parts};
use super::sampling::{self, Own, Sampling};
use super::{ServedModel, chat_completions, texts};
use crate::http::access::Client;
use crate::http::error::ApiError;

mod input;

/// Fields that change the answer and that we do not have.
const UNSUPPORTED: [&str; 4] = ["container", "context_management", "mcp_servers", "speed"];

pub struct MessageAnswer {
    id: String,
    model: String,
    stream: bool,
    parts: Parts,
    /// Of its last piece.
    finish_reason: Option<&'static str>,
    stop: Option<String>,
}

pub fn jobs(model: &ServedModel, id: &str, client: &Client, fields: &Fields) -> Result<Jobs, ApiError> {
    fields.refuse(&UNSUPPORTED)?;
    let max_tokens = sampling::max_tokens(fields, "max_tokens", 1)?;
    let missing =
        || ApiError::invalid("max_tokens", "max_tokens is missing; it must be a number of tokens, at least 1");
    let user = fields.object("metadata")?.map(|metadata| metadata.string("user_id")).transpose()?.flatten();
    let own = Own {
        max_tokens: Some(max_tokens.ok_or_else(missing)?),
        n: 1,
        stops: sampling::stops(fields, "stop_sequences")?,
        user,
    };
    let sampling = Sampling::read(model, client, fields, own)?;
    chat(fields)?.jobs(model, id, &sampling, ChatOptions::default())
}

/// What goes through the template.
pub fn chat(fields: &Fields) -> Result<Chat, ApiError> {
    let mut variables = chat_completions::template_variables(fields)?;
    let thinks = thinking(fields)?;
    variables.entry("enable_thinking").or_insert(thinks.into());
    if let Some(effort) = fields.object("output_config")?.map(|config| config.string("effort")).transpose()?.flatten() {
        variables.insert("reasoning_effort".to_owned(), effort.into());
    }
    let (messages, goes_on) = input::messages(fields)?;
    if goes_on {
        let message =
            "the last of messages is the assistant's; this server does not go on with it: end with the user's";
        return Err(ApiError::invalid("messages", message));
    }
    Ok(Chat {
        param: "messages",
        messages,
        tools: input::tools(fields)?,
        constraint: constraint(fields)?,
        variables,
        add_generation_prompt: true,
    })
}

/// `/v1/messages/count_tokens`.
pub fn count_tokens(model: &ServedModel, fields: &Fields) -> Result<Value, ApiError> {
    fields.refuse(&UNSUPPORTED)?;
    Ok(json!({"input_tokens": chat(fields)?.render(model, texts::max_tokens(model))?.ids.len()}))
}

/// Whether the model is to think, where its template lets a request say so. As with Anthropic, not unless asked.
fn thinking(fields: &Fields) -> Result<bool, ApiError> {
    const NAME: &str = "thinking";
    let Some(thinking) = fields.object(NAME)? else { return Ok(false) };
    match thinking.string("type")? {
        // A budget is what Anthropic's models aim at; these do not know it.
        Some("enabled" | "adaptive") => Ok(true),
        Some("disabled") => Ok(false),
        _ => Err(wrong(NAME, fields.get(NAME).unwrap_or(&Value::Null), "of type enabled, adaptive or disabled")),
    }
}

/// `output_config.format`, or `output_format` as it was called before.
fn constraint(fields: &Fields) -> Result<Option<Constraint>, ApiError> {
    let config = fields.object("output_config")?;
    let newer = config.map(|config| config.object("format")).transpose()?.flatten();
    let (param, format) = match newer {
        Some(format) => ("output_config.format", format),
        None => match fields.object("output_format")? {
            Some(format) => ("output_format", format),
            None => return Ok(None),
        },
    };
    match format.string("type")? {
        Some("json_schema") => Constraint::json_schema(param, format.get("schema")).map(Some),
        _ => Err(ApiError::invalid(param, format!("{param} must be of type json_schema, with a schema"))),
    }
}

impl MessageAnswer {
    pub fn read(id: &str, model: &ServedModel, fields: &Fields) -> Result<MessageAnswer, ApiError> {
        Ok(MessageAnswer {
            id: id.to_owned(),
            model: model.name.clone(),
            stream: fields.bool("stream")?.unwrap_or(false),
            parts: Parts::default(),
            finish_reason: None,
            stop: None,
        })
    }

    /// All of it but its content.
    fn message(&self, content: Vec<Value>, usage: Usage) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": self.stop_reason(),
            "stop_sequence": self.stop,
            "usage": self::usage(usage),
        })
    }

    fn stop_reason(&self) -> Option<&'static str> {
        let has_called = self.parts.ended.iter().any(|part| part.kind() == PartKind::Call);
        Some(match self.finish_reason? {
            "length" => "max_tokens",
            // Also within a call.
            _ if self.stop.is_some() => "stop_sequence",
            // Also where the client chose the function.
            _ if has_called => "tool_use",
            _ => "end_turn",
        })
    }

    fn take(&mut self, delta: Delta) -> Vec<Change> {
        self.finish_reason = delta.finish_reason;
        self.stop.clone_from(&delta.stop);
        self.parts.take(delta)
    }
}

impl Answer for MessageAnswer {
    fn is_streamed(&self) -> bool {
        self.stream
    }

    fn begin(&mut self, generation: &Generation) -> Vec<Event> {
        let message = self.message(Vec::new(), generation.usage());
        vec![Event::named("message_start", json!({"message": message})), ping()]
    }

    fn more(&mut self, _: &ServedModel, delta: Delta, _: Usage) -> Vec<Event> {
        self.take(delta).into_iter().flat_map(events).collect()
    }

    fn end(&mut self, usage: Usage) -> Vec<Event> {
        let mut events: Vec<Event> = self.parts.finish().into_iter().flat_map(self::events).collect();
        let delta = json!({"stop_reason": self.stop_reason(), "stop_sequence": self.stop});
        events.push(Event::named("message_delta", json!({"delta": delta, "usage": self::usage(usage)})));
        events.push(Event::named("message_stop", json!({})));
        events
    }

    fn fail(&mut self, error: &ApiError, _: Usage) -> Vec<Event> {
        vec![Event::Named(error.anthropic_json())]
    }

    fn keep_alive(&self) -> Event {
        ping()
    }

    fn gather(&mut self, _: &ServedModel, delta: Delta, _: &mut [Delta]) {
        self.take(delta);
    }

    fn whole(&mut self, _: &ServedModel, _: Vec<Delta>, usage: Usage) -> Value {
        self.parts.finish();
        self.message(self.parts.ended.iter().map(block).collect(), usage)
    }
}

fn ping() -> Event {
    Event::named("ping", json!({}))
}

fn block(part: &Part) -> Value {
    match part {
        // Nothing is signed here, and no signature is asked for when a thought comes back.
        Part::Thought(text) => json!({"type": "thinking", "thinking": text, "signature": ""}),
        Part::Text(text) => json!({"type": "text", "text": text}),
        Part::Call { id, name, arguments } => {
            // One that was cut off is no object.
            let input = serde_json::from_str(arguments).ok().filter(Value::is_object).unwrap_or_else(|| json!({}));
            json!({"type": "tool_use", "id": id, "name": name, "input": input})
        }
    }
}

fn events(change: Change) -> Vec<Event> {
    match change {
        Change::Begin(index, part) => {
            vec![Event::named("content_block_start", json!({"index": index, "content_block": block(&part)}))]
        }
        Change::More(index, kind, text) => {
            let delta = match kind {
                PartKind::Thought => json!({"type": "thinking_delta", "thinking": text}),
                PartKind::Text => json!({"type": "text_delta", "text": text}),
                PartKind::Call => json!({"type": "input_json_delta", "partial_json": text}),
            };
            vec![Event::named("content_block_delta", json!({"index": index, "delta": delta}))]
        }
        Change::End(index, part) => {
            let delta = json!({"type": "signature_delta", "signature": ""});
            let signature = Event::named("content_block_delta", json!({"index": index, "delta": delta}));
            let signature = Some(signature).filter(|_| part.kind() == PartKind::Thought);
            let stop = Event::named("content_block_stop", json!({"index": index}));
            signature.into_iter().chain([stop]).collect()
        }
    }
}

/// As Anthropic counts: what the cache had is not among the input.
fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}
