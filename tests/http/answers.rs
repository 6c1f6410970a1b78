//! What completions and chats answer, whole and streamed, and what a model's card says.

use super::*;

#[test]
fn the_model_is_listed_with_what_it_takes() {
    let server = Setup::default().start();
    let list = server.get("/v1/models").ok();
    let card = &list["data"][0];
    assert_eq!((&list["object"], &card["object"]), (&json!("list"), &json!("model")));
    assert_eq!((&card["id"], &card["max_model_len"]), (&json!("sim-model"), &json!(1024)));
    assert!(card["created"].as_u64().is_some_and(|created| created > 1_700_000_000), "{card}");
    assert_eq!(card["kv_type"], "f16");
    assert!(card["owned_by"].is_string() && card["device"].is_string(), "{card}");
    let bundle = Bundle::simulated();
    let table = start::memory_table(&bundle.config, &Setup::default().config, 0);
    assert_eq!(card["memory_bytes"], table.total());
    for path in ["/v1/models/sim-model", "/v1/models/sim%2Dmodel"] {
        assert_eq!(server.get(path).ok(), *card, "{path}");
    }
    for path in ["/v1/models/owner/another", "/v1/models/%ff"] {
        server.get(path).error(404);
    }
    assert_eq!(server.get("/v1/models/another").error(404)["code"], "model_not_found");
}

#[test]
fn a_completion_has_all_its_fields() {
    let server = Setup::default().start();
    let reply = server.complete(json!({"model": "sim-model", "prompt": "Once upon a time", "ignore_eos": true,
        "return_token_ids": true, "a_field_nobody_knows": [1, {"x": null}], "user": "me"}));
    assert!(reply["id"].as_str().expect("an id").starts_with("cmpl-"));
    assert_eq!((&reply["object"], &reply["model"]), (&json!("text_completion"), &json!("sim-model")));
    let choice = &reply["choices"][0];
    assert_eq!(
        (&choice["index"], &choice["finish_reason"], &choice["logprobs"]),
        (&json!(0), &json!("length"), &json!(null))
    );
    // 16 is the API's default.
    assert_eq!(ids(&choice["token_ids"]).len(), 16);
    let num_prompt = ids(&choice["prompt_token_ids"]).len();
    let usage = json!({"prompt_tokens": num_prompt, "completion_tokens": 16, "total_tokens": num_prompt + 16,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(reply["usage"], usage);
}

#[test]
fn a_chat_has_all_its_fields_and_fills_the_context() {
    let server = Setup::default().start();
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user",
        "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]}]);
    let reply = server.chat(json!({"messages": messages, "ignore_eos": true, "return_token_ids": true}));
    assert!(reply["id"].as_str().expect("an id").starts_with("chatcmpl-"));
    assert_eq!(reply["object"], "chat.completion");
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert_eq!(choice["finish_reason"], "length");
    // The default is the rest of the context.
    assert_eq!(ids(&reply["prompt_token_ids"]).len() + ids(&choice["token_ids"]).len(), 1024);
    assert_eq!(reply["usage"]["total_tokens"], 1024);
    let short =
        server.chat(json!({"messages": messages, "ignore_eos": true, "max_tokens": 9, "max_completion_tokens": 5}));
    assert_eq!(short["usage"]["completion_tokens"], 5);
}

#[test]
fn content_of_a_message_is_never_a_special_token() {
    let server = Setup::default().start();
    let prompt_ids = |content: &str| {
        let reply = server.chat(json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1,
            "return_token_ids": true}));
        ids(&reply["prompt_token_ids"])
    };
    let special = Bundle::simulated().stop_ids[0].0;
    let spelling =
        Bundle::simulated().tokenizer.token(fullbore_engine::request::TokenId(special)).expect("a token").to_owned();
    let count = |ids: &[u64]| ids.iter().filter(|id| **id == u64::from(special)).count();
    assert_eq!(count(&prompt_ids(&spelling)), count(&prompt_ids("plain")));
}

