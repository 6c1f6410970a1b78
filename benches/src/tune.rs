//! Which of a device's matmul kernels is fastest for how many rows of which weight, found by trying them.
//!
//! M is divided into classes. In each the kernels that may suit are run in rounds with the device's own choice, at the
//! fewest and the most rows of the class, on weights that no cache holds; [`choice`] says which of them is faster
//! beyond the noise. Then [`step`] holds the tables as a whole against the device's own, and what is no faster so goes
//! back. Invariant: whatever is chosen gives the bits that the device's own table gives; nothing here says so, every
//! backend does.

use std::time::{Duration, Instant};

use fullbore_engine::backend::{Backend, WeightSpec};
use fullbore_engine::op::{MatMul, Op};
use fullbore_engine::tensor::{Tensor, Weight};
use fullbore_engine::tuning::{MatMulKernel, MatMulLine, MatMulShape, TunedMatMul};

use crate::ops::OpsError;
use crate::ops::rig::Rig;

mod choice;
mod report;
mod step;

pub use choice::Ratio;
use choice::{Contest, LEAST_ROUNDS};
pub use step::TunedStep;

#[derive(Clone, Debug)]
pub struct TuneOptions {
    pub shapes: Vec<MatMulShape>,
    /// By the shape's place: kernels that compute wrongly, by name.
    pub wrong: Vec<Vec<String>>,
    pub products: StepProducts,
    /// For all shapes together; every kernel that may suit is tried in some rounds at least.
    pub time: Duration,
    /// Of the weights that take turns: more than caches hold.
    pub cold_bytes: u64,
}

/// What a step multiplies by, in its order.
#[derive(Clone, Debug)]
pub struct StepProducts {
    pub layers: Vec<MatMulShape>,
    pub output: Option<MatMulShape>,
}

/// What was found, and how it fared as a whole.
#[derive(Clone, Debug)]
pub struct Tuned {
    pub shapes: Vec<TunedShape>,
    /// Of the classes in which some table differs from the device's own.
    pub steps: Vec<TunedStep>,
}

/// What is told of on the way.
pub enum Found<'a> {
    Shape(&'a TunedShape),
    Step(&'a TunedStep),
}

/// What was measured of a shape.
#[derive(Clone, Debug)]
pub struct TunedShape {
    pub shape: MatMulShape,
    pub classes: Vec<TunedClass>,
}

#[derive(Clone, Debug)]
pub struct TunedClass {
    pub rows: ClassRows,
    /// The device's own choice, and what it takes at the most rows that were measured.
    pub own: MatMulLine,
    pub own_ns: f64,
    /// Instead of that.
    pub chosen: Option<Chosen>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassRows {
    pub first_rows: u32,
    /// None for the last class.
    pub max_rows: Option<u32>,
    /// That were measured.
    pub most: u32,
}

#[derive(Clone, Debug)]
pub struct Chosen {
    pub line: MatMulLine,
    pub ns: f64,
    /// To the device's own choice, at all rows that were measured.
    pub ratio: Ratio,
}

/// The most rows of each class but the last.
const CLASS_ENDS: [u32; 15] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64];
const LARGEST_END: u32 = CLASS_ENDS[CLASS_ENDS.len() - 1];
/// Rows that stand for the last class.
const MANY_ROWS: u32 = 256;
/// A kernel that computes so many times the rows that there are is not tried, nor one that decodes a weight so often.
const MAX_WASTE: u32 = 2;
const MAX_DECODES: u32 = 8;
/// Of the time, what is for single shapes; the rest is for whole steps.
const SHAPES_SHARE: f64 = 0.75;

/// Tells `progress` each shape that is measured, and then each step. Shapes of which there is no choice or no room are
/// left out.
pub fn tune(
    backend: &mut dyn Backend,
    options: &TuneOptions,
    progress: &mut dyn FnMut(Found),
) -> Result<Tuned, OpsError> {
    assert_eq!(options.shapes.len(), options.wrong.len());
    let time = options.time.mul_f64(SHAPES_SHARE);
    let num_classes = options.shapes.len() as u32 * (CLASS_ENDS.len() as u32 + 1);
    let mut rig = Rig::new(backend)?;
    let (mut shapes, mut benches) = (Vec::new(), Vec::new());
    for (&shape, wrong) in options.shapes.iter().zip(&options.wrong) {
        let mut kernels = rig.backend.mat_mul_kernels(shape.format);
        kernels.retain(|kernel| !wrong.contains(&kernel.name) && shape.cols >= kernel.least_cols);
        if kernels.is_empty() {
            continue;
        }
        let Some(bench) = Bench::new(&mut rig, shape, options.cold_bytes)? else { continue };
        let own = rig.backend.mat_mul_table(shape);
        let mut tuner = Tuner { rig: &mut rig, bench: &bench, kernels, own, time: time / num_classes };
        let found = tuner.tune();
        rig.backend.set_mat_mul_table(shape, &[]).expect("no line is wrong");
        let found = found?;
        progress(Found::Shape(&found));
        shapes.push(found);
        benches.push(bench);
    }
    let held = step::hold(&mut rig, &benches, &mut shapes, &options.products, options.time - time, progress);
    for shape in &shapes {
        rig.backend.set_mat_mul_table(shape.shape, &[]).expect("no line is wrong");
    }
    Ok(Tuned { shapes, steps: held? })
}

/// What products by a shape are measured with.
struct Bench {
    shape: MatMulShape,
    weights: Vec<Weight>,
    x: Tensor,
    out: Tensor,
    /// That fit x and the output.
    max_rows: u32,
}

impl Bench {
    /// `None` where there is no room.
    fn new(rig: &mut Rig, shape: MatMulShape, cold_bytes: u64) -> Result<Option<Bench>, OpsError> {
        let MatMulShape { format, rows, cols } = shape;
        let spec = WeightSpec { name: "weight".to_owned(), rows, cols, format };
        let Ok(weights) = rig.cold_weights(&spec, cold_bytes)? else { return Ok(None) };
        let fitting = rig.backend.info().max_buffer_bytes / 4 / u64::from(rows.max(cols));
        let max_rows = fitting.min(MANY_ROWS.into()) as u32;
        let (x, out) = (rig.random(max_rows, cols)?, rig.zeros(max_rows, rows)?);
        Ok(Some(Bench { shape, weights, x, out, max_rows }))
    }

    fn ops(&self, rows: u32) -> Vec<Op> {
        let (x, out) = (self.x.first_rows(rows), self.out.first_rows(rows));
        let op = |&weight: &Weight| Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out });
        self.weights.iter().map(op).collect()
    }
}

