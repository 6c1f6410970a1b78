//! The capacity planner, in the command line's own words: profile, workload and limits in, a report or a sentence out.
//! Needs nothing: every file is made here.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command};
use fullbore::{bench, simulate};
use fullbore_bench::report::ServingReport;
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimOptions};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::{CostModel, DeviceProfile, Prices, StepShape};

use crate::simulation;

const PROFILE: &str = r#"{
    "version": 1,
    "device": { "id": "by hand", "name": "10 ms a step, 0.1 ms a row" },
    "model": { "name": "a model", "kv_bytes_per_token": 1024 },
    "limits": { "max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 1024,
                "block_size": 16, "num_blocks": 256 },
    "host_ns_per_step": 0,
    "cost": { "ns_at_rows": [[1, 10000000], [256, 35500000]] }
}"#;

const HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

/// A file of a test's own.
fn file(name: &str, text: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planner");
    fs::create_dir_all(&folder).expect("a temporary folder");
    let path = folder.join(name);
    fs::write(&path, text).expect("a temporary file");
    path
}

/// What `fullbore simulate --profile PROFILE WORDS` says.
fn check(profile: &Path, words: &[&str]) -> Result<ServingReport, String> {
    let profile = profile.to_str().expect("a path in UTF-8");
    let words = [&["fullbore", "simulate", "--profile", profile], words].concat();
    let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
    let Command::Simulate(args) = args.command else { panic!("simulate is simulate") };
    let profile = args.profile.as_deref().expect("of one device");
    simulate::report(profile, &args).map_err(|error| error.to_string())
}

#[track_caller]
fn check_refused(profile: &Path, words: &[&str], parts: &[&str]) {
    let sentence = check(profile, words).expect_err("it is refused");
    for part in parts {
        assert!(sentence.contains(part), "`{part}` is not in: {sentence}");
    }
}

#[test]
fn a_trace_is_played_on_a_profile_written_by_hand() {
    let profile = file("hand.json", PROFILE);
    let rows = "2023-11-16 18:17:03.5,100,5\n2023-11-16 18:17:13.5,1020,5\n2023-11-16 18:17:23.5,300,2\n";
    let trace = file("played.csv", &format!("{HEADER}{rows}"));
    let trace = trace.to_str().expect("a path in UTF-8");
    let report = check(&profile, &["--trace", trace]).expect("it is right");
    assert_eq!((report.num_requests, report.num_completed, report.output_tokens), (3, 2, 7));
    assert_eq!((report.too_long.count, report.too_long.rows.as_slice()), (1, [3].as_slice()));
    // The last row comes after 20 s: 256 rows, 44 rows, and one more token.
    let wanted = 20.0 + (35.5 + 14.3 + 10.0) / 1e3;
    assert!((report.duration_s - wanted).abs() < 1e-6, "{}", report.duration_s);
    assert_eq!((report.kv.num_blocks, report.kv.pool_bytes), (256, 256 * 16 * 1024));
    let fast = check(&profile, &["--trace", trace, "--speedup", "10", "--limit", "1"]).expect("it is right");
    assert_eq!((fast.num_requests, fast.num_completed), (1, 1));
    // Ten requests with the lengths of three rows, all at once.
    let cycled = check(&profile, &["--trace", trace, "--arrivals", "at-once", "--limit", "10"]).expect("it is right");
    assert_eq!((cycled.num_completed, cycled.output_tokens), (7, 4 * 5 + 3 * 2));
    assert_eq!(cycled.too_long.rows, [2, 5, 8]);
}

