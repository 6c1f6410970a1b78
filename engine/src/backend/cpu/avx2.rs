//! The matmul's inner loops for x86 with AVX2, FMA and F16C: the one file of this backend with `unsafe` in it.
//!
//! A panel's columns are unpacked to f32 a chunk at a time, in cache, and multiplied with every row of x. Eight outputs
//! share a vector; each output's sum goes over K in order, so the number of rows changes no bit.

use super::packed::{PANEL, Panel};

/// Proof that this processor has what the code below needs.
#[derive(Clone, Copy)]
pub struct Avx2(());

#[cfg(not(target_arch = "x86_64"))]
impl Avx2 {
    pub fn detect() -> Option<Avx2> {
        None
    }

    pub fn mat_mul_panel(self, _panel: Panel<'_>, _x: &[f32], _out: &mut [f32]) {
        unreachable!("there is no Avx2 here")
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
    pub fn mat_mul_panel(self, panel: Panel<'_>, x: &[f32], out: &mut [f32]) {
        assert_eq!(out.len() / PANEL, x.len() / panel.cols);
        // SAFETY: an `Avx2` exists only where the features do.
        unsafe { x86::mat_mul_panel(panel, x, out) }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::packed::{Layout, PANEL, Panel};
    use super::CHUNK;

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
            let mut row = 0;
            for out in out.chunks_mut(6 * PANEL) {
                let x = &x[row * panel.cols..];
                let (w, k, stride) = (&*weights, start, panel.cols);
                match out.len() / PANEL {
                    1 => multiply::<1, 4>(w, x, k, stride, out),
                    2 => multiply::<2, 4>(w, x, k, stride, out),
                    3 => multiply::<3, 2>(w, x, k, stride, out),
                    4 => multiply::<4, 2>(w, x, k, stride, out),
                    5 => multiply::<5, 2>(w, x, k, stride, out),
                    _ => multiply::<6, 2>(w, x, k, stride, out),
                }
                row += out.len() / PANEL;
            }
        }
    }

    /// Adds the products of one chunk of columns to `R` rows of output, `V` vectors wide at a time.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn multiply<const R: usize, const V: usize>(w: &[f32], x: &[f32], start: usize, stride: usize, out: &mut [f32]) {
        let len = w.len() / PANEL;
        let rows: [&[f32]; R] = std::array::from_fn(|r| &x[r * stride + start..][..len]);
        assert_eq!(out.len(), R * PANEL);
        for first in (0..PANEL).step_by(8 * V) {
            // SAFETY: `out` has R rows of PANEL, `first + 8 * V <= PANEL`, and `w` and each row have `len` columns.
            unsafe {
                let at = |r: usize, v: usize| r * PANEL + first + 8 * v;
                let mut sums: [[__m256; V]; R] =
                    std::array::from_fn(|r| std::array::from_fn(|v| _mm256_loadu_ps(out.as_ptr().add(at(r, v)))));
                for k in 0..len {
                    let column = w.as_ptr().add(k * PANEL + first);
                    let weights: [__m256; V] = std::array::from_fn(|v| _mm256_loadu_ps(column.add(8 * v)));
                    for r in 0..R {
                        let x = _mm256_broadcast_ss(rows[r].get_unchecked(k));
                        for v in 0..V {
                            sums[r][v] = _mm256_fmadd_ps(x, weights[v], sums[r][v]);
                        }
                    }
                }
                for r in 0..R {
                    for v in 0..V {
                        _mm256_storeu_ps(out.as_mut_ptr().add(at(r, v)), sums[r][v]);
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
            Layout::Bytes => unpack_groups::<PANEL>(panel, start, codes, out, |column| {
                // SAFETY: a column is 32 bytes.
                let vector = |v: usize| unsafe { _mm_loadl_epi64(column.as_ptr().add(8 * v).cast()) };
                std::array::from_fn(|v| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(vector(v))))
            }),
            Layout::Nibbles { least } => {
                let least = _mm_set1_epi8(least);
                let mask = _mm_set1_epi8(15);
                unpack_groups::<{ PANEL / 2 }>(panel, start, codes, out, |column| {
                    // SAFETY: a column is 16 bytes.
                    let both = unsafe { _mm_loadu_si128(column.as_ptr().cast()) };
                    let low = _mm_add_epi8(_mm_and_si128(both, mask), least);
                    let high = _mm_add_epi8(_mm_and_si128(_mm_srli_epi16::<4>(both), mask), least);
                    let parts = [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)];
                    parts.map(|part| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part)))
                });
            }
        }
    }

    /// `scale * code - min` of whole groups; `B` is the bytes of a column.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn unpack_groups<const B: usize>(
        panel: Panel<'_>,
        start: usize,
        codes: &[u8],
        out: &mut [f32],
        column: impl Fn(&[u8; B]) -> Column,
    ) {
        let (columns, _) = codes.as_chunks::<B>();
        let (outs, _) = out.as_chunks_mut::<PANEL>();
        let groups = columns.chunks(panel.group_len).zip(outs.chunks_mut(panel.group_len));
        for (group, (columns, outs)) in groups.enumerate() {
            let at = (start / panel.group_len + group) * PANEL;
            let scales = load_column(&panel.scales[at..][..PANEL]);
            if panel.mins.is_empty() {
                for (codes, out) in columns.iter().zip(outs) {
                    let codes = column(codes);
                    store_column(std::array::from_fn(|v| _mm256_mul_ps(scales[v], codes[v])), out);
                }
            } else {
                let mins = load_column(&panel.mins[at..][..PANEL]);
                for (codes, out) in columns.iter().zip(outs) {
                    let codes = column(codes);
                    let value = |v: usize| _mm256_sub_ps(_mm256_mul_ps(scales[v], codes[v]), mins[v]);
                    store_column(std::array::from_fn(value), out);
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn unpack_floats(codes: &[u8], out: &mut [f32], value: impl Fn(__m128i) -> __m256) {
        let (eights, _) = codes.as_chunks::<16>();
        for (half, out) in eights.iter().zip(out.chunks_exact_mut(8)) {
            // SAFETY: sixteen bytes in, eight floats out.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), value(_mm_loadu_si128(half.as_ptr().cast()))) };
        }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn load_column(values: &[f32]) -> Column {
        assert_eq!(values.len(), PANEL);
        // SAFETY: there are 32 values.
        std::array::from_fn(|v| unsafe { _mm256_loadu_ps(values.as_ptr().add(8 * v)) })
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn store_column(column: Column, out: &mut [f32; PANEL]) {
        for (v, vector) in column.into_iter().enumerate() {
            // SAFETY: there are 32 values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * v), vector) };
        }
    }
}
