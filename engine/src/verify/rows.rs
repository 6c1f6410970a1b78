//! Cases of the ops that go element by element or row by row.

use super::random::Random;
use super::{Case, Output};
use crate::op::{Activation, AddNorm, Embed, GatedAct, MulAdd, NON_FINITE, Op, RmsNorm, SAMPLED_BY_SLOT, UpdateTable};
use crate::tensor::WeightFormat;

pub fn update_table() -> Case {
    Case::new("update_table", "", "4 entries".to_owned(), |device| {
        let table = device.u32(3, 5, &(0..15).collect::<Vec<u32>>())?;
        let entries = device.u32(4, 2, &[0, 100, 7, 101, 14, 102, 3, 103])?;
        let words = device.run(&[Op::UpdateTable(UpdateTable { entries, table })], &[table])?;
        Ok(Output::exact(words))
    })
}

pub fn embed(format: WeightFormat) -> Case {
    Case::new("embed", format.name(), "6 of 70 x 512".to_owned(), move |device| {
        let table = device.weight(format, 70, 512, 1)?;
        let ids = device.u32(6, 1, &[0, 69, SAMPLED_BY_SLOT | 2, 33, SAMPLED_BY_SLOT, SAMPLED_BY_SLOT | 3])?;
        // What a broken row sampled stands for any token.
        let sampled = device.u32(4, 1, &[64, 5, 31, NON_FINITE])?;
        let out = device.unwritten(6, 512)?;
        let words = device.run(&[Op::Embed(Embed { ids, sampled, table, scale: 1.5, out })], &[out])?;
        Ok(Output::f32(words, 1e-6))
    })
    .of_formats(&[format])
}

pub fn rms_norm(rows: u32, cols: u32) -> Case {
    Case::new("rms_norm", "", format!("{rows} x {cols}"), move |device| {
        let random = &mut Random::new(2);
        let x = device.random(rows, cols, random)?;
        let weight = device.random(1, cols, random)?;
        let out = device.unwritten(rows, cols)?;
        let words = device.run(&[Op::RmsNorm(RmsNorm { x, weight, eps: 1e-5, out })], &[out])?;
        Ok(Output::f32(words, 1e-5))
    })
}

pub fn gated_act(activation: Activation, rows: u32, cols: u32) -> Case {
    let variant = match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_tanh",
    };
    Case::new("gated_act", variant, format!("{rows} x {cols}"), move |device| {
        let random = &mut Random::new(10);
        let gate_up = device.random(rows, 2 * cols, random)?;
        let out = device.unwritten(rows, cols)?;
        let words = device.run(&[Op::GatedAct(GatedAct { gate_up, activation, out })], &[out])?;
        Ok(Output::f32(words, 1e-5))
    })
}

/// The product is exact, so that it makes no difference whether a device rounds it. A sum alone may go to matrix units.
pub fn mul_add(rows: u32, cols: u32, is_sum: bool) -> Case {
    let (variant, scale, offset) = if is_sum { ("sum", 1.0, 1.0 / 16.0) } else { ("", -0.5, 0.75) };
    Case::new("mul_add", variant, format!("{rows} x {cols}"), move |device| {
        let x = device.random(rows, cols, &mut Random::new(13))?;
        let op = Op::MulAdd(MulAdd { x, scale, offset, rounds: 16 });
        Ok(Output::f32(device.run(&[op], &[x])?, 1e-5))
    })
}

/// On all rows of x, or on every second one from the last down, with and without a norm of y first.
pub fn add_norm(num_rows: u32, rows: u32, cols: u32, has_post: bool) -> Case {
    let shape = format!("{num_rows} of {rows} x {cols}");
    Case::new("add_norm", if has_post { "norm first" } else { "" }, shape, move |device| {
        let random = &mut Random::new(12);
        let (x, y) = (device.random(rows, cols, random)?, device.random(rows, cols, random)?);
        let (weight, post) = (device.random(1, cols, random)?, device.random(1, cols, random)?);
        let picks = || (0..num_rows).map(|i| rows - 1 - 2 * i).collect::<Vec<u32>>();
        let rows = if num_rows < rows { Some(device.u32(num_rows, 1, &picks())?) } else { None };
        let out = device.unwritten(num_rows, cols)?;
        let op = AddNorm { x, y, post_weight: has_post.then_some(post), rows, weight, eps: 1e-5, out };
        let mut words = device.run(&[Op::AddNorm(op)], &[x, out])?;
        let normed = words.split_off((x.rows * x.cols) as usize);
        Ok(vec![Output { name: "x", words, tolerance: 1e-5 }, Output { name: "out", words: normed, tolerance: 1e-5 }])
    })
}
