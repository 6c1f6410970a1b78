//! Heads of K or V as a cache stores them, and back: f16, or groups of 32 codes with one f16 scale.
//!
//! The rounding is GGML's (`quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` in ggml-quants.c): q8_0 divides the
//! largest magnitude by 127 and rounds halves away from zero; q4_0 divides the largest element by -8, adds 8 and rounds
//! halves up. Unlike there a code counts steps of the scale as it is stored, rounded to f16.
//!
//! Invariant: the same bits on every device, for which `kv_head.wgsl` takes the same steps: integers, one product at a
//! time, and its truncation. A NaN is one and the same, whichever it was. A group that holds one, an infinity, or more
//! than a scale can say comes back as NaN.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::tensor::{KV_GROUP, KvType};

const GROUP: usize = KV_GROUP as usize;
const INFINITY: u32 = 0x7f80_0000;
/// f16.
const NAN: u16 = 0x7e00;

/// Stores one head as [`KvType::head_words`] says.
pub(super) fn store(kv_type: KvType, x: &[f32], words: &mut [u32]) {
    let (codes, scales) = words.split_at_mut(kv_type.code_words(x.len() as u32) as usize);
    let codes: &mut [u8] = bytemuck::cast_slice_mut(codes);
    let scales: &mut [u16] = bytemuck::cast_slice_mut(scales);
    let groups = x.chunks_exact(GROUP).zip(scales);
    match kv_type {
        KvType::F16 => {
            let halves: &mut [f16] = bytemuck::cast_slice_mut::<u8, u16>(codes).reinterpret_cast_mut();
            halves.convert_from_f32_slice(x);
            // Its sign is a device's own where one was made.
            halves.iter_mut().filter(|half| half.is_nan()).for_each(|half| *half = f16::from_bits(NAN));
        }
        KvType::Q8_0 => groups.zip(codes.chunks_exact_mut(GROUP)).for_each(|((x, scale), codes)| {
            let (highest, extreme) = extreme(x);
            *scale = scale_bits(highest, extreme.abs() * (1.0 / 127.0));
            let steps = inverse(*scale);
            codes.iter_mut().zip(x).for_each(|(code, x)| *code = code8(count(*x, steps)));
        }),
        KvType::Q4_0 => groups.zip(codes.chunks_exact_mut(GROUP / 2)).for_each(|((x, scale), codes)| {
            let (highest, extreme) = extreme(x);
            *scale = scale_bits(highest, extreme * -0.125);
            let steps = inverse(*scale);
            let (low, high) = x.split_at(GROUP / 2);
            for ((both, low), high) in codes.iter_mut().zip(low).zip(high) {
                *both = code4(count(*low, steps)) | code4(count(*high, steps)) << 4;
            }
        }),
    }
}

/// The elements of consecutive heads of `head_dim`, as `store` has stored them.
pub(super) fn load(kv_type: KvType, head_dim: usize, words: &[u32], out: &mut [f32]) {
    if kv_type == KvType::F16 {
        let halves: &[f16] = bytemuck::cast_slice::<u32, u16>(words).reinterpret_cast();
        return halves.convert_to_f32_slice(out);
    }
    let heads = words.chunks_exact(kv_type.head_words(head_dim as u32) as usize);
    for (words, out) in heads.zip(out.chunks_exact_mut(head_dim)) {
        let (codes, scales) = words.split_at(kv_type.code_words(head_dim as u32) as usize);
        let codes: &[u8] = bytemuck::cast_slice(codes);
        let groups = out.chunks_exact_mut(GROUP).zip(bytemuck::cast_slice::<u32, u16>(scales));
        if kv_type == KvType::Q8_0 {
            for ((out, scale), codes) in groups.zip(codes.chunks_exact(GROUP)) {
                let scale = f16::from_bits(*scale).to_f32();
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = scale * f32::from(code.cast_signed()));
            }
        } else {
            for ((out, scale), codes) in groups.zip(codes.chunks_exact(GROUP / 2)) {
                let scale = f16::from_bits(*scale).to_f32();
                let (low, high) = out.split_at_mut(GROUP / 2);
                low.iter_mut().zip(codes).for_each(|(out, both)| *out = scale * f32::from((both & 15) as i8 - 8));
                high.iter_mut().zip(codes).for_each(|(out, both)| *out = scale * f32::from((both >> 4) as i8 - 8));
            }
        }
    }
}

