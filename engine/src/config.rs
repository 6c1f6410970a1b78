//! Every limit of an engine, checked once.
//!
//! Invariant: an `EngineConfig` that passed [`EngineConfig::check`] bounds every queue and every buffer; the sums are
//! written beside the numbers. 0 is never "no limit".

use crate::cost::{CostModel, StepShape};
use crate::model::StateLimits;
use crate::request::Request;
use crate::tensor::KvType;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Running sequences at most; a slot of the device's tables each.
    pub max_num_seqs: u32,
    /// Tokens of a step at most.
    pub max_num_batched_tokens: u32,
    /// Prompt and generated tokens of one sequence at most.
    pub max_model_len: u32,
    /// How elements of K and V are stored.
    pub kv_type: KvType,
    /// Tokens whose K and V share a block.
    pub block_size: u32,
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Blocks in the host's memory, for preempted sequences; 0 for none.
    pub num_host_blocks: u32,
    /// Requests that wait to begin at most: those whose text is being read, the inbox of the engine thread and its
    /// queue together. Preempted ones are not among them: they have begun, and are `max_num_seqs` at most.
    pub max_queued_requests: u32,
    /// Tokens of their prompts at most. The host holds 8 bytes a token for them, in the request and in its sequence,
    /// and 16 a block of keys: with blocks of 32, 8.5 bytes a token. At least `max_model_len`, so that what fits the
    /// model can wait. By default 2048 for each request that may wait: 4.3 MiB.
    pub max_queued_tokens: u32,
    /// Milliseconds to the first token that a request may be predicted to need; one that waits longer is refused.
    pub max_queue_ms: Option<u32>,
    /// Rows of a step that go through the output layer at most. A sampling sequence takes one; a prefill chunk with
    /// prompt logprobs takes one a token.
    pub max_logit_rows: u32,
    /// Steps that are submitted and not yet read back, at most: 1 waits for each, 2 keeps the device busy.
    pub pipeline_depth: u32,
    /// How long sequences that decode may wait for the prompts that share their steps.
    pub latency: LatencyTarget,
    /// Bytes of the lexer states of sequences that follow a grammar: while those that have begun take so much, others
    /// wait. Each may still grow to `MAX_MATCHER_BYTES` (10 MiB), so that `max_num_seqs` times that is the most.
    pub max_grammar_bytes: u64,
    /// Whether full blocks are kept for later requests with the same prefix.
    pub prefix_cache: bool,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            max_num_seqs: 32,
            max_num_batched_tokens: 512,
            max_model_len: 2048,
            kv_type: KvType::F16,
            block_size: 32,
            num_blocks: 256,
            num_host_blocks: 0,
            max_queued_requests: 256,
            max_queued_tokens: 256 * 2048,
            max_queue_ms: None,
            max_logit_rows: 32,
            pipeline_depth: 2,
            latency: LatencyTarget::None,
            max_grammar_bytes: 256 << 20,
            prefix_cache: true,
        }
    }
}

/// What bounds the time of a step in which some sequences decode, and so the gap between their tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyTarget {
    /// Nothing: as many prompt tokens as the step may have.
    None,
    /// So long at most, as far as decodes alone allow it.
    Milliseconds(u32),
    /// At most this many percent of what the step would take without prompts.
    Stretch(u32),
}

#[derive(Debug, PartialEq, thiserror::Error)]
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
    #[error(
        "the target between tokens is {target_ms} ms, but on this device one sequence alone takes {step_ms:.1} ms a \
         token; set --target-itl-ms to {least_ms} or more, or choose a smaller model or a faster device"
    )]
    TargetBelowStep { target_ms: u32, step_ms: f64, least_ms: u32 },
    #[error(
        "max_num_seqs {max_num_seqs} sequences of {max_blocks} blocks each make a block table of more than {most} \
         entries; lower max_num_seqs or max_model_len, or raise block_size"
    )]
    TableTooLarge { max_num_seqs: u32, max_blocks: u32, most: u32 },
}

/// Entries of the device's block table at most: 256 MiB of them.
const MAX_TABLE_ENTRIES: u32 = 1 << 26;

