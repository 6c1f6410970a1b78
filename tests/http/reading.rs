//! Requests before the engine has them: what one client's bodies and grammars cost another's.

use fullbore::http::keys::Keys;
use fullbore::http::proxies::{Proxies, parse_network};
use fullbore_engine::model::ModelConfig;
use fullbore_engine::text::{GgufVocab, Tokenizer};

use super::access::{chat_as, keys};
use super::*;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A server that knows alice and bob, and carol and dave.
fn of_four(setup: Setup) -> Harness {
    let keys = keys("the-key-of-alice alice\nthe-key-of-bob bob\nthe-key-of-carol carol\nthe-key-of-dave dave");
    Setup { access: Access::new(LOCAL, keys, &["*".to_owned()], &[]), ..setup }.start()
}

fn ask_as(server: &Harness, key: &str, change: &Value) -> Reply {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
    body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
    read_reply(server.send(chat_as(key, &body)))
}

/// A form that takes long to compile; each `seed` makes another.
fn slow_form(seed: usize) -> Value {
    let field =
        |index: usize| (format!("field{seed}_{index}"), json!({"type": "string", "pattern": "^(a|b)*c{1,60}$"}));
    let properties: serde_json::Map<String, Value> = (0..400).map(field).collect();
    json!({"guided_json": {"type": "object", "properties": properties}})
}

#[test]
fn slow_grammars_of_one_client_hold_up_nobody_elses() {
    let server = of_four(Setup::default());
    std::thread::scope(|scope| {
        let server = &server;
        let ask = |seed: usize| move || ask_as(server, "the-key-of-alice", &slow_form(seed)).status;
        let slow: Vec<_> = (0..24).map(|seed| scope.spawn(ask(seed))).collect();
        let mut num_answered = 0;
        while slow.iter().any(|slow| !slow.is_finished()) {
            // Each is compiled anew.
            let form = json!({"guided_regex": format!("[a-f]{{{}}}", 2 + num_answered)});
            let reply = ask_as(server, "the-key-of-bob", &form);
            assert_eq!(reply.status, 200, "{reply:?}");
            assert_eq!(ask_as(server, "the-key-of-bob", &json!({})).status, 200);
            num_answered += 1;
        }
        assert!(num_answered > 3, "{num_answered} answers came meanwhile");
        for slow in slow {
            // Whoever would wait too long is told to come again.
            let status = slow.join().expect("a status");
            assert!([200, 400, 503].contains(&status), "{status}");
        }
    });
}

/// As many as have all the turns there are, from several clients; each is stopped when its time is over.
#[test]
fn forms_that_never_end_keep_nobody_from_a_form() {
    let server = of_four(Setup { sandboxed: true, ..Setup::default() });
    std::thread::scope(|scope| {
        let server = &server;
        let ask = |index: usize| {
            let key = format!("the-key-of-{}", ["alice", "bob", "carol"][index % 3]);
            // Each is another.
            let form = json!({"guided_json": {"type": "integer", "multipleOf": 20_000_003 + index}});
            move || ask_as(server, &key, &form)
        };
        let endless: Vec<_> = (0..9).map(|index| scope.spawn(ask(index))).collect();
        let mut num_answered = 0;
        while endless.iter().any(|endless| !endless.is_finished()) {
            let form = json!({"guided_regex": format!("[a-f]{{{}}}", 2 + num_answered)});
            let reply = ask_as(server, "the-key-of-dave", &form);
            assert_eq!(reply.status, 200, "{reply:?}");
            num_answered += 1;
        }
        assert!(num_answered >= 2, "{num_answered} answers came meanwhile");
        for endless in endless {
            let error = endless.join().expect("an answer").error(400);
            assert!(error["message"].as_str().is_some_and(|message| message.contains("longer than")), "{error}");
        }
    });
    // Nothing of it goes on, so that all turns are there.
    let forms = (0..4).map(|index| json!({"guided_regex": format!("[x-z]{{{}}}", 2 + index)}));
    assert!(forms.into_iter().all(|form| ask_as(&server, "the-key-of-alice", &form).status == 200));
}

