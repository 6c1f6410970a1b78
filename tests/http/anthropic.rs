//! Anthropic's messages over HTTP: what a body becomes, whole messages, events in their order, errors in their shape.

use super::*;

/// The events of a stream with their names checked; pings are left out.
fn events_of(server: &Harness, path: &str, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    named_events(&server.post(path, &body))
}

/// `event: NAME`, `data: {"type": NAME, ...}`, and nothing else.
pub fn named_events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{reply:?}");
    let text = reply.text();
    let event = |frame: &str| {
        let (name, data) = frame.strip_prefix("event: ").and_then(|frame| frame.split_once("\ndata: ")).expect(frame);
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(data["type"], name, "{frame}");
        data
    };
    let events: Vec<Value> = text.split_terminator("\n\n").map(event).collect();
    events.into_iter().filter(|event| event["type"] != "ping").collect()
}

fn ask(change: Value) -> Value {
    let mut body = json!({"model": "sim-model", "max_tokens": 40, "temperature": 1.0, "seed": 4,
        "messages": [{"role": "user", "content": "Weather?"}]});
    body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
    body
}

fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": false});
    json!([{"name": "weather", "description": "Says it.", "input_schema": schema}, {"name": "time"}])
}

fn message(server: &Harness, body: &Value) -> Value {
    server.post("/v1/messages", body).ok()
}

/// What the events of a stream add up to, their order being checked.
fn added_up(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    assert_eq!((&events[0]["type"], &message["stop_reason"]), (&json!("message_start"), &Value::Null));
    let mut open: Option<(usize, Value, String)> = None;
    for event in &events[1..] {
        match event["type"].as_str().expect("a type") {
            "content_block_start" => {
                let index = event["index"].as_u64().expect("an index") as usize;
                let num_blocks = message["content"].as_array().expect("blocks").len();
                assert!(open.is_none() && index == num_blocks, "{event}");
                open = Some((index, event["content_block"].clone(), String::new()));
            }
            "content_block_delta" => {
                let (index, block, json) = open.as_mut().expect("an open block");
                assert_eq!(event["index"], *index);
                let delta = &event["delta"];
                let (field, kind) = match delta["type"].as_str().expect("a type") {
                    "text_delta" => ("text", "text"),
                    "thinking_delta" => ("thinking", "thinking"),
                    "signature_delta" => ("signature", "thinking"),
                    "input_json_delta" => ("partial_json", "tool_use"),
                    other => panic!("{other}"),
                };
                assert_eq!(block["type"], kind);
                let more = delta[field].as_str().expect("text");
                match kind {
                    "tool_use" => json.push_str(more),
                    _ => block[field] = json!(format!("{}{more}", block[field].as_str().expect("text"))),
                }
            }
            "content_block_stop" => {
                let (index, mut block, json) = open.take().expect("an open block");
                assert_eq!(event["index"], index);
                if block["type"] == "tool_use" {
                    assert_eq!(block["input"], json!({}));
                    block["input"] = serde_json::from_str(&json).expect("an object");
                }
                message["content"].as_array_mut().expect("blocks").push(block);
            }
            "message_delta" => {
                assert!(open.is_none());
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["stop_sequence"] = event["delta"]["stop_sequence"].clone();
                message["usage"] = event["usage"].clone();
            }
            "message_stop" => assert_eq!(event, events.last().expect("events")),
            other => panic!("{other}"),
        }
    }
    assert_eq!(events.last().expect("events")["type"], "message_stop");
    message
}

/// But for ids, which are new each time.
fn without_ids(mut message: Value) -> Value {
    message["id"] = Value::Null;
    let blocks = message["content"].as_array_mut().expect("blocks");
    blocks.iter_mut().filter(|block| block["type"] == "tool_use").for_each(|block| block["id"] = Value::Null);
    message
}

#[test]
fn a_streamed_message_is_the_whole_one() {
    let server = Setup::default().start();
    let named = json!({"type": "tool", "name": "weather"});
    let cases = [
        (json!({}), "max_tokens", "text"),
        (json!({"max_tokens": 300, "ignore_eos": true, "temperature": 0}), "max_tokens", "text"),
        (json!({"output_config": {"format": {"type": "json_schema", "schema": {"enum": ["x"]}}}}), "end_turn", "text"),
        (json!({"tools": tools(), "max_tokens": 300, "tool_choice": named}), "tool_use", "tool_use"),
        (
            json!({"tools": tools(), "max_tokens": 300,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true}}),
            "tool_use",
            "tool_use",
        ),
    ];
    for (change, reason, kind) in cases {
        let body = ask(change.clone());
        // Once before, so that the prefix cache has the prompt for both.
        message(&server, &body);
        let whole = message(&server, &body);
        assert_eq!((&whole["type"], &whole["role"]), (&json!("message"), &json!("assistant")));
        assert!(whole["id"].as_str().is_some_and(|id| id.starts_with("msg_")), "{whole}");
        assert_eq!(whole["stop_reason"], reason, "{change}: {whole}");
        assert_eq!(whole["content"][0]["type"], kind, "{whole}");
        if kind == "tool_use" {
            assert_eq!(whole["content"].as_array().expect("blocks").len(), 1, "{whole}");
            assert!(whole["content"][0]["input"].is_object(), "{whole}");
        }
        let streamed = added_up(&events_of(&server, "/v1/messages", &body));
        assert_eq!(without_ids(streamed), without_ids(whole), "{change}");
    }
}

