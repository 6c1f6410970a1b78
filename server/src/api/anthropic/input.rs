//! Messages and tools as Anthropic writes them. Invariant: what a template may meet is text, or a call of a function
//! with its arguments as an object; blocks that would say something else are refused by name.

use fullbore_engine::text::ChatMessage;
use serde_json::{Map, Value, json};

use super::super::fields::{Fields, wrong};
use super::super::text_parts::TextParts;
use super::super::tools::{Function, ToolChoice, Tools, read_tools};
use crate::http::error::ApiError;

/// The system's words first; and whether the last message is the assistant's.
pub fn messages(fields: &Fields) -> Result<(Vec<ChatMessage>, bool), ApiError> {
    const EXPECTED: &str = "a list of at least one {\"role\": ..., \"content\": ...}";
    let missing = || ApiError::invalid("messages", format!("messages is missing; it must be {EXPECTED}"));
    let value = fields.get("messages").ok_or_else(missing)?;
    let items = value.as_array().filter(|items| !items.is_empty());
    let items = items.ok_or_else(|| wrong("messages", value, EXPECTED))?;
    let mut messages = Vec::with_capacity(items.len() + 1);
    if let Some(system) = fields.get("system") {
        messages.push(ChatMessage::new("system", TEXT.text("system", system)?));
    }
    for (index, item) in items.iter().enumerate() {
        message(&format!("messages[{index}]"), item, &mut messages)?;
    }
    let goes_on = messages.last().is_some_and(|last| last.role == "assistant");
    Ok((messages, goes_on))
}

fn message(at: &str, item: &Value, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let content = item.get("content").unwrap_or(&Value::Null);
    let param = format!("{at}.content");
    let whole = [json!({"type": "text", "text": content})];
    let blocks = match content {
        Value::String(_) => &whole[..],
        Value::Array(blocks) => blocks,
        other => return Err(wrong(&param, other, "a string or a list of blocks")),
    };
    let blocks = blocks.iter().enumerate().map(|(nth, block)| (format!("{param}[{nth}]"), block));
    match item["role"].as_str() {
        Some("user") => user(blocks, messages),
        Some("assistant") => assistant(blocks, messages),
        _ => Err(wrong(&format!("{at}.role"), &item["role"], "user or assistant")),
    }
}

/// Results of tools are messages of their own.
fn user<'a>(
    blocks: impl Iterator<Item = (String, &'a Value)>,
    messages: &mut Vec<ChatMessage>,
) -> Result<(), ApiError> {
    let mut said = Vec::new();
    for (at, block) in blocks {
        if block["type"] != "tool_result" {
            said.push(TEXT.part(&at, block)?);
            continue;
        }
        let content = block.get("content").map(|content| TEXT.text(&format!("{at}.content"), content));
        let id = block["tool_use_id"].as_str();
        let id = id.ok_or_else(|| wrong(&format!("{at}.tool_use_id"), &block["tool_use_id"], "a string"))?;
        let content = content.transpose()?.unwrap_or_default();
        let content = match block.get("is_error").unwrap_or(&Value::Null) {
            Value::Null | Value::Bool(false) => content,
            // No template has another way to say it.
            Value::Bool(true) => format!("Error: {content}").trim_end().to_owned(),
            other => return Err(wrong(&format!("{at}.is_error"), other, "true or false")),
        };
        speak(&mut said, messages);
        let mut result = ChatMessage::new("tool", content);
        result.extra.insert("tool_call_id".to_owned(), id.into());
        messages.push(result);
    }
    speak(&mut said, messages);
    Ok(())
}

fn speak(said: &mut Vec<&str>, messages: &mut Vec<ChatMessage>) {
    if !said.is_empty() {
        let text = said.join("\n");
        match messages.last_mut().filter(|last| last.role == "user") {
            // Turns that follow one another are one, as Anthropic has it.
            Some(last) => last.content += &format!("\n\n{text}"),
            None => messages.push(ChatMessage::new("user", text)),
        }
        said.clear();
    }
}

fn assistant<'a>(
    blocks: impl Iterator<Item = (String, &'a Value)>,
    messages: &mut Vec<ChatMessage>,
) -> Result<(), ApiError> {
    let (mut said, mut thought, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (at, block) in blocks {
        let expected = |expected| wrong(&at, block, expected);
        match block["type"].as_str() {
            Some("thinking") => {
                thought.push(block["thinking"].as_str().ok_or_else(|| expected("of type thinking, with a thought"))?);
            }
            // Of another model; nobody here can read it.
            Some("redacted_thinking") => {}
            Some("tool_use") => {
                let (id, name) = (block["id"].as_str(), block["name"].as_str());
                let (Some(id), Some(name), true) = (id, name, block["input"].is_object()) else {
                    return Err(expected("of type tool_use, with an id, a name and an object as input"));
                };
                let function = json!({"name": name, "arguments": block["input"]});
                calls.push(json!({"id": id, "type": "function", "function": function}));
            }
            _ => said.push(TEXT.part(&at, block)?),
        }
    }
    let mut message = ChatMessage::new("assistant", said.join("\n"));
    let mut extra = Map::new();
    if !thought.is_empty() {
        extra.insert("reasoning_content".to_owned(), thought.join("\n").into());
    }
    if !calls.is_empty() {
        extra.insert("tool_calls".to_owned(), calls.into());
    }
    message.extra = extra;
    messages.push(message);
    Ok(())
}

const TEXT: TextParts = TextParts {
    kinds: &[("text", "text")],
    takes_untyped: false,
    expected: "a block with a type, such as {\"type\": \"text\", \"text\": ...}",
};

pub fn tools(fields: &Fields) -> Result<Tools, ApiError> {
    let functions = read_tools(fields, |at, tool| match tool.get("type").filter(|kind| !kind.is_null()) {
        Some(kind) if kind != "custom" => {
            Err(wrong(&format!("{at}.type"), kind, "\"custom\"; this server has no tools of its own"))
        }
        _ => Function::new(at, Some(tool), "input_schema", false),
    })?;
    let choice = match fields.object("tool_choice")? {
        Some(asked) => {
            let word = match asked.string("type")? {
                Some("any") => Some("required"),
                Some("tool") => Some("named"),
                Some("required" | "named") => None,
                word => word,
            };
            let found = ToolChoice::read(word, asked.string("name")?, &functions)?;
            let value = fields.get("tool_choice").unwrap_or(&Value::Null);
            found.ok_or_else(|| wrong("tool_choice", value, "of type auto, any, none, or tool with a name"))?
        }
        None => ToolChoice::usual(&functions),
    };
    let single = fields.object("tool_choice")?.map(|asked| asked.bool("disable_parallel_tool_use")).transpose()?;
    Ok(Tools { functions, choice, parallel: single.flatten() != Some(true) })
}