#[test]
fn one_form_is_compiled_once_for_all_who_ask_at_the_same_time() {
    let server = of_four(Setup::default());
    std::thread::scope(|scope| {
        let server = &server;
        let ask = |index: usize| {
            let key = if index.is_multiple_of(2) { "the-key-of-alice" } else { "the-key-of-bob" };
            move || ask_as(server, key, &slow_form(0)).status
        };
        let asked: Vec<_> = (0..12).map(|index| scope.spawn(ask(index))).collect();
        let statuses: Vec<u16> = asked.into_iter().map(|asked| asked.join().expect("a status")).collect();
        assert!(statuses.iter().all(|status| *status == statuses[0] && [200, 400].contains(status)), "{statuses:?}");
    });
    let compiled = |server: &Harness| {
        let raw =
            "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer the-key-of-bob\r\n\r\n";
        let text = read_reply(server.send(raw)).text();
        let line = text.lines().find(|line| line.starts_with("fullbore_grammars_compiled_total")).expect("a sample");
        line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()).expect("a number")
    };
    assert_eq!(compiled(&server), 1);
}

#[test]
fn a_stream_that_is_being_prepared_says_that_somebody_is_there() {
    let limits = Limits { keep_alive: Duration::from_millis(1), ..Limits::default() };
    let server = Setup { limits, ..Setup::default() }.start();
    let stream = |path: &str, seed: usize, pattern: &str| {
        let mut body = slow_form(seed);
        body["guided_json"]["properties"]["last"] = json!({"type": "string", "pattern": pattern});
        let said = json!([{"role": "user", "content": "x"}]);
        let format = json!({"format": {"type": "json_schema", "name": "x", "schema": body["guided_json"]}});
        let body = match path {
            "/v1/responses" => json!({"input": "x", "max_output_tokens": 1, "stream": true, "text": format}),
            "/v1/messages" => json!({"messages": said, "max_tokens": 1, "stream": true, "output_config": format}),
            _ => json!({"messages": said, "max_tokens": 1, "stream": true, "guided_json": body["guided_json"]}),
        };
        let reply = server.post(path, &body);
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/event-stream")), "{reply:?}");
        let text = reply.text();
        let (comments, events): (Vec<String>, Vec<String>) =
            text.split_terminator("\n\n").map(str::to_owned).partition(|part| part.starts_with(": "));
        (comments.len(), events)
    };
    let (num_comments, answer) = stream("/v1/chat/completions", 0, "^a$");
    assert!(num_comments > 0 && answer.len() > 2, "{answer:?}");
    assert_eq!(answer.last().map(String::as_str), Some("data: [DONE]"));
    // What is wrong is told all the same, as each dialect has it, and nothing follows.
    let dialects = ["/v1/chat/completions", "/v1/messages", "/v1/responses"];
    for (seed, (path, field)) in dialects.into_iter().zip(["/error/message", "/error/message", "/message"]).enumerate()
    {
        let (_, answer) = stream(path, seed + 1, "^($");
        let [event] = answer.as_slice() else { panic!("{answer:?}") };
        let (_, data) = event.split_once("data: ").expect("data");
        let data: Value = serde_json::from_str(data).expect("JSON");
        let sentence = data.pointer(field).and_then(Value::as_str).expect("a sentence");
        assert!(sentence.contains("cannot be used"), "{data}");
        assert_eq!(event.contains("event: error\n"), path != "/v1/chat/completions", "{event}");
    }
    assert_eq!(server.metric("fullbore_requests_refused_total{cause=\"invalid_field\"}"), 3.0);
}

#[test]
fn many_choices_of_one_form_are_compiled_once_and_cost_what_runs() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(1)), ..Setup::default() }.start();
    let body = json!({"prompt": "x", "n": 128, "max_tokens": 12, "temperature": 1.0, "seed": 1,
        "guided_regex": "[a-f]{4,9}!"});
    let (choices, most) = std::thread::scope(|scope| {
        let answer = scope.spawn(|| server.complete(body.clone()));
        let mut most = 0.0f64;
        while !answer.is_finished() {
            most = most.max(server.metric("fullbore_grammar_bytes"));
        }
        (answer.join().expect("an answer")["choices"].as_array().expect("choices").clone(), most)
    });
    assert_eq!(choices.len(), 128);
    for choice in choices {
        let text = choice["text"].as_str().expect("text");
        let letters = text.trim_end_matches('!');
        assert!(
            (4..=9).contains(&letters.len()) && letters.bytes().all(|letter| letter.is_ascii_lowercase()),
            "{text}"
        );
    }
    // 16 run at a time; each has some kilobytes.
    assert!(most > 0.0 && most < 16.0 * f64::from(1 << 20), "{most} bytes");
    assert_eq!(server.metric("fullbore_grammars_compiled_total"), 1.0);
    server.wait_for("its end", |server| server.metric("fullbore_grammar_bytes") == 0.0);
}

