//! Cases of the KV cache: `store_kv` bit for bit, and `attention` over sequences that have grown in a shuffled cache.

use super::random::Random;
use super::{Case, Output};
use crate::op::{Attention, Op, StoreKv};
use crate::tensor::{KvType, Tensor};

/// Heads, blocks and window of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub head_dim: u32,
    pub num_kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    pub block_size: u32,
    pub window: u32,
}

impl Heads {
    pub const EVERY: [Heads; 7] = [
        Heads { head_dim: 64, num_kv_heads: 3, group: 3, block_size: 32, window: 0 },
        Heads { head_dim: 64, num_kv_heads: 3, group: 3, block_size: 16, window: 20 },
        Heads { head_dim: 256, num_kv_heads: 1, group: 4, block_size: 32, window: 0 },
        Heads { head_dim: 256, num_kv_heads: 1, group: 4, block_size: 8, window: 40 },
        Heads { head_dim: 16, num_kv_heads: 2, group: 2, block_size: 5, window: 0 },
        Heads { head_dim: 96, num_kv_heads: 2, group: 2, block_size: 5, window: 0 },
        Heads { head_dim: 128, num_kv_heads: 2, group: 1, block_size: 1, window: 0 },
    ];
}

/// Positions of each of three sequences.
const NUM_POSITIONS: u32 = 90;

/// The items of a mixed step.
pub fn attention(kv_type: KvType, heads: Heads) -> Case {
    let Heads { head_dim, num_kv_heads, group, block_size, window } = heads;
    let shape = format!("head {head_dim}, {num_kv_heads} x {group}, block {block_size}, window {window}");
    Case::new("attention", kv_type.name(), shape, move |device| {
        let random = &mut Random::new(6);
        let table_cols = NUM_POSITIONS.div_ceil(block_size);
        let num_blocks = 3 * table_cols;
        let cache = device.kv_cache(kv_type, num_blocks, block_size, num_kv_heads, head_dim)?;
        let mut blocks: Vec<u32> = (0..num_blocks).collect();
        for index in 0..blocks.len() {
            blocks.swap(index, random.below(num_blocks) as usize);
        }
        let table = device.u32(3, table_cols, &blocks)?;
        let slot = |row: u32, position: u32| {
            blocks[(row * table_cols + position / block_size) as usize] * block_size + position % block_size
        };
        let places = (0..3).flat_map(|row| (0..NUM_POSITIONS).map(move |position| (row, position)));
        let slots: Vec<u32> = places.map(|(row, position)| slot(row, position)).collect();
        let num_tokens = slots.len() as u32;
        let k = device.random(num_tokens, num_kv_heads * head_dim, random)?;
        let v = device.random(num_tokens, num_kv_heads * head_dim, random)?;
        let slots = device.u32(num_tokens, 1, &slots)?;
        // A decode at the end, a chunk across a tile, the begin of a prompt, and another decode.
        let items = device.u32(4, 4, &[0, 1, 2, 89, 1, 8, 0, 28, 9, 3, 1, 0, 12, 1, 1, 40])?;
        let num_heads = num_kv_heads * group;
        let q = device.random(13, num_heads * head_dim, random)?;
        let out = device.unwritten(13, num_heads * head_dim)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let ops = [
            Op::StoreKv(StoreKv { k, v, slots, cache }),
            Op::Attention(Attention { q, cache, items, table, num_heads, scale, window, out }),
        ];
        Ok(Output::f32(device.run(&ops, &[out])?, 2e-5))
    })
}

/// What lies in a cache, bit for bit, after values of every magnitude and kind.
pub fn store_kv(kv_type: KvType, head_dim: u32) -> Case {
    Case::new("store_kv", kv_type.name(), format!("head {head_dim}"), move |device| {
        let random = &mut Random::new(9);
        let cache = device.kv_cache(kv_type, 3, 8, 2, head_dim)?;
        // The last token first, into a block of others.
        let slots: Vec<u32> = (0..20).map(|token| (token * 7 + 3) % 24).collect();
        let cols = 2 * head_dim;
        let (k, v) = (magnitudes(cols, 0, random), magnitudes(cols, 11, random));
        let (k, v) = (device.f32(20, cols, &k)?, device.f32(20, cols, &v)?);
        let slots = device.u32(20, 1, &slots)?;
        let size = 24 * 2 * cache.head_words();
        let words = device.run(
            &[Op::StoreKv(StoreKv { k, v, slots, cache })],
            &[Tensor::u32(cache.k, 1, size), Tensor::u32(cache.v, 1, size)],
        )?;
        Ok(Output::exact(words))
    })
}

/// 20 rows of values, each group with a power of its own, and what is special from `first` on.
fn magnitudes(cols: u32, first: usize, random: &mut Random) -> Vec<f32> {
    let mut values = random.floats(20 * cols as usize);
    for (group, values) in values.chunks_mut(32).enumerate() {
        let power = ((first + group) % 50) as i32 * 2 - 60;
        values.iter_mut().for_each(|value| *value *= 2f32.powi(power));
    }
    values[first] = 0.0;
    values[64 + first..64 + first + 32].fill(-0.0);
    values[128 + first] = f32::INFINITY;
    values[200 + first] = -3e38;
    values[300 + first] = f32::MIN_POSITIVE / 8.0;
    values
}
