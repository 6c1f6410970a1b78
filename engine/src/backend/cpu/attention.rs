//! Causal paged attention: scores, softmax and value sum tile by tile, with the running maximum carried along.
//!
//! Tiles begin at multiples of `ATTENTION_TILE`, whatever the chunk, so a row's numbers depend on its position and its
//! cache alone. A tile's K and V are widened once for all rows and query heads that share them.

use rayon::prelude::*;

use super::{Memory, kv_head};
use crate::op::{ATTENTION_TILE, Attention};
use crate::tensor::BufferId;

const TILE: usize = ATTENTION_TILE as usize;

pub(super) fn run(op: Attention, memory: &mut Memory) {
    memory.write_f32(op.out, |memory, out| {
        let items = memory.u32(op.items);
        let num_kv_heads = op.cache.num_kv_heads as usize;
        let work = (0..items.len() / 4 * num_kv_heads).into_par_iter();
        let results: Vec<Vec<f32>> = work
            .map(|index| {
                let item = &items[index / num_kv_heads * 4..][..4];
                let group = Group { op, memory, item: Item::new(item), kv_head: index % num_kv_heads };
                group.attend()
            })
            .collect();
        let width = (op.num_heads / op.cache.num_kv_heads * op.cache.head_dim) as usize;
        for (index, result) in results.iter().enumerate() {
            let item = Item::new(&items[index / num_kv_heads * 4..][..4]);
            for (row, values) in result.chunks_exact(width).enumerate() {
                let at = (item.first_row + row) * width * num_kv_heads + index % num_kv_heads * width;
                out[at..at + width].copy_from_slice(values);
            }
        }
    });
}

struct Item {
    first_row: usize,
    num_rows: usize,
    table_row: usize,
    position: usize,
}

impl Item {
    fn new(words: &[u32]) -> Item {
        let [first_row, num_rows, table_row, position] = [0, 1, 2, 3].map(|i| words[i] as usize);
        Item { first_row, num_rows, table_row, position }
    }
}

/// The query heads of one item that read one KV head.
struct Group<'a> {
    op: Attention,
    memory: &'a Memory,
    item: Item,
    kv_head: usize,
}

/// What a row and head has seen so far.
struct Running {
    max: f32,
    sum: f32,
}

impl Group<'_> {
    /// (rows, query heads of the group, head_dim)
    fn attend(&self) -> Vec<f32> {
        let head_dim = self.op.cache.head_dim as usize;
        let num_heads = (self.op.num_heads / self.op.cache.num_kv_heads) as usize;
        let mut out = vec![0.0; self.item.num_rows * num_heads * head_dim];
        let mut running: Vec<Running> =
            (0..self.item.num_rows * num_heads).map(|_| Running { max: f32::NEG_INFINITY, sum: 0.0 }).collect();
        let last = self.item.position + self.item.num_rows - 1;
        let first_tile = self.first_seen(self.item.position) / TILE;
        let (mut k, mut v) = (vec![0.0; TILE * head_dim], vec![0.0; TILE * head_dim]);
        let q = self.memory.f32(self.op.q);
        for tile in first_tile..=last / TILE {
            let len = TILE.min(last + 1 - tile * TILE);
            self.load(self.op.cache.k, tile * TILE, &mut k[..len * head_dim]);
            self.load(self.op.cache.v, tile * TILE, &mut v[..len * head_dim]);
            for (index, (running, out)) in running.iter_mut().zip(out.chunks_exact_mut(head_dim)).enumerate() {
                let (row, head) = (index / num_heads, index % num_heads);
                let position = self.item.position + row;
                let begin = self.first_seen(position).saturating_sub(tile * TILE).min(len);
                let end = (position + 1).saturating_sub(tile * TILE).min(len);
                if begin < end {
                    let q_row = (self.item.first_row + row) * self.op.num_heads as usize;
                    let q = &q[(q_row + self.kv_head * num_heads + head) * head_dim..][..head_dim];
                    let seen = begin * head_dim..end * head_dim;
                    accumulate(q, self.op.scale, &k[seen.clone()], &v[seen], running, out);
                }
            }
        }
        for (running, out) in running.iter().zip(out.chunks_exact_mut(head_dim)) {
            out.iter_mut().for_each(|value| *value /= running.sum);
        }
        out
    }

    /// The first position that a row at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        match self.op.window {
            0 => 0,
            window => (position + 1).saturating_sub(window as usize),
        }
    }

    /// Widens consecutive positions of one KV head.
    fn load(&self, buffer: BufferId, first: usize, out: &mut [f32]) {
        let cache = self.op.cache;
        let (block_size, head_dim) = (cache.block_size as usize, cache.head_dim as usize);
        let head_words = cache.head_words() as usize;
        let table = &self.memory.u32(self.op.table)[self.item.table_row * self.op.table.cols as usize..];
        let words = &self.memory.buffers[buffer.0 as usize];
        let num_positions = out.len() / head_dim;
        let mut done = 0;
        while done < num_positions {
            let position = first + done;
            let offset = position % block_size;
            let len = (block_size - offset).min(num_positions - done);
            let at = cache.head_at(table[position / block_size], self.kv_head as u32, offset as u32);
            let part = &mut out[done * head_dim..][..len * head_dim];
            kv_head::load(cache.kv_type, head_dim, &words[at..][..len * head_words], part);
            done += len;
        }
    }
}

/// One tile for one row and head: `out` is the value sum so far, under the running maximum.
fn accumulate(q: &[f32], scale: f32, k: &[f32], v: &[f32], running: &mut Running, out: &mut [f32]) {
    let mut scores = [0.0f32; TILE];
    let num_seen = k.len() / q.len();
    let scores = &mut scores[..num_seen];
    for (score, k) in scores.iter_mut().zip(k.chunks_exact(q.len())) {
        *score = dot(q, k) * scale;
    }
    let max = scores.iter().copied().fold(running.max, f32::max);
    let shrink = (running.max - max).exp();
    running.max = max;
    running.sum *= shrink;
    out.iter_mut().for_each(|value| *value *= shrink);
    for (score, v) in scores.iter().zip(v.chunks_exact(q.len())) {
        let weight = (score - max).exp();
        running.sum += weight;
        out.iter_mut().zip(v).for_each(|(out, v)| *out += weight * v);
    }
}

/// Eight partial sums: a fixed order that fits any vector width.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}
