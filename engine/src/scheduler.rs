//! Which tokens of which sequences run in the next step.
//!
//! There is no prefill phase and no decode phase: each step hands out tokens, within a budget, so that every sequence's
//! `num_computed_tokens` catches up with its `num_tokens` (vLLM v1). Running sequences come first, those with one token
//! to compute before the others; then waiting ones, as the [`Queue`] orders them. Between tenants, prompts are computed
//! by what each has got, whether they run or wait. Out of blocks, a running sequence is
//! preempted: its blocks are freed and it goes back to the queue, to be recomputed from what the prefix cache kept.
//!
//! A step may be planned while earlier ones run: a token that they sample counts before its id is known, and its id is
//! then read on the device. What a step computed for a sequence that ended meanwhile is dropped.
//!
//! Invariants: the same state, prices of the device included, gives the same batch (no clock, no chance); of one tenant
//! and priority the oldest running sequence is never preempted for another, so there is always progress; nothing is
//! admitted in a step in which somebody was preempted, except for tenants below their share, nor before all tokens that
//! are known would fit, so a victim waits until another sequence has freed memory. Work in a step is O(rows): nothing
//! is done for a token that was computed before, and no memory is taken.

use std::sync::Arc;

use crate::batch::{Batch, BlockCopy, InputToken, Logits, SequenceId, Slice, SlotId};
use crate::config::EngineConfig;
use crate::cost::CostModel;
use crate::memory::swap::HostBlocks;
use crate::memory::{BlockHash, BlockTable, KvCache};
use crate::queue::{Ledger, Queue};
use crate::request::{FinishReason, Pooling, TokenId, Usage};
use crate::sequence::Sequence;

mod admission;
mod budget;
mod loss;
mod pace;
mod preemption;
mod swap;
pub mod trace;

use budget::Budget;
pub use pace::Begun;
pub use trace::{Held, StepTrace};

#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    queue: Queue,
    /// By slot.
    slots: Vec<Option<Sequence>>,
    /// Slots of running sequences, in order of admission.
    order: Vec<SlotId>,
    free_slots: Vec<SlotId>,
    /// This step's plan.
    plan: Vec<Planned>,
    /// Refilled in each step.
    candidates: Vec<SlotId>,
    blocked: Option<Blocked>,
    host: HostBlocks,
    /// Planned, and not yet part of a batch.
    copies: Vec<BlockCopy>,
    /// What the device takes to copy a block to the host or back.
    copy_ns: u64,
    /// Of the device, as far as it is known.
    cost: CostModel,
    /// Of the grammars of sequences that have begun.
    grammar_bytes: u64,
    num_steps: u64,
    num_preemptions: u64,
    num_swaps: u64,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    slot: SlotId,
    num_tokens: u32,
    /// Whether others that decode in the step wait for it.
    is_prompt: bool,
}

/// The waiting sequence that memory was too short for; while no block is freed and nobody computes what it begins with
/// there is no need to look again.
#[derive(Debug)]
struct Blocked {
    sequence: SequenceId,
    /// Of the cache.
    version: u64,
    num_missing: u32,
    /// Of its blocks, the first that was not findable and could be.
    next: Option<BlockHash>,
}

/// What a step chose for a slice that samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The slice ended before the sequence's last token, or none was asked for.
    None,
    Token(TokenId),
    /// The same, and its grammar lets nothing follow.
    Last(TokenId),
    /// This sequence alone failed: what was computed for it is not to be trusted.
    Failed(FinishReason),
}

/// What a step did to one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub sequence: SequenceId,
    pub token: Option<TokenId>,
    pub finished: Option<(FinishReason, Usage)>,
}

impl Scheduler {
    pub fn new(config: EngineConfig) -> Scheduler {
        let max_num_seqs = config.max_num_seqs as usize;
        Scheduler {
            config,
            queue: Queue::default(),
            slots: (0..max_num_seqs).map(|_| None).collect(),
            order: Vec::with_capacity(max_num_seqs),
            free_slots: (0..config.max_num_seqs).rev().map(SlotId).collect(),
            plan: Vec::with_capacity(max_num_seqs),
            candidates: Vec::with_capacity(max_num_seqs),
            blocked: None,
            host: HostBlocks::new(0),
            copies: Vec::new(),
            copy_ns: 0,
            cost: CostModel::UNKNOWN,
            grammar_bytes: 0,
            num_steps: 0,
            num_preemptions: 0,
            num_swaps: 0,
        }
    }

    /// Has `ledger`, which other engines have too, keep what tenants have got.
    pub fn share_ledger(&mut self, ledger: Arc<Ledger>) {
        self.queue.share_ledger(ledger);
    }

    /// Queues a sequence. That it fits in `max_model_len` and in the pool is the caller's to have checked.
    pub fn add(&mut self, sequence: Sequence) {
        self.queue.push(sequence);
    }

