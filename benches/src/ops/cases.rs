//! Which ops are measured: each with its tensors on the device, and what it must read, write and compute.

use fullbore_engine::backend::{DeviceError, WeightSpec};
use fullbore_engine::batch::attention::QueryRows;
use fullbore_engine::op::{
    ATTENTION_CUT, Activation, Attention, CHOSEN_WORDS, GatedAct, MAX_TOP, MatMul, Op, RmsNorm, SAMPLE_ROW_WORDS,
    Sample, SampleRow, slice_cols,
};
use fullbore_engine::tensor::{KvTensor, KvType, Tensor};
use fullbore_engine::verify::attention::Planned;

use super::rig::Rig;
use super::{OpsError, OpsOptions};

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
const BLOCK_SIZE: u32 = 32;

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
    let widest = (2 * shape.ffn_dim).max(shape.dim).max(q_dim);
    let widest = (most * widest).max(most.min(MAX_SEQUENCES) * shape.vocab_size);
    let (x, out) = (rig.random(1, widest)?, rig.zeros(1, widest)?);
    let mut loader = Loader { rig, options, x, out, cases: Vec::new(), skipped: Vec::new() };
    loader.mat_muls()?;
    loader.elements()?;
    loader.sequences("attention", Loader::attention)?;
    loader.sequences("sample", Loader::sample)?;
    Ok((loader.cases, loader.skipped))
}

struct Loader<'a, 'b> {
    rig: &'a mut Rig<'b>,
    options: &'a OpsOptions,
    /// As long as any case needs.
    x: Tensor,
    out: Tensor,
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

    fn elements(&mut self) -> Result<(), OpsError> {
        let (dim, ffn_dim) = (self.options.shape.dim, self.options.shape.ffn_dim);
        let weight = self.rig.random(1, dim)?;
        for m in self.rows("rms_norm", u32::MAX) {
            let (x, out) = (part(self.x, m, dim), part(self.out, m, dim));
            let op = Op::RmsNorm(RmsNorm { x, weight, eps: 1e-5, out });
            let (bytes, flops) = (2 * x.size_bytes() + weight.size_bytes(), x.size_bytes());
            self.cases.push(Case::new("rms_norm".to_owned(), dim.to_string(), m, bytes, flops, vec![op]));
        }
        for m in self.rows("gated_act", u32::MAX) {
            let (gate_up, out) = (part(self.x, m, 2 * ffn_dim), part(self.out, m, ffn_dim));
            let op = Op::GatedAct(GatedAct { gate_up, activation: Activation::Silu, out });
            // The exponential is not counted.
            let (bytes, flops) = (3 * out.size_bytes(), out.size_bytes() / 2);
            self.cases.push(Case::new("gated_act".to_owned(), ffn_dim.to_string(), m, bytes, flops, vec![op]));
        }
        Ok(())
    }

    /// An op that takes one row a sequence, at every M up to what there are.
    fn sequences(
        &mut self,
        name: &str,
        case: impl Fn(&mut Self, u32) -> Result<Case, DeviceError>,
    ) -> Result<(), OpsError> {
        for m in self.rows(name, MAX_SEQUENCES) {
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

    /// A token each of `m` sequences.
    fn attention(&mut self, m: u32) -> Result<Case, DeviceError> {
        let shape = self.options.shape;
        let (num_kv_heads, head_dim, kv_type) = (shape.num_kv_heads, shape.head_dim, KvType::F16);
        let table_cols = shape.context.div_ceil(BLOCK_SIZE);
        let num_blocks = m * table_cols;
        let block_bytes = KvTensor::block_bytes(kv_type, BLOCK_SIZE, num_kv_heads, head_dim);
        let size_bytes = u64::from(num_blocks) * block_bytes;
        let (k, v) = (self.rig.backend.alloc("K", size_bytes)?, self.rig.backend.alloc("V", size_bytes)?);
        let cache = KvTensor { k, v, kv_type, num_blocks, block_size: BLOCK_SIZE, num_kv_heads, head_dim };
        let table = self.rig.words(table_cols, &(0..num_blocks).collect::<Vec<u32>>())?;
        let position = shape.context - 1;
        let decode = |row| QueryRows { first_row: row, num_rows: 1, slot: row, position };
        let rows: Vec<QueryRows> = (0..m).map(decode).collect();
        let num_partials = m * shape.context.div_ceil(ATTENTION_CUT);
        let Planned { items, num_single_rows, merges, partials } =
            Planned::new(&rows, 0, cache, shape.num_heads, num_partials, |words, cols| self.rig.words(cols, words))?;
        let cols = shape.num_heads * head_dim;
        let (q, out) = (part(self.x, m, cols), part(self.out, m, cols));
        let (num_heads, scale) = (shape.num_heads, 1.0 / (head_dim as f32).sqrt());
        let op = Op::Attention(Attention {
            q,
            cache,
            items,
            num_single_rows,
            merges,
            partials,
            table,
            num_heads,
            scale,
            soft_cap: 0.0,
            window: 0,
            out,
        });
        let seen = u64::from(m) * u64::from(shape.context);
        let bytes = seen * u64::from(num_kv_heads * head_dim) * 4 + 2 * q.size_bytes();
        let name = format!("{} x {head_dim}, {num_kv_heads} KV, {} seen", shape.num_heads, shape.context);
        Ok(Case::new("attention".to_owned(), name, m, bytes, 4 * seen * u64::from(cols), vec![op]))
    }

    /// Greedy rows.
    fn sample(&mut self, m: u32) -> Result<Case, DeviceError> {
        let vocab = self.options.shape.vocab_size;
        let greedy = (0..m).flat_map(|slot| SampleRow { slot, ..SampleRow::IDLE }.words());
        let rows = self.rig.words(SAMPLE_ROW_WORDS, &greedy.collect::<Vec<u32>>())?;
        let mut zeros = |cols: u32| self.rig.words(cols, &vec![0; (m * cols) as usize]);
        let (counts, sampled, slices) = (zeros(vocab)?, zeros(1)?, zeros(slice_cols(vocab))?);
        let (chosen, top, extras) = (zeros(CHOSEN_WORDS)?, zeros(2 * MAX_TOP)?, zeros(1)?);
        let logits = part(self.x, m, vocab);
        let op = Op::Sample(Sample { logits, rows, extras, counts, slices, sampled, chosen, top });
        let bytes = logits.size_bytes();
        Ok(Case::new("sample".to_owned(), vocab.to_string(), m, bytes, 0, vec![op]))
    }
}
