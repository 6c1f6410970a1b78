//! K and V of each token into its cache slot, as f16.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::Memory;
use crate::op::StoreKv;
use crate::tensor::Tensor;

pub(super) fn run(op: StoreKv, memory: &mut Memory) {
    for (x, buffer) in [(op.k, op.cache.k), (op.v, op.cache.v)] {
        let words = memory.buffers[buffer.0 as usize].len() as u32;
        memory.write_u32(Tensor::u32(buffer, 1, words), |memory, cache| {
            let cache: &mut [f16] = bytemuck::cast_slice_mut::<u32, u16>(cache).reinterpret_cast_mut();
            store(op, memory.f32(x), memory.u32(op.slots), cache);
        });
    }
}

fn store(op: StoreKv, x: &[f32], slots: &[u32], cache: &mut [f16]) {
    let (head_dim, num_heads) = (op.cache.head_dim as usize, op.cache.num_kv_heads as usize);
    let block_size = op.cache.block_size as usize;
    for (token, &slot) in x.chunks_exact(head_dim * num_heads).zip(slots) {
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        for (head, x) in token.chunks_exact(head_dim).enumerate() {
            let at = ((block * num_heads + head) * block_size + offset) * head_dim;
            cache[at..at + head_dim].convert_from_f32_slice(x);
        }
    }
}
