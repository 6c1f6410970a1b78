//! Kernels as pipelines: compiled at load, looked up in a step.
//!
//! Invariant: one pipeline for each kernel variant of the device's tier. Kernels that depend on a model's shape are
//! compiled when the shape is first met, and so is what no model has. The `unsafe` of this backend is here and in
//! `pipeline_cache`.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use fullbore_shaders::{Access, Arithmetic, Constants, Extras, MatMulVariant, MatrixUnits, Tier, compose, reflect};
use rayon::prelude::*;
use wgpu::{BindGroupLayout, BindGroupLayoutEntry, BindingType, BufferBindingType, ErrorFilter, ShaderStages};

use super::arithmetic::of_format;
use super::device::Device;
use super::pipeline_cache::PipelineCache;
use crate::backend::DeviceError;
use crate::backend::packing::Layout;
use crate::op::{ATTENTION_CUT, ATTENTION_ROWS, ATTENTION_TILE};
use crate::tensor::{KV_GROUP, KvType, WeightFormat};

/// A kernel variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    UpdateTable,
    Embed(WeightFormat),
    RmsNorm,
    MatMul(WeightFormat, MatMulVariant),
    MatMulSum,
    /// How the cache stores elements, and elements of a head.
    RopeKv(KvType, u32),
    Attention(AttentionVariant),
    GatedAct,
    AddNorm,
    ResetCounts,
    SampleSlices,
    Sample,
    MulAdd,
    MulAddMatrix(MatrixUnits),
}

/// Where every kernel is listed: all that devices may have.
fn every_unit() -> impl Iterator<Item = MatrixUnits> {
    let of_size = |size| [4, 8, 16, 32, 64, 128].map(|subgroup_lanes| MatrixUnits { size, subgroup_lanes });
    [8, 16].into_iter().flat_map(of_size)
}

/// What a workgroup of attention takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionVariant {
    pub kv_type: KvType,
    pub head_dim: u32,
    /// Query heads of one KV head.
    pub heads: u32,
    /// Rows of an item.
    pub rows: u32,
}

impl AttentionVariant {
    const MAX_HEADS: u32 = 8;

    /// For a KV head that `group` query heads read, and items of up to `rows_of_item` rows: as many heads as divide the
    /// group, then rows, as a lane can hold.
    pub fn new(tier: Tier, kv_type: KvType, head_dim: u32, group: u32, rows_of_item: u32) -> AttentionVariant {
        let lanes = tier.attention_lanes();
        let of_pair = (head_dim / part(kv_type)).div_ceil(lanes) * part(kv_type);
        let pairs = (tier.attention_values() / of_pair).clamp(1, tier.attention_pairs());
        let divides = |heads: &u32| group.is_multiple_of(*heads);
        let heads = (1..=pairs.min(Self::MAX_HEADS)).rev().find(divides).expect("1 divides everything");
        let rows = rows_of_item.min(1 << (pairs / heads).ilog2());
        AttentionVariant { kv_type, head_dim, heads, rows }
    }

    /// Positions whose values are loaded together, and steps of a key's elements: of one row as many as make 16 words
    /// of keys a lane, for a miss takes as long as hundreds of instructions, and a few sequences have few lanes; 16 of
    /// values too, but of wide heads 4, for of 8 SwiftShader takes all memory to compile those of 256. Items of several
    /// rows have more lanes, and less room in registers. Lavapipe waits for no load.
    fn steps(self, tier: Tier) -> (u32, u32) {
        if tier == Tier::Lavapipe {
            return (1, 1);
        }
        let AttentionVariant { kv_type, head_dim, rows, .. } = self;
        let (key_words, value_words) = match (rows, head_dim) {
            (1, ..=128) => (16, 16),
            (1, _) => (16, 4),
            _ => (8, 2),
        };
        let lane_parts = (head_dim / part(kv_type)).div_ceil(tier.attention_lanes());
        // Words of a position's values, codes with a scale's; steps in a loop over a key, and words of one.
        let (of_value, num_steps, of_key) = match kv_type {
            KvType::F16 => (lane_parts, head_dim.div_ceil(8), 4),
            KvType::Q8_0 => (2 * lane_parts, 4, 2),
            KvType::Q4_0 => (2 * lane_parts, 4, 1),
        };
        let fitting = |max_words: u32, words: u32, num: u32| {
            let fits = |steps: &u32| num.is_multiple_of(*steps) && words * steps <= max_words;
            [8, 4, 2].into_iter().find(fits).unwrap_or(1)
        };
        (fitting(value_words, of_value, ATTENTION_TILE), fitting(key_words, of_key, num_steps))
    }

