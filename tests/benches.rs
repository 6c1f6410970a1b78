//! Benches in their small form, in the command line's own words, so that none rots: that they run, count and leave what
//! they should, and nothing that a clock says. `bench http`, those over HTTP and the doctor have modules of their own.
//! Needs nothing.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command};
use fullbore::bench;
use fullbore_bench::result::BenchResult;
use fullbore_engine::cost::DeviceProfile;

/// A file of a test's own.
fn file(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("benches");
    fs::create_dir_all(&folder).expect("a temporary folder");
    folder.join(name)
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
        other => panic!("{other:?} writes no file"),
    };
    ran.map_err(|error| error.to_string())
}

#[test]
fn offline_leaves_a_result_with_every_token() {
    let path = file("offline.json");
    run("offline --device sim --num-requests 6 --prompt-tokens 12 --output-tokens 5 --runs 3", &path).expect("it runs");
    let result = BenchResult::read(&path).expect("a result");
    let runs = &result.measurements[0].runs;
    assert_eq!(runs.len(), 3);
    for run in runs {
        assert_eq!((run.counts["output_tokens"], run.counts["prompt_tokens"]), (30, 72));
        assert!(run.invalid.is_empty() && run.metrics["output_tokens_per_s"] > 0.0, "{run:?}");
    }
}

#[test]
fn ops_leave_a_result_with_each_of_them() {
    let path = file("ops.json");
    run("ops --device cpu --shapes small --only rms_norm --m 1,3 --seconds 0", &path).expect("it runs");
    let result = BenchResult::read(&path).expect("a result");
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

#[test]
fn answers_under_a_schema_are_measured_beside_free_ones() {
    let words = "fullbore bench grammar --device sim --sim-ms 0 --num-seqs 4 --constrained 1 --prompt-tokens 8 \
        --steps 8 --rounds 1 --max-model-len 256";
    let args = Args::try_parse_from(words.split_whitespace()).expect("its own words");
    let Command::Bench { command: BenchCommand::Grammar(args) } = args.command else { panic!("it is grammar") };
    bench::grammar(&args).expect("it runs");
}
