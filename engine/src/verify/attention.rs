//! Cases of the KV cache: what `rope_kv` turns and stores, and `attention` over sequences that have grown in a shuffled
//! cache.

use half::f16;

use super::device::Device;
use super::random::Random;
use super::{Case, Output, holds_in_company};
use crate::backend::DeviceError;
use crate::batch::attention::{AttentionLimits, AttentionPlan, QueryRows};
use crate::op::{ATTENTION_CUT, ATTENTION_ITEM_WORDS, ATTENTION_MERGE_WORDS, Attention, Op, RopeKv, RopeStyle};
use crate::tensor::{DType, KvTensor, KvType, Tensor};

/// Heads, blocks and window of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub head_dim: u32,
    pub num_kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    pub block_size: u32,
    pub window: u32,
    /// Of each of three sequences.
    pub num_positions: u32,
    pub soft_cap: f32,
}

impl Heads {
    /// What a cache of `kv_type` is tried with. Every shape that differs is a kernel to compile: not all with all
    /// types.
    pub fn of(kv_type: KvType) -> Vec<Heads> {
        let both = [Heads::new(64, 3, 3, 32), Heads { window: 20, soft_cap: 0.5, ..Heads::new(64, 3, 3, 16) }];
        let own = match kv_type {
            KvType::F16 => vec![
                Heads { window: 40, ..Heads::new(256, 1, 4, 8) },
                Heads::new(16, 2, 2, 5),
                Heads { num_positions: 300, ..Heads::new(100, 1, 2, 8) },
                Heads { num_positions: 700, ..Heads::new(128, 1, 7, 32) },
            ],
            KvType::Q8_0 | KvType::Q4_0 => vec![
                Heads { soft_cap: 30.0, ..Heads::new(96, 2, 5, 5) },
                Heads { window: 300, num_positions: 700, ..Heads::new(32, 1, 16, 16) },
            ],
        };
        both.into_iter().chain(own).collect()
    }

    /// In short sequences, without a window.
    pub const fn new(head_dim: u32, num_kv_heads: u32, group: u32, block_size: u32) -> Heads {
        Heads { head_dim, num_kv_heads, group, block_size, window: 0, num_positions: 90, soft_cap: 0.0 }
    }
}

/// What an attention op reads of a plan.
pub struct Planned {
    pub items: Tensor,
    pub num_single_rows: u32,
    pub merges: Tensor,
    pub partials: Tensor,
}

impl Planned {
    /// `tensor` makes one of some words in rows of so many.
    pub fn new<E>(
        rows: &[QueryRows],
        window: u32,
        cache: KvTensor,
        num_heads: u32,
        num_partials: u32,
        mut tensor: impl FnMut(&[u32], u32) -> Result<Tensor, E>,
    ) -> Result<Planned, E> {
        let mut plan = AttentionPlan::default();
        let limits = AttentionLimits { windows: vec![window], num_kv_heads: cache.num_kv_heads, num_partials };
        plan.fill(rows.iter().copied(), window, &limits);
        // A buffer has at least one word.
        let merges = [&plan.merges[..], &[0; ATTENTION_MERGE_WORDS as usize]].concat();
        let num_merges = plan.merges.len() as u32 / ATTENTION_MERGE_WORDS;
        let merges = tensor(&merges, ATTENTION_MERGE_WORDS)?.first_rows(num_merges);
        let cols = Attention::partial_cols(num_heads, cache.head_dim);
        let partials = tensor(&vec![f32::NAN.to_bits(); (num_partials.max(1) * cols) as usize], cols)?;
        Ok(Planned {
            items: tensor(&plan.items, ATTENTION_ITEM_WORDS)?,
            num_single_rows: plan.num_single_rows,
            merges,
            partials: Tensor { dtype: DType::F32, ..partials },
        })
    }
}