#[test]
fn a_stop_sequence_is_named() {
    let server = Setup::default().start();
    let whole = message(&server, &ask(json!({"temperature": 0})));
    let text = whole["content"][0]["text"].as_str().expect("text");
    let stop: String = text.chars().skip(5).take(2).collect();
    let cut = message(&server, &ask(json!({"temperature": 0, "stop_sequences": ["never to be seen", stop]})));
    assert_eq!((&cut["stop_reason"], &cut["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    assert_eq!(cut["content"][0]["text"], text[..text.find(&stop).expect("it is there")]);
}

#[test]
fn what_a_body_says_reaches_the_template() {
    let server = Setup::default().start();
    let content = json!([{"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}]);
    let sunny = json!([{"type": "text", "text": "sunny"}]);
    let result = json!([{"type": "tool_result", "tool_use_id": "toolu_1", "content": sunny},
        {"type": "text", "text": "Well?"}]);
    let body = ask(json!({"system": [{"type": "text", "text": "Be brief."}], "tools": tools(), "messages": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": content},
        {"role": "user", "content": result}]}));
    let chat = json!({"max_tokens": 1, "tools": [
            {"type": "function", "function": {"name": "weather", "description": "Says it.",
                "parameters": tools()[0]["input_schema"]}},
            {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {},
                "additionalProperties": false}}}],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": "toolu_1", "type": "function",
                "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]},
            {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"}, {"role": "user", "content": "Well?"}]});
    let same = server.chat(chat.clone())["usage"]["prompt_tokens"].clone();
    let counted = server.post("/v1/messages/count_tokens", &body).ok();
    assert_eq!(counted, json!({"input_tokens": same}));
    let usage = message(&server, &body)["usage"].clone();
    let count = |field: &str| usage[field].as_u64().expect("a number");
    assert_eq!(count("input_tokens") + count("cache_read_input_tokens"), same.as_u64().expect("a number"), "{usage}");
    // A tool that failed.
    for (is_error, content, told) in [
        (json!(true), json!("No such city."), "Error: No such city."),
        (json!(true), json!([]), "Error:"),
        (json!(false), json!("sunny"), "sunny"),
        (Value::Null, json!("sunny"), "sunny"),
    ] {
        let mut failed = body.clone();
        failed["messages"][2]["content"][0] =
            json!({"type": "tool_result", "tool_use_id": "toolu_1", "content": content, "is_error": is_error});
        let mut chat = chat.clone();
        chat["messages"][3]["content"] = json!(told);
        let rendered = server.post("/v1/chat/completions/render", &chat).ok()["token_ids"].clone();
        let counted = server.post("/v1/messages/count_tokens", &failed).ok();
        assert_eq!(counted, json!({"input_tokens": ids(&rendered).len()}), "{told}");
    }
}

#[test]
fn bad_messages_are_named_in_anthropics_shape() {
    let server = Setup::default().start();
    let image = json!([{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]);
    let cases = [
        (json!({"max_tokens": null}), 400, "invalid_request_error", "max_tokens"),
        (json!({"max_tokens": 0}), 400, "invalid_request_error", "max_tokens"),
        (json!({"messages": []}), 400, "invalid_request_error", "messages"),
        (json!({"messages": image}), 400, "invalid_request_error", "messages[0].content[0] is of type image"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), 400, "invalid_request_error", "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 5}]}), 400, "invalid_request_error", "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "is_error": "yes"}]}]}),
            400,
            "invalid_request_error",
            "messages[0].content[0].is_error",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}),
            400,
            "invalid_request_error",
            "tool_use_id",
        ),
        (json!({"messages": [{"role": "assistant", "content": "x"}]}), 400, "invalid_request_error", "the assistant's"),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 1}]}]}),
            400,
            "invalid_request_error",
            "messages[0].content[0]",
        ),
        (json!({"system": 5}), 400, "invalid_request_error", "system"),
        (json!({"tools": [{"type": "bash_20250124", "name": "bash"}]}), 400, "invalid_request_error", "tools[0].type"),
        (json!({"tools": tools(), "tool_choice": {"type": "required"}}), 400, "invalid_request_error", "tool_choice"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "tool", "name": "no"}}),
            400,
            "invalid_request_error",
            "tool_choice",
        ),
        (json!({"thinking": {"type": "deep"}}), 400, "invalid_request_error", "thinking"),
        (json!({"mcp_servers": [{"name": "x"}]}), 400, "invalid_request_error", "mcp_servers"),
        (json!({"output_format": {"type": "xml"}}), 400, "invalid_request_error", "output_format"),
        (json!({"model": "claude"}), 404, "not_found_error", "claude"),
        (json!({"system": "word ".repeat(50_000)}), 400, "invalid_request_error", "1024 tokens"),
        (json!({"max_tokens": 1024}), 400, "invalid_request_error", "1024"),
    ];
    for (change, status, kind, part) in cases {
        let reply = server.post("/v1/messages", &ask(change.clone()));
        assert_eq!(reply.status, status, "{change:.200}: {}", reply.text());
        let error = reply.json();
        assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!(kind)), "{error}");
        assert!(error["error"]["message"].as_str().is_some_and(|message| message.contains(part)), "{part}: {error}");
    }
    let reply = server.post_bytes("/v1/messages/count_tokens", b"[");
    assert_eq!((reply.status, &reply.json()["type"]), (400, &json!("error")));
}

#[test]
fn a_lost_device_ends_the_stream_with_an_error_event() {
    let server = Setup { pace: Pace::Lost, ..Setup::default() }.start();
    let events = events_of(&server, "/v1/messages", &ask(json!({})));
    let error = events.last().expect("events");
    assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!("overloaded_error")), "{error}");
}
