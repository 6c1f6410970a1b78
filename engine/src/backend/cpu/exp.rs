//! The exponential of a softmax's weights: one polynomial, so that a vector of eight gives the bits that one number
//! does. Products and sums are rounded one by one, which every processor does alike.

/// Below this the result is 0, which no sum of weights notices: the largest of them is 1.
pub(super) const LOWEST: f32 = -86.0;
pub(super) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Added to a small number and taken away again, it rounds to an integer, which is in the lowest bits meanwhile.
pub(super) const ROUND: f32 = 12_582_912.0;
/// ln(2) in two parts, of which the first has few bits: its product with an integer is exact.
pub(super) const LN_2_HIGH: f32 = 0.693_359_4;
pub(super) const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Of exp(r) = 1 + r + r^2 (1/2 + ..) within ln(2) / 2 of 0, highest power first (Cephes, `expf`).
pub(super) const TERMS: [f32; 6] = [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// exp(x) for x of at most 0; NaN gives NaN.
pub(super) fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    if x < LOWEST {
        return 0.0;
    }
    let rounded = x * LOG2_E + ROUND;
    let power = rounded - ROUND;
    let r = x - power * LN_2_HIGH - power * LN_2_LOW;
    let terms = TERMS[1..].iter().fold(TERMS[0], |sum, term| sum * r + term);
    let fraction = terms * (r * r) + r + 1.0;
    f32::from_bits(fraction.to_bits().wrapping_add(rounded.to_bits() << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exponential() {
        let mut worst = 0.0f64;
        for step in 0..=860_000 {
            let x = -1e-4 * step as f32;
            let wanted = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - wanted).abs() / wanted);
        }
        assert!(worst < 1.5e-7, "relative error {worst}");
        assert_eq!([exp(0.0), exp(-0.0)], [1.0; 2]);
        assert_eq!([exp(-86.1), exp(-3e38), exp(f32::NEG_INFINITY)], [0.0; 3]);
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan() && exp(f32::from_bits(0x7fc0_0001)).is_nan());
    }
}