#[test]
fn what_is_preempted_goes_to_the_host_where_copying_is_cheaper() {
    let priced = |name, ns: &str| {
        file(name, &PROFILE.replace("\"host_ns", &format!("\"ns_per_copied_megabyte\": {ns}, \"host_ns")))
    };
    // Four sequences of 400 tokens, and memory for two and a half.
    let words = "--arrivals at-once --lengths fixed:100:300 --limit 12 --max-model-len 512 --kv-blocks 64";
    let words: Vec<&str> = words.split(' ').collect();
    let run = |profile: &Path, more: &[&str]| check(profile, &[words.as_slice(), more].concat()).expect("it is right");
    let host = ["--swap-memory", "1MiB"];
    let (cheap, dear) = (priced("cheap.json", "1000"), priced("dear.json", "1e12"));
    let (swapped, recomputed) = (run(&cheap, &host), run(&dear, &host));
    assert!(swapped.num_swaps > 0 && swapped.num_swaps <= swapped.num_preemptions, "{swapped}");
    assert!(recomputed.num_preemptions > 0 && recomputed.num_swaps == 0, "{recomputed}");
    assert!(swapped.duration_s < recomputed.duration_s, "{swapped}{recomputed}");
    // What nobody said how long it takes is not done, and cannot be asked for.
    assert_eq!(run(&cheap, &[]).num_swaps, 0);
    let unpriced = file("unpriced.json", PROFILE);
    assert_eq!(run(&unpriced, &[]).num_swaps, 0);
    check_refused(&unpriced, &[words.as_slice(), &host].concat(), &["--swap-memory", "ns_per_copied_megabyte"]);
    let with_host = file(
        "host.json",
        &fs::read_to_string(&cheap).expect("it was written").replace("256 }", "256, \"num_host_blocks\": 64 }"),
    );
    assert!(run(&with_host, &[]).num_swaps > 0);
}

/// The report says what held the device back over the whole run, not over its last minute.
#[test]
fn a_report_names_what_holds_the_device_back() {
    let profile = file("limited.json", PROFILE);
    let cases: [(&[&str], &str, &str); 4] = [
        (
            &["--arrivals", "poisson:0.2", "--lengths", "fixed:16:8", "--limit", "40"],
            "no_requests",
            "send more at once",
        ),
        (&["--arrivals", "at-once", "--lengths", "fixed:16:64", "--limit", "40"], "slots", "--max-num-seqs"),
        (
            &[
                "--arrivals",
                "at-once",
                "--lengths",
                "fixed:500:400",
                "--limit",
                "16",
                "--max-num-seqs",
                "32",
                "--kv-blocks",
                "96",
            ],
            "kv_memory",
            "q8_0 KV would admit about",
        ),
        (&["--trace", "TRACE", "--max-num-seqs", "2"], "slots", "--max-num-seqs"),
    ];
    // Two minutes of crowd, and then a lonely end.
    let crowd = (0..400).map(|row| format!("{}.0,16,64\n", row / 4));
    let end = (0..2).map(|row| format!("{}.0,16,4\n", 200 + row));
    let trace = file("crowd.csv", &format!("{HEADER}{}", crowd.chain(end).collect::<String>()));
    for (words, limit, part) in cases {
        let path = trace.to_str().expect("a path in UTF-8");
        let words: Vec<&str> = words.iter().map(|word| if *word == "TRACE" { path } else { word }).collect();
        let report = check(&profile, &words).expect("it is right");
        assert!(report.limits.limit == limit && report.limits.verdict.contains(part), "{words:?}: {report}");
        assert!(report.to_string().contains(&report.limits.verdict), "{report}");
        let sum: f64 = report.limits.shares.values().sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        let json = serde_json::json!(report);
        assert_eq!(
            (&json["limits"]["limit"], json["limits"]["shares"][limit].as_f64()),
            (&limit.into(), report.limits.shares.get(limit).copied())
        );
    }
}

/// A simulation turns away what a server would: by requests, by tokens of their prompts, and by forecasts.
#[test]
fn who_is_turned_away_is_turned_away_by_a_servers_rules() {
    let profile = file("refusing.json", PROFILE);
    let workload = ["--arrivals", "at-once", "--lengths", "fixed:200:20", "--limit", "100", "--refuse-when-full"];
    let with = |more: &[&str]| check(&profile, &[&workload[..], more].concat()).expect("it is right");
    // One tenant alone leaves some for others.
    assert_eq!(with(&["--max-queued-requests", "64"]).num_completed, 56);
    assert_eq!(with(&["--max-queued-tokens", "2048"]).num_completed, 8);
    let late = with(&["--max-queue-ms", "500"]);
    assert!(late.num_completed > 4 && late.refused.count > 50, "{late}");
    let none = with(&["--max-queue-ms", "20"]);
    assert_eq!(none.refused.count, 100, "a prompt alone takes 30 ms: {none}");
    let patient: Vec<&str> = workload.iter().copied().filter(|word| *word != "--refuse-when-full").collect();
    let patient = check(&profile, &[&patient[..], &["--max-queued-tokens", "2048"]].concat()).expect("it is right");
    assert_eq!((patient.num_completed, patient.refused.count), (100, 0));
}