/// The head and the first `num_bytes` of a larger body.
fn half_a_body(server: &Harness, key: &str, num_bytes: usize) -> TcpStream {
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         authorization: Bearer {key}\r\ncontent-length: 4000000\r\n\r\n"
    );
    server.send([head.as_bytes(), &vec![b' '; num_bytes]].concat())
}

#[test]
fn bodies_that_wait_are_bounded_together_and_leave_room_for_others() {
    let limits = Limits { max_bytes_of_bodies: 2 << 20, ..Limits::default() };
    let server = of_four(Setup { limits, ..Setup::default() });
    let kept = |server: &Harness| {
        let raw =
            "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer the-key-of-bob\r\n\r\n";
        let text = read_reply(server.send(raw)).text();
        let line = text.lines().find(|line| line.starts_with("fullbore_body_bytes")).expect("a sample").to_owned();
        line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()).expect("a number")
    };
    let held = [0; 2].map(|_| half_a_body(&server, "the-key-of-alice", 400_000));
    server.wait_for("what was sent", |server| kept(server) == 800_000);
    let large = json!({"pad": " ".repeat(500_000)});
    let refused = ask_as(&server, "the-key-of-alice", &large);
    assert_eq!(refused.header("retry-after"), Some("1"), "{refused:?}");
    assert!(refused.error(429)["message"].as_str().expect("a sentence").contains("2097152"));
    // Hers are in nobody else's way, nor in that of her own small ones.
    assert_eq!(ask_as(&server, "the-key-of-bob", &large).status, 200);
    assert_eq!(ask_as(&server, "the-key-of-alice", &json!({})).status, 200);
    drop(held);
    server.wait_for("room", |server| kept(server) == 0);
    assert_eq!(ask_as(&server, "the-key-of-alice", &large).status, 200);
}

/// A context so long that no text of a body is refused by its length, and a token that stands for much.
fn large_context() -> Setup {
    let bundle = |bundle: &mut Bundle| {
        let letters = ('!'..='~').chain(['Ġ', 'Ċ']).map(String::from);
        let controls = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>"].map(str::to_owned);
        let tokens: Vec<String> = controls.into_iter().chain(letters).chain(["~".repeat(256)]).collect();
        let token_types = (0..tokens.len()).map(|id| if id < 4 { 3 } else { 1 }).collect();
        let vocab = GgufVocab { model: "gpt2".to_owned(), tokens, token_types, eos: Some(2), ..GgufVocab::default() };
        bundle.tokenizer = Tokenizer::from_vocab(vocab).expect("a vocabulary").into();
        bundle.config = ModelConfig::tiny(bundle.tokenizer.vocab_size() as u32, 2);
    };
    let config = EngineConfig { max_model_len: 1 << 17, num_blocks: 1 << 14, ..Setup::default().config };
    Setup { config, bundle, ..Setup::default() }
}

const LARGE_BODIES: &str = "FULLBORE_TEST_LARGE_BODIES";

