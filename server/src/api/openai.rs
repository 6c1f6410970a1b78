//! `/v1/completions` and `/v1/chat/completions` as OpenAI has them, with what vLLM adds: what both read the same way,
//! and the JSON around their choices, whole or in chunks.
//!
//! Invariant: a whole choice is made by the same function as a chunk's, from all its deltas appended.

use fullbore_engine::request::{TokenId, TokenLogprobs};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::answer::{Answer, Event};
use super::fields::Fields;
use super::generation::{Delta, Entry, Generation, Usage};
use super::reply::CallPiece;
use super::sampling::{self, MAX_CHOICES, MAX_LOGPROBS, Own};
use super::{Endpoint, ServedModel, logprobs, unix_seconds};
use crate::http::error::ApiError;

/// Fields that change the answer and that we do not have: OpenAI's, vLLM's, and what other servers take a length or a
/// grammar by.
pub const UNSUPPORTED: [&str; 29] = [
    "audio",
    "bad_words",
    "chat_template",
    "continue_final_message",
    "documents",
    "ebnf",
    "function_call",
    "functions",
    "grammar",
    "guided_whitespace_pattern",
    "include_reasoning",
    "include_stop_str_in_output",
    "json_schema",
    "kv_transfer_params",
    "logprob_token_ids",
    "modalities",
    "n_predict",
    "prediction",
    "prompt_embeds",
    "regex",
    "return_tokens_as_token_ids",
    "skip_special_tokens",
    "structural_tag",
    "suffix",
    "thinking_token_budget",
    "truncate_prompt_tokens",
    "use_beam_search",
    "verbosity",
    "web_search_options",
];

/// What both call the same; `least_tokens` is the smallest `max_tokens` that makes sense.
pub fn own<'a>(fields: &Fields<'a>, least_tokens: u32) -> Result<Own<'a>, ApiError> {
    let limit = |name| sampling::max_tokens(fields, name, least_tokens);
    Ok(Own {
        max_tokens: limit("max_completion_tokens")?.or(limit("max_tokens")?),
        n: fields.integer("n", 1..=MAX_CHOICES as i64)?.map_or(1, |n| n as u32),
        stops: sampling::stops(fields, "stop")?,
        user: fields.string("user")?,
    })
}

/// vLLM's. As there, not of a stream.
pub fn prompt_logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    const NAME: &str = "prompt_logprobs";
    let asked = fields.integer(NAME, 0..=MAX_LOGPROBS)?;
    match asked.is_some() && fields.bool("stream")? == Some(true) {
        true => Err(ApiError::invalid(NAME, "prompt_logprobs is not for streams; leave out stream, or it")),
        false => Ok(asked.map(|asked| asked as u32)),
    }
}

pub struct OpenAiAnswer {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    stream: bool,
    include_usage: bool,
    /// In every chunk, as far as it has come.
    continuous_usage: bool,
    return_token_ids: bool,
    logprobs: bool,
    /// Choices of each prompt that are told, the best ones first, of so many that are made.
    best: Option<(u32, u32)>,
}

#[derive(Clone, Copy)]
enum Form {
    Whole,
    Chunk,
}

/// What is around choices. Typed, and written as it stands: a stream is one of them for each token.
#[derive(Serialize)]
struct Object<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "ids")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
}

#[derive(Default, Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Said<'a>>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
    /// vLLM's, with the end alone: what ended it, where the client named that.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "ids")]
    token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "ids")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
}

/// What a chunk adds to a chat's message.
#[derive(Default, Serialize)]
struct Said<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

/// The engine knows no JSON.
fn ids<S: Serializer>(ids: &Option<&[TokenId]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ids.unwrap_or_default().iter().map(|id| id.0))
}

impl OpenAiAnswer {
    pub fn read(endpoint: Endpoint, id: &str, model: &ServedModel, fields: &Fields) -> Result<OpenAiAnswer, ApiError> {
        let options = fields.object("stream_options")?;
        let option = |name| -> Result<bool, ApiError> {
            Ok(options.map(|options| options.bool(name)).transpose()?.flatten().unwrap_or(false))
        };
        let include_usage = option("include_usage")?;
        // As in vLLM, not without the other.
        let continuous_usage = option("continuous_usage_stats")? && include_usage;
        let stream = fields.bool("stream")?.unwrap_or(false);
        if options.is_some_and(|options| !options.0.is_empty()) && !stream {
            let message = "stream_options is for streams alone; set stream to true, or leave it out";
            return Err(ApiError::invalid("stream_options", message));
        }
        let best = match endpoint {
            Endpoint::Completions => super::completions::best_of(fields)?,
            _ => None,
        };
        Ok(OpenAiAnswer {
            endpoint,
            id: id.to_owned(),
            created: unix_seconds(),
            model: model.name.clone(),
            stream,
            include_usage,
            continuous_usage,
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            logprobs: fields.get("logprobs").is_some_and(|logprobs| *logprobs != false),
            best,
        })
    }

    /// A chunk of a stream around choices.
    fn chunk<'a>(&'a self, choices: Vec<Choice<'a>>, usage: Usage) -> Object<'a> {
        let usage = || if self.continuous_usage { self.usage(usage) } else { Value::Null };
        Object { usage: self.include_usage.then(usage), ..self.object(Form::Chunk, choices) }
    }

    fn object<'a>(&'a self, form: Form, choices: Vec<Choice<'a>>) -> Object<'a> {
        let object = match (self.endpoint, form) {
            (Endpoint::Completions, _) => "text_completion",
            (_, Form::Whole) => "chat.completion",
            (_, Form::Chunk) => "chat.completion.chunk",
        };
        Object {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            choices,
            usage: None,
            prompt_token_ids: None,
            prompt_logprobs: None,
        }
    }

