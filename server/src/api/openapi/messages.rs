//! What bodies are made of and what answers are, as named JSON schemas.

use serde_json::{Value, json};

use super::{any_object, bool, list, object, reference, string};

/// By name.
pub fn schemas() -> Value {
    let mut schemas = inputs();
    if let (Some(all), Value::Object(answers)) = (schemas.as_object_mut(), answers()) {
        all.extend(answers);
    }
    schemas
}

/// One of these texts.
fn kind(names: &[&str]) -> Value {
    json!({"type": "string", "enum": names})
}

fn needs(mut schema: Value, required: &[&str]) -> Value {
    schema["type"] = json!("object");
    schema["required"] = json!(required);
    schema
}

fn name() -> Value {
    json!({"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"})
}

/// A text, or a list of parts that are text.
fn text(part: Value) -> Value {
    json!({"oneOf": [{"type": "string"}, {"type": "array", "items": part}]})
}

/// Of chats and of responses: a word, one function, or some of them.
fn tool_choices() -> [Value; 2] {
    let [words, modes] = [kind(&["none", "auto", "required"]), kind(&["auto", "required"])];
    let allowed = kind(&["allowed_tools"]);
    let choice = |function: Value, some: Value| json!({"oneOf": [words, function, some, {"type": "null"}]});
    let some =
        |one: &Value| [("mode", modes.clone()), ("tools", json!({"type": "array", "minItems": 1, "items": one}))];
    let named = needs(object(&[("name", name())]), &["name"]);
    let one_of_chat = needs(object(&[("type", kind(&["function"])), ("function", named)]), &["type", "function"]);
    let some_of_chat = needs(object(&some(&one_of_chat)), &["mode", "tools"]);
    let some_of_chat = object(&[("type", allowed.clone()), ("allowed_tools", some_of_chat)]);
    let some_of_chat = needs(some_of_chat, &["type", "allowed_tools"]);
    let one_of_response = needs(object(&[("type", kind(&["function"])), ("name", name())]), &["type", "name"]);
    let [mode, tools] = some(&one_of_response);
    let some_of_response = needs(object(&[("type", allowed), mode, tools]), &["type", "mode", "tools"]);
    [choice(one_of_chat, some_of_chat), choice(one_of_response, some_of_response)]
}

