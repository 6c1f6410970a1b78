//! The portability matrix: every op on every Vulkan driver in every lane against the cpu twins, and both real models
//! against the references of `golden.rs`. Needs Vulkan drivers (`make test` fetches two versions of lavapipe): fails
//! without one.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use fullbore_engine::backend::wgpu::ArithmeticChoice::{self, F16, F32, IntegerDot};
use fullbore_engine::backend::wgpu::{Features, Tier, WgpuBackend, WgpuOptions, devices, mask_to_webgpu};
use fullbore_engine::backend::{Backend, DeviceInfo};
use fullbore_engine::op::{MulAdd, Op};
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::Tensor;
use fullbore_engine::verify::mat_mul::many_workgroups;
use fullbore_engine::verify::sample::sample;
use fullbore_engine::verify::{Case, every_case};

use crate::device::Device;
use crate::golden;

fn open(selector: &str) -> WgpuBackend {
    let options = WgpuOptions { selector: selector.to_owned(), checked: true, ..WgpuOptions::default() };
    WgpuBackend::open(&options).unwrap_or_else(|error| panic!("{error}"))
}

fn found() -> Vec<DeviceInfo> {
    let found = devices();
    assert!(!found.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    found
}

pub fn device_ids() -> Vec<String> {
    found().into_iter().map(|device| device.id).collect()
}

/// Each driver lies in a folder that is called as its version of Mesa is.
#[test]
fn tests_run_on_two_versions_of_software_vulkan() {
    let files = std::env::var_os("VK_DRIVER_FILES").expect("no drivers: run `make test`, which fetches them");
    let folders = std::env::split_paths(&files).filter_map(|file| Some(file.parent()?.file_name()?.to_owned()));
    let versions: BTreeSet<String> = folders.map(|folder| folder.to_string_lossy().into_owned()).collect();
    let drivers: Vec<String> = found().into_iter().map(|device| device.driver).collect();
    assert_eq!((versions.len(), drivers.len()), (2, 2), "{versions:?}: {drivers:?}");
    for version in versions {
        let is_seen = drivers.iter().any(|driver| driver.contains(&format!("Mesa {version}")));
        assert!(is_seen, "Mesa {version} shows no device: remove target/lavapipe, and run `make test`; {drivers:?}");
    }
}

/// What a driver is opened as.
struct Lane {
    name: &'static str,
    options: WgpuOptions,
    /// What it is granted of what was asked for.
    arithmetic: ArithmeticChoice,
    /// Whether every op is tried on it.
    has_ops: bool,
    /// What it follows of a golden, if anything. Without software Vulkan's own tier the whole would take minutes.
    golden: Option<golden::Share>,
}

/// The kernels of other arithmetic than f32 have tests of their own in `tuning.rs`.
fn lanes(device: &DeviceInfo) -> Vec<Lane> {
    let options = |tier, checked| {
        let selector = device.id.clone();
        WgpuOptions { selector, tier, checked, ..WgpuOptions::default() }
    };
    // Every dispatch is submitted alone, and what can be divided is.
    let divided = |options| WgpuOptions { max_submit: Some(Duration::ZERO), ..options };
    let masked = |options| WgpuOptions { mask: Some(mask_to_webgpu), ..options };
    let in_f16 = |options| WgpuOptions { arithmetic: F16, ..options };
    let in_bytes = WgpuOptions { arithmetic: IntegerDot, ..options(Some(Tier::Subgroup), true) };
    let without_f16 = |options| WgpuOptions { without: Features::SHADER_F16, ..in_f16(options) };
    let lane = |name, options, golden| Lane { name, options, arithmetic: F32, has_ops: true, golden };
    let of_arithmetic = |name, options: WgpuOptions, golden| Lane {
        arithmetic: options.arithmetic,
        has_ops: false,
        ..lane(name, options, golden)
    };
    let (whole, short) = (Some(golden::Share::WHOLE), Some(golden::Share { num_cases: 1, max_tokens: 8 }));
    let lanes = [
        lane("checked, in small submissions", divided(options(None, true)), whole),
        lane("as it is served", options(None, false), None),
        lane("wide subgroups", options(Some(Tier::Subgroup), true), short),
        lane("no subgroups", options(Some(Tier::Base), true), None),
        lane("WebGPU's limits", masked(options(None, false)), whole),
        lane("WebGPU's limits, f16 masked, no subgroups", masked(without_f16(options(Some(Tier::Base), true))), short),
        of_arithmetic("f16", in_f16(options(Some(Tier::Subgroup), true)), short),
        of_arithmetic("integer dot products", in_bytes, short),
    ];
    // The tiers for GPUs differ by little, and software Vulkan that is not lavapipe is too slow for several.
    let has_others = device.tier == Tier::Lavapipe.name();
    lanes.into_iter().filter(|lane| has_others || lane.options.tier.is_none()).collect()
}

impl Lane {
    /// The backend, and what it is called.
    fn open(&self) -> (String, WgpuBackend) {
        let backend = WgpuBackend::open(&self.options).unwrap_or_else(|error| panic!("{error}"));
        let info = backend.info();
        assert_eq!(info.arithmetic, self.arithmetic.name(), "{}: {}", info.id, self.name);
        (format!("{}, {}, tier {}: {}", info.id, info.driver, info.tier, self.name), backend)
    }
}

/// Software Vulkan takes seconds to compile the matmul kernels of one format for GPUs. How a format is decoded is the
/// same text on all tiers, so that a few stand for all here.
fn is_for_wide(case: &Case) -> bool {
    case.op != "mat_mul" || ["f16", "q4_0", "q5_k", "iq4_xs", "q4_0, q5_k"].contains(&case.variant.as_str())
}

#[test]
fn every_op_is_near_its_twin_on_every_driver_in_every_lane() {
    let (all, some): (Vec<Case>, Vec<Case>) = (every_case(), every_case().into_iter().filter(is_for_wide).collect());
    let (all_twins, some_twins) = (Device::twin().outputs(&all), Device::twin().outputs(&some));
    for lane in found().iter().flat_map(lanes).filter(|lane| lane.has_ops) {
        let (name, backend) = lane.open();
        let begun = Instant::now();
        let is_wide = backend.info().tier != Tier::Lavapipe.name() && std::env::var_os("FULLBORE_TEST_FULL").is_none();
        let (cases, twins) = if is_wide { (&some, &some_twins) } else { (&all, &all_twins) };
        Device::new(Box::new(backend)).assert_near(cases, twins, &name);
        println!("{name}: {:.1} s", begun.elapsed().as_secs_f64());
    }
}

/// SwiftShader has subgroups of 4, the fewest that there are, and no 16-bit storage. It is far too slow for a whole
/// model. Drivers are chosen when a process first asks for them, so that it takes one of its own.
#[test]
fn every_op_is_near_its_twin_on_swiftshader() {
    let driver = std::env::var_os("SWIFTSHADER_ICD").expect("no SwiftShader: run `make test`, which fetches it");
    let mut command = Command::new(std::env::current_exe().expect("this test has a file"));
    command.args(["--exact", "--nocapture", "ops::every_op_is_near_its_twin_on_every_driver_in_every_lane"]);
    let output = command.env("VK_DRIVER_FILES", driver).output().expect("it runs");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    println!("{text}");
    assert!(output.status.success() && text.contains("SwiftShader") && text.contains("1 passed"), "{text}");
}

/// Divided or whole, it gives the same.
#[test]
fn a_recording_goes_in_as_many_submissions_as_its_work_calls_for() {
    const NUM_OPS: u64 = 12;
    for id in device_ids() {
        let mut outputs = Vec::new();
        for (max_submit, expected) in [(None, 1..=1), (Some(Duration::ZERO), NUM_OPS..=NUM_OPS)] {
            let options = WgpuOptions { selector: id.clone(), max_submit, ..WgpuOptions::default() };
            let mut backend = WgpuBackend::open(&options).expect("a listed device opens");
            let upload = backend.alloc("upload", 4).expect("a few bytes");
            let buffer = backend.alloc("x", 4096).expect("a few bytes");
            let x = Tensor { buffer, ..Tensor::f32(upload, 1, 1024) };
            let mut recording = Recording::new(upload);
            for _ in 0..NUM_OPS {
                recording.push(Op::MulAdd(MulAdd { x, scale: 0.5, offset: 1.0, rounds: 8 }));
            }
            recording.downloads.push(x);
            let mut words = Vec::new();
            let ticket = backend.submit(&recording).expect("the device is there");
            backend.wait(ticket, &mut words).expect("the device is there");
            assert!(expected.contains(&backend.num_submissions()), "{id}: {} submissions", backend.num_submissions());
            outputs.push(words);
        }
        assert_eq!(outputs[0], outputs[1], "{id}");
        assert_ne!(outputs[0], vec![0; 4096], "{id}");
    }
}

#[test]
fn a_product_of_more_workgroups_than_a_row_has_is_whole_on_every_driver() {
    let cases = [many_workgroups()];
    let twins = Device::twin().outputs(&cases);
    for id in device_ids() {
        Device::new(Box::new(open(&id))).assert_near(&cases, &twins, &id);
    }
}

/// As many tokens as the largest vocabulary has, in one row more lanes' rounds than old software Vulkan takes.
#[test]
fn a_large_vocabulary_is_sampled_as_its_twin_does_on_every_driver() {
    const VOCAB: u32 = 262_144;
    let cases = [sample(VOCAB)];
    let twins = Device::twin().outputs(&cases);
    for id in device_ids() {
        Device::new(Box::new(open(&id))).assert_near(&cases, &twins, &id);
    }
}

#[test]
fn smollm2_follows_both_references_on_every_driver() {
    let (file, name, text) = golden::MODELS[0];
    for lane in found().iter().flat_map(lanes) {
        let Some(share) = lane.golden else { continue };
        let (lane_name, backend) = lane.open();
        let begun = Instant::now();
        let hold = if lane.arithmetic == IntegerDot { golden::compare_likelihood } else { golden::follow };
        hold(file, name, text, Box::new(backend), share);
        println!("{lane_name}: {:.1} s", begun.elapsed().as_secs_f64());
    }
}

#[test]
fn a_quantised_cache_costs_little_likelihood_on_lavapipe() {
    let (file, name, text) = golden::MODELS[0];
    let id = &device_ids()[0];
    golden::compare_kv_types(file, name, text, || Box::new(open(id)));
}

#[test]
fn gemma3_on_lavapipe_follows_both_references() {
    let (file, name, text) = golden::MODELS[1];
    // Its embedding is larger than what one binding of software Vulkan holds: two shards.
    golden::follow(file, name, text, Box::new(open(&device_ids()[0])), golden::Share::WHOLE);
}
