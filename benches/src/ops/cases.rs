//! Which ops are measured: each with its tensors on the device, and what it must read, write and compute.

use fullbore_engine::backend::{DeviceError, WeightSpec};
use fullbore_engine::op::{AddNorm, MatMul, Op};
use fullbore_engine::tensor::{Tensor, Weight};

use super::rig::Rig;
use super::{OpsError, OpsOptions};

mod cache;
mod rows;

/// An op at one M, or two that a backend may run as one.
pub struct Case {
    pub name: String,
    pub shape: String,
    pub m: u32,
    pub bytes: u64,
    pub flops: u64,
    /// Nanoseconds of one turn, by recording.
    pub samples: Vec<f64>,
    /// In turns of `num_ops` that are equal but for their weights.
    ops: Vec<Op>,
    num_ops: usize,
    /// Turns of a recording, once it is known.
    repeats: Option<usize>,
}

/// Rows of the ops that take one a sequence, at most.
const MAX_SEQUENCES: u32 = 64;

impl Case {
    fn new(name: String, shape: String, m: u32, bytes: u64, flops: u64, ops: Vec<Op>) -> Case {
        Case { name, shape, m, bytes, flops, ops, num_ops: 1, samples: Vec::new(), repeats: None }
    }

    pub fn run(&mut self, rig: &mut Rig) -> Result<(), OpsError> {
        let repeats = match self.repeats {
            Some(repeats) => repeats,
            None => *self.repeats.insert(rig.repeats(&self.ops, self.num_ops)?),
        };
        self.samples.push(rig.run(&self.ops, repeats * self.num_ops)?.device_ns / repeats as f64);
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

/// Bytes and flops of a product of (m, k) by a weight of (n, k), whose rows take so many bytes.
fn product_counts(m: u32, n: u32, k: u32, row_bytes: u64) -> (u64, u64) {
    let [m, n, k] = [m, n, k].map(u64::from);
    (row_bytes * n + (m * k + m * n) * 4, 2 * m * n * k)
}

/// Of a residual add with its norm: what is added, multiplied or divided counts as flops; roots do not.
fn add_norm_counts(m: u32, cols: u32) -> (u64, u64) {
    let [m, cols] = [m, cols].map(u64::from);
    (4 * m * cols * 4 + cols * 4, 5 * m * cols)
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
            let name_with_norm = format!("{name} + add_norm");
            let mut rows_with_norm = self.rows(&name_with_norm, MAX_SEQUENCES);
            rows_with_norm.retain(|_| n == self.options.shape.dim);
            if rows.is_empty() && rows_with_norm.is_empty() {
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
                let op = |weight| vec![Op::MatMul(self.product(m, weight))];
                let ops = weights.iter().copied().flat_map(op).collect();
                let (bytes, flops) = product_counts(m, n, k, format.row_bytes(k));
                self.cases.push(Case::new(name.clone(), format!("{n} x {k}"), m, bytes, flops, ops));
            }
            self.with_norm(&name_with_norm, &rows_with_norm, &weights)?;
        }
        Ok(())
    }

    fn product(&self, m: u32, weight: Weight) -> MatMul {
        let (x, out) = (part(self.x, m, weight.cols), part(self.out, m, weight.rows));
        MatMul { x, weight, bias: None, first_col: 0, out }
    }

    /// Products of a layer that a norm follows, with it: of few rows a device may share their K, and the norm adds up.
    fn with_norm(&mut self, name: &str, rows: &[u32], weights: &[Weight]) -> Result<(), OpsError> {
        let (Some(&most), Some(&Weight { rows: n, cols: k, format, .. })) = (rows.iter().max(), weights.first()) else {
            return Ok(());
        };
        let (stream, normed) = (self.rig.zeros(most, n)?, self.rig.zeros(most, n)?);
        let norm = self.rig.random(1, n)?;
        for &m in rows {
            let ops = |weight| {
                let product = self.product(m, weight);
                let (x, y, out) = (stream.first_rows(m), product.out, normed.first_rows(m));
                let after = AddNorm { x, y, post_weight: None, rows: None, weight: norm, eps: 1e-5, out };
                [Op::MatMul(product), Op::AddNorm(after)]
            };
            let ops = weights.iter().copied().flat_map(ops).collect();
            let ((bytes, flops), of_norm) = (product_counts(m, n, k, format.row_bytes(k)), add_norm_counts(m, n));
            let (bytes, flops) = (bytes + of_norm.0, flops + of_norm.1);
            let case = Case::new(name.to_owned(), format!("{n} x {k}"), m, bytes, flops, ops);
            self.cases.push(Case { num_ops: 2, ..case });
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