fn inputs() -> Value {
    let any_text = json!({"type": "string"});
    let part = needs(object(&[("type", kind(&["text"])), ("text", any_text.clone())]), &["type", "text"]);
    let arguments = json!({"type": "string", "contentMediaType": "application/json"});
    let called = needs(object(&[("name", any_text.clone()), ("arguments", arguments.clone())]), &["name", "arguments"]);
    let call = needs(
        object(&[("id", any_text.clone()), ("type", kind(&["function"])), ("function", called)]),
        &["id", "type", "function"],
    );
    let function = |schema: &str| {
        object(&[("name", name()), ("description", string()), (schema, any_object()), ("strict", bool())])
    };
    let [chat_choice, response_choice] = tool_choices();
    let mut nullable = text(reference("TextBlock"));
    nullable["oneOf"].as_array_mut().into_iter().for_each(|kinds| kinds.push(json!({"type": "null"})));
    let block = json!({"oneOf": [reference("TextBlock"), reference("ThinkingBlock"), reference("ToolUseBlock"),
        reference("ToolResultBlock")]});
    let item_text =
        needs(object(&[("type", kind(&["input_text", "output_text"])), ("text", any_text.clone())]), &["type", "text"]);
    let response_function = needs(
        object(&[
            ("type", kind(&["function"])),
            ("name", name()),
            ("description", string()),
            ("parameters", any_object()),
            ("strict", bool()),
        ]),
        &["type", "name"],
    );
    json!({
        "ChatMessage": needs(object(&[("role", any_text.clone()), ("content", nullable), ("name", string()),
            ("reasoning_content", string()), ("tool_call_id", string()), ("tool_calls", list(call))]), &["role"]),
        "ChatTool": needs(object(&[("type", kind(&["function"])),
            ("function", needs(function("parameters"), &["name"]))]), &["type", "function"]),
        "ChatToolChoice": chat_choice,
        "StructuredOutputs": object(&[("json", json!({"type": ["object", "string", "null"]})), ("json_object", bool()),
            ("regex", string()), ("grammar", string()), ("choice", list(any_text.clone()))]),
        "TextBlock": part,
        "ThinkingBlock": needs(object(&[("type", kind(&["thinking"])), ("thinking", any_text.clone())]),
            &["type", "thinking"]),
        "ToolUseBlock": needs(object(&[("type", kind(&["tool_use"])), ("id", any_text.clone()),
            ("name", any_text.clone()), ("input", json!({"type": "object"}))]), &["type", "id", "name", "input"]),
        "ToolResultBlock": needs(object(&[("type", kind(&["tool_result"])), ("tool_use_id", any_text.clone()),
            ("content", text(reference("TextBlock"))), ("is_error", bool())]), &["type", "tool_use_id"]),
        "InputMessage": needs(object(&[("role", kind(&["user", "assistant"])), ("content", text(block))]),
            &["role", "content"]),
        "MessageTool": needs(object(&[("name", name()), ("description", string()), ("input_schema", any_object())]),
            &["name"]),
        "ResponseItem": json!({"oneOf": [
            needs(object(&[("role", any_text.clone()), ("content", text(item_text.clone()))]), &["role", "content"]),
            needs(object(&[("type", kind(&["function_call"])), ("call_id", any_text.clone()),
                ("name", any_text.clone()), ("arguments", arguments)]), &["type", "call_id", "name", "arguments"]),
            needs(object(&[("type", kind(&["function_call_output"])), ("call_id", any_text.clone()),
                ("output", text(item_text))]), &["type", "call_id", "output"]),
            needs(object(&[("type", kind(&["reasoning"])), ("summary", list(json!({"type": "object"})))]),
                &["type", "summary"]),
        ]}),
        "ResponseTool": response_function,
        "ResponseToolChoice": response_choice,
    })
}

/// An answer with these fields, each always there.
fn answer(fields: &[(&str, Value)]) -> Value {
    let names: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    needs(object(fields), &names)
}

fn answers() -> Value {
    let (text, number) = (json!({"type": "string"}), json!({"type": "integer"}));
    let objects = json!({"type": "array", "items": {"type": "object"}});
    let ids = json!({"type": "array", "items": {"type": "integer"}});
    let ids_or_pieces = json!({"type": "array", "items": {"type": ["integer", "object"]}});
    let usage = json!({"type": "object"});
    let completion = answer(&[
        ("id", text.clone()),
        ("object", text.clone()),
        ("created", number.clone()),
        ("model", text.clone()),
        ("choices", objects.clone()),
        ("usage", usage.clone()),
    ]);
    json!({
        "Object": {"type": "object"},
        "Error": {"type": "object", "required": ["error"]},
        "Health": answer(&[("status", text.clone())]),
        "Models": answer(&[("object", text.clone()), ("data", objects.clone())]),
        "Completion": completion,
        "ChatCompletion": completion,
        "Response": answer(&[("id", text.clone()), ("object", text.clone()), ("status", text.clone()),
            ("output", objects.clone()), ("usage", usage.clone())]),
        "Message": answer(&[("id", text.clone()), ("type", text.clone()), ("role", text.clone()),
            ("content", objects.clone()), ("stop_reason", string()), ("usage", usage.clone())]),
        "Embeddings": answer(&[("object", text.clone()), ("data", objects.clone()), ("model", text.clone()),
            ("usage", usage.clone())]),
        "InputTokens": answer(&[("input_tokens", number.clone())]),
        "Rendered": {"type": "array", "items": answer(&[("prompt", text.clone()), ("prompt_token_ids", ids.clone())])},
        "RenderedChat": answer(&[("model", text.clone()), ("token_ids", ids.clone()),
            ("sampling_params", json!({"type": "object"})), ("stream", json!({"type": "boolean"}))]),
        "Tokens": answer(&[("count", number.clone()), ("max_model_len", number), ("tokens", ids_or_pieces)]),
        "Prompt": answer(&[("prompt", text)]),
    })
}
