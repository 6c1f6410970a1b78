//! Fields of a JSON object, each read as one type within one range. Invariant: every refusal names the field, shows the
//! value and says what it may be. `null` is as good as absent; fields that nobody asks for are ignored.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use crate::http::error::ApiError;

#[derive(Clone, Copy)]
pub struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        #[cfg(test)]
        asked::note(name);
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(name, "a string", Value::as_str)
    }

    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.read(name, "an object", |value| value.as_object().map(Fields))
    }

    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let expected = format!("an integer from {} to {}", range.start(), range.end());
        self.read(name, expected, |value| integer(value).filter(|number| range.contains(number)))
    }

    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        let number = |value: &Value| value.as_f64().filter(|number| range.contains(number));
        Ok(self.read(name, expected, number)?.map(|number| number as f32))
    }

    fn read<T>(
        &self,
        name: &str,
        expected: impl Display,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| wrong(name, value, expected))
    }

    /// Refuses `name` where it is not what is done anyway.
    pub fn refuse_unless(&self, name: &str, done: bool) -> Result<(), ApiError> {
        match self.0.get(name) {
            Some(value) if !value.is_null() && *value != done => Err(unsupported(name)),
            _ => Ok(()),
        }
    }

    /// Refuses those of `names` that are there: they would change the answer, and we do not have them. What changes
    /// nothing is taken.
    pub fn refuse(&self, names: &[&str]) -> Result<(), ApiError> {
        let asked = |name: &&&str| match self.0.get(**name) {
            Some(Value::Null) | None => false,
            Some(value) => !changes_nothing(name, value),
        };
        match names.iter().find(asked) {
            Some(name) => Err(unsupported(name)),
            None => Ok(()),
        }
    }
}

/// A number without a fraction, however it is written: to JSON `16`, `16.0` and `1.6e1` are the same. Beyond 2^53,
/// where not every integer is a float, none is read from one.
pub fn integer(value: &Value) -> Option<i64> {
    const MAX_EXACT: f64 = (1_u64 << 53) as f64;
    let whole = || value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() <= MAX_EXACT);
    value.as_i64().or_else(|| whole().map(|number| number as i64))
}

pub fn unsupported(name: &str) -> ApiError {
    ApiError::invalid(name, format!("{name} is not supported by this server; leave it out"))
}

/// `name` is `value`, but must be `expected`.
pub fn wrong(name: &str, value: &Value, expected: impl Display) -> ApiError {
    let mut shown = value.to_string();
    if let Some((end, _)) = shown.char_indices().nth(60) {
        shown.truncate(end);
        shown.push_str("...");
    }
    ApiError::invalid(name, format!("{name} is {shown}; it must be {expected}"))
}

fn changes_nothing(name: &str, value: &Value) -> bool {
    match name {
        "best_of" | "repeat_penalty" | "typical_p" => value.as_f64() == Some(1.0),
        "dry_multiplier" | "dynatemp_range" | "mirostat" | "top_logprobs" | "xtc_probability" => {
            value.as_f64() == Some(0.0)
        }
        // Below 0 it is llama.cpp's way to say no limit, and vLLM's.
        "n_predict" | "thinking_token_budget" | "top_n_sigma" => value.as_f64() == Some(-1.0),
        // Routers send it to every worker. Only these ask for blocks of another, or that some be kept for one; what
        // else is in it is for a connector, and changes no answer.
        "kv_transfer_params" => {
            value.is_object() && ["do_remote_prefill", "do_remote_decode"].into_iter().all(|asked| value[asked] != true)
        }
        "include_reasoning" | "skip_special_tokens" => *value == true,
        // Routers add it, and clients leave it out who expect it; the answer says that nothing was stored.
        "store" => value.is_boolean(),
        "modalities" => *value == json!(["text"]),
        "truncation" => *value == "disabled",
        "verbosity" => *value == "medium",
        _ => match value {
            Value::Bool(value) => !value,
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        },
    }
}

/// Which fields were asked for, for the test that holds `openapi.rs` to its word.
#[cfg(test)]
pub mod asked {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    thread_local! {
        static NAMES: RefCell<BTreeSet<String>> = RefCell::default();
    }

    pub fn note(name: &str) {
        NAMES.with_borrow_mut(|names| names.insert(name.to_owned()));
    }

    pub fn clear() {
        NAMES.take();
    }

    pub fn names() -> BTreeSet<String> {
        NAMES.with_borrow(Clone::clone)
    }
}
