//! Text as dialects write it: a string, or a list of parts, each of a type. Invariant: parts that say something else
//! are refused by name.

use serde_json::Value;

use super::fields::wrong;
use crate::http::error::ApiError;

/// The parts that a dialect knows as text.
pub struct TextParts {
    /// (type, the field that has its text).
    pub kinds: &'static [(&'static str, &'static str)],
    /// Whether a part without a type is text.
    pub takes_untyped: bool,
    pub expected: &'static str,
}

impl TextParts {
    /// Of a string, or of parts, a line each.
    pub fn text(&self, at: &str, content: &Value) -> Result<String, ApiError> {
        match content {
            Value::String(text) => Ok(text.clone()),
            Value::Array(parts) => {
                let text = |(nth, part)| self.part(&format!("{at}[{nth}]"), part);
                Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
            }
            other => Err(wrong(at, other, "a string or a list of text parts")),
        }
    }

    pub fn part<'a>(&self, at: &str, part: &'a Value) -> Result<&'a str, ApiError> {
        let kind = part.get("type").unwrap_or(&Value::Null);
        let known = self.kinds.iter().find(|(known, _)| kind == known);
        let field = match (known, kind.as_str()) {
            (Some((_, field)), _) => Some(*field),
            (None, Some(kind)) => {
                return Err(ApiError::invalid(at, format!("{at} is of type {kind:.40}; this server reads text only")));
            }
            (None, None) => (self.takes_untyped && kind.is_null()).then_some("text"),
        };
        field.and_then(|field| part[field].as_str()).ok_or_else(|| wrong(at, part, self.expected))
    }
}
