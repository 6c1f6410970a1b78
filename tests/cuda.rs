//! The CUDA backend without a GPU: its kernels run on the host, thread by thread, and compile for GPUs. Needs a C++
//! compiler; and NVRTC and `ptxas`, which `make test` fetches: fails without them.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use fullbore_cuda_kernels::host::Host;
use fullbore_cuda_kernels::{Module, compile};
use fullbore_engine::backend::cuda::kernel::Kernel;
use fullbore_engine::backend::cuda::{Arithmetic, CudaBackend};
use fullbore_engine::backend::{Backend, DeviceInfo};
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::verify::{Case, every_case, every_mat_mul_kernel};

use crate::device::{Device, assert_rows_do_not_depend_on_m};
use crate::{golden, tiny};

/// The backend as a GPU would have it, on the host; threads and blocks first to last, or last to first.
pub fn on_host(reversed: bool) -> Box<dyn Backend> {
    computing_in(Arithmetic::F32, reversed)
}

fn computing_in(arithmetic: Arithmetic, reversed: bool) -> Box<dyn Backend> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda");
    let host = Host::open(&folder, reversed).unwrap_or_else(|error| panic!("{error}"));
    let info = DeviceInfo {
        id: "cuda on the host".to_owned(),
        tier: "host".to_owned(),
        max_buffer_bytes: u64::MAX,
        ..DeviceInfo::default()
    };
    Box::new(CudaBackend::on(Box::new(host), info, arithmetic))
}

fn is_full() -> bool {
    std::env::var_os("FULLBORE_TEST_FULL").is_some()
}

#[test]
fn every_op_is_near_its_twin_in_both_orders() {
    let cases = every_case();
    let twins = Device::twin().outputs(&cases);
    for reversed in [false, true] {
        Device::new(on_host(reversed)).assert_near(&cases, &twins, &format!("reversed {reversed}"));
    }
}

#[test]
fn tensor_cores_are_near_their_twin_in_both_orders() {
    let cases: Vec<Case> = every_case().into_iter().filter(|case| case.op == "mat_mul").collect();
    let twins = Device::twin().outputs(&cases);
    for reversed in [false, true] {
        let backend = computing_in(Arithmetic::MatrixUnits, reversed);
        Device::new(backend).assert_near(&cases, &twins, &format!("reversed {reversed}"));
    }
}

#[test]
fn every_matmul_kernel_that_a_table_may_name_is_right() {
    let backend = computing_in(Arithmetic::MatrixUnits, false);
    let cases = every_mat_mul_kernel(backend.as_ref());
    // The twin has no kernels to choose from, and takes any table.
    let twins = Device::twin().outputs(&cases);
    Device::new(backend).assert_near(&cases, &twins, "on the host");
}

/// 16 runs of units and fewer, whole and not, and every kernel beside its neighbours.
#[test]
fn rows_of_a_product_do_not_depend_on_how_many_there_are() {
    let device = &mut Device::new(on_host(false));
    for (format, n, k) in [(WeightFormat::Q4_0, 70, 1056), (WeightFormat::F16, 40, 68), (WeightFormat::Q6K, 33, 768)] {
        assert_rows_do_not_depend_on_m(device, format, n, k, 66, "on the host");
    }
}

#[test]
fn every_family_agrees_with_transformers() {
    tiny::assert_every_family_agrees(&|| on_host(false));
}

/// Some minutes.
#[test]
fn smollm2_follows_both_references() {
    if !is_full() {
        return;
    }
    let (file, name, text) = golden::MODELS[0];
    golden::follow(file, name, text, on_host(false), golden::Share { num_cases: 1, max_tokens: 8 });
}

/// Every module once. How a format is decoded is the same text in both modules of weights, so that a few stand for all.
fn modules() -> Vec<(Module, bool)> {
    let some = [WeightFormat::BF16, WeightFormat::Q4_0, WeightFormat::Q5K];
    let mut modules = Vec::new();
    for kernel in Kernel::all() {
        let is_hot = matches!(kernel, Kernel::MatMul(..) | Kernel::Attention(..));
        match kernel {
            Kernel::Embed(format) | Kernel::MatMul(format, _) if !is_full() && !some.contains(&format) => continue,
            _ => {}
        }
        let (module, _) = kernel.source();
        if !modules.iter().any(|(other, _)| *other == module) {
            modules.push((module, is_hot));
        }
    }
    modules
}

/// PTX of a module for a GPU, and what `ptxas` makes of it.
fn assemble(module: &Module, architecture: u32, is_hot: bool) -> Result<(), String> {
    let ptxas = std::env::var_os("PTXAS").ok_or("no ptxas: run `make test`, which fetches it")?;
    let ptx = compile(module, architecture)?;
    let place = format!("{}-sm_{architecture}.ptx", module.name().replace(':', "-"));
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join(place);
    std::fs::write(&place, ptx.strip_suffix(b"\0").unwrap_or(&ptx)).map_err(|error| error.to_string())?;
    let mut command = Command::new(ptxas);
    command.args(["-v", "-o", "/dev/null"]).arg(format!("-arch=sm_{architecture}")).arg(&place);
    let output = command.output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(said.into_owned());
    }
    let spills = |line: &&str| line.contains("spill stores") && !line.contains(" 0 bytes spill stores");
    match said.lines().find(spills) {
        Some(line) if is_hot => Err(format!("registers are spilled: {line}")),
        _ => std::fs::remove_file(&place).map_err(|error| error.to_string()),
    }
}

/// What is not hot for the oldest one alone, but for the full run.
#[test]
fn every_kernel_compiles_for_each_generation_and_no_hot_one_spills() {
    let work: Vec<(Module, u32, bool)> = modules()
        .into_iter()
        .flat_map(|(module, is_hot)| {
            let architectures = if is_hot || is_full() { &[75, 80, 90][..] } else { &[75] };
            architectures.iter().map(move |architecture| (module.clone(), *architecture, is_hot))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut failed = Vec::new();
        while let Some((module, architecture, is_hot)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(reason) = assemble(module, *architecture, *is_hot) {
                failed.push(format!("{} for sm_{architecture}: {reason}", module.name()));
            }
        }
        failed
    };
    let failed = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no worker panics")).collect::<Vec<String>>()
    });
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn a_machine_without_a_gpu_is_told_why() {
    // A machine that has one says nothing of what is missing.
    if let Err(error) = CudaBackend::open("0", Arithmetic::F32) {
        let text = error.to_string();
        assert!(text.contains("CUDA"), "{text}");
    }
}
