//! `benches/gpu.sh` beside a binary that says what a GPU might have measured: whether every demand gets its verdict.
//! Needs bash and Python.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process;

use clap::Parser;
use fullbore::args::{Args, Command, VerifyArgs};
use fullbore_engine::verify::every_case;

/// In the place of `fullbore`. A model is put together from its pieces before it is read.
const BINARY: &str = r#"#!/usr/bin/env bash
all=" $* "
# One write a call, for some go side by side.
(IFS=$'\x1f'; echo "$*" >> "${0%/*}/calls")
case "$1 ${2:-}" in
  "devices "*)
    echo "cpu       cpu       a cpu    1 GiB  avx2  features"
    [ -n "${NO_CUDA:-}" ] || echo "cuda:0    gpu       a GPU    139 GiB  sm_90  CUDA"
    # No manifest lies where the loader looks by itself.
    echo "vulkan:0  software  SwiftShader Device (Subzero)  1 GiB  subgroup  a driver"
    case "${VK_DRIVER_FILES:-} ${LD_LIBRARY_PATH:-}" in
      *"/gpu.json "*/vulkan*) echo "vulkan:1  gpu       a GPU    unknown  subgroup  a driver" ;;
    esac ;;
  "bench ops")
    echo '{"shape":{"dim":4096,"num_heads":32,"num_kv_heads":8,"head_dim":128,"ffn_dim":14336,"vocab_size":128256},
      "peaks":{"copy_bytes_per_s":4e12,"flops_per_s":5e13,"matrix_flops_per_s":5e14}}' | tr -d '\n' ;;
  "bench submit")
    for ms in 0.8 1.6; do echo "{\"step\":{\"num_layers\":32,\"record_and_submit_ms\":$ms}}"; done ;;
  "bench offline")
    case $all in *matrix-units*) arithmetic=matrix-units ;; *) arithmetic=f32 ;; esac
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
    echo "{\"targets\":[{\"device\":{\"tier\":\"sm_90\",\"arithmetic\":\"$arithmetic\"}}],"
    echo '"measurements":[{"runs":[{"counts":{"prompt_tokens":8192,"output_tokens":128}}],'
    echo "\"summary\":{$summary}}],\"invalid\":[\"2 whole runs; 3 are the fewest\"${DOUBT:-}]}" ;;
  verify*)
    arithmetic=f32
    case $all in *matrix-units*) [ -n "${NO_UNITS:-}" ] || arithmetic=matrix-units ;; esac
    case $all in
      *" --golden "*) ;;
      *" --only ${REFUSES:-nothing} "*) echo "there is no op" >&2; exit 1 ;;
      *)
        echo "cuda:0, a GPU, CUDA 13.0, tier sm_90, $arithmetic"
        case $all in
          *" --only ${WRONG:-nothing} "*) echo "an op  0.5  1e-5  FAIL: element 3 is 1, not 2"; exit 1 ;;
        esac
        echo "3 checks pass"
        exit 0 ;;
    esac
    case $all in *"--device vulkan:0"*) exit 5 ;; esac
    while [ "$1" != --model ]; do shift; done
    [ "$(cat "$2")" = both ] || exit 4
    while [ "$1" != --output ]; do shift; done
    case $all in
      *"--device cuda:0"*) same=true failures='[]' answer='{"ids":[1,2,3],"gaps":[1,1,1]}' status=0 ;;
      *) same=false failures='["it"]' answer=${VULKAN_ANSWER-'{"ids":[1,2,4],"gaps":[1,1,0.01]}'} status=1 ;;
    esac
    answers="\"failures\":$failures,\"answers\":[$answer]"
    echo "{\"arithmetic\":\"$arithmetic\",\"same_in_company\":$same,\"followed\":{$answers}}" > "$2"
    exit $status ;;
esac
"#;

