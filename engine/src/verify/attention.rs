//! Cases of the KV cache: what `rope_kv` turns and stores, and `attention` over sequences that have grown in a shuffled
//! cache.

use half::f16;

use super::device::Device;
use super::random::Random;
use super::{Case, Output};
use crate::backend::DeviceError;
use crate::op::{Attention, Op, RopeKv, RopeStyle};
use crate::tensor::{KvTensor, KvType, Tensor};

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
        let num_values = (num_tokens * num_kv_heads * head_dim) as usize;
        let (k, v) = (random.floats(num_values), random.floats(num_values));
        let slots = device.u32(num_tokens, 1, &slots)?;
        // A decode at the end, a chunk across a tile, the begin of a prompt, and another decode.
        let items = device.u32(4, 4, &[0, 1, 2, 89, 1, 8, 0, 28, 9, 3, 1, 0, 12, 1, 1, 40])?;
        let num_heads = num_kv_heads * group;
        let q = device.random(13, num_heads * head_dim, random)?;
        let out = device.unwritten(13, num_heads * head_dim)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let ops = [
            stored(device, &k, &v, slots, cache)?,
            Op::Attention(Attention { q, cache, items, table, num_heads, scale, window, out }),
        ];
        Ok(Output::f32(device.run(&ops, &[out])?, 2e-5))
    })
}

/// Puts k and v, (tokens, num_kv_heads * head_dim), into their slots as they are: at position 0, with nothing to turn.
pub fn stored(device: &mut Device, k: &[f32], v: &[f32], slots: Tensor, cache: KvTensor) -> Result<Op, DeviceError> {
    let (num_tokens, head_dim) = (slots.rows, cache.head_dim);
    let qkv = device.f32(num_tokens, (1 + 2 * cache.num_kv_heads) * head_dim, &qkv_rows(k, v, cache))?;
    let positions = device.u32(num_tokens, 1, &vec![0; num_tokens as usize])?;
    let table = device.f32(1, 2, &[1.0, 0.0])?;
    let q = device.unwritten(num_tokens, head_dim)?;
    let style = RopeStyle::Halves;
    Ok(Op::RopeKv(RopeKv { qkv, norms: None, eps: 1e-5, positions, table, style, slots, cache, q }))
}

/// Rows of one head of q, which are zero, and of all heads of k and v.
pub fn qkv_rows(k: &[f32], v: &[f32], cache: KvTensor) -> Vec<f32> {
    let kv_dim = (cache.num_kv_heads * cache.head_dim) as usize;
    let q = vec![0.0; cache.head_dim as usize];
    k.chunks_exact(kv_dim).zip(v.chunks_exact(kv_dim)).flat_map(|(k, v)| [&q, k, v].concat()).collect()
}

/// How heads are turned.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    pub style: RopeStyle,
    pub head_dim: u32,
    pub rotary_dim: u32,
    pub has_norms: bool,
}

/// q as it is turned, and what an f16 cache holds: the last bits of k may fall on either side of an edge of f16.
pub fn rope_kv(kv_type: KvType, Turn { style, head_dim, rotary_dim, has_norms }: Turn) -> Case {
    let style_name = match style {
        RopeStyle::Interleaved => "interleaved",
        RopeStyle::Halves => "halves",
    };
    let shape = format!("{rotary_dim} of head {head_dim}, norms {has_norms}");
    Case::new("rope_kv", &format!("{} {style_name}", kv_type.name()), shape, move |device| {
        let random = &mut Random::new(5);
        let cache = device.kv_cache(kv_type, 4, 8, 2, head_dim)?;
        let qkv = device.random(9, (3 + 2 * 2) * head_dim, random)?;
        let table = device.random(50, rotary_dim, random)?;
        let positions = device.u32(9, 1, &[0, 1, 2, 49, 3, 17, 17, 8, 30])?;
        let slots = device.u32(9, 1, &[7, 31, 0, 1, 8, 16, 17, 2, 23])?;
        let norms = if has_norms { Some(device.random(2, head_dim, random)?) } else { None };
        let q = device.unwritten(9, 3 * head_dim)?;
        let op = RopeKv { qkv, norms, eps: 1e-5, positions, table, style, slots, cache, q };
        let size = 32 * 2 * cache.head_words();
        let mut words =
            device.run(&[Op::RopeKv(op)], &[q, Tensor::u32(cache.k, 1, size), Tensor::u32(cache.v, 1, size)])?;
        let stored = words.split_off((q.rows * q.cols) as usize);
        let mut outputs = vec![Output { name: "q", words, tolerance: 2e-6 }];
        if kv_type == KvType::F16 {
            let halves = stored.iter().flat_map(|word| [*word as u16, (word >> 16) as u16]);
            let words = halves.map(|half| f16::from_bits(half).to_f32().to_bits()).collect();
            outputs.push(Output { name: "k and v", words, tolerance: 1e-3 });
        }
        Ok(outputs)
    })
}

/// What lies in a cache, bit for bit, after values of every magnitude and kind with nothing to turn.
pub fn stores(kv_type: KvType, head_dim: u32) -> Case {
    Case::new("rope_kv", kv_type.name(), format!("head {head_dim}, the cache"), move |device| {
        let random = &mut Random::new(9);
        let cache = device.kv_cache(kv_type, 3, 8, 2, head_dim)?;
        // The last token first, into a block of others.
        let slots: Vec<u32> = (0..20).map(|token| (token * 7 + 3) % 24).collect();
        let cols = 2 * head_dim;
        let (k, v) = (magnitudes(cols, 0, random), magnitudes(cols, 11, random));
        let slots = device.u32(20, 1, &slots)?;
        let size = 24 * 2 * cache.head_words();
        let store = stored(device, &k, &v, slots, cache)?;
        let words = device.run(&[store], &[Tensor::u32(cache.k, 1, size), Tensor::u32(cache.v, 1, size)])?;
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