/// The part of a test that has a process of its own, whose memory is its own too; else it does nothing.
#[test]
fn bodies_as_large_as_are_taken() {
    let Ok(_) = std::env::var(LARGE_BODIES) else { return };
    let server = large_context().start();
    let whole = |begin: &str, unit: &str, end: &str| {
        [begin, &unit.repeat(((8 << 20) - begin.len() - end.len()) / unit.len()), end].concat()
    };
    let most = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
    };
    server.complete(json!({"prompt": "x", "max_tokens": 1}));
    let before = most();
    let call = r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{\"x\":["#;
    let bodies = [
        ("/v1/completions", whole(r#"{"prompt":["#, "0,", "0]}")),
        ("/v1/completions", whole(r#"{"prompt":["#, "[],", "0]}")),
        ("/v1/completions", whole(r#"{"prompt":"x","pad":{"#, r#""":{},"#, r#""":0}}"#)),
        ("/v1/chat/completions", whole(call, "0,", r#"0]}"}}]}]}"#)),
        ("/v1/chat/completions", whole(r#"{"messages":["#, r#"{"role":"user"},"#, r#"{"role":"user"}]}"#)),
        ("/v1/completions", whole(r#"{"prompt":""#, "a few words of a text ", r#""}"#)),
        ("/v1/completions", whole(r#"{"prompt":""#, "1\\n", r#""}"#)),
        ("/v1/chat/completions", whole(r#"{"messages":[{"role":"user","content":""#, "words of it ", r#""}]}"#)),
        ("/tokenize", whole(r#"{"prompt":""#, "a few words of a text ", r#""}"#)),
    ];
    for (path, body) in bodies {
        let begin: String = body.chars().take(40).collect();
        server.post_bytes(path, body.as_bytes()).error(400);
        println!("{begin}: {} MiB more than {before}", most() - before);
    }
    // The body as it is sent, as it is kept, and as what it says.
    assert!(most() - before < 320, "{} MiB", most() - before);
}

#[cfg(target_os = "linux")]
#[test]
fn a_body_takes_little_more_memory_than_it_has_bytes() {
    let mut command = std::process::Command::new(std::env::current_exe().expect("this test has a file"));
    command.args(["--exact", "--nocapture", "http::reading::bodies_as_large_as_are_taken"]).env(LARGE_BODIES, "1");
    let ended = command.output().expect("it runs");
    let told = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    println!("{told}");
    assert!(ended.status.success() && told.contains("1 passed"), "{told}");
}

#[test]
fn clients_behind_a_trusted_proxy_are_told_apart() {
    let limits = Limits { max_bytes_of_bodies: 2 << 20, ..Limits::default() };
    let start = |networks: &[&str]| {
        let networks: Vec<_> = networks.iter().map(|text| parse_network(text).expect("a network")).collect();
        let access = Access::new(LOCAL, Keys::default(), &["*".to_owned()], &[]);
        Setup { limits, access: access.with_proxies(Proxies::new(&networks)), ..Setup::default() }.start()
    };
    let half = |server: &Harness, lines: &str| {
        let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json";
        let head = format!("{head}\r\n{lines}\r\ncontent-length: 4000000\r\n\r\n");
        server.send([head.as_bytes(), &vec![b' '; 600_000]].concat())
    };
    let ask = |server: &Harness, lines: &str| {
        let large = json!({"prompt": "x", "max_tokens": 1, "pad": " ".repeat(600_000)}).to_string();
        let raw = String::from_utf8(post("/v1/completions", large.as_bytes())).expect("text");
        read_reply(server.send(raw.replacen("\r\n", &format!("\r\n{lines}\r\n"), 1))).status
    };
    let (first, other) = ("x-forwarded-for: 203.0.113.1", "x-forwarded-for: 203.0.113.2");
    for (networks, others) in [(vec!["127.0.0.0/8", "10.0.0.0/8"], 200), (vec!["10.0.0.0/8"], 429), (vec![], 429)] {
        let server = start(&networks);
        let held = half(&server, first);
        server.wait_for("what was sent", |server| server.metric("fullbore_body_bytes") >= 600_000.0);
        assert_eq!((ask(&server, first), ask(&server, other)), (429, others), "{networks:?}");
        // Whatever else a client says of himself.
        for spoofed in [
            "x-forwarded-for: 203.0.113.9, 203.0.113.1",
            "x-forwarded-for: 203.0.113.9\r\nx-forwarded-for: 203.0.113.1, 10.0.0.5",
            "forwarded: for=203.0.113.9, for=\"203.0.113.1:80\"",
        ] {
            assert_eq!(ask(&server, spoofed), 429, "{networks:?}: {spoofed}");
        }
        drop(held);
    }
}

#[test]
fn a_body_of_chunks_without_an_end_is_cut_off() {
    let server = Setup::default().start();
    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                transfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("the server reads");
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
    let num_chunks = (0..1024).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    // What is sent before the answer is thrown away, so that it can be read; and that has an end too.
    assert!((8..300).contains(&num_chunks), "{num_chunks} MiB were taken");
    assert_eq!(server.metric("fullbore_body_bytes"), 0.0);
    assert_eq!(server.metric("fullbore_http_responses_total{status=\"413\"}"), 1.0);
    server.complete(json!({"prompt": "x", "max_tokens": 1}));
}