    fn constants(self, tier: Tier) -> Constants {
        let AttentionVariant { kv_type, head_dim, heads, rows } = self;
        let (part, lanes) = (part(kv_type), tier.attention_lanes());
        let (value_steps, key_steps) = self.steps(tier);
        vec![
            ("VALUE_STEPS", value_steps),
            ("KEY_STEPS", key_steps),
            // Cuts of a row that are loaded together.
            ("MERGE_STEPS", if tier == Tier::Lavapipe { 1 } else { 2 }),
            // Whether a position that a row does not see may be loaded for it.
            ("HIDES", u32::from(rows > 1 || value_steps > 1)),
            ("TOKENS", ATTENTION_TILE / lanes),
            ("CUT", ATTENTION_CUT),
            ("HEADS", heads),
            ("ROWS", rows),
            ("LAST_ROW", rows - 1),
            ("PAIRS", rows * heads),
            // Elements of a value that a lane holds together, and how many such parts.
            ("PART", part),
            ("LANE_PARTS", (head_dim / part).div_ceil(lanes)),
            // Fours of a query's elements, in whole steps of eight; elements of the last step that is not whole.
            ("QUERY_FOURS", head_dim.div_ceil(8) * 2),
            ("HEAD_TAIL", head_dim % 8),
        ]
    }
}

/// Elements of a value that are widened together.
fn part(kv_type: KvType) -> u32 {
    if kv_type == KvType::F16 { 2 } else { 4 }
}

impl Kernel {
    /// Those that no shape or format decides.
    pub const GENERAL: [Kernel; 7] = [
        Kernel::UpdateTable,
        Kernel::RmsNorm,
        Kernel::GatedAct,
        Kernel::AddNorm,
        Kernel::ResetCounts,
        Kernel::SampleSlices,
        Kernel::Sample,
    ];

    /// Those that read weights of `format`, whatever a device computes with.
    fn of_format(format: WeightFormat, tier: Tier) -> impl Iterator<Item = Kernel> {
        let matrix_units = every_unit().map(Arithmetic::MatrixUnits);
        let all = [Arithmetic::F32, Arithmetic::F16, Arithmetic::IntegerDot].into_iter().chain(matrix_units);
        let all = all.filter(move |&arithmetic| tier.has(arithmetic) && arithmetic == of_format(arithmetic, format));
        let mut variants: Vec<MatMulVariant> = all.flat_map(|arithmetic| tier.mat_mul_variants(arithmetic)).collect();
        let mut seen = HashSet::new();
        variants.retain(|variant| seen.insert(*variant));
        variants.into_iter().map(move |variant| Kernel::MatMul(format, variant)).chain([Kernel::Embed(format)])
    }

    /// What it needs beyond what every adapter has.
    pub fn extras(self, tier: Tier) -> Extras {
        let (subgroups, immediates) = (tier != Tier::Base, tier != Tier::Base);
        let variant = if let Kernel::MatMul(_, variant) = self { Some(variant) } else { None };
        let matrix_units = variant.is_some_and(MatMulVariant::is_matrix) || matches!(self, Kernel::MulAddMatrix(_));
        let f16 = variant.is_some_and(MatMulVariant::is_f16) || matrix_units;
        Extras { subgroups, immediates, f16, matrix_units }
    }

    /// Those that write and read a cache of `kv_type` with heads of `head_dim` elements, `group` query heads a KV head.
    pub fn of_cache(tier: Tier, kv_type: KvType, head_dim: u32, group: u32) -> impl Iterator<Item = Kernel> {
        let attention = |rows| Kernel::Attention(AttentionVariant::new(tier, kv_type, head_dim, group, rows));
        [Kernel::RopeKv(kv_type, head_dim), attention(1), attention(ATTENTION_ROWS)].into_iter()
    }

