//! Answers that follow a schema of JSON: the schema, and whether an answer does, however it spaces its JSON.

use serde::de::Error;
use serde::{Deserialize, Deserializer};

const NUM_ITEMS: usize = 4;

/// A list of [`NUM_ITEMS`] objects: what is never cut by a usual `max_tokens`, and is about as long from every server.
pub const SCHEMA: &str = r#"{"type": "array", "minItems": 4, "maxItems": 4, "items": {"type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["fruit", "herb", "nut"]},
        "weight": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["name", "kind", "weight"], "additionalProperties": false}}"#;

/// Whether `text` is JSON of the [`SCHEMA`], or the beginning of such where `max_tokens` cut it.
pub fn follows(text: &str, is_cut: bool) -> bool {
    serde_json::from_str::<[Item; NUM_ITEMS]>(text).map_or_else(|error| is_cut && error.is_eof(), |_| true)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item {
    #[serde(rename = "name", deserialize_with = "name")]
    _name: (),
    #[serde(rename = "kind")]
    _kind: Kind,
    #[serde(rename = "weight", deserialize_with = "weight")]
    _weight: (),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Fruit,
    Herb,
    Nut,
}

fn name<'de, D: Deserializer<'de>>(from: D) -> Result<(), D::Error> {
    let is_short = String::deserialize(from)?.chars().count() <= 12;
    is_short.then_some(()).ok_or_else(|| D::Error::custom("a name is too long"))
}

fn weight<'de, D: Deserializer<'de>>(from: D) -> Result<(), D::Error> {
    (u16::deserialize(from)? <= 9999).then_some(()).ok_or_else(|| D::Error::custom("a weight is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_json_of_the_schema_or_its_beginning() {
        let item = r#"{"name": "ünder", "kind":"herb" , "weight": 12}"#;
        let whole = format!("[{item},{item},\n {item}, {item}]");
        assert!(follows(&whole, false) && follows(&whole, true));
        for (end, _) in whole.char_indices() {
            let cut = &whole[..end];
            assert!(follows(cut, true) && !follows(cut, false), "{cut}");
        }
        for wrong in [
            "Sure! [".to_owned(),
            "{".to_owned(),
            format!("[{item}]"),
            format!("{whole} that was it"),
            whole.replacen("herb", "stone", 1),
            whole.replacen("ünder", "thirteen chars", 1),
            whole.replacen("12", "10000", 1),
            whole.replacen("12", "-1", 1),
            whole.replacen("weight", "mass", 1),
            whole.replacen("]", &format!(", {item}"), 1),
        ] {
            assert!(!follows(&wrong, true), "{wrong}");
        }
    }

    #[test]
    fn the_schema_is_json() {
        let schema: serde_json::Value = serde_json::from_str(SCHEMA).expect("it is ours");
        assert_eq!((&schema["minItems"], &schema["maxItems"]), (&NUM_ITEMS.into(), &NUM_ITEMS.into()));
    }
}
