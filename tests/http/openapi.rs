//! Our own OpenAPI document: each path answers its example as it says, and each field of the wrong type is refused by
//! name. That the fields are all there are is for the unit test in `openapi.rs` to say.

use fullbore_engine::request::Pooling;

use super::*;

/// No value that a field of this schema may have.
fn wrong(schema: &Value) -> Value {
    let kinds = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
    let takes = |kind: &str| kinds.iter().any(|known| known == kind);
    match () {
        _ if schema.get("oneOf").is_some() => json!(true),
        _ if takes("boolean") || takes("integer") || takes("number") => json!("x"),
        _ => json!(5),
    }
}

#[test]
fn examples_are_answered_and_wrong_types_are_named() {
    let bundle = |bundle: &mut Bundle| bundle.pooling = Some(Pooling::Last);
    let server = Setup { bundle, ..Setup::default() }.start();
    let document = server.get("/openapi.json").ok();
    assert_eq!(document["openapi"], "3.1.0");
    let schema_of = |operation: &Value, kind: &str| {
        let name = operation["responses"]["200"]["content"][kind]["schema"]["$ref"].as_str().map(str::to_owned);
        name.map_or(Value::Null, |name| document.pointer(name.trim_start_matches('#')).expect("a schema").clone())
    };
    let holds = |schema: &Value, answer: &Value| {
        let names = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        names.into_iter().all(|name| answer.get(name).is_some())
    };
    let mut num_fields = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        if let Some(operation) = operations.get("get") {
            let reply = server.get(&path.replace("{model}", "sim-model"));
            assert_eq!(reply.status, 200, "{path}");
            if path != "/metrics" {
                assert!(holds(&schema_of(operation, "application/json"), &reply.json()), "{path}");
            }
            continue;
        }
        let operation = &operations["post"];
        let body = &operation["requestBody"]["content"]["application/json"];
        let answer = server.post(path, &body["example"]).ok();
        assert!(holds(&schema_of(operation, "application/json"), &answer), "{path}: {answer}");
        for (name, schema) in body["schema"]["properties"].as_object().expect("fields") {
            let mut changed = body["example"].clone();
            if path == "/tokenize" && document["paths"]["/apply-template"].to_string().contains(&format!("\"{name}\""))
            {
                changed = json!({"messages": [{"role": "user", "content": "x"}]});
            }
            changed[name] = wrong(schema);
            let reply = server.post(path, &changed);
            assert_eq!(reply.status, 400, "{path} takes {name} = {}", changed[name]);
            let message = reply.json()["error"]["message"].as_str().expect("text").to_owned();
            assert!(message.contains(name.as_str()), "{path}, {name}: {message}");
            num_fields += 1;
        }
    }
    assert!(num_fields > 150, "{num_fields}");
}
