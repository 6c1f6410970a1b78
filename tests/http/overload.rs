//! More than can be served: full queues, deadlines, and what an idle server takes all the same.

use super::*;

/// A server with `max_queued_requests` of 2 whose one slot is taken and whose device stands still, with both places
/// taken as well.
fn full_server(change: fn(&mut EngineConfig)) -> (Harness, Vec<TcpStream>) {
    let mut setup = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() };
    setup.config = EngineConfig { max_num_seqs: 1, max_queued_requests: 2, ..setup.config };
    change(&mut setup.config);
    let server = setup.start();
    let body = |max_tokens: u32| json!({"prompt": "x", "max_tokens": max_tokens, "ignore_eos": true}).to_string();
    let mut streams = vec![server.send(post("/v1/completions", body(800).as_bytes()))];
    server.wait_for("the first to run", |server| server.metric("fullbore_requests_running") == 1.0);
    server.gate.set(Pace::Stalled);
    streams.extend((0..2).map(|_| server.send(post("/v1/completions", body(4).as_bytes()))));
    server.wait_for("both places", |server| server.metric("fullbore_requests_waiting") == 2.0);
    (server, streams)
}

#[test]
fn a_full_queue_is_an_answer() {
    let (server, streams) = full_server(|_| {});
    let refused = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 4}));
    let error = refused.error(429);
    assert_eq!((&error["code"], &error["type"]), (&json!("queue_full"), &json!("rate_limit_error")));
    assert!(error["message"].as_str().expect("text").starts_with("2 requests wait of the 2 that may"), "{error}");
    assert!(retry_after(&refused) >= Duration::from_secs(1));
    // Nothing was read: not even that it is no JSON.
    server.post_bytes("/v1/completions", b"{no JSON").error(429);
    server.post_bytes("/v1/chat/completions", &vec![b'x'; 4 << 20]).error(429);
    // Who asks before it sends need not send.
    let mut asking = server.send(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\n\
         content-length: 1000000\r\n\r\n",
    );
    let mut beginning = [0; 12];
    asking.read_exact(&mut beginning).expect("an answer");
    assert_eq!(&beginning, b"HTTP/1.1 429");
    // Full is not ill: whoever asks about that is told so.
    assert_eq!(server.get("/health/ready").status, 200);
    // Those that were taken end as usual.
    server.gate.set(Pace::Free);
    for stream in streams {
        assert!(read_reply(stream).ok()["usage"]["completion_tokens"].as_u64() >= Some(4));
    }
    server.complete(json!({"prompt": "x", "max_tokens": 4}));
}

#[test]
fn choices_count_each_and_are_counted_before_text_is_read() {
    let (server, streams) = full_server(|config| config.max_queued_requests = 4);
    // Two of four places are taken. A token that does not exist is found when the prompt is read: that comes later.
    let many = |num_choices| json!({"prompt": [99_999_999], "max_tokens": 4, "n": num_choices});
    let error = server.post("/v1/completions", &many(3)).error(429);
    assert_eq!(error["code"], "queue_full");
    server.post("/v1/completions", &json!({"prompt": ["a", "b", "c"], "max_tokens": 4})).error(429);
    server.post("/v1/completions", &many(2)).error(400);
    server.gate.set(Pace::Free);
    streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
    // Places of what was refused are given back.
    for _ in 0..3 {
        assert_eq!(server.complete(json!({"prompt": "x", "max_tokens": 4, "n": 4}))["choices"][3]["index"], 3);
    }
    assert_eq!(server.metric("fullbore_requests_waiting"), 0.0);
}

/// Waiting helps only where something is waited for: an empty server never says 429, whatever its limits.
#[test]
fn an_empty_server_takes_all_that_its_limits_allow_and_refuses_the_rest_for_good() {
    for (max_queued_requests, max_queued_tokens) in [(1, 1024), (7, 1024), (8, 1024), (9, 1500), (60, 2048)] {
        let mut setup = Setup::default();
        (setup.config.max_queued_requests, setup.config.max_queued_tokens) = (max_queued_requests, max_queued_tokens);
        let server = setup.start();
        let choices = |num_choices: u32| json!({"prompt": "x", "max_tokens": 1, "ignore_eos": true, "n": num_choices});
        let tokens = |num_tokens: u32| {
            let prompts =
                [num_tokens.min(1000), num_tokens - num_tokens.min(1000)].map(|length| vec![20; length as usize]);
            json!({"prompt": prompts.into_iter().filter(|prompt| !prompt.is_empty()).collect::<Vec<_>>(),
                "max_tokens": 1, "ignore_eos": true})
        };
        for num_choices in 1..=max_queued_requests {
            server.complete(choices(num_choices));
        }
        for num_tokens in [1, 800, 900, 1000] {
            server.complete(tokens(num_tokens));
        }
        if max_queued_requests > 1 && max_queued_tokens < 2000 {
            server.complete(tokens(max_queued_tokens));
        }
        let refused = |body: &Value, numbers: [u32; 2]| {
            let error = server.post("/v1/completions", body).error(400);
            let message = error["message"].as_str().expect("text");
            assert!(numbers.iter().all(|number| message.contains(&number.to_string())), "{numbers:?}: {error}");
            assert_eq!(error["code"], "queue_too_small");
        };
        refused(&choices(max_queued_requests + 1), [max_queued_requests + 1, max_queued_requests]);
        if max_queued_requests > 2 {
            let three = json!({"prompt": vec![vec![20; 700]; 3], "max_tokens": 1});
            refused(&three, [2100, max_queued_tokens]);
        }
        assert_eq!(server.metric("fullbore_requests_waiting"), 0.0);
    }
}

