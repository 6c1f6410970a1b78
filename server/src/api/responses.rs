//! OpenAI's `/v1/responses`, stateless: a body becomes a [`Chat`], and its answer a response of items, whole or as
//! OpenAI's events. Invariant: nothing is kept, and what would need it is refused by name; the events of a stream are
//! numbered without a gap, and the last has the whole response.

use serde_json::{Value, json};

use super::answer::{Answer, Event};
use super::chat::{Chat, ChatOptions};
use super::constraint::Constraint;
use super::fields::{Fields, wrong};
use super::generation::{Delta, Generation, Jobs, Usage};
use super::parts::{Change, Part, PartKind, Parts};
use super::sampling::{self, MAX_LOGPROBS, Own, Sampling};
use super::{ServedModel, chat_completions, logprobs, unix_seconds};
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::start::random;

mod input;

/// Fields that change the answer, or need a memory, and that we do not have.
const UNSUPPORTED: [&str; 11] = [
    "background",
    "context_management",
    "conversation",
    "max_tool_calls",
    "moderation",
    "previous_response_id",
    "prompt",
    "skip_special_tokens",
    "store",
    "stop",
    "truncation",
];

pub fn jobs(model: &ServedModel, id: &str, client: &Client, fields: &Fields) -> Result<Jobs, ApiError> {
    fields.refuse(&UNSUPPORTED)?;
    let own = Own {
        max_tokens: sampling::max_tokens(fields, "max_output_tokens", 1)?,
        n: 1,
        stops: Vec::new(),
        user: fields.string("user")?.or(fields.string("safety_identifier")?),
    };
    let sampling = Sampling::read(model, client, fields, own)?;
    let options = ChatOptions { logprobs: logprobs(fields)?, prompt_logprobs: None };
    chat(fields)?.jobs(model, id, &sampling, options)
}

fn chat(fields: &Fields) -> Result<Chat, ApiError> {
    let mut variables = chat_completions::template_variables(fields)?;
    if let Some(effort) = option(fields, "reasoning", "effort")? {
        variables.insert("reasoning_effort".to_owned(), effort.into());
        chat_completions::skip_thought(effort, &mut variables);
    }
    Ok(Chat {
        param: "input",
        messages: input::messages(fields)?,
        tools: input::tools(fields)?,
        constraint: constraint(fields)?,
        variables,
        add_generation_prompt: true,
    })
}

/// Alternatives of each token of the text, where its log-probabilities are to be included.
fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let includes = includes(fields)?;
    let num_top = fields.integer("top_logprobs", 0..=MAX_LOGPROBS)?.unwrap_or(0) as u32;
    match includes.contains(&LOGPROBS) {
        true => Ok(Some(num_top)),
        false if num_top == 0 => Ok(None),
        false => {
            let message = format!("top_logprobs needs include to have {LOGPROBS}");
            Err(ApiError::invalid("top_logprobs", message))
        }
    }
}

/// What is to be in the response beside the usual.
fn includes<'a>(fields: &Fields<'a>) -> Result<Vec<&'a str>, ApiError> {
    let Some(value) = fields.get("include") else { return Ok(Vec::new()) };
    let items = value.as_array().ok_or_else(|| wrong("include", value, "a list of names"))?;
    let known = |item: &'a Value| {
        let name = item.as_str().filter(|name| [THOUGHTS, LOGPROBS].contains(name));
        let message = || format!("include of {:.60} is not supported by this server; leave it out", item.to_string());
        name.ok_or_else(|| ApiError::invalid("include", message()))
    };
    items.iter().map(known).collect()
}

const LOGPROBS: &str = "message.output_text.logprobs";
/// One comes as it is, and goes back so.
const THOUGHTS: &str = "reasoning.encrypted_content";

/// A text within an object.
fn option<'a>(fields: &Fields<'a>, object: &str, name: &str) -> Result<Option<&'a str>, ApiError> {
    Ok(fields.object(object)?.map(|object| object.string(name)).transpose()?.flatten())
}

/// `text.format`.
fn constraint(fields: &Fields) -> Result<Option<Constraint>, ApiError> {
    const PARAM: &str = "text.format";
    let Some(text) = fields.object("text")? else { return Ok(None) };
    text.refuse(&["verbosity"])?;
    let Some(format) = text.object("format")? else { return Ok(None) };
    match format.string("type")? {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Constraint::any_json(PARAM))),
        Some("json_schema") => Constraint::json_schema(PARAM, format.get("schema")).map(Some),
        _ => Err(ApiError::invalid(PARAM, "text.format must be of type text, json_object or json_schema")),
    }
}

