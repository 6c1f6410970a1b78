//! Causal paged attention: scores, softmax and value sum tile by tile, with the largest score so far carried along; cut
//! by cut from nothing; and the cuts merged in order.
//!
//! Tiles and cuts begin at absolute positions, whatever the chunk and however a row is split, so a row's numbers depend
//! on its position and its cache alone. The query heads of a KV head and the rows of an item share its loads. The plain
//! twin is here and is the reference; `attention/fast.rs` gives the same bits.

use std::ops::Range;

use rayon::prelude::*;

use super::avx2::Avx2;
use super::exp::exp;
use super::{Memory, kv_head};
use crate::op::{ATTENTION_CUT, ATTENTION_ITEM_WORDS, ATTENTION_MERGE_WORDS, ATTENTION_TILE, Attention, NONE};
use crate::tensor::BufferId;

mod fast;

const TILE: usize = ATTENTION_TILE as usize;
const CUT: usize = ATTENTION_CUT as usize;

pub(super) fn run(op: Attention, memory: &mut Memory, avx2: Option<Avx2>) {
    let num_kv_heads = op.cache.num_kv_heads as usize;
    let items: Vec<Item> = memory.u32(op.items).chunks_exact(ATTENTION_ITEM_WORDS as usize).map(Item::new).collect();
    let group = |index| Group { op, memory, item: items[index / num_kv_heads], kv_head: index % num_kv_heads };
    let work = (0..items.len() * num_kv_heads).into_par_iter();
    let results: Vec<Vec<f32>> = work.map(|index| group(index).attend(avx2)).collect();
    let slot = slot_len(&op);
    let num_heads = (op.num_heads / op.cache.num_kv_heads) as usize;
    let results = || {
        let heads = |index: usize| items[index / num_kv_heads].row_and_partial(index % num_kv_heads, num_heads);
        results.iter().enumerate().map(move |(index, result)| (heads(index), result))
    };
    memory.write_f32(op.partials, |_, partials| {
        for ((_, head, partial), result) in results().filter(|((.., partial), _)| *partial != NONE) {
            for (cut, slots) in result.chunks_exact(num_heads * slot).enumerate() {
                let at = (partial as usize + cut) * op.num_heads as usize + head;
                partials[at * slot..][..slots.len()].copy_from_slice(slots);
            }
        }
    });
    memory.write_f32(op.out, |memory, out| {
        let mut write = |row: usize, head: usize, slot: &[f32]| {
            let values = &slot[..slot.len() - 2];
            let out = &mut out[(row * op.num_heads as usize + head) * values.len()..];
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value / slot[slot.len() - 1]);
        };
        for ((row, head, _), result) in results().filter(|((.., partial), _)| *partial == NONE) {
            for (index, slot) in result.chunks_exact(slot).enumerate() {
                write(row + index / num_heads, head + index % num_heads, slot);
            }
        }
        let cuts: Vec<&[f32]> = memory.f32(op.partials).chunks_exact(slot).collect();
        for merge in memory.u32(op.merges).chunks_exact(ATTENTION_MERGE_WORDS as usize) {
            let [row, first, num_cuts] = [0, 1, 2].map(|i| merge[i] as usize);
            for head in 0..op.num_heads as usize {
                let mut merged = vec![0.0; slot];
                (first..first + num_cuts)
                    .for_each(|at| merge_cut(&mut merged, cuts[at * op.num_heads as usize + head]));
                write(row, head, &merged);
            }
        }
    });
}

/// Words of what a cut gives one row and head, as in `Attention::partials`: values, largest score, sum of weights.
fn slot_len(op: &Attention) -> usize {
    op.cache.head_dim as usize + 2
}

#[derive(Clone, Copy)]
struct Item {
    first_row: usize,
    num_rows: usize,
    table_row: usize,
    position: usize,
    begin: usize,
    end: usize,
    partial: u32,
}

impl Item {
    fn new(words: &[u32]) -> Item {
        let [first_row, num_rows, table_row, position, begin, end] = [0, 1, 2, 3, 4, 5].map(|i| words[i] as usize);
        Item { first_row, num_rows, table_row, position, begin, end, partial: words[6] }
    }

    /// Where what a KV head gives goes: the first row, the first query head, the partial.
    fn row_and_partial(&self, kv_head: usize, num_heads: usize) -> (usize, usize, u32) {
        (self.first_row, kv_head * num_heads, self.partial)
    }
}

/// The query heads of one item that read one KV head.
struct Group<'a> {
    op: Attention,
    memory: &'a Memory,
    item: Item,
    kv_head: usize,
}

/// What a row and head has seen of a cut.
struct Running {
    highest: f32,
    /// Sums of weights: of the positions that have this remainder by 8.
    totals: [f32; 8],
}

impl Running {
    const NOTHING: Running = Running { highest: f32::NEG_INFINITY, totals: [0.0; 8] };

    /// Completes a slot that holds the values.
    fn finish(&self, slot: &mut [f32]) {
        let len = slot.len();
        (slot[len - 2], slot[len - 1]) = (self.highest, self.totals.iter().sum());
    }
}

