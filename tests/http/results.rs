//! `fullbore bench serve`, `sweep`, `latency`, `startup` and `report` at small sizes: what they count, what they refuse
//! to believe, and that what they write is what the schema says. Nothing that a clock says.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command, ReportArgs};
use fullbore::bench::{measure_latency, measure_serve, measure_startup, measure_sweep, report};
use fullbore_bench::result::{BenchResult, Run, Target};
use fullbore_bench::serve::endpoint::Endpoint;
use fullbore_bench::serve::load::{Ask, Manners, Pace as LoadPace, drive};
use fullbore_bench::serve::tally::Slo;
use fullbore_bench::serve::{Bench, Form, Level, Prompts, ServeBenchError, ServeOptions, Side, measure};
use fullbore_bench::workload::{Arrivals, Lengths, generate};
use serde_json::Map;

use super::*;
use crate::schema::assert_follows_the_schema;

fn command(words: &str) -> BenchCommand {
    let words = ["fullbore", "bench"].into_iter().chain(words.split_whitespace());
    let args = Args::try_parse_from(words).unwrap_or_else(|error| panic!("{error}"));
    let Command::Bench { command } = args.command else { panic!("bench is bench") };
    command
}

/// The result of a bench on the simulator, after a check that it is what the schema says.
pub fn result(words: &str) -> Result<BenchResult, String> {
    let words = format!("{words} --device sim");
    let measured = match command(&words) {
        BenchCommand::Serve(args) => measure_serve(&args),
        BenchCommand::Sweep(args) => measure_sweep(&args),
        BenchCommand::Latency(args) => measure_latency(&args, &mut |_| {}),
        BenchCommand::Startup(args) => measure_startup(&args, &mut |_| {}),
        other => panic!("{other:?} has no result"),
    };
    let measured = measured.map_err(|error| error.to_string())?;
    assert_follows_the_schema(&measured);
    Ok(measured)
}

/// What makes a result of a debug build doubtful, and nothing else.
fn only_debug(result: &BenchResult) {
    let doubts: Vec<&String> = result.invalid.iter().filter(|doubt| !doubt.contains("debug build")).collect();
    // A busy machine sends late.
    let doubts: Vec<_> =
        doubts.into_iter().filter(|doubt| !doubt.contains("late") && !doubt.contains("busy")).collect();
    assert!(doubts.is_empty(), "{doubts:?}");
}

#[test]
fn a_server_of_ours_is_measured_and_a_seed_makes_the_same_requests() {
    let words = "serve --concurrency 4 --limit 8 --lengths fixed:16:5 --warm-up 1 --slo ttft=60000,itl=60000";
    let [first, second] = [result(words), result(words)].map(|result| result.expect("a result"));
    only_debug(&first);
    let [measurement] = &first.measurements[..] else { panic!("one target, one load") };
    assert_eq!((measurement.at["concurrency"], measurement.runs.len()), (4.0, 3));
    for run in &measurement.runs {
        let counts = ["completed", "by_ids", "prompt_tokens", "output_tokens"].map(|name| run.counts[name]);
        assert_eq!(counts, [8, 8, 8 * 16, 8 * 5], "{:?}", run.counts);
        assert_eq!((run.metrics["good_share"], run.metrics["cached_share"]), (1.0, 0.0));
        assert!(run.metrics["device_computing_s"] >= 0.0 && run.metrics["ttft_p50_ms"] > 0.0);
    }
    let hashes = |result: &BenchResult| -> Vec<_> {
        result.measurements[0].runs.iter().map(|run| run.output_hash.clone().expect("ids")).collect()
    };
    assert_eq!(hashes(&first), hashes(&second));
    assert_ne!(hashes(&first)[0], hashes(&first)[1], "prompts of a run are its own");
    assert_eq!(first.targets[0].limits["max_num_seqs"], 32);
}

#[test]
fn two_servers_get_the_same_requests_and_their_ratio_is_told() {
    let peer = Setup::default().start();
    let words = format!(
        "serve --against peer=http://{}/v1 --arrivals poisson:500 --lengths uniform:4-20:2-6 --limit 12 --runs 2",
        peer.address
    );
    let result = result(&words).expect("a result");
    let [own, other] = &result.measurements[..] else { panic!("two targets") };
    assert_eq!(other.target, "peer");
    for (own, other) in own.runs.iter().zip(&other.runs) {
        assert_eq!((own.counts["completed"], other.counts["completed"]), (12, 12));
        assert_eq!(own.output_hash, other.output_hash, "the same prompts, the same model");
    }
    let [comparison] = &result.comparisons[..] else { panic!("one pair") };
    assert!(comparison.ratios["output_tokens_per_s"].median > 0.0);
    assert!(result.invalid.iter().any(|doubt| doubt.starts_with("2 whole runs")), "{:?}", result.invalid);
}

