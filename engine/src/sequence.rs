//! One growing list of tokens with its KV state.
//!
//! Invariant: `num_computed_tokens <= num_tokens`; K and V of the first `num_computed_tokens` are in the cache, and
//! each step makes the one catch up with the other. A sequence knows no phases and no device.

use std::sync::Arc;

use crate::batch::{SequenceId, SlotId};
use crate::memory::BlockTable;
use crate::request::{FinishReason, Request, TokenId, Usage};

#[derive(Debug)]
pub struct Sequence {
    pub id: SequenceId,
    pub request: Arc<Request>,
    /// The prompt, then what was generated.
    pub tokens: Vec<TokenId>,
    pub num_computed_tokens: u32,
    /// While running.
    pub slot: Option<SlotId>,
    pub table: BlockTable,
    /// Entries of `table` that the device's row of this slot holds.
    pub num_uploaded_blocks: u32,
    /// Prompt tokens found in the prefix cache when first admitted.
    pub cached_tokens: Option<u32>,
    pub num_preemptions: u32,
}

impl Sequence {
    pub fn new(id: SequenceId, request: Arc<Request>) -> Sequence {
        Sequence {
            id,
            tokens: request.prompt.clone(),
            request,
            num_computed_tokens: 0,
            slot: None,
            table: BlockTable::default(),
            num_uploaded_blocks: 0,
            cached_tokens: None,
            num_preemptions: 0,
        }
    }

    pub fn num_tokens(&self) -> u32 {
        self.tokens.len() as u32
    }

    pub fn num_prompt_tokens(&self) -> u32 {
        self.request.prompt.len() as u32
    }

    pub fn num_generated_tokens(&self) -> u32 {
        self.num_tokens() - self.num_prompt_tokens()
    }

    /// Tokens whose K and V are still to be computed.
    pub fn num_uncomputed_tokens(&self) -> u32 {
        self.num_tokens() - self.num_computed_tokens
    }

    /// Whether the device counts this sequence's tokens while it runs.
    pub fn is_counted(&self) -> bool {
        self.request.sampling.is_penalised() && self.request.max_tokens > 0
    }

    /// Whether the rows of `[start, end)` go through the output layer for the prompt's own log-probabilities.
    pub fn wants_prompt_logprobs(&self, start: u32) -> bool {
        self.request.prompt_logprobs.is_some() && start < self.num_prompt_tokens() && self.num_generated_tokens() == 0
    }

    /// Why the sequence has ended, after `token` was appended.
    pub fn finish_reason(&self, token: TokenId, max_model_len: u32) -> Option<FinishReason> {
        if self.request.stop_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        let full = self.num_generated_tokens() >= self.request.max_tokens || self.num_tokens() >= max_model_len;
        full.then_some(FinishReason::Length)
    }

    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.num_prompt_tokens(),
            cached_tokens: self.cached_tokens.unwrap_or(0),
            completion_tokens: self.num_generated_tokens(),
        }
    }
}
