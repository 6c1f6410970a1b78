//! Inner loops of matmul, attention and `mul_add` for x86 with AVX2, FMA and F16C: the one file of this backend with
//! `unsafe` in it.
//!
//! A panel's columns are unpacked to f32 a chunk at a time, in cache, and multiplied with every row of x. Eight
//! outputs share a vector; each output's sum goes over K in order, so the number of rows changes no bit. Rows of x
//! come in groups of six, interleaved, so that one pointer walks them all.

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
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::super::exp;
    use super::super::packed::{Layout, PANEL, Panel};
    use super::{CHUNK, GROUP, TILE};

    /// One column of a panel.
    type Column = [__m256; 4];

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn mat_mul_panel(panel: Panel<'_>, x: &[f32], out: &mut [f32]) {
        let mut unpacked = [0.0f32; CHUNK * PANEL];
        out.fill(0.0);
        for start in (0..panel.cols).step_by(CHUNK) {
            let len = CHUNK.min(panel.cols - start);
            let weights = &mut unpacked[..len * PANEL];
            unpack(panel, start, weights);
            let groups = out.chunks_mut(GROUP * PANEL).zip(x.chunks(GROUP * panel.cols));
            for (out, x) in groups {
                let num_rows = out.len() / PANEL;
                let x = &x[start * num_rows..][..len * num_rows];
                multiply_rows(weights, x, out, PANEL);
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn add_products(columns: &[f32], x: &[f32], out: &mut [f32], width: usize) {
        multiply_rows(columns, x, out, width);
    }

    /// Rows of `out` are `width` long, and so are columns of `w`.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn multiply_rows(w: &[f32], x: &[f32], out: &mut [f32], width: usize) {
        match out.len() / width {
            1 => multiply::<1, 4>(w, x, out, width),
            2 => multiply::<2, 4>(w, x, out, width),
            3 => multiply::<3, 2>(w, x, out, width),
            4 => multiply::<4, 2>(w, x, out, width),
            5 => multiply::<5, 2>(w, x, out, width),
            _ => multiply::<GROUP, 2>(w, x, out, width),
        }
    }

    /// Adds the products of some columns to `R` rows of output, `V` vectors wide at a time.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn multiply<const R: usize, const V: usize>(w: &[f32], x: &[f32], out: &mut [f32], width: usize) {
        let len = w.len() / width;
        assert!(out.len() == R * width && x.len() == R * len && w.len() == len * width && width.is_multiple_of(8));
        let wide = width / (8 * V) * (8 * V);
        for first in (0..wide).step_by(8 * V) {
            // SAFETY: by the assertion, and `first + 8 * V <= width`.
            unsafe { multiply_block::<R, V>(w, x, out, width, first) };
        }
        for first in (wide..width).step_by(8) {
            // SAFETY: by the assertion, and `first + 8 <= width`.
            unsafe { multiply_block::<R, 1>(w, x, out, width, first) };
        }
    }

    /// The vectors from `first` on of every row: `out` has R rows of `width`, `w` and x have as many columns, and
    /// `first + 8 * V <= width`.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn multiply_block<const R: usize, const V: usize>(
        w: &[f32],
        x: &[f32],
        out: &mut [f32],
        width: usize,
        first: usize,
    ) {
        // SAFETY: as the caller says. Plain loops: a closure does not carry the features into the standard library's
        // array functions. The last column's pointer stays in its buffer.
        unsafe {
            let out = out.as_mut_ptr().add(first);
            let mut sums = [[_mm256_setzero_ps(); V]; R];
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = _mm256_loadu_ps(out.add(r * width + 8 * v));
                }
            }
            let mut column = w.as_ptr().wrapping_add(first);
            let mut x = x.as_ptr();
            for _ in 0..w.len() / width {
                let mut weights = [_mm256_setzero_ps(); V];
                for v in 0..V {
                    weights[v] = _mm256_loadu_ps(column.add(8 * v));
                }
                for r in 0..R {
                    let x = _mm256_broadcast_ss(&*x.add(r));
                    for v in 0..V {
                        sums[r][v] = _mm256_fmadd_ps(x, weights[v], sums[r][v]);
                    }
                }
                column = column.wrapping_add(width);
                x = x.add(R);
            }
            for r in 0..R {
                for v in 0..V {
                    _mm256_storeu_ps(out.add(r * width + 8 * v), sums[r][v]);
                }
            }
        }
    }

    /// Vectors whose chains of multiply-adds run side by side: more than a processor needs to hide their latency.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx2,fma")]
    pub fn mul_add(x: &mut [f32], scale: f32, offset: f32, rounds: u32) {
        let (vector_scale, vector_offset) = (_mm256_set1_ps(scale), _mm256_set1_ps(offset));
        let mut chunks = x.chunks_exact_mut(8 * CHAINS);
        for x in &mut chunks {
            // SAFETY: there are 8 * CHAINS elements.
            unsafe {
                let mut values = [_mm256_setzero_ps(); CHAINS];
                for chain in 0..CHAINS {
                    values[chain] = _mm256_loadu_ps(x.as_ptr().add(8 * chain));
                }
                for _ in 0..rounds {
                    for chain in 0..CHAINS {
                        values[chain] = _mm256_fmadd_ps(values[chain], vector_scale, vector_offset);
                    }
                }
                for chain in 0..CHAINS {
                    _mm256_storeu_ps(x.as_mut_ptr().add(8 * chain), values[chain]);
                }
            }
        }
        for x in chunks.into_remainder() {
            for _ in 0..rounds {
                *x = x.mul_add(scale, offset);
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn transpose_tile(rows: &[f32], out: &mut [f32]) {
        let cols = rows.len() / TILE;
        assert!(cols.is_multiple_of(8) && rows.len() == cols * TILE && out.len() == rows.len());
        for (row, col) in (0..TILE).step_by(8).flat_map(|row| (0..cols).step_by(8).map(move |col| (row, col))) {
            // SAFETY: eight rows and eight columns from there on are inside of both.
            unsafe {
                transpose_eight(rows.as_ptr().add(row * cols + col), cols, out.as_mut_ptr().add(col * TILE + row))
            };
        }
    }

    /// Eight rows of eight, `stride` apart, to eight rows of eight, `TILE` apart.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn transpose_eight(from: *const f32, stride: usize, to: *mut f32) {
        let mut rows = [_mm256_setzero_ps(); 8];
        for r in 0..8 {
            // SAFETY: as the caller says.
            rows[r] = unsafe { _mm256_loadu_ps(from.add(r * stride)) };
        }
        let (mut pairs, mut fours) = (rows, rows);
        for r in 0..4 {
            pairs[2 * r] = _mm256_unpacklo_ps(rows[2 * r], rows[2 * r + 1]);
            pairs[2 * r + 1] = _mm256_unpackhi_ps(rows[2 * r], rows[2 * r + 1]);
        }
        for r in 0..2 {
            for half in 0..2 {
                let (low, high) = (pairs[4 * r + half], pairs[4 * r + 2 + half]);
                fours[4 * r + 2 * half] = _mm256_shuffle_ps::<0x44>(low, high);
                fours[4 * r + 2 * half + 1] = _mm256_shuffle_ps::<0xee>(low, high);
            }
        }
        for r in 0..4 {
            // SAFETY: as the caller says.
            unsafe {
                _mm256_storeu_ps(to.add(r * TILE), _mm256_permute2f128_ps::<0x20>(fours[r], fours[4 + r]));
                _mm256_storeu_ps(to.add((4 + r) * TILE), _mm256_permute2f128_ps::<0x31>(fours[r], fours[4 + r]));
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn weigh_tile(
        scale: f32,
        seen: Range<usize>,
        weights: &mut [f32; TILE],
        highest: &mut f32,
        totals: &mut [f32; 8],
    ) -> f32 {
        let eight = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let (begin, end) = (_mm256_set1_epi32(seen.start as i32 - 1), _mm256_set1_epi32(seen.end as i32));
        let mut scores = load_column(weights);
        let mut visible = scores;
        let mut largest = _mm256_set1_ps(*highest);
        for v in 0..4 {
            let t = _mm256_add_epi32(eight, _mm256_set1_epi32(8 * v as i32));
            let inside = _mm256_and_si256(_mm256_cmpgt_epi32(t, begin), _mm256_cmpgt_epi32(end, t));
            visible[v] = _mm256_castsi256_ps(inside);
            scores[v] = _mm256_mul_ps(scores[v], _mm256_set1_ps(scale));
            // A NaN is passed over here, and comes back as a weight.
            let larger = _mm256_max_ps(scores[v], largest);
            largest = _mm256_blendv_ps(largest, larger, visible[v]);
        }
        let mut lanes = [0.0f32; 8];
        // SAFETY: eight floats.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), largest) };
        let largest = lanes.iter().fold(*highest, |largest, lane| if *lane > largest { *lane } else { largest });
        let shrink = exp::exp(*highest - largest);
        *highest = largest;
        // SAFETY: eight floats.
        let mut sums = unsafe { _mm256_mul_ps(_mm256_loadu_ps(totals.as_ptr()), _mm256_set1_ps(shrink)) };
        for v in 0..4 {
            let weight = exp_eight(_mm256_sub_ps(scores[v], _mm256_set1_ps(largest)));
            scores[v] = _mm256_and_ps(weight, visible[v]);
            sums = _mm256_add_ps(sums, scores[v]);
        }
        // SAFETY: eight floats.
        unsafe { _mm256_storeu_ps(totals.as_mut_ptr(), sums) };
        store_column(scores, weights);
        shrink
    }

    /// [`exp::exp`] of each.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn exp_eight(x: __m256) -> __m256 {
        let rounded = _mm256_add_ps(_mm256_mul_ps(x, _mm256_set1_ps(exp::LOG2_E)), _mm256_set1_ps(exp::ROUND));
        let power = _mm256_sub_ps(rounded, _mm256_set1_ps(exp::ROUND));
        let r = _mm256_sub_ps(x, _mm256_mul_ps(power, _mm256_set1_ps(exp::LN_2_HIGH)));
        let r = _mm256_sub_ps(r, _mm256_mul_ps(power, _mm256_set1_ps(exp::LN_2_LOW)));
        let mut terms = _mm256_set1_ps(exp::TERMS[0]);
        for term in &exp::TERMS[1..] {
            terms = _mm256_add_ps(_mm256_mul_ps(terms, r), _mm256_set1_ps(*term));
        }
        let fraction = _mm256_add_ps(_mm256_mul_ps(terms, _mm256_mul_ps(r, r)), r);
        let fraction = _mm256_castps_si256(_mm256_add_ps(fraction, _mm256_set1_ps(1.0)));
        let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded));
        let value = _mm256_castsi256_ps(_mm256_add_epi32(fraction, power));
        let value = _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(exp::LOWEST)), value);
        _mm256_blendv_ps(value, x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
    }

    /// Columns from `start` on as f32, `[k][32]`.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn unpack(panel: Panel<'_>, start: usize, out: &mut [f32]) {
        let column_bytes = panel.layout.column_bytes();
        let codes = &panel.codes[start * column_bytes..][..out.len() / PANEL * column_bytes];
        match panel.layout {
            Layout::F32 => out.copy_from_slice(bytemuck::cast_slice(codes)),
            Layout::F16 => unpack_floats(codes, out, |half| _mm256_cvtph_ps(half)),
            Layout::BF16 => unpack_floats(codes, out, |half| {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
            }),
            Layout::Bytes => unpack_groups::<PANEL>(panel, start, codes, out, 0),
            Layout::Nibbles { least } => unpack_groups::<{ PANEL / 2 }>(panel, start, codes, out, least),
        }
    }

    /// `scale * code - min` of whole groups; `B` is the bytes of a column: 16 for nibbles above `least`, or 32.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn unpack_groups<const B: usize>(panel: Panel<'_>, start: usize, codes: &[u8], out: &mut [f32], least: i8) {
        let groups = codes.chunks(panel.group_len * B).zip(out.chunks_mut(panel.group_len * PANEL));
        for (group, (codes, out)) in groups.enumerate() {
            let columns = codes.chunks_exact(B).zip(out.chunks_exact_mut(PANEL));
            let at = (start / panel.group_len + group) * PANEL;
            let scales = load_column(&panel.scales[at..][..PANEL]);
            if panel.mins.is_empty() {
                for (codes, out) in columns {
                    let mut column = widen::<B>(codes, least);
                    for v in 0..4 {
                        column[v] = _mm256_mul_ps(scales[v], column[v]);
                    }
                    store_column(column, out);
                }
            } else {
                let mins = load_column(&panel.mins[at..][..PANEL]);
                for (codes, out) in columns {
                    let mut column = widen::<B>(codes, least);
                    for v in 0..4 {
                        column[v] = _mm256_sub_ps(_mm256_mul_ps(scales[v], column[v]), mins[v]);
                    }
                    store_column(column, out);
                }
            }
        }
    }

    /// The 32 codes of a column as floats.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn widen<const B: usize>(codes: &[u8], least: i8) -> Column {
        assert_eq!(codes.len(), B);
        let mut eights = [_mm_setzero_si128(); 4];
        // SAFETY: a column is B bytes, 16 or 32.
        unsafe {
            if B == PANEL {
                for v in 0..4 {
                    eights[v] = _mm_loadl_epi64(codes.as_ptr().add(8 * v).cast());
                }
            } else {
                let (mask, least) = (_mm_set1_epi8(15), _mm_set1_epi8(least));
                let both = _mm_loadu_si128(codes.as_ptr().cast());
                let low = _mm_add_epi8(_mm_and_si128(both, mask), least);
                let high = _mm_add_epi8(_mm_and_si128(_mm_srli_epi16::<4>(both), mask), least);
                eights = [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)];
            }
        }
        let mut column = [_mm256_setzero_ps(); 4];
        for v in 0..4 {
            column[v] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eights[v]));
        }
        column
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn unpack_floats(codes: &[u8], out: &mut [f32], value: impl Fn(__m128i) -> __m256) {
        for (half, out) in codes.chunks_exact(16).zip(out.chunks_exact_mut(8)) {
            // SAFETY: sixteen bytes in, eight floats out.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), value(_mm_loadu_si128(half.as_ptr().cast()))) };
        }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn load_column(values: &[f32]) -> Column {
        assert_eq!(values.len(), PANEL);
        let mut column = [_mm256_setzero_ps(); 4];
        for v in 0..4 {
            // SAFETY: there are 32 values.
            column[v] = unsafe { _mm256_loadu_ps(values.as_ptr().add(8 * v)) };
        }
        column
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn store_column(column: Column, out: &mut [f32]) {
        assert_eq!(out.len(), PANEL);
        for v in 0..4 {
            // SAFETY: there are 32 values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * v), column[v]) };
        }
    }
}
