//! `fullbore bench serve` and `sweep` before servers that stall or take no notice, and under every kind of load at a
//! small size. Nothing that a clock says.

use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use fullbore_bench::serve::endpoint::{Answer, Endpoint, Failure};
use fullbore_bench::serve::load::{Ask, Manners, Pace as LoadPace, drive};

use super::results::{USAGE, events, fake, read_request, result};
use super::*;

/// A server that answers each request with the head of a stream and these bytes; then, where it pings, with a comment
/// again and again, and else with nothing, for as long as its client stays. Without bytes it does not answer at all.
fn stalled(bytes: &'static str, pings: bool) -> Arc<Endpoint> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let serve = move |mut stream: TcpStream| {
        let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
        read_request(&mut reader).expect("a request");
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
        let mut is_there = bytes.is_empty() || stream.write_all([head, bytes].concat().as_bytes()).is_ok();
        while is_there && pings {
            std::thread::sleep(Duration::from_millis(5));
            is_there = stream.write_all(b": still here\n\n").is_ok();
        }
        // Ends with the client.
        let _ = reader.read_to_end(&mut Vec::new());
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().take(64) {
            let stream = stream.expect("a client");
            std::thread::spawn(move || serve(stream));
        }
    });
    Arc::new(Endpoint::new(&format!("http://{address}"), None, None).expect("a URL"))
}

