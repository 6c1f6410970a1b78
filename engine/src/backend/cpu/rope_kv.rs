//! Heads of q and k through their norm, and rotated by their position's angles; k and v into the cache.

use super::{Memory, for_rows, kv_head, rms_norm};
use crate::op::{RopeKv, RopeStyle};
use crate::tensor::{BufferId, Tensor};

pub(super) fn run(op: RopeKv, memory: &mut Memory) {
    let (q_dim, kv_dim) = (op.q.cols as usize, (op.cache.num_kv_heads * op.cache.head_dim) as usize);
    memory.write_f32(op.q, |memory, q| {
        let heads = Heads::new(op, memory);
        for_rows(q, q_dim, |token, q| {
            q.copy_from_slice(&heads.token(token)[..q_dim]);
            heads.rotate(token, 0, q);
        });
    });
    store(op, op.cache.k, memory, |heads, token, k| {
        k.copy_from_slice(&heads.token(token)[q_dim..][..kv_dim]);
        heads.rotate(token, 1, k);
    });
    store(op, op.cache.v, memory, |heads, token, v| v.copy_from_slice(&heads.token(token)[q_dim + kv_dim..]));
}

/// Puts the heads that `work` makes of each token into the token's slot of `buffer`.
fn store(op: RopeKv, buffer: BufferId, memory: &mut Memory, work: impl Fn(&Heads, usize, &mut [f32])) {
    let (head_dim, head_words) = (op.cache.head_dim as usize, op.cache.head_words() as usize);
    let mut values = vec![0.0; head_dim * op.cache.num_kv_heads as usize];
    let num_words = memory.buffers[buffer.0 as usize].len() as u32;
    memory.write_u32(Tensor::u32(buffer, 1, num_words), |memory, cache| {
        let heads = Heads::new(op, memory);
        for (token, &slot) in memory.u32(op.slots).iter().enumerate() {
            work(&heads, token, &mut values);
            let (block, offset) = (slot / op.cache.block_size, slot % op.cache.block_size);
            for (head, values) in values.chunks_exact(head_dim).enumerate() {
                let words = &mut cache[op.cache.head_at(block, head as u32, offset)..][..head_words];
                kv_head::store(op.cache.kv_type, values, words);
            }
        }
    });
}

/// What the heads of a token come from.
struct Heads<'a> {
    op: RopeKv,
    qkv: &'a [f32],
    norms: Option<&'a [f32]>,
    positions: &'a [u32],
    table: &'a [f32],
}

impl<'a> Heads<'a> {
    fn new(op: RopeKv, memory: &'a Memory) -> Heads<'a> {
        let norms = op.norms.map(|norms| memory.f32(norms));
        let (positions, table) = (memory.u32(op.positions), memory.f32(op.table));
        Heads { op, qkv: memory.f32(op.qkv), norms, positions, table }
    }

    fn token(&self, token: usize) -> &'a [f32] {
        let width = self.op.qkv.cols as usize;
        &self.qkv[token * width..][..width]
    }

    /// Norms and rotates heads of a token; `norm` is 0 for q, 1 for k.
    fn rotate(&self, token: usize, norm: usize, heads: &mut [f32]) {
        let (head_dim, rotary_dim) = (self.op.cache.head_dim as usize, self.op.table.cols as usize);
        let angles = &self.table[self.positions[token] as usize * rotary_dim..][..rotary_dim];
        let (cos, sin) = angles.split_at(rotary_dim / 2);
        for head in heads.chunks_exact_mut(head_dim) {
            if let Some(norms) = self.norms {
                let scale = rms_norm::scale(head, self.op.eps);
                head.iter_mut().zip(&norms[norm * head_dim..]).for_each(|(x, weight)| *x = *x * scale * weight);
            }
            rotate(head, cos, sin, self.op.style);
        }
    }
}

fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], style: RopeStyle) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = match style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Halves => (i, i + half),
        };
        let (x, y) = (head[a], head[b]);
        head[a] = x * cos[i] - y * sin[i];
        head[b] = x * sin[i] + y * cos[i];
    }
}
