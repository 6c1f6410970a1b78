//! What is counted of one replica, and what that predicts in its device's own time. Invariant: the counts are sums over
//! placements, each from when it is made until it is given back.

use std::time::Duration;

use super::{Placement, Traits};
use crate::cost::{CostModel, Prices, StepShape};
use crate::op::ATTENTION_ROWS;

#[derive(Debug)]
pub(super) struct Replica {
    pub traits: Traits,
    /// Of a prompt: each token in a full step, and each token that another one sees.
    ns_per_prompt_token: f64,
    ns_per_seen_token: f64,
    /// Whether it takes requests.
    pub is_open: bool,
    /// Whether it has been at a step for longer than a full one takes, and how much longer than all should take that
    /// is to be computed before what comes next.
    pub is_late: bool,
    pub late_ns: u64,
    pub num_placed: u32,
    /// Sums over placements.
    pub prompt_tokens: u64,
    pub waiting_ns: u64,
    pub answer_tokens: u64,
    pub kv_tokens: u64,
}

/// What one request more would meet on a replica; computed when the replica changes, for it is asked by each request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outlook {
    /// Before anything is done for it; infinite where none is taken.
    lead_ns: f64,
    /// A step in which it decodes too, but for its own context.
    step_ns: f64,
    /// Of that, what the device is late.
    late_ns: f64,
    /// Of a step, for each token of its context.
    ns_per_context: f64,
    /// Steps until it has a slot.
    slot_steps: f64,
    /// A step without it, the rows of others in a step, and the answer of each of them.
    step_without_ns: f64,
    other_rows: f64,
    other_answer_tokens: f64,
    ns_per_prompt_token: f64,
    ns_per_seen_token: f64,
}

