//! Rules of Lark for calls: whose arguments are an object of JSON, and whose are not.
//!
//! Invariant: what the rules let come is read as that call, and its arguments follow the function's schema. Where they
//! are no object of JSON those are the parameters that the schema has, in its order.

use fullbore_engine::grammar::GrammarSource;
use fullbore_engine::text::Tokenizer;
use serde_json::{Map, Value, json};

use super::super::constraint::quoted;
use super::Function;
use super::format::{ARGS, Body, CALL_ID, CallFormat, Marks};
use super::parameters::{is_key_letter, object_of, plain_texts};
use super::tagged::Tags;

/// `call_{index}`: one call of a function, without the marks around it; of a list in Python also `first_{index}`.
pub fn call(format: CallFormat, index: usize, function: &Function, tokenizer: &Tokenizer) -> String {
    match format.body() {
        Body::Tagged(tags) => {
            // A mark behind the call may be its end.
            let end = if tags.end == format.marks().close { String::new() } else { quoted(tags.end) };
            tagged(tags, &end, index, function, tokenizer)
        }
        Body::Pythonic => pythonic(index, function),
        Body::Object | Body::List | Body::Named => {
            let (open, close) = around_arguments(format, &function.name, tokenizer);
            let schema = GrammarSource::JsonSchema(function.parameters.clone()).expression();
            format!("call_{index}: {open} arguments_{index} {close}\narguments_{index}: {schema}\n")
        }
    }
}

/// What a call of `name` has before its arguments and behind them, for Lark. Mistral's templates write an id;
/// whether or not the model does, the call has one of ours.
fn around_arguments(format: CallFormat, name: &str, tokenizer: &Tokenizer) -> (String, String) {
    const ID: &str = "/[a-zA-Z0-9]{9}/";
    let Marks { arguments, .. } = format.marks();
    let object = quoted(&format!("{{\"name\": \"{name}\", \"{arguments}\": "));
    match format {
        CallFormat::Mistral => (object, format!("({} {ID} {})? \"}}\"", quoted(", \"id\": \""), quoted("\""))),
        CallFormat::MistralNamed => {
            let [call_id, args] = [CALL_ID, ARGS].map(|spelling| mark(spelling, tokenizer));
            (format!("{} ({call_id} {ID})? {args}", quoted(name)), String::new())
        }
        _ => (object, "\"}\"".to_owned()),
    }
}

/// A parameter that a schema has.
struct Property<'s> {
    name: &'s str,
    is_required: bool,
    /// Where its values are plain text: which, or none if any.
    texts: Option<Vec<&'s str>>,
    /// Of its values as JSON.
    schema: Value,
}

fn properties<'s>(parameters: &'s Value) -> Vec<Property<'s>> {
    let object = object_of(parameters);
    let required = object["required"].as_array().map_or(&[][..], Vec::as_slice);
    let known = object["properties"].as_object();
    let is_unknown = |name: &&str| known.is_none_or(|known| !known.contains_key(*name));
    let unknown = required.iter().filter_map(Value::as_str).filter(is_unknown).map(|name| (name, &Value::Bool(true)));
    let properties = known.into_iter().flatten().map(|(name, schema)| (name.as_str(), schema)).chain(unknown);
    let property = |(name, schema): (&'s str, &'s Value)| {
        let is_required = required.iter().any(|known| known == name);
        let is_writable = !name.is_empty() && name.chars().all(is_key_letter);
        let (texts, schema) = match schema {
            schema if !is_writable || *schema == false => (None, None),
            Value::Object(fields) => (plain_texts(schema, parameters), Some(alone(fields, parameters))),
            _ => (None, Some(json!({}))),
        };
        // A call that needs what cannot be written cannot be made.
        let nothing = || is_required.then(|| json!({"allOf": [{"type": "string"}, {"type": "null"}]}));
        schema.or_else(nothing).map(|schema| Property { name, is_required, texts, schema })
    };
    properties.filter_map(property).collect()
}

impl Property<'_> {
    fn json(&self) -> String {
        GrammarSource::JsonSchema(self.schema.clone()).expression()
    }
}

/// A schema from within `root`, with what references in it lead to.
fn alone(fields: &Map<String, Value>, root: &Value) -> Value {
    let own = Value::Object(fields.clone());
    if !has_reference(&own) {
        return own;
    }
    let mut schema = rebased(&own);
    schema["$defs"] = json!({"root": rebased(root)});
    schema
}

fn has_reference(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields.contains_key("$ref") || fields.values().any(has_reference),
        Value::Array(items) => items.iter().any(has_reference),
        _ => false,
    }
}

/// The same where its root is one of another's definitions.
fn rebased(schema: &Value) -> Value {
    match schema {
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| {
                let local = value.as_str().filter(|_| key == "$ref").and_then(|text| text.strip_prefix('#'));
                let value = local.map_or_else(|| rebased(value), |path| json!(format!("#/$defs/root{path}")));
                (key.clone(), value)
            };
            Value::Object(fields.iter().map(field).collect())
        }
        Value::Array(items) => items.iter().map(rebased).collect(),
        other => other.clone(),
    }
}

