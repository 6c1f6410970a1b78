//! Fields of completions and chats that few clients send: the best of several, a prompt's log-probabilities, usage in
//! every chunk, integers written as floats, and those that are known and refused.

use super::*;

#[test]
fn the_best_of_several_are_told() {
    let server = Setup::default().start();
    let ask = json!({"prompt": ["Alpha", "Beta"], "max_tokens": 12, "temperature": 1.2, "seed": 5, "ignore_eos": true,
        "return_token_ids": true});
    let with = |change: Value| {
        let mut body = ask.clone();
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        server.complete(body)
    };
    let all = with(json!({"n": 6, "logprobs": 0}));
    let best = with(json!({"n": 2, "best_of": 6}));
    let mean = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("logprobs");
        logprobs.iter().map(|logprob| logprob.as_f64().expect("a number")).sum::<f64>() / logprobs.len() as f64
    };
    for nth_prompt in 0..2 {
        let mut choices: Vec<&Value> =
            all["choices"].as_array().expect("choices")[nth_prompt * 6..][..6].iter().collect();
        choices.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        for (rank, choice) in choices.iter().take(2).enumerate() {
            let told = &best["choices"][nth_prompt * 2 + rank];
            assert_eq!((&told["token_ids"], &told["logprobs"]), (&choice["token_ids"], &Value::Null));
            assert_eq!(told["index"], nth_prompt * 2 + rank);
        }
    }
    assert_eq!(best["choices"].as_array().expect("choices").len(), 4);
    // All that were made are counted.
    assert_eq!(best["usage"], all["usage"]);
    assert_eq!(with(json!({"best_of": 1}))["choices"].as_array().expect("choices").len(), 2);
    for (change, param) in [
        (json!({"n": 3, "best_of": 2}), "best_of"),
        (json!({"best_of": 129}), "best_of"),
        (json!({"best_of": 3, "stream": true}), "best_of"),
        (json!({"best_of": 100}), "n"),
    ] {
        let mut body = ask.clone();
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        assert_eq!(server.post("/v1/completions", &body).error(400)["param"], param, "{change}");
    }
}

#[test]
fn the_log_probabilities_of_a_prompt() {
    let server = Setup::default().start();
    let ask = json!({"prompt": "One two", "max_tokens": 2, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "echo": true, "logprobs": 1, "prompt_logprobs": 3});
    let choice = server.complete(ask.clone())["choices"][0].clone();
    let (prompt_ids, echoed) = (ids(&choice["prompt_token_ids"]), &choice["logprobs"]["token_logprobs"]);
    let logprobs = choice["prompt_logprobs"].as_array().expect("a list");
    assert_eq!((logprobs.len(), &logprobs[0]), (prompt_ids.len(), &Value::Null));
    for (index, id) in prompt_ids.iter().enumerate().skip(1) {
        let entry = logprobs[index].as_object().expect("tokens");
        let own = &entry[&id.to_string()];
        assert_eq!(own["logprob"], echoed[index]);
        assert!(own["rank"].as_u64().is_some_and(|rank| rank >= 1) && own["decoded_token"].is_string(), "{own}");
        assert!((3..=4).contains(&entry.len()), "{entry:?}");
        // As many as the other field asked for.
        assert!(choice["logprobs"]["top_logprobs"][index].as_object().is_some_and(|top| top.len() <= 2), "{choice}");
    }
    let alone = server.complete(json!({"prompt": "One two", "max_tokens": 0, "prompt_logprobs": 3}));
    assert_eq!(alone["choices"][0]["prompt_logprobs"], choice["prompt_logprobs"]);
    assert_eq!((&alone["choices"][0]["text"], &alone["choices"][0]["logprobs"]), (&json!(""), &Value::Null));
    let chat = server.chat(json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1,
        "prompt_logprobs": 0, "return_token_ids": true}));
    let count = |value: &Value| value.as_array().expect("a list").len();
    assert_eq!(count(&chat["prompt_logprobs"]), count(&chat["prompt_token_ids"]));
    for (change, param) in [(json!(21), "prompt_logprobs"), (json!(-1), "prompt_logprobs")] {
        let error = server.post("/v1/completions", &json!({"prompt": "x", "prompt_logprobs": change})).error(400);
        assert_eq!(error["param"], param);
    }
    let streamed = json!({"prompt": "x", "prompt_logprobs": 1, "stream": true});
    assert_eq!(server.post("/v1/completions", &streamed).error(400)["param"], "prompt_logprobs");
}

