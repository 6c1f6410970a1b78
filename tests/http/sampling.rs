//! How tokens are chosen, where a text ends, and how likely its tokens were.

use super::*;

#[test]
fn seeds_repeat_and_choices_differ() {
    let server = Setup::default().start();
    let sample = |seed: Value, n: u32| {
        let reply = server.complete(json!({"prompt": "x", "max_tokens": 24, "temperature": 1.5, "seed": seed, "n": n,
            "ignore_eos": true, "return_token_ids": true, "top_k": -1, "top_p": 1, "min_p": 0}));
        reply["choices"].as_array().expect("choices").iter().map(|choice| ids(&choice["token_ids"])).collect::<Vec<_>>()
    };
    assert_eq!(sample(json!(7), 1), sample(json!(7), 1));
    assert_ne!(sample(json!(7), 1), sample(json!(8), 1));
    assert_ne!(sample(json!(null), 1), sample(json!(null), 1));
    assert_eq!(sample(json!(-3), 1), sample(json!(-3), 1));
    assert_eq!(sample(json!(u64::MAX), 1), sample(json!(u64::MAX), 1));
    let three = sample(json!(7), 3);
    assert_eq!(three[0], sample(json!(7), 1)[0]);
    assert!(three[0] != three[1] && three[1] != three[2]);
    let top_1 = server
        .complete(json!({"prompt": "x", "max_tokens": 24, "temperature": 2, "top_k": 1, "ignore_eos": true,
        "return_token_ids": true}));
    assert_eq!(ids(&top_1["choices"][0]["token_ids"]), greedy(&server, "x", 24).0);
}

/// On a simulated device a choice is a hash of everything that its sampler has.
#[test]
fn penalties_biases_and_masks_act_on_completions_and_chats() {
    let server = Setup::default().start();
    let base = json!({"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 24,
        "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let ask = |change: Value| {
            let mut body = base.clone();
            body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
            ids(&server.post(path, &body).ok()["choices"][0]["token_ids"])
        };
        let plain = ask(json!({}));
        let unchanged = json!({"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
            "logit_bias": {}});
        assert_eq!(ask(unchanged), plain, "{path}");
        let mut seen = vec![plain];
        for change in [
            json!({"presence_penalty": 0.5}),
            json!({"presence_penalty": -0.5}),
            json!({"frequency_penalty": 2}),
            json!({"repetition_penalty": 1.1}),
            json!({"logit_bias": {"5": 1, "70": -100}}),
            json!({"logit_bias": {"5": 1, "71": -100}}),
            json!({"logit_bias": {"70": -100, "5": 1.5}}),
            json!({"allowed_token_ids": [5, 70, 71, 300]}),
        ] {
            let got = ask(change.clone());
            assert_eq!(got, ask(change.clone()), "{path}: {change} again");
            assert!(!seen.contains(&got), "{path}: {change} changes nothing");
            let allowed = |id: &u64| [5, 70, 71, 300].contains(id);
            assert_eq!(got.iter().all(allowed), change.get("allowed_token_ids").is_some(), "{path}: {change}");
            seen.push(got);
        }
        assert_eq!(ask(json!({"allowed_token_ids": [300], "temperature": 1.7})), [300; 24], "{path}");
    }
}

#[test]
fn the_models_own_defaults_apply() {
    let server = Setup { bundle: |bundle| bundle.defaults.temperature = Some(0.0), ..Setup::default() }.start();
    let ask = json!({"prompt": "x", "max_tokens": 16, "ignore_eos": true, "return_token_ids": true});
    let reply = server.complete(ask);
    assert_eq!(ids(&reply["choices"][0]["token_ids"]), greedy(&server, "x", 16).0);
    let server = Setup { bundle: |bundle| bundle.defaults.repetition_penalty = Some(1.1), ..Setup::default() }.start();
    let ask = |change: Value| {
        let mut body = json!({"prompt": "x", "max_tokens": 16, "temperature": 0, "ignore_eos": true,
            "return_token_ids": true});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        ids(&server.complete(body)["choices"][0]["token_ids"])
    };
    assert_eq!(ask(json!({})), ask(json!({"repetition_penalty": 1.1})));
    assert_ne!(ask(json!({})), ask(json!({"repetition_penalty": 1})));
}

