//! `fullbore bench doctor` in the command line's own words, on a simulated device in virtual time: what it finds on the
//! cases that were provoked, and that what it predicts from prices that it measured is what comes. Needs nothing.

use std::fs;
use std::path::Path;

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command, ReportArgs};
use fullbore::bench::{measure_doctor, report};
use fullbore::device_report;
use fullbore_bench::result::{Advice, BenchResult, Diagnosis};

use crate::schema::assert_follows_the_schema;

/// A device whose steps take 10 ms for up to 16 rows, and more from there on.
const PROFILE: &str = r#"{
    "version": 1,
    "device": { "id": "by hand", "name": "flat, and then not" },
    "model": { "name": "a model", "kv_bytes_per_token": 1024 },
    "limits": { "max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 1024,
                "block_size": 16, "num_blocks": 256 },
    "host_ns_per_step": 200000,
    "cost": { "ns_at_rows": [[1, 10000000], [16, 10500000], [64, 18000000], [512, 80000000]],
              "ns_for_logits": 500000, "ns_per_logit_row": 40000, "ns_per_attended_token": 500 }
}"#;

/// What `fullbore bench doctor` says of the device above, with these words beside.
fn ask(words: &str) -> Result<BenchResult, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("doctor");
    fs::create_dir_all(&folder).expect("a temporary folder");
    let profile = folder.join("flat.json");
    fs::write(&profile, PROFILE).expect("a temporary file");
    let profile = profile.to_str().expect("a path in UTF-8");
    let common = ["fullbore", "bench", "doctor", "--device", "sim", "--device-profile", profile, "--block-size", "16"];
    measure(common.into_iter().chain(words.split_whitespace()))
}

fn measure<'a>(words: impl Iterator<Item = &'a str>) -> Result<BenchResult, String> {
    let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
    let Command::Bench { command: BenchCommand::Doctor(args) } = args.command else { panic!("bench doctor is that") };
    let result = measure_doctor(&args, &mut |_| {}).map_err(|error| error.to_string())?;
    assert_follows_the_schema(&result);
    Ok(result)
}

#[track_caller]
fn found(result: &BenchResult) -> (&Diagnosis, Option<&Advice>) {
    let doubts: Vec<_> = result.invalid.iter().filter(|doubt| !doubt.contains("debug build")).collect();
    assert!(doubts.is_empty(), "{doubts:?}");
    let diagnosis = result.diagnosis.as_ref().expect("the doctor has one");
    (diagnosis, diagnosis.advice.as_ref())
}

/// The advice begins with these words, and its gain was predicted to 25 %, in fact to much less.
#[track_caller]
fn check(words: &str, limit: &str, change: &str) -> BenchResult {
    let result = ask(words).unwrap_or_else(|error| panic!("{words}: {error}"));
    let (diagnosis, advice) = found(&result);
    assert_eq!(diagnosis.limit, limit, "{diagnosis}");
    let advice = advice.unwrap_or_else(|| panic!("{diagnosis}"));
    assert!(advice.change.starts_with(change), "{diagnosis}");
    let measured = advice.measured_gain.expect("it was tried");
    assert!(measured > 1.3 && advice.error().is_some_and(|error| error.abs() < 0.05), "{diagnosis}");
    let rates: Vec<f64> = result.measurements.iter().map(|of| of.summary["output_tokens_per_s"].median).collect();
    assert!((rates[1] / rates[0] - measured).abs() < 1e-9, "{rates:?}");
    // Which flags it has changes nothing of what is answered.
    let hashes = |nth: usize| result.measurements[nth].runs.iter().map(|run| run.output_hash.as_deref());
    assert!(hashes(0).eq(hashes(1)) && hashes(0).all(|hash| hash.is_some()), "{:?}", result.measurements);
    result
}

#[test]
fn a_small_batch_limit_is_found_and_raised() {
    let result = check("--max-num-seqs 2", "slots", "--max-num-seqs ");
    let again = ask("--max-num-seqs 2").expect("a result");
    assert_eq!(result.measurements, again.measurements, "nothing depends on the machine's time");
    assert_eq!(result.diagnosis, again.diagnosis);
}

#[test]
fn a_starved_cache_is_found_and_given_more() {
    let result = check("--max-model-len 256 --kv-blocks 24", "kv_memory", "--kv-blocks ");
    // Each run counts what is its own, and nothing of the warm-up.
    let runs = &result.measurements[0].runs;
    let preempted: Vec<u64> = runs.iter().map(|run| run.counts["preemptions"]).collect();
    assert!(preempted[0] > 0 && preempted.iter().all(|&count| count == preempted[0]), "{preempted:?}");
    for run in runs {
        let charged: f64 = run.metrics.iter().filter(|(name, _)| name.starts_with("device_")).map(|(_, s)| s).sum();
        let duration = run.metrics["duration_s"];
        assert!((charged / duration - 1.0).abs() < 0.05, "{charged} s of {duration} s are charged");
    }
}

