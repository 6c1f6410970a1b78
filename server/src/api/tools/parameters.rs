//! What the schema of a function says of its parameters, for formats that write values without saying of which type
//! they are. Invariant: what a schema leaves open is read as what it looks like; looking at one takes bounded time.

use serde_json::Value;

use super::Function;

/// A function, as far as calls of it are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Callee {
    pub name: String,
    parameters: Vec<(String, Parameter)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Of its values, as bits.
    types: u8,
    /// Whether it is text, whatever it looks like.
    pub is_plain: bool,
}

const STRING: u8 = 1;
const NUMBER: u8 = 2;
const BOOLEAN: u8 = 4;
const NULL: u8 = 8;
const ARRAY: u8 = 16;
const OBJECT: u8 = 32;
const ANY: u8 = 63;

/// Schemas within a parameter's that are looked at, and values of a list.
const MAX_SCHEMAS: u32 = 256;
/// Of references that lead to each other.
const MAX_HOPS: u32 = 8;

impl Callee {
    #[cfg(test)]
    pub fn named(name: &str) -> Callee {
        Callee { name: name.to_owned(), parameters: Vec::new() }
    }

    pub fn new(function: &Function) -> Callee {
        let root = &function.parameters;
        let properties = object_of(root)["properties"].as_object().into_iter().flatten();
        let parameters = properties.map(|(name, schema)| (name.clone(), Parameter::new(schema, root)));
        Callee { name: function.name.clone(), parameters: parameters.collect() }
    }

    /// What is known of a parameter.
    pub fn parameter(&self, name: &str) -> Parameter {
        let found = self.parameters.iter().find(|(known, _)| known == name);
        found.map_or(Parameter { types: ANY, is_plain: false }, |(_, parameter)| *parameter)
    }
}

/// Of a parameter's name in these formats.
pub fn is_key_letter(c: char) -> bool {
    !c.is_whitespace() && !matches!(c, '<' | '>' | '=' | '(' | ')' | '[' | ']' | '{' | '}' | ',' | '"' | '\'')
}

impl Parameter {
    fn new(schema: &Value, root: &Value) -> Parameter {
        let types = types(schema, root, &mut MAX_SCHEMAS.clone());
        Parameter { types, is_plain: plain_texts(schema, root).is_some() }
    }

    /// A value as JSON: what it is if that may be, else text.
    pub fn json_of(self, written: &str) -> String {
        let json = match written.trim() {
            // As Python has them.
            "True" => "true",
            "False" => "false",
            "None" => "null",
            json => json,
        };
        let is_json = |value: &Value| self.types & type_of(value) != 0;
        match serde_json::from_str(json).ok().filter(is_json) {
            Some(_) if !self.is_plain => json.to_owned(),
            _ => Value::from(written).to_string(),
        }
    }
}

fn type_of(value: &Value) -> u8 {
    match value {
        Value::Null => NULL,
        Value::Bool(_) => BOOLEAN,
        Value::Number(_) => NUMBER,
        Value::String(_) => STRING,
        Value::Array(_) => ARRAY,
        Value::Object(_) => OBJECT,
    }
}

fn type_named(name: &Value) -> u8 {
    match name.as_str() {
        Some("null") => NULL,
        Some("boolean") => BOOLEAN,
        Some("number" | "integer") => NUMBER,
        Some("string") => STRING,
        Some("array") => ARRAY,
        Some("object") => OBJECT,
        _ => ANY,
    }
}

/// Of what a schema lets be.
fn types(schema: &Value, root: &Value, num_left: &mut u32) -> u8 {
    let (Some(fields), 1..) = (schema.as_object(), *num_left) else { return ANY };
    *num_left -= 1;
    let mut all = ANY;
    for (key, value) in fields {
        all &= match (key.as_str(), value) {
            ("$ref", Value::String(reference)) => {
                target(reference, root).map_or(ANY, |schema| types(schema, root, num_left))
            }
            (_, Value::Array(many)) if many.len() > MAX_SCHEMAS as usize => ANY,
            ("type", Value::Array(names)) => names.iter().fold(0, |any, name| any | type_named(name)),
            ("type", name) => type_named(name),
            ("enum", Value::Array(values)) => values.iter().fold(0, |any, value| any | type_of(value)),
            ("const", value) => type_of(value),
            ("anyOf" | "oneOf", Value::Array(schemas)) => {
                schemas.iter().fold(0, |any, schema| any | types(schema, root, num_left))
            }
            ("allOf", Value::Array(schemas)) => {
                schemas.iter().fold(ANY, |all, schema| all & types(schema, root, num_left))
            }
            _ => ANY,
        };
    }
    all
}

