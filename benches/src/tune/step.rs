//! The tables of all shapes held against the device's own as a whole: what the products of a step take with either, in
//! turns.
//!
//! Invariant: class by class from few rows to many, because a table hands what is left of many rows to the lines
//! before; what does not win goes back to the device's own choice in every shape.

use std::time::{Duration, Instant};

use fullbore_engine::op::{MatMul, Op};
use fullbore_engine::tuning::MatMulShape;

use super::choice::{LEAST_ROUNDS, Ratio};
use super::{Bench, ClassRows, Found, StepProducts, TunedShape};
use crate::ops::OpsError;
use crate::ops::rig::Rig;

/// One class of one step.
#[derive(Clone, Debug)]
pub struct TunedStep {
    pub first_rows: u32,
    /// None for the last class.
    pub max_rows: Option<u32>,
    /// That the step had.
    pub rows: u32,
    /// Shapes whose tables differ here.
    pub num_changed: usize,
    /// Of the step's time with the tables to that without.
    pub ratio: Ratio,
    pub is_kept: bool,
}

/// Rows that go through the output layer at most: one a sequence.
const MAX_OUTPUT_ROWS: u32 = 64;

/// Takes back what is no faster as a whole. Each class has its share of `time`, and rounds enough however long it is.
pub(super) fn hold(
    rig: &mut Rig,
    benches: &[Bench],
    tuned: &mut [TunedShape],
    products: &StepProducts,
    time: Duration,
    progress: &mut dyn FnMut(Found),
) -> Result<Vec<TunedStep>, OpsError> {
    let mut steps = Vec::new();
    let Some(num_classes) = tuned.iter().map(|shape| shape.classes.len()).max() else { return Ok(steps) };
    for place in 0..num_classes {
        let differs = |shape: &&TunedShape| shape.classes[place].chosen.is_some();
        let num_changed = tuned.iter().filter(differs).count();
        if num_changed == 0 {
            continue;
        }
        let ClassRows { first_rows, max_rows, .. } = tuned[0].classes[place].rows;
        let rows = tuned.iter().map(|shape| shape.classes[place].rows.most).min().expect("a shape");
        let ops = ops(benches, products, rows);
        if ops.is_empty() {
            continue;
        }
        let ratio = ratio(rig, tuned, &ops, time / num_classes as u32)?;
        let is_kept = ratio.is_faster();
        if !is_kept {
            tuned.iter_mut().for_each(|shape| shape.classes[place].chosen = None);
        }
        let step = TunedStep { first_rows, max_rows, rows, num_changed, ratio, is_kept };
        progress(Found::Step(&step));
        steps.push(step);
    }
    Ok(steps)
}

/// The products of a step of `rows` rows, in its order; each layer has weights of its own, as far as there are.
fn ops(benches: &[Bench], products: &StepProducts, rows: u32) -> Vec<Op> {
    let of_layers = products.layers.iter().map(|&shape| (shape, rows));
    let of_output = products.output.map(|shape| (shape, rows.min(MAX_OUTPUT_ROWS)));
    let op = |(turn, (shape, rows)): (usize, (MatMulShape, u32))| {
        let Bench { weights, x, out, .. } = benches.iter().find(|bench| bench.shape == shape)?;
        let (x, out) = (x.first_rows(rows), out.first_rows(rows));
        let weight = weights[turn % weights.len()];
        Some(Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out }))
    };
    of_layers.chain(of_output).enumerate().filter_map(op).collect()
}

/// By rounds of both, first one and then the other at the head.
fn ratio(rig: &mut Rig, tuned: &[TunedShape], ops: &[Op], time: Duration) -> Result<Ratio, OpsError> {
    let begun = Instant::now();
    let mut run = |is_tuned: bool| -> Result<f64, OpsError> {
        for shape in tuned {
            let table = if is_tuned { shape.lines() } else { Vec::new() };
            rig.backend.set_mat_mul_table(shape.shape, &table).expect("kernels that the device has named");
        }
        Ok(rig.run(ops, ops.len())?.device_ns)
    };
    // Kernels that no class alone has run are compiled first.
    run(true)?;
    run(false)?;
    let mut ratios = Vec::new();
    while ratios.len() < LEAST_ROUNDS || begun.elapsed() < time {
        let ratio = if ratios.len().is_multiple_of(2) {
            let own_ns = run(false)?;
            run(true)? / own_ns
        } else {
            let ns = run(true)?;
            ns / run(false)?
        };
        ratios.push(ratio);
    }
    Ok(Ratio::of(&ratios))
}
