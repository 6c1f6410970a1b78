//! What calls the CUDA driver, against a double of it (`cuda_driver/driver.cpp`), well and unwell. Needs a C++
//! compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fullbore::args::DeviceArgs;
use fullbore::devices;
use fullbore_cuda_kernels::{Device, Gpu, gpus};
use fullbore_engine::backend::cuda::kernel::Kernel;
use fullbore_engine::backend::cuda::{Arithmetic, CudaBackend};
use fullbore_engine::backend::wgpu::{ArithmeticChoice, Tier};
use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo, MAX_IN_FLIGHT};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::op::{MUL_ADD_ROUNDS, MulAdd, Op};
use fullbore_engine::recording::{BufferCopy, Recording};
use fullbore_engine::request::{Request, TokenId};
use fullbore_engine::tensor::{BufferId, Tensor, WeightFormat};

use crate::pipeline::Client;
use crate::random::Random;

const KIND: &str = "FULLBORE_DRIVER";
const SELECTOR: &str = "FULLBORE_DRIVER_SELECTOR";

/// Of NVRTC all but what brings a result back, and no call of it returns.
const HALF_AN_NVRTC: &str = r#"
#include <cstdlib>
#define CALL(name) extern "C" int name() { abort(); }
CALL(nvrtcCompileProgram) CALL(nvrtcCreateProgram) CALL(nvrtcDestroyProgram)
CALL(nvrtcGetPTXSize) CALL(nvrtcGetProgramLog) CALL(nvrtcGetProgramLogSize)
"#;

fn empty_folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("tests have a folder");
    folder
}

