//! Embeddings over HTTP: inputs of every kind, both encodings, fewer dimensions, company, and who does not embed.

use fullbore_engine::request::Pooling;

use super::*;

const PATH: &str = "/v1/embeddings";

fn embedder(pooling: fn(&mut Bundle)) -> Harness {
    Setup { bundle: pooling, ..Setup::default() }.start()
}

fn vectors(server: &Harness, body: &Value) -> Vec<Vec<f64>> {
    let reply = server.post(PATH, body).ok();
    assert_eq!((&reply["object"], &reply["model"]), (&json!("list"), &json!("sim-model")));
    let data = reply["data"].as_array().expect("a list");
    let vector = |(index, entry): (usize, &Value)| {
        assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
        let numbers = entry["embedding"].as_array().expect("numbers").iter();
        numbers.map(|number| number.as_f64().expect("a number")).collect()
    };
    data.iter().enumerate().map(vector).collect()
}

fn length(vector: &[f64]) -> f64 {
    vector.iter().map(|value| value * value).sum::<f64>().sqrt()
}

#[test]
fn inputs_of_every_kind_give_vectors_of_length_1() {
    for pooling in [(|bundle| bundle.pooling = Some(Pooling::Last)) as fn(&mut Bundle), |bundle| {
        bundle.pooling = Some(Pooling::Mean)
    }] {
        let server = embedder(pooling);
        let dim = Bundle::simulated().config.dim as usize;
        let one = vectors(&server, &json!({"input": "Alpha"}));
        assert_eq!((one.len(), one[0].len()), (1, dim));
        let both = vectors(&server, &json!({"input": ["Alpha", "Beta"], "user": "me", "priority": 3}));
        assert_eq!(both[0], one[0]);
        assert_ne!(both[0], both[1]);
        assert!(both.iter().all(|vector| (length(vector) - 1.0).abs() < 1e-5), "{both:?}");
        let tokens = |text: &str| server.post("/tokenize", &json!({"prompt": text})).ok()["tokens"].clone();
        let ids = json!({"input": [tokens("Alpha"), tokens("Beta")]});
        assert_eq!(vectors(&server, &ids), both);
        assert_eq!(vectors(&server, &json!({"input": tokens("Beta")}))[0], both[1]);
        let usage = server.post(PATH, &ids).ok()["usage"].clone();
        let count = tokens("Alpha").as_array().expect("ids").len() + tokens("Beta").as_array().expect("ids").len();
        assert_eq!(usage, json!({"prompt_tokens": count, "total_tokens": count}));
        let short = vectors(&server, &json!({"input": "Alpha", "dimensions": 1}));
        assert_eq!(short[0].len(), 1);
        assert!((short[0][0].abs() - 1.0).abs() < 1e-6 && short[0][0].signum() == one[0][0].signum());
        let text = server.post(PATH, &json!({"input": "Alpha", "encoding_format": "base64"})).ok();
        let text = text["data"][0]["embedding"].as_str().expect("text").to_owned();
        assert_eq!(text.len(), (dim * 4).div_ceil(3) * 4);
    }
}

/// Also when its prompt was begun, gave way to an answer for want of memory, and was begun anew.
#[test]
fn a_vector_is_the_same_in_company() {
    let bundle = |bundle: &mut Bundle| bundle.pooling = Some(Pooling::Mean);
    let config =
        EngineConfig { max_model_len: 256, max_num_batched_tokens: 24, num_blocks: 24, ..Setup::default().config };
    let server = Setup { bundle, config, ..Setup::default() }.start();
    let ask = |index: usize| json!({"input": format!("{index}: {}", "tell me more. ".repeat(10))});
    let alone: Vec<_> = (0..12).map(|index| vectors(&server, &ask(index))).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let server = &server;
        let noise: Vec<_> =
            (0..3).map(|nth| scope.spawn(move || greedy(server, format!("noise {nth}"), 200))).collect();
        server.wait_for("answers to grow", |server| server.metric("fullbore_tokens_generated_total") > 60.0);
        let asked: Vec<_> = (0..12).map(|index| scope.spawn(move || vectors(server, &ask(index)))).collect();
        let vectors = asked.into_iter().map(|thread| thread.join().expect("vectors")).collect();
        noise.into_iter().for_each(|thread| drop(thread.join().expect("an answer")));
        vectors
    });
    assert_eq!(alone, together);
    // A client has its answer before the engine has told of the step.
    server.wait_for("all to end", |server| server.metric("fullbore_requests_running") == 0.0);
}

/// As many as LangChain sends at once, of which only so many may wait.
#[test]
fn a_batch_larger_than_the_queue_is_taken_in_turn() {
    let bundle = |bundle: &mut Bundle| bundle.pooling = Some(Pooling::Last);
    let server = Setup { bundle, ..Setup::default() }.start();
    let inputs: Vec<String> = (0..1000).map(|index| format!("{index}")).collect();
    let all = vectors(&server, &json!({"input": inputs}));
    assert_eq!(all.len(), 1000);
    for index in [0, 63, 64, 257, 999] {
        assert_eq!(vectors(&server, &json!({"input": inputs[index]}))[0], all[index], "{index}");
    }
    // Where nobody else may wait: the others of a batch do not count.
    let config = EngineConfig { max_queued_requests: 1, ..Setup::default().config };
    let narrow = Setup { bundle, config, ..Setup::default() }.start();
    assert_eq!(vectors(&narrow, &json!({"input": inputs[..40]})), all[..40]);
    narrow.wait_for("all to end", |server| server.metric("fullbore_requests_running") == 0.0);
    assert_eq!(narrow.get("/load").ok(), json!({"server_load": 0}));
}

/// Its first inputs are at work and the others wait for their turn.
#[test]
fn a_batch_whose_client_leaves_is_gone() {
    let bundle = |bundle: &mut Bundle| bundle.pooling = Some(Pooling::Last);
    let server = Setup { bundle, pace: Pace::Stalled, ..Setup::default() }.start();
    let body = json!({"input": vec!["x"; 300]}).to_string();
    let client = server.send(post(PATH, body.as_bytes()));
    server.wait_for("it to run", |server| server.get("/load").ok()["server_load"] == 300);
    drop(client);
    server.gate.set(Pace::Free);
    server.wait_for("all to be gone", |server| server.get("/load").ok()["server_load"] == 0);
    assert_eq!(server.metric("vllm:request_success_total{finished_reason=\"error\"}"), 0.0);
    vectors(&server, &json!({"input": "x"}));
}

#[test]
fn who_does_not_embed_says_so() {
    let server = Setup::default().start();
    let error = server.post(PATH, &json!({"input": "x"})).error(400);
    assert_eq!(error["param"], "model");
    assert!(error["message"].as_str().expect("text").contains("--pooling"), "{error}");
}

#[test]
fn bad_inputs_are_named() {
    let server = embedder(|bundle| bundle.pooling = Some(Pooling::Last));
    let cases = [
        (json!({"input": null}), "input"),
        (json!({"input": 5}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [[]]}), "input"),
        (json!({"input": ["a", 5]}), "input"),
        (json!({"input": [1u64 << 40]}), "input"),
        (json!({"input": vec!["a"; 2049]}), "input"),
        (json!({"input": "word ".repeat(50_000)}), "input"),
        (json!({"encoding_format": "binary"}), "encoding_format"),
        (json!({"dimensions": 0}), "dimensions"),
        (json!({"dimensions": 1 << 20}), "dimensions"),
    ];
    for (change, param) in cases {
        let mut body = json!({"input": "x"});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        assert_eq!(server.post(PATH, &body).error(400)["param"], param, "{change:.100}");
    }
}
