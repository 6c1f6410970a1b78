//! Structured output over HTTP: every way to ask for it, what is refused, and that compiling holds up nobody.

use super::*;

/// Whether a date such as `2031-07`.
fn is_date(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 7 && text.starts_with("20") && bytes[4] == b'-' && bytes[5..].iter().all(u8::is_ascii_digit)
}

fn message(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": false,
    })
}

fn assert_follows_schema(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let fields: Vec<&String> = value.as_object().expect("an object").keys().collect();
    assert_eq!(fields, ["a", "b"], "{text}");
    assert!(value["a"].as_u64().is_some_and(|a| a <= 99) && (value["b"] == "x" || value["b"] == "yy"), "{text}");
}

#[test]
fn every_way_to_ask_for_a_form_gives_it() {
    let server = Setup::default().start();
    let strict = json!({"type": "json_schema", "json_schema": {"name": "s", "strict": true, "schema": schema()}});
    let lark = "start: DATE\nDATE: /20[0-9]{2}-[0-9]{2}/";
    let date = "20[0-9]{2}-[0-9]{2}";
    type Check = fn(&str);
    let as_schema: Check = assert_follows_schema;
    let as_date: Check = |text| assert!(is_date(text), "{text:?}");
    let as_choice: Check = |text| assert!(text == "yes" || text == "no \"really\"\n", "{text:?}");
    let choice = json!(["yes", "no \"really\"\n"]);
    let cases = [
        (json!({"response_format": strict}), as_schema),
        (json!({"response_format": {"type": "json_object", "schema": schema()}}), as_schema),
        (json!({"structured_outputs": {"json": schema()}}), as_schema),
        (json!({"structured_outputs": {"json": schema().to_string(), "regex": null}}), as_schema),
        (json!({"guided_json": schema()}), as_schema),
        (json!({"structured_outputs": {"regex": date}}), as_date),
        (json!({"guided_regex": date}), as_date),
        (json!({"structured_outputs": {"grammar": lark}}), as_date),
        (json!({"guided_grammar": lark}), as_date),
        (json!({"structured_outputs": {"choice": choice}}), as_choice),
        (json!({"guided_choice": choice}), as_choice),
    ];
    for (index, (change, check)) in cases.into_iter().enumerate() {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let mut body = json!({"max_tokens": 200, "temperature": 1.0, "seed": index});
            body[if path.ends_with("chat/completions") { "messages" } else { "prompt" }] =
                if path.ends_with("chat/completions") { message("go") } else { json!("go") };
            body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
            let choice = server.post(path, &body).ok()["choices"][0].clone();
            let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).expect("text").to_owned();
            assert_eq!(choice["finish_reason"], "stop", "{change}: {text:?}");
            check(&text);
            // What ends a text is no part of it, and the same text comes in pieces.
            let streamed: String = server
                .stream(path, body)
                .iter()
                .filter_map(|event| {
                    let choice = &event["choices"][0];
                    choice["delta"]["content"].as_str().or(choice["text"].as_str()).map(str::to_owned)
                })
                .collect();
            assert_eq!(streamed, text, "{change}");
        }
    }
    let whole = server.chat(json!({"messages": message("go"), "response_format": {"type": "json_object"},
        "max_tokens": 300, "temperature": 1.0, "seed": 5, "n": 4}));
    for choice in whole["choices"].as_array().expect("choices") {
        let text = choice["message"]["content"].as_str().expect("text");
        match choice["finish_reason"].as_str() {
            Some("stop") => assert!(serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object()), "{text}"),
            Some("length") => assert!(text.trim_start().starts_with('{'), "{text}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_text_in_company() {
    let server = Setup::default().start();
    let ask = |index: u64| {
        json!({"prompt": "x", "max_tokens": 40, "temperature": 1.0, "seed": index, "return_token_ids": true,
            "guided_regex": if index.is_multiple_of(2) { json!("([a-f]{2} ){4,9}!") } else { Value::Null }})
    };
    let tokens = |reply: Value| ids(&reply["choices"][0]["token_ids"]);
    let alone: Vec<Vec<u64>> = (0..16).map(|index| tokens(server.complete(ask(index)))).collect();
    let together: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|index| scope.spawn(move || index)).collect();
        let asked = threads.into_iter().map(|thread| thread.join().expect("a number"));
        let server = &server;
        let asked: Vec<_> = asked.map(|index| scope.spawn(move || tokens(server.complete(ask(index))))).collect();
        asked.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn what_cannot_be_followed_is_refused_before_any_token() {
    let server = Setup::default().start();
    let deep = |count: usize| format!("{}{}", "(".repeat(count), ")".repeat(count));
    let cases = [
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (json!({"response_format": {"type": "xml"}}), "response_format"),
        (json!({"response_format": "json"}), "response_format"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}),
            "response_format.json_schema",
        ),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"regex": deep(60_000)}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"grammar": format!("start: {}", deep(60_000))}}), "structured_outputs.grammar"),
        (json!({"structured_outputs": {"json": {"$ref": "#"}}}), "structured_outputs.json"),
        (json!({"structured_outputs": {"json": "no JSON"}}), "structured_outputs.json"),
        (json!({"structured_outputs": {"json": true}}), "structured_outputs.json"),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
        (json!({"structured_outputs": {"choice": ["a", 5]}}), "structured_outputs.choice"),
        (json!({"structured_outputs": {"structural_tag": "{}"}}), "structured_outputs.structural_tag"),
        (json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}), "structured_outputs.choice"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
        (json!({"guided_json": 5}), "guided_json"),
        (json!({"guided_whitespace_pattern": " "}), "guided_whitespace_pattern"),
        (json!({"min_tokens": -1}), "min_tokens"),
    ];
    for (change, param) in cases {
        let mut body = json!({"messages": message("x"), "max_tokens": 5});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        let begun = Instant::now();
        let error = server.post("/v1/chat/completions", &body).error(400);
        assert_eq!(error["param"], param, "{:.200}: {error}", change.to_string());
        assert!(begun.elapsed() < Duration::from_secs(6), "{:.200}", change.to_string());
    }
    assert_eq!(server.metric("fullbore_requests_running"), 0.0);
    server.complete(json!({"prompt": "x", "max_tokens": 1}));
}

