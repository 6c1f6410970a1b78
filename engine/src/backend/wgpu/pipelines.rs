//! Kernels as pipelines: compiled at load, looked up in a step.
//!
//! Invariant: one pipeline for each kernel variant of the device's tier. Kernels that depend on a model's shape are
//! compiled when the shape is first met, and so is what no model has. The only `unsafe` of this backend is here.

use std::collections::HashMap;

use fullbore_shaders::{Access, Constants, MatMulVariant, Tier, compose, reflect};
use wgpu::{BindGroupLayout, BindGroupLayoutEntry, BindingType, BufferBindingType, ShaderStages};

use super::device::Device;
use super::packing::Layout;
use crate::tensor::{KV_GROUP, KvType, WeightFormat};

/// A kernel variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    UpdateTable,
    Embed(WeightFormat),
    RmsNorm,
    MatMul(WeightFormat, MatMulVariant),
    Rope,
    /// How the cache stores elements, and elements of a head.
    StoreKv(KvType, u32),
    Attention(KvType, u32),
    GatedAct,
    Add,
    GatherRows,
    ResetCounts,
    SampleSlices,
    Sample,
    MulAdd,
}

impl Kernel {
    /// Those that no shape or format decides.
    const GENERAL: [Kernel; 9] = [
        Kernel::UpdateTable,
        Kernel::RmsNorm,
        Kernel::Rope,
        Kernel::GatedAct,
        Kernel::Add,
        Kernel::GatherRows,
        Kernel::ResetCounts,
        Kernel::SampleSlices,
        Kernel::Sample,
    ];

    /// Those that read weights of `format`.
    pub fn of_format(format: WeightFormat, tier: Tier) -> impl Iterator<Item = Kernel> {
        let mat_muls = tier.mat_mul_choices().iter().map(move |choice| Kernel::MatMul(format, choice.variant));
        mat_muls.chain([Kernel::Embed(format)])
    }

    /// Those that write and read a cache of `kv_type` with heads of `head_dim` elements.
    fn of_cache(kv_type: KvType, head_dim: u32) -> impl Iterator<Item = Kernel> {
        let kernels = [Kernel::StoreKv(kv_type, head_dim), Kernel::Attention(kv_type, head_dim)];
        kernels.into_iter().filter(move |_| kv_type.takes(head_dim))
    }

    /// Every variant for a tier, with caches for `head_dims`.
    pub fn all(tier: Tier, head_dims: &[u32]) -> Vec<Kernel> {
        let formats = WeightFormat::ALL.into_iter().flat_map(|format| Kernel::of_format(format, tier));
        let types = KvType::ALL.into_iter();
        let caches = types.flat_map(|kv_type| head_dims.iter().flat_map(move |&dim| Kernel::of_cache(kv_type, dim)));
        Kernel::GENERAL.into_iter().chain([Kernel::MulAdd]).chain(formats).chain(caches).collect()
    }

    /// Its file, and what the file is composed with.
    pub fn source(self, tier: Tier) -> (&'static str, Constants) {
        let mut constants = tier.constants();
        let value = |name: &str, constants: &Constants| {
            constants.iter().find(|(found, _)| *found == name).map_or(0, |(_, value)| *value)
        };
        let name = match self {
            Kernel::UpdateTable => "update_table",
            Kernel::Embed(format) => {
                constants.extend(Layout::of(format).constants());
                "embed"
            }
            Kernel::RmsNorm => "rms_norm",
            Kernel::MatMul(format, variant) => {
                constants.extend(Layout::of(format).constants());
                constants.extend(variant.constants());
                variant.kernel()
            }
            Kernel::Rope => "rope",
            Kernel::StoreKv(kv_type, head_dim) => {
                constants.extend(cache_constants(kv_type, head_dim));
                "store_kv"
            }
            Kernel::Attention(kv_type, head_dim) => {
                let lanes = value("TILE_LANES", &constants);
                let part = if kv_type == KvType::F16 { 2 } else { 4 };
                constants.extend(cache_constants(kv_type, head_dim));
                constants.extend([("TOKENS", 32 / lanes), ("LANE_PARTS", (head_dim / part).div_ceil(lanes))]);
                "attention"
            }
            Kernel::GatedAct => "gated_act",
            Kernel::Add => "add",
            Kernel::GatherRows => "gather_rows",
            Kernel::ResetCounts => "reset_counts",
            Kernel::SampleSlices => "sample_slices",
            Kernel::Sample => {
                // Old software Vulkan ends all loops of an invocation after 65,535 rounds together: a row is read a
                // dozen times, so that it takes more lanes than one subgroup has.
                if tier == Tier::Lavapipe {
                    constants.extend([("ROW_LANES", 128), ("ONE_SUBGROUP", 0)]);
                }
                "sample"
            }
            Kernel::MulAdd => "mul_add",
        };
        (name, constants)
    }
}

