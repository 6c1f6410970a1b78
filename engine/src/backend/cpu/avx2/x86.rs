//! The loops themselves: they run only where an [`Avx2`](super::Avx2) says so.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{CHUNK, GROUP, TILE};
use crate::backend::cpu::exp;
use crate::backend::cpu::packed::{Layout, PANEL, Panel};

/// One column of a panel.
type Column = [__m256; 4];

#[target_feature(enable = "avx2,fma,f16c")]
pub fn mat_mul_panel(panel: Panel<'_>, x: &[f32], out: &mut [f32]) {
    match out.len() {
        PANEL => multiply_one(panel, x, out),
        _ => multiply_many(panel, x, out),
    }
}

/// One row of x: columns go from their codes to the sums in registers.
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_one(panel: Panel<'_>, x: &[f32], out: &mut [f32]) {
    let mut sums = [_mm256_setzero_ps(); 4];
    for_columns(panel, 0..panel.cols, |k, column| {
        let x = _mm256_set1_ps(x[k]);
        for v in 0..4 {
            sums[v] = _mm256_fmadd_ps(x, column[v], sums[v]);
        }
    });
    store_column(sums, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_many(panel: Panel<'_>, x: &[f32], out: &mut [f32]) {
    let mut unpacked = [0.0f32; CHUNK * PANEL];
    out.fill(0.0);
    for start in (0..panel.cols).step_by(CHUNK) {
        let len = CHUNK.min(panel.cols - start);
        let weights = &mut unpacked[..len * PANEL];
        for_columns(panel, start..start + len, |k, column| {
            store_column(column, &mut weights[(k - start) * PANEL..][..PANEL]);
        });
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
        unsafe { transpose_eight(rows.as_ptr().add(row * cols + col), cols, out.as_mut_ptr().add(col * TILE + row)) };
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

/// Calls `visit` with k and the values of each of some columns, in order; they begin with a group.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn for_columns(panel: Panel<'_>, columns: Range<usize>, visit: impl FnMut(usize, Column)) {
    match panel.layout {
        Layout::F32 => for_floats(panel, columns, |codes| load_column(bytemuck::cast_slice(codes)), visit),
        Layout::F16 => for_floats(panel, columns, |codes| widen_halves(codes, |half| _mm256_cvtph_ps(half)), visit),
        Layout::BF16 => {
            let widen = |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)));
            for_floats(panel, columns, |codes| widen_halves(codes, widen), visit);
        }
        Layout::Bytes => for_groups::<PANEL>(panel, columns, 0, visit),
        Layout::Nibbles { least } => for_groups::<{ PANEL / 2 }>(panel, columns, least, visit),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn for_floats(
    panel: Panel<'_>,
    columns: Range<usize>,
    value: impl Fn(&[u8]) -> Column,
    mut visit: impl FnMut(usize, Column),
) {
    let column_bytes = panel.layout.column_bytes();
    for k in columns {
        visit(k, value(&panel.codes[k * column_bytes..][..column_bytes]));
    }
}

/// `scale * code - min`; `B` is the bytes of a column: 16 for nibbles above `least`, or 32.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn for_groups<const B: usize>(
    panel: Panel<'_>,
    columns: Range<usize>,
    least: i8,
    mut visit: impl FnMut(usize, Column),
) {
    for first in columns.clone().step_by(panel.group_len) {
        let group = first..columns.end.min(first + panel.group_len);
        let at = first / panel.group_len * PANEL;
        let scales = load_column(&panel.scales[at..][..PANEL]);
        let codes = panel.codes[group.start * B..group.end * B].chunks_exact(B);
        if panel.mins.is_empty() {
            for (k, codes) in group.zip(codes) {
                let mut column = widen::<B>(codes, least);
                for v in 0..4 {
                    column[v] = _mm256_mul_ps(scales[v], column[v]);
                }
                visit(k, column);
            }
        } else {
            let mins = load_column(&panel.mins[at..][..PANEL]);
            for (k, codes) in group.zip(codes) {
                let mut column = widen::<B>(codes, least);
                for v in 0..4 {
                    column[v] = _mm256_sub_ps(_mm256_mul_ps(scales[v], column[v]), mins[v]);
                }
                visit(k, column);
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

/// A column of 32 elements of two bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widen_halves(codes: &[u8], value: impl Fn(__m128i) -> __m256) -> Column {
    assert_eq!(codes.len(), 2 * PANEL);
    let mut column = [_mm256_setzero_ps(); 4];
    for v in 0..4 {
        // SAFETY: four times sixteen bytes.
        column[v] = value(unsafe { _mm_loadu_si128(codes.as_ptr().add(16 * v).cast()) });
    }
    column
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
