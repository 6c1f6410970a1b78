//! Every limit of an engine, checked once.
//!
//! Invariant: an `EngineConfig` that passed [`EngineConfig::check`] bounds every queue and every buffer; the sums are
//! written beside the numbers. 0 is never "no limit".

use crate::model::StateLimits;
use crate::request::Request;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Running sequences at most; a slot of the device's tables each.
    pub max_num_seqs: u32,
    /// Tokens of a step at most.
    pub max_num_batched_tokens: u32,
    /// Prompt and generated tokens of one sequence at most.
    pub max_model_len: u32,
    /// Tokens whose K and V share a block.
    pub block_size: u32,
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Requests that wait for admission at most: the inbox of the engine thread and its queue together.
    pub max_waiting: u32,
    /// Rows of a step that go through the output layer at most. A sampling sequence takes one; a prefill chunk with
    /// prompt logprobs takes one a token.
    pub max_logit_rows: u32,
    /// Whether full blocks are kept for later requests with the same prefix.
    pub prefix_cache: bool,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            max_num_seqs: 32,
            max_num_batched_tokens: 512,
            max_model_len: 2048,
            block_size: 32,
            num_blocks: 256,
            max_waiting: 256,
            max_logit_rows: 32,
            prefix_cache: true,
        }
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{name} is {value}; it must be at least {least}")]
    TooSmall { name: &'static str, value: u32, least: u32 },
    #[error("{name} is {value}; it must be at most {most}")]
    TooLarge { name: &'static str, value: u32, most: u32 },
    #[error(
        "{num_blocks} KV blocks of {block_size} tokens cannot hold one sequence of max_model_len {max_model_len}; \
         give more KV memory or lower max_model_len"
    )]
    PoolTooSmall { num_blocks: u32, block_size: u32, max_model_len: u32 },
}

impl EngineConfig {
    pub fn check(&self) -> Result<(), ConfigError> {
        let ranges = [
            ("max_num_seqs", self.max_num_seqs, 1, 4096),
            // Every running sequence may decode in one step.
            ("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs, 1 << 16),
            ("max_model_len", self.max_model_len, 2, 1 << 24),
            ("block_size", self.block_size, 1, 256),
            ("num_blocks", self.num_blocks, 1, u32::MAX / self.block_size.max(1)),
            ("max_waiting", self.max_waiting, 1, 1 << 20),
            // Every running sequence may sample in one step.
            ("max_logit_rows", self.max_logit_rows, self.max_num_seqs, 1 << 16),
        ];
        for (name, value, least, most) in ranges {
            if value < least {
                return Err(ConfigError::TooSmall { name, value, least });
            }
            if value > most {
                return Err(ConfigError::TooLarge { name, value, most });
            }
        }
        if self.num_blocks < self.max_model_len.div_ceil(self.block_size) {
            let EngineConfig { num_blocks, block_size, max_model_len, .. } = *self;
            return Err(ConfigError::PoolTooSmall { num_blocks, block_size, max_model_len });
        }
        Ok(())
    }
}

/// Why a request can never run here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnfitRequest {
    #[error("the prompt is empty; give at least one token")]
    Empty,
    #[error(
        "this model's context is {max_model_len} tokens; the prompt has {prompt_tokens} and {max_tokens} more were \
         asked for: shorten the prompt or lower max_tokens"
    )]
    TooLong { prompt_tokens: u32, max_tokens: u32, max_model_len: u32 },
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    NoSuchToken { id: u32, vocab_size: u32 },
    #[error("the mask of allowed tokens has {num_words} words and {num_tokens} tokens of a vocabulary of {vocab_size}")]
    BadMask { num_words: usize, num_tokens: u32, vocab_size: u32 },
}

impl EngineConfig {
    /// Whether a request can ever run. A checked config's pool holds `max_model_len` tokens, so length decides.
    pub fn fits(&self, request: &Request, vocab_size: u32) -> Result<(), UnfitRequest> {
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let Request { max_tokens, .. } = *request;
        if prompt_tokens == 0 {
            return Err(UnfitRequest::Empty);
        }
        if prompt_tokens.saturating_add(max_tokens) > self.max_model_len {
            return Err(UnfitRequest::TooLong { prompt_tokens, max_tokens, max_model_len: self.max_model_len });
        }
        let biased = request.sampling.logit_bias.iter().map(|(token, _)| token);
        if let Some(token) = request.prompt.iter().chain(biased).find(|token| token.0 >= vocab_size) {
            return Err(UnfitRequest::NoSuchToken { id: token.0, vocab_size });
        }
        let Some(mask) = &request.sampling.allowed_tokens else { return Ok(()) };
        let num_tokens = mask.iter().map(|word| word.count_ones()).sum();
        let rest = vocab_size % 32;
        let beyond = rest > 0 && mask.last().is_some_and(|word| word >> rest != 0);
        match mask.len() == vocab_size.div_ceil(32) as usize && num_tokens > 0 && !beyond {
            true => Ok(()),
            false => Err(UnfitRequest::BadMask { num_words: mask.len(), num_tokens, vocab_size }),
        }
    }

    /// What a model's state on a device must hold.
    pub fn state_limits(&self) -> StateLimits {
        StateLimits {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_logit_rows: self.max_logit_rows,
            max_model_len: self.max_model_len,
            block_size: self.block_size,
            num_blocks: self.num_blocks,
        }
    }
}