#[test]
fn limits_are_the_profiles_unless_the_command_line_says_otherwise() {
    let profile = file("limits.json", PROFILE);
    let workload = ["--arrivals", "at-once", "--lengths", "fixed:64:64", "--limit", "16"];
    let with = |more: &[&str]| check(&profile, &[&workload[..], more].concat()).expect("it is right");
    let (four, eight) = (with(&[]), with(&["--max-num-seqs", "8", "--kv-memory", "8MiB"]));
    assert!(eight.output_tokens_per_s > 1.5 * four.output_tokens_per_s, "{eight}");
    assert_eq!((eight.kv.num_blocks, eight.kv.block_size), (512, 16));
    assert_eq!(with(&["--block-size", "32"]).kv.num_blocks, 128);
    let refused = with(&["--max-queued-requests", "6", "--refuse-when-full"]);
    assert_eq!((refused.num_completed, refused.refused.count), (6, 10));
}

#[test]
fn a_simulation_that_makes_no_sense_is_refused_with_its_reason() {
    let profile = file("sense.json", PROFILE);
    let workload = ["--arrivals", "poisson:3", "--limit", "4"];
    let refused = |words: &[&str], parts: &[&str]| check_refused(&profile, &[&workload[..], words].concat(), parts);
    refused(&["--kv-blocks", "2"], &["2 KV blocks of 16 tokens", "max_model_len 1024"]);
    refused(&["--kv-memory", "16KiB"], &["16.0 KiB of KV memory hold 1 blocks", "1.0 MiB"]);
    refused(&["--max-num-batched-tokens", "3"], &["max_num_batched_tokens is 3", "at least 4"]);
    refused(&["--speedup", "0"], &["0 is no speed"]);
    refused(&["--speedup", "1e-12"], &["request 2", "more than 31 years"]);
    refused(&["--target-itl-ms", "9"], &["the target between tokens is 9 ms", "takes 10.0 ms", "to 10 or more"]);
    check(&profile, &[&workload[..], &["--target-itl-ms", "10"]].concat()).expect("it can be met");
    check_refused(&profile, &[], &["--trace"]);
    check_refused(&profile, &["--arrivals", "poisson:3", "--limit", "0"], &["--limit is 0"]);
    check_refused(&profile, &["--arrivals", "sometimes"], &["sometimes", "poisson:PER-SECOND"]);
    check_refused(&profile, &["--trace", "no-such.csv"], &["no-such.csv"]);
    let trace = file("bad.csv", &format!("{HEADER}1,2,3\n2,many,3\n"));
    check_refused(
        &profile,
        &["--trace", trace.to_str().expect("UTF-8")],
        &["bad.csv, row 3: `ContextTokens` is \"many\""],
    );
    let wrong = file("wrong.json", &PROFILE.replace("[256, 35500000]", "[256, 3]"));
    check_refused(&wrong, &workload, &["wrong.json: `cost.ns_at_rows` has 3 ns in pair 1"]);
    check_refused(Path::new("no-such.json"), &workload, &["no-such.json"]);
}

#[test]
fn the_profile_in_the_docs_is_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/simulate.md")).expect("the page is there");
    let example = text.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let report = check(&file("docs.json", example), &["--arrivals", "poisson:2", "--limit", "50"]);
    assert_eq!(report.expect("it is right").num_completed, 50);
}

