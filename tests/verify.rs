//! What finds a device that computes wrongly, gives out or is too small. Needs Vulkan drivers: fails without one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use fullbore::args::{DeviceArgs, GoldenArgs, VerifyArgs};
use fullbore::start::{Plan, memory_table};
use fullbore::verify::{VerifyError, verify, verify_all, verify_on};
use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::wgpu::{Fault, Features, OpenError, Tier, WgpuBackend, WgpuOptions};
use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo, Ticket};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::memory::capacity;
use fullbore_engine::model::Weights;
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::{BufferId, KvType, WeightFormat};
use fullbore_engine::verify::attention::{stores, stores_nans};
use fullbore_engine::verify::mat_mul::{before_norm, in_company, mat_mul};
use fullbore_engine::verify::rows::{gated_act, rms_norm, update_table};
use fullbore_engine::verify::start::{
    StartCheckError, apart_in_company, cases_in_company, cases_of_model, first_right, kernels_of_model, tried,
};
use fullbore_engine::verify::{self as engine_verify, Case, Check, Output, device, every_case};

use crate::ops::device_ids;

/// A norm that is not quite the one asked for.
const WRONG_NORM: Fault = Fault { tier: Tier::Base, kernel: "rms_norm", from: "params.eps", to: "(params.eps + 0.01)" };

/// A norm that adds up another's part of a product.
const WRONG_PARTIALS: Fault =
    Fault { kernel: "add_norm", from: "params.partial_stride", to: "(params.partial_stride + 1u)", ..WRONG_NORM };

fn open(tier: Option<Tier>, faults: &[Fault]) -> Result<Box<dyn Backend>, OpenError> {
    let faults = faults.to_vec();
    let options = WgpuOptions { selector: device_ids()[0].clone(), tier, faults, ..WgpuOptions::default() };
    Ok(Box::new(WgpuBackend::open(&options)?))
}

/// Of a small model's weights.
const FORMATS: [WeightFormat; 2] = [WeightFormat::Q4_1, WeightFormat::Q6K];

/// The tier that a small model ends on, where `faults` are in the kernels.
fn tier_at_start(faults: &[Fault]) -> Result<String, StartCheckError<OpenError>> {
    let config = Bundle::simulated().config;
    let mut plainer = |info: &DeviceInfo| {
        let tier = Tier::ALL.into_iter().find(|tier| tier.name() == info.tier)?.plainer()?;
        Some(open(Some(tier), faults))
    };
    let backend = open(None, faults).expect("a listed device opens");
    let cases = cases_of_model(backend.as_ref(), &config, &FORMATS, KvType::Q8_0);
    let kernels = kernels_of_model(&config, &FORMATS, KvType::Q8_0);
    first_right(&cases, &kernels, backend, &mut plainer).map(|backend| backend.info().tier.clone())
}

/// A limit of wgpu's, or what one of its writers has no word for.
#[test]
fn a_kernel_that_wgpu_refuses_is_a_reason_for_plainer_ones() {
    let (from, to) = ("@workgroup_size(32)", "@workgroup_size(4096)");
    let backend = open(Some(Tier::Base), &[Fault { tier: Tier::Base, kernel: "rope_kv", from, to }]);
    let cases = [stores(KvType::F16, 64)];
    let what = tried(&cases, backend.expect("a listed device opens")).expect("a twin").err().expect("it is too large");
    assert!(what.contains("rope_kv") && what.contains("4096"), "{what}");
}

/// A sum over subgroups is what a writer or a driver may not know, and every model has it.
#[test]
fn a_norm_that_wgpu_refuses_is_one_too() {
    let own = open(None, &[]).expect("a device opens, whatever its kernels are").info().tier.clone();
    assert_eq!(own, "lavapipe", "of whose workgroups this test knows the size");
    let refused = Fault { tier: Tier::Lavapipe, from: "@workgroup_size(8)", to: "@workgroup_size(4096)", ..WRONG_NORM };
    assert_eq!(tier_at_start(&[refused]).expect("its plainer kernels are right"), "base");
}