#[test]
fn allowed_tokens_that_a_form_excludes_are_named() {
    let server = Setup::default().start();
    // Of letters: at once, and behind two of them.
    for (regex, letters) in [("[ab]{2}c", "xyz"), ("[ab]{2}c", "ab")] {
        let ids: Vec<u32> = letters.bytes().map(|letter| 4 + u32::from(letter)).collect();
        let mut body = json!({"prompt": "x", "max_tokens": 9, "guided_regex": regex, "allowed_token_ids": ids});
        let error = server.post("/v1/completions", &body).error(400);
        let sentence = error["message"].as_str().expect("a sentence");
        assert!(sentence.contains("grammar") && sentence.contains("allowed_token_ids"), "{sentence}");
        assert_eq!(error["param"], "allowed_token_ids");
        body["stream"] = json!(true);
        let told = events(&server.post("/v1/completions", &body).body, false);
        assert_eq!(told.last().expect("an event")["error"], error);
    }
    assert_eq!(server.metric("fullbore_requests_refused_total{cause=\"invalid_field\"}"), 4.0);
}

/// Schemas that take long to compile, many at a time, and one answer that goes on.
#[test]
fn compiling_holds_up_no_answer() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    let large = |seed: usize| {
        let field =
            |index: usize| (format!("field{seed}_{index}"), json!({"type": "string", "pattern": "^(a|b)*c{1,60}$"}));
        let properties: serde_json::Map<String, Value> = (0..400).map(field).collect();
        json!({"prompt": "x", "max_tokens": 1, "guided_json": {"type": "object", "properties": properties}})
    };
    let slowest = std::thread::scope(|scope| {
        let server = &server;
        let others: Vec<_> =
            (0..12).map(|seed| scope.spawn(move || server.post("/v1/completions", &large(seed)).status)).collect();
        let mut slowest = Duration::ZERO;
        while others.iter().any(|other| !other.is_finished()) {
            let begun = Instant::now();
            assert_eq!(server.get("/health/live").status, 200);
            server.complete(json!({"prompt": "y", "max_tokens": 4, "ignore_eos": true}));
            slowest = slowest.max(begun.elapsed());
        }
        let statuses: Vec<u16> = others.into_iter().map(|other| other.join().expect("a status")).collect();
        assert!(statuses.iter().all(|status| [200, 400, 503].contains(status)), "{statuses:?}");
        slowest
    });
    assert!(slowest < Duration::from_secs(1), "an answer of 4 tokens took {slowest:?}");
}

#[test]
fn a_least_length_is_kept() {
    let server = Setup::default().start();
    // Nearly every token is the end: without a least length texts are empty.
    let ask = |min_tokens: u32| {
        server.complete(json!({"prompt": "x", "max_tokens": 30, "min_tokens": min_tokens, "temperature": 0,
            "logit_bias": {"2": 100}, "allowed_token_ids": [2, 70, 71], "return_token_ids": true}))
    };
    let count = |reply: &Value| ids(&reply["choices"][0]["token_ids"]).iter().filter(|id| **id != 2).count();
    let (short, long) = (ask(0), ask(12));
    assert!(count(&short) < 12 && count(&long) >= 12, "{short} {long}");
    let error = server.post("/v1/completions", &json!({"prompt": "x", "min_tokens": 1, "allowed_token_ids": [2]}));
    assert_eq!(error.error(400)["param"], "min_tokens");
    // A stop string that is in the text from the start on ends it only then, whole and streamed.
    let mut body = json!({"prompt": "x", "max_tokens": 30, "allowed_token_ids": [70], "stop": "B"});
    let choice = |reply: &Value| reply["choices"][0].clone();
    let at_once = server.complete(body.clone());
    assert_eq!((at_once["usage"]["completion_tokens"].as_u64(), &choice(&at_once)["text"]), (Some(1), &json!("")));
    body["min_tokens"] = json!(12);
    let kept = server.complete(body.clone());
    assert_eq!(kept["usage"]["completion_tokens"], 13, "{kept}");
    let wanted = (json!("B".repeat(12)), json!("stop"), json!("B"));
    let told = choice(&kept);
    assert_eq!((told["text"].clone(), told["finish_reason"].clone(), told["stop_reason"].clone()), wanted);
    let pieces = server.stream("/v1/completions", body);
    let text: String = pieces.iter().map(|piece| choice(piece)["text"].as_str().expect("text").to_owned()).collect();
    let last = choice(pieces.last().expect("an end"));
    assert_eq!((json!(text), last["finish_reason"].clone(), last["stop_reason"].clone()), wanted);
}