/// In the place of llama.cpp's `llama-batched-bench`.
const LLAMA_CPP: &str = r#"#!/usr/bin/env bash
[ -z "${LLAMA_CPP_FAILS:-}" ] || { echo "no kernel image for this device" >&2; exit 1; }
case " $* " in *" -c 18432 -b 2048 -ngl 999 -npp 448 -ntg 128 -npl 32 "*) ;; *) exit 9 ;; esac
echo "main: n_kv_max = 18432"
echo "|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |"
echo "|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|"
echo "|   448 |    128 |   32 |  18432 |    4.000 |  3584.00 |   12.384 |   330.75 |   16.384 |  1125.00 |"
"#;

/// In the place of `python3`: itself, but for the peer.
const PYTHON: &str = r#"#!/usr/bin/env bash
case "$*" in
  *gpu_peer.py\ llama-cpp*) PATH=${PATH#*:} exec python3 "$@" ;;
  *gpu_peer.py\ matrix*)
    [ -z "${NO_TORCH:-}" ] || { echo '{"not_there":"ModuleNotFoundError: no torch"}'; exit; }
    echo '{"bf16_flops_per_s":7.9e14}' ;;
  *gpu_peer.py*) echo "it warms up"; echo "${PEER:-}" ;;
  *) PATH=${PATH#*:} exec python3 "$@" ;;
esac
"#;

/// In the place of `timeout`: itself, but for what is to be slow, which is interrupted.
const TIMEOUT: &str = r#"#!/usr/bin/env bash
[ "$1 $2" = "-s INT" ] || exit 9
if [ -n "${SLOW:-}" ]; then case "$*" in *"$SLOW"*) exit 124 ;; esac; fi
real=$(PATH=${PATH#*:} command -v timeout)
exec "$real" "$@"
"#;

fn executable(path: &Path, text: &str) {
    fs::write(path, text).expect("tests have a folder");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it was written");
}

/// `OUT` of a whole run, with an environment of its own, and what it told of itself.
fn run_on(device: &str, name: &str, variables: &[(&str, &str)]) -> (PathBuf, String) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("tests have a folder");
    executable(&folder.join("fullbore"), BINARY);
    executable(&folder.join("python3"), PYTHON);
    executable(&folder.join("timeout"), TIMEOUT);
    if !variables.contains(&("NO_LLAMA_CPP", "1")) {
        executable(&folder.join("llama-batched-bench"), LLAMA_CPP);
    }
    fs::create_dir_all(folder.join("vulkan")).expect("tests have a folder");
    for (piece, text) in
        [("model.gguf.part0", "bo"), ("model.gguf.part1", "th"), ("cpu.json", "{}"), ("gpu.json", "{}")]
    {
        fs::write(folder.join(piece), text).expect("tests have a folder");
    }
    let out = folder.join("out");
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").expect("PATH is set"));
    let mut command = process::Command::new("bash");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu.sh"));
    command.arg(folder.join("fullbore")).arg(&out).arg(device).arg(folder.join("model.gguf"));
    for name in ["FULLBORE_CACHE", "VK_DRIVER_FILES", "LD_LIBRARY_PATH"] {
        command.env_remove(name);
    }
    command.env("PATH", path).env("ICD_FOLDERS", &folder).envs(variables.iter().copied());
    let output = command.output().expect("bash is there");
    (out, String::from_utf8_lossy(&output.stderr).into_owned())
}

fn run(name: &str, variables: &[(&str, &str)]) -> PathBuf {
    let (out, told) = run_on("auto", name, variables);
    // Vulkan did not follow the golden.
    assert!(told.contains("golden-vulkan ended with 1") && !told.contains("golden-cuda"), "{told}");
    out
}

/// Status and limit of each run, in order.
fn runs(out: &Path) -> Vec<(String, String, u32)> {
    let text = fs::read_to_string(out.join("runs.csv")).expect("it is always written");
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        let [name, status, _, limit] = fields[..] else { panic!("{line}") };
        (name.to_owned(), status.to_owned(), limit.parse().expect("seconds"))
    };
    text.lines().skip(1).map(line).collect()
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
        // 4,096 tokens in 16.384 s.
        ("32 streams (the model) over llama.cpp", 2.0, "pass"),
        ("CUDA against the golden: failures", 0.0, "pass"),
        ("CUDA and Vulkan: answers that part where both are decided", 0.0, "pass"),
        // 4.22 GB of weights and 67 MB of the cache in 2 ms.
        ("CUDA batch 1 at context 512: share of the copy bandwidth", 0.53606, "fail"),
        ("CUDA batch 256 (q8_0): tokens a second", 11_000.0, "pass"),
        ("CUDA batch 256 (q8_0): tokens a second over those of batch 32", 1.22222, "fail"),
        ("CUDA batch 32: tokens a second over those of batch 1", 24.0, "pass"),
        // 29.7 TFLOP a prompt, four of them in 0.3 s, beside the peer's 790 TFLOP/s.
        ("CUDA on tensor cores against the golden: failures", 0.0, "pass"),
        ("CUDA prefill of 2048: share of the measured matrix rate", 0.50106, "pass"),
        ("CUDA: checks of ops that differ from the cpu", 0.0, "pass"),
        ("CUDA: the same alone as among 31", 1.0, "pass"),
        ("Vulkan against the golden: failures", 1.0, "fail"),
        ("Vulkan batch 1 at context 512: share of the copy bandwidth", 0.53606, "fail"),
        ("Vulkan batch 32: tokens a second over those of batch 1", 24.0, "pass"),
        ("Vulkan on matrix units against the golden: failures", 1.0, "fail"),
        ("Vulkan on matrix units: checks of products that differ", 0.0, "pass"),
        ("Vulkan prefill of 2048 in f32: share of the measured peak", 7.91679, "pass"),
        ("Vulkan prefill of 2048 on matrix units: share of their measured peak", 0.79168, "pass"),
        ("Vulkan: checks of ops that differ from the cpu", 0.0, "pass"),
        // The worst of all widths.
        ("Vulkan: host ms to record and submit a step of 32 layers", 1.6, "fail"),
        ("Vulkan: the same alone as among 31", 0.0, "fail"),
    ];
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for ((what, (measured, verdict, reason)), (wanted_what, wanted, wanted_verdict)) in found.iter().zip(expected) {
        assert_eq!((what.as_str(), verdict.as_str()), (wanted_what, wanted_verdict), "{measured} {reason}");
        assert!((measured - wanted).abs() < 1e-3 * wanted.max(1.0) || wanted.is_nan(), "{what}: {measured}");
        assert_eq!(verdict == "not there", !reason.is_empty(), "{what}: {reason}");
    }
    let files = fs::read_dir(&out).expect("it was made").count();
    assert!(files <= 8, "{files} files have to travel back");
    // What has a line fits the nine minutes, however long each run takes.
    let side_by_side =
        |name: &str| name.starts_with("golden-") || name.starts_with("verify-") || name == "peer-versions";
    let runs = runs(&out);
    let asked = runs.iter().take_while(|(name, ..)| name != "profile");
    let (side, rest): (Vec<_>, Vec<_>) = asked.partition(|(name, ..)| side_by_side(name));
    // One beside the other: none waits for another's end.
    assert_eq!(side.len(), 14, "{side:?}");
    let longest = side.iter().map(|(.., limit)| limit).max().expect("kernels are tried");
    let one_by_one: u32 = rest.iter().map(|(.., limit)| limit).sum();
    // Less a quarter of a minute for what ends at its limit, and ten seconds for Python between runs.
    assert!(longest + one_by_one <= 9 * 60 - 15 - 10, "{longest} and {one_by_one}");
    let has = |wanted: &str| rest.iter().any(|(name, ..)| name == wanted);
    assert!(has("peer-transformers") && has("peer-llama-cpp") && has("model-32-cuda"), "{rest:?}");
    assert!(runs.iter().all(|(_, status, _)| !status.starts_with("left out")), "{runs:?}");
}

