//! Which tokens of which sequences run in the next step.
//!
//! There is no prefill phase and no decode phase: each step hands out tokens, within a budget, so that every sequence's
//! `num_computed_tokens` catches up with its `num_tokens` (vLLM v1). Running sequences come first, those with one token
//! to compute before the others; then waiting ones, in order of arrival. Out of blocks, the newest running sequence is
//! preempted: its blocks are freed and it goes back to the head of the queue, to be recomputed.
//!
//! Invariants: the same state gives the same batch (no clock, no chance); the oldest running sequence is never
//! preempted for another, so there is always progress; nothing is admitted in a step that preempted, nor before all
//! tokens that are known would fit, so a victim waits until another sequence has freed memory.

use std::collections::VecDeque;

use crate::batch::{Batch, InputToken, Logits, SequenceId, Slice, SlotId};
use crate::config::EngineConfig;
use crate::memory::KvCache;
use crate::request::{FinishReason, TokenId, Usage};
use crate::sequence::Sequence;

pub mod trace;

pub use trace::StepTrace;

#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    waiting: VecDeque<Sequence>,
    /// In order of admission, oldest first.
    running: Vec<Sequence>,
    free_slots: Vec<SlotId>,
    /// This step's plan: indices of `running` and tokens.
    plan: Vec<Planned>,
    num_steps: u64,
    num_preemptions: u64,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    sequence: SequenceId,
    num_tokens: u32,
}

