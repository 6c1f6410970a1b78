//! Fullbore's WGSL kernels, a small preprocessor, and what naga can prove about them.
//!
//! Invariant: every kernel is written once; tiers and formats differ by constants alone. One kernel has one file, named
//! like its op (`sample` has two, one after the other, and `mat_mul` several: for few rows, for many, for software
//! Vulkan, for other arithmetic than f32, and to add up what several workgroups have). This crate knows no wgpu, no
//! device and no weight file.
//!
//! ```text
//! #include "file.wgsl"
//! #if NAME  |  #if !NAME  |  #if NAME == 4        (also > and <)     ... #else ... #endif
//! #for NAME COUNT ... #endfor                     NAME runs from 0 to COUNT - 1
//! {{NAME}}                                        the value
//! ```

mod compose;
mod mat_mul;
mod reflect;

pub use compose::{ComposeError, compose};
pub use mat_mul::{Arithmetic, LEAST_SPREAD_K, MatMulChoice, MatMulVariant, MatrixUnits, num_spans, span_units};
pub use reflect::{Access, Extras, Member, ReflectError, Reflection, members, reflect, validate};

/// What a kernel is composed with; a later entry hides an earlier one of the same name.
pub type Constants = Vec<(&'static str, u32)>;

/// Which variant of the kernels a device gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Needs nothing beyond WebGPU: no subgroups, parameters in a uniform buffer.
    Base,
    /// Parameters as immediates, and subgroups of whatever width, for sums over a row and for matrix units.
    Subgroup,
    /// As `Subgroup`, for software Vulkan, where a load costs 15 multiply-adds and a barrier 70: one subgroup of 8 is a
    /// workgroup, nothing goes through workgroup memory. `sample.wgsl` alone has more lanes, and searches there.
    Lavapipe,
}

impl Tier {
    pub const ALL: [Tier; 3] = [Tier::Base, Tier::Subgroup, Tier::Lavapipe];

    pub const fn name(self) -> &'static str {
        match self {
            Tier::Base => "base",
            Tier::Subgroup => "subgroup",
            Tier::Lavapipe => "lavapipe",
        }
    }

    /// The tier whose kernels ask less of a driver.
    pub const fn plainer(self) -> Option<Tier> {
        match self {
            Tier::Base => None,
            Tier::Subgroup | Tier::Lavapipe => Some(Tier::Base),
        }
    }

    /// Lanes that share an attention tile.
    pub const fn attention_lanes(self) -> u32 {
        match self {
            Tier::Base | Tier::Subgroup => 32,
            Tier::Lavapipe => 8,
        }
    }

    /// Rows times heads that an attention kernel takes on at most.
    pub const fn attention_pairs(self) -> u32 {
        match self {
            Tier::Base | Tier::Subgroup => 8,
            Tier::Lavapipe => 12,
        }
    }

    /// Values that an attention kernel's lane holds at most, of all its rows and heads together. Of software Vulkan's
    /// registers most lie in memory anyway, which costs less than loading a cache again.
    pub const fn attention_values(self) -> u32 {
        match self {
            Tier::Base | Tier::Subgroup => 32,
            Tier::Lavapipe => 96,
        }
    }

    /// What every kernel of this tier is composed with.
    pub fn constants(self) -> Constants {
        let flag = |tier: Tier| u32::from(self == tier);
        vec![
            ("IMMEDIATES", 1 - flag(Tier::Base)),
            ("ONE_SUBGROUP", flag(Tier::Lavapipe)),
            ("MANY_SUBGROUPS", flag(Tier::Subgroup)),
            // Where a workgroup is several subgroups of 8 that stay together: how many times eight of them.
            ("EIGHTS", 0),
            // Lanes that share a row in reductions.
            ("ROW_LANES", if self == Tier::Lavapipe { 8 } else { 256 }),
            // Columns of a row that a lane of the norms loads together; software Vulkan waits for no load.
            ("ROW_STEPS", if self == Tier::Lavapipe { 1 } else { 4 }),
            ("TILE_LANES", self.attention_lanes()),
            // Sums of a product, where workgroups share K, that are added up by the norm behind it.
            ("MAX_PARTIALS", if self == Tier::Lavapipe { 1 } else { mat_mul::MAX_SPANS }),
            // What a matmul multiplies in, and whether on matrix units.
            ("BITS", 32),
            ("MATRIX", 0),
        ]
    }
}

