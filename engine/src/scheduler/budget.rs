//! What is left of a step while it is planned. Invariant: what is taken was fitted before; a decode always fits.

use super::Held;
use crate::config::EngineConfig;
use crate::sequence::Sequence;

pub(super) struct Budget {
    max_model_len: u32,
    tokens: u32,
    /// Rows of the output layer.
    rows: u32,
}

impl Budget {
    pub fn new(config: &EngineConfig) -> Budget {
        Budget {
            max_model_len: config.max_model_len,
            tokens: config.max_num_batched_tokens,
            rows: config.max_logit_rows,
        }
    }

    /// Tokens of `sequence` that fit.
    pub fn fit(&self, sequence: &Sequence) -> u32 {
        let num_tokens = sequence.num_uncomputed_tokens(self.max_model_len).min(self.tokens);
        match sequence.wants_prompt_logprobs(sequence.num_computed_tokens) {
            true => num_tokens.min(self.rows),
            false if self.rows == 0 => 0,
            false => num_tokens,
        }
    }

    /// Why nothing fits.
    pub fn held(&self) -> Held {
        Held::Budget
    }

    pub fn take(&mut self, sequence: &Sequence, num_tokens: u32) {
        self.tokens -= num_tokens;
        self.rows -= self.rows_of(sequence, num_tokens);
    }

    pub fn give_back(&mut self, sequence: &Sequence, num_tokens: u32) {
        self.tokens += num_tokens;
        self.rows += self.rows_of(sequence, num_tokens);
    }

    /// Rows of the output layer that the next `num_tokens` of `sequence` take.
    fn rows_of(&self, sequence: &Sequence, num_tokens: u32) -> u32 {
        match sequence.wants_prompt_logprobs(sequence.num_computed_tokens) {
            true => num_tokens,
            false => u32::from(num_tokens == sequence.num_uncomputed_tokens(self.max_model_len)),
        }
    }
}
