//! An engine's clock: what steps took, what that says of the device's prices, and where its time went.
//!
//! Invariant: the device runs its steps one after another, so none begins before the one before it has ended. All times
//! are the backend's.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::{Engine, Step, StepTime, Submitted};
use crate::backend::DeviceError;
use crate::cost::{CostFit, CostModel};
use crate::limits::neighbours::Membership;
use crate::limits::verdict::{Setting, Verdict};
use crate::limits::{EndedStep, Phase, Snapshot};
use crate::scheduler::Held;
use crate::tensor::KvType;

/// What steps have taken since the start, as far as their parts are known apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepParts {
    /// On the device: passes in which only prompts were computed, only answers went on, or both. What of a pass with
    /// both is whose nobody knows. Choices of tokens are in it, where they are not apart.
    pub prefill: Part,
    pub decode: Part,
    pub mixed: Part,
    /// On the device: choices that were submitted by themselves, because they waited for masks.
    pub sampling: Part,
    /// From the end of a pass or a choice on the device to when the host has what it brought.
    pub read_back: Part,
}

/// How many tokens steps had, those of prompts and of answers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTokens {
    pub sum: u64,
    /// Steps that had at most 1, 2, 4, ... tokens, and more than those before; the last has all that had more.
    pub num_steps: [u64; StepTokens::NUM_BUCKETS],
}

impl StepTokens {
    pub const NUM_BUCKETS: usize = 16;

    fn add(&mut self, num_tokens: u32) {
        let bucket = num_tokens.max(1).next_power_of_two().trailing_zeros() as usize;
        self.num_steps[bucket.min(Self::NUM_BUCKETS - 1)] += 1;
        self.sum += u64::from(num_tokens);
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    pub num: u64,
    pub ns: u64,
    /// Those that took at most 1, 2, 4, ... times [`Part::LEAST_NS`], and longer than those before; the last has all
    /// that took longer.
    pub num_by_time: [u64; Part::NUM_BUCKETS],
}

impl Part {
    pub const NUM_BUCKETS: usize = 20;
    /// 1/64 ms; the bounds double from there to 4.1 s.
    pub const LEAST_NS: u64 = 15_625;

    fn add(&mut self, ns: u64) {
        self.num += 1;
        self.ns += ns;
        let bucket = ns.div_ceil(Self::LEAST_NS).max(1).next_power_of_two().trailing_zeros() as usize;
        self.num_by_time[bucket.min(Self::NUM_BUCKETS - 1)] += 1;
    }
}

impl Engine {
    /// Waits for the parts of a step, and takes their results.
    pub(super) fn read_back(
        &mut self,
        step: &Step,
        forward: Option<Submitted>,
        choices: Option<Submitted>,
    ) -> Result<(), DeviceError> {
        let is_apart = forward.is_some();
        for (submitted, is_part) in [(forward, true), (choices, false)] {
            let Some(Submitted { ticket, at }) = submitted else { continue };
            let ran = self.backend.wait(ticket, &mut self.downloads)?;
            let read_back = self.backend.now().saturating_duration_since(ran.end);
            let device_ns = self.count_part(step, at, ran, is_part);
            let num_prefill_tokens = step.trace.num_prefill_tokens();
            let parts = &mut self.stats.step_parts;
            let pass = match step.batch.shape().num_tokens.saturating_sub(num_prefill_tokens) {
                _ if is_apart && !is_part => &mut parts.sampling,
                _ if num_prefill_tokens == 0 => &mut parts.decode,
                0 => &mut parts.prefill,
                _ => &mut parts.mixed,
            };
            pass.add(device_ns);
            parts.read_back.add(read_back.as_nanos() as u64);
        }
        Ok(())
    }

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

    /// Where the device's time went since the start, as the window of a snapshot.
    pub fn limits_since_start(&self) -> Snapshot {
        self.limits.snapshot_since_start()
    }

    /// The same since another such snapshot, and what held it back most from then on.
    pub fn limits_since(&self, before: &Snapshot) -> (Snapshot, Verdict) {
        let snapshot = self.limits_since_start().since(before);
        let verdict = Verdict::new(&snapshot, &self.setting(), &[]);
        (snapshot, verdict)
    }

    /// Takes in when the device was at a recording of a step that is being completed: its last, or a part before that.
    /// Gives what that took.
    fn count_part(&mut self, step: &Step, submitted_at: Instant, ran: Range<Instant>, is_part: bool) -> u64 {
        let begun = ran.start.max(self.device_free_at);
        let ended_at = ran.end.max(begun);
        self.device_free_at = ended_at;
        let device_ns = (ended_at - begun).as_nanos() as u64;
        self.part_ns += device_ns;
        self.limits.ended(&EndedStep {
            shape: step.batch.shape(),
            facts: step.facts,
            submitted_ns: self.since_start(submitted_at),
            begun_ns: self.since_start(begun),
            ended_ns: self.since_start(ended_at),
            has_company: self.neighbours.as_ref().is_some_and(|others| others.had(step.company)),
            is_part,
        });
        device_ns
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
        self.stats.step_tokens.add(shape.num_tokens);
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
        } else if self.is_held_elsewhere() {
            self.turn_to(Phase::TenantCap);
        } else if self.is_at_nothing() && self.planned.trace.held == Held::SharedPrefix {
            self.turn_to(Phase::SharedPrefix);
        } else {
            self.turn_to(Phase::Schedule);
        }
    }

    /// Whether all that waits is of tenants that run as many as they may, on other engines.
    pub fn is_held_elsewhere(&self) -> bool {
        self.is_at_nothing() && self.planned.trace.held == Held::TenantCap
    }

    fn is_at_nothing(&self) -> bool {
        self.in_flight.is_empty() && self.scheduler.num_running() == 0
    }

    fn take_cost(&mut self) {
        self.scheduler.set_cost(*self.cost.model());
        self.limits.set_cost(*self.cost.model());
    }
}
