//! Attention's inner loops as two products a tile: queries with transposed keys, weights with values.
//!
//! Invariant: every sum goes in the twin's order, so that the bits are the same. A row meets no value that it does not
//! see: where rows of a tile see different parts of it, each has a product of its own.

use std::ops::Range;

use super::{Group, Running, TILE, slot_len};
use crate::backend::cpu::avx2::{Avx2, GROUP, InterleavedRows};
use crate::op::Attention;

/// Whether heads are whole vectors.
pub(super) fn takes(op: &Attention) -> bool {
    op.cache.head_dim.is_multiple_of(8)
}

/// What [`Group::cut`] gives.
pub(super) fn cut(group: &Group, cut: Range<usize>, avx2: Avx2) -> Vec<f32> {
    let head_dim = group.op.cache.head_dim as usize;
    let num_pairs = group.num_pairs();
    let mut q = InterleavedRows::default();
    q.fill(&(0..num_pairs).flat_map(|pair| group.query(pair).iter().copied()).collect::<Vec<f32>>(), head_dim);
    let (mut k, mut v) = (vec![0.0; TILE * head_dim], vec![0.0; TILE * head_dim]);
    let mut keys = vec![0.0; TILE * head_dim];
    let mut weights = vec![0.0; num_pairs * TILE];
    let mut interleaved = [0.0; GROUP * TILE];
    let mut running: Vec<Running> = (0..num_pairs).map(|_| Running::NOTHING).collect();
    let mut values = vec![0.0; num_pairs * head_dim];
    for tile in cut.clone().step_by(TILE) {
        let len = TILE.min(cut.end - tile);
        group.load(group.op.cache.k, tile, &mut k[..len * head_dim]);
        group.load(group.op.cache.v, tile, &mut v[..len * head_dim]);
        avx2.transpose_tile(&k, &mut keys);
        weights.fill(0.0);
        for (q, scores) in q.groups(head_dim).zip(weights.chunks_mut(GROUP * TILE)) {
            avx2.add_products(&keys, TILE, q, scores);
        }
        let seen = |row| group.seen(row, tile, len);
        for (pair, (running, weights)) in running.iter_mut().zip(weights.chunks_exact_mut(TILE)).enumerate() {
            let weights = weights.try_into().expect("a tile");
            let shrink = weigh(group, avx2, seen(pair / group.num_heads()), running, weights);
            if shrink != 1.0 {
                values[pair * head_dim..][..head_dim].iter_mut().for_each(|value| *value *= shrink);
            }
        }
        // All rows at once where they see the same.
        let alike = (1..group.item.num_rows).all(|row| seen(row) == seen(0));
        let rows_at_once = if alike { group.item.num_rows } else { 1 };
        let pairs_at_once = rows_at_once * group.num_heads();
        let rows = weights.chunks(pairs_at_once * TILE).zip(values.chunks_mut(pairs_at_once * head_dim));
        for (index, (weights, values)) in rows.enumerate() {
            let seen = seen(index * rows_at_once);
            if seen.is_empty() {
                continue;
            }
            for (weights, values) in weights.chunks(GROUP * TILE).zip(values.chunks_mut(GROUP * head_dim)) {
                let x = interleave(weights, seen.clone(), &mut interleaved);
                avx2.add_products(&v[seen.start * head_dim..seen.end * head_dim], head_dim, x, values);
            }
        }
    }
    let mut out = vec![0.0; num_pairs * slot_len(&group.op)];
    let slots = out.chunks_exact_mut(head_dim + 2);
    for ((slot, values), running) in slots.zip(values.chunks_exact(head_dim)).zip(&running) {
        slot[..head_dim].copy_from_slice(values);
        running.finish(slot);
    }
    out
}

/// Makes weights of one row's products with the keys of a tile. Returns what earlier values are to be multiplied by.
fn weigh(group: &Group, avx2: Avx2, seen: Range<usize>, running: &mut Running, weights: &mut [f32; TILE]) -> f32 {
    if seen.is_empty() {
        return 1.0;
    }
    if group.op.soft_cap == 0.0 {
        return avx2.weigh_tile(group.op.scale, seen, weights, &mut running.highest, &mut running.totals);
    }
    weights.iter_mut().for_each(|score| *score = group.capped(*score * group.op.scale));
    avx2.weigh_tile(1.0, seen, weights, &mut running.highest, &mut running.totals)
}

/// Rows of a tile's weights as `[position][row]`.
fn interleave<'a>(weights: &[f32], seen: Range<usize>, out: &'a mut [f32; GROUP * TILE]) -> &'a [f32] {
    let num_rows = weights.len() / TILE;
    let out = &mut out[..seen.len() * num_rows];
    for (row, weights) in weights.chunks_exact(TILE).enumerate() {
        let column = out[row..].iter_mut().step_by(num_rows);
        column.zip(&weights[seen.clone()]).for_each(|(out, weight)| *out = *weight);
    }
    out
}
