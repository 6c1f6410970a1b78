//! The simulator's choice of a token: a hash of the row's hash and of everything that its sampler has.
//!
//! A greedy row that nothing adjusts gives the model's own choice, a function of the row alone. Else each parameter,
//! bias and mask word is mixed in, and with penalties the whole row of counts: what a slot's last owner left there, or
//! a token that was not counted, changes the id. The id always lies within the mask.

use super::{POISON, SimBackend, mix};
use crate::backend::cpu::sample::{Outcome, log_probabilities};
use crate::backend::sim::Fidelity;
use crate::op::{CHOSEN_WORDS, IN_PROMPT, MAX_TOP, NON_FINITE, NONE, ResetCounts, SAMPLE_ROW_WORDS, Sample, SampleRow};

impl SimBackend {
    pub(super) fn reset_counts(&mut self, op: ResetCounts) {
        for i in 0..op.resets.rows as usize {
            let reset = &self.words(op.resets)[4 * i..4 * i + 4];
            let [slot, begin, generated, end] = [reset[0], reset[1], reset[2], reset[3]];
            let row = |token: u32| (slot * op.counts.cols + token) as usize;
            self.words_mut(op.counts)[row(0)..row(op.counts.cols)].fill(0);
            for at in begin..end {
                let token = self.words(op.tokens)[at as usize];
                let word = &mut self.words_mut(op.counts)[row(token)];
                if at < generated {
                    *word |= IN_PROMPT;
                } else {
                    *word += 1;
                }
            }
        }
    }

    pub(super) fn sample(&mut self, op: Sample) {
        for i in 0..op.logits.rows {
            let words = &self.words(op.rows)[(i * SAMPLE_ROW_WORDS) as usize..][..SAMPLE_ROW_WORDS as usize];
            let row: SampleRow = bytemuck::pod_read_unaligned(bytemuck::cast_slice(words));
            if row.is_idle() {
                continue;
            }
            let hash = self.row(op.logits, i);
            let id = match row.target {
                _ if hash == POISON => NON_FINITE,
                NONE => self.choose(&op, &row, hash),
                target => target,
            };
            self.note(&op, i, &row, hash, id);
        }
    }

    /// Writes down what was chosen for a row.
    fn note(&mut self, op: &Sample, i: u32, row: &SampleRow, hash: u64, id: u32) {
        if row.slot != NONE {
            self.words_mut(op.sampled)[row.slot as usize] = id;
        }
        if row.is_penalised() && id != NON_FINITE {
            self.words_mut(op.counts)[(row.slot * op.counts.cols + id) as usize] += 1;
        }
        let asked = row.logprobs > 0 && id != NON_FINITE;
        let vocab = op.logits.cols;
        let outcome = if asked {
            log_probabilities(&logits(hash, vocab), id, row.num_top(vocab))
        } else {
            Outcome { id, logprob: 0.0, rank: 0, top: Vec::new() }
        };
        let chosen = &mut self.words_mut(op.chosen)[(i * CHOSEN_WORDS) as usize..][..CHOSEN_WORDS as usize];
        chosen.copy_from_slice(&[id, outcome.logprob.to_bits(), outcome.rank, 0]);
        let top = &mut self.words_mut(op.top)[(i * 2 * MAX_TOP) as usize..];
        for (words, (id, logprob)) in top.chunks_exact_mut(2).zip(outcome.top) {
            words.copy_from_slice(&[id, logprob.to_bits()]);
        }
    }

    fn choose(&self, op: &Sample, row: &SampleRow, hash: u64) -> u32 {
        let vocab = op.logits.cols;
        let mut state = hash;
        let mut add = |word: u32| state = mix(state, u64::from(word));
        // With one token kept there is nothing to draw.
        if row.temperature > 0.0 && row.top_k != 1 {
            [row.seed[0], row.seed[1], row.position, row.top_k].into_iter().for_each(&mut add);
            [row.temperature, row.top_p, row.min_p].into_iter().for_each(|value| add(value.to_bits()));
        }
        let extras = self.words(op.extras);
        extras[row.bias_at as usize..][..2 * row.num_biases as usize].iter().copied().for_each(&mut add);
        if row.is_penalised() {
            [row.presence, row.frequency, row.repetition].into_iter().for_each(|value| add(value.to_bits()));
            if self.options.fidelity == Fidelity::Exact {
                let counts = &self.words(op.counts)[(row.slot * vocab) as usize..][..vocab as usize];
                counts.iter().copied().for_each(&mut add);
            }
        }
        if row.mask_at == NONE {
            return best(state, vocab);
        }
        let mask = &extras[row.mask_at as usize..][..vocab.div_ceil(32) as usize];
        mask.iter().copied().for_each(&mut add);
        let allowed = || (0..vocab).filter(|id| mask[(id / 32) as usize] >> (id % 32) & 1 == 1);
        match allowed().count() {
            0 => NON_FINITE,
            count => allowed().nth(best(state, count as u32) as usize).expect("fewer than were counted"),
        }
    }
}

/// Which of `count` tokens a hash is.
fn best(hash: u64, count: u32) -> u32 {
    (mix(hash, 5) % u64::from(count)) as u32
}

/// The row of logits that a hash stands for.
fn logits(hash: u64, vocab: u32) -> Vec<f32> {
    // In [0, 4).
    let noise = |id| (mix(hash, u64::from(id)) >> 40) as f32 / (1u64 << 22) as f32;
    let mut logits: Vec<f32> = (0..vocab).map(noise).collect();
    logits[best(hash, vocab) as usize] = 8.0;
    logits
}
