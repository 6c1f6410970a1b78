//! The CUDA backend without a GPU: its kernels run on the host, thread by thread, and compile for GPUs. Needs a C++
//! compiler; and NVRTC and `ptxas`, which `make test` fetches: fails without them.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use fullbore_cuda_kernels::host::Host;
use fullbore_cuda_kernels::ptx::{Ptx, find, pack, shipped, shipped_architecture};
use fullbore_cuda_kernels::{Module, compile};
use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::cuda::kernel::{Kernel, MatMulVariant};
use fullbore_engine::backend::cuda::{Arithmetic, CudaBackend};
use fullbore_engine::backend::{Backend, DeviceInfo, LoadError, RowSource, WeightSpec};
use fullbore_engine::op::{Activation, AddNorm, GatedAct, MatMul, Op, RmsNorm};
use fullbore_engine::tensor::{Weight, WeightFormat};
use fullbore_engine::tuning::{MatMulLine, MatMulShape};
use fullbore_engine::verify::{Case, TWO_FORMATS, every_case, every_mat_mul_kernel};

use crate::device::{Device, assert_rows_do_not_depend_on_m};
use crate::random::Random;
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
    let is_on_them = |case: &Case| matches!(case.op, "mat_mul" | "attention" | "mul_add");
    let cases: Vec<Case> = every_case().into_iter().filter(is_on_them).collect();
    let twins = Device::twin().outputs(&cases);
    for reversed in [false, true] {
        let backend = computing_in(Arithmetic::MatrixUnits, reversed);
        Device::new(backend).assert_near(&cases, &twins, &format!("reversed {reversed}"));
    }
}

#[test]
fn every_matmul_kernel_that_a_table_may_name_is_right() {
    let backend = computing_in(Arithmetic::MatrixUnits, false);
    let cases = every_mat_mul_kernel(backend.as_ref(), &TWO_FORMATS);
    // The twin has no kernels to choose from, and takes any table.
    let twins = Device::twin().outputs(&cases);
    Device::new(backend).assert_near(&cases, &twins, "on the host");
}

/// What a norm or an activation leaves in f16 for the product behind it is what is made of it alone.
#[test]
fn activations_in_f16_are_the_same_from_wherever() {
    let run = |together: bool| {
        let device = &mut Device::new(computing_in(Arithmetic::MatrixUnits, false));
        let random = &mut Random::new(5);
        let (m, dim, ffn) = (19, 96, 160);
        let up = device.weight(WeightFormat::Q4_0, 2 * ffn, dim, 4);
        let down = device.weight(WeightFormat::Q8_0, dim, ffn, 5);
        let x = device.f32(m, dim, &random.floats((m * dim) as usize));
        let norm = device.f32(1, dim, &random.floats(dim as usize));
        let shapes = [(m, dim), (m, 2 * ffn), (m, ffn), (m, dim), (m, dim)];
        let [normed, gate_up, act, projected, again] = shapes.map(|(rows, cols)| device.unwritten(rows, cols));
        let product = |x, weight, out| Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out });
        let (eps, activation) = (1e-5, Activation::Silu);
        let ops = [
            Op::RmsNorm(RmsNorm { x, weight: norm, eps, out: normed }),
            product(normed, up, gate_up),
            Op::GatedAct(GatedAct { gate_up, activation, out: act }),
            product(act, down, projected),
            Op::AddNorm(AddNorm { x: projected, y: x, post_weight: None, rows: None, weight: norm, eps, out: again }),
            product(again, up, gate_up),
        ];
        if !together {
            ops.iter().for_each(|op| drop(device.run(&[*op], &[x])));
        }
        device.run(if together { &ops[..] } else { &[] }, &[projected, gate_up])
    };
    assert_eq!(run(true), run(false));
}

/// 16 runs of units and fewer, whole and not, and every kernel beside its neighbours.
#[test]
fn rows_of_a_product_do_not_depend_on_how_many_there_are() {
    let device = &mut Device::new(on_host(false));
    for (format, n, k) in [(WeightFormat::Q4_0, 70, 1056), (WeightFormat::F16, 40, 68), (WeightFormat::Q6K, 33, 768)] {
        assert_rows_do_not_depend_on_m(device, format, n, k, 66, "on the host");
    }
}

