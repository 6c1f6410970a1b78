//! Inner loops of `mat_mul` and `mul_add` for x86 with AVX2, FMA and F16C: the one file of this backend with `unsafe`.
//!
//! A panel's columns are unpacked to f32 a chunk at a time, in cache, and multiplied with every row of x. Eight
//! outputs share a vector; each output's sum goes over K in order, so the number of rows changes no bit. Rows of x
//! come in groups of six, interleaved, so that one pointer walks them all.

use super::packed::{PANEL, Panel};

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

    pub fn mul_add(self, _x: &mut [f32], _scale: f32, _offset: f32, _rounds: u32) {
        unreachable!("there is no Avx2 here")
    }
}

/// Rows of x that are multiplied at once: with two vectors of outputs each they fill the registers.
const GROUP: usize = 6;

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

    use super::super::packed::{Layout, PANEL, Panel};
    use super::{CHUNK, GROUP};

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
                match num_rows {
                    1 => multiply::<1, 4>(weights, x, out),
                    2 => multiply::<2, 4>(weights, x, out),
                    3 => multiply::<3, 2>(weights, x, out),
                    4 => multiply::<4, 2>(weights, x, out),
                    5 => multiply::<5, 2>(weights, x, out),
                    _ => multiply::<GROUP, 2>(weights, x, out),
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

    /// Adds the products of one chunk of columns to `R` rows of output, `V` vectors wide at a time.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn multiply<const R: usize, const V: usize>(w: &[f32], x: &[f32], out: &mut [f32]) {
        let len = w.len() / PANEL;
        assert!(out.len() == R * PANEL && x.len() == R * len);
        for first in (0..PANEL).step_by(8 * V) {
            // SAFETY: `out` has R rows of PANEL, `first + 8 * V <= PANEL`, and `w` and x have `len` columns.
            // Plain loops: a closure does not carry the features into the standard library's array functions.
            unsafe {
                let out = out.as_mut_ptr().add(first);
                let mut sums = [[_mm256_setzero_ps(); V]; R];
                for r in 0..R {
                    for v in 0..V {
                        sums[r][v] = _mm256_loadu_ps(out.add(r * PANEL + 8 * v));
                    }
                }
                let mut column = w.as_ptr().add(first);
                let mut x = x.as_ptr();
                for _ in 0..len {
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
                    column = column.add(PANEL);
                    x = x.add(R);
                }
                for r in 0..R {
                    for v in 0..V {
                        _mm256_storeu_ps(out.add(r * PANEL + 8 * v), sums[r][v]);
                    }
                }
            }
        }
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