pub struct ResponseAnswer {
    /// The response as far as the request says it.
    head: Value,
    stream: bool,
    parts: Parts,
    /// Items that have ended, and the id of the one that has not.
    items: Vec<Value>,
    item_id: String,
    /// Of the text that has not ended, each token's.
    logprobs: Vec<Value>,
    finish_reason: Option<&'static str>,
    sequence_number: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Status {
    InProgress,
    Completed,
    Incomplete,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::InProgress => "in_progress",
            Status::Completed => "completed",
            Status::Incomplete => "incomplete",
        }
    }
}

impl ResponseAnswer {
    pub fn read(id: &str, model: &ServedModel, fields: &Fields) -> Result<ResponseAnswer, ApiError> {
        let or = |name: &str, default: Value| fields.get(name).cloned().unwrap_or(default);
        let or_null = |name: &str| or(name, Value::Null);
        let format = fields.get("text").map_or(&Value::Null, |text| &text["format"]);
        let format = if format.is_null() { json!({"type": "text"}) } else { format.clone() };
        let reasoning = json!({"effort": option(fields, "reasoning", "effort")?, "summary": null});
        let head = json!({
            "id": id,
            "object": "response",
            "created_at": unix_seconds(),
            "background": false,
            "instructions": or_null("instructions"),
            "max_output_tokens": or_null("max_output_tokens"),
            "metadata": fields.object("metadata")?.map_or_else(|| json!({}), |metadata| json!(metadata.0)),
            "model": model.name,
            "parallel_tool_calls": or("parallel_tool_calls", json!(true)),
            "previous_response_id": null,
            "reasoning": reasoning,
            "store": false,
            "temperature": or("temperature", json!(model.defaults.temperature.unwrap_or(1.0))),
            "text": {"format": format},
            "tool_choice": or("tool_choice", json!("auto")),
            "tools": or("tools", json!([])),
            "top_logprobs": or("top_logprobs", json!(0)),
            "top_p": or("top_p", json!(model.defaults.top_p.unwrap_or(1.0))),
            "truncation": "disabled",
            "user": or_null("user"),
        });
        Ok(ResponseAnswer {
            head,
            stream: fields.bool("stream")?.unwrap_or(false),
            parts: Parts::default(),
            items: Vec::new(),
            item_id: String::new(),
            logprobs: Vec::new(),
            finish_reason: None,
            sequence_number: 0,
        })
    }

    fn status(&self) -> Status {
        match self.finish_reason {
            None => Status::InProgress,
            Some("length") => Status::Incomplete,
            Some(_) => Status::Completed,
        }
    }

    /// All of it, as far as it has come.
    fn response(&self, usage: Option<Usage>) -> Value {
        let status = self.status();
        let is_incomplete = status == Status::Incomplete;
        let mut response = self.head.clone();
        response["status"] = status.name().into();
        response["error"] = Value::Null;
        response["incomplete_details"] = is_incomplete.then(|| json!({"reason": "max_output_tokens"})).into();
        response["output"] = self.items.clone().into();
        response["usage"] = usage.map(self::usage).into();
        response
    }

    fn event(&mut self, kind: &str, mut data: Value) -> Event {
        data["sequence_number"] = self.sequence_number.into();
        self.sequence_number += 1;
        Event::named(kind, data)
    }

    fn take(&mut self, model: &ServedModel, mut delta: Delta) -> Vec<Event> {
        self.finish_reason = delta.finish_reason;
        let mut said = logprobs::response(&model.tokenizer, std::mem::take(&mut delta.entries));
        let changes = self.parts.take(delta);
        changes.into_iter().flat_map(|change| self.change(change, &mut said)).collect()
    }

    fn finish(&mut self) -> Vec<Event> {
        let changes = self.parts.finish();
        changes.into_iter().flat_map(|change| self.change(change, &mut Vec::new())).collect()
    }

    /// `said` are log-probabilities of a piece's text.
    fn change(&mut self, change: Change, said: &mut Vec<Value>) -> Vec<Event> {
        match change {
            Change::Begin(index, part) => self.begin_item(index, &part),
            Change::More(index, kind, text) => {
                let (name, mut data) = match kind {
                    PartKind::Thought => ("response.reasoning_text.delta", json!({"content_index": 0})),
                    PartKind::Text => {
                        let data = json!({"content_index": 0, "logprobs": said});
                        self.logprobs.append(said);
                        ("response.output_text.delta", data)
                    }
                    PartKind::Call => ("response.function_call_arguments.delta", json!({})),
                };
                self.place(index, &mut data);
                data["delta"] = text.into();
                vec![self.event(name, data)]
            }
            Change::End(index, part) => self.end_item(index, &part),
        }
    }

