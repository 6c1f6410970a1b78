//! What is refused, by name: fields, models, bodies, paths.

use super::*;

#[test]
fn bad_fields_are_named() {
    let server = Setup::default().start();
    let long = "word ".repeat(2000);
    let completions = [
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"top_p": 3}), "top_p"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": [1]}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1.5}), "top_k"),
        (json!({"top_k": 1e30}), "top_k"),
        (json!({"min_p": -0.1}), "min_p"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1e30}), "seed"),
        (json!({"seed": 0.5}), "seed"),
        (json!({"max_tokens": -5}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1e30}), "max_tokens"),
        (json!({"max_tokens": 4_000_000_000u32}), "max_tokens"),
        (json!({"max_tokens": "7"}), "max_tokens"),
        (json!({"max_tokens": 7.5}), "max_tokens"),
        (json!({"max_tokens": -1.0}), "max_tokens"),
        (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1_000_000_000}), "n"),
        (json!({"n": true}), "n"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": 1}), "stream_options"),
        (json!({"stream_options": {"include_usage": 1}}), "include_usage"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream_options": {"include_usage": false}, "stream": false}), "stream_options"),
        (json!({"min_tokens": -1}), "min_tokens"),
        (json!({"min_tokens": 2}), "min_tokens"),
        (json!({"min_tokens": 17, "max_tokens": null}), "min_tokens"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", 5]}), "stop"),
        (json!({"stop": vec!["a"; 17]}), "stop"),
        (json!({"stop": "a".repeat(257)}), "stop"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
        (json!({"stop_token_ids": 1}), "stop_token_ids"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": -1}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"echo": 1}), "echo"),
        (json!({"ignore_eos": "no"}), "ignore_eos"),
        (json!({"return_token_ids": 3}), "return_token_ids"),
        (json!({"model": 5}), "model"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": {"text": "x"}}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [1, 2, 99999999]}), "prompt"),
        (json!({"prompt": [1, -2]}), "prompt"),
        (json!({"prompt": [1, 2.5]}), "prompt"),
        (json!({"prompt": [1e40]}), "prompt"),
        (json!({"prompt": ["a", true]}), "prompt"),
        (json!({"prompt": vec!["a"; 129]}), "prompt"),
        (json!({"prompt": vec!["a"; 100], "n": 2}), "n"),
        (json!({"prompt": long}), "prompt"),
        (json!({"best_of": "x"}), "best_of"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"presence_penalty": "much"}), "presence_penalty"),
        (json!({"frequency_penalty": -2.1}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"repetition_penalty": -1}), "repetition_penalty"),
        (json!({"repetition_penalty": 1e9}), "repetition_penalty"),
        (json!({"logit_bias": [5, 1]}), "logit_bias"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": {"5": "high"}}), "logit_bias"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"-5": 1}}), "logit_bias"),
        (json!({"logit_bias": {"05": 1}}), "logit_bias"),
        (json!({"logit_bias": {"word": 1}}), "logit_bias"),
        (
            json!({"logit_bias": (0..1025).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>()}),
            "logit_bias",
        ),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"allowed_token_ids": 5}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [1, 99999999]}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [1.5]}), "allowed_token_ids"),
        (json!({"suffix": "end"}), "suffix"),
    ];
    for (change, name) in completions {
        let mut body = json!({"prompt": "x", "max_tokens": 1});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        let error = server.post("/v1/completions", &body).error(400);
        assert!(error["message"].as_str().expect("text").contains(name), "{change}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"], name, "{change}: {error}");
    }
    let message = |content: Value| json!([{"role": "user", "content": content}]);
    let chats = [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": ["hi"]}), "messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": 5, "content": "hi"}]}), "messages[0].role"),
        (json!({"messages": message(json!(5))}), "messages[0].content"),
        (
            json!({"messages": message(json!([{"type": "image_url", "image_url": {"url": "data:"}}]))}),
            "messages[0].content[0]",
        ),
        (json!({"messages": message(json!([{"type": "text"}]))}), "messages[0].content[0]"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"reasoning_effort": 5}), "reasoning_effort"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"min_tokens": 2}), "min_tokens"),
        (json!({"min_tokens": 1024, "max_tokens": null}), "min_tokens"),
    ];
    for (change, name) in chats {
        let mut body = json!({"messages": message(json!("x")), "max_tokens": 1});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        let error = server.post("/v1/chat/completions", &body).error(400);
        assert!(error["message"].as_str().expect("text").contains(name), "{change}: {error}");
        assert_eq!(error["param"], name, "{change}: {error}");
    }
    // What changes nothing is taken.
    server.complete(
        json!({"prompt": "x", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1,
        "repetition_penalty": 1, "allowed_token_ids": null, "suffix": null, "stop": null, "max_tokens": null,
        "temperature": null, "min_tokens": 16, "stream_options": {}}),
    );
    server.chat(json!({"messages": message(json!("x")), "max_tokens": 1, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "logprobs": false, "top_logprobs": 0}));
}