#[test]
fn streamed_chunks_add_up_to_the_whole() {
    let server = Setup::default().start();
    for n in [1, 3] {
        let ask = json!({"prompt": ["Alpha", "Beta gamma"], "n": n, "max_tokens": 24, "temperature": 0.9, "seed": 5,
            "ignore_eos": true, "return_token_ids": true, "logprobs": 2, "echo": true});
        let whole = server.complete(ask.clone());
        let mut with_usage = ask;
        with_usage["stream_options"] = json!({"include_usage": true});
        let events = server.stream("/v1/completions", with_usage);
        let (last, chunks) = events.split_last().expect("events");
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        assert_eq!(whole["choices"].as_array().expect("choices").len(), 2 * n);
        for choice in whole["choices"].as_array().expect("choices") {
            let mut text = String::new();
            let (mut token_ids, mut tokens, mut offsets, mut reasons) = (vec![], vec![], vec![], vec![]);
            for chunk in chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == choice["index"]) {
                assert_eq!((&chunk["object"], &chunk["usage"]), (&json!("text_completion"), &json!(null)));
                let part = &chunk["choices"][0];
                text += part["text"].as_str().expect("text");
                token_ids.extend(ids(&part["token_ids"]));
                tokens.extend(part["logprobs"]["token_logprobs"].as_array().expect("logprobs").clone());
                offsets.extend(ids(&part["logprobs"]["text_offset"]));
                reasons.push(part["finish_reason"].clone());
            }
            assert_eq!(json!(text), choice["text"]);
            assert_eq!(json!(token_ids), choice["token_ids"]);
            assert_eq!(json!(tokens), choice["logprobs"]["token_logprobs"]);
            assert_eq!(json!(offsets), choice["logprobs"]["text_offset"]);
            assert_eq!(reasons.pop(), Some(json!("length")));
            assert!(reasons.iter().all(Value::is_null));
        }
    }
}

