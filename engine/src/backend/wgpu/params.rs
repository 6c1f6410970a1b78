//! The scalars of each kernel, as its `Params` has them: field by field the same names, order and types.
//!
//! Invariant: four bytes a field, nothing between them. A test holds every struct against what naga says of the WGSL.

use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct UpdateTableParams {
    pub entries: u32,
    pub table: u32,
    pub num_entries: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct EmbedParams {
    pub ids: u32,
    pub sampled: u32,
    pub out: u32,
    pub num_tokens: u32,
    pub cols: u32,
    pub num_units: u32,
    pub first_row: u32,
    pub num_rows: u32,
    pub scale: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct RmsNormParams {
    pub x: u32,
    pub weight: u32,
    pub out: u32,
    pub rows: u32,
    pub cols: u32,
    pub eps: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MatMulParams {
    pub x: u32,
    pub bias: u32,
    pub out: u32,
    pub has_bias: u32,
    pub first_row: u32,
    pub num_rows: u32,
    pub inner: u32,
    pub num_units: u32,
    pub cols: u32,
    pub first_col: u32,
    pub shard_cols: u32,
    pub row_tiles: u32,
    pub span_units: u32,
    pub group_spans: u32,
    pub span_groups: u32,
    pub partial_stride: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MatMulSumParams {
    pub partials: u32,
    pub bias: u32,
    pub out: u32,
    pub has_bias: u32,
    pub num_rows: u32,
    pub num_cols: u32,
    pub cols: u32,
    pub num_partials: u32,
    pub partial_stride: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct RopeKvParams {
    pub qkv: u32,
    pub norms: u32,
    pub table: u32,
    pub positions: u32,
    pub slots: u32,
    pub q: u32,
    pub has_norms: u32,
    pub num_items: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub half_dim: u32,
    pub halves: u32,
    pub block_size: u32,
    pub eps: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct AttentionParams {
    pub q: u32,
    pub items: u32,
    pub table: u32,
    pub out: u32,
    pub partials: u32,
    pub merges: u32,
    pub num_items: u32,
    pub num_merges: u32,
    pub row_groups: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub table_cols: u32,
    pub block_size: u32,
    pub window: u32,
    pub scale: f32,
    pub soft_cap: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct GatedActParams {
    pub gate_up: u32,
    pub out: u32,
    pub rows: u32,
    pub cols: u32,
    pub parts_log2: u32,
    pub span: u32,
    pub activation: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct AddNormParams {
    pub x: u32,
    pub y: u32,
    pub post_weight: u32,
    pub rows: u32,
    pub weight: u32,
    pub out: u32,
    pub has_post: u32,
    pub has_rows: u32,
    pub num_rows: u32,
    pub cols: u32,
    pub eps: f32,
    pub num_partials: u32,
    pub partial_stride: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ResetCountsParams {
    pub resets: u32,
    pub tokens: u32,
    pub counts: u32,
    pub num_resets: u32,
    pub vocab: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct SampleSlicesParams {
    pub logits: u32,
    pub rows: u32,
    pub extras: u32,
    pub counts: u32,
    pub slices: u32,
    pub num_rows: u32,
    pub vocab: u32,
    pub num_slices: u32,
    pub slice_len: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct SampleParams {
    pub logits: u32,
    pub rows: u32,
    pub extras: u32,
    pub counts: u32,
    pub slices: u32,
    pub sampled: u32,
    pub chosen: u32,
    pub top: u32,
    pub num_rows: u32,
    pub vocab: u32,
    pub num_slices: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MulAddParams {
    pub x: u32,
    pub num_elements: u32,
    pub scale: f32,
    pub offset: f32,
    pub num_eights: u32,
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use fullbore_shaders::{Member, Tier, compose, members};

    use super::*;
    use crate::backend::wgpu::pipelines::Kernel;
    use crate::op::SampleRow;

    fn of_kernel(kernel: Kernel) -> Vec<Member> {
        match kernel {
            Kernel::UpdateTable => fields::<UpdateTableParams>(),
            Kernel::Embed(_) => fields::<EmbedParams>(),
            Kernel::RmsNorm => fields::<RmsNormParams>(),
            Kernel::MatMul(..) => fields::<MatMulParams>(),
            Kernel::MatMulSum => fields::<MatMulSumParams>(),
            Kernel::RopeKv(..) => fields::<RopeKvParams>(),
            Kernel::Attention(..) => fields::<AttentionParams>(),
            Kernel::GatedAct => fields::<GatedActParams>(),
            Kernel::AddNorm => fields::<AddNormParams>(),
            Kernel::ResetCounts => fields::<ResetCountsParams>(),
            Kernel::SampleSlices => fields::<SampleSlicesParams>(),
            Kernel::Sample => fields::<SampleParams>(),
            Kernel::MulAdd | Kernel::MulAddMatrix(_) => fields::<MulAddParams>(),
        }
    }

    /// What a struct of four-byte scalars is made of, from how its zeros are printed.
    fn fields<T: Pod + Debug>() -> Vec<Member> {
        // An array is as many fields.
        let text = format!("{:?}", T::zeroed()).replace("seed: [0, 0]", "seed_low: 0, seed_high: 0");
        let (_, inside) = text.trim_end_matches('}').split_once('{').expect("a struct with fields");
        let member = |(index, field): (usize, &str)| {
            let (name, zero) = field.split_once(':').expect("a name and a value");
            Member { name: name.trim().to_owned(), offset: index as u32 * 4, is_float: zero.trim() == "0.0" }
        };
        let fields: Vec<Member> = inside.split(',').enumerate().map(member).collect();
        assert_eq!(fields.len() * 4, size_of::<T>(), "{text}");
        fields
    }

    fn in_wgsl(kernel: Kernel, tier: Tier, name: &str) -> Vec<Member> {
        let (file, constants) = kernel.source(tier);
        let text = compose(file, &constants).expect("it composes");
        members(&text, name).expect("it parses").unwrap_or_else(|| panic!("{file}.wgsl has no struct {name}"))
    }

    #[test]
    fn the_scalars_of_every_kernel_lie_where_its_shader_reads_them() {
        for tier in Tier::ALL {
            for kernel in Kernel::all(tier, &[(64, 3)]) {
                assert_eq!(in_wgsl(kernel, tier, "Params"), of_kernel(kernel), "{kernel:?}, {tier:?}");
            }
        }
    }

    #[test]
    fn a_row_to_sample_is_what_its_shaders_read() {
        let mut expected = fields::<SampleRow>();
        // `target` is no name in WGSL.
        let target = expected.iter_mut().find(|field| field.name == "target").expect("a field");
        target.name = "given".to_owned();
        for kernel in [Kernel::SampleSlices, Kernel::Sample] {
            assert_eq!(in_wgsl(kernel, Tier::Base, "Row"), expected);
        }
    }

    #[test]
    fn a_field_that_moved_is_seen() {
        let text = "struct Params { x: u32, eps: f32 } var<private> p: Params;";
        let found = members(text, "Params").expect("it parses").expect("it is there");
        let field = |name: &str, offset, is_float| Member { name: name.to_owned(), offset, is_float };
        assert_eq!(found, [field("x", 0, false), field("eps", 4, true)]);
        assert_eq!(members(text, "Row").expect("it parses"), None);
        assert!(members("struct Params { x: vec2<u32> } var<private> p: Params;", "Params").is_err());
    }
}
