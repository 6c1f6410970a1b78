//! OpenAI's responses over HTTP: what a body becomes, whole responses, events in their order, and what is refused.

use super::anthropic::named_events;
use super::*;

const PATH: &str = "/v1/responses";

fn ask(change: Value) -> Value {
    let mut body = json!({"model": "sim-model", "max_output_tokens": 40, "temperature": 1.0, "seed": 4, "store": false,
        "input": "Weather?"});
    body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
    body
}

fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": false});
    json!([{"type": "function", "name": "weather", "description": "Says it.", "parameters": schema, "strict": true},
        {"type": "function", "name": "time"}])
}

/// But for ids and times.
fn without_ids(mut response: Value) -> Value {
    (response["id"], response["created_at"]) = (Value::Null, Value::Null);
    for item in response["output"].as_array_mut().expect("items") {
        assert!(item["id"].is_string(), "{item}");
        (item["id"], item["call_id"]) = (Value::Null, Value::Null);
    }
    response
}

/// The last response of a stream, after a check of all that came before it.
fn last_response(events: &[Value]) -> Value {
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], index, "{event}");
    }
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    assert_eq!(kinds[..2], ["response.created", "response.in_progress"]);
    assert_eq!(events[0]["response"]["status"], "in_progress");
    let (last, body) = events[2..].split_last().expect("events");
    let mut items: Vec<Value> = Vec::new();
    let mut said = String::new();
    let mut logprobs: Vec<Value> = Vec::new();
    let mut is_open = false;
    for event in body {
        let kind = event["type"].as_str().expect("a type").strip_prefix("response.").expect("a prefix");
        if kind != "output_item.added" {
            assert!(is_open, "{event}");
            assert_eq!(event["output_index"], items.len() - 1, "{event}");
            let item = items.last().expect("an item");
            assert!(event["item_id"] == item["id"] || event["item"]["id"] == item["id"], "{event}");
        }
        match kind {
            "output_item.added" => {
                assert!(!is_open && event["output_index"] == items.len(), "{event}");
                assert_eq!(event["item"]["status"], "in_progress");
                (is_open, said, logprobs) = (true, String::new(), Vec::new());
                items.push(event["item"].clone());
            }
            "content_part.added" => assert_eq!(event["part"]["text"], ""),
            "output_text.delta" => {
                said += event["delta"].as_str().expect("text");
                logprobs.extend(event["logprobs"].as_array().expect("a list").iter().cloned());
            }
            "reasoning_text.delta" | "function_call_arguments.delta" => {
                said += event["delta"].as_str().expect("text");
            }
            "output_text.done" => assert_eq!((&event["text"], &event["logprobs"]), (&json!(said), &json!(logprobs))),
            "reasoning_text.done" => assert_eq!(event["text"], said),
            "function_call_arguments.done" => assert_eq!(event["arguments"], said),
            "content_part.done" => assert_eq!(event["part"]["text"], said),
            "output_item.done" => {
                is_open = false;
                *items.last_mut().expect("an item") = event["item"].clone();
            }
            other => panic!("{other}"),
        }
    }
    assert!(!is_open);
    assert_eq!(last["response"]["output"], json!(items));
    let kind = format!("response.{}", last["response"]["status"].as_str().expect("a status"));
    assert_eq!(last["type"], kind);
    last["response"].clone()
}

/// Where they are wanted, of each token of a text, with so many alternatives; the tokens' bytes are the text.
fn check_logprobs(content: &Value, num_top: u64, wanted: bool) {
    let logprobs = content["logprobs"].as_array().expect("a list");
    if !wanted {
        assert!(logprobs.is_empty(), "{content}");
        return;
    }
    let bytes = logprobs.iter().flat_map(|token| ids(&token["bytes"])).map(|byte| byte as u8).collect::<Vec<_>>();
    // A letter that was cut off is a mark in the text.
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert_eq!(content["text"], text);
    assert!(!logprobs.is_empty());
    for token in logprobs {
        assert!(token["logprob"].as_f64().is_some_and(|logprob| logprob <= 0.0), "{token}");
        assert_eq!(token["top_logprobs"].as_array().map(|top| top.len() as u64), Some(num_top), "{token}");
    }
}

