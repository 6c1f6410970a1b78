//! Cases of `mat_mul`: a format of weights, and how many rows of activations.

use super::random::Random;
use super::{Case, Output};
use crate::op::{MatMul, Op};
use crate::tensor::WeightFormat;

/// With a bias where M is odd.
pub fn mat_mul(format: WeightFormat, m: u32, n: u32, k: u32) -> Case {
    let shape = format!("M {m} N {n} K {k}{}", if m % 2 == 1 { ", bias" } else { "" });
    Case::new("mat_mul", format.name(), shape, move |device| {
        let random = &mut Random::new(3);
        let weight = device.weight(format, n, k, 4)?;
        let x = device.random(m, k, random)?;
        let bias = if m % 2 == 1 { Some(device.random(1, n, random)?) } else { None };
        let out = device.unwritten(m, n)?;
        let words = device.run(&[Op::MatMul(MatMul { x, weight, bias, out })], &[out])?;
        Ok(Output::f32(words, 1e-5))
    })
}
