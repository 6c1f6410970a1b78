//! Which waiting sequences join a step.
//!
//! In the queue's order. A sequence whose next block somebody is about to compute is passed over until that block is
//! there, so that a prefix that many share is computed once; and one whose grammar there is no memory for, with all
//! behind it that follow one. The first that KV memory or slots are too short for ends admission, unless one that runs
//! has to give way to it.

use super::{Blocked, Budget, Held, Planned, Scheduler, StepTrace};
use crate::memory::KvCache;
use crate::queue::TenantIndex;
use crate::sequence::Sequence;

/// Sequences that are passed over in one step, at most: for a prefix, which is looked for each time, and for memory of
/// grammars, which is a comparison.
const MAX_PASSED: u32 = 64;
const MAX_PASSED_FOR_GRAMMARS: u32 = 4096;

/// What came of trying to admit the head of the queue.
enum Attempt {
    /// This many of its tokens run in this step.
    Fits(u32),
    /// It waits for what a submitted step or a running sequence computes, or for memory that others behind it may not
    /// need.
    Waits(Held),
    Lacks(Held),
    /// It could run if somebody gave way who holds so many blocks.
    LacksRoom(Held, u32),
}

impl Scheduler {
    /// Up to the first that comes `behind` a tenant that runs: it has got more, or is the same.
    pub(super) fn admit(
        &mut self,
        behind: Option<TenantIndex>,
        cache: &mut KvCache,
        budget: &mut Budget,
        trace: &mut StepTrace,
    ) {
        self.queue.rewind();
        let mut promised = if self.queue.is_empty() { 0 } else { self.promised_blocks(cache) };
        let (mut num_passed, mut num_passed_for_grammars, mut passed_for) = (0, 0, None);
        let mut helped = None;
        trace.held = loop {
            let head = self.queue.peek().map(|head| (head.id, head.tenant));
            let comes_behind = |other: TenantIndex| {
                let got_more = |tenant| tenant == other || self.queue.counter(tenant) > self.queue.counter(other);
                head.is_some_and(|(_, tenant)| got_more(tenant))
            };
            if behind.is_some_and(comes_behind) {
                break Held::Budget;
            }
            // What was freed, was freed for sequences that run, or for tenants below their share.
            if !trace.preempted.is_empty() && !head.is_some_and(|(_, tenant)| self.is_below_share(tenant)) {
                break if self.free_slots.is_empty() { Held::Slots } else { Held::KvMemory };
            }
            match self.attempt(cache, budget, promised) {
                None if self.queue.is_empty() => break passed_for.unwrap_or(Held::NoRequests),
                None => break passed_for.unwrap_or(Held::TenantCap),
                Some(Attempt::Waits(held)) => {
                    let (count, most) = match held {
                        Held::GrammarMemory => (&mut num_passed_for_grammars, MAX_PASSED_FOR_GRAMMARS),
                        _ => (&mut num_passed, MAX_PASSED),
                    };
                    if *count == most {
                        break held;
                    }
                    *count += 1;
                    passed_for.get_or_insert(held);
                    self.queue.pass();
                }
                Some(Attempt::Lacks(held)) => break held,
                Some(Attempt::LacksRoom(held, num_blocks)) => {
                    let again = helped.replace(head.map(|(id, _)| id)) == Some(head.map(|(id, _)| id));
                    if again || !self.give_way(num_blocks, cache, budget, trace) {
                        break held;
                    }
                    promised = self.promised_blocks(cache);
                }
                Some(Attempt::Fits(num_tokens)) => {
                    promised += self.start(num_tokens, cache, budget, trace).unwrap_or(0);
                }
            }
        };
    }

    /// Blocks that running sequences will take for tokens they already have.
    pub fn promised_blocks(&self, cache: &KvCache) -> u32 {
        let running = self.running();
        running
            .map(|sequence| cache.blocks_for(sequence.num_tokens()).saturating_sub(sequence.table.num_blocks()))
            .sum()
    }