/// What a mixed step attends, some of its items split.
pub fn attention(kv_type: KvType, heads: Heads) -> Case {
    let Heads { head_dim, num_kv_heads, group, block_size, window, num_positions, soft_cap } = heads;
    let name = format!("head {head_dim}, {num_kv_heads} x {group}");
    let shape = format!("{name}, block {block_size}, window {window}, cap {soft_cap}, {num_positions} positions");
    Case::new("attention", kv_type.name(), shape, move |device| {
        let words = attend(device, kv_type, heads, MAX_SPLITS, false)?;
        Ok(Output::f32(words, device.backend().attention_tolerance()))
    })
}

/// The same step with and without splitting, and, where the arithmetic promises it, each row by itself: how many
/// elements are not the same to the bit.
pub fn in_company(kv_type: KvType, heads: Heads) -> Case {
    let Heads { head_dim, num_kv_heads, group, num_positions, .. } = heads;
    let shape = format!("head {head_dim}, {num_kv_heads} x {group}, {num_positions} positions, alone and in company");
    Case::new("attention", kv_type.name(), shape, move |device| {
        let planned = attend(device, kv_type, heads, MAX_SPLITS, false)?;
        let mut others = vec![attend(device, kv_type, heads, 0, false)?];
        if holds_in_company(&device.backend().info().arithmetic) {
            others.push(attend(device, kv_type, heads, 0, true)?);
        }
        Ok(Output::differing(others.iter().map(|other| (&other[..], &planned[..]))))
    })
}

/// Parts of split rows that have room.
const MAX_SPLITS: u32 = 8;

/// The items of a mixed step over sequences that have grown in a shuffled cache; with `num_partials` of 0 none is
/// split, and where rows are `apart` each is an item.
fn attend(
    device: &mut Device,
    kv_type: KvType,
    heads: Heads,
    num_partials: u32,
    apart: bool,
) -> Result<Vec<u32>, DeviceError> {
    let Heads { head_dim, num_kv_heads, group, block_size, window, num_positions, soft_cap } = heads;
    let random = &mut Random::new(6);
    let table_cols = num_positions.div_ceil(block_size);
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
    let places = (0..3).flat_map(|row| (0..num_positions).map(move |position| (row, position)));
    let slots: Vec<u32> = places.map(|(row, position)| slot(row, position)).collect();
    let num_tokens = slots.len() as u32;
    let num_values = (num_tokens * num_kv_heads * head_dim) as usize;
    let (k, v) = (random.floats(num_values), random.floats(num_values));
    let slots = device.u32(num_tokens, 1, &slots)?;
    // A decode at the end, a chunk across a tile or a cut, the begin of a prompt, and its last token in another.
    let chunk = if num_positions > ATTENTION_CUT + 4 { ATTENTION_CUT - 4 } else { 28 };
    let rows = [(0, 1, 2, num_positions - 1), (1, 8, 0, chunk), (9, 3, 1, 0), (12, 1, 1, num_positions - 2)];
    let rows = rows.into_iter().flat_map(|(first_row, num_rows, slot, position)| {
        let of_item = if apart { 1 } else { num_rows };
        (0..num_rows / of_item).map(move |row| QueryRows {
            first_row: first_row + row,
            num_rows: of_item,
            slot,
            position: position + row,
        })
    });
    let rows: Vec<QueryRows> = rows.collect();
    let num_heads = num_kv_heads * group;
    let tensor = |words: &[u32], cols: u32| device.u32(words.len() as u32 / cols, cols, words);
    let Planned { items, num_single_rows, merges, partials } =
        Planned::new(&rows, window, cache, num_heads, num_partials, tensor)?;
    let num_split = 2 * u32::from(num_positions > ATTENTION_CUT && num_partials > 0);
    assert!(window > 0 || merges.rows == num_split, "who is split");
    let q = device.random(13, num_heads * head_dim, random)?;
    let out = device.unwritten(13, num_heads * head_dim)?;
    let attention = Attention {
        q,
        cache,
        items,
        num_single_rows,
        merges,
        partials,
        table,
        num_heads,
        scale: 1.0 / (head_dim as f32).sqrt(),
        soft_cap,
        window,
        out,
    };
    let ops = [stored(device, &k, &v, slots, cache)?, Op::Attention(attention)];
    device.run(&ops, &[out])
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
    let name = format!("head {head_dim}, the cache");
    Case::new("rope_kv", kv_type.name(), name, move |device| {
        let random = &mut Random::new(9);
        let (k, v) = (magnitudes(head_dim, 0, random), magnitudes(head_dim, 11, random));
        in_cache(device, kv_type, head_dim, &k, &v)
    })
}

