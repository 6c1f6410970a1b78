//! Bytes a block, and how many blocks a budget buys.
//!
//! Invariant: plain numbers in, plain numbers out. A model says what it takes with a [`MemoryTable`]; this file knows
//! none.

use std::fmt;

use crate::tensor::KvType;

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
    pub kv_type: KvType,
    /// Swapped blocks, in the host's memory: no part of the total.
    pub swap: u64,
    pub num_blocks: u32,
    pub num_host_blocks: u32,
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

/// Whole blocks that `swap_bytes` of the host's memory hold.
pub fn num_host_blocks(kv_bytes_per_token: u64, swap_bytes: u64, block_size: u32) -> u32 {
    let block_bytes = kv_bytes_per_token * u64::from(block_size);
    u32::try_from(swap_bytes / block_bytes).unwrap_or(u32::MAX).min(u32::MAX / block_size)
}

impl MemoryTable {
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.scratch + self.tables
    }
}

impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blocks = format!(
            "{}, {} blocks of {} tokens, {} a token",
            self.kv_type.name(),
            self.num_blocks,
            self.block_size,
            human_bytes(self.kv_bytes_per_token)
        );
        let tokens = u64::from(self.num_blocks) * u64::from(self.block_size);
        writeln!(f, "{:<10}{:>12}", "weights", human_bytes(self.weights))?;
        writeln!(f, "{:<10}{:>12}   {blocks}: {tokens} tokens", "KV cache", human_bytes(self.kv))?;
        writeln!(f, "{:<10}{:>12}", "scratch", human_bytes(self.scratch))?;
        writeln!(f, "{:<10}{:>12}", "tables", human_bytes(self.tables))?;
        write!(f, "{:<10}{:>12}", "total", human_bytes(self.total()))?;
        match self.num_host_blocks {
            0 => Ok(()),
            blocks => write!(f, "\n{:<10}{:>12}   of the host, {blocks} blocks", "swap", human_bytes(self.swap)),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelConfig;

    #[test]
    fn a_quantised_cache_buys_more_blocks() {
        for head_dim in [64, 128, 256] {
            let model = ModelConfig { head_dim, num_kv_heads: 8, num_layers: 32, ..ModelConfig::tiny(1024, 32) };
            let blocks = |kv_type| num_blocks(model.kv_bytes_per_token(kv_type), 4 << 30, 32, 2048).expect("4 GiB");
            let ratio = |kv_type| f64::from(blocks(kv_type)) / f64::from(blocks(KvType::F16));
            assert!(ratio(KvType::Q8_0) >= 1.85, "{} at heads of {head_dim}", ratio(KvType::Q8_0));
            assert!(ratio(KvType::Q4_0) >= 3.5, "{} at heads of {head_dim}", ratio(KvType::Q4_0));
        }
    }

    #[test]
    fn too_small_a_budget_is_refused_with_the_numbers() {
        let error = num_blocks(1024, 100 * 1024, 32, 2048).expect_err("3 blocks").to_string();
        assert!(error.contains("hold 3 blocks of 32 tokens") && error.contains("2.0 MiB"), "{error}");
    }
}