#[test]
fn usage_may_be_in_every_chunk() {
    let server = Setup::default().start();
    for (path, ask) in [
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]})),
    ] {
        let mut body = ask;
        body["max_tokens"] = json!(12);
        body["ignore_eos"] = json!(true);
        body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
        let events = server.stream(path, body.clone());
        let counts: Vec<u64> =
            events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().expect("usage")).collect();
        assert!(counts.is_sorted() && counts.last() == Some(&12), "{counts:?}");
        assert!(events.iter().all(|event| event["usage"]["prompt_tokens"] == events[0]["usage"]["prompt_tokens"]));
        body["stream_options"] = json!({"continuous_usage_stats": true});
        assert!(server.stream(path, body).iter().all(|event| event.get("usage").is_none()));
    }
}

#[test]
fn integers_may_be_written_as_floats() {
    let server = Setup::default().start();
    let ask = json!({"prompt": [20, 21, 22], "max_tokens": 4, "min_tokens": 2, "n": 2, "best_of": 3, "top_k": 40,
        "seed": 7, "logprobs": 2, "stop_token_ids": [99], "allowed_token_ids": [70, 71, 72, 73, 74], "priority": -1,
        "return_token_ids": true});
    fn as_float(value: &Value) -> Value {
        match value {
            Value::Array(items) => items.iter().map(as_float).collect(),
            value => value.as_i64().map_or(value.clone(), |number| json!(number as f64)),
        }
    }
    let fields = ask.as_object().expect("an object");
    let floats: Value = fields.iter().map(|(name, value)| (name.clone(), as_float(value))).collect();
    assert_eq!((&floats["seed"], &floats["prompt"]), (&json!(7.0), &json!([20.0, 21.0, 22.0])));
    assert!(floats["max_tokens"].is_f64());
    assert_eq!(server.complete(floats)["choices"], server.complete(ask)["choices"]);
    // Not every integer is a float there.
    let large = json!({"prompt": "x", "max_tokens": 1, "seed": 9_007_199_254_740_994.0});
    assert_eq!(server.post("/v1/completions", &large).error(400)["param"], "seed");
}

#[test]
fn what_is_known_and_not_there_is_refused_by_name() {
    let server = Setup::default().start();
    // As routers send it to every worker.
    let no_transfer = json!({"do_remote_decode": false, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_host": "10.0.0.1", "remote_port": 5600});
    let prompt = json!({"prompt": "x", "max_tokens": 1});
    let messages = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
    for (path, body) in [("/v1/completions", prompt), ("/v1/chat/completions", messages)] {
        let with = |name: &str, value: Value| {
            let mut body = body.clone();
            body[name] = value;
            server.post(path, &body)
        };
        let is_chat = path == "/v1/chat/completions";
        for (name, value, harmless) in [
            ("include_stop_str_in_output", json!(true), json!(false)),
            ("skip_special_tokens", json!(false), json!(true)),
            ("truncate_prompt_tokens", json!(5), Value::Null),
            ("use_beam_search", json!(true), json!(false)),
            ("bad_words", json!(["x"]), json!([])),
            ("add_special_tokens", json!(is_chat), json!(!is_chat)),
            ("include_reasoning", json!(false), json!(true)),
            ("kv_transfer_params", json!({"do_remote_decode": true}), json!({})),
            ("kv_transfer_params", json!({"do_remote_prefill": true, "remote_host": "h"}), Value::Null),
            ("kv_transfer_params", json!("x"), no_transfer.clone()),
            ("kv_transfer_params", json!([]), json!({"lmcache.skip_save": true})),
            ("logprob_token_ids", json!([1]), json!([])),
            ("return_tokens_as_token_ids", json!(true), json!(false)),
            ("thinking_token_budget", json!(8), json!(-1)),
            ("grammar", json!("root ::= \"x\""), json!("")),
            ("json_schema", json!({"type": "object"}), json!({})),
            ("regex", json!("x"), Value::Null),
            ("modalities", json!(["text", "audio"]), json!(["text"])),
            ("chat_template", json!("{{ messages }}"), Value::Null),
            ("prompt_embeds", json!("x"), Value::Null),
            ("mirostat", json!(2), json!(0)),
            ("typical_p", json!(0.5), json!(1.0)),
            ("repeat_penalty", json!(1.1), json!(1)),
            ("xtc_probability", json!(0.5), json!(0.0)),
            ("dry_multiplier", json!(0.8), json!(0)),
            ("dynatemp_range", json!(0.5), json!(0)),
            ("top_n_sigma", json!(1.0), json!(-1)),
            ("logits_processors", json!(["x"]), json!([])),
            ("n_predict", json!(8), json!(-1)),
        ] {
            assert_eq!(with(name, value).error(400)["param"], name);
            assert_eq!(with(name, harmless).status, 200, "{name}");
        }
        assert_eq!(with("nobody_knows_this", json!({"a": [1]})).status, 200);
    }
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "best_of": 2});
    assert_eq!(server.post("/v1/chat/completions", &chat).error(400)["param"], "best_of");
}
