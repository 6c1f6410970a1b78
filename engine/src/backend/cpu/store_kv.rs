//! K and V of each token into its cache slot, in the cache's element type.

use super::{Memory, kv_head};
use crate::op::StoreKv;
use crate::tensor::Tensor;

pub(super) fn run(op: StoreKv, memory: &mut Memory) {
    for (x, buffer) in [(op.k, op.cache.k), (op.v, op.cache.v)] {
        let words = memory.buffers[buffer.0 as usize].len() as u32;
        memory.write_u32(Tensor::u32(buffer, 1, words), |memory, cache| {
            store(op, memory.f32(x), memory.u32(op.slots), cache);
        });
    }
}

fn store(op: StoreKv, x: &[f32], slots: &[u32], cache: &mut [u32]) {
    let (head_dim, head_words) = (op.cache.head_dim as usize, op.cache.head_words() as usize);
    let token_dim = head_dim * op.cache.num_kv_heads as usize;
    for (token, &slot) in x.chunks_exact(token_dim).zip(slots) {
        let (block, offset) = (slot / op.cache.block_size, slot % op.cache.block_size);
        for (head, x) in token.chunks_exact(head_dim).enumerate() {
            let words = &mut cache[op.cache.head_at(block, head as u32, offset)..][..head_words];
            kv_head::store(op.cache.kv_type, x, words);
        }
    }
}
