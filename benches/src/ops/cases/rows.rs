//! Ops that go row by row: embedding, norms, activation, the choice of a token.

use fullbore_engine::backend::{DeviceError, WeightSpec};
use fullbore_engine::op::{
    Activation, AddNorm, CHOSEN_WORDS, Embed, GatedAct, MAX_TOP, Op, RmsNorm, SAMPLE_ROW_WORDS, Sample, SampleRow,
    slice_cols,
};

use super::{Case, Loader, add_norm_counts, part};
use crate::ops::OpsError;

impl Loader<'_, '_> {
    /// What is added, multiplied or divided counts as flops; roots and exponentials do not.
    pub(super) fn elements(&mut self) -> Result<(), OpsError> {
        let (dim, ffn_dim) = (self.options.shape.dim, self.options.shape.ffn_dim);
        let weight = self.rig.random(1, dim)?;
        for m in self.rows("rms_norm", u32::MAX) {
            let (x, out) = (part(self.x, m, dim), part(self.out, m, dim));
            let op = Op::RmsNorm(RmsNorm { x, weight, eps: 1e-5, out });
            let (bytes, flops) = (2 * x.size_bytes() + weight.size_bytes(), 4 * u64::from(x.num_elements()));
            self.push("rms_norm", dim.to_string(), m, bytes, flops, op);
        }
        let rows = self.rows("add_norm", u32::MAX);
        // In place: with a branch of zeros the stream stays what it is, however often it is run.
        let most = rows.iter().copied().max().unwrap_or(0);
        let (stream, branch) = (self.rig.zeros(most.max(1), dim)?, self.rig.zeros(most.max(1), dim)?);
        for m in rows {
            let (x, y, out) = (stream.first_rows(m), branch.first_rows(m), part(self.out, m, dim));
            let op = Op::AddNorm(AddNorm { x, y, post_weight: None, rows: None, weight, eps: 1e-5, out });
            let (bytes, flops) = add_norm_counts(m, dim);
            self.push("add_norm", dim.to_string(), m, bytes, flops, op);
        }
        for m in self.rows("gated_act", u32::MAX) {
            let (gate_up, out) = (part(self.x, m, 2 * ffn_dim), part(self.out, m, ffn_dim));
            let op = Op::GatedAct(GatedAct { gate_up, activation: Activation::Silu, out });
            let (bytes, flops) = (3 * out.size_bytes(), 2 * u64::from(out.num_elements()));
            self.push("gated_act", ffn_dim.to_string(), m, bytes, flops, op);
        }
        Ok(())
    }

    fn push(&mut self, name: &str, shape: String, m: u32, bytes: u64, flops: u64, op: Op) {
        self.cases.push(Case::new(name.to_owned(), shape, m, bytes, flops, vec![op]));
    }

    /// Tokens from all over the vocabulary.
    pub(super) fn embed(&mut self) -> Result<(), OpsError> {
        let (vocab, dim, format) = (self.options.shape.vocab_size, self.options.shape.dim, self.options.format);
        let rows = self.rows("embed", u32::MAX);
        let Some(&most) = rows.iter().max() else { return Ok(()) };
        let table = match self.embedding {
            Some(table) => table,
            None => {
                let spec = WeightSpec { name: "embed".to_owned(), rows: vocab, cols: dim, format };
                match self.rig.cold_weights(&spec, 1)? {
                    Ok(weights) => weights[0],
                    Err(reason) => {
                        self.skipped.push(format!("embed: {reason}"));
                        return Ok(());
                    }
                }
            }
        };
        let spread = |index: u32| (u64::from(index) * 7919 % u64::from(vocab)) as u32;
        let all_ids = self.rig.words(1, &(0..most).map(spread).collect::<Vec<u32>>())?;
        let sampled = self.rig.words(1, &[0])?;
        for m in rows {
            let (ids, out) = (all_ids.first_rows(m), part(self.out, m, dim));
            let op = Op::Embed(Embed { ids, sampled, table, scale: 1.0, out });
            let bytes = u64::from(m) * (format.row_bytes(dim) + 4) + out.size_bytes();
            self.push("embed", format!("{vocab} x {dim}"), m, bytes, u64::from(out.num_elements()), op);
        }
        Ok(())
    }

    /// Greedy rows.
    pub(super) fn sample(&mut self, m: u32) -> Result<Case, DeviceError> {
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