    /// What steps take from now on.
    pub fn set_cost(&mut self, cost: CostModel) {
        self.cost = cost;
    }

    /// What the grammars of sequences that have begun take now.
    pub fn set_grammar_bytes(&mut self, grammar_bytes: u64) {
        self.grammar_bytes = grammar_bytes;
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// In order of admission.
    pub fn running(&self) -> impl Iterator<Item = &Sequence> {
        self.order.iter().map(|&slot| self.sequence(slot))
    }

    pub fn num_running(&self) -> u32 {
        self.order.len() as u32
    }

    /// Slots of the blocks that running sequences hold for tokens that were not computed yet.
    pub fn unused_kv_slots(&self) -> u64 {
        let held = |sequence: &Sequence| u64::from(sequence.table.num_blocks()) * u64::from(self.config.block_size);
        self.running().map(|sequence| held(sequence) - u64::from(sequence.num_computed_tokens)).sum()
    }

    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.order.is_empty()
    }

    pub fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// Plans a step into `batch`, as what comes after all steps planned before; an empty batch means that nothing can
    /// run now.
    pub fn schedule(&mut self, cache: &mut KvCache, batch: &mut Batch, trace: &mut StepTrace) {
        self.num_steps += 1;
        self.plan.clear();
        trace.begin(self.num_steps);
        let (config, cost) = (self.config, self.cost);
        let mut budget = Budget::new(&config, &cost);
        self.continue_decodes(cache, &mut budget, trace);
        self.admit_less_served(cache, &mut budget, trace);
        self.continue_prefills(cache, &mut budget, trace);
        self.admit(None, cache, &mut budget, trace);
        if self.plan.is_empty() {
            // Whoever took the whole budget gave way, and in vain.
            self.continue_decodes(cache, &mut budget, trace);
            self.continue_prefills(cache, &mut budget, trace);
        }
        if trace.held == Held::NoRequests {
            trace.held = budget.cut().unwrap_or_default();
        }
        self.fill(cache, batch, trace);
        trace.blocks = cache.counts();
    }

    /// Takes in what a step computed: `choices` has one entry a slice.
    pub fn complete(
        &mut self,
        cache: &mut KvCache,
        batch: &Batch,
        choices: &[Choice],
        trace: &mut StepTrace,
        outcomes: &mut Vec<Outcome>,
    ) {
        assert_eq!(batch.slices.len(), choices.len());
        for (slice, choice) in batch.slices.iter().zip(choices) {
            if let Some(outcome) = self.take_choice(cache, slice, choice) {
                if let Some((reason, _)) = &outcome.finished {
                    trace.finished.push((outcome.sequence, reason.clone()));
                }
                outcomes.push(outcome);
            }
        }
        trace.blocks = cache.counts();
    }

    /// Ends a sequence in any phase; its blocks are free at once, because what still runs on the device writes them
    /// before whoever gets them next does. Returns what it used, if it was there.
    pub fn abort(&mut self, cache: &mut KvCache, id: SequenceId) -> Option<Usage> {
        let running = self.slot_of(id);
        let usage = match running {
            Some(slot) => self.sequence(slot).usage(),
            None => self.queue.get_mut(id)?.usage(),
        };
        self.end(cache, id, running, true);
        Some(usage)
    }