#[test]
fn texts_chats_and_schemas_are_sent_too() {
    for words in ["--prompts text", "--prompts chat", "--prompts chat --constrained"] {
        let words =
            format!("serve {words} --concurrency 2 --limit 4 --lengths fixed:12:6 --runs 1 --max-model-len 512");
        let result = result(&words).expect("a result");
        let run = &result.measurements[0].runs[0];
        assert_eq!(run.counts["completed"], 4, "{words}: {:?}", run.invalid);
        assert!(run.counts["retokenized_tokens"] > 0, "{words}");
    }
}

#[test]
fn a_sweep_goes_up_and_a_page_is_made_of_it() {
    let folder = std::env::temp_dir().join(format!("fullbore-results-{}", std::process::id()));
    let sweep = result("sweep --concurrency 1,2,4 --all --limit 4 --lengths fixed:8:4").expect("a result");
    let at: Vec<f64> = sweep.measurements.iter().map(|measurement| measurement.at["concurrency"]).collect();
    assert_eq!(at, [1.0, 2.0, 4.0]);
    let latency = result("latency --num-requests 2 --prompt-tokens 16 --output-tokens 4").expect("a result");
    let run = &latency.measurements[0].runs[0];
    assert!(run.metrics["prefill_tokens_per_s"] > 0.0 && run.metrics["decode_tokens_per_s"] > 0.0);
    assert_eq!((latency.measurements[0].runs.len(), run.counts["output_tokens"]), (3, 8));
    let startup = result("startup").expect("a result");
    let [later, first] = &startup.measurements[..] else { panic!("{:?}", startup.measurements) };
    assert!(later.summary["first_token_s"].median >= later.summary["ready_s"].median);
    assert_eq!((later.runs.len(), first.runs.len(), first.subject.as_deref()), (3, 1, Some("first start")));
    assert!(startup.invalid.iter().all(|reason| reason.contains("debug build")), "{:?}", startup.invalid);
    let write = |(name, result): (&str, BenchResult)| {
        let path = folder.join(name);
        result.write(&path).expect("a file");
        path
    };
    let results = [("sweep.json", sweep), ("latency.json", latency), ("startup.json", startup)].map(write).to_vec();
    for name in ["report.html", "report.md"] {
        let output = folder.join(name);
        report(&ReportArgs { results: results.clone(), output: output.clone() }).expect("a page");
        let page = std::fs::read_to_string(output).expect("a file");
        for part in ["batch 1", "concurrency 4", "Starts", "sweep.json", "Not measured on"] {
            assert!(page.contains(part), "{name} has no {part}: {page}");
        }
    }
    let unread = [("broken.json", "{}"), ("newer.json", "{\"schema_version\": 99}")].map(|(name, text)| {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("a file");
        path
    });
    let (output, results) = (folder.join("some.html"), [&results[..1], &unread].concat());
    report(&ReportArgs { results, output: output.clone() }).expect("one is a result");
    let page = std::fs::read_to_string(output).expect("a file");
    for part in ["sweep.json", "broken.json is no result of a bench", "newer.json has schema version 99"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    let wrong = ReportArgs { results: unread[..1].to_vec(), output: folder.join("x.html") };
    assert!(report(&wrong).expect_err("no result").to_string().contains("broken.json"));
    std::fs::remove_dir_all(folder).expect("it is ours");
}

/// A server that gives answer n of a list to its nth request; what it is asked for models it always tells. An empty
/// answer closes the connection, and after the last answer nobody listens.
pub fn fake(answers: Vec<String>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let next = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming().take(64) {
            let Ok(mut stream) = stream else { break };
            let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
            let (mut line, mut length, mut path) = (String::new(), 0, String::new());
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                if path.is_empty() {
                    path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap_or(0);
                }
                line.clear();
            }
            reader.read_exact(&mut vec![0; length]).expect("a body");
            let (kind, body) = match path.as_str() {
                "/v1/models" => ("application/json", r#"{"data":[{"id":"fake"}]}"#.to_owned()),
                "/version" => ("application/json", "500 {}".to_owned()),
                "/props" => ("application/json", PROPS.to_owned()),
                _ => ("text/event-stream", answers[next.fetch_add(1, Ordering::Relaxed)].clone()),
            };
            let head = match body.strip_prefix("500 ") {
                Some(_) => "500 Internal Server Error",
                None => "200 OK",
            };
            let body = body.trim_start_matches("500 ");
            if !body.is_empty() {
                let raw = format!("HTTP/1.1 {head}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n{body}");
                stream.write_all(raw.as_bytes()).expect("it listens");
            }
            if next.load(Ordering::Relaxed) == answers.len() {
                break;
            }
        }
    });
    address
}

