//! Cases of `mat_mul`: a format of weights, and how many rows of activations.

use super::random::Random;
use super::{Case, Output};
use crate::op::{AddNorm, MatMul, Op};
use crate::tensor::WeightFormat;
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

/// With a bias where M is odd.
pub fn mat_mul(format: WeightFormat, m: u32, n: u32, k: u32) -> Case {
    let shape = format!("M {m} N {n} K {k}{}", if m % 2 == 1 { ", bias" } else { "" });
    Case::new("mat_mul", format.name(), shape, move |device| {
        let random = &mut Random::new(3);
        let weight = device.weight(format, n, k, 4)?;
        let x = device.random(m, k, random)?;
        let bias = if m % 2 == 1 { Some(device.random(1, n, random)?) } else { None };
        let out = device.unwritten(m, n)?;
        let words = device.run(&[Op::MatMul(MatMul { x, weight, bias, first_col: 0, out })], &[out])?;
        Ok(Output::f32(words, device.mat_mul_tolerance(format)))
    })
    .of_formats(&[format])
}

/// By one kernel alone, on rows that fill a workgroup of it and begin another; where workgroups may share K, before
/// a norm too, which adds up their sums.
pub fn by_kernel(format: WeightFormat, kernel: &MatMulKernel) -> Case {
    let (shares, tolerance) = (kernel.least_cols > 1, kernel.tolerance);
    let (m, n, k) = (kernel.rows + 1, 70, if shares { 2304 } else { 512 });
    let (variant, table) = (format!("{}, {}", format.name(), kernel.name), MatMulLine::only(&kernel.name));
    Case::new("mat_mul", &variant, format!("M {m} N {n} K {k}"), move |device| {
        let random = &mut Random::new(3);
        let weight = device.weight(format, n, k, 4)?;
        let (x, out, y) = (device.random(m, k, random)?, device.unwritten(m, n)?, device.unwritten(m, n)?);
        let (residual, norm) = (device.random(m, n, random)?, device.random(1, n, random)?);
        let normed = device.unwritten(m, n)?;
        let product = |out| Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out });
        let add_norm = AddNorm { x: residual, y, post_weight: None, rows: None, weight: norm, eps: 1e-5, out: normed };
        let ops = [product(out), product(y), Op::AddNorm(add_norm)];
        let shape = MatMulShape::of(weight);
        let before = device.backend().mat_mul_table(shape);
        device.backend().set_mat_mul_table(shape, &table).expect("a kernel that the device has named");
        let words = if shares { device.run(&ops, &[out, residual]) } else { device.run(&ops[..1], &[out]) };
        device.backend().set_mat_mul_table(shape, &before).expect("the table that was there");
        let mut words = words?;
        let after = words.split_off((m * n) as usize);
        let mut outputs = Output::f32(words, tolerance);
        if shares {
            outputs.push(Output { name: "added", words: after, tolerance });
        }
        Ok(outputs)
    })
    .of_formats(&[format])
}

/// Two products in one tensor, whose other columns stay as they are.
pub fn into_columns(left: WeightFormat, right: WeightFormat) -> Case {
    let variant = format!("{}, {}", left.name(), right.name());
    let formats = [left, right];
    Case::new("mat_mul", &variant, "M 11 N 40 and 24 K 256, into columns".to_owned(), move |device| {
        let random = &mut Random::new(3);
        let (left, right) = (device.weight(left, 40, 256, 4)?, device.weight(right, 24, 256, 5)?);
        let (x, bias) = (device.random(11, 256, random)?, device.random(1, 24, random)?);
        let out = device.f32(11, 80, &[7.0; 11 * 80])?;
        let ops = [(left, None, 3), (right, Some(bias), 43)];
        let ops = ops.map(|(weight, bias, first_col)| Op::MatMul(MatMul { x, weight, bias, first_col, out }));
        let tolerance = formats.map(|format| device.mat_mul_tolerance(format)).into_iter().fold(0.0, f32::max);
        Ok(Output::f32(device.run(&ops, &[out])?, tolerance))
    })
    .of_formats(&formats)
}
