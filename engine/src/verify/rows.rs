//! Cases of the ops that go element by element or row by row.

use super::random::Random;
use super::{Case, Output};
use crate::op::{
    Activation, Add, Embed, GatedAct, GatherRows, NON_FINITE, Op, RmsNorm, Rope, RopeStyle, SAMPLED_BY_SLOT,
    UpdateTable,
};
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
        let gate = device.random(rows, cols, random)?;
        let up = device.random(rows, cols, random)?;
        let out = device.unwritten(rows, cols)?;
        let words = device.run(&[Op::GatedAct(GatedAct { gate, up, activation, out })], &[out])?;
        Ok(Output::f32(words, 1e-5))
    })
}

pub fn gather_rows(rows: u32, cols: u32) -> Case {
    Case::new("gather_rows", "", format!("4 of {rows} x {cols}"), move |device| {
        let x = device.random(rows, cols, &mut Random::new(11))?;
        let picks: Vec<u32> = (0..4).map(|i| (i * 7 + rows - 1) % rows).collect();
        let rows = device.u32(4, 1, &picks)?;
        let out = device.unwritten(4, cols)?;
        let words = device.run(&[Op::GatherRows(GatherRows { x, rows, out })], &[out])?;
        Ok(Output::exact(words))
    })
}

pub fn add(rows: u32, cols: u32) -> Case {
    Case::new("add", "", format!("{rows} x {cols}"), move |device| {
        let random = &mut Random::new(12);
        let x = device.random(rows, cols, random)?;
        let y = device.random(rows, cols, random)?;
        let words = device.run(&[Op::Add(Add { x, y })], &[x])?;
        Ok(Output::f32(words, 1e-5))
    })
}

pub fn rope(style: RopeStyle, head_dim: u32, rotary_dim: u32) -> Case {
    let variant = match style {
        RopeStyle::Interleaved => "interleaved",
        RopeStyle::Halves => "halves",
    };
    Case::new("rope", variant, format!("{rotary_dim} of head {head_dim}"), move |device| {
        let random = &mut Random::new(5);
        let x = device.random(9, 3 * head_dim, random)?;
        let table = device.random(50, rotary_dim, random)?;
        let positions = device.u32(9, 1, &[0, 1, 2, 49, 3, 17, 17, 8, 30])?;
        let words = device.run(&[Op::Rope(Rope { x, head_dim, positions, table, style })], &[x])?;
        Ok(Output::f32(words, 1e-6))
    })
}
