//! That results of benches are what `docs/results.schema.json` says. Needs nothing.

use std::fs;
use std::path::{Path, PathBuf};

use fullbore_bench::result::{BenchResult, SCHEMA};
use serde_json::Value;

pub fn assert_follows_the_schema(result: &BenchResult) {
    let schema: Value = serde_json::from_str(SCHEMA).expect("JSON");
    let value: Value = serde_json::from_str(&result.to_json()).expect("JSON");
    check(&value, &schema, &schema, "result");
}

/// As much of JSON Schema as ours uses.
fn check(value: &Value, schema: &Value, root: &Value, at: &str) {
    let fields = schema.as_object().expect("a schema is an object");
    for (keyword, wanted) in fields {
        let holds = match keyword.as_str() {
            "type" => {
                let types = wanted.as_array().cloned().unwrap_or_else(|| vec![wanted.clone()]);
                types.iter().any(|wanted| match wanted.as_str().expect("a name") {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "integer" => value.is_u64() || value.is_i64(),
                    "number" => value.is_number(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    other => panic!("{other} is no type"),
                })
            }
            "const" => value == wanted,
            "enum" => wanted.as_array().expect("values").contains(value),
            "minimum" => value.as_f64() >= wanted.as_f64(),
            "required" => {
                wanted.as_array().expect("names").iter().all(|name| value.get(name.as_str().expect("a name")).is_some())
            }
            "$ref" => {
                let path = wanted.as_str().and_then(|path| path.strip_prefix('#')).expect("of this file");
                check(value, root.pointer(path).expect("it is there"), root, at);
                true
            }
            "anyOf" => wanted.as_array().expect("schemas").iter().any(|schema| match schema.get("$ref") {
                Some(_) => {
                    value.is_object() && {
                        check(value, schema, root, at);
                        true
                    }
                }
                None => value.is_null(),
            }),
            "items" => {
                value.as_array().into_iter().flatten().for_each(|item| check(item, wanted, root, &format!("{at}[]")));
                true
            }
            "properties" | "additionalProperties" => {
                let known = fields.get("properties").and_then(Value::as_object);
                for (name, field) in value.as_object().into_iter().flatten() {
                    let at = format!("{at}.{name}");
                    match (known.and_then(|known| known.get(name)), fields.get("additionalProperties")) {
                        (Some(schema), _) => check(field, schema, root, &at),
                        (None, Some(Value::Bool(false))) => panic!("{at} is not in the schema"),
                        (None, Some(schema)) => check(field, schema, root, &at),
                        (None, None) => {}
                    }
                }
                true
            }
            "$schema" | "$defs" | "title" | "description" => true,
            "pattern" => value.as_str().is_some_and(|text| text.len() == "2026-11-28T16:51:22Z".len()),
            other => panic!("{other} is not checked"),
        };
        assert!(holds, "{at} is {value}, and the schema has {keyword} {wanted}");
    }
}

/// What was measured before is still read, and shown.
#[test]
fn results_of_this_repository_are_what_the_schema_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let files = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        entries.map(|entry| entry.expect("an entry").path()).collect()
    };
    let is_other = |path: &PathBuf| path.ends_with("other-forms");
    let folders = files(&root).into_iter().filter(|path| path.is_dir() && !is_other(path));
    let all = folders.flat_map(|folder| files(&folder)).chain(files(&root));
    let results: Vec<PathBuf> = all.filter(|path| path.extension().is_some_and(|name| name == "json")).collect();
    assert!(!results.is_empty());
    for path in results {
        assert_follows_the_schema(&BenchResult::read(&path).unwrap_or_else(|error| panic!("{error}")));
    }
}