    /// Every variant for a tier, with caches for heads of so many elements, and so many query heads a KV head.
    pub fn all(tier: Tier, heads: &[(u32, u32)]) -> Vec<Kernel> {
        let formats = WeightFormat::ALL.into_iter().flat_map(|format| Kernel::of_format(format, tier));
        let caches = KvType::ALL.into_iter().flat_map(|kv_type| {
            let heads = heads.iter().filter(move |(head_dim, _)| kv_type.takes(*head_dim));
            heads.flat_map(move |&(head_dim, group)| Kernel::of_cache(tier, kv_type, head_dim, group))
        });
        let units = every_unit().filter(|units| tier.has(Arithmetic::MatrixUnits(*units)));
        let rare = [Kernel::MatMulSum, Kernel::MulAdd].into_iter().chain(units.map(Kernel::MulAddMatrix));
        Kernel::GENERAL.into_iter().chain(rare).chain(formats).chain(caches).collect()
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
            Kernel::MatMulSum => "mat_mul_sum",
            Kernel::RopeKv(kv_type, head_dim) => {
                let lanes = value("TILE_LANES", &constants);
                constants.extend(cache_constants(kv_type, head_dim));
                constants.push(("ROW_LANES", lanes));
                "rope_kv"
            }
            Kernel::Attention(variant) => {
                constants.extend(cache_constants(variant.kv_type, variant.head_dim));
                constants.extend(variant.constants(tier));
                "attention"
            }
            Kernel::GatedAct => "gated_act",
            Kernel::AddNorm => "add_norm",
            Kernel::ResetCounts => "reset_counts",
            Kernel::SampleSlices => "sample_slices",
            Kernel::Sample => {
                // Old software Vulkan ends all loops of an invocation after 65,535 rounds together: a row is read a
                // dozen times, so that it takes more lanes than one subgroup has.
                if tier == Tier::Lavapipe {
                    constants.extend([("ROW_LANES", 128), ("ONE_SUBGROUP", 0), ("EIGHTS", 128 / 64)]);
                }
                "sample"
            }
            Kernel::MulAdd => "mul_add",
            Kernel::MulAddMatrix(units) => {
                constants.extend(units.mul_add_constants());
                "mul_add_matrix"
            }
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
    pub params_bytes: u32,
}

pub(super) struct Pipelines {
    device: Device,
    pipelines: HashMap<Kernel, Pipeline>,
    /// Of group 1, the parameters; on tiers without immediates.
    uniform: Option<BindGroupLayout>,
    cache: Option<PipelineCache>,
    /// What making them took since that was asked last, and how many they were.
    times: (Duration, u32),
}

impl Pipelines {
    pub fn new(device: &Device, uniform: Option<BindGroupLayout>, cache: Option<PipelineCache>) -> Pipelines {
        let (device, pipelines, times) = (device.clone(), HashMap::new(), (Duration::ZERO, 0));
        Pipelines { device, pipelines, uniform, cache, times }
    }

    /// Writes what was compiled to disk.
    pub fn keep(&self) {
        if let Some(cache) = &self.cache {
            cache.keep();
        }
    }

    pub fn take_times(&mut self) -> (Duration, u32) {
        std::mem::take(&mut self.times)
    }

    pub fn clear(&mut self) {
        self.pipelines.clear();
    }

    /// One that is compiled.
    pub fn get(&self, kernel: Kernel) -> &Pipeline {
        &self.pipelines[&kernel]
    }

    /// Makes those that are not there yet, on all threads.
    pub fn compile_all(&mut self, kernels: impl IntoIterator<Item = Kernel>) -> Result<(), DeviceError> {
        let mut missing: Vec<Kernel> = Vec::new();
        for kernel in kernels {
            if !self.pipelines.contains_key(&kernel) && !missing.contains(&kernel) {
                missing.push(kernel);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let built = missing.par_iter().map(|&kernel| Ok((kernel, self.build(kernel)?)));
        let built: Vec<(Kernel, Pipeline)> = built.collect::<Result<_, DeviceError>>()?;
        self.times.0 += begun.elapsed();
        self.times.1 += built.len() as u32;
        self.pipelines.extend(built);
        Ok(())
    }

    pub fn build(&self, kernel: Kernel) -> Result<Pipeline, DeviceError> {
        let tier = self.device.tier;
        let (name, constants) = kernel.source(tier);
        let text = compose(name, &constants).unwrap_or_else(|error| panic!("{kernel:?}: {error}"));
        let text = self.device.faults.iter().fold(text, |text, fault| fault.apply(tier, name, text));
        let extras = kernel.extras(tier);
        let reflection = reflect(&text, extras).unwrap_or_else(|error| panic!("{kernel:?}: {error}"));
        let device = &self.device.device;
        // What a driver says of a kernel that it cannot build, and what wgpu does.
        let scopes = [ErrorFilter::Validation, ErrorFilter::Internal].map(|filter| device.push_error_scope(filter));
        let entries: Vec<_> = reflection.storage.iter().enumerate().map(storage_entry).collect();
        let storage =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&storage), self.uniform.as_ref()][..1 + usize::from(self.uniform.is_some())],
            immediate_size: if extras.immediates { reflection.params_bytes } else { 0 },
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
            cache: self.cache.as_ref().map(PipelineCache::for_one_more),
        });
        // The last first, and all of them.
        let errors = scopes.into_iter().rev().map(|scope| pollster::block_on(scope.pop())).collect::<Vec<_>>();
        if let Some(error) = errors.into_iter().flatten().next() {
            self.device.check()?;
            return Err(self.device.unbuilt(name, &error.to_string()));
        }
        let (num_buffers, params_bytes) = (reflection.storage.len(), reflection.params_bytes);
        Ok(Pipeline { pipeline, storage, num_buffers, params_bytes })
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