    fn place(&self, index: usize, data: &mut Value) {
        data["item_id"] = self.item_id.as_str().into();
        data["output_index"] = index.into();
    }

    fn begin_item(&mut self, index: usize, part: &Part) -> Vec<Event> {
        let prefix = match part.kind() {
            PartKind::Thought => "rs",
            PartKind::Text => "msg",
            PartKind::Call => "fc",
        };
        self.item_id = format!("{prefix}_{:016x}", random());
        let mut item = item(&self.item_id, part, &[], Status::InProgress);
        if part.kind() != PartKind::Call {
            item["content"] = json!([]);
        }
        let mut events = vec![self.event("response.output_item.added", json!({"output_index": index, "item": item}))];
        if let Some(content) = content(part, &[]) {
            let mut data = json!({"content_index": 0, "part": content});
            self.place(index, &mut data);
            events.push(self.event("response.content_part.added", data));
        }
        events
    }

    fn end_item(&mut self, index: usize, part: &Part) -> Vec<Event> {
        let logprobs = match part {
            Part::Text(_) => std::mem::take(&mut self.logprobs),
            Part::Thought(_) | Part::Call { .. } => Vec::new(),
        };
        let (name, mut data) = match part {
            Part::Thought(text) => ("response.reasoning_text.done", json!({"content_index": 0, "text": text})),
            Part::Text(text) => {
                ("response.output_text.done", json!({"content_index": 0, "text": text, "logprobs": logprobs}))
            }
            Part::Call { name, arguments, .. } => {
                ("response.function_call_arguments.done", json!({"name": name, "arguments": arguments}))
            }
        };
        self.place(index, &mut data);
        let mut events = vec![self.event(name, data)];
        if let Some(content) = content(part, &logprobs) {
            let mut data = json!({"content_index": 0, "part": content});
            self.place(index, &mut data);
            events.push(self.event("response.content_part.done", data));
        }
        // An item ends for the next one's sake, or with the answer.
        let status = if self.status() == Status::InProgress { Status::Completed } else { self.status() };
        let item = item(&self.item_id, part, &logprobs, status);
        self.items.push(item.clone());
        events.push(self.event("response.output_item.done", json!({"output_index": index, "item": item})));
        events
    }
}

impl Answer for ResponseAnswer {
    fn is_streamed(&self) -> bool {
        self.stream
    }

    fn begin(&mut self, _: &Generation) -> Vec<Event> {
        let data = json!({"response": self.response(None)});
        vec![self.event("response.created", data.clone()), self.event("response.in_progress", data)]
    }

    fn more(&mut self, model: &ServedModel, delta: Delta, _: Usage) -> Vec<Event> {
        self.take(model, delta)
    }

    fn end(&mut self, usage: Usage) -> Vec<Event> {
        let mut events = self.finish();
        let data = json!({"response": self.response(Some(usage))});
        let is_incomplete = self.status() == Status::Incomplete;
        let kind = if is_incomplete { "response.incomplete" } else { "response.completed" };
        events.push(self.event(kind, data));
        events
    }

    fn fail(&mut self, error: &ApiError, usage: Usage) -> Vec<Event> {
        let data = json!({"code": error.code, "message": error.message, "param": error.param});
        let told = self.event("error", data);
        let mut response = self.response(Some(usage));
        response["status"] = "failed".into();
        response["error"] = json!({"code": "server_error", "message": error.message});
        vec![told, self.event("response.failed", json!({"response": response}))]
    }

    fn gather(&mut self, model: &ServedModel, delta: Delta, _: &mut [Delta]) {
        self.take(model, delta);
    }

    fn whole(&mut self, _: &ServedModel, _: Vec<Delta>, usage: Usage) -> Value {
        self.finish();
        self.response(Some(usage))
    }
}

fn item(id: &str, part: &Part, logprobs: &[Value], status: Status) -> Value {
    let status = status.name();
    let content: Vec<Value> = content(part, logprobs).into_iter().collect();
    match part {
        Part::Thought(_) => json!({"id": id, "type": "reasoning", "summary": [], "content": content,
            "encrypted_content": null, "status": status}),
        Part::Text(_) => {
            json!({"id": id, "type": "message", "role": "assistant", "content": content, "status": status})
        }
        Part::Call { id: call_id, name, arguments } => json!({"id": id, "type": "function_call", "call_id": call_id,
            "name": name, "arguments": arguments, "status": status}),
    }
}

