//! What a text must follow, as requests say it: OpenAI's `response_format`, vLLM's `structured_outputs` and its older
//! `guided_*`. Invariant: at most one is asked for, and what cannot be compiled is refused before any token: no text is
//! ever made without its constraint.

use fullbore_engine::grammar::{CheckedSource, Compilation, Grammar, GrammarError, GrammarSource};
use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use super::json::JsonRoom;
use crate::http::error::ApiError;

pub const MAX_CHOICES: usize = 1024;

/// A grammar, and the field that asked for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Constraint {
    pub param: String,
    pub source: GrammarSource,
}

/// A constraint that is to be compiled.
pub struct Form {
    param: String,
    pub source: CheckedSource,
}

impl Constraint {
    pub fn read(fields: &Fields) -> Result<Option<Constraint>, ApiError> {
        let mut found = Vec::new();
        found.extend(response_format(fields)?);
        if let Some(outputs) = fields.object("structured_outputs")? {
            for (name, value) in outputs.0.iter().filter(|(_, value)| !value.is_null()) {
                found.extend(by_name(&format!("structured_outputs.{name}"), name, value)?);
            }
        }
        for name in ["json", "regex", "choice", "grammar", "json_object"] {
            let param = format!("guided_{name}");
            if let Some(value) = fields.get(&param) {
                found.extend(by_name(&param, name, value)?);
            }
        }
        match found.as_slice() {
            [first, second, ..] => {
                let message =
                    format!("{} and {} ask for a form of the text each; one is taken", first.param, second.param);
                Err(ApiError::invalid(&second.param, message))
            }
            _ => Ok(found.pop()),
        }
    }

    /// Some object or other.
    pub fn any_json(param: &str) -> Constraint {
        Constraint { param: param.to_owned(), source: GrammarSource::JsonSchema(json!({"type": "object"})) }
    }

    /// A schema in the field `param`.
    pub fn json_schema(param: &str, schema: Option<&Value>) -> Result<Constraint, ApiError> {
        let missing = || ApiError::invalid(param, format!("{param} needs a schema: {{\"schema\": ...}}"));
        let schema = object_of(&format!("{param}.schema"), schema.ok_or_else(missing)?)?;
        Ok(Constraint { param: param.to_owned(), source: GrammarSource::JsonSchema(schema) })
    }

    /// Refuses what is too large to be tried.
    pub fn check(self) -> Result<Form, ApiError> {
        let Constraint { param, source } = self;
        let source = source.check().map_err(|error| unusable(&param, &error))?;
        Ok(Form { param, source })
    }
}

impl Form {
    /// What came of it, as the request is told.
    pub fn answer(&self, compiled: Compilation) -> Result<Grammar, ApiError> {
        compiled.map_err(|error| unusable(&self.param, &error))
    }
}

fn unusable(param: &str, error: &GrammarError) -> ApiError {
    let sentence = format!("{param} cannot be used: {error}");
    match error {
        GrammarError::NotStarted(_) => ApiError::not_yet(&sentence),
        _ => ApiError::invalid(param, sentence),
    }
}

fn response_format(fields: &Fields) -> Result<Option<Constraint>, ApiError> {
    const NAME: &str = "response_format";
    let Some(format) = fields.object(NAME)? else { return Ok(None) };
    match format.string("type")? {
        Some("text") => Ok(None),
        // llama.cpp takes a schema here too.
        Some("json_object") => match format.get("schema") {
            None => Ok(Some(Constraint::any_json(NAME))),
            schema => Constraint::json_schema(NAME, schema).map(Some),
        },
        Some("json_schema") => {
            let schema = format.object("json_schema")?.and_then(|asked| asked.get("schema"));
            Constraint::json_schema("response_format.json_schema", schema).map(Some)
        }
        _ => {
            let found = fields.get(NAME).unwrap_or(&Value::Null);
            Err(wrong(NAME, found, "of type text, json_object or json_schema"))
        }
    }
}

/// vLLM's names.
fn by_name(param: &str, name: &str, value: &Value) -> Result<Option<Constraint>, ApiError> {
    let text = |expected: &str| value.as_str().map(str::to_owned).ok_or_else(|| wrong(param, value, expected));
    let source = match name {
        "json" => GrammarSource::JsonSchema(schema(param, value)?),
        "json_object" => match value.as_bool().ok_or_else(|| wrong(param, value, "true or false"))? {
            true => GrammarSource::JsonSchema(json!({"type": "object"})),
            false => return Ok(None),
        },
        "regex" => GrammarSource::Regex(text("a regular expression")?),
        "grammar" => GrammarSource::Lark(text("a grammar in Lark")?),
        "choice" => GrammarSource::Lark(choice(param, value)?),
        // White space has its own bound here, and no other engine is asked.
        "disable_any_whitespace" | "disable_additional_properties" | "backend" if *value == false => return Ok(None),
        _ => return Err(ApiError::invalid(param, format!("{param} is not supported by this server; leave it out"))),
    };
    Ok(Some(Constraint { param: param.to_owned(), source }))
}

/// A schema as an object, or as text.
fn schema(param: &str, value: &Value) -> Result<Value, ApiError> {
    let Some(text) = value.as_str() else { return object_of(param, value) };
    let parsed = JsonRoom::default().parse(text.as_bytes());
    let parsed =
        parsed.map_err(|error| ApiError::invalid(param, format!("{param} is no JSON schema: it is {error}")))?;
    object_of(param, &parsed)
}

fn object_of(param: &str, value: &Value) -> Result<Value, ApiError> {
    match value.is_object() {
        true => Ok(value.clone()),
        false => Err(wrong(param, value, "a JSON schema: an object")),
    }
}

fn choice(param: &str, value: &Value) -> Result<String, ApiError> {
    let refuse = || wrong(param, value, format!("a list of 1 to {MAX_CHOICES} texts, none empty"));
    let items = value.as_array().filter(|items| (1..=MAX_CHOICES).contains(&items.len())).ok_or_else(refuse)?;
    let text = |item: &Value| item.as_str().filter(|text| !text.is_empty()).map(quoted).ok_or_else(refuse);
    Ok(format!("start: {}", items.iter().map(text).collect::<Result<Vec<_>, _>>()?.join(" | ")))
}

/// A text as a Lark grammar spells it.
pub fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
