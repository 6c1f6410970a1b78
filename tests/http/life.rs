//! A server's life: what it measures at its start, health, devices that are lost, shutdown.

use super::*;

#[test]
fn a_target_below_one_step_is_refused_at_start() {
    let plan = |target_ms| {
        let mut config = Setup::default().config;
        config.latency = LatencyTarget::Milliseconds(target_ms);
        Setup { config, pace: Pace::Each(Duration::from_millis(20)), ..Setup::default() }.plan()
    };
    let sentence = plan(5).load().err().expect("a step takes 20 ms at least").to_string();
    let step_ms = sentence.split("alone takes ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
    assert!(sentence.starts_with("the target between tokens is 5 ms") && step_ms >= Some(20.0), "{sentence}");
    let loaded = plan(5000).load().expect("a step takes less");
    // Nothing is left of what was measured.
    let blocks = loaded.engine.stats().blocks;
    assert_eq!(loaded.engine.stats(), EngineStats { blocks, ..EngineStats::default() });
    assert_eq!((blocks.cached, blocks.referenced), (0, 0));
    loaded.end();
}

#[test]
fn prices_of_steps_outlive_the_server() {
    let folder = Folder::new("prices");
    let server = || {
        let setup = Setup { costs: Some(folder.0.clone()), ..Setup::default() };
        // In virtual time, so that every step takes what it should.
        let backend = Box::new(SimBackend::new(SimOptions { sleeps: false, ..sleeping() }));
        Plan { backend, ..setup.plan() }.load().expect("the simulator loads")
    };
    let known = |model: &ServedModel| model.engine.engines()[0].cost().is_known();
    let ask = |model: &ServedModel, num_tokens| {
        let request = Request { prompt: vec![TokenId(9); 20], max_tokens: num_tokens, ..Request::default() };
        let (sender, receiver) = std::sync::mpsc::channel();
        model.engine.submit_one(request, Box::new(Until(sender))).expect("room");
        receiver.recv_timeout(Duration::from_secs(20)).expect("an end");
    };
    let first = server();
    assert!(!known(&first));
    // Too few steps to keep.
    ask(&first, 10);
    first.end();
    assert!(!folder.0.exists());
    let second = server();
    ask(&second, 150);
    second.end();
    let third = server();
    assert!(known(&third), "prices of the second");
    let step_ns = third.engine.engines()[0].cost().predict_ns(&StepShape::decode(1, 20)) as f64;
    assert!((4.5e6..5.5e6).contains(&step_ns), "{step_ns} ns, of a device that takes 5 ms");
    third.end();
}

/// Tells of a request's end.
struct Until(std::sync::mpsc::Sender<()>);

impl Sink for Until {
    fn event(&mut self, event: Event) -> Flow {
        if matches!(event, Event::Finished { .. }) {
            let _ = self.0.send(());
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

#[test]
fn health_says_why_it_is_not_ready() {
    let limits = Limits { max_stall: Duration::from_millis(100), ..Limits::default() };
    let server = Setup { limits, loaded: false, ..Setup::default() }.start();
    let not_ready = |word: &str| {
        let error = server.get("/health/ready").error(503);
        assert!(error["message"].as_str().expect("text").contains(word), "{error}");
        assert_eq!(server.get("/health/live").status, 200);
    };
    not_ready("loaded");
    let loading = server.post("/v1/completions", &json!({"prompt": "x"}));
    assert_eq!(retry_after(&loading), Duration::from_secs(1));
    loading.error(503);
    server.get("/v1/models").error(503);
    assert_eq!(server.get("/").status, 200);
    assert_eq!(server.get("/metrics").status, 200);

    server.load(&Setup::default());
    assert_eq!(server.get("/health/ready").ok()["status"], "ok");

    server.gate.set(Pace::Stalled);
    let body = json!({"prompt": "x", "max_tokens": 3, "ignore_eos": true}).to_string();
    let waiting = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("the stall", |server| server.get("/health/ready").status == 503);
    not_ready("stalled");
    assert!(server.metric("fullbore_stalled_seconds") > 0.0);
    server.gate.set(Pace::Free);
    assert_eq!(read_reply(waiting).ok()["usage"]["completion_tokens"], 3);
    assert_eq!(server.get("/health/ready").status, 200);
}

#[test]
fn a_lost_device_is_told_to_everyone() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(1)), ..Setup::default() }.start();
    let body =
        |stream: bool| json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": stream}).to_string();
    let mut streamed = server.send(post("/v1/completions", body(true).as_bytes()));
    let whole = server.send(post("/v1/completions", body(false).as_bytes()));
    let mut beginning = vec![0; 400];
    streamed.read_exact(&mut beginning).expect("a beginning");
    server.wait_for("both to run", |server| server.metric("fullbore_requests_running") == 2.0);
    server.gate.set(Pace::Lost);
    streamed.read_to_end(&mut beginning).expect("an orderly end");
    let events = events(&parse_reply(&beginning).body, false);
    let (last, before) = events.split_last().expect("events");
    assert!(last["error"]["message"].as_str().expect("text").contains("unplugged"), "{last}");
    assert_eq!(last["error"]["type"], "server_error");
    assert!(before.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
    let error = read_reply(whole).error(503);
    assert!(error["message"].as_str().expect("text").contains("unplugged"), "{error}");
    // Until it is given up, it may come back.
    let gives_up = |server: &Harness| server.get("/health/ready").text().contains("the engine has stopped");
    server.wait_for("the last attempt", gives_up);
    // The command ends with it, as an error, so that whoever watches the process starts it again.
    let (model, reason) = server.runtime.block_on(server.server.as_ref().expect("running").engine_stopped());
    assert_eq!(model, "sim-model");
    assert!(reason.contains("6 attempts to make it anew did not"), "{reason}");
    let after = server.post("/v1/completions", &json!({"prompt": "x"}));
    // No waiting helps.
    assert!(!after.head.contains("retry-after"), "{}", after.head);
    let after = after.error(503);
    let sentence = after["message"].as_str().expect("text");
    let parts = ["unplugged; 6 attempts to make it anew did not", "still unplugged", "restart the server"];
    assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    assert!(server.get("/health/ready").error(503)["message"].as_str().expect("text").contains("unplugged"));
    assert_eq!(server.get("/health/live").status, 200);
    server.wait_for("the blocks", |server| server.metric("fullbore_kv_blocks{state=\"used\"}") == 0.0);
}

/// Ends by itself once the engine is told to, also between two attempts.
#[test]
fn a_server_whose_device_is_lost_can_be_ended() {
    let mut server = Setup { pace: Pace::Lost, ..Setup::default() }.start();
    server.post("/v1/completions", &json!({"prompt": "x"})).error(503);
    let running = server.server.take().expect("running");
    let begin = Instant::now();
    server.runtime.block_on(running.shutdown(Duration::from_secs(1)));
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[test]
fn no_panic_reaches_a_client() {
    let server = Setup { pace: Pace::Panic, ..Setup::default() }.start();
    let reply = server.post("/v1/completions", &json!({"prompt": "x"}));
    let error = reply.error(503);
    assert!(!error["message"].as_str().expect("text").contains("planted"), "{error}");
    server.post("/v1/completions", &json!({"prompt": "x"})).error(503);
    let ready = server.get("/health/ready").error(503);
    assert!(ready["message"].as_str().expect("text").contains("bug of its own"), "{ready}");
    assert_eq!(server.get("/health/live").status, 200);
}

#[test]
fn shutdown_lets_streams_end() {
    let mut server = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    let body = json!({"prompt": "x", "max_tokens": 60, "ignore_eos": true, "stream": true}).to_string();
    let stream = server.send(post("/v1/completions", body.as_bytes()));
    let idle = server.send("GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n");
    server.wait_for("the stream", |server| server.metric("fullbore_requests_running") == 1.0);
    let running = server.server.take().expect("running");
    let begin = Instant::now();
    server.runtime.block_on(running.shutdown(Duration::from_secs(20)));
    assert!(begin.elapsed() < Duration::from_secs(15), "an idle connection held it: {:?}", begin.elapsed());
    assert!(events(&read_reply(stream).body, true).len() > 1);
    drop(idle);
    assert!(TcpStream::connect(server.address).is_err(), "it still listens");
}

#[test]
fn shutdown_ends_what_takes_too_long() {
    let mut server = Setup { pace: Pace::Each(Duration::from_millis(10)), ..Setup::default() }.start();
    let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": true}).to_string();
    let stream = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("the stream", |server| server.metric("fullbore_requests_running") == 1.0);
    let running = server.server.take().expect("running");
    server.runtime.block_on(running.shutdown(Duration::from_millis(100)));
    let events = events(&read_reply(stream).body, false);
    let last = events.last().expect("events");
    assert!(last["error"]["message"].as_str().expect("text").contains("shutting down"), "{last}");
}