/// The element of largest magnitude, the first among equals, and the bits of that magnitude. Magnitudes are ordered as
/// their bits are, and a NaN is above them all.
fn extreme(x: &[f32]) -> (u32, f32) {
    x.iter().fold((0, 0.0), |(highest, extreme), &x| {
        let magnitude = x.to_bits() & !(1 << 31);
        if magnitude > highest { (magnitude, x) } else { (highest, extreme) }
    })
}

/// The f16 bits of a scale, where the group can have one.
fn scale_bits(highest: u32, scale: f32) -> u16 {
    if highest >= INFINITY { NAN } else { f16::from_f32(scale).to_bits() }
}

/// Steps in `x`: none where a scale has none to count.
fn count(x: f32, steps: f32) -> f32 {
    if steps == 0.0 { 0.0 } else { x * steps }
}

/// Steps of a scale in 1, to 20 bits; 0 for a scale that is zero or not finite. A division of floats would do, were it
/// the same on every GPU.
fn inverse(scale: u16) -> f32 {
    let (exponent, fraction) = (i32::from(scale >> 10 & 31), u32::from(scale & 0x3ff));
    if exponent == 31 || scale & 0x7fff == 0 {
        return 0.0;
    }
    // The scale is significand * 2^(power - 25).
    let (significand, power) = match exponent {
        0 => (fraction << (fraction.leading_zeros() - 21), 22 - fraction.leading_zeros() as i32),
        _ => (fraction | 0x400, exponent),
    };
    let sign = u32::from(scale >> 15) << 31;
    let unit = f32::from_bits(sign | ((127 - 6 - power) as u32) << 23);
    ((1u32 << 31) / significand) as f32 * unit
}

/// A signed byte, from -127 to 127.
fn code8(steps: f32) -> u8 {
    let code = ((steps.abs() * 2.0) as u32).div_ceil(2).min(127) as u8;
    if steps < 0.0 { code.wrapping_neg() } else { code }
}

