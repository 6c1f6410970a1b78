//! `benches/gpu.sh` beside a binary that says what a GPU might have measured: whether every demand gets its verdict.
//! Needs bash and Python.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// In the place of `fullbore`. A model is put together from its pieces before it is read.
const BINARY: &str = r#"#!/usr/bin/env bash
all=" $* "
case "$1 ${2:-}" in
  "devices "*)
    echo "cuda:0    a GPU    139 GiB  sm_90  CUDA"
    echo "vulkan:0  a GPU    unknown  subgroup  a driver"
    echo "vulkan:1  llvmpipe (lavapipe)  1 GiB  lavapipe  Mesa" ;;
  "bench ops")
    echo '{"shape":{"dim":4096,"num_heads":32,"num_kv_heads":8,"head_dim":128,"ffn_dim":14336,"vocab_size":128256},
      "peaks":{"copy_bytes_per_s":4e12,"matrix_flops_per_s":5e14}}' | tr -d '\n' ;;
  "bench offline")
    steady=500 output=500
    case $all in
      *q8_0*" --limit 256 "*) [ -z "${FAILS:-}" ] || exit 3; steady=11000 ;;
      *q8_0*) steady=9000 ;;
      *bf16*) output=1600 ;;
      *" --limit 32 "*) steady=12000 ;;
      *" --limit 4 "*) steady= ;;
    esac
    summary='"duration_s":{"median":0.3},"tpot_mean_ms":{"median":2}'
    summary="$summary,\"output_tokens_per_s\":{\"median\":$output}"
    [ -z "$steady" ] || summary="$summary,\"steady_tokens_per_s\":{\"median\":$steady}"
    # Over several lines, as results are.
    echo '{"targets":[{"device":{"tier":"sm_90","arithmetic":"f32"}}],'
    echo '"measurements":[{"runs":[{"counts":{"prompt_tokens":8192,"output_tokens":128}}],'
    echo "\"summary\":{$summary}}],\"invalid\":[\"2 whole runs; 3 are the fewest\"${DOUBT:-}]}" ;;
  verify*)
    case $all in *" --golden "*) ;; *) exit 0 ;; esac
    while [ "$1" != --model ]; do shift; done
    [ "$(cat "$2")" = both ] || exit 4
    while [ "$1" != --output ]; do shift; done
    case $all in
      *"--device cuda:0"*) same=true failures='[]' answer='{"ids":[1,2,3],"gaps":[1,1,1]}' status=0 ;;
      *) same=false failures='["it"]' answer='{"ids":[1,2,4],"gaps":[1,1,0.01]}' status=1 ;;
    esac
    echo "{\"same_in_company\":$same,\"followed\":{\"failures\":$failures,\"answers\":[$answer]}}" > "$2"
    exit $status ;;
esac
"#;

/// In the place of `python3`: itself, but for the peer.
const PYTHON: &str = r#"#!/usr/bin/env bash
case "$*" in
  *gpu_peer.py\ matrix*) echo '{"bf16_flops_per_s":7.9e14}' ;;
  *gpu_peer.py*) echo "it warms up"; echo "${PEER:-}" ;;
  *) PATH=${PATH#*:} exec python3 "$@" ;;
esac
"#;

fn executable(path: &Path, text: &str) {
    fs::write(path, text).expect("tests have a folder");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it was written");
}

/// `OUT` of a whole run, with an environment of its own.
fn run(name: &str, variables: &[(&str, &str)]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("tests have a folder");
    executable(&folder.join("fullbore"), BINARY);
    executable(&folder.join("python3"), PYTHON);
    for (piece, text) in [("model.gguf.part0", "bo"), ("model.gguf.part1", "th")] {
        fs::write(folder.join(piece), text).expect("tests have a folder");
    }
    let out = folder.join("out");
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").expect("PATH is set"));
    let mut command = Command::new("bash");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu.sh"));
    command.arg(folder.join("fullbore")).arg(&out).arg("auto").arg(folder.join("model.gguf"));
    command.env("PATH", path).env_remove("FULLBORE_CACHE").envs(variables.iter().copied());
    let output = command.output().expect("bash is there");
    // Vulkan did not follow the golden, which the script's end tells too.
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("golden-vulkan ended with 1") && !told.contains("golden-cuda"), "{told}");
    out
}