#[test]
fn unknown_models_and_long_prompts_have_their_codes() {
    let server = Setup::default().start();
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let body = json!({"model": "gpt-9", "prompt": "x", "messages": [{"role": "user", "content": "x"}]});
        let error = server.post(path, &body).error(404);
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
        assert!(error["message"].as_str().expect("text").contains("gpt-9"), "{error}");
    }
    // The second is so long that it is refused without a look at its tokens.
    for length in [2000, 1_600_000] {
        let long = "word ".repeat(length);
        let chat = json!({"messages": [{"role": "user", "content": long}]});
        let bodies = [
            ("/v1/completions", json!({"prompt": long}), "prompt"),
            ("/v1/completions", json!({"prompt": ["x", long]}), "prompt"),
            ("/v1/chat/completions", chat, "messages"),
        ];
        for (path, body, param) in bodies {
            let error = server.post(path, &body).error(400);
            assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!(param)));
            assert!(error["message"].as_str().expect("text").contains("1024"), "{error}");
        }
    }
    // More messages than there can be tokens.
    let chat = json!({"messages": vec![json!({"role": "user", "content": ""}); 1025]});
    let error = server.post("/v1/chat/completions", &chat).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("messages")));
    // What is only counted may be longer, up to a bound too.
    let count = |num_words| server.post("/tokenize", &json!({"prompt": "word ".repeat(num_words)}));
    assert_eq!(count(400).ok()["count"], 2801);
    let error = count(1000).error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    assert!(error["message"].as_str().expect("text").starts_with("4096 tokens of one text"), "{error}");
    let error = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2000})).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("max_tokens")));
}

#[test]
fn bodies_that_are_no_json_object_are_refused() {
    let server = Setup::default().start();
    let deep = "[".repeat(100_000);
    let deep_field = format!("{{\"prompt\": {}1{}}}", "[".repeat(500), "]".repeat(500));
    let deep_objects = "{\"a\":".repeat(100_000);
    let too_deep = format!("{{\"pad\": {}1{}}}", "[".repeat(64), "]".repeat(64));
    let bodies: [&[u8]; 13] = [
        b"",
        b"{",
        b"{\"model\": ",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"\"x\"",
        b"{\"prompt\": \"x\", \"temperature\": NaN}",
        b"{\"prompt\": \"\\ud800\"}",
        deep.as_bytes(),
        deep_field.as_bytes(),
        deep_objects.as_bytes(),
        too_deep.as_bytes(),
    ];
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for body in bodies {
            let error = server.post_bytes(path, body).error(400);
            let message = error["message"].as_str().expect("text");
            assert!(message.contains("JSON"), "{message}");
        }
    }
    let deepest = format!("{{\"prompt\": \"x\", \"pad\": {}1{}}}", "[".repeat(63), "]".repeat(63));
    assert_eq!(server.post_bytes("/v1/completions", deepest.as_bytes()).status, 200);
    assert_eq!(server.get("/health/ready").status, 200);
}

#[test]
fn bodies_that_are_not_said_to_be_json_are_refused() {
    let server = Setup::default().start();
    let ask = |path: &str, content_type: &str| {
        let body = r#"{"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}"#;
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{content_type}");
        read_reply(server.send(format!("{head}content-length: {}\r\n\r\n{body}", body.len())))
    };
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for right in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
            ask(path, &format!("Content-Type: {right}\r\n")).ok();
        }
        for wrong in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
            let error = ask(path, &format!("content-type: {wrong}\r\n")).error(415);
            assert!(error["message"].as_str().expect("text").contains(wrong), "{error}");
        }
        assert_eq!(ask(path, "").error(415)["code"], "unsupported_media_type");
    }
}

#[test]
fn large_bodies_are_refused_however_they_come() {
    let server = Setup::default().start();
    let large = vec![b'a'; 100 << 20];
    let error = server.post_bytes("/v1/completions", &large).error(413);
    assert!(error["message"].as_str().expect("text").contains("8388608"), "{error}");

    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("the server reads");
    for chunk in large.chunks(1 << 20) {
        stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes()).expect("the server reads");
        stream.write_all(chunk).expect("the server reads");
        stream.write_all(b"\r\n").expect("the server reads");
    }
    stream.write_all(b"0\r\n\r\n").expect("the server reads");
    read_reply(stream).error(413);

    // A client that asks first is told without sending anything.
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\n\
         content-length: {}\r\n\r\n",
        large.len()
    );
    read_reply(server.send(head)).error(413);

    // The largest that is taken.
    let fits = [b"{\"prompt\": \"x\", \"max_tokens\": 1, \"pad\": \"".as_slice(), &vec![b'a'; (8 << 20) - 50], b"\"}"]
        .concat();
    assert_eq!(server.post_bytes("/v1/completions", &fits).status, 200);
}

#[test]
fn paths_and_methods_that_are_not_there() {
    let server = Setup::default().start();
    for path in ["/nothing", "/v1", "/v1/", "/v1/nothing", "/v1/models-x", "/v1/completions/x", "/health/x", "/../etc"]
    {
        assert_eq!(server.get(path).error(404)["code"], "not_found", "{path}");
    }
    for path in ["/v1/completions", "/v1/chat/completions"] {
        assert_eq!(server.get(path).error(405)["code"], "method_not_allowed", "{path}");
    }
    for path in ["/v1/models", "/health/live", "/health/ready", "/metrics", "/"] {
        server.post(path, &json!({})).error(405);
    }
    // Each as its path's clients expect it.
    for (head, status, kind) in [
        ("GET /v1/messages/nothing", 404, "not_found_error"),
        ("GET /v1/messages/count_tokens/more", 404, "not_found_error"),
        ("GET /v1/messages", 405, "invalid_request_error"),
        ("DELETE /v1/messages/count_tokens", 405, "invalid_request_error"),
    ] {
        let reply = read_reply(server.send(format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")));
        let error = reply.json();
        assert_eq!((reply.status, &error["type"], &error["error"]["type"]), (status, &json!("error"), &json!(kind)));
    }
    let delete = server.send("DELETE /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    read_reply(delete).error(405);
}
