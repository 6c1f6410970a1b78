//! An engine's clock: what steps took, what that says of the device's prices, and where its time went.
//!
//! Invariant: the device runs its steps one after another, so none begins before the one before it has ended. All times
//! are the backend's.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::{Engine, Step, StepTime};
use crate::cost::{CostFit, CostModel};
use crate::limits::neighbours::Membership;
use crate::limits::verdict::{Setting, Verdict};
use crate::limits::{EndedStep, Phase, Snapshot};
use crate::tensor::KvType;

impl Engine {
    /// Starts from what a device was measured to take, instead of from nothing.
    pub fn set_cost(&mut self, cost: CostModel) {
        self.cost = CostFit::new(cost);
        self.take_cost();
    }

    /// What it takes to copy a block of the KV cache to the host or back; 0 where that is not done.
    pub fn copy_ns(&self) -> u64 {
        self.scheduler.copy_ns()
    }

    /// Tells this engine of others on its device, and them of it.
    pub fn set_neighbours(&mut self, membership: Membership) {
        self.neighbours = Some(Arc::new(membership));
    }

    pub fn neighbours(&self) -> Option<&Arc<Membership>> {
        self.neighbours.as_ref()
    }

    /// Charges an idle device's time up to now.
    pub fn settle_idle(&mut self) {
        if self.is_idle() {
            self.turn_to(Phase::NoWork);
            self.stats.limits = self.limits.snapshot();
        }
    }

    /// What a verdict on this engine's limits knows beside its times.
    pub fn setting(&self) -> Setting {
        let model = &self.model.config;
        let bytes = |kv_type| model.check_kv_type(kv_type).ok().map(|()| model.kv_bytes_per_token(kv_type));
        Setting { config: self.config, kv_bytes_per_token: KvType::ALL.map(bytes) }
    }

    /// What holds the device back.
    pub fn verdict(&self) -> Verdict {
        let others = self.neighbours.as_ref().map(|others| others.others()).unwrap_or_default();
        Verdict::new(&self.limits.snapshot(), &self.setting(), &others)
    }

    /// Where the device's time went since the start, as the window of a snapshot, and what held it back most.
    pub fn limits_since_start(&self) -> (Snapshot, Verdict) {
        let snapshot = self.limits.snapshot_since_start();
        let verdict = Verdict::new(&snapshot, &self.setting(), &[]);
        (snapshot, verdict)
    }

    /// Takes in when the device was at a recording of a step that is being completed: its last, or a part before that.
    pub(super) fn count_part(&mut self, step: &Step, submitted_at: Instant, ran: Range<Instant>, is_part: bool) {
        let begun = ran.start.max(self.device_free_at);
        let ended_at = ran.end.max(begun);
        self.device_free_at = ended_at;
        self.part_ns += (ended_at - begun).as_nanos() as u64;
        self.limits.ended(&EndedStep {
            shape: step.batch.shape(),
            facts: step.facts,
            submitted_ns: self.since_start(submitted_at),
            begun_ns: self.since_start(begun),
            ended_ns: self.since_start(ended_at),
            has_company: self.neighbours.as_ref().is_some_and(|others| others.had(step.company)),
            is_part,
        });
    }

    /// Takes in what a step has cost, of which all parts have been counted.
    pub(super) fn count(&mut self, step: &Step) {
        let shape = step.batch.shape();
        self.last_step = StepTime { shape, device_ns: std::mem::take(&mut self.part_ns) };
        let has_company = self.neighbours.as_ref().is_some_and(|others| others.ended(step.company));
        // What it takes in company is no price of the device; before any is known it is better than nothing.
        let counts = !has_company || !self.cost.model().is_known();
        if counts && self.cost.observe(&shape, self.last_step.device_ns) {
            self.take_cost();
        }
        self.stats.last_step_ms = self.last_step.device_ns as f64 / 1e6;
        self.stats.total_step_ms += self.stats.last_step_ms;
        self.stats.num_steps += 1;
        let num_prefill_tokens = step.trace.num_prefill_tokens();
        self.meter.stepped(num_prefill_tokens, self.last_step.device_ns, step.trace.is_full_of_prompts());
        self.stats.prefill_tokens += u64::from(num_prefill_tokens);
    }

    /// Nanoseconds on the device's clock.
    pub(super) fn since_start(&self, at: Instant) -> u64 {
        (at - self.started_at).as_nanos() as u64
    }

    /// The host is at `phase` from now on.
    pub(super) fn turn_to(&mut self, phase: Phase) {
        let phase = if self.is_device_lost { Phase::DeviceLost } else { phase };
        self.limits.turn_to(phase, self.since_start(self.backend.now()));
    }

    pub(super) fn turn_from_step(&mut self) {
        if self.is_idle() {
            self.meter.rest();
            self.turn_to(Phase::NoWork);
        } else {
            self.turn_to(Phase::Schedule);
        }
    }

    fn take_cost(&mut self) {
        self.scheduler.set_cost(*self.cost.model());
        self.limits.set_cost(*self.cost.model());
    }
}