struct Tuner<'a, 'b> {
    rig: &'a mut Rig<'b>,
    bench: &'a Bench,
    kernels: Vec<MatMulKernel>,
    /// The device's own table.
    own: Vec<MatMulLine>,
    /// For a class.
    time: Duration,
}

/// A table that is tried, and how many ops of a recording it needs at each of the rows, once that is known.
struct Candidate {
    table: Vec<MatMulLine>,
    repeats: Vec<Option<usize>>,
}

impl TunedShape {
    pub fn found(&self) -> TunedMatMul {
        let mut times: Vec<(u32, f64)> = self.classes.iter().map(|class| (class.rows.most, class.ns())).collect();
        times.dedup_by_key(|&mut (rows, _)| rows);
        TunedMatMul { shape: self.shape, table: self.lines(), times }
    }

    /// Its table.
    pub fn lines(&self) -> Vec<MatMulLine> {
        lines(&self.classes)
    }
}

impl TunedClass {
    fn line(&self) -> &MatMulLine {
        self.chosen.as_ref().map_or(&self.own, |chosen| &chosen.line)
    }

    /// At the most rows that were measured.
    fn ns(&self) -> f64 {
        self.chosen.as_ref().map_or(self.own_ns, |chosen| chosen.ns)
    }
}

/// One line for neighbours that choose the same.
fn lines(classes: &[TunedClass]) -> Vec<MatMulLine> {
    let mut lines: Vec<MatMulLine> = Vec::new();
    for class in classes {
        let (line, max_rows) = (class.line(), class.rows.max_rows);
        match lines.last_mut().filter(|last| (&last.kernel, last.fills) == (&line.kernel, line.fills)) {
            Some(last) => last.max_rows = max_rows,
            None => lines.push(MatMulLine { max_rows, ..line.clone() }),
        }
    }
    lines
}

impl Tuner<'_, '_> {
    fn tune(&mut self) -> Result<TunedShape, OpsError> {
        let mut classes: Vec<TunedClass> = Vec::new();
        let mut first_rows = 1;
        for max_rows in CLASS_ENDS.map(Some).into_iter().chain([None]) {
            let most = max_rows.unwrap_or(MANY_ROWS).min(self.bench.max_rows);
            let class = self.class(&lines(&classes), ClassRows { first_rows, max_rows, most })?;
            classes.push(class);
            first_rows = most + 1;
        }
        Ok(TunedShape { shape: self.bench.shape, classes })
    }

