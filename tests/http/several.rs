//! Several models in one server: each request is the model's that it names, and one model's trouble is its own. On two
//! simulators, each behind a gate of its own, and on two tiny models on the cpu.

use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use fullbore::args::{Args, Command, ServedArgs};
use fullbore_engine::request::Pooling;

use super::*;
use crate::http::access::{chat_as, keys};

const NAMES: [&str; 2] = ["a", "b"];

/// Two simulators, called `a` and `b`, that differ in their context.
struct Two {
    server: Harness,
    gates: [Gate; 2],
}

impl Drop for Two {
    fn drop(&mut self) {
        self.gates.iter().for_each(|gate| gate.set(Pace::Free));
    }
}

fn two(setup: Setup) -> Two {
    let gates = NAMES.map(|_| Gate::new(setup.pace));
    let setup = Setup { loaded: false, bundle: |bundle| bundle.pooling = Some(Pooling::Last), ..setup };
    let load = |index: usize| {
        let mut plan = setup.plan_behind(gates[index].clone());
        plan.name = NAMES[index].to_owned();
        plan.config.max_model_len >>= index;
        plan.load().expect("the simulator loads")
    };
    let models = vec![load(0), load(1)];
    let server = setup.start();
    server.server.as_ref().expect("running").set_models(models);
    Two { server, gates }
}

/// A body that the endpoint answers.
fn body_for(path: &str) -> Value {
    let messages = json!([{"role": "user", "content": "x"}]);
    match path {
        "/v1/completions" => json!({"prompt": "x", "max_tokens": 2}),
        "/v1/responses" => json!({"input": "x", "max_output_tokens": 2}),
        "/v1/embeddings" => json!({"input": "x"}),
        "/tokenize" => json!({"prompt": "x"}),
        "/detokenize" => json!({"tokens": [5]}),
        _ => json!({"messages": messages, "max_tokens": 2}),
    }
}

const GENERATE: [&str; 5] =
    ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"];
const TEXTS: [&str; 4] = ["/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens"];

fn finished(server: &Harness, model: &str) -> f64 {
    let of = |reason| {
        server.metric(&format!("fullbore_requests_finished_total{{model_name=\"{model}\",reason=\"{reason}\"}}"))
    };
    of("stop") + of("length")
}

#[test]
fn a_request_is_the_models_that_it_names() {
    let Two { server, .. } = &two(Setup::default());
    for path in GENERATE {
        for (asked, model) in [(Some("a"), "a"), (Some("b"), "b"), (None, "a")] {
            let before = NAMES.map(|name| finished(server, name));
            let mut body = body_for(path);
            body["model"] = json!(asked);
            assert_eq!(server.post(path, &body).ok()["model"], model, "{path}, {asked:?}");
            let expected = NAMES.map(|name| before[usize::from(name == "b")] + f64::from(u8::from(name == model)));
            server.wait_for("the count", |server| NAMES.map(|name| finished(server, name)) == expected);
        }
        let mut body = body_for(path);
        (body["model"], body["stream"]) = (json!("b"), json!(true));
        if path != "/v1/embeddings" {
            let text = server.post(path, &body).text();
            assert!(text.contains("\"model\":\"b\"") && !text.contains("\"model\":\"a\""), "{path}: {text}");
        }
    }
    let context =
        |asked: Value| server.post("/tokenize", &json!({"model": asked, "prompt": "x"})).ok()["max_model_len"].clone();
    assert_eq!([json!("a"), json!("b"), Value::Null].map(context), [1024, 512, 1024].map(|length| json!(length)));
    for path in TEXTS {
        let mut body = body_for(path);
        body["model"] = json!("b");
        server.post(path, &body).ok();
    }
    for path in GENERATE.into_iter().chain(TEXTS) {
        let mut body = body_for(path);
        body["model"] = json!("gpt-9");
        let reply = server.post(path, &body);
        assert!(reply.text().contains("gpt-9 does not exist here; this server has a, b"), "{path}: {reply:?}");
        if path.starts_with("/v1/messages") {
            assert_eq!((reply.status, &reply.json()["error"]["type"]), (404, &json!("not_found_error")));
        } else {
            let error = reply.error(404);
            assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")), "{path}");
        }
        body["model"] = json!(5);
        assert_eq!(server.post(path, &body).status, 400, "{path}");
    }
    // What b's context cannot hold is refused with b's own limit.
    let long = json!({"model": "b", "prompt": "x ".repeat(200)});
    assert!(server.post("/v1/completions", &long).error(400)["message"].as_str().expect("text").contains("512"));
    server.post("/v1/completions", &json!({"model": "a", "prompt": "x ".repeat(200), "max_tokens": 1})).ok();
}

