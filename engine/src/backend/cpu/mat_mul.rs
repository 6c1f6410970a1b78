//! `out = x @ weight^T + bias`: each output is one chain of fused multiply-adds over K, from 0, in order.
//!
//! That order is the same for every M and every thread, and the same in the plain twin and in `avx2.rs`.

use std::ops::Range;

use rayon::prelude::*;

use super::avx2::{Avx2, InterleavedRows};
use super::packed::{PANEL, PackedWeight};
use super::{Memory, for_rows};
use crate::op::MatMul;

pub(super) fn run(op: MatMul, memory: &mut Memory, avx2: Option<Avx2>) {
    let mut scratch = std::mem::take(&mut memory.mat_mul);
    memory.write_f32(op.out, |memory, out| {
        let weight = &memory.weights[op.weight.id.0 as usize];
        let x = memory.f32(op.x);
        let first_col = op.first_col as usize;
        let mut out = Columns { values: out, width: op.out.cols as usize, range: first_col..first_col + weight.rows };
        match avx2 {
            Some(avx2) => fast(avx2, weight, x, &mut scratch, &mut out),
            None => plain(weight, x, &mut out),
        }
        if let Some(bias) = op.bias {
            let bias = memory.f32(bias);
            out.for_rows(|_, row| row.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias));
        }
    });
    memory.mat_mul = scratch;
}

/// Where a product goes: some columns of each row.
struct Columns<'a> {
    values: &'a mut [f32],
    /// Of a row.
    width: usize,
    range: Range<usize>,
}

impl Columns<'_> {
    /// Calls `work` with these columns of each row.
    fn for_rows(&mut self, work: impl Fn(usize, &mut [f32]) + Sync) {
        let range = &self.range;
        for_rows(self.values, self.width, |row, values| work(row, &mut values[range.clone()]));
    }
}

/// What the fast path keeps between calls.
#[derive(Default)]
pub(super) struct Scratch {
    x: InterleavedRows,
    /// Outputs as `[panel][row][32]`, before they are laid out as rows.
    panels: Vec<f32>,
}

/// The reference.
fn plain(weight: &PackedWeight, x: &[f32], out: &mut Columns) {
    let columns: Vec<Vec<f32>> = (0..weight.rows)
        .into_par_iter()
        .map_init(
            || vec![0.0; weight.cols],
            |values, n| {
                weight.unpack_row(n, values);
                let dot = |x: &[f32]| x.iter().zip(values.iter()).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum));
                x.chunks_exact(weight.cols).map(dot).collect()
            },
        )
        .collect();
    out.for_rows(|m, row| row.iter_mut().zip(&columns).for_each(|(out, column)| *out = column[m]));
}

/// A panel of 32 outputs at a time; threads share the panels.
fn fast(avx2: Avx2, weight: &PackedWeight, x: &[f32], scratch: &mut Scratch, out: &mut Columns) {
    let num_rows = x.len() / weight.cols;
    scratch.x.fill(x, weight.cols);
    scratch.panels.resize(weight.num_panels() * num_rows * PANEL, 0.0);
    let work = scratch.panels.par_chunks_mut(num_rows * PANEL).enumerate();
    work.for_each(|(index, out)| avx2.mat_mul_panel(weight.panel(index), &scratch.x, out));
    out.for_rows(|m, row| {
        for (index, out) in row.chunks_mut(PANEL).enumerate() {
            out.copy_from_slice(&scratch.panels[(index * num_rows + m) * PANEL..][..out.len()]);
        }
    });
}