/// What a step chose for a slice that samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The slice ended before the sequence's last token, or none was asked for.
    None,
    Token(TokenId),
    /// This sequence alone failed: what was computed for it is not to be trusted.
    Failed(String),
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
        Scheduler {
            config,
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_slots: (0..config.max_num_seqs).rev().map(SlotId).collect(),
            plan: Vec::new(),
            num_steps: 0,
            num_preemptions: 0,
        }
    }

    /// Queues a sequence. That it fits in `max_model_len` and in the pool is the caller's to have checked.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    pub fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        self.waiting.iter()
    }

    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// Plans a step into `batch`; an empty batch means that nothing can run.
    pub fn schedule(&mut self, cache: &mut KvCache, batch: &mut Batch) -> StepTrace {
        self.num_steps += 1;
        self.plan.clear();
        let mut trace = StepTrace::new(self.num_steps);
        let mut budget = Budget {
            tokens: self.config.max_num_batched_tokens,
            rows: self.config.max_logit_rows,
            known_tokens: self.config.max_model_len,
        };
        for decodes in [true, false] {
            let candidates = self.running.iter().filter(|sequence| (sequence.num_uncomputed_tokens() == 1) == decodes);
            let candidates: Vec<SequenceId> = candidates.map(|sequence| sequence.id).collect();
            for id in candidates {
                self.continue_running(id, cache, &mut budget, &mut trace);
            }
        }
        if trace.preempted.is_empty() {
            self.admit(cache, &mut budget);
        }
        self.fill(cache.block_size(), batch, &mut trace);
        trace.blocks = cache.counts();
        trace
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
            // A sequence may have been aborted while the step ran.
            let Some(index) = self.running.iter().position(|sequence| sequence.id == slice.sequence) else { continue };
            let sequence = &mut self.running[index];
            let mut outcome = Outcome { sequence: sequence.id, token: None, finished: None };
            let mut reason = None;
            if let Choice::Failed(sentence) = choice {
                reason = Some(FinishReason::Error(sentence.clone()));
            } else {
                sequence.num_computed_tokens += slice.num_tokens();
                cache.publish(&mut sequence.table, &sequence.tokens[..sequence.num_computed_tokens as usize]);
            }
            if let Choice::Token(token) = *choice {
                sequence.tokens.push(token);
                outcome.token = Some(token);
                reason = sequence.finish_reason(token, self.config.max_model_len);
            } else if sequence.request.max_tokens == 0 && sequence.num_uncomputed_tokens() == 0 {
                reason = Some(FinishReason::Length);
            }
            if let Some(reason) = reason {
                outcome.finished = Some((reason.clone(), sequence.usage()));
                trace.finished.push((sequence.id, reason));
                let sequence = self.running.remove(index);
                self.release(sequence, cache);
            }
            outcomes.push(outcome);
        }
        trace.blocks = cache.counts();
    }

    /// Ends a sequence in any phase; its blocks are free at once. Returns it, if it was there.
    pub fn abort(&mut self, cache: &mut KvCache, id: SequenceId) -> Option<Usage> {
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            return self.waiting.remove(index).map(|sequence| sequence.usage());
        }
        let index = self.running.iter().position(|sequence| sequence.id == id)?;
        let sequence = self.running.remove(index);
        let usage = sequence.usage();
        self.release(sequence, cache);
        Some(usage)
    }

    /// Asserts the scheduler's invariants and those of `cache`.
    pub fn check(&self, cache: &KvCache) {
        cache.check(self.running.iter().map(|sequence| &sequence.table));
        assert_eq!(self.running.len() + self.free_slots.len(), self.config.max_num_seqs as usize);
        for sequence in &self.running {
            assert!(sequence.num_computed_tokens < sequence.num_tokens() || sequence.request.max_tokens == 0);
            assert!(cache.blocks_for(sequence.num_computed_tokens) <= sequence.table.num_blocks());
            let slot = sequence.slot.expect("a running sequence has a slot");
            assert!(!self.free_slots.contains(&slot), "slot {} is free and in use", slot.0);
        }
        for sequence in &self.waiting {
            assert!(sequence.slot.is_none() && sequence.table.num_blocks() == 0, "a waiting sequence holds memory");
        }
    }

    /// Plans the next tokens of a running sequence, preempting from the newest on until they fit.
    fn continue_running(&mut self, id: SequenceId, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        loop {
            // It may have been preempted for one that came before it.
            let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) else { return };
            let num_tokens = budget.fit(sequence);
            if num_tokens == 0 {
                return;
            }
            if cache.grow(&mut sequence.table, sequence.num_computed_tokens + num_tokens).is_ok() {
                budget.take(sequence, num_tokens);
                self.plan.push(Planned { sequence: id, num_tokens });
                return;
            }
            self.preempt_newest(cache, budget, trace);
        }
    }

    fn preempt_newest(&mut self, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        let mut victim = self.running.pop().expect("a sequence that needs blocks is running");
        if let Some(index) = self.plan.iter().position(|planned| planned.sequence == victim.id) {
            let planned = self.plan.remove(index);
            budget.give_back(&victim, planned.num_tokens);
        }
        trace.preempted.push(victim.id);
        self.num_preemptions += 1;
        victim.num_preemptions += 1;
        self.free_slots.push(victim.slot.take().expect("a running sequence has a slot"));
        cache.free(std::mem::take(&mut victim.table));
        victim.num_computed_tokens = 0;
        victim.num_uploaded_blocks = 0;
        self.waiting.push_front(victim);
    }

    fn admit(&mut self, cache: &mut KvCache, budget: &mut Budget) {
        let missing =
            |sequence: &Sequence| cache.blocks_for(sequence.num_tokens()).saturating_sub(sequence.table.num_blocks());
        // Blocks that running sequences will take for tokens they already have.
        let mut promised: u32 = self.running.iter().map(missing).sum();
        while budget.tokens > 0 && !self.free_slots.is_empty() {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            // At least one token is computed, to have logits; prompt logprobs need them all.
            let hit_limit = if sequence.wants_prompt_logprobs(0) { 0 } else { sequence.num_tokens() - 1 };
            sequence.table = cache.open(&sequence.tokens, sequence.request.cache_salt, hit_limit);
            let num_cached = sequence.table.num_blocks() * cache.block_size();
            // One token more than it has, so that it is not admitted only to be preempted; none follows the last.
            let known_next = (sequence.num_tokens() + 1).min(self.config.max_model_len);
            let needed = cache.blocks_for(known_next) - sequence.table.num_blocks();
            sequence.num_computed_tokens = num_cached;
            let num_tokens = budget.fit(&sequence);
            if num_tokens == 0 || needed + promised > cache.num_available() {
                cache.free(std::mem::take(&mut sequence.table));
                sequence.num_computed_tokens = 0;
                self.waiting.push_front(sequence);
                return;
            }
            cache.grow(&mut sequence.table, num_cached + num_tokens).expect("fewer than what was counted above");
            promised += cache.blocks_for(sequence.num_tokens()).saturating_sub(sequence.table.num_blocks());
            sequence.cached_tokens.get_or_insert(num_cached);
            sequence.slot = self.free_slots.pop();
            budget.take(&sequence, num_tokens);
            self.plan.push(Planned { sequence: sequence.id, num_tokens });
            self.running.push(sequence);
        }
    }

    /// Writes the plan down as a batch, single tokens first.
    fn fill(&mut self, block_size: u32, batch: &mut Batch, trace: &mut StepTrace) {
        batch.clear();
        self.plan.sort_by_key(|planned| planned.num_tokens > 1);
        for planned in &self.plan {
            let sequence = self.running.iter_mut().find(|sequence| sequence.id == planned.sequence);
            let sequence = sequence.expect("a planned sequence is running");
            let slot = sequence.slot.expect("a running sequence has a slot");
            let start = sequence.num_computed_tokens;
            let end = start + planned.num_tokens;
            let first = batch.num_tokens();
            for position in start..end {
                batch.input.push(InputToken::Id(sequence.tokens[position as usize]));
                batch.slot_mapping.push(sequence.table.slot(position, block_size));
            }
            // Nothing of its table is on the device: it has got the slot in this step.
            if sequence.num_uploaded_blocks == 0 && sequence.is_counted() {
                batch.reset(slot, &sequence.tokens, sequence.num_prompt_tokens());
            }
            let blocks = sequence.table.blocks().iter().enumerate().skip(sequence.num_uploaded_blocks as usize);
            batch.table_updates.extend(blocks.map(|(index, block)| (slot, index as u32, block.0)));
            sequence.num_uploaded_blocks = sequence.table.num_blocks();
            let sample = end == sequence.num_tokens() && sequence.request.max_tokens > 0;
            let prompt_rows = sequence.wants_prompt_logprobs(start);
            let logits = match (prompt_rows, sample) {
                (true, _) => Logits::All,
                (false, true) => Logits::Last,
                (false, false) => Logits::None,
            };
            batch.slices.push(Slice {
                sequence: sequence.id,
                slot,
                start,
                tokens: first..batch.num_tokens(),
                logits,
                sample,
                logprobs: sequence.request.logprobs.filter(|_| sample),
                num_targets: if prompt_rows { end.min(sequence.num_prompt_tokens() - 1) - start } else { 0 },
                prompt_logprobs: sequence.request.prompt_logprobs.unwrap_or(0),
            });
            trace.record(sequence.id, start..end, sequence.num_tokens());
        }
    }

    fn release(&mut self, mut sequence: Sequence, cache: &mut KvCache) {
        self.free_slots.push(sequence.slot.take().expect("a running sequence has a slot"));
        cache.free(sequence.table);
    }
}