/// A library of one source.
fn compile(source: &Path, library: &Path, flags: &[&str]) {
    let mut command = Command::new("c++");
    command.args(["-std=c++17", "-O1", "-fPIC", "-shared", "-o"]).arg(library).arg(source);
    let output = command.args(flags).output().expect("c++ is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The folder of a double, compiled anew.
fn compiled(name: &str, flags: &[&str]) -> PathBuf {
    let folder = empty_folder(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_driver/driver.cpp");
    compile(&source, &folder.join("libcuda.so.1"), flags);
    folder
}

fn said(folder: &Path, kind: &str) -> String {
    said_of(folder, kind, "")
}

/// What [`with_this_driver`] says in a process of its own, where libraries are looked for in `folder` first: a driver
/// of a kind.
fn said_of(folder: &Path, kind: &str, selector: &str) -> String {
    let mut command = Command::new(std::env::current_exe().expect("this test has a file"));
    command.args(["--exact", "--nocapture", "cuda_driver::with_this_driver"]);
    command.env(KIND, kind).env(SELECTOR, selector).env("LD_LIBRARY_PATH", folder);
    let output = command.output().expect("it runs");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed") && !text.contains("panicked"), "{kind}: {text}");
    let contexts = ["begins", "ends"].map(|which| text.matches(&format!("a context {which}")).count());
    assert_eq!(contexts[0], contexts[1], "{kind}: one is left: {text}");
    text
}

/// The part of a test that has a process of its own; else it does nothing.
#[test]
fn with_this_driver() {
    let Ok(kind) = std::env::var(KIND) else { return };
    let is_on_units = ["turing", "decode-on-units"].contains(&kind.as_str());
    let arithmetic = if is_on_units { Arithmetic::MatrixUnits } else { Arithmetic::F32 };
    let mut backend = match CudaBackend::open(&std::env::var(SELECTOR).unwrap_or_default(), arithmetic) {
        Ok(backend) => backend,
        Err(error) => return println!("refused: {error}"),
    };
    let DeviceInfo { id, name, driver, .. } = backend.info();
    println!("{id} is {name} with {driver}");
    if kind == "turing" {
        let gpu = gpus().expect("a driver").remove(0).expect("it is well");
        let (module, name) = Kernel::MulAddMatrix.source();
        let lacks = Gpu::open(&gpu).and_then(|mut gpu| gpu.function(&module, name)).expect_err("it is too old");
        return println!("{} computes in {}: {lacks}", backend.info().id, backend.info().arithmetic);
    }
    if kind == "small" {
        let error = backend.alloc("the cache", 2 << 20).expect_err("it is small");
        return println!("refused: {error}");
    }
    if kind == "lost" {
        let places = places(&mut backend);
        let error = compute(&mut backend, places, 1.0).expect_err("it is lost");
        println!("lost: {error}");
        backend.reopen().expect("it is there again");
    }
    if kind.starts_with("decode") {
        return decode(Box::new(backend));
    }
    if kind == "beside" {
        return beside_another(&mut backend);
    }
    if kind == "plainer" {
        return plainer();
    }
    // As launches, as a graph, and as the graph with other parameters, and with the same.
    let places = places(&mut backend);
    for offset in [1.0, 1.0, 2.0, 2.0] {
        let sums = compute(&mut backend, places, offset).expect("it is well");
        // x / 2 + offset again and again, from 0, 1, 2 on.
        let expected = (0..1024).map(|x| (0..12 * MUL_ADD_ROUNDS).fold(x as f32, |x, _| x * 0.5 + offset));
        assert!(sums.into_iter().eq(expected), "another result");
    }
}

/// 32 answers of 100 tokens behind prompts of many lengths; kernels do nothing, and all tokens are the same.
fn decode(mut backend: Box<dyn Backend>) {
    let config = EngineConfig {
        max_num_seqs: 32,
        max_num_batched_tokens: 256,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: 32 * 64,
        max_logit_rows: 32,
        pipeline_depth: 2,
        ..EngineConfig::default()
    };
    config.check().expect("a valid config");
    let checkpoint = Checkpoint::Random { seed: 3, format: WeightFormat::Q8_0 };
    let limits = config.state_limits();
    let model = Model::load(ModelConfig::tiny(256, 2), limits, &checkpoint, backend.as_mut(), &mut |_| {});
    let mut engine = Engine::new(config, model.expect("a small model"), backend, (1, 2));
    eprintln!("all is there");
    let random = &mut Random::new(7);
    for _ in 0..32 {
        let prompt = (0..random.between(100, 900)).map(|_| TokenId(random.below(256))).collect();
        let request = Request { prompt, max_tokens: 100, logprobs: Some(0), ..Request::default() };
        engine.add(request, Box::new(Client(Arc::default())));
    }
    let mut num_steps = 0;
    while !engine.is_idle() {
        while engine.has_room() && engine.begin().expect("the device is there") {}
        engine.complete().expect("the device is there");
        num_steps += 1;
    }
    println!("{num_steps} steps");
}

/// From tensor cores to f32, and no further.
fn plainer() {
    let units = ArithmeticChoice::MatrixUnits;
    let wanted = DeviceArgs { arithmetic: units, ..DeviceArgs::new("cuda") };
    let first = devices::open(&wanted).expect("it is well").info().clone();
    assert_eq!((first.id.as_str(), first.arithmetic.as_str()), ("cuda:0", units.name()));
    let next = devices::plainer(&first, &wanted).expect("there are some").expect("it is well").info().clone();
    assert_eq!((next.id.as_str(), next.arithmetic.as_str()), ("cuda:0", "f32"));
    assert!(devices::plainer(&next, &wanted).is_none());
    let refused = devices::open_at(&wanted, Some(Tier::Base)).err().expect("it has no tiers").to_string();
    println!("plainer kernels in f32; {refused}");
}

/// Another model on the same GPU begins, is lost and opened anew, and ends.
fn beside_another(backend: &mut CudaBackend) {
    let own = places(backend);
    let first = compute(backend, own, 1.0).expect("it is well");
    let mut other = CudaBackend::open("", Arithmetic::F32).expect("there is room");
    for _ in 0..2 {
        let places = places(&mut other);
        assert_eq!(compute(&mut other, places, 1.0).expect("it is well"), first);
        assert_eq!(compute(backend, own, 1.0).expect("it is well"), first);
        other.reopen().expect("it is there");
    }
    std::thread::spawn(|| drop(other)).join().expect("another thread ends it");
    assert_eq!(compute(backend, own, 1.0).expect("it is well"), first);
    println!("neither minds the other");
}

/// Where numbers are brought, and where they are computed with.
fn places(backend: &mut CudaBackend) -> [BufferId; 2] {
    ["upload", "x"].map(|label| backend.alloc(label, 4096).expect("it has memory"))
}

/// 1,024 numbers through two buffers and twelve kernels.
fn compute(backend: &mut CudaBackend, [upload, buffer]: [BufferId; 2], offset: f32) -> Result<Vec<f32>, DeviceError> {
    let mut recording = Recording::new(upload);
    recording.upload.extend((0..1024).map(|x| (x as f32).to_bits()));
    recording.copy(BufferCopy { from: upload, from_bytes: 0, to: buffer, to_bytes: 0, size_bytes: 4096 });
    let x = Tensor { buffer, ..Tensor::f32(upload, 1, 1024) };
    for _ in 0..12 {
        recording.push(Op::MulAdd(MulAdd { x, scale: 0.5, offset, rounds: MUL_ADD_ROUNDS }));
    }
    recording.downloads.push(x);
    let mut bytes = Vec::new();
    let ticket = backend.submit(&recording)?;
    backend.wait(ticket, &mut bytes)?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

#[test]
fn work_goes_through_the_driver_and_comes_back() {
    let folder = compiled("cuda-driver", &[]);
    let well = said(&folder, "well");
    assert!(well.contains("a double with CUDA 12.2; GPU-abababab-abab-abab-abab-abababababab"), "{well}");
    assert_eq!(well.matches("made a graph").count(), 1, "{well}");
    let launched = [0, 12, 0].map(|num_set| format!("a graph of 12 launches, {num_set} set"));
    let lines = well.lines().filter(|line| line.starts_with("a graph of"));
    assert!(lines.zip(&launched).filter(|(line, launched)| line.starts_with(*launched)).count() == 3, "{well}");
    // Where graphs have no room, the same comes of launches.
    let full = said(&folder, "full");
    assert!(full.contains("a double with") && !full.contains("a graph of"), "{full}");
    let lost = said(&folder, "lost");
    assert!(lost.contains("lost: ") && lost.contains("it is lost"), "{lost}");
    let plainer = said(&folder, "plainer");
    assert!(plainer.contains("plainer kernels in f32; cuda:0 has no kernels of tier base"), "{plainer}");
    let beside = said(&folder, "beside");
    assert!(beside.contains("neither minds the other"), "{beside}");
}

/// Prompts are read, contexts grow, blocks are begun, answers end: graphs are few, and most steps are one.
#[test]
fn a_decode_is_launched_as_few_graphs() {
    let folder = compiled("cuda-driver-decode", &[]);
    let text = said(&folder, "decode");
    let num_steps: usize =
        text.lines().find_map(|line| line.strip_suffix(" steps")?.parse().ok()).expect("it says how many");
    let num_made = text.matches("made a graph").count();
    let launched: Vec<&str> = text.lines().filter(|line| line.starts_with("a graph of")).collect();
    let num_same = launched.iter().filter(|line| line.contains(" 0 set")).count();
    let counts =
        format!("{num_steps} steps, {num_made} graphs, launched {} times, as they were {num_same}", launched.len());
    println!("{counts}");
    assert!(launched.len() * 3 > num_steps * 2 && num_made * 4 < launched.len(), "{counts}");
    for text in [text, said(&folder, "decode-on-units")] {
        // Weights, buffers, and what is small; pinned memory of the steps in flight. The rest is the driver's own.
        let (before, after) = text.split_once("all is there").expect("it says so");
        let count = |text: &str| {
            ["bytes of the device", "bytes of the host", "takes a module"].map(|what| text.matches(what).count())
        };
        let [of_device, of_host, _] = count(before);
        assert_eq!([of_device, of_host], [3, 2 * MAX_IN_FLIGHT], "{before}");
        assert_eq!(count(after), [0; 3], "in steps: {after}");
    }
}

#[test]
fn a_gpu_is_chosen_among_others_and_parts() {
    let folder = compiled("cuda-driver-choice", &[]);
    let text = said(&folder, "first-unwell");
    assert!(text.contains("cuda:1 is a double with") && text.contains("made a graph"), "{text}");
    for (kind, selector) in [("first-unwell", "0"), ("all-unwell", "")] {
        let text = said_of(&folder, kind, selector);
        assert!(text.contains("refused: GPU 0: the CUDA driver says: it has failed"), "{text}");
    }
    let text = said_of(&folder, "part", "mig-abab");
    assert!(text.contains("cuda:0 is a double MIG 1g.10gb with CUDA 12.2; MIG-abababab-"), "{text}");
}

/// Kernels of tensor cores are compiled beforehand for newer GPUs alone.
#[test]
fn an_nvrtc_that_cannot_be_used_is_left_alone_and_named() {
    let goes_on = "cuda:0 computes in f32: kernel mul_add_matrix mul_add_matrix: NVRTC";
    let none = "as it was compiled beforehand: there is none for compute capability 7.5";
    let text = said(&compiled("cuda-driver-turing", &[]), "turing");
    let lacks = "NVRTC, which compiles kernels, was not found";
    assert!([goes_on, lacks, none].iter().all(|of| text.contains(of)), "{text}");
    let folder = compiled("cuda-driver-half-nvrtc", &[]);
    let source = folder.join("nvrtc.cpp");
    std::fs::write(&source, HALF_AN_NVRTC).expect("tests have a folder");
    compile(&source, &folder.join("libnvrtc.so.12"), &[]);
    let text = said(&folder, "turing");
    let lacks = "NVRTC (libnvrtc.so.12) has no nvrtcGetPTX: install it anew, or set FULLBORE_NVRTC=0";
    assert!([goes_on, lacks, none].iter().all(|of| text.contains(of)), "{text}");
    // What was compiled beforehand serves.
    let text = said(&folder, "well");
    assert!(text.contains("made a graph"), "{text}");
}

#[test]
fn a_driver_that_cannot_be_used_is_named() {
    let folder = compiled("cuda-driver-unwell", &[]);
    for (kind, sentence) in [
        ("old", "the CUDA driver is for CUDA 11.4; 12.0 or newer is needed: update NVIDIA's driver"),
        ("none", "CUDA_ERROR_NO_DEVICE"),
        ("busy", "it is busy"),
        ("small", "the cache"),
        ("strange", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION): ptxas fatal: no such version"),
    ] {
        let text = said(&folder, kind);
        assert!(text.contains("refused: ") && text.contains(sentence), "{kind}: {text}");
    }
    // Where the machine has one of its own, what is no library is found before it.
    let none = empty_folder("no-driver");
    ["libcuda.so", "libcuda.so.1"].iter().for_each(|name| std::fs::write(none.join(name), "none").expect("a folder"));
    let text = said(&none, "");
    let sentence = "refused: there is no CUDA driver (libcuda.so.1, nvcuda.dll): NVIDIA's driver is not installed";
    assert!(text.contains(sentence), "{text}");
    let folder = compiled("cuda-driver-without", &["-DWITHOUT_GRAPHS"]);
    let text = said(&folder, "well");
    assert!(text.contains("refused: the CUDA driver has no cuGraphLaunch"), "{text}");
}
