//! Matmul kernels on real drivers, and tables of them: each kernel is near the cpu, any table gives the same bits, a
//! start takes what was kept, and a device that was lost has it still. Needs Vulkan drivers: fails without one. What is
//! measured is `benches/src/tune.rs`'s to test.

use std::fs;
use std::path::PathBuf;

use fullbore::args::DeviceArgs;
use fullbore::devices;
use fullbore::tuning::{SavedTuning, cost_of, tuned};
use fullbore_engine::backend::Backend;
use fullbore_engine::backend::wgpu::{ArithmeticChoice, Fault, Features, Tier, WgpuBackend, WgpuOptions};
use fullbore_engine::op::{MatMul, Op};
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::tuning::{MatMulLine, MatMulShape, TunedMatMul};
use fullbore_engine::verify::mat_mul::by_kernel;
use fullbore_engine::verify::{Case, every_mat_mul_kernel};

use crate::device::Device;
use crate::ops::device_ids;
use crate::random::Random;

const F32: ArithmeticChoice = ArithmeticChoice::F32;
const SHAPE: MatMulShape = MatMulShape { format: WeightFormat::Q4_0, rows: 70, cols: 1312 };

fn open(tier: Option<Tier>, arithmetic: ArithmeticChoice, faults: Vec<Fault>) -> Box<dyn Backend> {
    let selector = device_ids()[0].clone();
    let options = WgpuOptions { selector, tier, arithmetic, faults, checked: true, ..WgpuOptions::default() };
    Box::new(WgpuBackend::open(&options).expect("a listed device opens"))
}

/// A folder of a test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        Folder(std::env::temp_dir().join(format!("fullbore-tuned-{name}-{}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Every arithmetic that this driver has, on the plainest tier that has it: software Vulkan takes seconds to compile a
/// kernel for GPUs, and has no matrix units.
fn kinds() -> Vec<(Tier, ArithmeticChoice)> {
    let has = |tier, arithmetic: ArithmeticChoice| {
        open(Some(tier), arithmetic, Vec::new()).info().arithmetic == arithmetic.name()
    };
    let first = |arithmetic| Tier::ALL.into_iter().find(|&tier| has(tier, arithmetic)).map(|tier| (tier, arithmetic));
    ArithmeticChoice::ALL.into_iter().filter_map(first).chain([(Tier::Lavapipe, F32)]).collect()
}

#[test]
fn every_table_gives_the_same_bits_in_f32_and_in_f16_and_every_kernel_is_near_the_cpu() {
    for (tier, arithmetic) in kinds() {
        let name = format!("{} {}", tier.name(), arithmetic.name());
        let mut device = Device::new(open(Some(tier), arithmetic, Vec::new()));
        let weight = device.weight(SHAPE.format, SHAPE.rows, SHAPE.cols, 9);
        let x = Random::new(8).floats(70 * SHAPE.cols as usize);
        let x = device.f32(70, SHAPE.cols, &x);
        let product = |device: &mut Device, m| {
            let (x, out) = (x.first_rows(m), device.unwritten(m, SHAPE.rows));
            device.run(&[Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out })], &[out])
        };
        let own = product(&mut device, 70);
        let has_one_order = [ArithmeticChoice::F32, ArithmeticChoice::F16].contains(&arithmetic);
        for kernel in device.backend().mat_mul_kernels(SHAPE.format).into_iter().filter(|_| has_one_order) {
            for fills in [false, true] {
                let [line] = MatMulLine::only(&kernel.name);
                let first = MatMulLine { max_rows: Some(2), ..line.clone() };
                let table = [first, MatMulLine { fills, ..line }];
                device.backend().set_mat_mul_table(SHAPE, &table).expect("its own kernel");
                for m in [1, 5, 70] {
                    let words = product(&mut device, m);
                    assert!(words[..] == own[..words.len()], "{name}: {} M {m} fills {fills}", kernel.name);
                }
            }
        }
        // The same kernels against the cpu.
        let cases = every_mat_mul_kernel(device.backend(), &[SHAPE.format]);
        let twins = Device::twin().outputs(&cases);
        device.assert_near(&cases, &twins, &name);
    }
}

/// How codes become bytes is a text of its own.
#[test]
fn integer_dot_products_are_near_the_cpu_in_every_format() {
    let mut device = Device::new(open(Some(Tier::Base), ArithmeticChoice::IntegerDot, Vec::new()));
    let kernels = WeightFormat::ALL.map(|format| (format, device.backend().mat_mul_kernels(format)));
    let codes = kernels.iter().filter(|(_, kernels)| kernels[1].name.starts_with("integer"));
    let cases: Vec<Case> = codes.map(|(format, kernels)| by_kernel(*format, &kernels[1])).collect();
    assert_eq!(cases.len(), WeightFormat::ALL.len() - 3, "all but floats");
    let twins = Device::twin().outputs(&cases);
    device.assert_near(&cases, &twins, "integer-dot");
}