/// Or a first start compiles the rest of them one by one.
#[test]
fn a_start_makes_all_kernels_at_once() {
    let config = Bundle::simulated().config;
    let mut backend = open(None, &[]).expect("a listed device opens");
    backend.settle();
    backend.make_kernels(&kernels_of_model(&config, &FORMATS, KvType::Q8_0)).expect("the driver builds them");
    assert!(backend.settle().num_pipelines > 10);
    let cases = cases_of_model(backend.as_ref(), &config, &FORMATS, KvType::Q8_0);
    let backend = tried(&cases, backend).expect("a twin");
    let company = cases_in_company(&config, &FORMATS, KvType::Q8_0);
    let (mut backend, apart) = apart_in_company(&company, backend.expect("it is right"));
    assert_eq!((apart.expect("the device is there"), backend.settle().num_pipelines), (None, 0));
}

#[test]
fn a_start_drops_to_plainer_kernels_and_is_refused_where_they_are_wrong_too() {
    let own = open(None, &[]).expect("a listed device opens").info().tier.clone();
    let own_tier = Tier::ALL.into_iter().find(|tier| tier.name() == own).expect("a tier");
    assert_ne!(own_tier, Tier::Base, "this driver has nothing plainer");
    assert_eq!(tier_at_start(&[]).expect("right"), own);
    assert_eq!(tier_at_start(&[WRONG_NORM]).expect("right"), own, "a fault in kernels that are not used");
    let wrong = Fault { tier: own_tier, ..WRONG_NORM };
    assert_eq!(tier_at_start(std::slice::from_ref(&wrong)).expect("its plainer kernels are right"), "base");
    let sentence = tier_at_start(&[wrong, WRONG_NORM]).expect_err("wrong on both tiers").to_string();
    for part in ["computes wrongly", "rms_norm", "--device cpu", "--no-verify", &device_ids()[0]] {
        assert!(sentence.contains(part), "{sentence}");
    }
}

/// What a device makes of an infinity times nothing is a NaN of either sign.
#[test]
fn a_start_does_not_ask_for_the_sign_of_a_nan() {
    const FROM: &str = "let bits = bitcast<u32>(value);";
    const SIGNS: [&str; 2] = [
        "let own = bitcast<u32>(value); let bits = select(own, 0x7fffffffu, (own & 0x7fffffffu) > 0x7f800000u);",
        "let own = bitcast<u32>(value); let bits = select(own, 0xffc00000u, (own & 0x7fffffffu) > 0x7f800000u);",
    ];
    let config = Bundle::simulated().config;
    for to in SIGNS {
        let faults = [Fault { tier: Tier::Base, kernel: "rope_kv", from: FROM, to }];
        for kv_type in KvType::ALL {
            let head_dims = [config.head_dim, 64].into_iter().filter(|head_dim| kv_type.takes(*head_dim));
            let cases: Vec<Case> =
                head_dims.flat_map(|head_dim| [stores(kv_type, head_dim), stores_nans(kv_type, head_dim)]).collect();
            let backend = open(Some(Tier::Base), &faults).expect("a listed device opens");
            tried(&cases, backend).expect("a twin").unwrap_or_else(|what| panic!("{to}: {what}"));
        }
    }
}

#[test]
fn a_start_sees_what_is_wrong_with_a_long_k_alone() {
    let (kernel, from) = ("mat_mul", "stage(row, first * 32u, local);");
    let to = "if first < span * params.span_units + 64u { stage(row, first * 32u, local); }";
    let right = open(Some(Tier::Base), &[]).expect("a listed device opens");
    let config = Bundle::simulated().config;
    let mut cases = cases_of_model(right.as_ref(), &config, &[WeightFormat::Q4_0], KvType::F16);
    cases.retain(|case| case.op == "mat_mul" && case.shape.starts_with("M 1 "));
    let what = |faults: &[Fault]| {
        let backend = open(Some(Tier::Base), faults).expect("a listed device opens");
        tried(&cases, backend).expect("a twin").err()
    };
    assert_eq!(what(&[]), None);
    let wrong = what(&[Fault { tier: Tier::Base, kernel, from, to }]).expect("most of a span is missing");
    assert!(wrong.contains("K 8448"), "{wrong}");
}