#[test]
fn models_are_listed_and_watched_one_by_one() {
    let Two { server, .. } = &two(Setup::default());
    let list = server.get("/v1/models").ok();
    let cards = list["data"].as_array().expect("cards");
    let of = |field: &str| cards.iter().map(|card| card[field].clone()).collect::<Vec<_>>();
    assert_eq!((of("id"), of("max_model_len")), (vec![json!("a"), json!("b")], vec![json!(1024), json!(512)]));
    assert_eq!((of("dtype"), of("kv_type")), (vec![json!("f32"); 2], vec![json!("f16"); 2]));
    assert_eq!((of("device_id"), of("max_num_seqs")), (vec![json!("sim"); 2], vec![json!(16); 2]));
    assert_eq!(server.get("/health/ready").ok(), json!({"status": "ok", "model": "a", "models": ["a", "b"]}));
    server.post("/v1/completions", &json!({"model": "b", "prompt": "x", "max_tokens": 9, "ignore_eos": true})).ok();
    let limits = server.get("/v1/limits").ok();
    let models =
        |list: &Value| list.as_array().expect("a list").iter().map(|one| one["model"].clone()).collect::<Vec<_>>();
    assert_eq!((&limits["object"], models(&limits["data"])), (&json!("list"), vec![json!("a"), json!("b")]));
    let of_b = server.get("/v1/limits?model=b").ok();
    assert_eq!((&of_b["object"], &of_b["model"]), (&json!("limits"), &json!("b")));
    assert!(
        of_b["total"]["num_tokens"].as_u64() >= Some(9) && limits["data"][0]["total"]["num_tokens"] == 0,
        "{limits}"
    );
    let live = server.get("/v1/live").ok();
    assert_eq!(models(&live["engines"]), ["a", "b"]);
    let of_b = server.get("/v1/live?model=b&after=0").ok();
    assert_eq!(models(&of_b["engines"]), ["b"]);
    for path in ["/v1/live?model=gpt-9", "/v1/limits?model=gpt-9"] {
        assert_eq!(server.get(path).error(404)["code"], "model_not_found");
    }
}

/// One exposition: each family is told of once, and each of its samples says whose it is.
#[test]
fn metrics_say_whose_they_are() {
    let Two { server, .. } = &two(Setup::default());
    for (model, count) in [("a", 1), ("b", 3)] {
        for _ in 0..count {
            let body = json!({"model": model, "prompt": "x", "max_tokens": 10, "ignore_eos": true});
            server.post("/v1/completions", &body).ok();
        }
    }
    for (model, count) in [("a", 10.0), ("b", 30.0)] {
        for name in ["fullbore_tokens_generated_total", "vllm:generation_tokens_total"] {
            let name = format!("{name}{{model_name=\"{model}\"}}");
            server.wait_for("the tokens", |server| server.metric(&name) == count);
        }
        let name = format!("vllm:e2e_request_latency_seconds_count{{model_name=\"{model}\"}}");
        assert_eq!(server.metric(&name), count / 10.0);
    }
    let text = server.get("/metrics").text();
    for kind in ["# HELP ", "# TYPE "] {
        let told = text.lines().filter_map(|line| line.strip_prefix(kind)?.split(' ').next());
        let mut told: Vec<&str> = told.collect();
        let num_told = told.len();
        told.sort_unstable();
        told.dedup();
        assert_eq!(told.len(), num_told, "{kind}");
    }
    let of_server = [
        "fullbore_http_responses_total",
        "fullbore_connections_refused_total",
        "fullbore_panics_total",
        "fullbore_body_bytes",
        "fullbore_log_lines_dropped_total",
        "http_request",
    ];
    let mut counts = [0; 2];
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let its = NAMES.map(|name| sample.contains(&format!("model_name=\"{name}\"")));
        assert_eq!(its.contains(&true), !of_server.iter().any(|name| sample.starts_with(name)), "{sample}");
        counts.iter_mut().zip(its).for_each(|(count, its)| *count += u32::from(its));
    }
    assert!(counts[0] > 100 && counts[0] == counts[1], "{counts:?}");
}