/// Measured, verdict and reason of each line, by what it is about.
fn verdicts(out: &Path) -> HashMap<String, (f64, String, String)> {
    let text = fs::read_to_string(out.join("verdict.csv")).expect("it is always written");
    let line = |line: &str| {
        let fields: Vec<&str> = line.splitn(5, ',').collect();
        let [what, measured, _, verdict, reason] = fields[..] else { panic!("{line}") };
        let measured = measured.parse().unwrap_or(f64::NAN);
        (what.to_owned(), (measured, verdict.to_owned(), reason.to_owned()))
    };
    text.lines().skip(1).map(line).collect()
}

#[test]
fn every_demand_on_a_gpu_gets_its_verdict_in_one_call() {
    let out = run("gpu-script", &[("PEER", r#"{"output_tokens_per_s":1000}"#)]);
    let mut found: Vec<_> = verdicts(&out).into_iter().collect();
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    let expected = [
        ("32 streams (bf16) over transformers' continuous batching", 1.6, "pass"),
        ("32 streams over llama.cpp", f64::NAN, "not there"),
        ("CUDA against the golden: failures", 0.0, "pass"),
        ("CUDA and Vulkan: answers that part where both are decided", 0.0, "pass"),
        ("CUDA: the same alone as among 31", 1.0, "pass"),
        ("Vulkan against the golden: failures", 1.0, "fail"),
        ("Vulkan: the same alone as among 31", 0.0, "fail"),
        // 4.22 GB of weights and 67 MB of the cache in 2 ms.
        ("batch 1 at context 512: share of the copy bandwidth", 0.53606, "fail"),
        ("batch 256 (q8_0): tokens a second", 11_000.0, "pass"),
        ("batch 256 (q8_0): tokens a second over those of batch 32", 1.22222, "fail"),
        ("batch 32: tokens a second over those of batch 1", 24.0, "pass"),
        // 29.7 TFLOP a prompt, four of them in 0.3 s, beside the peer's 790 TFLOP/s.
        ("prefill of 2048: share of the measured matrix rate", 0.50106, "pass"),
    ];
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for ((what, (measured, verdict, reason)), (wanted_what, wanted, wanted_verdict)) in found.iter().zip(expected) {
        assert_eq!((what.as_str(), verdict.as_str()), (wanted_what, wanted_verdict), "{measured} {reason}");
        assert!((measured - wanted).abs() < 1e-3 * wanted.max(1.0) || wanted.is_nan(), "{what}: {measured}");
        assert_eq!(verdict == "not there", !reason.is_empty(), "{what}: {reason}");
    }
    let files = fs::read_dir(&out).expect("it was made").count();
    assert!(files <= 8, "{files} files have to travel back");
}

#[test]
fn what_is_not_valid_on_a_gpu_passes_nothing() {
    let out = run("gpu-script-doubtful", &[("DOUBT", r#","40.0 % of prompt tokens came from a cache, unasked""#)]);
    let (_, verdict, reason) = &verdicts(&out)["batch 32: tokens a second over those of batch 1"];
    assert_eq!(verdict, "not there");
    assert!(reason.contains("is not valid: 40.0 % of prompt tokens"), "{reason}");
}

#[test]
fn what_a_gpu_could_not_measure_is_not_there_for_a_reason() {
    let out = run("gpu-script-unwell", &[("FAILS", "1"), ("PEER", r#"{"not_there":"ModuleNotFoundError: no torch"}"#)]);
    let found = verdicts(&out);
    for (what, wanted) in [
        ("batch 256 (q8_0): tokens a second", "8b-q8_0-decode-256-cuda ended with 3"),
        ("32 streams (bf16) over transformers' continuous batching", "ModuleNotFoundError: no torch"),
    ] {
        let (_, verdict, reason) = &found[what];
        assert_eq!((verdict.as_str(), reason.as_str()), ("not there", wanted), "{what}");
    }
    assert_eq!(found["batch 32: tokens a second over those of batch 1"].1, "pass");
}
