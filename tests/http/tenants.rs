//! Who shares what with whom, and who goes first: keys, prefixes, floods, priorities.

use super::*;

/// A completion for who has `key`.
fn with_key(server: &Harness, key: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    server.send(format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))
}

#[test]
fn a_key_is_a_tenant_and_shares_no_prefix() {
    let shares = vec![("alice", Share { weight: 1, max_num_seqs: 1 }), ("bob", Share { weight: 1, max_num_seqs: 2 })];
    let server = Setup { shares, pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    let body = json!({"prompt": vec![50; 100], "max_tokens": 2, "ignore_eos": true, "user": "bob"});
    let cached = |key| {
        let reply = read_reply(with_key(&server, key, &body)).ok();
        reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
    };
    assert_eq!([cached("alice"), cached("alice"), cached("carol"), cached("carol")], [0, 96, 0, 96]);
    // Who has a key is its owner, whatever `user` says.
    for (key, most) in [(Some("alice"), 1.0), (None, 2.0), (Some("carol"), 4.0)] {
        let body = json!({"prompt": "y", "max_tokens": 900, "ignore_eos": true, "user": "bob"});
        let send = |_| match key {
            Some(key) => with_key(&server, key, &body),
            None => server.send(post("/v1/completions", body.to_string().as_bytes())),
        };
        let counts =
            |server: &Harness| ["running", "waiting"].map(|s| server.metric(&format!("fullbore_requests_{s}")));
        // A client has its answer before the engine has told of the step.
        server.wait_for("the last one to be gone", |server| counts(server) == [0.0, 0.0]);
        let streams: Vec<TcpStream> = (0..4).map(send).collect();
        server.wait_for("as many as may run", |server| counts(server) == [most, 4.0 - most]);
        for _ in 0..20 {
            assert_eq!(counts(&server), [most, 4.0 - most], "{key:?}");
        }
        drop(streams);
        server.wait_for("them to leave", |server| counts(server) == [0.0, 0.0]);
    }
}

/// A tenant that always has three requests under way, less than half of what runs at once, is served beside a flood as
/// it is without: exact bounds are held in virtual time by `overload`; here it is the whole way over sockets. Time is
/// counted in steps of the device, so that it does not matter how busy this machine is with other things; and they are
/// so long that it takes a hiccup of some 100 ms to be seen, which may happen, but not again and again.
#[test]
fn a_flood_over_http_leaves_another_tenants_p99_as_it_was() {
    let cost = CostModel::line(30e6, 2e4, Prices::default());
    let folder = Folder::new("flood");
    let mut setup = Setup { sim: SimOptions { cost, ..sleeping() }, costs: Some(folder.0.clone()), ..Setup::default() };
    // Hardly longer than without prompts.
    let latency = LatencyTarget::Stretch(105);
    setup.config = EngineConfig { max_num_seqs: 8, max_queued_requests: 96, latency, ..setup.config };
    save_prices(&setup, cost);
    let model = setup.plan().load().expect("the simulator loads");
    let engine = model.engine.clone();
    let server = Harness::serving(vec![model]);
    let quiet = json!({"prompt": "a quiet one", "max_tokens": 24, "ignore_eos": true, "user": "quiet"});
    let one = || {
        let begun = engine.stats().num_steps;
        server.complete(quiet.clone());
        engine.stats().num_steps - begun
    };
    // Of 30 the worst is the 99th percentile.
    let worst = || {
        let client = || (0..10).map(|_| one()).max().expect("ten");
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..3).map(|_| scope.spawn(client)).collect();
            clients.into_iter().map(|client| client.join().expect("it is served")).max().expect("three")
        })
    };
    let alone = worst();
    let loud = json!({"prompt": "a loud one ".repeat(20), "max_tokens": 600, "ignore_eos": true, "user": "loud"});
    let flood: Vec<TcpStream> =
        (0..80).map(|_| server.send(post("/v1/completions", loud.to_string().as_bytes()))).collect();
    server.wait_for("the flood", |server| server.metric("fullbore_requests_running") == 8.0);
    // Who has just begun is not sent back before it has advanced by a block of 16.
    let begun = engine.stats().num_steps;
    server.wait_for("20 steps of it", |_| engine.stats().num_steps >= begun + 20);
    let is_as_alone = || {
        let flooded = worst();
        println!("the worst of 30 took {alone} steps alone and {flooded} beside a flood");
        5 * flooded <= 6 * alone
    };
    assert!((0..3).any(|_| is_as_alone()), "over 1.2 times as many steps");
    assert!(server.metric("fullbore_requests_waiting") > 8.0, "the flood was over too soon");
    drop(flood);
}

/// As in vLLM: whoever has the lower value, and among equals whoever came first.
#[test]
fn a_lower_priority_is_served_first() {
    let mut setup = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() };
    setup.config.max_num_seqs = 1;
    let server = setup.start();
    let ask = |priority: i64| {
        let body = json!({"prompt": "x", "max_tokens": 150, "ignore_eos": true, "priority": priority});
        server.send(post("/v1/completions", body.to_string().as_bytes()))
    };
    let first = ask(0);
    server.wait_for("the first to run", |server| server.metric("fullbore_requests_running") == 1.0);
    server.gate.set(Pace::Stalled);
    let mut waiting = Vec::new();
    for (num_before, priority) in [5, 0, -5, 0].into_iter().enumerate() {
        waiting.push((priority, num_before, ask(priority)));
        let comes = |server: &Harness| server.metric("fullbore_requests_waiting") == (num_before + 1) as f64;
        server.wait_for("it to wait", comes);
    }
    waiting.sort_by_key(|&(priority, num_before, _)| (priority, num_before));
    server.gate.set(Pace::Each(Duration::from_millis(2)));
    read_reply(first).ok();
    let mut later = waiting.into_iter().map(|(_, _, stream)| stream).collect::<Vec<_>>().into_iter();
    while let Some(next) = later.next() {
        read_reply(next).ok();
        // Each takes 300 ms: nothing was said to any of the others yet.
        for stream in later.as_slice() {
            stream.set_nonblocking(true).expect("an open connection");
            let silent = stream.peek(&mut [0]).err().map(|error| error.kind());
            assert_eq!(silent, Some(ErrorKind::WouldBlock));
            stream.set_nonblocking(false).expect("an open connection");
        }
    }
}
