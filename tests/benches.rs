//! Benches in their small form, in the command line's own words, so that none rots: that they run, count and leave what
//! they should, and nothing that a clock says. `bench http`, those over HTTP and the doctor have modules of their own.
//! Needs nothing.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command};
use fullbore::bench;
use fullbore_bench::result::BenchResult;
use fullbore_bench::submit::SubmitReport;
use fullbore_engine::cost::DeviceProfile;
use serde_json::json;

use crate::schema::assert_follows_the_schema;

/// A file of a test's own.
fn file(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("benches");
    fs::create_dir_all(&folder).expect("a temporary folder");
    folder.join(name)
}

fn read(path: &Path) -> BenchResult {
    let result = BenchResult::read(path).expect("a result");
    assert_follows_the_schema(&result);
    result
}

/// Runs `fullbore bench WORDS`, which writes to `output`.
fn run(words: &str, output: &Path) -> Result<(), String> {
    let output = output.to_str().expect("a path in UTF-8");
    let words = ["fullbore", "bench"].into_iter().chain(words.split_whitespace()).chain(["--output", output]);
    let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
    let Command::Bench { command } = args.command else { panic!("bench is bench") };
    let ran = match command {
        BenchCommand::Offline(args) => bench::offline(&args),
        BenchCommand::Ops(args) => bench::ops(&args),
        BenchCommand::Profile(args) => bench::profile(&args),
        BenchCommand::Startup(args) => bench::startup(&args),
        other => panic!("{other:?} writes no file"),
    };
    ran.map_err(|error| error.to_string())
}

#[test]
fn offline_leaves_a_result_with_every_token() {
    let path = file("offline.json");
    run("offline --device sim --limit 6 --lengths fixed:12:5", &path).expect("it runs");
    let result = read(&path);
    let runs = &result.measurements[0].runs;
    assert_eq!(runs.len(), 3);
    for run in runs {
        assert_eq!((run.counts["output_tokens"], run.counts["prompt_tokens"]), (30, 72));
        assert!(run.invalid.is_empty() && run.metrics["output_tokens_per_s"] > 0.0, "{run:?}");
    }
}

#[test]
fn offline_runs_a_mix_of_lengths_and_leaves_out_what_is_too_long() {
    let path = file("offline-mix.json");
    let trace = file("offline-mix.csv");
    fs::write(&trace, "Timestamp,Model,Request tokens,Response tokens\n1,a,20,3\n2,a,90,4\n900,a,300,5\n")
        .expect("a file");
    let words = format!("offline --device sim --max-model-len 128 --trace {}", trace.display());
    run(&words, &path).expect("it runs");
    let result = read(&path);
    assert_eq!((&result.workload["requests_per_run"], &result.workload["left_out_too_long"]), (&json!(2), &json!(1)));
    let runs = &result.measurements[0].runs;
    assert!(runs.iter().all(|run| (run.counts["prompt_tokens"], run.counts["output_tokens"]) == (110, 7)), "{runs:?}");
    assert!(runs[0].output_hash != runs[1].output_hash, "prompts are drawn anew for each run: {runs:?}");
    run("offline --device sim --max-model-len 16", &path).expect_err("all are too long");
}

#[test]
fn turns_come_after_each_other_offline_and_are_allowed_the_cache() {
    let path = file("offline-turns.json");
    run("offline --device sim --limit 6 --lengths turns:3:40:4:6 --block-size 8", &path).expect("it runs");
    let result = read(&path);
    for run in &result.measurements[0].runs {
        // Prompts of 44, 54 and 64, two conversations.
        assert_eq!((run.counts["prompt_tokens"], run.counts["output_tokens"]), (324, 36));
        // Each turn finds at least the whole blocks of the one before it.
        assert!(run.metrics["cached_share"] >= (40.0 + 48.0) * 2.0 / 324.0 && run.invalid.is_empty(), "{run:?}");
    }
}

#[test]
fn ops_leave_a_result_with_each_of_them() {
    let path = file("ops.json");
    run("ops --device cpu --shapes small --only rms_norm --m 1,3 --seconds 0", &path).expect("it runs");
    let result = read(&path);
    let found: Vec<_> = result.measurements.iter().map(|of| (of.at["m"], of.runs.len())).collect();
    assert_eq!(found, [(1.0, 3), (3.0, 3)]);
    assert!(result.measurements.iter().all(|of| of.summary["roofline_share"].median > 0.0));
}