/// Invocations of a workgroup at most, and bytes of its memory: WebGPU's guarantee, which every tier keeps to.
pub const MAX_GROUP_LANES: u32 = 256;
pub const MAX_GROUP_BYTES: u32 = 16 << 10;
/// Bytes for matrix units, whose devices have more.
pub const MAX_MATRIX_GROUP_BYTES: u32 = 28 << 10;

/// Columns of a packed weight that lie together.
pub const TILE: u32 = 32;

/// Invocations of a workgroup of the element-wise kernels.
pub const ELEMENT_LANES: u32 = 64;

/// Elements of a workgroup of `mul_add.wgsl`.
pub const MUL_ADD_ELEMENTS: u32 = 1024;

/// The kernels' files, and what they include.
pub const FILES: [(&str, &str); 32] = [
    ("add_norm.wgsl", include_str!("add_norm.wgsl")),
    ("add_norm_y.wgsl", include_str!("add_norm_y.wgsl")),
    ("attention.wgsl", include_str!("attention.wgsl")),
    ("attention_cut.wgsl", include_str!("attention_cut.wgsl")),
    ("attention_merge.wgsl", include_str!("attention_merge.wgsl")),
    ("attention_scores.wgsl", include_str!("attention_scores.wgsl")),
    ("attention_values.wgsl", include_str!("attention_values.wgsl")),
    ("embed.wgsl", include_str!("embed.wgsl")),
    ("gated_act.wgsl", include_str!("gated_act.wgsl")),
    ("grid.wgsl", include_str!("grid.wgsl")),
    ("kv_head.wgsl", include_str!("kv_head.wgsl")),
    ("mat_mul.wgsl", include_str!("mat_mul.wgsl")),
    ("mat_mul_f16.wgsl", include_str!("mat_mul_f16.wgsl")),
    ("mat_mul_integer.wgsl", include_str!("mat_mul_integer.wgsl")),
    ("mat_mul_io.wgsl", include_str!("mat_mul_io.wgsl")),
    ("mat_mul_matrix.wgsl", include_str!("mat_mul_matrix.wgsl")),
    ("mat_mul_place.wgsl", include_str!("mat_mul_place.wgsl")),
    ("mat_mul_subgroup.wgsl", include_str!("mat_mul_subgroup.wgsl")),
    ("mat_mul_sum.wgsl", include_str!("mat_mul_sum.wgsl")),
    ("mat_mul_tile.wgsl", include_str!("mat_mul_tile.wgsl")),
    ("mul_add.wgsl", include_str!("mul_add.wgsl")),
    ("mul_add_matrix.wgsl", include_str!("mul_add_matrix.wgsl")),
    ("params.wgsl", include_str!("params.wgsl")),
    ("reset_counts.wgsl", include_str!("reset_counts.wgsl")),
    ("rms_norm.wgsl", include_str!("rms_norm.wgsl")),
    ("rope_kv.wgsl", include_str!("rope_kv.wgsl")),
    ("sample.wgsl", include_str!("sample.wgsl")),
    ("sample_row.wgsl", include_str!("sample_row.wgsl")),
    ("sample_slices.wgsl", include_str!("sample_slices.wgsl")),
    ("sum_lanes.wgsl", include_str!("sum_lanes.wgsl")),
    ("update_table.wgsl", include_str!("update_table.wgsl")),
    ("weight.wgsl", include_str!("weight.wgsl")),
];