/// `a` is flooded while its device stands still; `b` answers as if it were alone, and what `a` took in is answered.
#[test]
fn a_flood_of_one_model_is_nothing_to_the_other() {
    let config = EngineConfig { max_num_seqs: 4, max_queued_requests: 8, ..Setup::default().config };
    let Two { server, gates } = &two(Setup { config, ..Setup::default() });
    let ask =
        |model: &str| json!({"model": model, "prompt": "x", "max_tokens": 5, "ignore_eos": true, "temperature": 0});
    let expected = server.post("/v1/completions", &ask("b")).ok()["choices"].clone();
    gates[0].set(Pace::Stalled);
    let body = ask("a").to_string();
    let send = || server.send(post("/v1/completions", body.as_bytes()));
    let mut flood: Vec<TcpStream> = (0..4).map(|_| send()).collect();
    server.wait_for("a to be busy", |server| server.metric("fullbore_stalled_seconds{model_name=\"a\"}") > 0.0);
    flood.extend((0..30).map(|_| send()));
    // Seven eighths of the places are one tenant's.
    server.wait_for("a to be full", |server| server.metric("fullbore_requests_waiting{model_name=\"a\"}") == 7.0);
    server.post("/v1/completions", &ask("a")).error(429);
    for _ in 0..20 {
        assert_eq!(server.post("/v1/completions", &ask("b")).ok()["choices"], expected);
    }
    assert_eq!(server.metric("fullbore_requests_waiting{model_name=\"b\"}"), 0.0);
    gates[0].set(Pace::Free);
    let statuses: Vec<u16> = flood.into_iter().map(|stream| read_reply(stream).status).collect();
    let num_answered = statuses.iter().filter(|status| **status == 200).count();
    assert!(num_answered >= 4 && statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    server.wait_for("all of them", |server| finished(server, "a") == num_answered as f64);
}

#[test]
fn the_trouble_of_one_model_is_told_for_it() {
    let limits = Limits { max_stall: Duration::from_millis(100), ..Limits::default() };
    let Two { server, gates } = &two(Setup { limits, ..Setup::default() });
    let ask = |model: &str| json!({"model": model, "prompt": "x", "max_tokens": 5, "ignore_eos": true});
    let not_ready = |word: &str| {
        let error = server.get("/health/ready").error(503);
        let sentence = error["message"].as_str().expect("text");
        assert!(sentence.starts_with("b: ") && sentence.contains(word), "{sentence}");
    };
    gates[1].set(Pace::Stalled);
    let stalled = server.send(post("/v1/completions", ask("b").to_string().as_bytes()));
    server.wait_for("the stall", |server| server.get("/health/ready").status == 503);
    not_ready("stalled");
    server.post("/v1/completions", &ask("a")).ok();
    gates[1].set(Pace::Lost);
    let error = read_reply(stalled).error(503);
    assert!(error["message"].as_str().expect("text").contains("unplugged"), "{error}");
    let begun = |server: &Harness| server.get("/health/ready").text().contains("unplugged");
    server.wait_for("the loss", begun);
    not_ready("unplugged");
    // Which models there are, and where their time goes, is told all the same.
    assert_eq!(server.get("/v1/models").ok()["data"].as_array().expect("cards").len(), 2);
    server.get("/v1/limits?model=b").ok();
    let reply =
        server.post("/v1/chat/completions", &json!({"model": "b", "messages": [{"role": "user", "content": "x"}]}));
    assert!(reply.header("retry-after").is_some() && reply.text().contains("unplugged"), "{reply:?}");
    server.post("/v1/completions", &ask("a")).ok();
    // It comes back by itself.
    gates[1].set(Pace::Free);
    server.wait_for("the device", |server| server.get("/health/ready").status == 200);
    server.post("/v1/completions", &ask("b")).ok();
    // Or it does not: the command ends with the name of the model.
    gates[1].set(Pace::Lost);
    server.post("/v1/completions", &ask("b")).error(503);
    let (model, reason) = server.runtime.block_on(server.server.as_ref().expect("running").engine_stopped());
    assert!(model == "b" && reason.contains("6 attempts"), "{model}: {reason}");
    not_ready("the engine has stopped");
    server.post("/v1/completions", &ask("a")).ok();
}

#[test]
fn a_keys_rate_is_of_all_models_together() {
    let access = Access::new(IpAddr::V4(Ipv4Addr::LOCALHOST), keys("key-of-alice alice rpm=2"), &["*".to_owned()], &[]);
    let Two { server, .. } = &two(Setup { access, ..Setup::default() });
    let chat = |model: &str| {
        let messages = json!([{"role": "user", "content": "x"}]);
        let body = json!({"model": model, "messages": messages, "max_tokens": 2});
        read_reply(server.send(chat_as("key-of-alice", &body)))
    };
    for (model, left) in [("a", "1"), ("b", "0")] {
        assert_eq!(chat(model).header("x-ratelimit-remaining-requests"), Some(left));
    }
    assert_eq!([chat("a"), chat("b")].map(|reply| reply.error(429)["code"].clone()), ["rate_limit_exceeded"; 2]);
}

#[test]
fn both_models_are_drained() {
    let setup = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() };
    let mut two = two(setup);
    let ask = |model: &str, max_tokens: u32| {
        let body = json!({"model": model, "prompt": "x", "max_tokens": max_tokens, "ignore_eos": true, "stream": true});
        post("/v1/completions", body.to_string().as_bytes())
    };
    // The second takes much longer than the first.
    let streams = [two.server.send(ask("a", 20)), two.server.send(ask("b", 120))];
    for model in NAMES {
        let running = format!("fullbore_requests_running{{model_name=\"{model}\"}}");
        let begun = |server: &Harness| server.metric(&running) == 1.0 || finished(server, model) == 1.0;
        two.server.wait_for("the stream", begun);
    }
    let running = two.server.server.take().expect("running");
    let drained = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            two.server.runtime.block_on(running.drain(Duration::from_secs(20)));
            drained.store(true, Ordering::SeqCst);
        });
        two.server.wait_for("the drain", |server| server.get("/health/ready").status == 503);
        for model in NAMES {
            let refused = read_reply(two.server.send(ask(model, 1)));
            assert!(refused.error(503)["message"].as_str().expect("text").contains("shutting down"));
        }
        for stream in streams {
            let events = events(&read_reply(stream).body, true);
            let last = events.last().expect("events");
            assert_eq!(last["choices"][0]["finish_reason"], "length", "{last}");
        }
    });
    assert!(drained.load(Ordering::SeqCst));
    two.server.runtime.block_on(running.shutdown(Duration::from_secs(5)));
    assert!(TcpStream::connect(two.server.address).is_err(), "it still listens");
}

