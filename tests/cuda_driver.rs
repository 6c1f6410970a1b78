//! What calls the CUDA driver, against a double of it (`cuda_driver/driver.cpp`), well and unwell. Needs a C++
//! compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

use fullbore_engine::backend::cuda::{Arithmetic, CudaBackend};
use fullbore_engine::backend::{Backend, DeviceError};
use fullbore_engine::op::{MUL_ADD_ROUNDS, MulAdd, Op};
use fullbore_engine::recording::{BufferCopy, Recording};
use fullbore_engine::tensor::{BufferId, Tensor};

const KIND: &str = "FULLBORE_DRIVER";

/// The folder of a double, compiled anew.
fn compiled(name: &str, flags: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("tests have a folder");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_driver/driver.cpp");
    let mut command = Command::new("c++");
    command.args(["-std=c++17", "-O1", "-fPIC", "-shared", "-o"]).arg(folder.join("libcuda.so.1")).arg(source);
    let output = command.args(flags).output().expect("c++ is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder
}

/// What [`with_this_driver`] says in a process of its own, where a driver of a kind is the only one, and NVRTC is not.
fn said(folder: &Path, kind: &str) -> String {
    let mut command = Command::new(std::env::current_exe().expect("this test has a file"));
    command.args(["--exact", "--nocapture", "cuda_driver::with_this_driver"]);
    let output = command.env(KIND, kind).env("LD_LIBRARY_PATH", folder).output().expect("it runs");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed") && !text.contains("panicked"), "{kind}: {text}");
    text
}

/// The part of a test that has a process of its own; else it does nothing.
#[test]
fn with_this_driver() {
    let Ok(kind) = std::env::var(KIND) else { return };
    let mut backend = match CudaBackend::open("", Arithmetic::F32) {
        Ok(backend) => backend,
        Err(error) => return println!("refused: {error}"),
    };
    println!("{} with {}", backend.info().name, backend.info().driver);
    if kind == "small" {
        let error = backend.alloc("the cache", 2 << 20).expect_err("it is small");
        return println!("refused: {error}");
    }
    if kind == "lost" {
        let places = places(&mut backend);
        let error = compute(&mut backend, places).expect_err("it is lost");
        println!("lost: {error}");
        backend.reopen().expect("it is there again");
    }
    // As launches, captured as a graph, and as the graph that was captured.
    let places = places(&mut backend);
    for _ in 0..4 {
        let sums = compute(&mut backend, places).expect("it is well");
        // x / 2 + 1 again and again, from 0, 1, 2 on.
        let expected = (0..1024).map(|x| (0..12 * MUL_ADD_ROUNDS).fold(x as f32, |x, _| x * 0.5 + 1.0));
        assert!(sums.into_iter().eq(expected), "another result");
    }
}

/// Where numbers are brought, and where they are computed with.
fn places(backend: &mut CudaBackend) -> [BufferId; 2] {
    ["upload", "x"].map(|label| backend.alloc(label, 4096).expect("it has memory"))
}

/// 1,024 numbers through two buffers and twelve kernels.
fn compute(backend: &mut CudaBackend, [upload, buffer]: [BufferId; 2]) -> Result<Vec<f32>, DeviceError> {
    let mut recording = Recording::new(upload);
    recording.upload.extend((0..1024).map(|x| (x as f32).to_bits()));
    recording.copy(BufferCopy { from: upload, from_bytes: 0, to: buffer, to_bytes: 0, size_bytes: 4096 });
    let x = Tensor { buffer, ..Tensor::f32(upload, 1, 1024) };
    for _ in 0..12 {
        recording.push(Op::MulAdd(MulAdd { x, scale: 0.5, offset: 1.0, rounds: MUL_ADD_ROUNDS }));
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
    assert_eq!(well.matches("a graph of 12 launches").count(), 3, "{well}");
    // Where graphs have no room, the same comes of launches.
    let full = said(&folder, "full");
    assert!(full.contains("a double with") && !full.contains("a graph of"), "{full}");
    let lost = said(&folder, "lost");
    assert!(lost.contains("lost: ") && lost.contains("it is lost"), "{lost}");
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
    // Where the machine has one of its own, that is found.
    let none = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-driver");
    let text = said(&none, "");
    let sentence = "refused: there is no CUDA driver (libcuda.so.1, nvcuda.dll): NVIDIA's driver is not installed";
    assert!(text.contains(sentence) || text.contains(" with CUDA "), "{text}");
    let folder = compiled("cuda-driver-without", &["-DWITHOUT_GRAPHS"]);
    let text = said(&folder, "well");
    assert!(text.contains("refused: the CUDA driver has no cuGraphLaunch"), "{text}");
}
