//! One growing list of tokens with its KV state.
//!
//! Invariant: `num_computed_tokens <= num_tokens`; K and V of the first `num_computed_tokens` are in the cache once all
//! submitted steps have run, and each step makes the one catch up with the other. Tokens that a submitted step samples
//! count before their ids are known. A sequence knows no phases and no device.

use std::sync::Arc;

use crate::arrival::Arrival;
use crate::batch::{SequenceId, SlotId};
use crate::memory::swap::SwappedTable;
use crate::memory::{BlockChain, BlockTable};
use crate::queue::{DECODE_COST, PREFILL_COST, TenantIndex};
use crate::request::{FinishReason, Pooling, Request, TokenId, Usage};

#[derive(Debug)]
pub struct Sequence {
    pub id: SequenceId,
    pub request: Arc<Request>,
    /// As the queue knows it.
    pub tenant: TenantIndex,
    /// The prompt, then what was generated and is known here.
    pub tokens: Vec<TokenId>,
    /// Tokens after those that submitted steps sample: their ids are on the device alone.
    pub num_pending: u32,
    pub num_computed_tokens: u32,
    /// The most that was ever computed of it: its tenant has been charged for all of them.
    pub num_charged_tokens: u32,
    /// While running.
    pub slot: Option<SlotId>,
    pub table: BlockTable,
    /// What it had computed when it was preempted, on the host; while waiting.
    pub swapped: Option<SwappedTable>,
    /// Keys of the blocks that `tokens` fill.
    pub chain: BlockChain,
    /// Entries of `table` that the device's row of this slot holds.
    pub num_uploaded_blocks: u32,
    /// `num_computed_tokens` when it was last admitted.
    pub num_admitted_tokens: u32,
    /// The step in which it was last admitted.
    pub admitted_in_step: u64,
    /// Prompt tokens found in the prefix cache when first admitted.
    pub cached_tokens: Option<u32>,
    pub num_preemptions: u32,
}

impl Sequence {
    pub fn new(id: SequenceId, Arrival { request, tokens, chain }: Arrival) -> Sequence {
        // Whoever generated tokens elsewhere was charged there for all but the last.
        let num_charged_tokens = if request.generated.is_empty() { 0 } else { tokens.len() as u32 - 1 };
        Sequence {
            id,
            tokens,
            request,
            tenant: TenantIndex::default(),
            num_pending: 0,
            num_computed_tokens: 0,
            num_charged_tokens,
            slot: None,
            table: BlockTable::default(),
            swapped: None,
            chain,
            num_uploaded_blocks: 0,
            num_admitted_tokens: 0,
            admitted_in_step: 0,
            cached_tokens: None,
            num_preemptions: 0,
        }
    }

    /// All tokens, pending ones included.
    pub fn num_tokens(&self) -> u32 {
        self.tokens.len() as u32 + self.num_pending
    }

    /// What its grammar takes once it begins; 0 where it has begun.
    pub fn new_grammar_bytes(&self) -> u64 {
        let grammar = self.request.grammar.as_ref().filter(|_| self.cached_tokens.is_none());
        grammar.map_or(0, |grammar| grammar.num_bytes() as u64)
    }

    pub fn num_prompt_tokens(&self) -> u32 {
        self.request.prompt.len() as u32
    }

    /// Pending ones included.
    pub fn num_generated_tokens(&self) -> u32 {
        self.num_tokens() - self.num_prompt_tokens()
    }

    /// Tokens whose K and V are still to be computed; none where the last token has been asked for.
    pub fn num_uncomputed_tokens(&self, max_model_len: u32) -> u32 {
        match self.num_pending > 0 && self.is_full(max_model_len) {
            true => 0,
            false => self.num_tokens() - self.num_computed_tokens,
        }
    }

    /// Tokens that may come from the prefix cache: at least one is computed, to have logits; some requests need all.
    pub fn max_hit_tokens(&self) -> u32 {
        match self.wants_all_rows(0) {
            true => 0,
            false => self.num_tokens() - 1,
        }
    }

    /// Whether the device counts this sequence's tokens while it runs.
    pub fn is_counted(&self) -> bool {
        self.request.sampling.is_penalised() && self.request.max_tokens > 0
    }

    /// Tokens that need not be computed when it is admitted with `num_cached` in the prefix cache.
    pub fn num_kept_tokens(&self, num_cached: u32) -> u32 {
        // What the host has goes on from tokens that others had.
        let swapped = self.swapped.as_ref().filter(|swapped| swapped.first_token <= num_cached);
        swapped.map_or(num_cached, |swapped| swapped.num_tokens.max(num_cached))
    }

    /// What its tenant owes for tokens that were computed since the last charge, each for the first time.
    pub fn charge(&mut self) -> u64 {
        let since = self.num_charged_tokens..self.num_computed_tokens.max(self.num_charged_tokens);
        let num_prompt = since.end.min(self.num_prompt_tokens()).saturating_sub(since.start);
        self.num_charged_tokens = since.end;
        PREFILL_COST * u64::from(num_prompt) + DECODE_COST * u64::from(since.end - since.start - num_prompt)
    }

    /// Whether all rows from `start` on go to the output layer: for the prompt's own log-probabilities, or the mean of
    /// its hidden states.
    pub fn wants_all_rows(&self, start: u32) -> bool {
        let wants = self.request.prompt_logprobs.is_some() || self.request.pooling == Some(Pooling::Mean);
        wants && start < self.num_prompt_tokens() && self.num_generated_tokens() == 0
    }

    /// Why the sequence has ended, after `token` was appended.
    pub fn finish_reason(&self, token: TokenId, max_model_len: u32) -> Option<FinishReason> {
        if self.request.stop_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        // Of pending tokens there are none beyond the last that was asked for.
        let num_known = self.tokens.len() as u32;
        let num_generated = num_known - self.num_prompt_tokens();
        let full = num_generated >= self.request.max_tokens || num_known >= max_model_len;
        full.then_some(FinishReason::Length)
    }

    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.num_prompt_tokens(),
            cached_tokens: self.cached_tokens.unwrap_or(0),
            completion_tokens: self.tokens.len() as u32 - self.num_prompt_tokens(),
        }
    }

    /// Whether no token may follow.
    fn is_full(&self, max_model_len: u32) -> bool {
        self.num_generated_tokens() >= self.request.max_tokens || self.num_tokens() >= max_model_len
    }
}
