//! The parameters of each CUDA kernel, as its struct has them: field by field the same names, order and types.
//!
//! Invariant: addresses first, so that nothing lies between fields; `pad` fills a struct up to a whole address. A test
//! holds every struct against the kernels' text.

use bytemuck::{Pod, Zeroable};

/// Of device memory; 0 is null.
pub type Address = u64;

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct UpdateTableParams {
    pub entries: Address,
    pub table: Address,
    pub num_entries: u32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct EmbedParams {
    pub ids: Address,
    pub sampled: Address,
    pub weight: Address,
    pub out: Address,
    pub num_tokens: u32,
    pub cols: u32,
    pub num_units: u32,
    pub scale: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct RmsNormParams {
    pub x: Address,
    pub weight: Address,
    pub out: Address,
    pub halves: Address,
    pub cols: u32,
    pub eps: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MatMulParams {
    pub x: Address,
    pub weight: Address,
    pub bias: Address,
    pub out: Address,
    pub num_rows: u32,
    pub inner: u32,
    pub num_units: u32,
    pub num_cols: u32,
    pub stride: u32,
    pub splits: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MatMulSumParams {
    pub parts: Address,
    pub bias: Address,
    pub out: Address,
    pub num_rows: u32,
    pub num_cols: u32,
    pub stride: u32,
    pub splits: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ToF16Params {
    pub x: Address,
    pub out: Address,
    pub num_rows: u32,
    pub inner: u32,
    pub num_units: u32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct RopeKvParams {
    pub qkv: Address,
    pub norms: Address,
    pub table: Address,
    pub positions: Address,
    pub slots: Address,
    pub q: Address,
    pub k_cache: Address,
    pub v_cache: Address,
    pub num_items: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub half_dim: u32,
    pub halves: u32,
    pub block_size: u32,
    pub eps: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct AttentionParams {
    pub q: Address,
    pub k_cache: Address,
    pub v_cache: Address,
    pub items: Address,
    pub table: Address,
    pub out: Address,
    pub partials: Address,
    pub pair_blocks: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub table_cols: u32,
    pub block_size: u32,
    pub window: u32,
    pub scale: f32,
    pub soft_cap: f32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct AttentionMergeParams {
    pub merges: Address,
    pub partials: Address,
    pub out: Address,
    pub num_merges: u32,
    pub num_heads: u32,
    pub head_dim: u32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct GatedActParams {
    pub gate_up: Address,
    pub out: Address,
    pub halves: Address,
    pub rows: u32,
    pub cols: u32,
    pub activation: u32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct AddNormParams {
    pub x: Address,
    pub y: Address,
    pub post_weight: Address,
    pub rows: Address,
    pub weight: Address,
    pub out: Address,
    pub halves: Address,
    pub cols: u32,
    pub eps: f32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ResetCountsParams {
    pub resets: Address,
    pub tokens: Address,
    pub counts: Address,
    pub vocab: u32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct SampleParams {
    pub logits: Address,
    pub rows: Address,
    pub extras: Address,
    pub counts: Address,
    pub slices: Address,
    pub sampled: Address,
    pub chosen: Address,
    pub top: Address,
    pub vocab: u32,
    pub num_slices: u32,
    pub slice_len: u32,
    pub pad: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MulAddParams {
    pub x: Address,
    pub num_elements: u32,
    pub scale: f32,
    pub offset: f32,
    pub rounds: u32,
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;
    use crate::backend::cuda::kernel::Kernel;
    use crate::op::SampleRow;

    /// Name, and whether it is a float, of each field, as its zero is printed.
    fn fields<T: Pod + Debug>() -> Vec<(String, bool)> {
        // An array is as many fields.
        let text = format!("{:?}", T::zeroed()).replace("seed: [0, 0]", "seed_low: 0, seed_high: 0");
        let (_, inside) = text.trim_end_matches('}').split_once('{').expect("a struct with fields");
        let field = |field: &str| {
            let (name, zero) = field.split_once(':').expect("a name and a value");
            (name.trim().to_owned(), zero.trim() == "0.0")
        };
        inside.split(',').map(field).filter(|(name, _)| name != "pad").collect()
    }

    fn of_kernel(kernel: Kernel) -> (Vec<(String, bool)>, usize) {
        fn of<T: Pod + Debug>() -> (Vec<(String, bool)>, usize) {
            (fields::<T>(), size_of::<T>())
        }
        match kernel {
            Kernel::UpdateTable => of::<UpdateTableParams>(),
            Kernel::Embed(_) => of::<EmbedParams>(),
            Kernel::RmsNorm => of::<RmsNormParams>(),
            Kernel::MatMul(..) => of::<MatMulParams>(),
            Kernel::MatMulSum => of::<MatMulSumParams>(),
            Kernel::ToF16 => of::<ToF16Params>(),
            Kernel::RopeKv(_) => of::<RopeKvParams>(),
            Kernel::Attention(..) | Kernel::AttentionMatrix(..) => of::<AttentionParams>(),
            Kernel::AttentionMerge(_) => of::<AttentionMergeParams>(),
            Kernel::GatedAct => of::<GatedActParams>(),
            Kernel::AddNorm => of::<AddNormParams>(),
            Kernel::ResetCounts => of::<ResetCountsParams>(),
            Kernel::SampleSlices | Kernel::Sample => of::<SampleParams>(),
            Kernel::MulAdd | Kernel::MulAddMatrix => of::<MulAddParams>(),
        }
    }

    #[test]
    fn the_parameters_of_every_kernel_lie_where_it_reads_them() {
        for kernel in Kernel::all() {
            let (module, name) = kernel.source();
            let (_, params) = module.kernel(name).expect("it is in its module");
            let in_cuda = module.fields(params).expect("its struct is there");
            let addresses = in_cuda.iter().take_while(|(kind, _)| kind.ends_with('*')).count();
            assert!(in_cuda[addresses..].iter().all(|(kind, _)| matches!(*kind, "u32" | "f32")), "{kernel:?}");
            let size_bytes = (8 * addresses + 4 * (in_cuda.len() - addresses)).next_multiple_of(8);
            let (fields, size) = of_kernel(kernel);
            let names = in_cuda.iter().map(|(kind, name)| ((*name).to_owned(), *kind == "f32"));
            assert_eq!((fields, size), (names.collect(), size_bytes), "{kernel:?}");
        }
    }

    #[test]
    fn a_row_to_sample_is_what_its_kernels_read() {
        let (module, _) = Kernel::Sample.source();
        let row = module.fields("Row").expect("its struct is there");
        let row: Vec<_> = row.into_iter().map(|(kind, name)| (name.to_owned(), kind == "f32")).collect();
        assert_eq!(fields::<SampleRow>(), row);
    }
}