/// What comes of 20 requests, one after the other.
fn asked_one_by_one(endpoint: Arc<Endpoint>, patience: Duration) -> Vec<Option<Result<Answer, Failure>>> {
    let ask = Ask {
        due: Duration::ZERO,
        follows: None,
        path: "/v1/completions",
        body: "{}".into(),
        prompt_tokens: 3,
        max_tokens: 4,
        is_constrained: false,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let manners = Manners { think: Duration::ZERO, patience };
    let outcomes = runtime.block_on(drive(endpoint, Arc::new(vec![ask; 20]), LoadPace::Closed(1), manners));
    outcomes.into_iter().map(|outcome| outcome.map(|outcome| outcome.result)).collect()
}

#[test]
fn a_server_that_only_pings_is_silent_and_one_that_never_answers_is_gone() {
    let patience = Duration::from_millis(250);
    let pinging = asked_one_by_one(stalled(": hello\n\n", true), patience);
    assert!(pinging.iter().all(|result| matches!(result, Some(Err(Failure::Silent(_))))), "{pinging:?}");
    let mute = asked_one_by_one(stalled("", false), patience);
    let (asked, left) = mute.split_at(10);
    assert!(asked.iter().all(|result| matches!(result, Some(Err(Failure::Unanswered(_))))), "{mute:?}");
    assert!(left.iter().all(Option::is_none), "{mute:?}");
    assert_eq!(
        ["silent"; 2],
        [&pinging[0], &mute[0]].map(|of| of.as_ref().and_then(|of| of.as_ref().err()).expect("no answer").name())
    );
}

#[test]
fn an_answer_is_whole_at_its_last_event_though_the_stream_stays_open() {
    let answers = asked_one_by_one(
        stalled("data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: [DONE]\n\n", false),
        Duration::from_secs(5),
    );
    assert!(answers.iter().all(|result| matches!(result, Some(Ok(answer)) if answer.text == "a")), "{answers:?}");
}

#[test]
fn answers_that_follow_no_schema_are_counted() {
    let answers = vec![
        events(&["a", "b", "c"], USAGE),
        events(&["[", "{\"na", "me\":"], USAGE),
        events(&["["], "data: [DONE]\n\n"),
    ];
    let words = format!(
        "serve --url fake=http://{} --constrained --concurrency 1 --limit 3 --lengths fixed:4:3 --runs 1 --warm-up 0",
        fake(answers)
    );
    let told = result(&words).expect("a result");
    let counts = &told.measurements[0].runs[0].counts;
    // One is something else, one is cut where it may be, and one ends too soon.
    assert_eq!((counts["completed"], counts["not_json"]), (3, 2), "{counts:?}");
    assert!(told.invalid.join("").contains("2 of 3 requests are no JSON"), "{:?}", told.invalid);
    let own = "serve --constrained --concurrency 4 --limit 4 --lengths fixed:12:400 --runs 1 --max-model-len 512";
    let own = result(own).expect("a result");
    let counts = &own.measurements[0].runs[0].counts;
    assert_eq!((counts["completed"], counts.get("not_json")), (4, None), "{:?}", own.invalid);
    assert!(counts["output_tokens"] < 4 * 400, "they end where the schema does: {counts:?}");
}

#[test]
fn turns_are_sent_as_messages() {
    let words = "serve --prompts chat --lengths turns:3:20:10:6 --limit 6 --concurrency 2 --runs 1 --warm-up 0 \
        --max-model-len 1024 --block-size 16";
    let told = result(words).expect("a result");
    let run = &told.measurements[0].runs[0];
    assert_eq!((run.counts["completed"], run.counts.get("refused")), (6, None), "{:?}", told.invalid);
    assert!(run.metrics["cached_share"] > 0.2, "a turn begins as the one before did: {run:?}");
}

#[test]
fn many_long_prompts_are_let_in() {
    // 160 of 4,000 tokens are more than what a queue of the usual 256 places takes.
    let words = "serve --concurrency 160 --limit 160 --lengths fixed:4000:1 --runs 1 --warm-up 0 \
        --max-model-len 4096 --max-num-seqs 4 --max-num-batched-tokens 4096";
    let result = result(words).expect("a result");
    let counts = &result.measurements[0].runs[0].counts;
    assert_eq!((counts["completed"], counts.get("refused")), (160, None), "{:?}", result.invalid);
}

#[test]
fn what_is_left_out_of_a_load_takes_no_time_of_it() {
    let path = std::env::temp_dir().join(format!("fullbore-left-out-{}.csv", std::process::id()));
    let row = |at: f64, prompt: u32| format!("{at},a,{prompt},2,{},API log\n", prompt + 2);
    let rows = [row(1.0, 9000), row(3601.0, 8), row(3601.1, 9000), row(3601.2, 8), row(3601.3, 8), row(7200.0, 9000)];
    let head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n";
    std::fs::write(&path, head.to_owned() + &rows.concat()).expect("a file");
    let words = format!("serve --runs 1 --max-model-len 512 --trace {}", path.display());
    let told = result(&words).expect("a result");
    let rate = told.measurements[0].at["rate_per_s"];
    assert!((rate - 2.0 / 0.3).abs() < 1e-6, "3 requests within 0.3 s are {rate} a second");
    assert_eq!(told.measurements[0].runs[0].counts["completed"], 3, "{:?}", told.invalid);
    assert_eq!(told.workload["left_out_too_long"], 3);
    let hash = told.workload["trace_sha256"].as_str().expect("it is read");
    assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{hash}");
    // Both loads have the same rows.
    let words =
        format!("sweep --runs 1 --max-model-len 512 --concurrency 1,2 --all --limit 6 --trace {}", path.display());
    assert_eq!(result(&words).expect("a result").workload["left_out_too_long"], 3);
    std::fs::remove_file(&path).expect("it is ours");
}

#[test]
fn open_loads_of_every_kind_are_sent() {
    let told = result("sweep --rate 200,400 --all --limit 8 --lengths fixed:8:4 --runs 1").expect("a result");
    let rates: Vec<f64> = told.measurements.iter().map(|measurement| measurement.at["rate_per_s"]).collect();
    assert_eq!(rates, [200.0, 400.0]);
    let told = result("serve --arrivals burst:4:0.01 --limit 8 --lengths fixed:8:4 --runs 1").expect("a result");
    assert_eq!(
        (told.measurements[0].runs[0].counts["completed"], &told.workload["arrivals"]),
        (8, &json!("burst:4:0.01"))
    );
    let path = std::env::temp_dir().join(format!("fullbore-hashes-{}.jsonl", std::process::id()));
    let row = |ms, own| json!({"timestamp": ms, "input_length": 520, "output_length": 3, "hash_ids": [7, own]});
    std::fs::write(&path, [row(0, 1), row(1000, 2), row(2000, 3)].map(|row| format!("{row}\n")).concat())
        .expect("a file");
    let words =
        format!("serve --speedup 100 --runs 1 --max-num-seqs 1 --max-model-len 1024 --trace {}", path.display());
    let told = result(&words).expect("a result");
    assert!((told.measurements[0].at["rate_per_s"] - 100.0).abs() < 1e-6, "{:?}", told.measurements[0].at);
    let run = &told.measurements[0].runs[0];
    assert_eq!((run.counts["completed"], &told.workload["shares_prefixes"]), (3, &json!(true)), "{:?}", told.invalid);
    // One after the other: the second and the third find the first's 512.
    assert!(run.metrics["cached_share"] > 0.6, "{:?}", run.metrics);
    std::fs::remove_file(&path).expect("it is ours");
}

#[test]
fn a_password_in_a_url_is_not_told() {
    let peer = Setup::default().start();
    let words =
        format!("serve --url http://me:secret@{} --concurrency 1 --limit 1 --lengths fixed:4:2 --runs 1", peer.address);
    let told = result(&words).expect("a result");
    let address = format!("http://{}", peer.address);
    assert_eq!((told.targets[0].url.as_deref(), &told.targets[0].name), (Some(address.as_str()), &address));
    assert!(!json!(told).to_string().contains("secret"));
}
