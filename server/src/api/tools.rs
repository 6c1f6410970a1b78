//! The functions that a chat may call, as requests say it: `tools`, `tool_choice`, `parallel_tool_calls`.
//!
//! Invariant: names are of the few letters that OpenAI allows, so they mean nothing in any format that they are written
//! in. Knows no format: [`format`] does.

use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use crate::http::error::ApiError;

pub mod calls;
pub mod format;

const MAX_TOOLS: usize = 128;
const MAX_NAME_BYTES: usize = 64;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools {
    pub functions: Vec<Function>,
    pub choice: ToolChoice,
    /// Whether one answer may call several.
    pub parallel: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    pub name: String,
    /// Of its arguments: an object.
    pub parameters: Value,
    /// Whether its arguments follow `parameters` also where nobody made it be called.
    pub strict: bool,
    /// As the client wrote it, for the template.
    pub tool: Value,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    #[default]
    None,
    Auto,
    Required,
    /// Of `functions`.
    Named(usize),
}

impl Tools {
    pub fn read(fields: &Fields) -> Result<Tools, ApiError> {
        let functions = match fields.get("tools") {
            None => Vec::new(),
            Some(value) => {
                let expected = || format!("a list of at most {MAX_TOOLS} functions");
                let tools = value.as_array().filter(|tools| tools.len() <= MAX_TOOLS);
                let tools = tools.ok_or_else(|| wrong("tools", value, expected()))?;
                tools.iter().enumerate().map(Function::read).collect::<Result<Vec<_>, _>>()?
            }
        };
        let choice = tool_choice(fields, &functions)?;
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        Ok(Tools { functions, choice, parallel })
    }

    /// Whether the model is told of the functions and may call them.
    pub fn are_offered(&self) -> bool {
        self.choice != ToolChoice::None && !self.functions.is_empty()
    }

    /// Whether an answer that calls nothing is none.
    pub fn are_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// Those that may be called.
    pub fn callable(&self) -> &[Function] {
        match self.choice {
            ToolChoice::Named(index) => &self.functions[index..=index],
            _ => &self.functions,
        }
    }
}

impl Function {
    fn read((index, tool): (usize, &Value)) -> Result<Function, ApiError> {
        let at = format!("tools[{index}]");
        let kind = tool.get("type").unwrap_or(&Value::Null);
        if *kind != "function" {
            return Err(wrong(&format!("{at}.type"), kind, "\"function\"; this server has no other tools"));
        }
        let function = tool.get("function").unwrap_or(&Value::Null);
        let object = function.as_object();
        let fields = Fields(object.ok_or_else(|| wrong(&format!("{at}.function"), function, "an object with a name"))?);
        let name = fields.get("name").unwrap_or(&Value::Null);
        let expected = || format!("1 to {MAX_NAME_BYTES} letters, digits, dots, - and _");
        let refuse = || wrong(&format!("{at}.function.name"), name, expected());
        let parameters = match fields.get("parameters") {
            // It has none.
            None => json!({"type": "object", "properties": {}, "additionalProperties": false}),
            Some(schema) if schema.is_object() => schema.clone(),
            Some(other) => return Err(wrong(&format!("{at}.function.parameters"), other, "a JSON schema: an object")),
        };
        Ok(Function {
            name: name.as_str().filter(|name| is_name(name)).ok_or_else(refuse)?.to_owned(),
            parameters,
            strict: fields.bool("strict")?.unwrap_or(false),
            tool: tool.clone(),
        })
    }
}

pub fn is_name(name: &str) -> bool {
    let is_letter = |letter: u8| letter.is_ascii_alphanumeric() || matches!(letter, b'_' | b'-' | b'.');
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_letter)
}

fn tool_choice(fields: &Fields, functions: &[Function]) -> Result<ToolChoice, ApiError> {
    const NAME: &str = "tool_choice";
    let Some(value) = fields.get(NAME) else {
        return Ok(if functions.is_empty() { ToolChoice::None } else { ToolChoice::Auto });
    };
    let choice = match value.as_str() {
        Some("none") => return Ok(ToolChoice::None),
        Some("auto") if functions.is_empty() => return Ok(ToolChoice::None),
        Some("auto") => ToolChoice::Auto,
        Some("required") => ToolChoice::Required,
        _ => {
            let named = value["function"]["name"].as_str().filter(|_| value["type"] == "function");
            let expected = "none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}";
            let name = named.ok_or_else(|| wrong(NAME, value, expected))?;
            let found = functions.iter().position(|function| function.name == name);
            let unknown = || ApiError::invalid(NAME, format!("tool_choice names {name:.80}, which is not among tools"));
            ToolChoice::Named(found.ok_or_else(unknown)?)
        }
    };
    match functions.is_empty() {
        true => Err(ApiError::invalid(NAME, "tool_choice needs tools, and there are none")),
        false => Ok(choice),
    }
}
