//! The functions that a chat may call, as requests say it: `tools`, `tool_choice`, `parallel_tool_calls`.
//!
//! Invariant: names are of the few letters that OpenAI allows, so they mean nothing in any format that they are written
//! in. Knows no format: [`format`] does.

use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use crate::http::error::ApiError;

pub mod calls;
pub mod format;
pub mod parameters;
#[cfg(test)]
mod published;
mod pythonic;
mod rules;
pub mod scanner;
mod tagged;

pub const MAX_TOOLS: usize = 128;
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
    /// As chats have them.
    pub fn read(fields: &Fields) -> Result<Tools, ApiError> {
        let mut functions = read_tools(fields, Function::read)?;
        let choice = match fields.get("tool_choice") {
            Some(value) if value["type"] == "allowed_tools" => {
                let name = |tool: &Value| tool["function"]["name"].as_str().map(str::to_owned);
                ToolChoice::among(&mut functions, value, &value["allowed_tools"], name)?
            }
            Some(value) => {
                let named = value["function"]["name"].as_str().filter(|_| value["type"] == "function");
                let expected = "none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}";
                let word = value.as_str().or(named.and(Some("named")));
                ToolChoice::read(word, named, &functions)?.ok_or_else(|| wrong("tool_choice", value, expected))?
            }
            None => ToolChoice::usual(&functions),
        };
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

/// The list in `tools`, each read with its name.
pub fn read_tools(
    fields: &Fields,
    read: impl Fn(&str, &Value) -> Result<Function, ApiError>,
) -> Result<Vec<Function>, ApiError> {
    let Some(value) = fields.get("tools") else { return Ok(Vec::new()) };
    let expected = || format!("a list of at most {MAX_TOOLS} functions");
    let tools = value.as_array().filter(|tools| tools.len() <= MAX_TOOLS);
    let tools = tools.ok_or_else(|| wrong("tools", value, expected()))?;
    tools.iter().enumerate().map(|(index, tool)| read(&format!("tools[{index}]"), tool)).collect()
}

impl Function {
    fn read(at: &str, tool: &Value) -> Result<Function, ApiError> {
        let kind = tool.get("type").unwrap_or(&Value::Null);
        if *kind != "function" {
            return Err(wrong(&format!("{at}.type"), kind, "\"function\"; this server has no other tools"));
        }
        let function = Function::new(&format!("{at}.function"), tool.get("function"), "parameters", false)?;
        Ok(Function { tool: tool.clone(), ..function })
    }

    /// From an object with a name, the field `schema` being of its arguments.
    pub fn new(at: &str, function: Option<&Value>, schema: &str, strict: bool) -> Result<Function, ApiError> {
        let function = function.unwrap_or(&Value::Null);
        let fields = Fields(function.as_object().ok_or_else(|| wrong(at, function, "an object with a name"))?);
        let name = fields.get("name").unwrap_or(&Value::Null);
        let expected = || format!("1 to {MAX_NAME_BYTES} letters, digits, dots, - and _");
        let refuse = || wrong(&format!("{at}.name"), name, expected());
        let name = name.as_str().filter(|name| is_name(name)).ok_or_else(refuse)?;
        let parameters = match fields.get(schema) {
            // It has none.
            None => json!({"type": "object", "properties": {}, "additionalProperties": false}),
            Some(parameters) if parameters.is_object() => parameters.clone(),
            Some(other) => return Err(wrong(&format!("{at}.{schema}"), other, "a JSON schema: an object")),
        };
        let mut told = json!({"name": name});
        if let Some(description) = fields.string("description")? {
            told["description"] = description.into();
        }
        told["parameters"] = parameters.clone();
        Ok(Function {
            name: name.to_owned(),
            parameters,
            strict: fields.bool("strict")?.unwrap_or(strict),
            tool: json!({"type": "function", "function": told}),
        })
    }
}

pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.chars().all(is_name_letter)
}

pub fn is_name_letter(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.')
}

impl ToolChoice {
    /// OpenAI's `allowed_tools`, of which `allowed` has the mode and the tools: others are as if they were not there.
    pub fn among(
        functions: &mut Vec<Function>,
        value: &Value,
        allowed: &Value,
        name: impl Fn(&Value) -> Option<String>,
    ) -> Result<ToolChoice, ApiError> {
        let expected = "allowed_tools with a mode (auto or required) and tools, each by type and name";
        let refuse = || wrong("tool_choice", value, expected);
        let names = allowed["tools"].as_array().ok_or_else(refuse)?.iter().map(name);
        let names = names.collect::<Option<Vec<String>>>().ok_or_else(refuse)?;
        for name in &names {
            ToolChoice::read(Some("named"), Some(name), functions)?;
        }
        functions.retain(|function| names.contains(&function.name));
        let mode = allowed["mode"].as_str().filter(|mode| ["auto", "required"].contains(mode));
        ToolChoice::read(mode, None, functions)?.ok_or_else(refuse)
    }

    /// Where nobody says.
    pub fn usual(functions: &[Function]) -> ToolChoice {
        if functions.is_empty() { ToolChoice::None } else { ToolChoice::Auto }
    }

    /// From `none`, `auto`, `required` or `named`; `None` if it is no such word.
    pub fn read(
        word: Option<&str>,
        name: Option<&str>,
        functions: &[Function],
    ) -> Result<Option<ToolChoice>, ApiError> {
        const NAME: &str = "tool_choice";
        let choice = match word {
            Some("none") => return Ok(Some(ToolChoice::None)),
            Some("auto") => return Ok(Some(ToolChoice::usual(functions))),
            Some("required") => ToolChoice::Required,
            Some("named") => {
                let Some(name) = name else { return Ok(None) };
                let found = functions.iter().position(|function| function.name == name);
                let unknown =
                    || ApiError::invalid(NAME, format!("tool_choice names {name:.80}, which is not among tools"));
                ToolChoice::Named(found.ok_or_else(unknown)?)
            }
            _ => return Ok(None),
        };
        match functions.is_empty() {
            true => Err(ApiError::invalid(NAME, "tool_choice needs tools, and there are none")),
            false => Ok(Some(choice)),
        }
    }
}
