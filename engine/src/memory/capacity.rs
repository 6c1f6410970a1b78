//! Bytes a block, and how many blocks a budget buys.
//!
//! Invariant: what a table promises is what `Model::load` allocates; a test holds the two against each other.

use std::fmt;

use crate::model::{ModelConfig, StateLimits};

/// Where a device's memory goes (the start-up table), in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryTable {
    /// As packed by the backend.
    pub weights: u64,
    pub kv: u64,
    /// Activations of a step.
    pub scratch: u64,
    /// Block table, rope tables, upload, sampled ids.
    pub tables: u64,
    pub num_blocks: u32,
    pub block_size: u32,
    /// Bytes of one token's K and V over all layers.
    pub kv_bytes_per_token: u64,
}

/// Too little memory for even one sequence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{budget} of KV memory hold {num_blocks} blocks of {block_size} tokens; one sequence of {max_model_len} tokens \
     needs {needed}: give more memory or lower --max-model-len"
)]
pub struct BudgetTooSmall {
    pub budget: String,
    pub num_blocks: u32,
    pub block_size: u32,
    pub max_model_len: u32,
    pub needed: String,
}

/// Whole blocks that `budget_bytes` of KV memory hold, refused where one sequence of `max_model_len` would not fit.
pub fn num_blocks(
    config: &ModelConfig,
    budget_bytes: u64,
    block_size: u32,
    max_model_len: u32,
) -> Result<u32, BudgetTooSmall> {
    let block_bytes = config.kv_bytes_per_token() * u64::from(block_size);
    let num_blocks = u32::try_from(budget_bytes / block_bytes).unwrap_or(u32::MAX).min(u32::MAX / block_size);
    let needed = max_model_len.div_ceil(block_size);
    match num_blocks >= needed {
        true => Ok(num_blocks),
        false => Err(BudgetTooSmall {
            budget: human_bytes(budget_bytes),
            num_blocks,
            block_size,
            max_model_len,
            needed: human_bytes(u64::from(needed) * block_bytes),
        }),
    }
}

impl MemoryTable {
    /// `weight_bytes` is what the backend says its packed weights take.
    pub fn new(config: &ModelConfig, limits: &StateLimits, weight_bytes: u64) -> MemoryTable {
        let words = |rows: u32, cols: u32| u64::from(rows) * u64::from(cols) * 4;
        let q_dim = config.num_heads * config.head_dim;
        let kv_dim = config.num_kv_heads * config.head_dim;
        let token =
            3 * words(1, config.dim) + 3 * words(1, q_dim) + 3 * words(1, kv_dim) + 3 * words(1, config.ffn_dim);
        let logit_row = 2 * words(1, config.dim) + words(1, config.vocab_size);
        let scratch = u64::from(limits.max_num_batched_tokens) * token + u64::from(limits.max_logit_rows) * logit_row;
        let ropes = std::iter::once(&config.rope).chain(&config.local_rope);
        let tables = ropes.map(|rope| words(limits.max_model_len, rope.rotary_dim)).sum::<u64>()
            + words(limits.max_num_seqs, limits.max_blocks_per_seq() + 1)
            + u64::from(limits.max_upload_words()) * 4;
        MemoryTable {
            weights: weight_bytes,
            kv: u64::from(limits.num_blocks) * u64::from(limits.block_size) * config.kv_bytes_per_token(),
            scratch,
            tables,
            num_blocks: limits.num_blocks,
            block_size: limits.block_size,
            kv_bytes_per_token: config.kv_bytes_per_token(),
        }
    }

    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.scratch + self.tables
    }
}

impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blocks = format!(
            "{} blocks of {} tokens, {} a token",
            self.num_blocks,
            self.block_size,
            human_bytes(self.kv_bytes_per_token)
        );
        let tokens = u64::from(self.num_blocks) * u64::from(self.block_size);
        writeln!(f, "{:<10}{:>12}", "weights", human_bytes(self.weights))?;
        writeln!(f, "{:<10}{:>12}   {blocks}: {tokens} tokens", "KV cache", human_bytes(self.kv))?;
        writeln!(f, "{:<10}{:>12}", "scratch", human_bytes(self.scratch))?;
        writeln!(f, "{:<10}{:>12}", "tables", human_bytes(self.tables))?;
        write!(f, "{:<10}{:>12}", "total", human_bytes(self.total()))
    }
}

/// `1.5 GiB`, `93.8 MiB`, `512 B`.
pub fn human_bytes(bytes: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some(&(unit, name)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B"),
    }
}
