//! `/v1/live`: frames that come once a second, whether there is work or not, and say what the metrics say.

use super::*;

/// The one engine of `/v1/live`, as soon as it has a frame for which `ready` holds.
fn engine_with(server: &Harness, ready: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let live = server.get("/v1/live").ok();
        let engine = &live["engines"][0];
        if engine["frames"].as_array().expect("frames").iter().any(&ready) {
            assert_eq!(live["object"], "live");
            assert_eq!(live["causes"].as_array().expect("names").len(), 15, "{live}");
            return engine.clone();
        }
        assert!(Instant::now() < deadline, "no such frame in {live}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn sum(engine: &Value, name: &str) -> f64 {
    engine["frames"].as_array().expect("frames").iter().map(|frame| frame[name].as_f64().expect("a number")).sum()
}

#[test]
fn frames_add_up_to_the_metrics() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    // Without a first reading what is generated now would be before all frames. All of the memory is free then.
    let engine = engine_with(&server, |_| true);
    assert_eq!(engine["frames"][0]["blocks"], json!({"used": 0, "cached": 0, "free": 1024}));
    for _ in 0..3 {
        server.complete(json!({"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": true}));
    }
    // An answer is out before the step that ended it is counted.
    server.wait_for("the last step", |server| server.metric("fullbore_tokens_generated_total") == 120.0);
    server.wait_for("the frame of the last step", |server| {
        sum(&server.get("/v1/live").ok()["engines"][0], "generated_tokens") == 120.0
    });
    let engine = engine_with(&server, |frame| frame["itl_ms"].is_object());
    assert_eq!(sum(&engine, "prompt_tokens"), server.metric("fullbore_tokens_prefilled_total"));
    assert_eq!((&engine["model"], &engine["max_num_seqs"]), (&json!("sim-model"), &json!(16)));
    server.wait_for("the verdict of /v1/limits", |server| {
        let (live, report) = (server.get("/v1/live").ok(), server.get("/v1/limits").ok());
        let engine = &live["engines"][0];
        (&engine["limit"], &engine["device"]) == (&report["limit"], &report["device"])
    });
    let last = engine["frames"].as_array().expect("frames").last().expect("frames").clone();
    let of_metrics = |state: &str| json!(server.metric(&format!("fullbore_kv_blocks{{state=\"{state}\"}}")) as u64);
    assert_eq!(last["blocks"], json!({"used": 0, "cached": of_metrics("cached"), "free": of_metrics("free")}));
    let charged = |frame: &Value| -> f64 {
        frame["device_s"].as_array().expect("seconds").iter().filter_map(Value::as_f64).sum()
    };
    let charged = engine["frames"].as_array().expect("frames").iter().map(charged).sum::<f64>();
    let wall_s = sum(&engine, "period_s");
    assert!(charged > 0.2 && charged < wall_s + 1.5, "{charged} of {wall_s} s");
    // Of two milliseconds and what the host adds.
    let between_tokens = |frame: &Value| frame["itl_ms"]["p50"].as_f64();
    let found = engine["frames"].as_array().expect("frames").iter().find_map(between_tokens);
    assert!(found.is_some_and(|ms| (1.5..1000.0).contains(&ms)), "{found:?}");
}

#[test]
fn a_client_asks_for_what_it_has_not_seen() {
    let server = Setup::default().start();
    let engine = engine_with(&server, |_| true);
    let newest = engine["frames"].as_array().expect("frames").last().expect("one")["at_ms"].as_u64().expect("a time");
    let after = server.get(&format!("/v1/live?after={newest}")).ok();
    let later = |frame: &Value| frame["at_ms"].as_u64().expect("a time") > newest;
    assert!(after["engines"][0]["frames"].as_array().expect("frames").iter().all(later), "{after}");
    assert_eq!(server.get("/v1/live?after=x").error(400)["code"], "invalid_query");
    let loading = Setup { loaded: false, ..Setup::default() }.start();
    loading.get("/v1/live").error(503);
}