/// What is left of a step.
struct Budget {
    tokens: u32,
    /// Rows of the output layer.
    rows: u32,
    /// Tokens of admitted sequences that the device is told, to count them.
    known_tokens: u32,
}

impl Budget {
    /// Tokens of `sequence` that fit.
    fn fit(&self, sequence: &Sequence) -> u32 {
        if num_told_tokens(sequence) > self.known_tokens {
            return 0;
        }
        let num_tokens = sequence.num_uncomputed_tokens().min(self.tokens);
        match sequence.wants_prompt_logprobs(sequence.num_computed_tokens) {
            true => num_tokens.min(self.rows),
            false if self.rows == 0 => 0,
            false => num_tokens,
        }
    }

    fn take(&mut self, sequence: &Sequence, num_tokens: u32) {
        self.tokens -= num_tokens;
        self.rows -= rows(sequence, num_tokens);
        self.known_tokens -= num_told_tokens(sequence);
    }

    fn give_back(&mut self, sequence: &Sequence, num_tokens: u32) {
        self.tokens += num_tokens;
        self.rows += rows(sequence, num_tokens);
    }
}

/// Tokens that the device is told when the sequence gets a slot.
fn num_told_tokens(sequence: &Sequence) -> u32 {
    if sequence.num_uploaded_blocks == 0 && sequence.is_counted() { sequence.num_tokens() } else { 0 }
}

/// Rows of the output layer that the next `num_tokens` of `sequence` take.
fn rows(sequence: &Sequence, num_tokens: u32) -> u32 {
    match sequence.wants_prompt_logprobs(sequence.num_computed_tokens) {
        true => num_tokens,
        false => u32::from(num_tokens == sequence.num_uncomputed_tokens()),
    }
}