#[test]
fn requests_that_get_no_answer_make_it_not_valid() {
    let result =
        ask("--max-queue-ms 40 --lengths uniform:16-512:8-8 --limit 16 --runs 1 --no-check").expect("a result");
    let run = &result.measurements[0].runs[0];
    let num_missing = run.counts["requests"] - run.counts["completed"];
    let sentence = format!("{num_missing} of 16 requests got no answer");
    assert!(num_missing > 0 && result.invalid.iter().any(|doubt| doubt.contains(&sentence)), "{:?}", result.invalid);
}

#[test]
fn a_slow_tokenizer_is_found_and_passed_by() {
    let result = check("--slow-tokenizer 4000", "text", "prompts as token ids");
    let (diagnosis, _) = found(&result);
    assert!(diagnosis.verdict.contains("500 prompt tokens a second on 2 threads"), "{diagnosis}");
}

#[test]
fn what_a_tokenizer_takes_is_timed() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama");
    let small = "--lengths fixed:8:2 --limit 2 --runs 1 --seconds 0 --no-check --no-verify --max-num-seqs 2";
    let words = format!(
        "fullbore bench doctor --device cpu --slow-tokenizer 2000 {small} --kv-blocks 64 --model {}",
        model.display()
    );
    let result = measure(words.split_whitespace()).expect("a result");
    let ns_per_token = result.workload["text_ns_per_token"].as_f64().expect("texts are read");
    assert!(ns_per_token >= 2e6, "it waits as long for each: {ns_per_token}");
}

#[test]
fn a_plain_loop_is_told_to_run_ahead() {
    let profile = PROFILE.replace("\"host_ns_per_step\": 200000", "\"host_ns_per_step\": 9000000");
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("doctor-slow-host.json");
    fs::write(&path, profile).expect("a temporary file");
    let path = path.to_str().expect("a path in UTF-8");
    let words = ["fullbore", "bench", "doctor", "--device", "sim", "--pipeline-depth", "1", "--device-profile", path];
    let result = measure(words.into_iter()).expect("a result");
    let (diagnosis, advice) = found(&result);
    assert!(diagnosis.limit.starts_with("host_"), "{diagnosis}");
    assert_eq!(advice.expect("a change").change, "--pipeline-depth 2", "{diagnosis}");
}

#[test]
fn where_nothing_helps_nothing_is_advised() {
    let result = ask("--max-num-seqs 64 --profile throughput --limit 48 --runs 1").expect("a result");
    let diagnosis = result.diagnosis.expect("the doctor has one");
    assert!(diagnosis.advice.is_none() && diagnosis.to_string().contains("nothing to change"), "{diagnosis}");
    assert_eq!(result.measurements.len(), 1);
}

#[test]
fn what_was_found_is_on_the_page() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("doctor-page");
    fs::create_dir_all(&folder).expect("a temporary folder");
    let (tried, told) = (ask("--max-num-seqs 2"), ask("--max-num-seqs 2 --no-check"));
    let paths = [("tried.json", tried), ("told.json", told)].map(|(name, result)| {
        let path = folder.join(name);
        result.expect("a result").write(&path).expect("a file");
        path
    });
    for name in ["page.html", "page.md"] {
        let output = folder.join(name);
        report(&ReportArgs { results: paths.to_vec(), output: output.clone() }).expect("a page");
        let page = fs::read_to_string(output).expect("a file");
        for part in ["What the doctor says", "--max-num-seqs ", "not tried", "slots: ", "as it is"] {
            assert!(page.contains(part), "{name} has no {part}: {page}");
        }
    }
}

/// The file of `fullbore report --small` with these words.
fn reported(name: &str, words: &str) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let output = path.to_str().expect("a path in UTF-8");
    let words = ["fullbore", "report", "--small", "--output", output].into_iter().chain(words.split_whitespace());
    let Command::Report(args) = Args::try_parse_from(words).expect("its own words").command else {
        panic!("report is report")
    };
    device_report::report(&args).expect("a file");
    fs::read_to_string(path).expect("a file")
}

#[test]
fn a_report_has_every_part_and_says_which_failed() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama");
    let text = reported("cpu.md", &format!("--device cpu --no-saved-costs --kv-blocks 64 --model {}", model.display()));
    for part in
        ["- processor: ", "checks pass", "multiply-adds", "of the device, by what", "what limits it: ", "weights"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!text.contains("This failed") && !text.contains(env!("CARGO_MANIFEST_DIR")), "{text}");
    // A simulated one has no ops, and without a profile no prices.
    let text = reported("sim.md", "--device sim");
    for part in
        ["This failed: the device sim makes hashes", "This failed: device sim says", "--device-profile", "## Devices"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn what_cannot_be_examined_is_refused() {
    let refused = |words: &str| measure(words.split_whitespace()).expect_err("it is refused");
    assert!(refused("fullbore bench doctor --device sim").contains("--device-profile"));
    let longer = ask("--max-model-len 128 --lengths fixed:200:10").expect_err("too long");
    assert!(longer.contains("max_model_len, 128"), "{longer}");
    assert!(ask("--slow-tokenizer never").expect_err("no number").contains("microseconds"));
}