/// The same of NaNs of both signs. Not asked at a start: a driver may take it that there are none.
pub fn stores_nans(kv_type: KvType, head_dim: u32) -> Case {
    let name = format!("head {head_dim}, NaNs in the cache");
    Case::new("rope_kv", kv_type.name(), name, move |device| {
        let mut values = Random::new(9).floats((NUM_STORED * 2 * head_dim) as usize);
        let nans = [0x7fc0_0000, 0xffc0_0000, 0x7fff_ffff, 0xffff_ffff].map(f32::from_bits);
        values.chunks_exact_mut(head_dim as usize).zip(nans.into_iter().cycle()).for_each(|(head, nan)| head[5] = nan);
        in_cache(device, kv_type, head_dim, &values, &values)
    })
}

/// Tokens, of two heads each.
const NUM_STORED: u32 = 20;

fn in_cache(
    device: &mut Device,
    kv_type: KvType,
    head_dim: u32,
    k: &[f32],
    v: &[f32],
) -> Result<Vec<Output>, DeviceError> {
    let cache = device.kv_cache(kv_type, 3, 8, 2, head_dim)?;
    // The last token first, into a block of others.
    let slots: Vec<u32> = (0..NUM_STORED).map(|token| (token * 7 + 3) % 24).collect();
    let slots = device.u32(NUM_STORED, 1, &slots)?;
    let size = 24 * 2 * cache.head_words();
    let store = stored(device, k, v, slots, cache)?;
    let words = device.run(&[store], &[Tensor::u32(cache.k, 1, size), Tensor::u32(cache.v, 1, size)])?;
    Ok(Output::exact(words))
}

/// Values of two heads a token, each group with a power of its own, and what is special from `first` on. Not where a
/// head turns, though it turns by nothing: there an infinity would make a NaN, and a zero's sign be a device's own.
fn magnitudes(head_dim: u32, first: usize, random: &mut Random) -> Vec<f32> {
    let turns = |index: usize| index % (head_dim as usize) < 2;
    let mut values = random.floats((NUM_STORED * 2 * head_dim) as usize);
    for (group, values) in values.chunks_mut(32).enumerate() {
        let power = ((first + group) % 50) as i32 * 2 - 60;
        values.iter_mut().for_each(|value| *value *= 2f32.powi(power));
    }
    (64 + first..64 + first + 32).for_each(|index| values[index] = if turns(index) { 0.0 } else { -0.0 });
    let special = [(0, 0.0), (128, f32::INFINITY), (200, -3e38), (300, f32::MIN_POSITIVE / 8.0)];
    for (at, value) in special.map(|(at, value)| (at + first, value)) {
        values[if turns(at) { at + 2 } else { at }] = value;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::twin;

    /// Of a NaN that it has made itself no device says the sign.
    #[test]
    fn nothing_that_a_start_compares_bit_for_bit_makes_a_nan() {
        for head_dim in [16, 20, 32, 64, 80, 96, 100, 128, 192, 256] {
            let outputs = stores(KvType::F16, head_dim).run(&mut twin().expect("threads")).expect("memory");
            let halves = outputs[0].words.iter().flat_map(|word| [*word as u16, (word >> 16) as u16]);
            let halves: Vec<f16> = halves.map(f16::from_bits).collect();
            assert!(halves.iter().all(|half| !half.is_nan()), "head {head_dim}");
            assert!(halves.contains(&f16::INFINITY) && halves.contains(&f16::NEG_INFINITY), "head {head_dim}");
        }
    }
}
