//! Tables of matmul kernels on real drivers: any gives the same bits, a start takes what was kept, and a device that
//! was lost has it still. Needs Vulkan drivers: fails without one. What is measured is `benches/src/tune.rs`'s to test.

use std::fs;
use std::path::PathBuf;

use fullbore::args::DeviceArgs;
use fullbore::tuning::{SavedTuning, tuned};
use fullbore_engine::backend::Backend;
use fullbore_engine::backend::wgpu::{Fault, Tier, WgpuBackend, WgpuOptions};
use fullbore_engine::op::{MatMul, Op};
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::tuning::{MatMulLine, MatMulShape};
use fullbore_engine::verify::every_mat_mul_kernel;

use crate::device::Device;
use crate::ops::device_ids;
use crate::random::Random;

const SHAPE: MatMulShape = MatMulShape { format: WeightFormat::Q4_0, rows: 70, cols: 512 };

fn open(tier: Option<Tier>, faults: Vec<Fault>) -> Box<dyn Backend> {
    let options = WgpuOptions { selector: device_ids()[0].clone(), tier, faults, ..WgpuOptions::default() };
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

#[test]
fn every_table_gives_the_same_bits() {
    for tier in Tier::ALL {
        let mut device = Device::new(open(Some(tier), Vec::new()));
        let weight = device.weight(SHAPE.format, SHAPE.rows, SHAPE.cols, 9);
        let x = Random::new(8).floats(70 * SHAPE.cols as usize);
        let x = device.f32(70, SHAPE.cols, &x);
        let product = |device: &mut Device, m| {
            let (x, out) = (x.first_rows(m), device.unwritten(m, SHAPE.rows));
            device.run(&[Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out })], &[out])
        };
        let own = product(&mut device, 70);
        for kernel in device.backend().mat_mul_kernels(SHAPE.format) {
            for fills in [false, true] {
                let [line] = MatMulLine::only(&kernel.name);
                let first = MatMulLine { max_rows: Some(2), ..line.clone() };
                let table = [first, MatMulLine { fills, ..line }];
                device.backend().set_mat_mul_table(SHAPE, &table).expect("its own kernel");
                for m in [1, 5, 70] {
                    let words = product(&mut device, m);
                    assert!(words[..] == own[..words.len()], "{} {} M {m} fills {fills}", tier.name(), kernel.name);
                }
            }
        }
        // Those cases hold the same kernels against the cpu.
        let cases = every_mat_mul_kernel(device.backend());
        let twins = Device::twin().outputs(&cases);
        device.assert_near(&cases, &twins, tier.name());
    }
}

/// A table that is not the device's own.
fn table(backend: &dyn Backend) -> Vec<MatMulLine> {
    let kernels = backend.mat_mul_kernels(SHAPE.format);
    let line = |max_rows, index: usize| MatMulLine { max_rows, kernel: kernels[index].name.clone(), fills: true };
    vec![line(Some(3), 1), line(None, 0)]
}

#[test]
fn a_start_takes_what_was_kept_and_a_lost_device_has_it_still() {
    let folder = Folder::new("start");
    let backend = open(None, Vec::new());
    let (own, kept) = (backend.mat_mul_table(SHAPE), table(backend.as_ref()));
    let saved = SavedTuning::new(&folder.0, backend.info()).expect("it has a choice");
    let start = |shapes: &[MatMulShape]| {
        let backend = tuned(open(None, Vec::new()), &DeviceArgs::new("auto"), &folder.0, shapes, true)
            .expect("the device is there");
        backend.mat_mul_table(SHAPE)
    };
    assert_eq!(start(&[SHAPE]), own, "nothing is kept");
    saved.keep(&vec![(SHAPE, kept.clone())]).expect("a folder to write to");
    assert_eq!(start(&[SHAPE]), kept);
    assert_eq!(start(&[MatMulShape { rows: 71, ..SHAPE }]), own, "of no weight of this model");

    let mut backend = tuned(backend, &DeviceArgs::new("auto"), &folder.0, &[SHAPE], true).expect("the device is there");
    backend.reopen().expect("the same device");
    assert_eq!(backend.mat_mul_table(SHAPE), kept);

    let unknown = MatMulLine::only("split 5x32").to_vec();
    saved.keep(&vec![(SHAPE, unknown)]).expect("a folder to write to");
    assert_eq!(start(&[SHAPE]), own, "no such kernel");
    fs::write(saved.path(), "{").expect("a file");
    assert_eq!(start(&[SHAPE]), own, "a damaged file");
}

#[test]
fn a_tuned_kernel_that_is_wrong_is_left_out_at_start() {
    let folder = Folder::new("wrong");
    let right = open(Some(Tier::Base), Vec::new());
    let (own, kept) = (right.mat_mul_table(SHAPE), table(right.as_ref()));
    let saved = SavedTuning::new(&folder.0, right.info()).expect("it has a choice");
    saved.keep(&vec![(SHAPE, kept.clone())]).expect("a folder to write to");
    let start = |verifies| {
        let fault =
            Fault { tier: Tier::Base, kernel: "mat_mul", from: "var total = vec4(0.0)", to: "var total = vec4(0.5)" };
        let backend =
            tuned(open(Some(Tier::Base), vec![fault]), &DeviceArgs::new("auto"), &folder.0, &[SHAPE], verifies);
        backend.expect("the device is there").mat_mul_table(SHAPE)
    };
    assert_eq!(start(true), own);
    assert_eq!(start(false), kept);
}