/// Or random weights would prove little of those that are trained.
#[test]
fn a_block_under_another_scale_is_seen_and_so_are_weights_in_f16() {
    let of_others =
        ("scale_words(at_0, in_block);", "scale_words(block_at(column_0 ^ 1u, unit, params.num_units), in_block);");
    let in_f16 = (
        "return mat2x4(fma(vec4<f32>(a), scale, min), fma(vec4<f32>(b), scale, min));",
        "let w = mat2x4(fma(vec4<f32>(a), scale, min), fma(vec4<f32>(b), scale, min));
        return mat2x4(
            vec4(unpack2x16float(pack2x16float(w[0].xy)), unpack2x16float(pack2x16float(w[0].zw))),
            vec4(unpack2x16float(pack2x16float(w[1].xy)), unpack2x16float(pack2x16float(w[1].zw))),
        );",
    );
    for format in [WeightFormat::Q4_0, WeightFormat::Q6K] {
        let case = mat_mul(format, 1, 64, 256);
        let twins = case.run(&mut engine_verify::twin().expect("threads")).expect("memory");
        for (from, to) in [of_others, in_f16] {
            let backend = open(Some(Tier::Base), &[Fault { tier: Tier::Base, kernel: "mat_mul", from, to }]);
            let mut device = device::Device::new(backend.expect("a listed device opens"));
            let check = case.check(&case.run(&mut device), &twins).remove(0);
            assert!(check.failure.is_some(), "{}: {to} passes", format.name());
        }
    }
}

/// As a driver may that takes sums for what they are in mathematics.
#[test]
fn another_order_of_additions_in_one_kernel_is_near_enough_and_told() {
    let (from, to) = ("for (var split = 0u; split < 8u; split++) {", "for (var split = 7u; split < 8u; split--) {");
    let fault = Fault { tier: Tier::Base, kernel: "mat_mul", from, to };
    let (near, same) = (mat_mul(WeightFormat::Q4_0, 1, 161, 1280), in_company(WeightFormat::Q4_0, &[1, 18], false));
    let apart = |faults: &[Fault]| {
        let backend = open(Some(Tier::Base), faults).expect("a listed device opens");
        let backend = tried(std::slice::from_ref(&near), backend).expect("a twin").expect("it is near");
        apart_in_company(std::slice::from_ref(&same), backend).1.expect("the device is there")
    };
    assert_eq!(apart(&[]), None);
    let told = apart(&[fault]).expect("other bits");
    assert!(told.starts_with("mat_mul q4_0 N 161 K 1280, alone and in company: "), "{told}");
}

