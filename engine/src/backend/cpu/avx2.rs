//! Inner loops of matmul, attention and `mul_add` for x86 with AVX2, FMA and F16C: with `avx2/x86.rs` all of this
//! backend that has `unsafe` in it.
//!
//! For one row of x a panel's columns go from their codes to the sums in registers; for more they are unpacked to f32
//! a chunk at a time, in cache, and multiplied with every row. Eight outputs share a vector; each output's sum goes
//! over K in order, so the number of rows changes no bit. Rows of x come in groups of six, interleaved, so that one
//! pointer walks them all.

use std::ops::Range;

use super::packed::{PANEL, Panel};
use crate::op::ATTENTION_TILE;

/// Positions of a KV tile.
const TILE: usize = ATTENTION_TILE as usize;

/// Proof that this processor has what the code below needs.
#[derive(Clone, Copy)]
pub struct Avx2(());

#[cfg(not(target_arch = "x86_64"))]
impl Avx2 {
    pub fn detect() -> Option<Avx2> {
        None
    }

    pub fn mat_mul_panel(self, _panel: Panel<'_>, _x: &InterleavedRows, _out: &mut [f32]) {
        unreachable!("there is no Avx2 here")
    }

    pub fn add_products(self, _columns: &[f32], _width: usize, _x: &[f32], _out: &mut [f32]) {
        unreachable!("there is no Avx2 here")
    }

    pub fn transpose_tile(self, _rows: &[f32], _out: &mut [f32]) {
        unreachable!("there is no Avx2 here")
    }

    pub fn weigh_tile(
        self,
        _scale: f32,
        _seen: Range<usize>,
        _weights: &mut [f32; TILE],
        _highest: &mut f32,
        _totals: &mut [f32; 8],
    ) -> f32 {
        unreachable!("there is no Avx2 here")
    }

    pub fn mul_add(self, _x: &mut [f32], _scale: f32, _offset: f32, _rounds: u32) {
        unreachable!("there is no Avx2 here")
    }
}

/// Rows of x that are multiplied at once: with two vectors of outputs each they fill the registers.
pub const GROUP: usize = 6;

/// x as `[group][k][row in group]`; the last group has as many rows as are left.
#[derive(Default)]
pub struct InterleavedRows {
    values: Vec<f32>,
    num_rows: usize,
}

impl InterleavedRows {
    pub fn fill(&mut self, x: &[f32], cols: usize) {
        self.num_rows = x.len() / cols;
        self.values.resize(x.len(), 0.0);
        let groups = self.values.chunks_mut(GROUP * cols).zip(x.chunks(GROUP * cols));
        for (out, x) in groups {
            let num_rows = x.len() / cols;
            for (row, x) in x.chunks_exact(cols).enumerate() {
                out[row..].iter_mut().step_by(num_rows).zip(x).for_each(|(out, x)| *out = *x);
            }
        }
    }

    /// As [`Avx2::add_products`] takes them.
    pub fn groups(&self, cols: usize) -> impl Iterator<Item = &[f32]> {
        self.values.chunks(GROUP * cols)
    }
}

/// Columns unpacked at a time: 16 KiB, half of a first-level cache; a multiple of every group.
#[cfg(target_arch = "x86_64")]
const CHUNK: usize = 128;

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    pub fn detect() -> Option<Avx2> {
        let all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Avx2(()))
    }

    /// `out`, (rows of x, 32), is `x` times the panel's 32 rows.
    #[allow(unsafe_code)]
    pub fn mat_mul_panel(self, panel: Panel<'_>, x: &InterleavedRows, out: &mut [f32]) {
        assert!(out.len() == x.num_rows * PANEL && x.values.len() == x.num_rows * panel.cols);
        // SAFETY: an `Avx2` exists only where the features do.
        unsafe { x86::mat_mul_panel(panel, &x.values, out) }
    }

    /// `out`, (rows, width), plus `x` times `columns`, (len, width), one product after another in the order of
    /// columns. At most `GROUP` rows of x, as `[column][row]`; a width of whole vectors.
    #[allow(unsafe_code)]
    pub fn add_products(self, columns: &[f32], width: usize, x: &[f32], out: &mut [f32]) {
        let num_rows = out.len() / width;
        assert!(width.is_multiple_of(8) && columns.len().is_multiple_of(width) && out.len() == num_rows * width);
        assert!((1..=GROUP).contains(&num_rows) && x.len() * width == columns.len() * num_rows);
        // SAFETY: an `Avx2` exists only where the features do.
        unsafe { x86::add_products(columns, x, out, width) }
    }

    /// `out`, (columns, `TILE`), is `rows`, (`TILE`, columns), the other way round; columns are whole vectors.
    #[allow(unsafe_code)]
    pub fn transpose_tile(self, rows: &[f32], out: &mut [f32]) {
        assert!(rows.len() == out.len() && rows.len().is_multiple_of(8 * TILE));
        // SAFETY: an `Avx2` exists only where the features do.
        unsafe { x86::transpose_tile(rows, out) }
    }

    /// Scores, times `scale`, become weights of a softmax under the largest so far, and 0 where they are not seen.
    /// Position t adds to `totals[t % 8]`. Returns what sums under the `highest` before are to be multiplied by.
    #[allow(unsafe_code)]
    pub fn weigh_tile(
        self,
        scale: f32,
        seen: Range<usize>,
        weights: &mut [f32; TILE],
        highest: &mut f32,
        totals: &mut [f32; 8],
    ) -> f32 {
        // SAFETY: an `Avx2` exists only where the features do.
        unsafe { x86::weigh_tile(scale, seen, weights, highest, totals) }
    }

    /// `x = scale * x + offset`, `rounds` times.
    #[allow(unsafe_code)]
    pub fn mul_add(self, x: &mut [f32], scale: f32, offset: f32, rounds: u32) {
        // SAFETY: an `Avx2` exists only where the features do.
        unsafe { x86::mul_add(x, scale, offset, rounds) }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;
