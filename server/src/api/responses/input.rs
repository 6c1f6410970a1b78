//! Items and tools as OpenAI's responses have them. Invariant: items that follow one another and are of one turn of the
//! assistant (its thought, its words, its calls) become one message, and what nobody here can read is refused by name.

use fullbore_engine::text::ChatMessage;
use serde_json::{Value, json};

use super::super::fields::{Fields, wrong};
use super::super::json::JsonRoom;
use super::super::messages::arguments;
use super::super::text_parts::TextParts;
use super::super::tools::{Function, ToolChoice, Tools, read_tools};
use crate::http::error::ApiError;

/// `instructions`, then `input`.
pub fn messages(fields: &Fields) -> Result<Vec<ChatMessage>, ApiError> {
    const EXPECTED: &str = "a string, or a list of at least one item";
    let missing = || ApiError::invalid("input", format!("input is missing; it must be {EXPECTED}"));
    let value = fields.get("input").ok_or_else(missing)?;
    let mut messages = Vec::new();
    if let Some(instructions) = fields.string("instructions")? {
        messages.push(ChatMessage::new("system", instructions));
    }
    match value {
        Value::String(text) => messages.push(ChatMessage::new("user", text.as_str())),
        Value::Array(items) if !items.is_empty() => {
            let mut room = JsonRoom::default();
            for (index, item) in items.iter().enumerate() {
                read_item(&format!("input[{index}]"), item, &mut room, &mut messages)?;
            }
        }
        other => return Err(wrong("input", other, EXPECTED)),
    }
    Ok(messages)
}

fn read_item(at: &str, item: &Value, room: &mut JsonRoom, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let text_in = |name: &str| {
        let value = &item[name];
        value.as_str().ok_or_else(|| wrong(&format!("{at}.{name}"), value, "a string"))
    };
    match item["type"].as_str() {
        None | Some("message") => {
            let role = text_in("role")?;
            let content = TEXT.text(&format!("{at}.content"), &item["content"])?;
            match role {
                "assistant" => turn(messages, has_only_thought).content = content,
                // What is before the user's first words is one message: there are templates that take no second.
                "system" | "developer" if messages.len() == 1 && messages[0].role == "system" => {
                    messages[0].content += &format!("\n\n{content}");
                }
                role => messages.push(ChatMessage::new(role, content)),
            }
        }
        Some("function_call") => {
            let (name, id) = (text_in("name")?, text_in("call_id")?);
            let arguments = arguments(&format!("{at}.arguments"), &item["arguments"], room)?;
            let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
            let calls = turn(messages, |_| true).extra.entry("tool_calls").or_insert_with(|| json!([]));
            calls.as_array_mut().into_iter().for_each(|calls| calls.push(call.clone()));
        }
        Some("function_call_output") => {
            let mut result = ChatMessage::new("tool", TEXT.text(&format!("{at}.output"), &item["output"])?);
            result.extra.insert("tool_call_id".to_owned(), text_in("call_id")?.into());
            messages.push(result);
        }
        Some("reasoning") => {
            let content = item["content"].as_array().into_iter().flatten();
            let summary = item["summary"].as_array().into_iter().flatten();
            let texts: Vec<&str> = content.chain(summary).filter_map(|part| part["text"].as_str()).collect();
            if !texts.is_empty() {
                turn(messages, |_| false).extra.insert("reasoning_content".to_owned(), texts.join("\n").into());
            }
        }
        Some("item_reference") => {
            let message = format!("{at} refers to an item, and this server keeps none; send the item itself");
            return Err(ApiError::invalid(at, message));
        }
        Some(kind) => {
            return Err(ApiError::invalid(at, format!("{at} is of type {kind:.40}; this server does not take it")));
        }
    }
    Ok(())
}

fn has_only_thought(said: &ChatMessage) -> bool {
    said.content.is_empty() && !said.extra.contains_key("tool_calls")
}

/// The message of the assistant that is the last one, where it `goes_on`, or a new one.
fn turn(messages: &mut Vec<ChatMessage>, goes_on: impl Fn(&ChatMessage) -> bool) -> &mut ChatMessage {
    if !messages.last().is_some_and(|last| last.role == "assistant" && goes_on(last)) {
        messages.push(ChatMessage::new("assistant", ""));
    }
    let last = messages.len() - 1;
    &mut messages[last]
}

const TEXT: TextParts = TextParts {
    kinds: &[("input_text", "text"), ("output_text", "text"), ("text", "text"), ("refusal", "refusal")],
    takes_untyped: false,
    expected: "{\"type\": \"input_text\", \"text\": ...}",
};

pub fn tools(fields: &Fields) -> Result<Tools, ApiError> {
    let mut functions = read_tools(fields, |at, tool| match &tool["type"] {
        // As OpenAI has it, its arguments follow the schema unless the client says otherwise.
        kind if kind == "function" => Function::new(at, Some(tool), "parameters", true),
        kind => Err(wrong(&format!("{at}.type"), kind, "\"function\"; this server has no other tools")),
    })?;
    let choice = match fields.get("tool_choice") {
        Some(value) if value["type"] == "allowed_tools" => {
            let name = |tool: &Value| tool["name"].as_str().map(str::to_owned);
            ToolChoice::among(&mut functions, value, value, name)?
        }
        Some(value) => {
            let name = value["name"].as_str().filter(|_| value["type"] == "function");
            let word = value.as_str().or(name.and(Some("named")));
            let expected = "none, auto, required, or {\"type\": \"function\", \"name\": ...}";
            ToolChoice::read(word, name, &functions)?.ok_or_else(|| wrong("tool_choice", value, expected))?
        }
        None => ToolChoice::usual(&functions),
    };
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    Ok(Tools { functions, choice, parallel })
}
