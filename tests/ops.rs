//! Every op on every Vulkan driver and tier against the cpu twins, and both real models on lavapipe against the
//! references of `golden.rs`. Needs Vulkan drivers (`make test` fetches two versions of lavapipe): fails without one.

use fullbore_engine::backend::Backend;
use fullbore_engine::backend::wgpu::{WgpuBackend, WgpuOptions, devices};
use fullbore_engine::verify::{every_case, sample::sample};
use fullbore_shaders::Tier;

use crate::device::Device;
use crate::golden;

fn open(selector: &str, tier: Option<Tier>) -> WgpuBackend {
    let options = WgpuOptions { selector: selector.to_owned(), tier, checked: true, ..WgpuOptions::default() };
    WgpuBackend::open(&options).unwrap_or_else(|error| panic!("{error}"))
}

fn device_ids() -> Vec<String> {
    let ids: Vec<String> = devices().into_iter().map(|device| device.id).collect();
    assert!(!ids.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    ids
}

#[test]
fn every_op_is_near_its_twin_on_every_driver_and_tier() {
    let cases = every_case();
    let twins = Device::twin().outputs(&cases);
    for id in device_ids() {
        for tier in Tier::ALL {
            let backend = open(&id, Some(tier));
            let name = format!("{}, {}, tier {}", id, backend.info().driver, backend.info().tier);
            println!("{name}");
            Device::new(Box::new(backend)).assert_near(&cases, &twins, &name);
        }
    }
}

/// As many tokens as the largest vocabulary has, in one row more lanes' rounds than old software Vulkan takes.
#[test]
fn a_large_vocabulary_is_sampled_as_its_twin_does_on_every_driver() {
    const VOCAB: u32 = 262_144;
    let cases = [sample(VOCAB)];
    let twins = Device::twin().outputs(&cases);
    for id in device_ids() {
        Device::new(Box::new(open(&id, None))).assert_near(&cases, &twins, &id);
    }
}

#[test]
fn smollm2_on_lavapipe_follows_both_references() {
    let (file, name, text) = golden::MODELS[0];
    for id in device_ids() {
        golden::follow(file, name, text, Box::new(open(&id, None)));
    }
}

#[test]
fn a_quantised_cache_costs_little_likelihood_on_lavapipe() {
    let (file, name, text) = golden::MODELS[0];
    let id = &device_ids()[0];
    golden::compare_kv_types(file, name, text, || Box::new(open(id, None)));
}

#[test]
fn gemma3_on_lavapipe_follows_both_references() {
    let (file, name, text) = golden::MODELS[1];
    // Its embedding is larger than what one binding of software Vulkan holds: two shards.
    golden::follow(file, name, text, Box::new(open(&device_ids()[0], None)));
}