/// Up to 64: K is divided in the same way, and added in the same order.
#[test]
fn few_rows_of_a_product_on_tensor_cores_do_not_depend_on_how_many_there_are() {
    let device = &mut Device::new(computing_in(Arithmetic::MatrixUnits, false));
    for (format, n, k) in [(WeightFormat::Q4_0, 70, 1056), (WeightFormat::F16, 40, 68), (WeightFormat::Q6K, 33, 768)] {
        assert_rows_do_not_depend_on_m(device, format, n, k, 64, "on the host's tensor cores");
    }
}

#[test]
fn every_family_agrees_with_transformers() {
    tiny::assert_every_family_agrees(&tiny::EXACT, &|_| on_host(false));
}

/// Whole models on tensor cores: as they go there, and with all rows of all products by one kernel.
#[test]
fn every_family_agrees_with_transformers_on_tensor_cores() {
    for kernel in [None, Some("mat_mul_matrix_16"), Some("mat_mul_matrix_64"), Some("mat_mul_matrix_128")] {
        println!("{kernel:?}");
        let table = kernel.map_or(Vec::new(), |kernel| MatMulLine::only(kernel).to_vec());
        let open = |_: u32| -> Box<dyn Backend> {
            let table = table.clone();
            Box::new(ByTable { inner: computing_in(Arithmetic::MatrixUnits, false), table })
        };
        tiny::assert_every_family_agrees(&tiny::OF_HALVES, &open);
    }
}

/// Every weight's products go by one table.
struct ByTable {
    inner: Box<dyn Backend>,
    table: Vec<MatMulLine>,
}

impl Around for ByTable {
    fn inner(&self) -> &dyn Backend {
        self.inner.as_ref()
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        self.inner.as_mut()
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        let WeightSpec { rows, cols, format, .. } = *spec;
        let shape = MatMulShape { format, rows, cols };
        self.inner.set_mat_mul_table(shape, &self.table).expect("kernels of this device");
        self.inner.load_weight(spec, source)
    }
}

/// Some minutes each.
#[test]
fn smollm2_follows_both_references() {
    follow_smollm2(Arithmetic::F32);
}

#[test]
fn smollm2_follows_both_references_on_tensor_cores() {
    follow_smollm2(Arithmetic::MatrixUnits);
}

fn follow_smollm2(arithmetic: Arithmetic) {
    if !is_full() {
        return;
    }
    let (file, name, text) = golden::MODELS[0];
    let share = golden::Share { num_cases: 1, max_tokens: 8 };
    golden::follow(file, name, text, computing_in(arithmetic, false), share);
}

/// Every module once, whatever the format.
fn modules() -> Vec<Module> {
    let mut modules: Vec<Module> = Vec::new();
    for (module, _) in Kernel::all().into_iter().map(Kernel::source) {
        if !modules.contains(&module) {
            modules.push(module);
        }
    }
    modules
}

/// What a GPU loads of a module without NVRTC, if there is such, else as NVRTC compiles it now.
fn ptx_of(module: &Module, architecture: u32) -> Result<Vec<u8>, String> {
    match find(module, architecture) {
        Some(shipped) if !is_full() => Ok(shipped.text.clone().into_bytes()),
        _ => compile(module, architecture).map(|text| text.strip_suffix(b"\0").unwrap_or(&text).to_vec()),
    }
}