/// As the command line reads them.
fn tiny_models(words: &[&str]) -> Vec<ServedArgs> {
    let folder = |name: &str| format!("{}/tests/golden/tiny/{name}", env!("CARGO_MANIFEST_DIR"));
    let models =
        [format!("--model=small={}", folder("llama")), format!("--model=other={},max-num-seqs=2", folder("qwen3"))];
    let common = ["--device=cpu", "--kv-memory=4MiB", "--max-model-len=64", "--max-num-batched-tokens=64"];
    let all = ["fullbore", "serve", "--max-num-seqs=4", "--no-saved-costs"].into_iter().chain(common);
    let all = all.chain(models.iter().map(String::as_str)).chain(words.iter().copied());
    let Command::Serve(args) = Args::try_parse_from(all).expect("words of serve").command else {
        panic!("serve is serve")
    };
    args.models.0
}

pub(super) fn served(models: &[ServedArgs]) -> Harness {
    let plans = start::plan_all(models).unwrap_or_else(|error| panic!("{error}"));
    let load = |plans| start::load(plans).unwrap_or_else(|error| panic!("{error}"));
    Harness::serving(start::by_model(plans).into_iter().map(load).collect())
}

pub(super) fn greedy_of(server: &Harness, model: &str, prompt: &[u32]) -> Vec<u64> {
    let body = json!({"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true});
    ids(&server.complete(body)["choices"][0]["token_ids"])
}

/// What each says beside the other is what it says as the one model of a server.
#[test]
fn two_models_on_the_cpu_answer_as_each_alone() {
    let models = tiny_models(&[]);
    let prompts: Vec<Vec<u32>> =
        (0..6).map(|index| (0..8 + index).map(|i| 3 + (index * 7 + i * 5) % 100).collect()).collect();
    let alone = |index: usize| {
        let server = served(&models[index..=index]);
        let name = models[index].name.as_deref().expect("named");
        prompts.iter().map(|prompt| greedy_of(&server, name, prompt)).collect::<Vec<_>>()
    };
    let alone = [alone(0), alone(1)];
    assert_ne!(alone[0], alone[1], "two models that cannot be told apart");
    let server = &served(&models);
    std::thread::scope(|scope| {
        for (model, expected) in models.iter().zip(&alone) {
            let name = model.name.as_deref().expect("named");
            for (prompt, expected) in prompts.iter().zip(expected) {
                scope.spawn(move || assert_eq!(&greedy_of(server, name, prompt), expected, "{name}"));
            }
        }
    });
    let cards = server.get("/v1/models").ok()["data"].clone();
    assert_eq!((&cards[0]["max_num_seqs"], &cards[1]["max_num_seqs"]), (&json!(4), &json!(2)));
    assert_eq!((&cards[0]["device_id"], &cards[1]["max_model_len"]), (&json!("cpu"), &json!(64)));
    // On one device, each is the other's neighbour: time beyond its own prices is charged to that and to nothing else.
    for name in ["small", "other"] {
        let report = server.get(&format!("/v1/limits?model={name}")).ok();
        let seconds = report["total"]["seconds"].as_object().expect("causes");
        let sum: f64 = seconds.values().filter_map(Value::as_f64).sum();
        assert!((sum - report["total"]["wall_s"].as_f64().expect("seconds")).abs() < 1e-6, "{report}");
        assert!(seconds.contains_key("neighbour"), "{report}");
    }
}