/// Of a part that is not a call.
fn content(part: &Part, logprobs: &[Value]) -> Option<Value> {
    match part {
        Part::Thought(text) => Some(json!({"type": "reasoning_text", "text": text})),
        Part::Text(text) => Some(json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})),
        Part::Call { .. } => None,
    }
}

fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::config::EngineConfig;
    use fullbore_engine::request::{self, FinishReason, TokenId, TokenLogprobs};

    use super::super::answer::collect;
    use super::super::reply::ReplyFormat;
    use super::super::tools::format::{CallFormat, Thought, ThoughtMarks};
    use super::super::tools::parameters::Callee;
    use super::*;
    use crate::start::Plan;

    const CALL: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";

    /// The items of an answer of these tokens, and the same of a whole one.
    async fn items(model: &ServedModel, said: &str, end: Option<TokenId>) -> [Vec<Value>; 2] {
        let body = json!({"input": "x", "include": [LOGPROBS]});
        let fields = Fields(body.as_object().expect("an object"));
        let open = || {
            let mut jobs = jobs(model, "resp_1", &Client::default(), &fields).expect("a request").jobs;
            assert_eq!(jobs[0].request.logprobs, Some(0));
            jobs[0].reply = Some(ReplyFormat {
                thought: Thought::Begun(ThoughtMarks::TAGS),
                calls: Some(CallFormat::Hermes),
                functions: vec![Callee::named("f")],
                ..ReplyFormat::default()
            });
            let opened = Generation::open(model, jobs, Instant::now(), None, None);
            let (generation, mut handed) = opened.expect("it fits");
            let bytes = said.bytes().map(|byte| TokenId(4 + u32::from(byte)));
            for id in bytes.chain(end) {
                let logprobs = Some(TokenLogprobs { id, logprob: -1.0, rank: 1, top: Vec::new() });
                handed[0].1.event(request::Event::Token { id, logprobs });
            }
            handed[0]
                .1
                .event(request::Event::Finished { reason: FinishReason::Stop, usage: request::Usage::default() });
            (generation, ResponseAnswer::read("resp_1", model, &fields).expect("a request"))
        };
        let (mut generation, mut streamed) = open();
        while let Some(delta) = generation.next().await {
            streamed.more(model, delta.expect("a piece"), generation.usage());
        }
        streamed.end(generation.usage());
        let (generation, mut whole) = open();
        collect(&mut whole, model, generation).await.expect("an answer");
        [streamed.items, whole.items]
    }

    fn served() -> ServedModel {
        let backend = Box::new(SimBackend::new(SimOptions::default()));
        let plan = Plan::of("sim", Bundle::simulated(), backend, EngineConfig::default(), 0);
        plan.load().expect("the simulator loads")
    }

    fn kinds(items: &[Value]) -> Vec<&str> {
        items.iter().filter_map(|item| item["type"].as_str()).collect()
    }

    #[tokio::test]
    async fn log_probabilities_are_of_what_is_said_and_of_no_thought_call_or_end() {
        let model = served();
        let end = model.stop_ids.first().copied();
        let with_call = format!("Yes <b>.\n{CALL}");
        // What may come before a mark is held back until the end.
        for (said, text) in [(with_call.as_str(), "Yes <b>."), ("Yes.\n \n", "Yes.\n \n"), ("Yes <tool", "Yes <tool")] {
            for items in items(&model, &format!("Hm.\n</think>\n\n{said}"), end).await {
                assert_eq!(kinds(&items)[..2], ["reasoning", "message"]);
                let content = &items[1]["content"][0];
                let tokens = content["logprobs"].as_array().expect("a list");
                let tokens: String = tokens.iter().filter_map(|token| token["token"].as_str()).collect();
                assert_eq!((&content["text"], tokens.as_str()), (&json!(text), text));
            }
        }
        model.end();
    }

    #[tokio::test]
    async fn a_whole_answer_has_the_items_of_a_streamed_one() {
        let model = served();
        let [streamed, whole] = items(&model, &format!("</think>One {CALL} two {CALL}"), None).await;
        assert_eq!(kinds(&streamed), ["message", "function_call", "message", "function_call"]);
        assert_eq!(kinds(&whole), kinds(&streamed));
        let texts = |items: &[Value]| items.iter().map(|item| item["content"][0]["text"].clone()).collect::<Vec<_>>();
        assert_eq!(texts(&whole), texts(&streamed));
        model.end();
    }
}
