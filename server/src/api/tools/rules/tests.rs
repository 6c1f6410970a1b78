//! Calls whose arguments are no JSON: what may come of them is what their schema says, and is read as that.

use super::super::format::tests::{MARKS, Rig};
use super::super::format::{Thought, grammar};
use super::super::parameters::Callee;
use super::super::{ToolChoice, Tools};
use super::*;
use crate::api::reply::{Reply, ReplyFormat};

const FORMATS: [CallFormat; 6] = [
    CallFormat::QwenCoder,
    CallFormat::Glm,
    CallFormat::Seed,
    CallFormat::MiniMax,
    CallFormat::Lfm,
    CallFormat::Pythonic,
];

/// A call of `f` as a family writes it; a value that begins with `=` is the text behind that.
fn call(format: CallFormat, values: &[(&str, &str)]) -> String {
    let bare = |value: &str| value.strip_prefix('=').map(str::to_owned);
    let arguments = values.iter().map(|(key, value)| match format {
        CallFormat::QwenCoder => {
            let value = bare(value).unwrap_or_else(|| (*value).to_owned());
            format!("<parameter={key}>\n{value}\n</parameter>\n")
        }
        CallFormat::Seed | CallFormat::MiniMax => {
            let value = bare(value).unwrap_or_else(|| (*value).to_owned());
            let key = if format == CallFormat::Seed { format!("={key}") } else { format!(" name=\"{key}\"") };
            format!("<parameter{key}>{value}</parameter>\n")
        }
        CallFormat::Glm => {
            let value = bare(value).unwrap_or_else(|| (*value).to_owned());
            format!("<arg_key>{key}</arg_key><arg_value>{value}</arg_value>")
        }
        CallFormat::Lfm if !value.contains(['\n', '\\', '\'', '"']) && bare(value).is_some() => {
            format!("{key}='{}'", &value[1..])
        }
        _ => format!("{key}={}", bare(value).map_or((*value).to_owned(), |text| json!(text).to_string())),
    });
    let arguments: Vec<String> = arguments.collect();
    let Marks { open, close, .. } = format.marks();
    let open = open.unwrap_or_default();
    match format {
        CallFormat::QwenCoder | CallFormat::Seed => {
            format!("{open}\n<function=f>\n{}</function>\n{close}", arguments.concat())
        }
        CallFormat::MiniMax => format!("{open}\n<invoke name=\"f\">\n{}</invoke>\n{close}", arguments.concat()),
        CallFormat::Glm => format!("<tool_call>f{}</tool_call>", arguments.concat()),
        CallFormat::Lfm => format!("{open}[f({})]{close}", arguments.join(", ")),
        _ => format!("[f({})]", arguments.join(", ")),
    }
}

/// What a call's parameters are by its schema, as each family writes them, and what they are not.
#[test]
fn arguments_that_are_no_json_follow_their_schema() {
    let parameters = json!({
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"$ref": "#/$defs/count"},
            "code": {"type": "string", "pattern": "^[a-z<>/]+$"},
            "list": {"type": "array", "items": {"enum": [1, "</parameter>", "C"]}},
        },
        "required": ["count", "text"],
        "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 20}},
    });
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
    let function = Function { name: "f".to_owned(), parameters, strict: true, tool };
    let callee = Callee::new(&function);
    let odd = "=<b>\n5 \\ \"é\"";
    let list = r#"["</parameter>", 1]"#;
    let right: [(&[(&str, &str)], Value); 3] = [
        (&[("text", "=5"), ("count", "20")], json!({"text": "5", "count": 20})),
        (
            &[("text", odd), ("count", "1"), ("list", list)],
            json!({"text": &odd[1..], "count": 1, "list": ["</parameter>", 1]}),
        ),
        (
            &[("text", "=x"), ("count", "2"), ("code", "\"a</b\""), ("list", "[]")],
            json!({"text": "x", "count": 2, "code": "a</b", "list": []}),
        ),
    ];
    let wrong: [&[(&str, &str)]; 5] = [
        &[("text", "=x"), ("count", "21")],
        &[("text", "=x")],
        &[("text", "=x"), ("count", "=two")],
        &[("text", "=x"), ("count", "2"), ("code", "\"A\"")],
        &[("text", "=x"), ("count", "2"), ("more", "3")],
    ];
    for rig in [Rig::new(), Rig::with_control_tokens(&MARKS)] {
        for format in FORMATS {
            for choice in [ToolChoice::Required, ToolChoice::Auto] {
                let tools = Tools { functions: vec![function.clone()], choice, parallel: true };
                let source = grammar(format, &tools, None, Thought::Never, &rig.tokenizer).expect("a grammar");
                for (values, arguments) in &right {
                    let text = call(format, values);
                    assert!(rig.takes(&source, &text), "{text}\n{source:?}");
                    let functions = vec![callee.clone()];
                    let reply = ReplyFormat { calls: Some(format), functions, ..ReplyFormat::default() };
                    let mut reply = Reply::new(reply);
                    let pieces = reply.push(&text);
                    let said: String = pieces.calls.iter().map(|piece| piece.arguments.as_str()).collect();
                    let read: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
                    assert_eq!((&read, reply.finish_reason()), (arguments, "tool_calls"), "{text}");
                }
                for values in wrong {
                    assert!(!rig.takes(&source, &call(format, values)), "{format:?} {values:?}");
                }
            }
        }
    }
}

/// It is refused, and no call is made without it.
#[test]
fn a_parameter_that_cannot_be_written_is_missed_or_fails_a_form() {
    let rig = Rig::new();
    let source = |format, required: Value| {
        let properties = json!({"a=b>": {"type": "string"}, "c": {"type": "null"}});
        let parameters = json!({"type": "object", "properties": properties, "required": required});
        let tools = Tools {
            functions: vec![Function { name: "f".to_owned(), parameters, strict: true, tool: Value::Null }],
            choice: ToolChoice::Required,
            parallel: false,
        };
        grammar(format, &tools, None, Thought::Never, &rig.tokenizer).expect("a grammar")
    };
    for format in FORMATS {
        assert!(rig.compiler.compile(&source(format, json!([]))).is_ok(), "{format:?}");
        assert!(rig.compiler.compile(&source(format, json!(["a=b>"]))).is_err(), "{format:?}");
    }
    let all_left_out = source(CallFormat::Pythonic, json!([]));
    assert!(rig.takes(&all_left_out, "[f()]") && rig.takes(&all_left_out, "[f(c=null)]"), "{all_left_out:?}");
}

/// What is required is a parameter though nothing is said of it, and a reference copies what it leads to where it is.
#[test]
fn parameters_are_found_behind_a_reference_and_copied_for_none_but_those_that_have_one() {
    let object = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city", "more"]});
    let parameters = json!({"$ref": "#/$defs/f", "$defs": {"f": object}});
    let found: Vec<_> = properties(&parameters).iter().map(|property| (property.name, property.is_required)).collect();
    assert_eq!(found, [("city", true), ("more", true)]);
    let function = Function { name: "f".to_owned(), parameters, strict: true, tool: Value::Null };
    let callee = Callee::new(&function);
    assert_eq!(["city", "more"].map(|name| callee.parameter(name).json_of("5")), ["\"5\"", "5"]);

    let mut many = json!({"properties": {"at": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "integer"}}});
    (0..100).for_each(|nth| many["properties"][format!("p{nth}")] = json!({"type": "integer"}));
    let all = properties(&many);
    let copied = all.iter().filter(|property| !property.schema["$defs"].is_null());
    assert_eq!((all.len(), copied.map(|property| property.name).collect::<Vec<_>>()), (101, vec!["at"]));
}
