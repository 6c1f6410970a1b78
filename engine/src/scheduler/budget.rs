//! What is left of a step while it is planned: tokens, rows of the output layer, and time.
//!
//! Time binds only what would make sequences that decode wait: a step without decodes takes as many tokens as it may.
//! It is two-sided: however tight the target, the first prompt of a step advances by [`LEAST_CHUNK`] tokens. Invariant:
//! what is taken was fitted before; a decode always fits.

use super::{Held, Planned};
use crate::config::EngineConfig;
use crate::cost::{CostModel, StepShape};
use crate::sequence::Sequence;

/// Prompt tokens that a step computes even when decodes wait longer for it than they should.
pub const LEAST_CHUNK: u32 = 8;

pub(super) struct Budget<'a> {
    config: &'a EngineConfig,
    cost: &'a CostModel,
    tokens: u32,
    /// Rows of the output layer.
    rows: u32,
    /// Tokens of admitted sequences that the device is told, to count them.
    known_tokens: u32,
    /// What has been taken.
    shape: StepShape,
    /// What the step may take on the device; `None` while decodes are planned and where nothing binds it.
    limit_ns: Option<u64>,
    /// Prompts that those wait for which decode.
    num_prompts: u32,
    held: Held,
    /// What first gave a sequence fewer tokens than it had to compute.
    cut: Option<Held>,
}

impl<'a> Budget<'a> {
    pub fn new(config: &'a EngineConfig, cost: &'a CostModel) -> Budget<'a> {
        Budget {
            config,
            cost,
            tokens: config.max_num_batched_tokens,
            rows: config.max_logit_rows,
            known_tokens: config.max_model_len,
            shape: StepShape::default(),
            limit_ns: None,
            num_prompts: 0,
            held: Held::Budget,
            cut: None,
        }
    }

    /// From here on, what joins the step makes those wait that decode in it.
    pub fn decodes_are_planned(&mut self) {
        self.limit_ns = self.config.latency.limit_ns(self.cost, &self.shape);
    }

    /// Tokens of `sequence` that fit.
    pub fn fit(&mut self, sequence: &Sequence) -> u32 {
        let num_tokens = self.fit_in_limits(sequence);
        if num_tokens < sequence.num_uncomputed_tokens(self.config.max_model_len) {
            self.cut.get_or_insert(self.held);
        }
        num_tokens
    }

    fn fit_in_limits(&mut self, sequence: &Sequence) -> u32 {
        self.held = Held::Budget;
        if num_told_tokens(sequence) > self.known_tokens {
            return 0;
        }
        let num_tokens = sequence.num_uncomputed_tokens(self.config.max_model_len).min(self.tokens);
        let num_tokens = match sequence.wants_all_rows(sequence.num_computed_tokens) {
            true => num_tokens.min(self.rows),
            false if self.rows == 0 => 0,
            false => num_tokens,
        };
        let Some(limit_ns) = self.limit_ns.filter(|_| num_tokens > 0) else { return num_tokens };
        let in_time = self.cost.max_prefill_tokens(&self.shape, sequence.num_computed_tokens, limit_ns);
        let in_time = if self.num_prompts > 0 { in_time } else { in_time.max(LEAST_CHUNK) };
        if in_time < num_tokens {
            self.held = Held::Latency;
        }
        num_tokens.min(in_time)
    }

    /// Why no more of what was fitted last fits.
    pub fn held(&self) -> Held {
        self.held
    }

    /// What the step would have had more tokens without.
    pub fn cut(&self) -> Option<Held> {
        self.cut
    }

    /// Whether what is taken counts as a prompt that those wait for which decode.
    pub fn take(&mut self, sequence: &Sequence, num_tokens: u32) -> bool {
        let rows = self.rows_of(sequence, num_tokens);
        self.tokens -= num_tokens;
        self.rows -= rows;
        self.known_tokens -= num_told_tokens(sequence);
        self.shape = self.shape.with_slice(sequence.num_computed_tokens, num_tokens, rows);
        let is_prompt = self.limit_ns.is_some();
        self.num_prompts += u32::from(is_prompt);
        is_prompt
    }

    pub fn give_back(&mut self, sequence: &Sequence, Planned { num_tokens, is_prompt, .. }: Planned) {
        let rows = self.rows_of(sequence, num_tokens);
        self.tokens += num_tokens;
        self.rows += rows;
        self.known_tokens += num_told_tokens(sequence);
        self.shape = self.shape.without_slice(sequence.num_computed_tokens, num_tokens, rows);
        self.num_prompts -= u32::from(is_prompt);
    }

    /// Rows of the output layer that the next `num_tokens` of `sequence` take.
    fn rows_of(&self, sequence: &Sequence, num_tokens: u32) -> u32 {
        match sequence.wants_all_rows(sequence.num_computed_tokens) {
            true => num_tokens,
            false => u32::from(num_tokens == sequence.num_uncomputed_tokens(self.config.max_model_len)),
        }
    }
}

/// Tokens that the device is told when the sequence gets a slot.
fn num_told_tokens(sequence: &Sequence) -> u32 {
    if sequence.num_uploaded_blocks == 0 && sequence.is_counted() { sequence.num_tokens() } else { 0 }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::arrival::Arrival;
    use crate::batch::{SequenceId, SlotId};
    use crate::config::LatencyTarget;
    use crate::cost::Prices;
    use crate::memory::BlockChain;
    use crate::request::{Request, TokenId};

    fn sequence(num_tokens: usize) -> Sequence {
        let request = Request { prompt: vec![TokenId(0); num_tokens], max_tokens: 4, ..Request::default() };
        Sequence::new(SequenceId(0), Arrival::new(Arc::new(request), BlockChain::default(), None))
    }

    /// Whatever was planned and given back: with the same sequences in it, a step has room for the same.
    #[test]
    fn what_is_given_back_leaves_nothing() {
        let cost = CostModel::line(10e6, 1e6, Prices::default());
        for target_ms in [10, 11, 12, 30] {
            let config = EngineConfig { latency: LatencyTarget::Milliseconds(target_ms), ..EngineConfig::default() };
            let mut budget = Budget::new(&config, &cost);
            let (decode, prompt, other) = (sequence(1), sequence(3), sequence(100));
            budget.take(&decode, 1);
            budget.decodes_are_planned();
            let before = budget.fit(&other);
            assert!(before >= LEAST_CHUNK, "the first prompt advances");
            let num_tokens = budget.fit(&prompt);
            let is_prompt = budget.take(&prompt, num_tokens);
            assert!(is_prompt && budget.fit(&other) < before);
            budget.give_back(&prompt, Planned { slot: SlotId(0), num_tokens, is_prompt });
            assert_eq!(budget.fit(&other), before, "{target_ms} ms");
        }
    }
}