/// The schema of a function's parameters, where it is a reference what that leads to.
pub fn object_of(root: &Value) -> &Value {
    let mut object = root;
    for _ in 0..MAX_HOPS {
        let Some(next) = object["$ref"].as_str().and_then(|reference| target(reference, root)) else { break };
        object = next;
    }
    object
}

fn target<'s>(reference: &str, root: &'s Value) -> Option<&'s Value> {
    root.pointer(reference.strip_prefix('#')?)
}

/// Of a schema that is of text and says no more of it than which texts it may be: those, or none where it may be any.
/// Others' texts are forced as JSON, where a schema can hold them.
pub fn plain_texts<'s>(schema: &'s Value, root: &'s Value) -> Option<Vec<&'s str>> {
    let is_text = types(schema, root, &mut MAX_SCHEMAS.clone()) == STRING;
    if is_text { texts(schema, root, MAX_HOPS) } else { None }
}

fn texts<'s>(schema: &'s Value, root: &'s Value, num_hops: u32) -> Option<Vec<&'s str>> {
    const NOTES: [&str; 7] = ["type", "title", "description", "default", "examples", "deprecated", "$comment"];
    // Nothing of a text is a mark, or layout.
    let is_safe = |text: &&str| !text.is_empty() && !text.contains(['<', '\n']);
    let mut said = schema.as_object()?.iter().filter(|(key, _)| !NOTES.contains(&key.as_str()));
    let texts = match said.next().map(|(key, value)| (key.as_str(), value)) {
        None => Vec::new(),
        Some(("$ref", Value::String(reference))) if num_hops > 0 => {
            texts(target(reference, root)?, root, num_hops - 1)?
        }
        Some(("enum", Value::Array(values))) if values.len() <= MAX_SCHEMAS as usize => {
            values.iter().map(|value| value.as_str().filter(is_safe)).collect::<Option<_>>()?
        }
        Some(("const", value)) => vec![value.as_str().filter(is_safe)?],
        _ => return None,
    };
    said.next().is_none().then_some(texts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn callee() -> Callee {
        let parameters = json!({
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "Any."},
                "code": {"type": "string", "pattern": "^[0-9]+$"},
                "number": {"type": ["integer", "null"]},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": null},
                "unit": {"$ref": "#/$defs/unit"},
                "list": {"type": "array"},
                "endless": {"$ref": "#/properties/endless"},
                "marked": {"enum": ["a<b"]},
                "any": {},
            },
            "$defs": {"unit": {"enum": ["C", "F"]}},
        });
        Callee::new(&Function { name: "f".to_owned(), parameters, strict: false, tool: Value::Null })
    }

    #[test]
    fn a_value_is_of_the_type_that_its_schema_asks_for() {
        let callee = callee();
        let cases = [
            ("text", "5", "\"5\""),
            ("text", "\"quoted\"", "\"\\\"quoted\\\"\""),
            ("text", "True", "\"True\""),
            ("code", "007", "\"007\""),
            ("code", "12", "\"12\""),
            ("code", "\"12\"", "\"12\""),
            ("number", "5", "5"),
            ("number", " 5\n", "5"),
            ("number", "None", "null"),
            ("number", "five", "\"five\""),
            ("maybe", "2024", "\"2024\""),
            ("maybe", "null", "null"),
            ("unit", "C", "\"C\""),
            ("list", "[1, \"a\"]", "[1, \"a\"]"),
            ("endless", "[1]", "[1]"),
            ("any", "False", "false"),
            ("any", "{", "\"{\""),
            ("unknown", "1.5", "1.5"),
        ];
        for (name, written, json) in cases {
            assert_eq!(callee.parameter(name).json_of(written), json, "{name} {written}");
        }
        let plain: Vec<&str> =
            callee.parameters.iter().filter(|(_, known)| known.is_plain).map(|(name, _)| name.as_str()).collect();
        assert_eq!(plain, ["text", "unit"]);
    }

    /// Each of ten schemas is any of the ten.
    #[test]
    fn a_schema_that_leads_everywhere_is_soon_left() {
        let any: Vec<Value> = (0..10).map(|nth| json!({"$ref": format!("#/$defs/{nth}")})).collect();
        let defs: Vec<Value> = (0..10).map(|_| json!({"anyOf": any})).collect();
        let root = json!({"$defs": defs});
        let mut num_left = MAX_SCHEMAS;
        assert_eq!((types(&defs[0], &root, &mut num_left), num_left), (ANY, 0));
    }
}