#[test]
fn a_chat_streams_role_text_reason_and_usage() {
    let server = Setup::default().start();
    let ask = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true});
    // Once before, so that the prefix cache has the prompt for both.
    server.chat(ask.clone());
    let whole = server.chat(ask.clone());
    let mut with_usage = ask.clone();
    with_usage["stream_options"] = json!({"include_usage": true});
    let events = server.stream("/v1/chat/completions", with_usage);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"]));
    let choices: Vec<_> = events.iter().filter_map(|event| event["choices"].get(0)).collect();
    let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    assert_eq!(json!(text), whole["choices"][0]["message"]["content"]);
    let streamed: Vec<u64> = choices
        .iter()
        .filter(|choice| choice["token_ids"].is_array())
        .flat_map(|choice| ids(&choice["token_ids"]))
        .collect();
    assert_eq!(json!(streamed), whole["choices"][0]["token_ids"]);
    assert_eq!(choices.last().expect("choices")["finish_reason"], "length");
    assert_eq!(events.last().expect("events")["usage"], whole["usage"]);
    // Unasked, no chunk speaks of usage.
    assert!(server.stream("/v1/chat/completions", ask).iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn a_stream_with_nothing_to_say_says_so() {
    let limits = Limits { keep_alive: Duration::from_millis(20), ..Limits::default() };
    let server = Setup { limits, pace: Pace::Stalled, ..Setup::default() }.start();
    let body = json!({"prompt": "x", "max_tokens": 3, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = server.send(post("/v1/completions", body.as_bytes()));
    let (mut bytes, mut part) = (Vec::new(), [0; 512]);
    while String::from_utf8_lossy(&bytes).matches(": keep-alive\n\n").count() < 3 {
        let length = stream.read(&mut part).expect("comments");
        assert!(length > 0, "closed after {}", String::from_utf8_lossy(&bytes));
        bytes.extend_from_slice(&part[..length]);
    }
    server.gate.set(Pace::Free);
    stream.read_to_end(&mut bytes).expect("the rest");
    let body = parse_reply(&bytes).body;
    let events: Vec<u8> = String::from_utf8(body).expect("text").replace(": keep-alive\n\n", "").into_bytes();
    assert_eq!(self::events(&events, true).last().expect("events")["choices"][0]["finish_reason"], "length");
}

#[test]
fn sixteen_streams_equal_each_alone() {
    let server = Setup::default().start();
    let alone: Vec<_> = (0..16).map(|index| greedy(&server, prompt(index), 40)).collect();
    let barrier = Barrier::new(16);
    let together: Vec<_> = std::thread::scope(|scope| {
        let one = |index| {
            let (server, barrier) = (&server, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let body = json!({"prompt": prompt(index), "max_tokens": 40, "temperature": 0, "ignore_eos": true,
                    "return_token_ids": true});
                let events = server.stream("/v1/completions", body);
                let text = events.iter().map(|event| event["choices"][0]["text"].as_str().expect("text")).collect();
                (events.iter().flat_map(|event| ids(&event["choices"][0]["token_ids"])).collect(), text)
            })
        };
        let threads: Vec<_> = (0..16).map(one).collect();
        threads.into_iter().map(|thread| thread.join().expect("a stream")).collect::<Vec<(Vec<u64>, String)>>()
    });
    assert_eq!(together, alone);
    assert_eq!(alone[0].0.len(), 40);
}

#[test]
fn prompts_are_text_ids_or_lists_of_either() {
    let server = Setup::default().start();
    let (expected, _) = greedy(&server, "Hello there", 8);
    let ask = |prompt: Value| {
        let body =
            json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
        server.complete(body)
    };
    let prompt_ids = ask(json!("Hello there"))["choices"][0]["prompt_token_ids"].clone();
    for (prompt, count) in [
        (prompt_ids.clone(), 1),
        (json!(["Hello there"]), 1),
        (json!([prompt_ids]), 1),
        (json!(["Hello there", "Hello there"]), 2),
        (json!(["Hello there", prompt_ids]), 2),
    ] {
        let reply = ask(prompt);
        let choices = reply["choices"].as_array().expect("choices");
        assert_eq!(choices.len(), count);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!((&choice["index"], ids(&choice["token_ids"])), (&json!(index), expected.clone()));
        }
        assert_eq!(reply["usage"]["prompt_tokens"], count * ids(&prompt_ids).len());
    }
}

#[test]
fn cached_tokens_are_in_the_usage() {
    let server = Setup::default().start();
    let completion = json!({"prompt": vec![50; 100], "max_tokens": 6, "ignore_eos": true});
    let messages = json!([{"role": "user", "content": "Name the largest city of each country, please."}]);
    let chat = json!({"messages": messages, "max_tokens": 6, "ignore_eos": true});
    for (path, body) in [("/v1/completions", completion), ("/v1/chat/completions", chat)] {
        let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
        let first = server.post(path, &body).ok();
        let num_prompt = first["usage"]["prompt_tokens"].as_u64().expect("a number");
        assert_eq!(cached(&first["usage"]), 0, "{path}");
        // Whole blocks of 16, and at least one token is computed.
        let expected = (num_prompt - 1) / 16 * 16;
        assert!(expected > 0, "{path}: {num_prompt} tokens");
        assert_eq!(cached(&server.post(path, &body).ok()["usage"]), expected, "{path}");
        let mut streamed = body.clone();
        streamed["stream_options"] = json!({"include_usage": true});
        let events = server.stream(path, streamed);
        assert_eq!(cached(&events.last().expect("events")["usage"]), expected, "{path}, streamed");
        // A prompt counts once, however many choices it has, and also where a stop string ends them all.
        let mut stopped = body.clone();
        (stopped["n"], stopped["stop"]) = (json!(3), json!(["a", "e", "i", "o", "u", " ", "s", "t"]));
        assert_eq!(cached(&server.post(path, &stopped).ok()["usage"]), expected, "{path}, stopped");
        let mut salted = body;
        salted["cache_salt"] = json!("of my own");
        assert_eq!(cached(&server.post(path, &salted).ok()["usage"]), 0, "{path}, salted");
    }
}