impl Group<'_> {
    /// Slots of (rows, query heads of the group), merged; of (cuts, query heads) for an item with a partial.
    fn attend(&self, avx2: Option<Avx2>) -> Vec<f32> {
        let num_words = self.num_pairs() * slot_len(&self.op);
        let firsts = (self.item.begin / CUT * CUT..self.item.end).step_by(CUT);
        let cuts = firsts.map(|first| first.max(self.item.begin)..(first + CUT).min(self.item.end));
        let cuts = cuts.map(|cut| match avx2.filter(|_| fast::takes(&self.op)) {
            Some(avx2) => fast::cut(self, cut, avx2),
            None => self.cut(cut),
        });
        if self.item.partial != NONE {
            return cuts.flatten().collect();
        }
        cuts.fold(vec![0.0; num_words], |mut merged, cut| {
            let slots = merged.chunks_exact_mut(slot_len(&self.op)).zip(cut.chunks_exact(slot_len(&self.op)));
            slots.for_each(|(merged, cut)| merge_cut(merged, cut));
            merged
        })
    }

    /// Slots of (rows, query heads of the group) for the positions of one cut.
    fn cut(&self, cut: Range<usize>) -> Vec<f32> {
        let head_dim = self.op.cache.head_dim as usize;
        let slot = slot_len(&self.op);
        let mut out = vec![0.0; self.num_pairs() * slot];
        let mut running: Vec<Running> = (0..self.num_pairs()).map(|_| Running::NOTHING).collect();
        let (mut k, mut v) = (vec![0.0; TILE * head_dim], vec![0.0; TILE * head_dim]);
        for tile in cut.clone().step_by(TILE) {
            let len = TILE.min(cut.end - tile);
            self.load(self.op.cache.k, tile, &mut k[..len * head_dim]);
            self.load(self.op.cache.v, tile, &mut v[..len * head_dim]);
            for (pair, (running, slot)) in running.iter_mut().zip(out.chunks_exact_mut(slot)).enumerate() {
                let seen = self.seen(pair / self.num_heads(), tile, len);
                if !seen.is_empty() {
                    self.accumulate(self.query(pair), seen, &k, &v, running, &mut slot[..head_dim]);
                }
            }
        }
        running.iter().zip(out.chunks_exact_mut(slot)).for_each(|(running, slot)| running.finish(slot));
        out
    }

    /// One tile for one row and head: `values` is the value sum so far, under the largest score.
    fn accumulate(
        &self,
        q: &[f32],
        seen: Range<usize>,
        k: &[f32],
        v: &[f32],
        running: &mut Running,
        values: &mut [f32],
    ) {
        let head_dim = q.len();
        let mut scores = [0.0f32; TILE];
        for t in seen.clone() {
            let k = &k[t * head_dim..][..head_dim];
            scores[t] = self.capped(q.iter().zip(k).fold(0.0f32, |sum, (q, k)| q.mul_add(*k, sum)) * self.op.scale);
        }
        let larger = |highest: f32, score: &f32| if *score > highest { *score } else { highest };
        let highest = scores[seen.clone()].iter().fold(running.highest, larger);
        let shrink = exp(running.highest - highest);
        running.highest = highest;
        running.totals.iter_mut().for_each(|total| *total *= shrink);
        values.iter_mut().for_each(|value| *value *= shrink);
        for t in seen {
            let weight = exp(scores[t] - highest);
            running.totals[t % 8] += weight;
            let v = &v[t * head_dim..][..head_dim];
            values.iter_mut().zip(v).for_each(|(value, v)| *value = weight.mul_add(*v, *value));
        }
    }

    fn capped(&self, score: f32) -> f32 {
        match self.op.soft_cap {
            0.0 => score,
            cap => cap * (score / cap).tanh(),
        }
    }

    /// Query heads of a KV head.
    fn num_heads(&self) -> usize {
        (self.op.num_heads / self.op.cache.num_kv_heads) as usize
    }

    /// Rows times query heads.
    fn num_pairs(&self) -> usize {
        self.item.num_rows * self.num_heads()
    }

    fn query(&self, pair: usize) -> &[f32] {
        let (row, head) = (pair / self.num_heads(), pair % self.num_heads());
        let row = (self.item.first_row + row) * self.op.num_heads as usize;
        let head_dim = self.op.cache.head_dim as usize;
        &self.memory.f32(self.op.q)[(row + self.kv_head * self.num_heads() + head) * head_dim..][..head_dim]
    }

    /// What a row sees of the `len` positions from `tile` on.
    fn seen(&self, row: usize, tile: usize, len: usize) -> Range<usize> {
        let end = self.item.position + row + 1;
        let first = match self.op.window {
            0 => 0,
            window => end.saturating_sub(window as usize),
        };
        first.saturating_sub(tile).min(len)..end.saturating_sub(tile).min(len)
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

/// Adds a slot to what earlier cuts gave. A row that has seen nothing has weights of sum 0.
fn merge_cut(merged: &mut [f32], cut: &[f32]) {
    let at = cut.len() - 2;
    if cut[at + 1] == 0.0 {
        return;
    }
    if merged[at + 1] == 0.0 {
        return merged.copy_from_slice(cut);
    }
    let highest = merged[at].max(cut[at]);
    let (shrink, weight) = (exp(merged[at] - highest), exp(cut[at] - highest));
    merged.iter_mut().zip(cut).for_each(|(merged, cut)| *merged = *merged * shrink + cut * weight);
    merged[at] = highest;
}