#[test]
fn a_streamed_response_is_the_whole_one() {
    let server = Setup::default().start();
    let schema = json!({"type": "json_schema", "name": "s", "strict": true, "schema": {"enum": ["x"]}});
    let named = json!({"type": "function", "name": "weather"});
    let cases = [
        (json!({}), "incomplete", "message"),
        (json!({"include": ["message.output_text.logprobs"], "top_logprobs": 3}), "incomplete", "message"),
        (json!({"include": ["message.output_text.logprobs"], "text": {"format": schema}}), "completed", "message"),
        (json!({"text": {"format": schema}}), "completed", "message"),
        (json!({"tools": tools(), "tool_choice": named, "max_output_tokens": 300}), "completed", "function_call"),
        (
            json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false,
                "max_output_tokens": 300}),
            "completed",
            "function_call",
        ),
    ];
    for (change, status, kind) in cases {
        let mut body = ask(change.clone());
        // Once before, so that the prefix cache has the prompt for both.
        server.post(PATH, &body).ok();
        let whole = server.post(PATH, &body).ok();
        assert!(whole["id"].as_str().is_some_and(|id| id.starts_with("resp_")) && whole["object"] == "response");
        assert_eq!((&whole["status"], &whole["output"][0]["type"]), (&json!(status), &json!(kind)), "{whole}");
        assert_eq!((&whole["output"][0]["status"], &whole["error"]), (&json!(status), &Value::Null), "{whole}");
        let details = if status == "incomplete" { json!({"reason": "max_output_tokens"}) } else { Value::Null };
        assert_eq!(whole["incomplete_details"], details);
        let usage = &whole["usage"];
        let count = |field: &str| usage[field].as_u64().expect("a number");
        assert_eq!(count("total_tokens"), count("input_tokens") + count("output_tokens"), "{usage}");
        match kind {
            "message" => {
                let content = &whole["output"][0]["content"][0];
                assert_eq!(content["type"], "output_text");
                assert_eq!(whole["top_logprobs"], change.get("top_logprobs").cloned().unwrap_or(json!(0)));
                check_logprobs(
                    content,
                    whole["top_logprobs"].as_u64().expect("a number"),
                    !change["include"].is_null(),
                );
            }
            _ => {
                let arguments = whole["output"][0]["arguments"].as_str().expect("text");
                assert!(serde_json::from_str::<Value>(arguments).is_ok_and(|value| value.is_object()), "{arguments}");
            }
        }
        body["stream"] = json!(true);
        let streamed = last_response(&named_events(&server.post(PATH, &body)));
        assert_eq!(without_ids(streamed), without_ids(whole), "{change}");
    }
}

#[test]
fn items_reach_the_template_as_the_messages_that_they_are() {
    let server = Setup::default().start();
    let items = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"city\": \"Rome\"}"},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
        {"role": "user", "content": "Well?"},
    ]);
    let response = server.post(PATH, &ask(json!({"instructions": "Be brief.", "input": items}))).ok();
    let call = |id: &str, name: &str, arguments: &str| {
        let function = json!({"name": name, "arguments": arguments});
        json!({"id": id, "type": "function", "function": function})
    };
    let chat = json!({"max_tokens": 1, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.",
            "tool_calls": [call("c1", "weather", "{\"city\": \"Rome\"}"), call("c2", "time", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"}, {"role": "tool", "tool_call_id": "c2",
            "content": "noon"}, {"role": "user", "content": "Well?"}]});
    assert_eq!(response["usage"]["input_tokens"], server.chat(chat)["usage"]["prompt_tokens"]);
    assert_eq!(response["instructions"], "Be brief.");
}

#[test]
fn what_is_not_stateless_or_not_text_is_refused_by_name() {
    let server = Setup::default().start();
    let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]);
    let cases = [
        (json!({"store": "all"}), "store"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"background": true}), "background"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"prompt": {"id": "x"}}), "prompt"),
        (json!({"include": ["file_search_call.results"]}), "include"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}), "top_logprobs"),
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": image}), "input[0].content[0]"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0]"),
        (json!({"input": [{"type": "computer_call"}]}), "input[0]"),
        (
            json!({"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{"}]}),
            "input[0].arguments",
        ),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": tools(), "tool_choice": {"type": "function", "name": "no"}}), "tool_choice"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format"),
        (json!({"text": {"format": {"type": "json_schema"}}}), "text.format"),
        (json!({"text": {"verbosity": "low"}}), "verbosity"),
        (json!({"typical_p": 0.5}), "typical_p"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"input": "word ".repeat(50_000)}), "input"),
    ];
    for (change, param) in cases {
        let error = server.post(PATH, &ask(change.clone())).error(400);
        assert_eq!(error["param"], param, "{change:.200}: {error}");
    }
    server.post(PATH, &ask(json!({"include": ["reasoning.encrypted_content"], "truncation": "disabled"}))).ok();
}

#[test]
fn a_lost_device_fails_the_response() {
    let server = Setup { pace: Pace::Lost, ..Setup::default() }.start();
    let events = named_events(&server.post(PATH, &ask(json!({"stream": true}))));
    let [.., error, failed] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((&error["type"], &failed["type"]), (&json!("error"), &json!("response.failed")));
    assert_eq!(failed["response"]["status"], "failed");
}
