//! Bytes a block, and how many blocks a budget buys.
//!
//! Invariant: plain numbers in, plain numbers out. A model says what it takes with a [`MemoryTable`]; this file knows
//! none.

use std::fmt;

/// Where a device's memory goes (the start-up table), in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryTable {
    /// As packed by the backend.
    pub weights: u64,
    pub kv: u64,
    /// Activations of a step.
    pub scratch: u64,
    /// Block table, rope tables, upload, sampled ids, token counts.
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
    kv_bytes_per_token: u64,
    budget_bytes: u64,
    block_size: u32,
    max_model_len: u32,
) -> Result<u32, BudgetTooSmall> {
    let block_bytes = kv_bytes_per_token * u64::from(block_size);
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