    fn usage(&self, usage: Usage) -> Value {
        let mut value = json!({
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        });
        if self.endpoint == Endpoint::Chat {
            value["completion_tokens_details"] = json!({"reasoning_tokens": usage.reasoning_tokens});
        }
        value
    }

    fn choice<'a>(&self, model: &ServedModel, delta: &'a Delta, form: Form) -> Choice<'a> {
        let tokenizer = &model.tokenizer;
        let mut choice = Choice { index: delta.index, finish_reason: delta.finish_reason, ..Choice::default() };
        let is_completion = self.endpoint == Endpoint::Completions;
        match form {
            _ if is_completion => choice.text = Some(&delta.text),
            Form::Whole => choice.message = Some(message(delta)),
            Form::Chunk => choice.delta = Some(Said::of(delta)),
        }
        choice.stop_reason = delta.finish_reason.map(|_| match (&delta.stop, delta.stop_id) {
            (Some(text), _) => json!(text),
            (None, id) => json!(id.map(|id| id.0)),
        });
        choice.logprobs = self.logprobs.then(|| match is_completion {
            true => logprobs::completion(tokenizer, &delta.entries),
            false => logprobs::chat(tokenizer, &delta.entries),
        });
        if self.return_token_ids {
            choice.token_ids = Some(&delta.token_ids);
            choice.prompt_token_ids = (is_completion && !delta.prompt().is_empty()).then_some(delta.prompt());
        }
        let has_prompt = is_completion && !delta.prompt_logprobs.is_empty();
        choice.prompt_logprobs = has_prompt.then(|| logprobs::prompt(tokenizer, &delta.prompt_logprobs));
        choice
    }
}

impl Answer for OpenAiAnswer {
    fn is_streamed(&self) -> bool {
        self.stream
    }

    /// A chat's roles.
    fn begin(&mut self, generation: &Generation) -> Vec<Event> {
        if self.endpoint == Endpoint::Completions {
            return Vec::new();
        }
        let role = |index| {
            let delta = Said { role: Some("assistant"), content: Some(""), ..Said::default() };
            let mut chunk =
                self.chunk(vec![Choice { index, delta: Some(delta), ..Choice::default() }], generation.usage());
            chunk.prompt_token_ids = (self.return_token_ids && index == 0).then(|| generation.prompt());
            Event::data(&chunk)
        };
        (0..generation.num_choices()).map(role).collect()
    }

    fn more(&mut self, model: &ServedModel, delta: Delta, usage: Usage) -> Vec<Event> {
        vec![Event::data(&self.chunk(vec![self.choice(model, &delta, Form::Chunk)], usage))]
    }

    fn end(&mut self, usage: Usage) -> Vec<Event> {
        let usage = self.include_usage.then(|| {
            let chunk = self.object(Form::Chunk, Vec::new());
            Event::data(&Object { usage: Some(self.usage(usage)), ..chunk })
        });
        usage.into_iter().chain([Event::Done]).collect()
    }

    fn fail(&mut self, error: &ApiError, _: Usage) -> Vec<Event> {
        vec![Event::data(&error.json())]
    }

    fn whole(&mut self, model: &ServedModel, mut choices: Vec<Delta>, usage: Usage) -> Value {
        if let Some((n, best_of)) = self.best {
            choices = best(choices, n as usize, best_of as usize);
        }
        let whole = choices.iter().map(|choice| self.choice(model, choice, Form::Whole)).collect();
        let mut object = Object { usage: Some(self.usage(usage)), ..self.object(Form::Whole, whole) };
        if let Some(first) = choices.first().filter(|_| self.endpoint == Endpoint::Chat) {
            object.prompt_token_ids = self.return_token_ids.then_some(first.prompt());
            let has_prompt = !first.prompt_logprobs.is_empty();
            object.prompt_logprobs = has_prompt.then(|| logprobs::prompt(&model.tokenizer, &first.prompt_logprobs));
        }
        json!(object)
    }
}

/// Of each `best_of` choices, those of one prompt, the `n` whose tokens are the most likely, in the mean of logarithms.
fn best(mut choices: Vec<Delta>, n: usize, best_of: usize) -> Vec<Delta> {
    let mean = |choice: &Delta| {
        let chosen = choice.entries.iter().rev().take(choice.token_ids.len());
        let logprobs = chosen.filter_map(|entry: &Entry| entry.logprobs.as_ref());
        let sum: f32 = logprobs.map(|logprobs: &TokenLogprobs| logprobs.logprob).sum();
        sum / choice.token_ids.len().max(1) as f32
    };
    let mut told = Vec::new();
    while !choices.is_empty() {
        let rest = choices.split_off(best_of.min(choices.len()));
        // Of equal ones, those that come first.
        choices.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        told.extend(choices.into_iter().take(n));
        choices = rest;
    }
    told.iter_mut().enumerate().for_each(|(index, choice)| choice.index = index);
    told
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

impl<'a> Said<'a> {
    fn of(delta: &'a Delta) -> Said<'a> {
        let some = |text: &'a String| (!text.is_empty()).then_some(text.as_str());
        Said {
            role: None,
            reasoning_content: some(&delta.reasoning),
            content: some(&delta.text),
            tool_calls: delta.calls.iter().map(|piece| call(piece, Form::Chunk)).collect(),
        }
    }
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