/// As llama.cpp tells of itself.
const PROPS: &str = r#"{"build_info":"b7-abc","total_slots":3,"default_generation_settings":{"n_ctx":64}}"#;

pub fn events(texts: &[&str], ending: &str) -> String {
    let event = |text: &&str| format!("data: {}\n\n", json!({"choices": [{"text": text}]}));
    texts.iter().map(event).collect::<String>() + ending
}

pub const USAGE: &str =
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":3}}\n\ndata: [DONE]\n\n";

/// The one run of a bench against a server that gives these answers, one client after the other.
fn run_against(answers: Vec<String>, num_requests: usize) -> BenchResult {
    let words = format!(
        "serve --url fake=http://{} --concurrency 1 --limit {num_requests} --lengths fixed:4:3 --runs 1 --warm-up 0 \
         --about fake=by-hand",
        fake(answers)
    );
    result(&words).expect("a result")
}

#[test]
fn servers_that_misbehave_are_told_of_with_counts() {
    let whole = events(&["a", "b", "c"], USAGE);
    let answers = vec![
        whole.clone(),
        events(&["a", "b", "c", "d"], USAGE),
        events(&["a", "b"], ""),
        "data: no JSON\n\n".to_owned(),
        "500 {\"error\": {\"message\": \"it hurts\"}}".to_owned(),
        "data: {\"error\": {\"message\": \"device lost\"}}\n\n".to_owned(),
        events(&["a"], "data: {\"choices\":[],\"usage\":{\"completion_tokens\":1}}\n\ndata: [DONE]\n\n"),
        whole,
    ];
    let result = run_against(answers, 8);
    let target = &result.targets[0];
    assert_eq!((target.version.as_deref(), target.about.as_deref()), (Some("b7-abc"), Some("by-hand")));
    assert_eq!((&target.limits["total_slots"], &target.limits["n_ctx_per_slot"]), (&json!(3), &json!(64)));
    let run = &result.measurements[0].runs[0];
    for (name, count) in [
        ("requests", 8),
        ("completed", 3),
        ("by_usage", 3),
        ("beyond_max_tokens", 1),
        ("truncated", 1),
        ("unreadable", 1),
        ("refused", 1),
        ("failed", 1),
        ("short", 1),
        ("output_tokens", 7),
    ] {
        assert_eq!(run.counts.get(name), Some(&count), "{name}: {:?}", run.counts);
    }
    assert!(!result.valid && run.output_hash.is_none());
    let doubts = result.invalid.join("\n");
    for part in
        ["it answers 500: it hurts", "device lost", "after max_tokens", "1 of 8 requests ended before the length"]
    {
        assert!(doubts.contains(part), "{part}: {doubts}");
    }
}

#[test]
fn a_target_that_dies_does_not_make_a_whole_run() {
    let result = run_against(vec![events(&["a", "b", "c"], USAGE), String::new()], 40);
    let counts = &result.measurements[0].runs[0].counts;
    assert_eq!(counts["completed"], 1);
    assert!(counts["unreachable"] >= 10 && counts["not_sent"] > 0, "{counts:?}");
    assert!(!result.valid && result.invalid.join("").contains("the target was gone"), "{:?}", result.invalid);
}

/// A server that answers one request of each connection, keeps it, and closes it when it has read the next; it stops
/// after so many connections.
fn forgetful(num_connections: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().take(num_connections) {
            let mut stream = stream.expect("a client");
            let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
            let Some(path) = read_request(&mut reader) else { continue };
            let (kind, body) = match path.as_str() {
                "/v1/models" => ("application/json", r#"{"data":[{"id":"forgetful"}]}"#.to_owned()),
                "/version" => ("application/json", r#"{"version":"1"}"#.to_owned()),
                _ => ("text/event-stream", events(&["a", "b", "c"], USAGE)),
            };
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).expect("it listens");
            read_request(&mut reader);
        }
    });
    address
}

