//! What is counted of one replica, and what that predicts in its device's own time. Invariant: the counts are sums over
//! placements, each from when it is made until it is given back.

use super::{Placement, Traits};
use crate::cost::{CostModel, Prices, StepShape};
use crate::op::ATTENTION_ROWS;

#[derive(Debug)]
pub(super) struct Replica {
    pub traits: Traits,
    /// Of a prompt: each token in a full step, and each token that another one sees.
    pub ns_per_prompt_token: f64,
    ns_per_seen_token: f64,
    /// Whether it takes requests.
    pub is_open: bool,
    /// How much longer than it should it has been at a step.
    pub late_ns: u64,
    pub num_placed: u32,
    /// Sums over placements.
    pub prompt_tokens: u64,
    pub waiting_ns: u64,
    pub owed_tokens: u64,
}

impl Replica {
    pub fn new(traits: Traits) -> Replica {
        let mut replica = Replica {
            traits,
            ns_per_prompt_token: 0.0,
            ns_per_seen_token: 0.0,
            is_open: true,
            late_ns: 0,
            num_placed: 0,
            prompt_tokens: 0,
            waiting_ns: 0,
            owed_tokens: 0,
        };
        replica.set_cost(traits.cost);
        replica
    }

    pub fn set_cost(&mut self, cost: CostModel) {
        let full = StepShape { num_tokens: self.traits.max_num_batched_tokens.max(1), ..StepShape::default() };
        self.ns_per_prompt_token = cost.predict_ns(&full) as f64 / f64::from(full.num_tokens);
        let Prices { ns_per_attended_token, ns_per_loaded_token, .. } = cost.prices();
        self.ns_per_seen_token = ns_per_attended_token + ns_per_loaded_token / f64::from(ATTENTION_ROWS);
        self.traits.cost = cost;
    }

    /// What a prompt takes of which the cache has a part.
    pub fn prompt_ns(&self, prompt_tokens: u32, cached_tokens: u32) -> f64 {
        let [all, cached] = [prompt_tokens, cached_tokens].map(f64::from);
        (all - cached) * self.ns_per_prompt_token + (all * all - cached * cached) / 2.0 * self.ns_per_seen_token
    }

    /// What it has cached of a prompt saves.
    pub fn saved_ns(&self, prompt_tokens: u32, cached_tokens: u32) -> f64 {
        self.prompt_ns(prompt_tokens, 0) - self.prompt_ns(prompt_tokens, cached_tokens)
    }

    /// A step in which as many decode as can, of `num_placed`, with `prompt_tokens` between them.
    pub fn step_ns(&self, num_placed: u32, prompt_tokens: u64) -> f64 {
        let rows = num_placed.clamp(1, self.traits.max_num_seqs);
        let context = prompt_tokens / u64::from(num_placed.max(1));
        self.traits.cost.predict_ns(&StepShape::decode(rows, context as u32)) as f64
    }

    /// From now until a request that is not counted here would have ended, the rest of whose prompt takes `prompt_ns`.
    pub fn finish_ns(&self, prompt_tokens: u32, prompt_ns: f64, owed_tokens: u32) -> f64 {
        let step_ns = self.step_ns(self.num_placed + 1, self.prompt_tokens + u64::from(prompt_tokens));
        let prompts_ns = (self.late_ns + self.waiting_ns) as f64 + prompt_ns;
        let own_ns = f64::from(owed_tokens) * step_ns;
        prompts_ns + self.slot_ns(self.num_placed, self.owed_tokens, step_ns) + own_ns
    }

    /// The same of one that is counted and waits.
    pub fn finish_without_ns(&self, placement: &Placement, prompt_ns: f64) -> f64 {
        let others = Replica {
            num_placed: self.num_placed - 1,
            prompt_tokens: self.prompt_tokens - u64::from(placement.prompt_tokens),
            waiting_ns: self.waiting_ns - placement.waiting_ns,
            owed_tokens: self.owed_tokens - u64::from(placement.owed_tokens),
            ..*self
        };
        others.finish_ns(placement.prompt_tokens, prompt_ns, placement.owed_tokens)
    }

    /// Until there is a slot for one more than `num_placed`, which owe `owed_tokens` between them.
    fn slot_ns(&self, num_placed: u32, owed_tokens: u64, step_ns: f64) -> f64 {
        let slots = self.traits.max_num_seqs;
        let excess = (num_placed + 1).saturating_sub(slots);
        let each = owed_tokens as f64 / f64::from(num_placed.max(1));
        f64::from(excess) / f64::from(slots) * each * step_ns
    }

    /// Until it is between two steps: at most a full one of prompts, or one in which all decode.
    pub fn turn_ns(&self) -> f64 {
        let full_ns = self.ns_per_prompt_token * f64::from(self.traits.max_num_batched_tokens);
        let decode_ns = if self.num_placed > 0 { self.step_ns(self.num_placed, self.prompt_tokens) } else { 0.0 };
        decode_ns.max(full_ns.min(self.waiting_ns as f64))
    }

    /// Until the last that waits has begun.
    pub fn wait_ns(&self) -> f64 {
        let step_ns = self.step_ns(self.num_placed, self.prompt_tokens);
        let slot_ns = self.slot_ns(self.num_placed.saturating_sub(1), self.owed_tokens, step_ns);
        (self.late_ns + self.waiting_ns) as f64 + slot_ns
    }
}