impl Replica {
    pub fn new(traits: Traits) -> Replica {
        let mut replica = Replica {
            traits,
            ns_per_prompt_token: 0.0,
            ns_per_seen_token: 0.0,
            is_open: true,
            is_late: false,
            late_ns: 0,
            num_placed: 0,
            prompt_tokens: 0,
            waiting_ns: 0,
            answer_tokens: 0,
            kv_tokens: 0,
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

    /// As it is now.
    pub fn outlook(&self) -> Outlook {
        let (num, slots) = (self.num_placed + 1, self.slots());
        let rows = num.min(slots);
        let Prices { ns_per_attended_token, ns_per_loaded_token, .. } = self.traits.cost.prices();
        let ns_per_context = f64::from(rows) * (ns_per_attended_token + ns_per_loaded_token) / f64::from(num);
        let flat_ns = self.traits.cost.predict_ns(&StepShape::decode(rows, 0)) as f64;
        let lead_ns = if self.is_open { (self.late_ns + self.waiting_ns) as f64 } else { f64::INFINITY };
        Outlook {
            lead_ns,
            late_ns: self.late_ns as f64,
            step_ns: flat_ns + ns_per_context * self.prompt_tokens as f64,
            ns_per_context,
            slot_steps: self.slot_steps(self.num_placed),
            step_without_ns: self.step_ns(),
            other_rows: f64::from(self.num_placed.min(slots)),
            other_answer_tokens: self.answer_tokens as f64 / f64::from(self.num_placed.max(1)),
            ns_per_prompt_token: self.ns_per_prompt_token,
            ns_per_seen_token: self.ns_per_seen_token,
        }
    }

    /// A step in which as many decode as can, of those that are placed.
    fn step_ns(&self) -> f64 {
        let num = self.num_placed.max(1);
        let context = self.prompt_tokens / u64::from(num);
        let rows = num.min(self.slots());
        self.traits.cost.predict_ns(&StepShape::decode(rows, context as u32)) as f64
    }

    /// As it would be without one that is counted and waits.
    pub fn without(&self, placement: &Placement) -> Outlook {
        let others = Replica {
            num_placed: self.num_placed - 1,
            prompt_tokens: self.prompt_tokens - u64::from(placement.prompt_tokens),
            waiting_ns: self.waiting_ns - placement.waiting_ns,
            answer_tokens: self.answer_tokens - u64::from(placement.answer_tokens),
            kv_tokens: self.kv_tokens - u64::from(placement.kv_tokens),
            ..*self
        };
        others.outlook()
    }

    /// How many run at once: as many as have memory where all are as those that are placed.
    fn slots(&self) -> u32 {
        let have_memory = u64::from(self.num_placed) * self.traits.kv_tokens / self.kv_tokens.max(1);
        match self.num_placed {
            0 => self.traits.max_num_seqs,
            _ => have_memory.clamp(1, u64::from(self.traits.max_num_seqs)) as u32,
        }
    }

    /// Steps until there is a slot for one more than `num_placed`: in a step as many answers end as run, over the
    /// length of one, however lengths are spread (Little's law).
    fn slot_steps(&self, num_placed: u32) -> f64 {
        let slots = self.slots();
        let excess = (num_placed + 1).saturating_sub(slots);
        let each = self.answer_tokens as f64 / f64::from(num_placed.max(1));
        f64::from(excess) / f64::from(slots) * each
    }

    /// Of the time that it has been at a step, what is beyond a full one and beyond the prompts that wait there, which
    /// count already and may be in it.
    pub fn late_ns(&self, stalled: Duration) -> u64 {
        (stalled.as_nanos() as u64).saturating_sub(self.waiting_ns.max(self.full_ns() as u64))
    }

    pub fn is_late_after(&self, stalled: Duration) -> bool {
        stalled.as_nanos() as f64 > self.full_ns()
    }

    /// A step of as many tokens as may be.
    fn full_ns(&self) -> f64 {
        self.ns_per_prompt_token * f64::from(self.traits.max_num_batched_tokens)
    }

    /// Until it is between two steps: at most a full one of prompts, or one in which all decode.
    pub fn turn_ns(&self) -> f64 {
        let decode_ns = if self.num_placed > 0 { self.step_ns() } else { 0.0 };
        decode_ns.max(self.full_ns().min(self.waiting_ns as f64))
    }

    /// One more answer of so many tokens, once those that wait have begun.
    pub fn answer_ns(&self, num_tokens: f64) -> f64 {
        (self.late_ns + self.waiting_ns) as f64 + num_tokens * self.step_ns()
    }

    /// Until the last that waits has begun.
    pub fn wait_ns(&self) -> f64 {
        let slot_ns = self.slot_steps(self.num_placed.saturating_sub(1)) * self.step_ns();
        (self.late_ns + self.waiting_ns) as f64 + slot_ns
    }
}

impl Outlook {
    /// What a prompt takes of which the cache has a part.
    pub fn prompt_ns(&self, prompt_tokens: u32, cached_tokens: u32) -> f64 {
        let [all, cached] = [prompt_tokens, cached_tokens].map(f64::from);
        (all - cached) * (self.ns_per_prompt_token + (all + cached) / 2.0 * self.ns_per_seen_token)
    }

    /// What it has cached of a prompt saves.
    pub fn saved_ns(&self, prompt_tokens: u32, cached_tokens: u32) -> f64 {
        self.prompt_ns(prompt_tokens, 0) - self.prompt_ns(prompt_tokens, cached_tokens)
    }

    /// A step in which it decodes too.
    fn step_with_ns(&self, prompt_tokens: u32) -> f64 {
        self.step_ns + self.ns_per_context * f64::from(prompt_tokens)
    }

    /// From now until one request more would have ended, the rest of whose prompt takes `prompt_ns`.
    pub fn finish_ns(&self, prompt_tokens: u32, prompt_ns: f64, answer_tokens: u32) -> f64 {
        self.lead_ns + self.slot_ns(prompt_tokens) + self.served_ns(prompt_tokens, prompt_ns, answer_tokens)
    }

    /// The same of one that has a slot, and waits for no prompt but its own.
    pub fn own_ns(&self, prompt_tokens: u32, prompt_ns: f64, answer_tokens: u32) -> f64 {
        self.late_ns + self.served_ns(prompt_tokens, prompt_ns, answer_tokens)
    }

    /// What it takes from others, summed: from those there, and where it waits for a slot or for a device that is late,
    /// so do those that come after it.
    pub fn delay_ns(&self, prompt_tokens: u32, prompt_ns: f64, answer_tokens: u32) -> f64 {
        let followers_ns = FOLLOWERS * (self.late_ns + self.slot_ns(prompt_tokens));
        self.takes_ns(prompt_tokens, prompt_ns, answer_tokens) + followers_ns
    }

    /// What it takes from those there: they wait for its prompt, and have longer steps while both go on.
    pub fn takes_ns(&self, prompt_tokens: u32, prompt_ns: f64, answer_tokens: u32) -> f64 {
        let num_steps = self.other_answer_tokens.min(f64::from(answer_tokens));
        let longer_ns = (self.step_with_ns(prompt_tokens) - self.step_without_ns).max(0.0);
        self.other_rows * (prompt_ns + num_steps * longer_ns)
    }

    fn slot_ns(&self, prompt_tokens: u32) -> f64 {
        self.slot_steps * self.step_with_ns(prompt_tokens)
    }

    fn served_ns(&self, prompt_tokens: u32, prompt_ns: f64, answer_tokens: u32) -> f64 {
        prompt_ns + f64::from(answer_tokens) * self.step_with_ns(prompt_tokens)
    }
}

/// How many times its own wait those have together that come after one that waits: r / (1 - r) where a device is busy
/// for r of its time, here nine tenths (what one more costs the others in an M/G/1 queue). Less ends a burst sooner
/// after which nothing comes, and keeps first tokens waiting under a steady load.
const FOLLOWERS: f64 = 9.0;