/// In virtual time, so that the machine's noise is no part of it.
#[test]
fn a_device_that_was_measured_is_simulated_as_it_is() {
    let prices =
        Prices { ns_for_logits: 2e5, ns_per_logit_row: 3e4, ns_per_attended_token: 400.0, ..Prices::default() };
    let planted = CostModel::line(5e6, 2e5, prices);
    let config = EngineConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 256,
        max_logit_rows: 4,
        pipeline_depth: 1,
        ..EngineConfig::default()
    };
    let options = SimOptions { fidelity: Fidelity::Cost, cost: planted, ..SimOptions::default() };
    let mut engine = simulation::engine_on(SimBackend::new(options), config);
    let (profile, measured) = bench::measure(&mut engine, "a model", Duration::ZERO).expect("every step takes time");
    assert!(measured.p95_error < 0.01, "{}", measured.p95_error);
    for (num_seqs, context) in [(1, 50), (3, 200), (4, 120)] {
        let shape = StepShape::decode(num_seqs, context).with_slice(10, 37, 0);
        let (found, wanted) = (profile.cost.predict_ns(&shape) as f64, planted.predict_ns(&shape) as f64);
        assert!((found / wanted - 1.0).abs() < 0.03, "{found} for {wanted}");
    }
    let output = file("measured.json", &profile.to_json());
    let read = DeviceProfile::open(&output).expect("what was written can be read");
    assert_eq!((read.limits.max_num_seqs, read.limits.max_num_batched_tokens), (4, 64));
    assert!(read.cost.is_known() && read.points.len() > 10 && read.device.id == "sim");
    let simulated = check(&output, &["--arrivals", "burst:3:0.02", "--lengths", "uniform:10-60:2-9", "--limit", "9"]);
    assert_eq!(simulated.expect("it is right").num_completed, 9);
}

#[test]
fn a_workload_is_played_in_real_time() {
    let words = ["--device", "sim", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--max-model-len", "256"];
    let workload = ["--arrivals", "burst:3:0.02", "--lengths", "uniform:10-60:2-9", "--limit", "9"];
    let played = play(&[&workload[..], &words].concat()).expect("the simulator is never lost");
    let simulated = check(&file("played.json", PROFILE), &workload).expect("it is right");
    assert_eq!(played.num_completed, 9);
    assert_eq!((simulated.prompt_tokens, simulated.output_tokens), (played.prompt_tokens, played.output_tokens));
    assert!(played.duration_s >= 0.04 && played.ttft_ms.p50 > 0.0, "{played}");
    // On a device that is said to take 10 ms a step.
    let profile = file("target.json", PROFILE);
    let slow = ["--device-profile", profile.to_str().expect("a path in UTF-8")];
    let with = |target| play(&[&workload[..], &words, &slow, &["--target-itl-ms", target]].concat());
    let sentence = with("9").expect_err("no step is that short");
    assert!(sentence.contains("is 9 ms") && sentence.contains("takes 10.0 ms"), "{sentence}");
    assert_eq!(with("10").map(|report| report.num_completed), Ok(9));
}

/// What `fullbore bench trace WORDS` says.
fn play(words: &[&str]) -> Result<ServingReport, String> {
    let args = Args::try_parse_from([&["fullbore", "bench", "trace"], words].concat());
    let Command::Bench { command: BenchCommand::Trace(args) } = args.map_err(|error| error.to_string())?.command else {
        panic!("bench trace is bench trace")
    };
    bench::play_trace(&args).map_err(|error| error.to_string())
}

#[test]
fn random_weights_of_a_known_shape_are_served_without_a_file() {
    let workload = ["--arrivals", "at-once", "--lengths", "fixed:8:3", "--limit", "2"];
    let run = |words: &[&str]| play(&[words, &workload].concat());
    let small = ["--weights", "random", "--shape", "smollm2-135m:q4_1", "--device", "cpu", "--kv-memory", "8MiB"];
    let report = run(&small).expect("it is right");
    assert_eq!((report.num_completed, report.output_tokens), (2, 6));
    let refused = |words: &[&str], parts: &[&str]| {
        let sentence = run(words).expect_err("it is refused");
        assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    };
    refused(&["--weights", "random"], &["--shape"]);
    refused(&["--shape", "llama-3.1-8b"], &["--weights"]);
    refused(&["--weights", "random", "--shape", "llama-4"], &["llama-4 is no shape", "llama-3.1-8b"]);
    refused(&["--weights", "random", "--shape", "llama-3.1-8b:q9"], &["q9 is no format", "q4_0"]);
}