/// The path of a request that was read to its end; `None` where none came.
pub fn read_request(reader: &mut impl BufRead) -> Option<String> {
    let (mut line, mut length, mut path) = (String::new(), 0, None);
    while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
        path = path.or_else(|| line.split(' ').nth(1).map(str::to_owned));
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        line.clear();
    }
    reader.read_exact(&mut vec![0; length]).ok()?;
    path
}

#[test]
fn a_request_that_is_sent_again_is_counted() {
    // One for the model, one for the version, whose place is taken by the first request.
    let address = forgetful(2 + 4);
    let words = format!(
        "serve --url http://{address} --concurrency 1 --limit 4 --lengths fixed:4:3 --runs 1 --warm-up 0 --patience 20"
    );
    let result = result(&words).expect("a result");
    let counts = &result.measurements[0].runs[0].counts;
    // All but the first went over a connection that was kept, and closed.
    assert_eq!((counts["requests"], counts["completed"], counts["resent"]), (4, 4, 3), "{:?}", result.invalid);
    let told = "of 4 requests 3 were sent again";
    assert!(result.to_string().contains(told), "{result}");
    let page = fullbore_bench::page::markdown(&[("a.json".to_owned(), result)], &[]);
    assert!(page.contains(told), "{page}");
}

#[test]
fn rows_of_a_trace_without_output_are_left_out_and_counted() {
    let path = std::env::temp_dir().join(format!("fullbore-failed-{}.csv", std::process::id()));
    let rows = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
        1,a,9,0,9,API log\n2,a,8,4,12,API log\n2.01,a,7,0,7,API log\n2.02,a,6,3,9,API log\n";
    std::fs::write(&path, rows).expect("a file");
    for (words, num_left_out) in [
        ("serve --runs 1", 2),
        ("serve --runs 1 --limit 1 --concurrency 1", 1),
        // Both of its loads begin at the head of the trace.
        ("sweep --runs 1 --concurrency 1,2 --all --limit 2", 2),
    ] {
        let result = result(&format!("{words} --trace {}", path.display())).expect("a result");
        assert_eq!(result.workload["left_out_without_output"], num_left_out, "{words}");
    }
    std::fs::remove_file(&path).expect("it is ours");
}

/// Tells the process of [`many_clients_of_a_url`] where the server is.
const MANY_CLIENTS: &str = "FULLBORE_TEST_MANY_CLIENTS";

/// The part of a test that has a process of its own, whose limit of descriptors is low; else it does nothing.
#[test]
fn many_clients_of_a_url() {
    let Ok(url) = std::env::var(MANY_CLIENTS) else { return };
    let words = format!("serve --url {url} --concurrency 100 --limit 100 --lengths fixed:4:8 --runs 1 --warm-up 0");
    let result = result(&words).expect("a result");
    assert_eq!(result.measurements[0].runs[0].counts["completed"], 100, "{:?}", result.invalid);
}

#[cfg(unix)]
#[test]
fn clients_of_a_url_have_the_descriptors_that_they_need() {
    let server = Setup::default().start();
    let this = std::env::current_exe().expect("this test has a file");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -S -n 48 && exec \"$0\" --exact --nocapture http::results::many_clients_of_a_url"]);
    command.arg(this).env(MANY_CLIENTS, format!("http://{}", server.address));
    let ended = command.output().expect("it runs");
    let told = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(ended.status.success() && told.contains("1 passed"), "{told}");
}