fn tagged(tags: &Tags, end: &str, index: usize, function: &Function, tokenizer: &Tokenizer) -> String {
    let mark = |spelling| mark(spelling, tokenizer);
    let line = if tags.on_lines { "\"\\n\"" } else { "GAP?" };
    let (mut arguments, mut rules) = (String::new(), String::new());
    for (nth, property) in properties(&function.parameters).iter().enumerate() {
        let is_optional = if property.is_required { "" } else { "?" };
        arguments += &format!(" argument_{index}_{nth}{is_optional}");
        let (open, close) = (mark(tags.key.0), mark(tags.key.1));
        let before = match tags.value.0 {
            "" if tags.on_lines => line.to_owned(),
            "" => String::new(),
            open => format!("{line} {}", mark(open)),
        };
        rules += &format!("argument_{index}_{nth}: {open} {} {close} {before} ", quoted(property.name));
        let value_end = if tags.on_lines { format!("{line} {}", mark(tags.value.1)) } else { mark(tags.value.1) };
        rules += &match &property.texts {
            Some(texts) if texts.is_empty() => {
                let value = format!("value_{index}_{nth}");
                format!("{value} {line}\n{}", until(&value, tags.value.1, "", tokenizer))
            }
            Some(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
                format!("({}) {value_end} {line}\n", texts.join(" | "))
            }
            None => {
                let json = format!("json_{index}_{nth}");
                format!("{json} {value_end} {line}\n{json}: {}\n", property.json())
            }
        };
    }
    let name = quoted(&format!("{}{}{}", tags.name.0, function.name, tags.name.1));
    format!("call_{index}: {name} {line}{arguments} {end}\n{rules}")
}

/// Arguments as JSON has them, which but for three constants is Python, and texts as Python has them too.
fn pythonic(index: usize, function: &Function) -> String {
    let properties = properties(&function.parameters);
    // A list begins by one terminal, from what may be text before it up to where it cannot be text any more.
    let first = format!("/[ \\n]{{0,4}}\\[{}\\(/", escaped(&function.name));
    let other = quoted(&format!("{}(", function.name));
    let mut rules = format!("first_{index}: {first} rest_{index}_0\ncall_{index}: {other} rest_{index}_0\n");
    if properties.is_empty() {
        return rules + &format!("rest_{index}_0: \")\"\n");
    }
    let num_first = properties.iter().take_while(|property| !property.is_required).count() + 1;
    let rest = |nth: usize| if nth < properties.len() { format!(" rest_{index}_{nth}") } else { String::new() };
    let first = (0..num_first.min(properties.len())).map(|nth| format!("argument_{index}_{nth}{}", rest(nth + 1)));
    let first: Vec<String> = first.collect();
    let is_optional = if num_first > properties.len() { "?" } else { "" };
    rules += &format!("rest_{index}_0: ({}){is_optional} \")\"\n", first.join(" | "));
    for (nth, property) in properties.iter().enumerate() {
        let key = quoted(&format!("{}=", property.name));
        rules += &format!("argument_{index}_{nth}: {key} json_{index}_{nth}\n");
        rules += &format!("json_{index}_{nth}: {}{}\n", property.json(), single_quoted(property));
        if nth > 0 {
            let is_optional = if property.is_required { "" } else { "?" };
            rules += &format!("rest_{index}_{nth}: (\", \" argument_{index}_{nth}){is_optional}{}\n", rest(nth + 1));
        }
    }
    rules
}

/// Texts as most write them in Python, beside others.
fn single_quoted(property: &Property) -> String {
    match property.texts.as_deref() {
        None => String::new(),
        Some([]) => r" | /'[^'\\\n]*'/".to_owned(),
        Some(texts) => {
            let plain = texts.iter().filter(|text| !text.contains(['\'', '\\']));
            plain.map(|text| format!(" | {}", quoted(&format!("'{text}'")))).collect()
        }
    }
}

/// A rule for any text up to a mark, with it; `not` is a part of a terminal.
pub fn until(rule: &str, close: &str, not: &str, tokenizer: &Tokenizer) -> String {
    let terminal = rule.to_uppercase();
    match control_token(close, tokenizer) {
        // Spelled out it is read as the mark too.
        Some(token) => {
            let text = format!("/(?s:.+)/ & ~/(?s:.*){}(?s:.*)/{not}", escaped(close));
            format!("{rule}: {terminal}? {token}\n{terminal}: {text}\n")
        }
        None => format!("{rule}[suffix={}]: /(?s:.*)/{not}\n", quoted(close)),
    }
}

/// A mark as the model writes it: its control token, where it has one.
pub fn mark(spelling: &str, tokenizer: &Tokenizer) -> String {
    control_token(spelling, tokenizer).unwrap_or_else(|| quoted(spelling))
}

pub fn control_token(spelling: &str, tokenizer: &Tokenizer) -> Option<String> {
    let id = tokenizer.special_id(spelling).filter(|id| tokenizer.is_special(*id))?;
    Some(format!("<[{id}]>"))
}

/// A mark within a regular expression.
pub fn escaped(mark: &str) -> String {
    mark.replace('/', r"\/").replace('|', r"\|").replace('[', r"\[").replace(']', r"\]").replace('.', r"\.")
}

#[cfg(test)]
mod tests;