    /// Asserts the scheduler's invariants and those of `cache`, of which others hold `tables`.
    pub fn check<'a>(&'a self, cache: &KvCache, tables: impl Iterator<Item = &'a BlockTable>) {
        cache.check(self.running().map(|sequence| &sequence.table).chain(tables));
        self.queue.check(self.running().map(|sequence| sequence.tenant));
        self.host.check(self.queue.iter().filter_map(|sequence| sequence.swapped.as_ref()));
        assert_eq!(self.order.len() + self.free_slots.len(), self.config.max_num_seqs as usize);
        for &slot in &self.order {
            let sequence = self.sequence(slot);
            assert!(sequence.num_computed_tokens <= sequence.num_tokens());
            assert!(cache.blocks_for(sequence.num_computed_tokens) <= sequence.table.num_blocks());
            assert!(
                sequence.num_pending < self.config.pipeline_depth + 1,
                "{} tokens are pending",
                sequence.num_pending
            );
            assert_eq!((sequence.slot, &sequence.swapped), (Some(slot), &None));
            assert!(!self.free_slots.contains(&slot), "slot {} is free and in use", slot.0);
        }
        for sequence in self.queue.iter() {
            assert!(sequence.slot.is_none() && sequence.table.num_blocks() == 0, "a waiting sequence holds memory");
        }
    }

    fn sequence(&self, slot: SlotId) -> &Sequence {
        self.slots[slot.0 as usize].as_ref().expect("a slot in `order` holds a sequence")
    }

    /// Where a sequence runs. O(running sequences).
    fn slot_of(&self, id: SequenceId) -> Option<SlotId> {
        self.order.iter().copied().find(|&slot| self.sequence(slot).id == id)
    }

    /// The sequence that a slice was planned for, if it still runs there.
    fn running_in(&mut self, slot: SlotId, id: SequenceId) -> Option<&mut Sequence> {
        self.slots[slot.0 as usize].as_mut().filter(|sequence| sequence.id == id)
    }

    /// Plans the next tokens of what runs and has one token to compute.
    fn continue_decodes(&mut self, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        self.find_candidates(|num_tokens| num_tokens == 1);
        self.continue_candidates(cache, budget, trace);
        budget.decodes_are_planned();
    }

    /// Plans the next tokens of what runs and has more, by what its tenants have got.
    fn continue_prefills(&mut self, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        self.find_candidates(|num_tokens| num_tokens > 1);
        if self.queue.num_tenants() > 1 {
            let mut candidates = std::mem::take(&mut self.candidates);
            let order = |slot: &SlotId| {
                let sequence = self.sequence(*slot);
                (self.queue.counter(sequence.tenant), sequence.id)
            };
            candidates.sort_unstable_by_key(order);
            self.candidates = candidates;
        }
        self.continue_candidates(cache, budget, trace);
    }

    /// Who waits, of tenants that have got no more than any whose prompts are being computed, comes before those.
    fn admit_less_served(&mut self, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        if self.queue.num_tenants() < 2 || self.queue.is_empty() {
            return;
        }
        self.find_candidates(|num_tokens| num_tokens > 1);
        let tenants = self.candidates.iter().map(|&slot| self.sequence(slot).tenant);
        if let Some(least) = tenants.min_by_key(|&tenant| self.queue.counter(tenant)) {
            self.admit(Some(least), cache, budget, trace);
        }
    }

    /// Running sequences with so many tokens to compute, in order of admission; those admitted in this step are in the
    /// plan.
    fn find_candidates(&mut self, wanted: impl Fn(u32) -> bool) {
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        let max_model_len = self.config.max_model_len;
        candidates.extend(self.order.iter().copied().filter(|&slot| {
            let sequence = self.sequence(slot);
            sequence.admitted_in_step != self.num_steps && wanted(sequence.num_uncomputed_tokens(max_model_len))
        }));
        self.candidates = candidates;
    }

    fn continue_candidates(&mut self, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        for index in 0..self.candidates.len() {
            self.continue_one(self.candidates[index], cache, budget, trace);
        }
    }

    /// Plans the next tokens of a running sequence, preempting others until they fit.
    fn continue_one(&mut self, slot: SlotId, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        // It may have been preempted for one that came before it.
        while let Some(sequence) = &mut self.slots[slot.0 as usize] {
            let num_tokens = budget.fit(sequence);
            if num_tokens == 0 {
                return;
            }
            if cache.grow(&mut sequence.table, sequence.num_computed_tokens + num_tokens).is_ok() {
                let is_prompt = budget.take(sequence, num_tokens);
                self.plan.push(Planned { slot, num_tokens, is_prompt });
                return;
            }
            let victim = self.memory_victim();
            self.preempt(victim, cache, budget, trace);
        }
    }

    /// Writes the plan down as a batch, single tokens first.
    fn fill(&mut self, cache: &mut KvCache, batch: &mut Batch, trace: &mut StepTrace) {
        batch.clear();
        if !self.plan.is_empty() {
            batch.copies.append(&mut self.copies);
        }
        let plan = std::mem::take(&mut self.plan);
        for single in [true, false] {
            for planned in plan.iter().filter(|planned| (planned.num_tokens == 1) == single) {
                let sequence = self.slots[planned.slot.0 as usize].as_mut().expect("a planned sequence is running");
                fill_slice(sequence, *planned, cache, batch, trace);
                self.queue.charge(sequence.tenant, sequence.charge());
            }
        }
        self.plan = plan;
    }

    fn take_choice(&mut self, cache: &mut KvCache, slice: &Slice, choice: &Choice) -> Option<Outcome> {
        let max_model_len = self.config.max_model_len;
        let slot = match choice {
            _ if self.running_in(slice.slot, slice.sequence).is_some() => Some(slice.slot),
            // It may have been preempted while the step ran, and be back in another slot.
            Choice::Failed(_) => self.slot_of(slice.sequence),
            Choice::Token(_) | Choice::Last(_) | Choice::None => None,
        };
        // It may have ended while the step ran, or wait.
        let sequence = match slot {
            Some(slot) => self.slots[slot.0 as usize].as_mut()?,
            None => self.queue.get_mut(slice.sequence)?,
        };
        let mut outcome = Outcome { sequence: sequence.id, token: None, finished: None };
        let is_whole_prompt = sequence.request.max_tokens == 0 && slice.end() == sequence.num_prompt_tokens();
        let reason = match choice {
            Choice::Failed(reason) => Some(reason.clone()),
            Choice::Token(token) | Choice::Last(token) => {
                sequence.num_pending -= 1;
                sequence.tokens.push(*token);
                cache.extend(&mut sequence.chain, &sequence.tokens);
                outcome.token = Some(*token);
                match choice {
                    Choice::Last(_) => Some(FinishReason::Stop),
                    _ => sequence.finish_reason(*token, max_model_len),
                }
            }
            Choice::None => is_whole_prompt.then_some(FinishReason::Length),
        };
        if let Some(reason) = reason {
            outcome.finished = Some((reason, sequence.usage()));
            let trusted = !matches!(choice, Choice::Failed(_));
            self.end(cache, slice.sequence, slot, trusted);
        }
        Some(outcome)
    }

    /// Removes a sequence, running in `slot` or waiting; what it computed stays findable if it is trusted.
    fn end(&mut self, cache: &mut KvCache, id: SequenceId, slot: Option<SlotId>, trusted: bool) {
        match slot {
            Some(slot) => {
                let sequence = self.leave(slot, cache, trusted);
                self.queue.ended(sequence.tenant);
            }
            None => {
                let Some(sequence) = self.queue.remove(id) else { return };
                // When it was preempted, what it had computed was still trusted.
                if !trusted {
                    cache.withdraw(&sequence.chain);
                }
                sequence.swapped.into_iter().for_each(|swapped| self.host.give_back(swapped));
            }
        }
    }

    /// Takes a sequence off its slot and frees its blocks.
    fn leave(&mut self, slot: SlotId, cache: &mut KvCache, trusted: bool) -> Sequence {
        let mut sequence = self.slots[slot.0 as usize].take().expect("a sequence that leaves is running");
        self.order.retain(|&other| other != slot);
        self.free_slots.push(slot);
        sequence.slot = None;
        let mut table = std::mem::take(&mut sequence.table);
        match trusted {
            true => cache.publish(&mut table, &sequence.chain, &sequence.tokens, sequence.num_computed_tokens),
            false => cache.withdraw(&sequence.chain),
        }
        cache.free(table, &sequence.chain, sequence.id.0);
        sequence
    }
}