#[test]
fn a_profile_is_measured_and_can_be_read() {
    let (path, model) = (file("device.json"), Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama"));
    let limits = "--max-num-seqs 2 --max-num-batched-tokens 32 --max-model-len 128 --kv-blocks 32 --block-size 16";
    let words = format!("profile --device cpu --seconds 0 --no-verify {limits} --model {}", model.display());
    run(&words, &path).expect("it runs");
    let profile = DeviceProfile::open(&path).expect("a profile");
    assert!(profile.cost.is_known() && profile.device.id == "cpu" && profile.limits.max_num_seqs == 2);
}

/// As `sha256sum` has them.
const TINY_SHA256: [&str; 2] = [
    "49e0111ef749a366bd7ab8770240b34f44055dddd63b17fcd9a89af5e6e57f07",
    "4b0e161d0176ff30c0539e9110515439f5cfe9e8edc069269297a0fe5df0286d",
];

#[test]
fn a_result_names_the_files_of_its_model_by_their_hashes() {
    let (path, model) = (file("files.json"), Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama"));
    let limits = "--max-num-seqs 2 --max-num-batched-tokens 32 --max-model-len 128 --kv-blocks 32 --block-size 16";
    let words = format!("startup --runs 1 --device cpu --no-verify {limits} --model {}", model.display());
    run(&words, &path).expect("it runs");
    let result = read(&path);
    let told = result.targets[0].model_files.iter().map(|file| (file.name.as_str(), file.sha256.as_deref()));
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    assert_eq!(told.collect::<Vec<_>>(), [(names[0], Some(TINY_SHA256[0])), (names[1], Some(TINY_SHA256[1]))]);
}

#[test]
fn answers_under_a_schema_are_measured_beside_free_ones() {
    let words = "fullbore bench grammar --device sim --sim-ms 0 --num-seqs 4 --constrained 1 --prompt-tokens 8 \
        --steps 8 --rounds 1 --max-model-len 256";
    let args = Args::try_parse_from(words.split_whitespace()).expect("its own words");
    let Command::Bench { command: BenchCommand::Grammar(args) } = args.command else { panic!("it is grammar") };
    bench::grammar(&args).expect("it runs");
}

#[test]
fn a_trace_is_played_in_real_time_with_every_token() {
    let path = file("trace.csv");
    let rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
        2024-05-10 00:00:00.00,20,5\n2024-05-10 00:00:00.05,9,4\n2024-05-10 00:00:00.06,30,6\n";
    fs::write(&path, rows).expect("a trace");
    let words = format!("fullbore bench trace --device sim --max-model-len 256 --trace {}", path.display());
    let args = Args::try_parse_from(words.split_whitespace()).expect("its own words");
    let Command::Bench { command: BenchCommand::Trace(args) } = args.command else { panic!("it is trace") };
    let report = bench::play_trace(&args).expect("it is played");
    assert_eq!((report.num_completed, report.prompt_tokens, report.output_tokens), (3, 59, 15));
    assert!(report.duration_s >= 0.06, "the last came then: {report}");
}

#[test]
fn what_a_step_costs_the_host_is_measured_at_every_width() {
    let words = "fullbore bench submit --device sim --steps 2";
    let args = Args::try_parse_from(words.split_whitespace()).expect("its own words");
    let Command::Bench { command: BenchCommand::Submit(args) } = args.command else { panic!("it is submit") };
    let mut widths = Vec::new();
    let mut told = |_: &_, report: SubmitReport| widths.push((report.num_seqs, report.num_steps));
    bench::measure_submit(&args, &mut told).expect("it runs");
    assert_eq!(widths, [(1, 2), (16, 2), (64, 2)]);
}

/// Tells the process of [`interrupt`] where its result goes.
const INTERRUPTED: &str = "FULLBORE_TEST_INTERRUPTED_BENCH";

/// The part of a test that has a process of its own, which is interrupted; else it does nothing.
#[test]
fn a_bench_without_end() {
    let Ok(output) = env::var(INTERRUPTED) else { return };
    run("startup --device sim --runs 1000000", Path::new(&output)).expect("it is interrupted before it ends");
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_the_runs_that_were_whole() {
    let path = file("interrupted.json");
    let _ = fs::remove_file(&path);
    let mut command = process::Command::new(env::current_exe().expect("this test has a file"));
    command.args(["--exact", "--nocapture", "benches::a_bench_without_end"]).env(INTERRUPTED, &path);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it runs");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.starts_with("run 2 of 1000000 is whole")), "it ended before its second run");
    let interrupted = process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupted.is_ok_and(|status| status.success()));
    let told: Vec<String> = lines.collect();
    assert_eq!(child.wait().expect("it ended").code(), Some(130), "{told:?}");
    let result = read(&path);
    let runs = &result.measurements[0].runs;
    assert!(runs.len() >= 2 && runs.iter().all(|run| run.metrics.contains_key("first_token_s")), "{runs:?}");
    assert!(result.invalid.iter().any(|doubt| doubt.starts_with("interrupted")), "{:?}", result.invalid);
    assert!(told.iter().any(|line| line.contains("interrupted")), "{told:?}");
}