#[test]
fn waiting_tokens_have_a_limit_too() {
    let (server, streams) = full_server(|config| (config.max_queued_requests, config.max_queued_tokens) = (64, 1024));
    let prompt: Vec<u32> = vec![20; 800];
    let taken = json!({"prompt": prompt, "max_tokens": 4, "ignore_eos": true}).to_string();
    let taken = server.send(post("/v1/completions", taken.as_bytes()));
    server.wait_for("the long one", |server| server.metric("fullbore_requests_waiting") == 3.0);
    let refused = server.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 4}));
    let error = refused.error(429);
    assert!(error["message"].as_str().expect("text").contains("tokens wait of the 1024 that may"), "{error}");
    assert!(retry_after(&refused) >= Duration::from_secs(1));
    assert_eq!(server.metric("fullbore_requests_waiting"), 3.0);
    server.gate.set(Pace::Free);
    for stream in streams.into_iter().chain([taken]) {
        read_reply(stream).ok();
    }
    server.complete(json!({"prompt": prompt, "max_tokens": 4}));
}

#[test]
fn what_would_miss_its_deadline_is_told_when_to_come_again() {
    let mut setup = Setup { sim: sleeping(), ..Setup::default() };
    setup.config = EngineConfig { max_num_seqs: 2, max_queue_ms: Some(500), ..setup.config };
    let server = setup.start();
    let body = json!({"prompt": "x", "max_tokens": 60, "ignore_eos": true});
    // 300 ms each; how long they run is learned from those that ended.
    for _ in 0..2 {
        server.complete(body.clone());
    }
    let send = |_| server.send(post("/v1/completions", body.to_string().as_bytes()));
    let replies: Vec<Reply> = (0..10).map(send).collect::<Vec<_>>().into_iter().map(read_reply).collect();
    // Both slots, and a wait of 150 ms for each in the queue: some fit, some do not.
    let (served, refused): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| reply.status == 200);
    assert!(served.len() >= 3 && refused.len() >= 2, "{} served, {} refused", served.len(), refused.len());
    for reply in &refused {
        let error = reply.error(429);
        assert_eq!(error["code"], "queue_too_slow");
        let message = error["message"].as_str().expect("text");
        assert!(message.contains("ms are predicted to the first token, and at most 500 are waited"), "{message}");
    }
    // Again a crowd; whoever is refused comes again when told, and is served.
    let crowd: Vec<TcpStream> = (0..10).map(send).collect();
    let replies: Vec<Reply> = crowd.into_iter().map(read_reply).collect();
    let refused = replies.iter().find(|reply| reply.status == 429).expect("a crowd again");
    std::thread::sleep(retry_after(refused));
    server.complete(body);
}

/// What no waiting would help is another answer.
#[test]
fn a_prompt_that_is_too_slow_even_alone_is_refused_for_good() {
    let cost = CostModel::line(1e6, 1e6, Prices::default());
    let folder = Folder::new("slow");
    let mut setup = Setup { sim: SimOptions { cost, ..sleeping() }, costs: Some(folder.0.clone()), ..Setup::default() };
    setup.config.max_queue_ms = Some(250);
    save_prices(&setup, cost);
    let server = setup.start();
    let error = server.post("/v1/completions", &json!({"prompt": vec![20; 600], "max_tokens": 4})).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("prompt_too_slow"), &json!("prompt")));
    assert!(error["message"].as_str().expect("text").contains("even alone"), "{error}");
    server.complete(json!({"prompt": vec![20; 60], "max_tokens": 4}));
}

/// Whatever a device has shown so far or is said to take: an idle server takes a request, and learns from it.
#[test]
fn an_idle_server_is_never_locked_by_what_it_thinks_of_its_device() {
    let cost = CostModel::line(1e6, 1e6, Prices::default());
    let short = json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true});
    // All that was seen is one step, of 250 ms.
    let mut setup = Setup { sim: SimOptions { cost, ..sleeping() }, ..Setup::default() };
    setup.config.max_queue_ms = Some(100);
    let server = setup.start();
    server.complete(json!({"prompt": vec![20; 250], "max_tokens": 1}));
    for _ in 0..4 {
        server.complete(short.clone());
    }
    // Nor are two at once refused for good: what comes while nothing waits is taken.
    server.complete(json!({"prompt": vec![20; 250], "max_tokens": 1, "n": 2}));
    server.complete(short.clone());

    // What was kept is wrong by far: a step of 10 s.
    let folder = Folder::new("wrong");
    let mut setup = Setup { sim: sleeping(), costs: Some(folder.0.clone()), ..Setup::default() };
    setup.config.max_queue_ms = Some(100);
    save_prices(&setup, CostModel::line(10e9, 0.0, Prices::default()));
    let server = setup.start();
    for _ in 0..4 {
        server.complete(short.clone());
    }
}