#[test]
fn text_becomes_tokens_and_text_again() {
    let server = Setup::default().start();
    let tokens = |body: Value| server.post("/tokenize", &body).ok();
    let reply = tokens(json!({"prompt": "Héllo", "return_token_strs": true}));
    let count = reply["count"].as_u64().expect("a count") as usize;
    assert_eq!((count, reply["max_model_len"].as_u64()), (ids(&reply["tokens"]).len(), Some(1024)));
    assert_eq!(reply["token_strs"].as_array().expect("texts").len(), count);
    // As the prompt of a completion is read, which begins with a BOS token.
    let completed = server.complete(json!({"prompt": "Héllo", "max_tokens": 1, "return_token_ids": true}));
    assert_eq!(completed["choices"][0]["prompt_token_ids"], reply["tokens"]);
    let bare = tokens(json!({"prompt": "Héllo", "add_special_tokens": false}));
    assert_eq!(ids(&bare["tokens"])[..], ids(&reply["tokens"])[1..]);
    let again = server.post("/detokenize", &json!({"tokens": bare["tokens"]})).ok();
    assert_eq!(again, json!({"prompt": "Héllo", "content": "Héllo"}));
    // As llama-server's clients ask.
    assert_eq!(tokens(json!({"content": "Héllo"}))["tokens"], bare["tokens"]);
    assert_eq!(tokens(json!({"content": "Héllo", "add_special": true}))["tokens"], reply["tokens"]);
    let told = tokens(json!({"content": "hé<|im_end|>", "with_pieces": true}));
    let pieces: Vec<Value> =
        told["tokens"].as_array().expect("tokens").iter().map(|told| told["piece"].clone()).collect();
    assert_eq!(pieces, [json!("h"), json!([0xC3]), json!([0xA9]), json!("<|im_end|>")]);
    let of_pieces: Value = told["tokens"].as_array().expect("tokens").iter().map(|told| told["id"].clone()).collect();
    assert_eq!(of_pieces, tokens(json!({"content": "hé<|im_end|>"}))["tokens"]);
    let whole = server.post("/detokenize", &json!({"tokens": of_pieces})).ok();
    assert_eq!(whole["content"], "hé<|im_end|>");
    let as_text = tokens(json!({"content": "<|im_end|>", "parse_special": false}))["tokens"].clone();
    assert_eq!(ids(&as_text).len(), "<|im_end|>".len());
    let end = tokens(json!({"content": "<|im_end|>"}))["tokens"].clone();
    let mixed = tokens(json!({"content": ["Hé", 70, "llo"], "add_special": true}))["tokens"].clone();
    let [before, after] = ["Hé", "llo"].map(|text| ids(&tokens(json!({"content": text}))["tokens"]));
    assert_eq!(ids(&mixed)[1..], [before, vec![70], after].concat());
    assert_eq!((ids(&mixed)[0], ids(&end).len()), (ids(&reply["tokens"])[0], 1));
    let chat = json!({"messages": message("Hi <|im_end|>"), "max_tokens": 1, "return_token_ids": true});
    assert_eq!(tokens(chat.clone())["tokens"], server.chat(chat.clone())["prompt_token_ids"]);
    let prompt = server.post("/apply-template", &chat).ok()["prompt"].clone();
    assert_eq!(prompt, "<|im_start|>user Hi <|im_end|><|im_end|><|im_start|>assistant ");
    let cases = [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 5}), "prompt"),
        ("/tokenize", json!({"prompt": "word ".repeat(50_000)}), "prompt"),
        ("/tokenize", json!({"content": vec!["word ".repeat(250); 200]}), "content"),
        ("/tokenize", json!({"content": [true]}), "content"),
        ("/tokenize", json!({"content": [1u64 << 40]}), "content"),
        ("/tokenize", json!({"content": 70}), "content"),
        ("/detokenize", json!({"tokens": "x"}), "tokens"),
        ("/detokenize", json!({"tokens": [1u64 << 40]}), "tokens"),
        ("/detokenize", json!({"tokens": vec![70; 5000]}), "tokens"),
        ("/apply-template", json!({"messages": []}), "messages"),
    ];
    for (path, body, param) in cases {
        assert_eq!(server.post(path, &body).error(400)["param"], param, "{path}");
    }
    assert_eq!(server.post("/tokenize", &json!({"model": "other", "prompt": "x"})).error(404)["param"], "model");
}