/// Measures three runs of four requests, until `num_whole` of them are whole and steps end no more.
fn interrupted_after(num_whole: u32) -> Result<BenchResult, ServeBenchError> {
    let harness = Setup { pace: if num_whole == 0 { Pace::Stalled } else { Pace::Free }, ..Setup::default() }.start();
    let endpoint = Endpoint::new(&format!("http://{}", harness.address), None, None).expect("a URL");
    let record = Target { name: "sim".to_owned(), ..Target::default() };
    let (endpoint, model, extra) = (Arc::new(endpoint), "sim-model".to_owned(), Map::new());
    let sides = [Side { endpoint, model, record, extra, is_fullbore: true }];
    let prompts = Prompts { vocab_size: 256, seed: 1, form: Form::Ids, is_constrained: false, text: None };
    let patience = Duration::from_secs(30);
    let options = ServeOptions { num_runs: 3, num_warm_up: 0, slo: Slo::default(), think: Duration::ZERO, patience };
    let requests = generate(Arrivals::AtOnce, Lengths::Fixed { prompt: 8, output: 4 }, 4, 1);
    let levels = [Level { at: BTreeMap::new(), requests, pace: LoadPace::Closed(2) }];
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let mut sender = Some(sender);
    let gate = harness.gate.clone();
    let mut interrupt = |run: u32| {
        if let Some(sender) = sender.take_if(|_| run == num_whole) {
            gate.set(Pace::Stalled);
            sender.send(()).expect("the bench listens");
        }
    };
    interrupt(0);
    let mut progress = |_: &str, _: &BTreeMap<String, f64>, run: u32, _: &Run| interrupt(run);
    let stop = async { receiver.await.expect("the sender is kept") };
    let mut result = BenchResult::begin("serve", 1, None);
    let bench = Bench { sides: &sides, prompts: &prompts, options: &options };
    measure(bench, &levels, &|_| true, &mut progress, stop, &mut result)?;
    Ok(result)
}

#[test]
fn an_interrupt_leaves_the_runs_that_were_whole() {
    let result = interrupted_after(2).expect("two runs");
    let [measurement] = &result.measurements[..] else { panic!("one target, one load") };
    assert_eq!(measurement.runs.iter().map(|run| run.counts["completed"]).collect::<Vec<_>>(), [4, 4]);
    assert!(!result.valid && result.invalid[0].starts_with("interrupted"), "{:?}", result.invalid);
    let sentence = interrupted_after(0).expect_err("no run").to_string();
    assert!(sentence.contains("nothing to tell"), "{sentence}");
}

#[test]
fn a_turn_waits_for_the_answer_before_it_and_for_a_thought() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    let endpoint = Arc::new(Endpoint::new(&format!("http://{}", server.address), None, None).expect("a URL"));
    let ask = |follows: Option<usize>| Ask {
        due: Duration::ZERO,
        follows,
        path: "/v1/completions",
        body: json!({"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": true, "stream": true}).to_string().into(),
        prompt_tokens: 3,
        max_tokens: 4,
        is_constrained: false,
    };
    let asks = Arc::new(vec![ask(None), ask(None), ask(Some(0)), ask(Some(1)), ask(Some(2))]);
    let manners = Manners { think: Duration::from_millis(5), patience: Duration::from_secs(30) };
    for pace in [LoadPace::Open, LoadPace::Closed(1), LoadPace::Closed(4)] {
        let outcomes = server.runtime.block_on(drive(endpoint.clone(), asks.clone(), pace, manners));
        let outcomes: Vec<_> = outcomes.into_iter().map(|outcome| outcome.expect("it was sent")).collect();
        for (ask, outcome) in asks.iter().zip(&outcomes) {
            assert!(outcome.result.is_ok(), "{pace:?}: {:?}", outcome.result);
            let before = ask.follows.map(|index| outcomes[index].ended + manners.think);
            assert!(before.is_none_or(|before| outcome.due >= before), "{pace:?}: a turn came too soon");
        }
    }
    let words = "serve --concurrency 2 --lengths turns:3:20:5:4 --think 1 --runs 1";
    let result = result(words).expect("a result");
    let counts = &result.measurements[0].runs[0].counts;
    assert_eq!((counts["requests"], counts["completed"]), (8, 8), "{:?}", result.invalid);
}

#[test]
fn what_cannot_be_measured_is_refused_in_a_sentence() {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let wrong = [
        (format!("serve --url http://{free}"), free.to_string()),
        ("serve --url https://localhost --ca-cert /no/such.pem".to_owned(), "/no/such.pem".to_owned()),
        ("serve --trace /no/such.csv".to_owned(), "/no/such.csv".to_owned()),
        ("serve --about other=text --limit 1".to_owned(), "--about tells of other".to_owned()),
        ("serve --lengths fixed:9000000:1 --max-model-len 512".to_owned(), "max_model_len".to_owned()),
        ("sweep --arrivals at-once".to_owned(), "--arrivals".to_owned()),
    ];
    for (words, part) in wrong {
        let sentence = result(&words).expect_err(&words);
        assert!(sentence.contains(&part), "{words}: {sentence}");
    }
}
