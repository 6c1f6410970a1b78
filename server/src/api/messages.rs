//! The messages of a chat, as requests write them. Invariant: what a template may meet in one is text, or a call of a
//! function with its arguments as an object; what nobody knows is left out.

use fullbore_engine::text::ChatMessage;
use serde_json::{Map, Value, json};

use super::fields::wrong;
use super::json::JsonRoom;
use super::text_parts::TextParts;
use crate::http::error::ApiError;

pub fn read(value: Option<&Value>) -> Result<Vec<ChatMessage>, ApiError> {
    const EXPECTED: &str = "a list of at least one {\"role\": ..., \"content\": ...}";
    let Some(value) = value else {
        return Err(ApiError::invalid("messages", format!("messages is missing; it must be {EXPECTED}")));
    };
    let items = value.as_array().filter(|items| !items.is_empty());
    let items = items.ok_or_else(|| wrong("messages", value, EXPECTED))?;
    let mut room = JsonRoom::default();
    items.iter().enumerate().map(|(index, value)| message(index, value, &mut room)).collect()
}

fn message(index: usize, value: &Value, room: &mut JsonRoom) -> Result<ChatMessage, ApiError> {
    let name = |field: &str| format!("messages[{index}]{field}");
    let object = value.as_object().ok_or_else(|| wrong(&name(""), value, "an object with role and content"))?;
    let role = object.get("role").unwrap_or(&Value::Null);
    let role = role.as_str().ok_or_else(|| wrong(&name(".role"), role, "a string"))?;
    let content = content(&name(".content"), object.get("content").unwrap_or(&Value::Null))?;
    let mut extra = Map::new();
    for field in ["name", "tool_call_id", "reasoning_content"] {
        match object.get(field) {
            None | Some(Value::Null) => {}
            Some(text) if text.is_string() => drop(extra.insert(field.to_owned(), text.clone())),
            Some(other) => return Err(wrong(&name(&format!(".{field}")), other, "a string")),
        }
    }
    match object.get("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(calls)) if calls.is_empty() => {}
        Some(Value::Array(calls)) => {
            let call = |(nth, call)| tool_call(&name(&format!(".tool_calls[{nth}]")), call, room);
            let calls = calls.iter().enumerate().map(call).collect::<Result<Vec<_>, _>>()?;
            extra.insert("tool_calls".to_owned(), calls.into());
        }
        Some(other) => return Err(wrong(&name(".tool_calls"), other, "a list of calls")),
    }
    Ok(ChatMessage { role: role.to_owned(), content, extra })
}

const TEXT: TextParts = TextParts {
    kinds: &[("text", "text"), ("refusal", "refusal")],
    takes_untyped: true,
    expected: "{\"type\": \"text\", \"text\": ...}",
};

fn content(name: &str, content: &Value) -> Result<String, ApiError> {
    // An assistant that only called a tool says nothing.
    if content.is_null() { Ok(String::new()) } else { TEXT.text(name, content) }
}

/// A call as templates know it: its arguments are an object, where the API has them as text.
fn tool_call(name: &str, call: &Value, room: &mut JsonRoom) -> Result<Value, ApiError> {
    let function = &call["function"];
    let refuse = || wrong(name, call, "{\"id\": ..., \"function\": {\"name\": ..., \"arguments\": ...}}");
    let called = function["name"].as_str().ok_or_else(refuse)?;
    let arguments = arguments(&format!("{name}.function.arguments"), &function["arguments"], room)?;
    let id = call["id"].as_str().unwrap_or_default();
    Ok(json!({"id": id, "type": "function", "function": {"name": called, "arguments": arguments}}))
}

/// Arguments in the field `param`: an object, mostly written as text; `room` is for those of the whole request.
pub fn arguments(param: &str, arguments: &Value, room: &mut JsonRoom) -> Result<Value, ApiError> {
    const EXPECTED: &str = "an object, written as JSON";
    match arguments {
        Value::Null => Ok(json!({})),
        Value::Object(fields) => Ok(Value::Object(fields.clone())),
        Value::String(text) if text.trim().is_empty() => Ok(json!({})),
        Value::String(text) => {
            let parsed = room.parse(text.as_bytes());
            parsed.ok().filter(Value::is_object).ok_or_else(|| wrong(param, arguments, EXPECTED))
        }
        _ => Err(wrong(param, arguments, EXPECTED)),
    }
}