/// Up to 64 rows share K among workgroups and leave their sums to the norm, more do not; what reads another's sum is
/// seen.
#[test]
fn rows_that_share_k_before_a_norm_have_the_bits_of_those_that_do_not() {
    let (rows, format): (&'static [u32], _) = (&[1, 4, 5, 65], WeightFormat::Q4_0);
    for tier in [Tier::Base, Tier::Subgroup] {
        for has_post in [false, true] {
            let seen = |faults: &[Fault]| {
                let near = [before_norm(format, rows, has_post)];
                let backend = open(Some(tier), faults).expect("a listed device opens");
                let wrong = tried(&near, backend).expect("a twin").err();
                let backend = open(Some(tier), faults).expect("a listed device opens");
                let apart = apart_in_company(&[in_company(format, rows, has_post)], backend);
                (wrong, apart.1.expect("the device is there"))
            };
            assert_eq!(seen(&[]), (None, None), "{} {has_post}", tier.name());
            let (wrong, apart) = seen(&[Fault { tier, ..WRONG_PARTIALS }]);
            let begin = "mat_mul q4_0 N 70 K 1280, before ";
            assert!(wrong.as_ref().is_some_and(|wrong| wrong.starts_with(begin)), "{}: {wrong:?}", tier.name());
            assert!(apart.is_some(), "{} {has_post}", tier.name());
        }
    }
}

/// And it is among what every start tries.
#[test]
fn a_start_sees_a_norm_that_adds_up_what_is_not_its_products() {
    let backend = open(Some(Tier::Base), &[WRONG_PARTIALS]).expect("a listed device opens");
    let mut cases = cases_of_model(backend.as_ref(), &Bundle::simulated().config, &FORMATS[..1], KvType::F16);
    cases.retain(|case| case.op == "add_norm" || case.shape.contains("norm"));
    let wrong = tried(&cases, backend).expect("a twin").err();
    assert!(wrong.as_ref().is_some_and(|wrong| wrong.contains("before a norm: added")), "{wrong:?}");
}

#[test]
fn scalars_in_another_order_are_seen() {
    let from = "x: u32,\n    weight: u32,";
    let swapped = Fault { from, to: "weight: u32,\n    x: u32,", ..WRONG_NORM };
    let case = rms_norm(3, 100);
    let twins = case.run(&mut engine_verify::twin().expect("threads")).expect("memory");
    let check = |faults: &[Fault]| {
        let backend = open(Some(Tier::Base), faults).expect("a listed device opens");
        let mut device = device::Device::new(backend);
        case.check(&case.run(&mut device), &twins).remove(0)
    };
    assert!(check(&[]).failure.is_none());
    assert!(check(&[swapped]).failure.is_some());
}

#[test]
fn an_adapter_below_the_minimum_is_refused_with_what_it_lacks() {
    let selector = device_ids()[0].clone();
    let base = WgpuOptions { selector, tier: Some(Tier::Base), ..WgpuOptions::default() };
    let refuse = |options| WgpuBackend::open(&options).err().expect("too little").to_string();
    let buffers =
        refuse(WgpuOptions { mask: Some(|limits| limits.max_storage_buffers_per_shader_stage = 4), ..base.clone() });
    assert!(buffers.contains("8 storage buffers in a shader: it has 4"), "{buffers}");
    let lanes =
        refuse(WgpuOptions { mask: Some(|limits| limits.max_compute_invocations_per_workgroup = 128), ..base.clone() });
    assert!(lanes.contains("256 invocations in a workgroup: it has 128"), "{lanes}");
    let memory =
        refuse(WgpuOptions { mask: Some(|limits| limits.max_compute_workgroup_storage_size = 8192), ..base.clone() });
    assert!(memory.contains("16384 bytes of workgroup memory: it has 8192"), "{memory}");
    let binding =
        refuse(WgpuOptions { mask: Some(|limits| limits.max_storage_buffer_binding_size = 1 << 20), ..base.clone() });
    assert!(
        binding.contains("bytes in a storage binding: it has 1048576") && binding.contains("--device cpu"),
        "{binding}"
    );
    let grid =
        refuse(WgpuOptions { mask: Some(|limits| limits.max_compute_workgroups_per_dimension = 1024), ..base.clone() });
    assert!(grid.contains("65535 workgroups in a row of a dispatch: it has 1024"), "{grid}");
    let immediates =
        WgpuOptions { tier: Some(Tier::Subgroup), mask: Some(|limits| limits.max_immediate_size = 32), ..base };
    let immediates = refuse(immediates);
    assert!(immediates.contains("64 bytes of immediates: it has 32"), "{immediates}");
    let groups = refuse(WgpuOptions {
        selector: device_ids()[0].clone(),
        tier: Some(Tier::Base),
        mask: Some(|limits| limits.max_bind_groups = 1),
        ..WgpuOptions::default()
    });
    assert!(groups.contains("2 bind groups: it has 1"), "{groups}");
}

#[test]
fn a_tier_is_refused_with_the_feature_that_it_lacks_and_none_is_chosen_that_would_be() {
    for (without, name) in [(Features::SUBGROUP, "subgroups"), (Features::IMMEDIATES, "immediates")] {
        let masked = WgpuOptions { selector: device_ids()[0].clone(), without, ..WgpuOptions::default() };
        assert_eq!(WgpuBackend::open(&masked).expect("a plain device").info().tier, "base", "without {name}");
        for tier in [Tier::Subgroup, Tier::Lavapipe] {
            let sentence = WgpuBackend::open(&WgpuOptions { tier: Some(tier), ..masked.clone() });
            let sentence = sentence.err().expect("too little").to_string();
            let expected = format!("cannot run the {} tier, which needs {name}, which it does not have", tier.name());
            assert!(sentence.contains(&expected), "{sentence}");
        }
    }
}

/// Loads a tiny model on a device with so much memory; an error is what the server would say.
fn load_within(max_memory_bytes: u64, config: EngineConfig) -> Result<(), String> {
    let selector = device_ids()[0].clone();
    let options = WgpuOptions { selector, max_memory_bytes: Some(max_memory_bytes), ..WgpuOptions::default() };
    let backend: Box<dyn Backend> = Box::new(WgpuBackend::open(&options).expect("a listed device opens"));
    let bundle = Bundle::simulated();
    let weights = Weights::size_bytes(&bundle.config, &bundle.checkpoint, backend.as_ref());
    let plan = Plan::of("tiny", bundle, backend, config, weights);
    plan.load_engine().map(|_| ()).map_err(|error| error.to_string())
}

#[test]
fn too_little_memory_names_the_missing_bytes_and_a_flag_that_helps() {
    let config = EngineConfig { max_num_seqs: 8, num_blocks: 4096, ..EngineConfig::default() };
    let planned = memory_table(&Bundle::simulated().config, &config, 0);
    let too_little = planned.total() - planned.kv / 10;
    let sentence = load_within(too_little, config).expect_err("a tenth of the cache is too much");
    for part in ["has no memory for ", "planned are missing; give --kv-memory ", " or less", "--max-model-len"] {
        assert!(sentence.contains(part), "{sentence}");
    }
    let (_, advice) = sentence.split_once("--kv-memory ").expect("it was there");
    let (mebibytes, _) = advice.split_once("MiB").expect("a number of MiB");
    let budget = mebibytes.parse::<u64>().expect("a number") << 20;
    let num_blocks = capacity::num_blocks(planned.kv_bytes_per_token, budget, config.block_size, 1).expect("some");
    load_within(too_little, EngineConfig { num_blocks, ..config }).expect("what it says is enough");

    let sentence = load_within(1 << 20, config).expect_err("there is no room for anything");
    assert!(sentence.contains("missing; that is more than the KV cache takes: pack the "), "{sentence}");
    assert!(sentence.contains("--quantize q8_0 or q4_0"), "{sentence}");
}

/// What a device makes of a case, with a cache of pipelines in `folder`; and the files that are there then.
fn run_cached(selector: &str, folder: &Path, case: &Case) -> (Vec<Output>, Vec<PathBuf>) {
    let cache_folder = Some(folder.to_owned());
    let options = WgpuOptions { selector: selector.to_owned(), cache_folder, ..WgpuOptions::default() };
    let backend = WgpuBackend::open(&options).expect("a listed device opens");
    let mut device = device::Device::new(Box::new(backend));
    let outputs = case.run(&mut device).expect("the device is there");
    let times = device.backend().settle();
    assert!(times.num_pipelines > 0 && !times.pipelines.is_zero(), "{times:?}");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    (outputs, files)
}

#[test]
fn a_pipeline_cache_is_kept_and_a_damaged_or_foreign_one_is_ignored_and_replaced() {
    let folder = std::env::temp_dir().join(format!("fullbore-pipelines-{}", std::process::id()));
    let case = rms_norm(3, 100);
    let ids = device_ids();
    let (expected, files) = run_cached(&ids[0], &folder, &case);
    let [file] = &files[..] else { panic!("one file: {files:?}") };
    let whole = std::fs::read(file).expect("it was written");
    assert!(whole.len() > 100, "{} bytes", whole.len());
    let mut spoiled = vec![
        ("whole", whole.clone()),
        ("empty", Vec::new()),
        ("half", whole[..whole.len() / 2].to_vec()),
        ("a byte short", whole[..whole.len() - 1].to_vec()),
        ("noise", (0..whole.len()).map(|i| (i * 7919 % 251) as u8).collect()),
    ];
    let mut flipped = whole.clone();
    *flipped.last_mut().expect("bytes") ^= 1;
    spoiled.push(("a bit flipped", flipped));
    if let Some(other) = ids.get(1) {
        let (_, files) = run_cached(other, &folder, &case);
        let foreign = files.iter().find(|other| *other != file).expect("a file of its own");
        spoiled.push(("another driver's", std::fs::read(foreign).expect("it was written")));
        std::fs::remove_file(foreign).expect("it is there");
    }
    for (what, bytes) in spoiled {
        std::fs::write(file, bytes).expect("a file");
        let (outputs, files) = run_cached(&ids[0], &folder, &case);
        assert_eq!(format!("{outputs:?}"), format!("{expected:?}"), "{what}");
        assert_eq!(&files[..], std::slice::from_ref(file), "{what}: nothing lies beside it");
        assert_eq!(std::fs::read(file).expect("it is there").len(), whole.len(), "{what}: it was replaced");
    }
    std::fs::remove_dir_all(&folder).expect("it is there");
}

/// A cpu that has no memory for one buffer, and is unplugged before one recording; each counted from 0.
struct Failing {
    cpu: CpuBackend,
    allocs_left: Option<u32>,
    submits_left: Option<u32>,
}

impl Failing {
    fn boxed(allocs_left: Option<u32>, submits_left: Option<u32>) -> Box<dyn Backend> {
        let cpu = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        Box::new(Failing { cpu, allocs_left, submits_left })
    }
}

/// Counts down and says whether it was at its end.
fn is_over(left: &mut Option<u32>) -> bool {
    let over = *left == Some(0);
    *left = left.and_then(|left| left.checked_sub(1));
    over
}

impl Around for Failing {
    fn inner(&self) -> &dyn Backend {
        &self.cpu
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut self.cpu
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        if is_over(&mut self.allocs_left) {
            let (device, what) = ("failing".to_owned(), label.to_owned());
            return Err(DeviceError::OutOfMemory { device, what, needed_bytes: size_bytes, taken_bytes: 0 });
        }
        self.cpu.alloc(label, size_bytes)
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        if is_over(&mut self.submits_left) {
            return Err(DeviceError::Lost { device: "failing".to_owned(), reason: "unplugged".to_owned() });
        }
        self.cpu.submit(recording)
    }
}

#[test]
fn a_device_that_gives_out_is_a_line_that_fails_and_the_rest_goes_on() {
    let silu = fullbore_engine::op::Activation::Silu;
    let cases: [Case; 4] = [rms_norm(3, 100), gated_act(silu, 3, 100), update_table(), rms_norm(1, 64)];
    // The first case allocates three tensors and what its recording needs; the second begins with one that is larger
    // than these and lacks it, and the third case's recording, the second that comes so far, finds no device.
    let mut num_opened = 0;
    let mut open = || {
        num_opened += 1;
        Ok(if num_opened == 1 { Failing::boxed(Some(4), Some(1)) } else { Failing::boxed(None, None) })
    };
    let mut checks: Vec<Check> = Vec::new();
    engine_verify::verify(&cases, &mut open, &mut |check| checks.push(check)).expect("the twin is there");
    let failures: Vec<&str> = checks.iter().map(|check| check.failure.as_deref().unwrap_or("")).collect();
    let [first, second, third, fourth] = failures[..] else { panic!("{checks:?}") };
    assert_eq!((first, fourth), ("", ""));
    assert!(second.starts_with("device failing is out of memory: verified needs"), "{second}");
    assert_eq!(third, "device failing was lost: unplugged");
    assert_eq!(num_opened, 2, "opened anew for the fourth case");
}

/// It is given back, and who asked says that nothing is known.
#[test]
fn a_device_that_gives_out_while_company_is_looked_at_is_given_back_with_the_reason() {
    let company = [in_company(WeightFormat::Q4_0, &[1, 5], false)];
    for (backend, expected) in [
        (Failing::boxed(Some(2), None), "device failing is out of memory: "),
        (Failing::boxed(None, Some(0)), "device failing was lost: unplugged"),
    ] {
        let (mut backend, apart) = apart_in_company(&company, backend);
        let error = apart.expect_err("it gives out").to_string();
        assert!(error.starts_with(expected), "{error}");
        backend.alloc("after it", 4).expect("it is there");
    }
    assert_eq!(apart_in_company(&company, Failing::boxed(None, None)).1.expect("it is there"), None);
}

/// Memory that a start takes to try kernels in is not there for the model.
#[test]
fn what_is_tried_again_takes_no_more_memory() {
    let case = mat_mul(WeightFormat::Q4_0, 5, 40, 512);
    let mut device = device::Device::new(Failing::boxed(Some(8), None));
    let first = case.run(&mut device).expect("a few buffers").remove(0).words;
    for _ in 0..20 {
        assert_eq!(case.run(&mut device).expect("what it had is enough").remove(0).words, first);
    }
}

#[test]
fn the_command_fails_with_a_sentence_if_a_check_does() {
    let args = |device: &str, only: &str| VerifyArgs {
        device: DeviceArgs::new(device),
        tier: None,
        only: only.split(',').map(str::to_owned).collect(),
        formats: Vec::new(),
        golden: GoldenArgs::default(),
    };
    verify(&args("cpu", "rope_kv")).expect("the cpu is right");
    let mut out = Vec::new();
    let of_format = VerifyArgs { formats: vec![WeightFormat::Q5K], ..args("cpu", "mat_mul") };
    verify_all(&of_format, &|_| true, &mut out).expect("the cpu is right");
    let table = String::from_utf8(out).expect("text");
    let lines: Vec<&str> = table.lines().filter(|line| line.starts_with("mat_mul")).collect();
    assert!(lines.len() > 3 && lines.iter().all(|line| line.contains("q5_k")), "{table}");
    let mut out = Vec::new();
    verify_all(&args("cpu", "update_table,mul_add"), &|_| true, &mut out).expect("the cpu is right");
    let table = String::from_utf8(out).expect("text");
    let ops: BTreeSet<&str> = table.lines().skip(2).filter_map(|line| line.split(' ').next()).collect();
    assert!(ops.is_superset(&BTreeSet::from(["update_table", "mul_add"])) && !table.contains("rope_kv"), "{table}");
    let sentence = verify(&args("cpu", "mul_add,matmul")).expect_err("no such op").to_string();
    assert!(sentence.starts_with("there is no op matmul; there is add_norm, attention, "), "{sentence}");
    assert!(matches!(verify(&args("sim", "rope_kv")), Err(VerifyError::Simulator)));

    let cases: Vec<Case> =
        every_case().into_iter().filter(|case| ["rms_norm", "update_table"].contains(&case.op)).collect();
    let info = open(Some(Tier::Base), &[]).expect("a listed device opens").info().clone();
    let lost = |error: OpenError| DeviceError::Lost { device: info.id.clone(), reason: error.to_string() };
    let mut out = Vec::new();
    let result = verify_on(&cases, &info, &mut || open(Some(Tier::Base), &[WRONG_NORM]).map_err(lost), &mut out);
    match result {
        // All norms.
        Err(VerifyError::Failed { num_failed, num_checks, .. }) => {
            assert_eq!((num_failed, num_checks), (cases.len() - 1, cases.len()));
        }
        other => panic!("{other:?}"),
    }
}