/// Words of each call of the binary, in a whole run.
fn calls(out: &Path) -> Vec<Vec<String>> {
    let text = fs::read_to_string(out.with_file_name("calls")).expect("the binary was called");
    text.lines().map(|line| line.split('\x1f').map(str::to_owned).collect()).collect()
}

/// The binary in these tests takes any words; the real one is asked here whether it would.
#[test]
fn what_the_script_asks_for_is_there_and_each_device_is_asked_for_every_op() {
    let calls = calls(&run("gpu-script-words", &[]));
    let known: BTreeSet<&str> = every_case().iter().map(|case| case.op).collect();
    let (mut num_runs, mut tried) = (0, BTreeMap::<String, BTreeSet<String>>::new());
    for words in &calls {
        let args = Args::try_parse_from(["fullbore"].into_iter().chain(words.iter().map(String::as_str)));
        let args = args.unwrap_or_else(|error| panic!("{words:?}: {error}"));
        num_runs += 1;
        let Command::Verify(VerifyArgs { device, only, golden, .. }) = args.command else { continue };
        assert!(only.iter().all(|op| known.contains(op.as_str())), "{words:?}: there is {known:?}");
        if golden.golden.is_none() {
            tried.entry(device.name).or_default().extend(only);
        }
    }
    assert!(num_runs > 40, "{calls:?}");
    assert_eq!(tried.len(), 2, "{tried:?}");
    assert!(tried.values().all(|tried| tried.iter().map(String::as_str).eq(known.iter().copied())), "{tried:?}");
}