    /// The line of the device's own table that takes `max_rows`.
    fn own_line(&self, max_rows: Option<u32>) -> MatMulLine {
        let takes = |line: &&MatMulLine| line.max_rows.is_none() || max_rows.is_some_and(|m| line.max_rows >= Some(m));
        let line = self.own.iter().find(takes).expect("a table ends with a line without a bound");
        MatMulLine { max_rows: None, ..line.clone() }
    }

    /// What could take the place of `own`.
    fn challengers(&self, own: &MatMulLine, first_rows: u32, rows: &[u32]) -> Vec<MatMulLine> {
        let mut found = Vec::new();
        let decoded_rows = first_rows.min(LARGEST_END);
        let suits =
            |kernel: &&MatMulKernel| kernel.rows < MAX_WASTE * first_rows && decoded_rows <= MAX_DECODES * kernel.rows;
        let (backend, shape) = (&*self.rig.backend, self.bench.shape);
        let has_room = |kernel: &&MatMulKernel| rows.iter().all(|&rows| backend.has_room(shape, &kernel.name, rows));
        for kernel in self.kernels.iter().filter(suits).filter(has_room) {
            let has_rest = rows.iter().any(|rows| rows % kernel.rows != 0 && *rows > kernel.rows);
            for fills in [false, true].into_iter().filter(|&fills| !fills || has_rest) {
                // With nothing left over it makes no difference whether a line fills.
                let is_own = kernel.name == own.kernel && (fills == own.fills || !has_rest);
                if !is_own {
                    found.push(MatMulLine { max_rows: None, kernel: kernel.name.clone(), fills });
                }
            }
        }
        found
    }

    /// The choice for a class, behind `lines`, in rounds of all that are in the contest: there and back, so that a
    /// speed that rises or falls favours nobody.
    fn class(&mut self, lines: &[MatMulLine], class: ClassRows) -> Result<TunedClass, OpsError> {
        let begun = Instant::now();
        let ClassRows { first_rows, max_rows, most } = class;
        let rows = if first_rows >= most { vec![most] } else { vec![first_rows, most] };
        let own = self.own_line(max_rows);
        let mut challengers = self.challengers(&own, first_rows, &rows);
        let candidate = |table| Candidate { table, repeats: vec![None; rows.len()] };
        let mut incumbent = candidate(self.own.clone());
        let behind = |line: &MatMulLine| candidate([lines, std::slice::from_ref(line)].concat());
        let mut candidates: Vec<Candidate> = challengers.iter().map(behind).collect();
        let mut contest = Contest::new(candidates.len());
        while contest.num_rounds() < LEAST_ROUNDS || begun.elapsed() < self.time {
            // Alone there is nothing to compare, and three rounds give a time.
            let mut open = contest.open();
            if open.is_empty() && contest.num_rounds() >= 3 {
                break;
            }
            let is_forth = contest.num_rounds().is_multiple_of(2);
            if !is_forth {
                open.reverse();
            }
            let mut own_times = if is_forth { self.run(&mut incumbent, &rows)? } else { Vec::new() };
            let mut times = Vec::new();
            for index in open {
                times.push((index, self.run(&mut candidates[index], &rows)?));
            }
            if !is_forth {
                own_times = self.run(&mut incumbent, &rows)?;
            }
            contest.add_round(own_times, times);
        }
        let chosen = contest.winner().map(|(index, ratio)| {
            let (line, ns) = (challengers.swap_remove(index), contest.ns(Some(index)));
            Chosen { line, ns, ratio }
        });
        Ok(TunedClass { rows: class, own, own_ns: contest.ns(None), chosen })
    }

    /// Nanoseconds of one product at each of `rows`.
    fn run(&mut self, candidate: &mut Candidate, rows: &[u32]) -> Result<Vec<f64>, OpsError> {
        let set = self.rig.backend.set_mat_mul_table(self.bench.shape, &candidate.table);
        set.expect("kernels that the device has named");
        let mut times = Vec::new();
        for (&rows, repeats) in rows.iter().zip(&mut candidate.repeats) {
            let ops = self.bench.ops(rows);
            let repeats = match *repeats {
                Some(repeats) => repeats,
                None => *repeats.insert(self.rig.repeats(&ops, 1)?),
            };
            times.push(self.rig.run(&ops, repeats)?.device_ns / repeats as f64);
        }
        Ok(times)
    }
}

#[cfg(test)]
mod tests;
