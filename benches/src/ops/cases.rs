//! Which ops are measured: each with its tensors on the device, and what it must read, write and compute.

use fullbore_engine::backend::{DeviceError, WeightSpec};
use fullbore_engine::op::{MatMul, Op};
use fullbore_engine::tensor::{Tensor, Weight};

use super::rig::Rig;
use super::{OpsError, OpsOptions};

mod cache;
mod rows;

/// An op at one M.
pub struct Case {
    pub name: String,
    pub shape: String,
    pub m: u32,
    pub bytes: u64,
    pub flops: u64,
    /// Nanoseconds of one op, by recording.
    pub samples: Vec<f64>,
    /// Equal but for their weights.
    ops: Vec<Op>,
    /// Ops of a recording, once it is known.
    repeats: Option<usize>,
}

/// Rows of the ops that take one a sequence, at most.
const MAX_SEQUENCES: u32 = 64;

impl Case {
    fn new(name: String, shape: String, m: u32, bytes: u64, flops: u64, ops: Vec<Op>) -> Case {
        Case { name, shape, m, bytes, flops, ops, samples: Vec::new(), repeats: None }
    }

    pub fn run(&mut self, rig: &mut Rig) -> Result<(), OpsError> {
        let repeats = match self.repeats {
            Some(repeats) => repeats,
            None => *self.repeats.insert(rig.repeats(&self.ops)?),
        };
        self.samples.push(rig.run(&self.ops, repeats)?.device_ns / repeats as f64);
        Ok(())
    }
}

/// All cases that are asked for and fit the device, and why the others do not.
pub fn load(rig: &mut Rig, options: &OpsOptions) -> Result<(Vec<Case>, Vec<String>), OpsError> {
    let shape = options.shape;
    let q_dim = shape.num_heads * shape.head_dim;
    let most = options.rows.iter().copied().max().unwrap_or(0);
    let widest = (2 * shape.ffn_dim).max(shape.dim).max(q_dim + 2 * shape.num_kv_heads * shape.head_dim);
    let widest = (most * widest).max(most.min(MAX_SEQUENCES) * shape.vocab_size);
    let (x, out) = (rig.random(1, widest)?, rig.zeros(1, widest)?);
    let mut loader = Loader { rig, options, x, out, embedding: None, cases: Vec::new(), skipped: Vec::new() };
    loader.mat_muls()?;
    loader.elements()?;
    loader.embed()?;
    loader.caches()?;
    loader.at_each("sample", MAX_SEQUENCES, Loader::sample)?;
    Ok((loader.cases, loader.skipped))
}

struct Loader<'a, 'b> {
    rig: &'a mut Rig<'b>,
    options: &'a OpsOptions,
    /// As long as any case needs.
    x: Tensor,
    out: Tensor,
    /// (vocab, dim): the output layer's.
    embedding: Option<Weight>,
    cases: Vec<Case>,
    skipped: Vec<String>,
}

/// `rows` x `cols` at the begin of `tensor`.
fn part(tensor: Tensor, rows: u32, cols: u32) -> Tensor {
    Tensor { rows, cols, ..tensor }
}

impl Loader<'_, '_> {
    /// Every M up to `max_rows` that a case is measured at.
    fn rows(&self, name: &str, max_rows: u32) -> Vec<u32> {
        let is_asked = name.contains(&self.options.only);
        self.options.rows.iter().copied().filter(|&m| is_asked && m <= max_rows).collect()
    }

    fn mat_muls(&mut self) -> Result<(), OpsError> {
        for (part_name, n, k) in self.options.shape.mat_muls() {
            let name = format!("mat_mul {part_name}");
            let max_rows = if part_name == "output" { MAX_SEQUENCES } else { u32::MAX };
            let rows = self.rows(&name, max_rows);
            if rows.is_empty() {
                continue;
            }
            let format = self.options.format;
            let spec = WeightSpec { name: name.clone(), rows: n, cols: k, format };
            let weights = match self.rig.cold_weights(&spec, self.options.cold_bytes)? {
                Ok(weights) => weights,
                Err(reason) => {
                    self.skipped.push(format!("{name}: {reason}"));
                    continue;
                }
            };
            if part_name == "output" {
                self.embedding = weights.first().copied();
            }
            for m in rows {
                let (x, out) = (part(self.x, m, k), part(self.out, m, n));
                let ops = weights
                    .iter()
                    .map(|&weight| Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out }))
                    .collect();
                let (m_, n_, k_) = (u64::from(m), u64::from(n), u64::from(k));
                let bytes = format.row_bytes(k) * n_ + (m_ * k_ + m_ * n_) * 4;
                self.cases.push(Case::new(name.clone(), format!("{n} x {k}"), m, bytes, 2 * m_ * n_ * k_, ops));
            }
        }
        Ok(())
    }

    /// An op at every M up to `max_rows`.
    fn at_each(
        &mut self,
        name: &str,
        max_rows: u32,
        case: impl Fn(&mut Self, u32) -> Result<Case, DeviceError>,
    ) -> Result<(), OpsError> {
        for m in self.rows(name, max_rows) {
            match case(self, m) {
                Ok(case) => self.cases.push(case),
                Err(error @ (DeviceError::OutOfMemory { .. } | DeviceError::BufferTooLarge { .. })) => {
                    self.skipped.push(format!("{name} at {m}: {error}"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
