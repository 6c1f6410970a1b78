//! Every shader in every permutation, written as wgpu would write it for Vulkan, Metal and DX12: proof without a GPU.
//!
//! SPIR-V goes through `spirv-val`, which `make test` fetches. MSL and HLSL are as far as naga's writers can tell:
//! their compilers are not to be had here.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use fullbore_engine::backend::wgpu::pipelines::Kernel;
use fullbore_shaders::{Extras, Tier, compose, reflect, validate};
use naga::back::{hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::ModuleInfo;
use naga::{Module, ResourceBinding};

use crate::shaders::HEADS_OF_MODELS;

struct Permutation {
    name: String,
    module: Module,
    info: ModuleInfo,
    num_storage: u32,
    extras: Extras,
}

fn permutations() -> Vec<Permutation> {
    let mut found = Vec::new();
    for tier in Tier::ALL {
        for kernel in Kernel::all(tier, &HEADS_OF_MODELS) {
            let (file, constants) = kernel.source(tier);
            let name = format!("{kernel:?}, tier {}", tier.name());
            let text = compose(file, &constants).unwrap_or_else(|error| panic!("{name}: {error}"));
            let extras = kernel.extras(tier);
            let (module, info) = validate(&text, extras).unwrap_or_else(|error| panic!("{name}: {error}"));
            let num_storage = reflect(&text, extras).expect("it is valid").storage.len() as u32;
            found.push(Permutation { name, module, info, num_storage, extras });
        }
    }
    assert!(found.len() > 200, "{} permutations", found.len());
    found
}

impl Permutation {
    /// All that it binds: storage in group 0, and where there are no immediates the parameters in group 1.
    fn bindings(&self) -> impl Iterator<Item = ResourceBinding> {
        let storage = (0..self.num_storage).map(|binding| ResourceBinding { group: 0, binding });
        storage.chain((!self.extras.immediates).then_some(ResourceBinding { group: 1, binding: 0 }))
    }

    /// As wgpu asks for it: with Vulkan 1.1 what is oldest, unchecked; with 1.3 what tests run, checked.
    fn spirv(&self, checked: bool) -> Vec<u32> {
        let policy = if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
        let options = spv::Options {
            lang_version: if checked { (1, 6) } else { (1, 3) },
            bounds_check_policies: policies(policy),
            zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
            force_loop_bounding: checked,
            emit_int_div_checks: checked,
            ..spv::Options::default()
        };
        spv::write_vec(&self.module, &self.info, &options, None)
            .unwrap_or_else(|error| panic!("{} as SPIR-V: {error}", self.name))
    }

    fn msl(&self, checked: bool) -> String {
        let policy = if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
        let target = |(slot, binding): (usize, ResourceBinding)| {
            (binding, msl::BindTarget { buffer: Some(slot as u8), mutable: true, ..msl::BindTarget::default() })
        };
        let resources = msl::EntryPointResources {
            resources: self.bindings().enumerate().map(target).collect(),
            immediates_buffer: Some(20),
            sizes_buffer: Some(21),
        };
        let options = msl::Options {
            lang_version: (2, 4),
            per_entry_point_map: BTreeMap::from([("main".to_owned(), resources)]),
            fake_missing_bindings: false,
            bounds_check_policies: policies(policy),
            zero_initialize_workgroup_memory: false,
            force_loop_bounding: checked,
            emit_int_div_checks: checked,
            ..msl::Options::default()
        };
        let (text, written) = msl::write_string(&self.module, &self.info, &options, &msl::PipelineOptions::default())
            .unwrap_or_else(|error| panic!("{} as MSL: {error}", self.name));
        for name in written.entry_point_names {
            name.unwrap_or_else(|error| panic!("{} as MSL: {error}", self.name));
        }
        text
    }

    /// Shader model 5.1, which needs no compiler beside the system's, where there are neither subgroups nor halves.
    fn hlsl(&self, checked: bool) -> String {
        let target = |(register, binding): (usize, ResourceBinding)| {
            (binding, hlsl::BindTarget { register: register as u32, ..hlsl::BindTarget::default() })
        };
        let immediates = hlsl::BindTarget { space: 1, ..hlsl::BindTarget::default() };
        let options = hlsl::Options {
            shader_model: match self.extras {
                Extras { f16: true, .. } => hlsl::ShaderModel::V6_2,
                Extras { immediates: true, .. } => hlsl::ShaderModel::V6_0,
                _ => hlsl::ShaderModel::V5_1,
            },
            binding_map: self.bindings().enumerate().map(target).collect(),
            fake_missing_bindings: false,
            immediates_target: self.extras.immediates.then_some(immediates),
            zero_initialize_workgroup_memory: false,
            restrict_indexing: checked,
            force_loop_bounding: checked,
            ..hlsl::Options::default()
        };
        let (mut text, pipeline) = (String::new(), hlsl::PipelineOptions::default());
        let written = hlsl::Writer::new(&mut text, &options, &pipeline)
            .write(&self.module, &self.info, None)
            .unwrap_or_else(|error| panic!("{} as HLSL: {error}", self.name));
        for name in written.entry_point_names {
            name.unwrap_or_else(|error| panic!("{} as HLSL: {error}", self.name));
        }
        text
    }
}

fn policies(policy: BoundsCheckPolicy) -> BoundsCheckPolicies {
    BoundsCheckPolicies { index: policy, buffer: policy, image_load: policy, binding_array: policy }
}

/// What `spirv-val` says against a module.
fn problem(words: &[u32], environment: &str) -> Option<String> {
    let program = std::env::var_os("SPIRV_VAL").expect("no spirv-val: run `make test`, which fetches it");
    let mut command = Command::new(program);
    command
        .args(["--target-env", environment, "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("spirv-val runs");
    child.stdin.take().expect("a pipe").write_all(bytemuck::cast_slice(words)).expect("it reads all");
    let output = child.wait_with_output().expect("it ends");
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn every_variant_is_spirv_that_the_validator_passes() {
    let (of_matrices, all): (Vec<_>, Vec<_>) =
        permutations().into_iter().partition(|permutation| permutation.extras.matrix_units);
    // Debian's validator does not know matrices of a subgroup: that they are written at all.
    assert!(of_matrices.iter().all(|permutation| !permutation.spirv(true).is_empty()));
    assert!(of_matrices.len() > 300, "{} kernels of matrices", of_matrices.len());
    let check = |permutation: &Permutation, checked, environment| {
        let problem = problem(&permutation.spirv(checked), environment);
        assert!(problem.is_none(), "{}, checked {checked}: {}", permutation.name, problem.unwrap_or_default());
    };
    // On two threads, each with a half.
    std::thread::scope(|scope| {
        for half in all.chunks(all.len().div_ceil(2)) {
            scope.spawn(move || {
                for permutation in half {
                    check(permutation, false, "vulkan1.1");
                    check(permutation, true, "vulkan1.3");
                }
            });
        }
    });
}

#[test]
fn the_validator_sees_what_is_wrong() {
    let mut words = permutations()[0].spirv(false);
    assert_eq!(problem(&words, "vulkan1.1"), None);
    let half = words.len() / 2;
    words.truncate(half);
    assert!(problem(&words, "vulkan1.1").is_some());
}

#[test]
fn every_variant_is_msl_and_hlsl() {
    for permutation in permutations() {
        for checked in [false, true] {
            let msl = permutation.msl(checked);
            assert!(msl.contains("kernel void main_("), "{}: {msl}", permutation.name);
            // naga writes no HLSL for matrices of a subgroup, and DX12 offers none.
            if !permutation.extras.matrix_units {
                let hlsl = permutation.hlsl(checked);
                assert!(hlsl.contains("[numthreads("), "{}: {hlsl}", permutation.name);
            }
        }
    }
}