/// What `ptxas` makes of a module's PTX for a GPU.
fn assemble(module: &Module, architecture: u32) -> Result<(), String> {
    let ptxas = std::env::var_os("PTXAS").ok_or("no ptxas: run `make test`, which fetches it")?;
    let place = format!("{}-sm_{architecture}.ptx", module.name().replace(':', "-"));
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join(place);
    std::fs::write(&place, ptx_of(module, architecture)?).map_err(|error| error.to_string())?;
    let mut command = Command::new(ptxas);
    command.args(["-v", "-o", "/dev/null"]).arg(format!("-arch=sm_{architecture}")).arg(&place);
    let output = command.output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(said.into_owned());
    }
    // What lies in local memory is as slow as what was spilled to it.
    let spills =
        |line: &&str| line.contains("stack frame") && !line.contains(" 0 bytes stack frame, 0 bytes spill stores");
    match said.lines().find(spills) {
        Some(line) => Err(format!("a stack, or registers that are spilled: {line}")),
        None => std::fs::remove_file(&place).map_err(|error| error.to_string()),
    }
}

/// What `worker` makes of each, in order.
fn on_both_cores<T: Sync, R: Send>(work: &[T], worker: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = work.get(index) else { return done };
            done.push((index, worker(piece)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2).map(|_| scope.spawn(run)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no worker panics")).collect::<Vec<(usize, R)>>()
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Hot or not. For Ampere and Hopper every module; for Turing, where that takes NVRTC, a few formats stand for all but
/// in the full run: how one is decoded is the same text in all modules of weights.
#[test]
fn every_kernel_compiles_for_each_generation_and_none_spills() {
    let some = [WeightFormat::BF16, WeightFormat::Q4_0, WeightFormat::Q5K];
    let few: Vec<Module> = some.map(|format| Kernel::MatMul(format, MatMulVariant::Matrix16).source().0).into();
    let is_taken = |module: &Module, architecture: u32| {
        is_full() || module.parts[0] != "weight" || find(module, architecture).is_some() || few.contains(module)
    };
    let all = modules().into_iter().flat_map(|module| [75, 80, 90].map(|of| (module.clone(), of)));
    let work: Vec<(Module, u32)> = all.filter(|(module, of)| is_taken(module, *of)).collect();
    let failed: Vec<String> = on_both_cores(&work, |(module, architecture)| {
        let failed = assemble(module, *architecture).err()?;
        Some(format!("{} for sm_{architecture}: {failed}", module.name()))
    })
    .into_iter()
    .flatten()
    .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The archive, written anew where `FULLBORE_REWRITE_PTX` is set, as `make ptx` does; some minutes.
#[test]
fn ptx_that_is_shipped_is_of_this_text() {
    let work: Vec<(Module, u32)> =
        modules().into_iter().map(|module| (module.clone(), shipped_architecture(&module))).collect();
    if std::env::var_os("FULLBORE_REWRITE_PTX").is_some() {
        let compiled = on_both_cores(&work, |(module, architecture)| {
            let mut text = compile(module, *architecture)?;
            text.pop_if(|last| *last == 0);
            let text = String::from_utf8(text).map_err(|error| error.to_string())?;
            Ok(Ptx { name: module.name(), architecture: *architecture, hash: module.text_hash(), text })
        });
        let all = compiled.into_iter().collect::<Result<Vec<Ptx>, String>>().expect("every module compiles");
        let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda-kernels/ptx.lzma");
        std::fs::write(place, pack(&all).expect("memory is written")).expect("the archive can be written");
        return;
    }
    assert_eq!(shipped().len(), work.len(), "`make ptx` was not run");
    for (module, architecture) in &work {
        let found = find(module, *architecture).map(|ptx| ptx.architecture);
        assert_eq!(found, Some(*architecture), "{}: `make ptx` was not run", module.name());
    }
    // NVRTC says the same, where that is not asked in full of what is small.
    let asked: Vec<_> = work.into_iter().filter(|(module, _)| is_full() || module.constants.is_empty()).collect();
    let otherwise = on_both_cores(&asked, |(module, architecture)| {
        let compiled = compile(module, *architecture).unwrap_or_else(|error| panic!("{error}"));
        let shipped = find(module, *architecture).expect("found above");
        (compiled.strip_suffix(b"\0") != Some(shipped.text.as_bytes())).then(|| module.name())
    });
    let otherwise: Vec<String> = otherwise.into_iter().flatten().collect();
    assert!(otherwise.is_empty(), "compiled otherwise: {otherwise:?}");
}