impl EngineConfig {
    pub const MAX_BLOCK_SIZE: u32 = 256;

    pub fn check(&self) -> Result<(), ConfigError> {
        let ranges = [
            ("max_num_seqs", self.max_num_seqs, 1, 4096),
            // Every running sequence may decode in one step.
            ("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs, 1 << 16),
            ("max_model_len", self.max_model_len, 2, 1 << 24),
            ("block_size", self.block_size, 1, EngineConfig::MAX_BLOCK_SIZE),
            ("num_blocks", self.num_blocks, 1, u32::MAX / self.block_size.max(1)),
            ("num_host_blocks", self.num_host_blocks, 0, u32::MAX / self.block_size.max(1)),
            ("max_queued_requests", self.max_queued_requests, 1, 1 << 20),
            // The longest request can wait.
            ("max_queued_tokens", self.max_queued_tokens, self.max_model_len, 1 << 30),
            ("max_queue_ms", self.max_queue_ms.unwrap_or(1), 1, 1 << 24),
            // Every running sequence may sample in one step.
            ("max_logit_rows", self.max_logit_rows, self.max_num_seqs, 1 << 16),
            ("pipeline_depth", self.pipeline_depth, 1, 2),
        ];
        for (name, value, least, most) in ranges {
            if value < least {
                return Err(ConfigError::TooSmall { name, value, least });
            }
            if value > most {
                return Err(ConfigError::TooLarge { name, value, most });
            }
        }
        let percent_or_ms = match self.latency {
            LatencyTarget::None => u32::MAX,
            LatencyTarget::Milliseconds(ms) => ms,
            LatencyTarget::Stretch(percent) => percent / 100,
        };
        if percent_or_ms == 0 {
            return Err(ConfigError::TooSmall { name: "the latency target", value: 0, least: 1 });
        }
        if self.num_blocks < self.max_model_len.div_ceil(self.block_size) {
            let EngineConfig { num_blocks, block_size, max_model_len, .. } = *self;
            return Err(ConfigError::PoolTooSmall { num_blocks, block_size, max_model_len });
        }
        let (max_num_seqs, max_blocks) = (self.max_num_seqs, self.max_model_len.div_ceil(self.block_size));
        if max_blocks > MAX_TABLE_ENTRIES / max_num_seqs {
            return Err(ConfigError::TableTooLarge { max_num_seqs, max_blocks, most: MAX_TABLE_ENTRIES });
        }
        Ok(())
    }
}

impl LatencyTarget {
    /// What a step may take that begins with `decodes` on a device of these prices; `None` where nothing binds it.
    pub fn limit_ns(self, cost: &CostModel, decodes: &StepShape) -> Option<u64> {
        match self {
            _ if decodes.num_tokens == 0 || !cost.is_known() => None,
            LatencyTarget::None => None,
            LatencyTarget::Milliseconds(ms) => Some(u64::from(ms) * 1_000_000),
            LatencyTarget::Stretch(percent) => Some(cost.predict_ns(decodes) * u64::from(percent) / 100),
        }
    }
}

impl EngineConfig {
    /// Whether a device on which one sequence alone takes `step_ns` a token can meet the target at all.
    pub fn check_target(&self, step_ns: u64) -> Result<(), ConfigError> {
        let step_ms = step_ns as f64 / 1e6;
        match self.latency {
            LatencyTarget::Milliseconds(target_ms) if f64::from(target_ms) < step_ms => {
                Err(ConfigError::TargetBelowStep { target_ms, step_ms, least_ms: step_ms.ceil() as u32 })
            }
            _ => Ok(()),
        }
    }
}

impl EngineConfig {
    /// Whether a device of these prices can meet the target at all.
    pub fn check_target_at(&self, cost: &CostModel) -> Result<(), ConfigError> {
        self.check_target(cost.predict_ns(&StepShape::decode(1, 1)))
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
            kv_type: self.kv_type,
            block_size: self.block_size,
            num_blocks: self.num_blocks,
            num_host_blocks: self.num_host_blocks,
        }
    }
}
