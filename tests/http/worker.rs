//! The server as a worker behind routers that speak vLLM's dialect (SMG, llm-d, production-stack, KServe, Envoy's AI
//! gateway): what they ask, and what they are told when it is full or about to end.

use super::*;

fn get_with(server: &Harness, path: &str, headers: &str) -> Reply {
    read_reply(server.send(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")))
}

#[test]
fn routers_find_out_what_it_is() {
    let server = Setup::default().start();
    for path in ["/health", "/ping"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert_eq!(server.post("/ping", &json!({})).status, 200);
    let version = server.get("/version").ok();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
    // SMG takes what is neither vLLM's nor SGLang's by name for a vLLM if it has a version.
    let card = &server.get("/v1/models").ok()["data"][0];
    assert_eq!(
        [&card["owned_by"], &card["root"], &card["parent"]],
        [&json!("fullbore"), &json!("sim-model"), &Value::Null]
    );
    assert_eq!((&card["id"], &card["max_model_len"]), (&json!("sim-model"), &json!(1024)));
    let info = server.get("/tokenizer_info?model=sim-model").ok();
    for name in ["eos_token", "chat_template", "tokenizer_class"] {
        assert!(info[name].is_string(), "{name} of {info}");
    }
    assert!(info.get("bos_token").is_some() && info["pad_token"] == info["eos_token"], "{info}");
    for path in ["/tokenizer_info?model=other", "/v1/loads?model=other"] {
        assert_eq!(server.get(path).error(404)["code"], "model_not_found");
    }
}

#[test]
fn routers_see_how_full_it_is() {
    let server = Setup { pace: Pace::Stalled, ..Setup::default() }.start();
    assert_eq!(server.get("/load").ok(), json!({"server_load": 0}));
    let body = json!({"prompt": vec![50; 100], "max_tokens": 4, "ignore_eos": true}).to_string();
    let running = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("it to run", |server| server.get("/load").ok()["server_load"] == 1);
    server.gate.set(Pace::Free);
    assert_eq!(read_reply(running).status, 200);
    server.complete(json!({"prompt": vec![50; 100], "max_tokens": 4, "ignore_eos": true}));
    server.wait_for("the engine to tell", |server| server.get("/load").ok()["server_load"] == 0);
    let loads = server.get("/v1/loads?include=core,queues,memory").ok();
    assert_eq!(loads["dp_rank_count"], 1);
    let rank = &loads["loads"][0];
    let wanted = json!({"dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 0, "num_total_reqs": 0,
        "num_used_tokens": 0, "max_total_num_tokens": 16 * 1024, "token_usage": 0.0, "max_running_requests": 16});
    for (name, value) in wanted.as_object().expect("fields") {
        assert_eq!(rank[name], *value, "{name} of {rank}");
    }
    // The second prompt found the six full blocks of the first.
    assert_eq!(rank["cache_hit_rate"], 96.0 / 200.0);
    // Its load is unknown to SMG without the first, and to production-stack without the second.
    for name in ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"] {
        assert_eq!(server.metric(name), 0.0);
    }
    assert_eq!(server.metric("vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"1024\"}"), 1.0);
}

#[test]
fn proxies_that_weigh_backends_are_told_in_a_header() {
    let server = Setup::default().start();
    let told = |headers: &str| {
        let reply = get_with(&server, "/v1/models", headers);
        reply.header("endpoint-load-metrics").map(str::to_owned)
    };
    let text = told("endpoint-load-metrics-format: TEXT\r\n");
    let wanted = "text named_metrics.kv_cache_usage_perc=0, named_metrics.num_requests_waiting=0";
    assert_eq!(text.as_deref(), Some(wanted));
    let told_json = told("endpoint-load-metrics-format: JSON\r\n").expect("a header");
    let told_json: Value = serde_json::from_str(told_json.strip_prefix("json ").expect("its format")).expect("JSON");
    assert_eq!(told_json, json!({"named_metrics": {"kv_cache_usage_perc": 0.0, "num_requests_waiting": 0}}));
    assert_eq!(told("endpoint-load-metrics-format: BIN\r\n"), None);
    assert_eq!(told(""), None);
}

#[test]
fn an_answer_is_known_by_what_its_request_was_called() {
    let server = Setup::default().start();
    for (path, status) in [("/v1/models", 200), ("/v1/models/other", 404), ("/nothing", 404)] {
        let reply = get_with(&server, path, "x-request-id: chat-17/b\r\nx-session-id: s\r\ntraceparent: 00-1-2-03\r\n");
        assert_eq!((reply.status, reply.header("x-request-id")), (status, Some("chat-17/b")));
    }
    // Where nobody has named it, an answer is known by its own id, as in the log.
    let named = |reply: &Reply| reply.header("x-request-id").map(str::to_owned);
    let reply = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1}));
    assert_eq!(named(&reply).map(Value::from), Some(reply.ok()["id"].clone()));
    let stream = server.post(
        "/v1/chat/completions",
        &json!({"messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1, "stream": true}),
    );
    assert!(named(&stream).is_some_and(|id| id.starts_with("chatcmpl-") && stream.text().contains(&id)), "{stream:?}");
    let refused = [server.get("/nothing"), server.post("/v1/completions", &json!({}))];
    refused.iter().for_each(|reply| assert!(named(reply).is_some_and(|id| id.starts_with("req_")), "{reply:?}"));
    assert_ne!(named(&refused[0]), named(&refused[1]));
    let message = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
    for reply in [server.post("/v1/messages", &message), server.post("/v1/messages", &json!({}))] {
        assert!(named(&reply).is_some() && reply.header("request-id").map(str::to_owned) == named(&reply), "{reply:?}");
    }
}

#[test]
fn a_head_is_that_of_the_answer() {
    let server = Setup::default().start();
    for path in ["/", "/health/live", "/v1/models", "/openapi.json", "/nothing"] {
        let ask = format!("HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let (head, whole) = (read_reply(server.send(ask)), server.get(path));
        assert_eq!((head.status, head.body.len()), (whole.status, 0), "{path}");
        assert_eq!(head.header("content-length"), whole.header("content-length"), "{path}");
    }
}

#[test]
fn what_would_be_read_is_what_is_read() {
    let server = Setup::default().start();
    let steps = server.metric("fullbore_steps_total");
    let messages = json!([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]);
    let mut chat = json!({"messages": messages, "max_tokens": 3, "temperature": 0.5, "top_k": -1, "stream": true,
        "stream_options": {"include_usage": true}, "cache_salt": "s", "documents": [],
        "continue_final_message": false});
    let rendered = server.post("/v1/chat/completions/render", &chat).ok();
    let params = &rendered["sampling_params"];
    let told = [&params["max_tokens"], &params["temperature"], &params["top_k"], &params["n"]];
    assert_eq!(told, [&json!(3), &json!(0.5), &json!(0), &json!(1)]);
    assert_eq!([&rendered["stream"], &rendered["cache_salt"]], [&json!(true), &json!("s")]);
    assert_eq!(rendered["stream_options"], chat["stream_options"]);
    let prompts = json!({"prompt": ["one prompt", "and another"]});
    let listed = server.post("/v1/completions/render", &prompts).ok();
    let as_ids = server.post("/v1/completions/render", &json!({"prompt": listed[1]["prompt_token_ids"]})).ok();
    assert_eq!(as_ids[0]["prompt_token_ids"], listed[1]["prompt_token_ids"]);
    assert!(as_ids[0]["prompt"].is_string(), "{as_ids}");
    for (path, body) in [("/v1/chat/completions/render", &mut chat), ("/v1/completions/render", &mut prompts.clone())] {
        body["model"] = json!("other");
        assert_eq!(server.post(path, body).error(404)["code"], "model_not_found");
    }
    assert_eq!(server.metric("fullbore_steps_total"), steps, "rendering generates nothing");
    let read = server.chat(json!({"messages": messages, "max_tokens": 1, "return_token_ids": true}));
    assert_eq!(rendered["token_ids"], read["prompt_token_ids"]);
    let read = server.complete(json!({"prompt": "one prompt", "max_tokens": 1, "return_token_ids": true}));
    assert_eq!(listed[0]["prompt_token_ids"], read["choices"][0]["prompt_token_ids"]);
    assert_eq!(listed[0]["prompt"], "one prompt");
}

/// Fields that SMG adds to what its clients sent, as it was seen to, and ones that nobody knows.
#[test]
fn what_routers_add_to_bodies_is_taken() {
    let server = Setup::default().start();
    let messages = json!([{"role": "user", "content": "x"}]);
    let usage = |reply: &Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64();
    let chat = server.chat(json!({"messages": messages, "max_tokens": 2, "logprobs": false, "stream": false,
        "chat_template_kwargs": {}, "rid": "r", "bootstrap_room": 5}));
    assert!(usage(&chat), "{chat}");
    let completion = server.complete(json!({"prompt": "x", "max_tokens": 2, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "priority": 0, "return_hidden_states": false}));
    assert!(usage(&completion), "{completion}");
    let response = server.post(
        "/v1/responses",
        &json!({"input": "x", "max_output_tokens": 2, "store": true,
        "temperature": 1.0, "priority": 0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "request_id": "r"}),
    );
    // It is said that nothing was stored.
    assert_eq!(response.ok()["store"], false);
    let later = json!({"input": "x", "previous_response_id": "resp_1", "store": true});
    assert_eq!(server.post("/v1/responses", &later).error(400)["param"], "previous_response_id");
}

#[test]
fn a_server_that_leaves_serves_on_until_it_drains() {
    let server = Setup { pace: Pace::Stalled, ..Setup::default() }.start();
    let running = server.server.as_ref().expect("running");
    let body = json!({"prompt": "x", "max_tokens": 2, "ignore_eos": true}).to_string();
    let before = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("it to run", |server| server.get("/load").ok()["server_load"] == 1);
    server.runtime.block_on(running.leave(Duration::ZERO));
    for path in ["/health", "/health/ready", "/ping"] {
        let reply = server.get(path);
        assert!(reply.header("retry-after").is_some(), "{path}: {}", reply.head);
        reply.error(503);
    }
    assert_eq!(server.get("/health/live").status, 200);
    assert_eq!(server.get("/v1/models").status, 200);
    let meanwhile = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("both to be there", |server| server.get("/load").ok()["server_load"] == 2);
    server.runtime.block_on(running.drain(Duration::ZERO));
    let after = server.post("/v1/completions", &json!({"prompt": "x"}));
    assert_eq!(after.header("retry-after"), Some("1"));
    assert!(after.error(503)["message"].as_str().expect("text").contains("shutting down"));
    // Who scrapes it sees it to its end.
    assert_eq!(server.get("/metrics").status, 200);
    server.gate.set(Pace::Free);
    for stream in [before, meanwhile] {
        assert_eq!(read_reply(stream).ok()["usage"]["completion_tokens"], 2);
    }
}