#[test]
fn what_has_no_gpu_is_left_out_for_a_reason() {
    let peer = ("PEER", r#"{"output_tokens_per_s":1000}"#);
    let vulkan_line = "Vulkan batch 32: tokens a second over those of batch 1";
    let cuda_line = "CUDA batch 32: tokens a second over those of batch 1";
    for (device, variables, absent, present, reason) in [
        ("auto", [peer, ("ICD_FOLDERS", "/nowhere")], vulkan_line, cuda_line, "no GPU that vulkan gives"),
        ("vulkan:1", [peer, ("NO_CUDA", "")], cuda_line, vulkan_line, "vulkan:1 alone was asked for"),
    ] {
        let (out, told) =
            run_on(device, &format!("gpu-script-without-{}", reason.replace([' ', ':'], "-")), &variables);
        let found = verdicts(&out);
        let (_, verdict, why) = &found[absent];
        assert_eq!(verdict, "not there", "{told}");
        assert!(why.ends_with(&format!("was left out: {reason}")), "{why}");
        assert_eq!(found[present].1, "pass", "{told}");
        let is_out = |run: &(String, String, u32)| run.0 == "submit" && run.1.starts_with("left out");
        assert_eq!(runs(&out).iter().any(is_out), absent == vulkan_line, "{told}");
    }
    let (_, told) = run_on("auto", "gpu-script-nothing", &[("NO_CUDA", "1"), ("ICD_FOLDERS", "/nowhere")]);
    assert!(told.contains("there is no hardware GPU"), "software is none: {told}");
}

#[test]
fn what_takes_too_long_on_a_gpu_is_interrupted_and_named() {
    let (out, told) = run_on("vulkan:1", "gpu-script-slow", &[("SLOW", "bench submit")]);
    let (_, verdict, reason) = &verdicts(&out)["Vulkan: host ms to record and submit a step of 32 layers"];
    assert_eq!((verdict.as_str(), reason.as_str()), ("not there", "submit did not end in its 10 s"), "{told}");
}

#[test]
fn what_is_not_valid_on_a_gpu_passes_nothing() {
    let out = run("gpu-script-doubtful", &[("DOUBT", r#","40.0 % of prompt tokens came from a cache, unasked""#)]);
    let (_, verdict, reason) = &verdicts(&out)["CUDA batch 32: tokens a second over those of batch 1"];
    assert_eq!(verdict, "not there");
    assert!(reason.contains("is not valid: 40.0 % of prompt tokens"), "{reason}");
}

#[test]
fn what_a_gpu_could_not_measure_is_not_there_for_a_reason() {
    let no_torch = r#"{"not_there":"ModuleNotFoundError: no torch"}"#;
    let variables =
        [("FAILS", "1"), ("NO_UNITS", "1"), ("LLAMA_CPP_FAILS", "1"), ("NO_TORCH", "1"), ("PEER", no_torch)];
    let out = run("gpu-script-unwell", &variables);
    let found = verdicts(&out);
    let (llama_cpp, units) =
        ("32 streams (the model) over llama.cpp", "CUDA on tensor cores against the golden: failures");
    let (ops, prefill) =
        ("CUDA: checks of ops that differ from the cpu", "CUDA prefill of 2048: share of the measured matrix rate");
    for (what, wanted) in [
        (llama_cpp, "RuntimeError: llama-batched-bench ended with 1: no kernel image for this device"),
        (units, "golden-cuda-matrix-units was computed in f32: the device has nothing else"),
        (ops, "verify-cuda-attention-matrix-units was not computed in matrix-units: the device has nothing else"),
        (prefill, "ModuleNotFoundError: no torch; it is 0.792 of our own matrix peak"),
        ("CUDA batch 256 (q8_0): tokens a second", "8b-q8_0-decode-256-cuda ended with 3"),
        ("32 streams (bf16) over transformers' continuous batching", "ModuleNotFoundError: no torch"),
    ] {
        let (_, verdict, reason) = &found[what];
        assert_eq!((verdict.as_str(), reason.as_str()), ("not there", wanted), "{what}");
    }
    assert_eq!(found["CUDA batch 32: tokens a second over those of batch 1"].1, "pass");
}

/// A check that fails is told of as such, and a run that did not get to its checks as not there.
#[test]
fn an_op_that_differs_on_a_gpu_fails_its_line() {
    for (variable, measured, verdict) in [("WRONG", 2.0, "fail"), ("REFUSES", f64::NAN, "not there")] {
        let out = run(&format!("gpu-script-{verdict}").replace(' ', "-"), &[(variable, "attention")]);
        let (found, found_verdict, reason) = &verdicts(&out)["CUDA: checks of ops that differ from the cpu"];
        assert_eq!(found_verdict, verdict, "{reason}");
        assert!(*found == measured || measured.is_nan(), "in f32 and on tensor cores: {found}");
        let ended = reason.starts_with("verify-cuda-attention") && reason.ends_with("ended with 1");
        assert_eq!(ended, verdict == "not there", "{reason}");
    }
}

/// What `gpu_peer.py` asks of transformers, in its place; it says what is asked.
const TRANSFORMERS: &str = r#"
import contextlib, os, sys
__version__ = "0"
class LlamaConfig:
    def __init__(self, **fields): self.__dict__ |= fields
GenerationConfig = LlamaConfig
class Answer:
    def __init__(self, num_tokens): self.generated_tokens, self.error = [0] * num_tokens, os.environ.get("FAULT")
    def is_finished(self): return True
class Manager:
    def __init__(self, num_tokens): self.num_tokens, self.answers = num_tokens, []
    def is_running(self): return "ENDS" not in os.environ
    def add_requests(self, prompts):
        print(f"{len(prompts)} prompts of {len(prompts[0])}", file=sys.stderr)
        # None is there when it is asked first.
        self.answers = [None, *(Answer(self.num_tokens) for _ in prompts)]
    def get_result(self, timeout): return self.answers.pop(0)
class LlamaForCausalLM:
    def __init__(self, config): pass
    def eval(self): return self
    @contextlib.contextmanager
    def continuous_batching_context_manager(self, generation_config):
        print("made a manager", file=sys.stderr)
        yield Manager(generation_config.max_new_tokens)
"#;

const TORCH: &str = r#"
import contextlib
__version__, bfloat16 = "0", None
def device(name): return contextlib.nullcontext()
def get_default_dtype(): pass
def set_default_dtype(dtype): pass
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "a GPU")
    synchronize = staticmethod(lambda: None)
"#;

/// A manager's cache and graphs take the peer half a minute: what is timed is a second run of the same one.
#[test]
fn the_peer_warms_up_once_and_its_faults_are_told() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gpu-peer");
    fs::create_dir_all(&folder).expect("tests have a folder");
    fs::write(folder.join("torch.py"), TORCH).expect("tests have a folder");
    fs::write(folder.join("transformers.py"), TRANSFORMERS).expect("tests have a folder");
    let peer = |what: &str, variable: &str| {
        let mut command = process::Command::new("python3");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu_peer.py")).arg(what);
        command.args(["--requests", "3", "--prompt-tokens", "5", "--output-tokens", "7"]);
        let output =
            command.env("PYTHONPATH", &folder).env(variable, "out of blocks").output().expect("Python is there");
        let [result, told] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("text"));
        (serde_json::from_str(&result).unwrap_or_else(|error| panic!("{error}: {result} {told}")), told)
    };
    let (result, told): (serde_json::Value, String) = peer("throughput", "NONE");
    assert!(result["output_tokens_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{result}");
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines, ["made a manager", "3 prompts of 5", "3 prompts of 5"]);
    for (variable, fault) in [("FAULT", "out of blocks"), ("ENDS", "its manager has ended")] {
        let (result, told) = peer("throughput", variable);
        assert_eq!(result, serde_json::json!({ "not_there": format!("RuntimeError: {fault}") }), "{told}");
    }
    let (result, told) = peer("versions", "NONE");
    assert!(result["transformers"] == "0" && result["torch"] == "0" && told.is_empty(), "{result} {told}");
}

/// Answers that are not there, are of no token, or end early agree with nothing.
#[test]
fn answers_of_nothing_agree_with_nothing() {
    let line = "CUDA and Vulkan: answers that part where both are decided";
    for (nth, (answer, measured, verdict)) in [
        ("", f64::NAN, "not there"),
        (r#"{"ids":[],"gaps":[]}"#, 1.0, "fail"),
        (r#"{"ids":[1,2],"gaps":[1,1]}"#, 1.0, "fail"),
        (r#"{"ids":[4,2,3],"gaps":[0.01,1,1]}"#, f64::NAN, "not there"),
    ]
    .into_iter()
    .enumerate()
    {
        let variables = [("VULKAN_ANSWER", answer), ("NO_LLAMA_CPP", "1")];
        let out = run(&format!("gpu-script-no-answers-{nth}"), &variables);
        let found = verdicts(&out);
        let (found_measured, found_verdict, reason) = &found[line];
        assert_eq!(found_verdict, verdict, "{answer}: {reason}");
        assert!(found_measured.to_bits() == measured.to_bits() || measured.is_nan(), "{answer}: {found_measured}");
        let (_, verdict, reason) = &found["32 streams (the model) over llama.cpp"];
        assert_eq!(verdict, "not there");
        assert!(reason.contains("left out: no llama-batched-bench lies beside the binary"), "{reason}");
    }
}

/// What the recipe of docs/cuda.md carries is ignored by git, as what travels by name has to be.
#[test]
fn what_is_carried_to_a_gpu_is_no_part_of_the_repository() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ignored = fs::read_to_string(root.join(".gitignore")).expect("it is there");
    let recipe = fs::read_to_string(root.join("docs/cuda.md")).expect("it is there");
    let lines = recipe.lines().filter_map(|line| line.trim().strip_prefix("carry ")?.split_once(", run: "));
    let carried: Vec<&str> = lines.flat_map(|(paths, _)| paths.split(' ')).collect();
    assert!(carried.len() >= 4 && ignored.lines().any(|line| line == "/carried/"), "{carried:?}");
    assert!(carried.iter().all(|path| path.starts_with("carried/")), "{carried:?}");
}