#[test]
fn stop_ids_end_a_text_and_are_no_part_of_it() {
    let server = Setup::default().start();
    let (all, _) = greedy(&server, "stop here", 24);
    let stop_id = all[10];
    let first = all.iter().position(|id| *id == stop_id).expect("it is there");
    let reply = server.complete(json!({"prompt": "stop here", "max_tokens": 24, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "stop_token_ids": [stop_id]}));
    let choice = &reply["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["token_ids"]), (&json!("stop"), &json!(all[..=first])));
    assert_eq!(json!(greedy(&server, "stop here", first as u32).1), choice["text"]);
    assert_eq!(reply["usage"]["completion_tokens"], first + 1);
}

#[test]
fn stop_strings_end_a_text_wherever_they_begin() {
    let server = Setup::default().start();
    let (_, text) = greedy(&server, "stop strings", 64);
    let letters: Vec<char> = text.chars().collect();
    for (begin, length) in [(3, 1), (7, 2), (11, 4)] {
        let stop: String = letters[begin..begin + length].iter().collect();
        let expected = &text[..text.find(&stop).expect("it is there")];
        for stop in [json!(stop), json!([stop]), json!(["never in it", stop])] {
            let ask = json!({"prompt": "stop strings", "max_tokens": 64, "temperature": 0, "ignore_eos": true,
                "stop": stop});
            let reply = server.complete(ask.clone());
            assert_eq!(
                (&reply["choices"][0]["text"], &reply["choices"][0]["finish_reason"]),
                (&json!(expected), &json!("stop"))
            );
            let used = reply["usage"]["completion_tokens"].as_u64().expect("usage");
            assert!(used < 64, "the sequence ran on to {used}");
            let mut with_usage = ask;
            with_usage["stream_options"] = json!({"include_usage": true});
            let events = server.stream("/v1/completions", with_usage);
            let parts = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
            assert_eq!(parts.collect::<String>(), expected);
            assert_eq!(events.last().expect("events")["usage"], reply["usage"]);
        }
    }
    // The engine hears of it: nothing runs on.
    server.wait_for("the end of stopped sequences", |server| server.metric("fullbore_requests_running") == 0.0);
}

#[test]
fn logprobs_of_completions() {
    let server = Setup::default().start();
    let reply = server.complete(json!({"prompt": "One two", "max_tokens": 5, "temperature": 0, "ignore_eos": true,
        "logprobs": 3, "return_token_ids": true}));
    let logprobs = &reply["choices"][0]["logprobs"];
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[field].as_array().map(Vec::len), Some(5), "{field}: {logprobs}");
    }
    for (logprob, top) in logprobs["token_logprobs"]
        .as_array()
        .expect("a list")
        .iter()
        .zip(logprobs["top_logprobs"].as_array().expect("a list"))
    {
        let best = top.as_object().expect("a map").values().filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
        assert!((logprob.as_f64().expect("a number") - best).abs() < 1e-5, "greedy is the best of {top}");
        assert!(best < 0.0);
    }
    let none = server.complete(json!({"prompt": "One two", "max_tokens": 5, "logprobs": 0}));
    let top = &none["choices"][0]["logprobs"]["top_logprobs"][0];
    assert_eq!(top.as_object().map(|map| map.len()), Some(1), "the sampled token itself");
}

#[test]
fn echo_repeats_the_prompt_with_its_logprobs() {
    let server = Setup::default().start();
    let ask = json!({"prompt": "One two", "max_tokens": 0, "echo": true, "logprobs": 1, "return_token_ids": true});
    let scored = server.complete(ask.clone());
    let choice = &scored["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("One two"), &json!("length")));
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let num_prompt = ids(&choice["prompt_token_ids"]).len();
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("a list");
    assert_eq!(logprobs.len(), num_prompt);
    assert!(
        logprobs[0].is_null() && logprobs[1..].iter().all(|value| value.as_f64().is_some_and(|value| value <= 0.0))
    );
    // Again, now that the prefix cache has it.
    assert_eq!(server.complete(ask)["choices"][0]["logprobs"], choice["logprobs"]);

    let longer = server
        .complete(json!({"prompt": "One two", "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 1,
        "ignore_eos": true}));
    let (_, continued) = greedy(&server, "One two", 3);
    assert_eq!(longer["choices"][0]["text"], json!("One two".to_owned() + &continued));
    assert_eq!(longer["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(num_prompt + 3));
    let offset = &longer["choices"][0]["logprobs"]["text_offset"][num_prompt];
    assert_eq!(offset, "One two".len());
    let plain = server
        .complete(json!({"prompt": "One two", "max_tokens": 3, "temperature": 0, "echo": true, "ignore_eos": true}));
    assert_eq!(
        (&plain["choices"][0]["text"], &plain["choices"][0]["logprobs"]),
        (&longer["choices"][0]["text"], &json!(null))
    );
    let scored_only = server.complete(json!({"prompt": "One two", "max_tokens": 0, "echo": true}));
    assert_eq!(scored_only["choices"][0]["text"], "One two");
}

#[test]
fn logprobs_of_chats() {
    let server = Setup::default().start();
    let ask = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0,
        "ignore_eos": true, "logprobs": true, "top_logprobs": 3});
    let whole = server.chat(ask.clone());
    let content = whole["choices"][0]["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(content.len(), 4);
    for token in content {
        let top = token["top_logprobs"].as_array().expect("a list");
        let values: Vec<f64> = top.iter().map(|top| top["logprob"].as_f64().expect("a number")).collect();
        assert!(values.len() == 3 && values.is_sorted_by(|a, b| a >= b), "{token}");
        assert_eq!((&token["token"], &token["bytes"]), (&top[0]["token"], &top[0]["bytes"]));
        assert!(token["bytes"].as_array().is_some_and(|bytes| !bytes.is_empty()), "{token}");
    }
    let events = server.stream("/v1/chat/completions", ask);
    let lists = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(lists.flatten().collect::<Vec<_>>(), content.iter().collect::<Vec<_>>());
}
