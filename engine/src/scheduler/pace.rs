//! How fast prompts advance beside what runs now: the numbers of a forecast, from the prices and limits by which steps
//! are planned. It plans nothing.

use super::Scheduler;
use super::budget::LEAST_CHUNK;
use crate::cost::StepShape;
use crate::forecast::Pace;

/// What running sequences have before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// One step of those that decode.
    pub decodes: StepShape,
    /// Tokens of the others, and of those that were sent back to wait, still to be computed.
    pub num_tokens: u64,
}

impl Scheduler {
    pub fn begun(&self) -> Begun {
        let mut begun = Begun { num_tokens: self.queue.preempted_tokens(), ..Begun::default() };
        for sequence in self.running() {
            match sequence.num_uncomputed_tokens(self.config.max_model_len) {
                // With nothing left to compute it waits for what a step in flight samples.
                0 | 1 => begun.decodes = begun.decodes.with_slice(sequence.num_computed_tokens, 1, 1),
                num_tokens => begun.num_tokens += u64::from(num_tokens),
            }
        }
        begun
    }

    /// The pace of prompts in steps that begin with `decodes`. `step_ns` is what a step takes where prices are unknown.
    pub fn pace(&self, decodes: &StepShape, step_ns: u64) -> Pace {
        let most = self.config.max_num_batched_tokens.saturating_sub(decodes.num_tokens).max(1);
        if !self.cost.is_known() {
            return Pace { base_ns: step_ns, full_ns: step_ns, tokens_per_step: most };
        }
        let in_time = match self.config.latency.limit_ns(&self.cost, decodes) {
            None => most,
            Some(limit_ns) => self.cost.max_prefill_tokens(decodes, 0, limit_ns).max(LEAST_CHUNK),
        };
        let tokens_per_step = most.min(in_time);
        let ns = |num_tokens, num_logit_rows| self.cost.predict_ns(&decodes.with_slice(0, num_tokens, num_logit_rows));
        Pace { base_ns: ns(1, 1), full_ns: ns(tokens_per_step, 1).max(1), tokens_per_step }
    }
}