/// Appends a sequence's next `num_tokens` to the batch; from here on they count as computed.
fn fill_slice(
    sequence: &mut Sequence,
    Planned { slot, num_tokens, .. }: Planned,
    cache: &mut KvCache,
    batch: &mut Batch,
    trace: &mut StepTrace,
) {
    let start = sequence.num_computed_tokens;
    let end = start + num_tokens;
    let first = batch.num_tokens();
    for position in start..end {
        // Of several pending tokens only the last is still to be computed.
        let known = sequence.tokens.get(position as usize);
        batch.input.push(known.map_or(InputToken::Sampled(slot), |&token| InputToken::Id(token)));
        batch.slot_mapping.push(sequence.table.slot(position, cache.block_size()));
    }
    // Nothing of its table is on the device: it has got the slot in this step.
    if sequence.num_uploaded_blocks == 0 && sequence.is_counted() {
        batch.reset(slot, &sequence.tokens, sequence.num_prompt_tokens());
    }
    let blocks = sequence.table.blocks().iter().enumerate().skip(sequence.num_uploaded_blocks as usize);
    batch.table_updates.extend(blocks.map(|(index, block)| (slot, index as u32, block.0)));
    sequence.num_uploaded_blocks = sequence.table.num_blocks();
    let sample = end == sequence.num_tokens() && sequence.request.max_tokens > 0;
    let all_rows = sequence.wants_all_rows(start);
    let pooled = match sequence.request.pooling {
        None => false,
        Some(Pooling::Last) => end == sequence.num_prompt_tokens(),
        Some(Pooling::Mean) => true,
    };
    let logits = match (all_rows, sample || pooled) {
        (true, _) => Logits::All,
        (false, true) => Logits::Last,
        (false, false) => Logits::None,
    };
    let is_targeted = all_rows && sequence.request.prompt_logprobs.is_some();
    batch.slices.push(Slice {
        sequence: sequence.id,
        slot,
        start,
        tokens: first..batch.num_tokens(),
        logits,
        sample,
        logprobs: sequence.request.logprobs.filter(|_| sample),
        num_targets: if is_targeted { end.min(sequence.num_prompt_tokens() - 1) - start } else { 0 },
        prompt_logprobs: sequence.request.prompt_logprobs.unwrap_or(0),
        pooled,
    });
    trace.record(sequence.id, start..end, sequence.num_tokens());
    sequence.num_computed_tokens = end;
    sequence.num_pending += u32::from(sample);
    cache.publish(&mut sequence.table, &sequence.chain, &sequence.tokens, end);
}