    fn attempt(&mut self, cache: &KvCache, budget: &mut Budget, promised: u32) -> Option<Attempt> {
        let head = self.queue.peek()?;
        if head.num_pending > 0 {
            return Some(Attempt::Waits(Held::SharedPrefix));
        }
        let new_grammar_bytes = head.new_grammar_bytes();
        if new_grammar_bytes > 0 && self.grammar_bytes > 0 {
            let total = self.grammar_bytes.saturating_add(new_grammar_bytes);
            if total > self.config.max_grammar_bytes {
                // Nor has anybody behind it, so that it is not overtaken for ever.
                self.grammar_bytes = u64::MAX;
                return Some(Attempt::Waits(Held::GrammarMemory));
            }
        }
        if let Some(blocked) = &self.blocked
            && (blocked.sequence, blocked.version) == (head.id, cache.version())
            && !blocked.next.is_some_and(|hash| cache.is_known(hash))
            && !self.order.is_empty()
        {
            return Some(Attempt::LacksRoom(Held::KvMemory, blocked.num_missing));
        }
        let prefix = cache.find(&head.chain, &head.tokens, head.max_hit_tokens());
        let num_cached = prefix.num_blocks * cache.block_size();
        let num_kept = head.num_kept_tokens(num_cached);
        if prefix.next_is_promised && num_kept == num_cached {
            return Some(Attempt::Waits(Held::SharedPrefix));
        }
        // One token more than it has, so that it is not admitted only to be preempted; none follows the last.
        let known_next = (head.num_tokens() + 1).min(self.config.max_model_len);
        let needed = cache.blocks_for(known_next) - prefix.num_blocks + prefix.num_unreferenced;
        let num_missing = (needed + promised).saturating_sub(cache.num_available());
        if num_missing > 0 {
            let is_usable = prefix.num_blocks < head.max_hit_tokens() / cache.block_size();
            let next = head.chain.hashes().get(prefix.num_blocks as usize).copied().filter(|_| is_usable);
            self.blocked = Some(Blocked { sequence: head.id, version: cache.version(), num_missing, next });
            return Some(Attempt::LacksRoom(Held::KvMemory, num_missing));
        }
        if self.free_slots.is_empty() {
            return Some(Attempt::LacksRoom(Held::Slots, 0));
        }
        head.num_computed_tokens = num_kept;
        let num_tokens = budget.fit(head);
        head.num_computed_tokens = 0;
        Some(match num_tokens {
            0 => Attempt::Lacks(budget.held()),
            num_tokens => Attempt::Fits(num_tokens),
        })
    }

    /// Gives the head of the queue a slot and blocks, and its first tokens a place in the step. Returns the blocks that
    /// it will take beyond; `None` where its tenant has come to its cap elsewhere.
    fn start(
        &mut self,
        num_tokens: u32,
        cache: &mut KvCache,
        budget: &mut Budget,
        trace: &mut StepTrace,
    ) -> Option<u32> {
        let mut sequence = self.queue.take()?;
        self.grammar_bytes = self.grammar_bytes.saturating_add(sequence.new_grammar_bytes());
        if sequence.cached_tokens.is_none() {
            let prefix = || cache.explain(&sequence.chain, &sequence.tokens, sequence.max_hit_tokens());
            tracing::debug!(id = sequence.request.id, "prefix: {}", prefix());
        }
        let mut table = cache.open(&sequence.chain, &sequence.tokens, sequence.max_hit_tokens());
        let num_found = table.num_blocks();
        let num_cached = num_found * cache.block_size();
        let num_kept = sequence.num_kept_tokens(num_cached);
        cache.grow(&mut table, num_kept + num_tokens).expect("fewer than what was counted when it was tried");
        if let Some(swapped) = sequence.swapped.take() {
            self.swap_in(swapped, &table, num_found, cache.block_size());
        }
        cache.promise(&table, &sequence.chain, sequence.id.0);
        let slot = self.free_slots.pop().expect("a free slot was seen when it was tried");
        let promised = cache.blocks_for(sequence.num_tokens()).saturating_sub(table.num_blocks());
        sequence.table = table;
        sequence.slot = Some(slot);
        sequence.num_computed_tokens = num_kept;
        sequence.num_admitted_tokens = num_kept;
        sequence.num_charged_tokens = sequence.num_charged_tokens.max(num_kept);
        let cached_tokens = *sequence.cached_tokens.get_or_insert(num_cached);
        sequence.admitted_in_step = self.num_steps;
        trace.admitted.push((sequence.id, cached_tokens));
        let is_prompt = budget.take(&sequence, num_tokens);
        self.plan.push(Planned { slot, num_tokens, is_prompt });
        self.order.push(slot);
        self.slots[slot.0 as usize] = Some(sequence);
        Some(promised)
    }

    /// Preempts a running sequence for the head of the queue, if there is one that must give way to it.
    fn give_way(&mut self, num_blocks: u32, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) -> bool {
        let Some(head) = self.queue.peek() else { return false };
        let (tenant, priority) = (head.tenant, head.request.priority);
        let frees = |sequence: &Sequence| cache.num_exclusive(&sequence.table) >= num_blocks;
        let victim = self.fair_victim(tenant, priority, frees);
        victim.is_some_and(|slot| {
            self.preempt(slot, cache, budget, trace);
            true
        })
    }
}
