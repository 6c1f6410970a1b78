//! Bodies of requests as JSON schemas, in groups as the parsers share them.

use fullbore_engine::request::MAX_LOGIT_BIASES;
use serde_json::{Map, Value, json};

use super::super::constraint::MAX_CHOICES as MAX_TEXTS;
use super::super::embeddings::MAX_INPUTS;
use super::super::sampling::{MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOPS};
use super::super::tools::MAX_TOOLS;
use super::reference;

type Fields = Vec<(&'static str, Value)>;

pub fn string() -> Value {
    json!({"type": ["string", "null"]})
}

pub fn bool() -> Value {
    json!({"type": ["boolean", "null"]})
}

pub fn any_object() -> Value {
    json!({"type": ["object", "null"]})
}

pub fn list(items: Value) -> Value {
    json!({"type": ["array", "null"], "items": items})
}

fn integer(least: i64, most: i64) -> Value {
    json!({"type": ["integer", "null"], "minimum": least, "maximum": most})
}

fn number(least: f64, most: f64) -> Value {
    json!({"type": ["number", "null"], "minimum": least, "maximum": most})
}

fn one_of(names: &[&str]) -> Value {
    let names: Vec<Value> = names.iter().map(|name| json!(name)).chain([Value::Null]).collect();
    json!({"type": ["string", "null"], "enum": names})
}

/// An object that may be left out, of which these fields are read.
pub fn object(fields: &[(&str, Value)]) -> Value {
    let properties: Map<String, Value> =
        fields.iter().map(|(name, schema)| ((*name).to_owned(), schema.clone())).collect();
    json!({"type": ["object", "null"], "properties": properties})
}

fn body(groups: &[Fields], required: &[&str]) -> Value {
    let fields: Vec<(&str, Value)> = groups.iter().flatten().cloned().collect();
    let mut body = object(&fields);
    body["type"] = json!("object");
    body["required"] = json!(required);
    body
}

fn described(mut schema: Value, description: &str) -> Value {
    schema["description"] = description.into();
    schema
}

fn tokens(least: i64) -> Value {
    integer(least, i64::from(u32::MAX))
}

fn token_ids() -> Value {
    json!({"type": "array", "items": {"type": "integer", "minimum": 0}})
}

/// What every endpoint that generates reads.
fn sampling() -> Fields {
    let ids = |fields: Value| {
        let mut ids = json!({"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}});
        ids.as_object_mut().into_iter().for_each(|ids| ids.extend(fields.as_object().cloned().unwrap_or_default()));
        ids
    };
    vec![
        ("model", string()),
        ("stream", bool()),
        ("temperature", number(0.0, 2.0)),
        ("top_p", json!({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1})),
        ("top_k", integer(-1, i64::from(u32::MAX))),
        ("min_p", number(0.0, 1.0)),
        ("seed", json!({"type": ["integer", "null"], "minimum": i64::MIN, "maximum": u64::MAX})),
        ("presence_penalty", number(-2.0, 2.0)),
        ("frequency_penalty", number(-2.0, 2.0)),
        ("repetition_penalty", number(0.01, 100.0)),
        (
            "logit_bias",
            json!({"type": ["object", "null"], "maxProperties": MAX_LOGIT_BIASES,
                "propertyNames": {"pattern": "^[0-9]+$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
        ),
        ("allowed_token_ids", ids(json!({"minItems": 1}))),
        ("min_tokens", described(tokens(0), "At most as many as the answer may have")),
        ("ignore_eos", bool()),
        ("stop_token_ids", ids(json!({"maxItems": MAX_STOPS}))),
        ("priority", integer(i64::from(i32::MIN), i64::from(i32::MAX))),
        ("cache_salt", string()),
    ]
}

fn stops() -> Value {
    let text = json!({"type": "string", "minLength": 1, "maxLength": MAX_STOP_BYTES});
    json!({"oneOf": [text, {"type": "array", "maxItems": MAX_STOPS, "items": text}, {"type": "null"}]})
}

/// What OpenAI's older endpoints read beside it.
fn openai() -> Fields {
    let stream_options = object(&[("include_usage", bool()), ("continuous_usage_stats", bool())]);
    vec![
        ("max_completion_tokens", tokens(1)),
        ("n", integer(1, MAX_CHOICES as i64)),
        ("stop", stops()),
        ("user", string()),
        ("stream_options", described(stream_options, "Only where stream is true")),
        ("return_token_ids", bool()),
        ("prompt_logprobs", integer(0, MAX_LOGPROBS)),
    ]
}

/// Forms of an answer.
fn forms() -> Fields {
    let schema = json!({"type": ["object", "string", "null"]});
    let texts = json!({"type": ["array", "null"], "minItems": 1, "maxItems": MAX_TEXTS,
        "items": {"type": "string", "minLength": 1}});
    vec![
        (
            "response_format",
            object(&[
                ("type", one_of(&["text", "json_object", "json_schema"])),
                ("schema", any_object()),
                ("json_schema", object(&[("schema", any_object())])),
            ]),
        ),
        ("structured_outputs", reference("StructuredOutputs")),
        ("guided_json", schema),
        ("guided_json_object", bool()),
        ("guided_regex", string()),
        ("guided_grammar", string()),
        ("guided_choice", texts),
    ]
}

/// What a chat's prompt is made of; a form beside tools says how they are called.
fn chat_prompt() -> Fields {
    let mut fields = forms();
    fields.extend([
        ("messages", json!({"type": "array", "minItems": 1, "items": reference("ChatMessage")})),
        ("tools", json!({"type": ["array", "null"], "maxItems": MAX_TOOLS, "items": reference("ChatTool")})),
        ("tool_choice", reference("ChatToolChoice")),
        ("parallel_tool_calls", bool()),
        ("add_generation_prompt", bool()),
        ("chat_template_kwargs", any_object()),
        ("reasoning_effort", string()),
    ]);
    fields
}

fn prompt() -> Value {
    json!({"oneOf": [{"type": "string"}, token_ids(),
        {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": token_ids()}]})
}

pub fn completions() -> Value {
    let own = vec![
        ("prompt", prompt()),
        ("max_tokens", tokens(0)),
        ("best_of", integer(1, MAX_CHOICES as i64)),
        ("echo", bool()),
        ("logprobs", integer(0, MAX_LOGPROBS)),
    ];
    body(&[own, openai(), sampling(), forms()], &["prompt"])
}

pub fn chat() -> Value {
    let own = vec![("max_tokens", tokens(1)), ("logprobs", bool()), ("top_logprobs", integer(0, MAX_LOGPROBS))];
    body(&[chat_prompt(), own, openai(), sampling()], &["messages"])
}

fn json_schema(kinds: &[&str]) -> Value {
    object(&[("type", one_of(kinds)), ("schema", any_object())])
}

pub fn responses() -> Value {
    let input = json!({"oneOf": [{"type": "string"},
        {"type": "array", "minItems": 1, "items": reference("ResponseItem")}]});
    let own = vec![
        ("input", input),
        ("instructions", string()),
        ("max_output_tokens", tokens(1)),
        ("text", object(&[("format", json_schema(&["text", "json_object", "json_schema"]))])),
        ("reasoning", object(&[("effort", string())])),
        ("tools", json!({"type": ["array", "null"], "maxItems": MAX_TOOLS, "items": reference("ResponseTool")})),
        ("tool_choice", reference("ResponseToolChoice")),
        ("parallel_tool_calls", bool()),
        ("chat_template_kwargs", any_object()),
        ("include", list(json!({"enum": ["reasoning.encrypted_content", "message.output_text.logprobs"]}))),
        ("top_logprobs", integer(0, MAX_LOGPROBS)),
        ("metadata", any_object()),
        ("user", string()),
        ("safety_identifier", string()),
    ];
    body(&[own, sampling()], &["input"])
}

/// What a message's prompt is made of.
fn message_prompt() -> Fields {
    let system = json!({"oneOf": [{"type": "string"}, {"type": "array", "items": reference("TextBlock")},
        {"type": "null"}]});
    vec![
        ("messages", json!({"type": "array", "minItems": 1, "items": reference("InputMessage")})),
        ("system", system),
        ("tools", json!({"type": ["array", "null"], "maxItems": MAX_TOOLS, "items": reference("MessageTool")})),
        (
            "tool_choice",
            object(&[
                ("type", one_of(&["auto", "any", "tool", "none"])),
                ("name", string()),
                ("disable_parallel_tool_use", bool()),
            ]),
        ),
        ("thinking", object(&[("type", one_of(&["enabled", "adaptive", "disabled"]))])),
        ("chat_template_kwargs", any_object()),
        ("output_config", object(&[("effort", string()), ("format", json_schema(&["json_schema"]))])),
        ("output_format", json_schema(&["json_schema"])),
    ]
}

pub fn messages() -> Value {
    let own = vec![
        ("max_tokens", json!({"type": "integer", "minimum": 1, "maximum": u32::MAX})),
        ("stop_sequences", stops()),
        ("metadata", object(&[("user_id", string())])),
    ];
    body(&[message_prompt(), own, sampling()], &["messages", "max_tokens"])
}

pub fn count_tokens() -> Value {
    body(&[message_prompt(), vec![("model", string())]], &["messages"])
}

pub fn embeddings() -> Value {
    let inputs = |items: Value| json!({"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": items});
    let input = json!({"oneOf": [{"type": "string"}, token_ids(), inputs(json!({"type": "string"})),
        inputs(token_ids())]});
    let own = vec![
        ("model", string()),
        ("input", input),
        ("encoding_format", one_of(&["float", "base64"])),
        ("dimensions", integer(1, i64::from(u32::MAX))),
        ("user", string()),
        ("priority", integer(i64::from(i32::MIN), i64::from(i32::MAX))),
        ("cache_salt", string()),
    ];
    body(&[own], &["input"])
}

/// What `completions` reads of a prompt.
pub fn render_completions() -> Value {
    body(&[vec![("model", string()), ("prompt", prompt())]], &["prompt"])
}

pub fn tokenize() -> Value {
    let own =
        vec![("model", string()), ("prompt", string()), ("add_special_tokens", bool()), ("return_token_strs", bool())];
    let part = json!({"type": ["string", "integer"], "minimum": 0});
    let content = json!({"oneOf": [string(), {"type": "array", "items": part}]});
    let of_llama_server =
        vec![("content", content), ("add_special", bool()), ("parse_special", bool()), ("with_pieces", bool())];
    let mut body = body(&[own, of_llama_server, chat_prompt()], &[]);
    body["anyOf"] = json!([{"required": ["prompt"]}, {"required": ["content"]}, {"required": ["messages"]}]);
    body
}

pub fn detokenize() -> Value {
    body(&[vec![("model", string()), ("tokens", token_ids())]], &["tokens"])
}

pub fn apply_template() -> Value {
    body(&[vec![("model", string())], chat_prompt()], &["messages"])
}