/// How heads lie in the cache.
fn cache_constants(kv_type: KvType, head_dim: u32) -> Constants {
    vec![
        ("HEAD_DIM", head_dim),
        ("HEAD_WORDS", kv_type.head_words(head_dim)),
        ("CODE_BITS", kv_type.code_bits()),
        ("CODE_WORDS", kv_type.code_words(head_dim)),
        ("GROUPS", head_dim / KV_GROUP),
    ]
}

pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    /// Of group 0.
    pub storage: BindGroupLayout,
    pub num_buffers: usize,
}

pub(super) struct Pipelines {
    device: Device,
    pipelines: HashMap<Kernel, Pipeline>,
    /// Of group 1, the parameters; on tiers without immediates.
    uniform: Option<BindGroupLayout>,
}

impl Pipelines {
    pub fn new(device: &Device, uniform: Option<BindGroupLayout>) -> Pipelines {
        let mut pipelines = Pipelines { device: device.clone(), pipelines: HashMap::new(), uniform };
        for kernel in Kernel::GENERAL {
            pipelines.compile(kernel);
        }
        pipelines
    }

    pub fn get(&mut self, kernel: Kernel) -> &Pipeline {
        self.compile(kernel);
        &self.pipelines[&kernel]
    }

    pub fn compile(&mut self, kernel: Kernel) {
        if self.pipelines.contains_key(&kernel) {
            return;
        }
        let tier = self.device.tier;
        let (name, constants) = kernel.source(tier);
        let text = compose(name, &constants).unwrap_or_else(|error| panic!("{kernel:?}: {error}"));
        let immediates = tier != Tier::Base;
        let reflection = reflect(&text, immediates, immediates).unwrap_or_else(|error| panic!("{kernel:?}: {error}"));
        let device = &self.device.device;
        let entries: Vec<_> = reflection.storage.iter().enumerate().map(storage_entry).collect();
        let storage =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&storage), self.uniform.as_ref()][..1 + usize::from(self.uniform.is_some())],
            immediate_size: if immediates { reflection.params_bytes } else { 0 },
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&layout),
            module: &self.module(name, text),
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        let num_buffers = reflection.storage.len();
        self.pipelines.insert(kernel, Pipeline { pipeline, storage, num_buffers });
    }

    #[allow(unsafe_code)]
    fn module(&self, name: &str, text: String) -> wgpu::ShaderModule {
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(name), source: wgpu::ShaderSource::Wgsl(text.into()) };
        if self.device.checked {
            return self.device.device.create_shader_module(descriptor);
        }
        // SAFETY: the text is our own and naga has validated it; its loops end by construction, and the same kernels
        // run with all checks in the tests.
        unsafe { self.device.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    }
}

fn storage_entry((binding, access): (usize, &Access)) -> BindGroupLayoutEntry {
    let ty = BufferBindingType::Storage { read_only: *access == Access::Read };
    buffer_entry(binding as u32, ty, false)
}

/// The layout of the parameters where there are no immediates: one uniform with a dynamic offset.
pub(super) fn uniform_layout(device: &wgpu::Device) -> BindGroupLayout {
    let entries = [buffer_entry(0, BufferBindingType::Uniform, true)];
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some("params"), entries: &entries })
}

fn buffer_entry(binding: u32, ty: BufferBindingType, has_dynamic_offset: bool) -> BindGroupLayoutEntry {
    BindGroupLayoutEntry {
        binding,
        visibility: ShaderStages::COMPUTE,
        ty: BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    }
}
