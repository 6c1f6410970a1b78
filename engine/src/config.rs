//! Every limit of an engine, checked once.
//!
//! Invariant: an `EngineConfig` that passed [`EngineConfig::check`] bounds every queue and every buffer.

/// The limits a user may set; 0 is never "no limit".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Running sequences at most.
    pub max_num_seqs: u32,
    /// Tokens of a step at most.
    pub max_num_batched_tokens: u32,
    /// Prompt and generated tokens of one sequence at most.
    pub max_model_len: u32,
    /// Tokens whose K and V share a block.
    pub block_size: u32,
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Requests that wait for admission at most.
    pub max_waiting: u32,
    /// Rows of a step that go through the output layer at most.
    pub max_logit_rows: u32,
    /// Whether full blocks are kept for later requests with the same prefix.
    pub prefix_cache: bool,
}