#[test]
fn plainer_kernels_compute_in_f32_first_and_then_on_another_tier() {
    let arithmetic_and_tier = |backend: &dyn Backend| (backend.info().arithmetic.clone(), backend.info().tier.clone());
    let first = open(Some(Tier::Subgroup), ArithmeticChoice::F16, Vec::new());
    assert_eq!(arithmetic_and_tier(first.as_ref()), ("f16".to_owned(), "subgroup".to_owned()));
    let (mut info, wanted) = (first.info().clone(), DeviceArgs::new("auto"));
    for expected in ["subgroup", "base"] {
        let next = devices::plainer(&info, &wanted).expect("there are some").expect("the device opens");
        assert_eq!(arithmetic_and_tier(next.as_ref()), ("f32".to_owned(), expected.to_owned()));
        info = next.info().clone();
    }
    assert!(devices::plainer(&info, &wanted).is_none());
    let without = Features::SHADER_F16;
    let options = WgpuOptions { selector: device_ids()[0].clone(), tier: Some(Tier::Base), without, ..f16() };
    let masked = WgpuBackend::open(&options).expect("a listed device opens");
    assert_eq!(masked.info().arithmetic, "f32", "no halves, no arithmetic in them");
}

fn f16() -> WgpuOptions {
    WgpuOptions { arithmetic: ArithmeticChoice::F16, ..WgpuOptions::default() }
}

/// A table that is not the device's own.
fn table(backend: &dyn Backend) -> Vec<MatMulLine> {
    let kernels = backend.mat_mul_kernels(SHAPE.format);
    let line = |max_rows, index: usize| MatMulLine { max_rows, kernel: kernels[index].name.clone(), fills: true };
    vec![line(Some(3), 1), line(None, 0)]
}

fn found(table: Vec<MatMulLine>) -> TunedMatMul {
    TunedMatMul { shape: SHAPE, table, times: vec![(1, 4e4), (256, 9e5)] }
}

#[test]
fn the_scheduler_begins_with_what_tuned_products_take() {
    let folder = Folder::new("cost");
    let backend = open(None, F32, Vec::new());
    let saved = SavedTuning::new(&folder.0, backend.info()).expect("it has a choice");
    let products = (vec![SHAPE, SHAPE], SHAPE);
    let start = |backend| tuned(backend, &DeviceArgs::new("auto"), &folder.0, &[SHAPE], true).expect("it is there");
    let (backend, found_before) = start(backend);
    assert_eq!(cost_of(&found_before, &products), None, "nothing is tuned");
    saved.keep(&[found(table(backend.as_ref()))]).expect("a folder to write to");
    let (_, used) = start(backend);
    let known = cost_of(&used, &products).expect("every product is tuned");
    assert_eq!((known.curve()[0], known.curve()[8]), (8e4, 1.8e6));
    let other = MatMulShape { rows: 71, ..SHAPE };
    assert_eq!(cost_of(&used, &(vec![SHAPE], other)), None, "of no such output layer");
}

#[test]
fn a_start_takes_what_was_kept_and_a_lost_device_has_it_still() {
    let folder = Folder::new("start");
    let backend = open(None, F32, Vec::new());
    let (own, kept) = (backend.mat_mul_table(SHAPE), table(backend.as_ref()));
    let saved = SavedTuning::new(&folder.0, backend.info()).expect("it has a choice");
    let start = |shapes: &[MatMulShape]| {
        let started = tuned(open(None, F32, Vec::new()), &DeviceArgs::new("auto"), &folder.0, shapes, true);
        started.expect("the device is there").0.mat_mul_table(SHAPE)
    };
    assert_eq!(start(&[SHAPE]), own, "nothing is kept");
    saved.keep(&[found(kept.clone())]).expect("a folder to write to");
    assert_eq!(start(&[SHAPE]), kept);
    assert_eq!(start(&[MatMulShape { rows: 71, ..SHAPE }]), own, "of no weight of this model");

    let started = tuned(backend, &DeviceArgs::new("auto"), &folder.0, &[SHAPE], true);
    let (mut backend, _) = started.expect("the device is there");
    backend.reopen().expect("the same device");
    assert_eq!(backend.mat_mul_table(SHAPE), kept);

    let unknown = MatMulLine::only("split 5x32").to_vec();
    saved.keep(&[found(unknown)]).expect("a folder to write to");
    assert_eq!(start(&[SHAPE]), own, "no such kernel");
    fs::write(saved.path(), "{").expect("a file");
    assert_eq!(start(&[SHAPE]), own, "a damaged file");
}

#[test]
fn a_tuned_kernel_that_is_wrong_is_left_out_at_start() {
    let folder = Folder::new("wrong");
    let right = open(Some(Tier::Base), F32, Vec::new());
    let (own, kept) = (right.mat_mul_table(SHAPE), table(right.as_ref()));
    let saved = SavedTuning::new(&folder.0, right.info()).expect("it has a choice");
    saved.keep(&[found(kept.clone())]).expect("a folder to write to");
    let start = |verifies| {
        let fault = Fault {
            tier: Tier::Base,
            kernel: "mat_mul",
            from: "var of_span = vec4(0.0)",
            to: "var of_span = vec4(0.5)",
        };
        let backend =
            tuned(open(Some(Tier::Base), F32, vec![fault]), &DeviceArgs::new("auto"), &folder.0, &[SHAPE], verifies);
        backend.expect("the device is there").0.mat_mul_table(SHAPE)
    };
    assert_eq!(start(true), own);
    assert_eq!(start(false), kept);
}