/// From 0 to 15, of which 8 means zero.
fn code4(steps: f32) -> u8 {
    let doubled = steps * 2.0;
    let toward_zero = doubled as i32;
    let floor = toward_zero - i32::from(toward_zero as f32 > doubled);
    ((floor + 17) >> 1).clamp(0, 15) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUANTISED: [KvType; 2] = [KvType::Q8_0, KvType::Q4_0];

    /// The scale and the elements of one group, stored and loaded.
    fn round_trip(kv_type: KvType, x: &[f32]) -> (f32, Vec<f32>) {
        let mut words = vec![0; kv_type.head_words(x.len() as u32) as usize];
        store(kv_type, x, &mut words);
        let mut out = vec![f32::NAN; x.len()];
        load(kv_type, x.len(), &words, &mut out);
        (f16::from_bits(words[words.len() - 1] as u16).to_f32(), out)
    }

    /// Seeded; in [-1, 1).
    fn floats(seed: u32) -> impl Iterator<Item = f32> {
        let mut state = seed;
        std::iter::repeat_with(move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    #[test]
    fn an_element_comes_back_within_half_a_step() {
        for kv_type in QUANTISED {
            // From where a scale is the smallest of f16 to where it is the largest.
            for power in -17..=15 {
                let x: Vec<f32> = floats(7).take(GROUP).map(|x| x * 2f32.powi(power)).collect();
                let (scale, out) = round_trip(kv_type, &x);
                assert!(scale != 0.0 && scale.is_finite(), "{kv_type:?} at 2^{power}: scale {scale}");
                // A scale rounded down leaves the extreme up to half a unit of f16 short, for each step of it; one that
                // is subnormal much more.
                let subnormal = scale.abs() < f16::MIN_POSITIVE.to_f32();
                let steps = if kv_type == KvType::Q8_0 { 127.0 } else { 8.0 };
                let short = if subnormal { 2f32.powi(-25) * steps } else { scale.abs() * 2f32.powi(-11) * steps };
                // Halves of q4_0 are rounded up: the extreme opposite is a step short.
                for (x, out) in x.iter().zip(&out) {
                    let clipped = kv_type == KvType::Q4_0 && x / scale > 7.0;
                    let most = if clipped { scale.abs() } else { scale.abs() * 0.501 };
                    assert!((x - out).abs() <= most + short, "{kv_type:?} at 2^{power}: {x} came back as {out}");
                }
            }
        }
    }

    #[test]
    fn the_extreme_decides_the_scale_whatever_its_sign() {
        for sign in [1.0, -1.0] {
            let mut x = [0.25 * sign; GROUP];
            x[19] = -127.0 * sign;
            let (scale, out) = round_trip(KvType::Q8_0, &x);
            assert_eq!((scale, out[19], out[0]), (1.0, -127.0 * sign, 0.0));
            x[19] = -8.0 * sign;
            x[3] = 0.5;
            let (scale, out) = round_trip(KvType::Q4_0, &x);
            assert_eq!((scale, out[19], out[0]), (sign, -8.0 * sign, 0.0));
            // Half a step is rounded up in steps, and a step of a negative scale goes down.
            assert_eq!(out[3], if sign > 0.0 { 1.0 } else { 0.0 });
        }
        // Halves of q8_0 go away from zero.
        let mut x = [0.0; GROUP];
        (x[0], x[1], x[2], x[3]) = (127.0, 2.5, -2.5, -0.49999997);
        assert_eq!(round_trip(KvType::Q8_0, &x).1[..4], [127.0, 3.0, -3.0, 0.0]);
        // Of two extremes the first.
        let mut x = [0.0; GROUP];
        (x[4], x[9]) = (8.0, -8.0);
        assert_eq!(
            round_trip(KvType::Q4_0, &x),
            (-1.0, {
                let mut out = vec![0.0; GROUP];
                (out[4], out[9]) = (8.0, -7.0);
                out
            })
        );
    }

    #[test]
    fn nothing_is_lost_of_nothing_and_nothing_made_of_too_much() {
        for kv_type in QUANTISED {
            for tiny in [0.0, -0.0, f32::from_bits(1), f32::MIN_POSITIVE, -1e-9] {
                let (scale, out) = round_trip(kv_type, &[tiny; GROUP]);
                assert!(scale == 0.0 && out.iter().all(|&x| x == 0.0), "{kv_type:?} of {tiny}: {out:?}");
            }
            for broken in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38] {
                let mut x: Vec<f32> = floats(3).take(2 * GROUP).collect();
                x[5] = broken;
                let (_, out) = round_trip(kv_type, &x);
                assert!(out[..GROUP].iter().all(|x| x.is_nan()), "{kv_type:?} of {broken}: {out:?}");
                assert!(out[GROUP..].iter().all(|x| x.is_finite()), "{kv_type:?}: the other group has no part in it");
            }
        }
    }

    #[test]
    fn every_nan_is_stored_as_the_same_one() {
        for bits in [0x7fc0_0000, 0xffc0_0000, 0x7fff_ffff, 0xffff_ffff, 0x7f80_0001, 0xff80_2000] {
            let mut words = [0];
            store(KvType::F16, &[f32::from_bits(bits), f32::NEG_INFINITY], &mut words);
            assert_eq!(words, [0xfc00_7e00], "{bits:#x}");
        }
    }

    #[test]
    fn an_inverse_is_near_for_every_scale() {
        for bits in 0..=u16::MAX {
            let scale = f16::from_bits(bits).to_f32();
            let inverse = inverse(bits);
            match scale.is_finite() && scale != 0.0 {
                true => assert!((inverse * scale - 1.0).abs() <= 2f32.powi(-20), "{scale}: {inverse}"),
                false => assert_eq!(inverse, 0.0, "{scale}"),
            }
        }
    }
}
