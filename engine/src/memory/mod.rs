//! The paged memory manager: who owns which KV blocks.
//!
//! Invariants, asserted by [`KvCache::check`]: free + referenced = total; a block's reference count is the number of
//! tables that hold it; only published (full) blocks are in more than one table. Nothing here knows a device.

use std::collections::HashMap;

use crate::request::TokenId;

pub mod block_pool;
pub mod block_table;
pub mod capacity;
pub mod prefix_cache;

pub use block_pool::{BlockId, BlockPool};
pub use block_table::BlockTable;
use prefix_cache::PrefixCache;

/// Too few free blocks: an ordinary branch of the scheduler, never an error to a running request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBlocks;

#[derive(Debug)]
pub struct KvCache {
    block_size: u32,
    pool: BlockPool,
    /// `None` where the user switched it off.
    prefixes: Option<PrefixCache>,
    /// Blocks that the prefix cache knows and nobody references.
    num_cached: u32,
}

/// Blocks of a pool by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    pub total: u32,
    /// In some sequence's table.
    pub referenced: u32,
    /// Unreferenced, and findable by later requests until evicted.
    pub cached: u32,
    /// Neither.
    pub free: u32,
}

impl KvCache {
    /// `hash_key` is drawn by the caller at start; `None` switches the prefix cache off.
    pub fn new(num_blocks: u32, block_size: u32, hash_key: Option<(u64, u64)>) -> KvCache {
        assert!(block_size > 0);
        KvCache {
            block_size,
            pool: BlockPool::new(num_blocks),
            prefixes: hash_key.map(PrefixCache::new),
            num_cached: 0,
        }
    }

    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    pub fn num_blocks(&self) -> u32 {
        self.pool.num_blocks()
    }

    pub fn blocks_for(&self, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.block_size)
    }

    /// Blocks that could be handed out now, cached ones included.
    pub fn num_available(&self) -> u32 {
        self.pool.num_free()
    }

    pub fn counts(&self) -> BlockCounts {
        let total = self.pool.num_blocks();
        let num_free = self.pool.num_free();
        BlockCounts { total, referenced: total - num_free, cached: self.num_cached, free: num_free - self.num_cached }
    }

    /// A table that holds, referenced, the longest cached prefix of `tokens` in full blocks, at most `max_tokens` long.
    ///
    /// ```text
    /// [0, n)            cached blocks, shared, n = table.num_blocks() * block_size
    /// [n, tokens.len()) to be computed; grow() gives it blocks
    /// ```
    pub fn open(&mut self, tokens: &[TokenId], salt: u64, max_tokens: u32) -> BlockTable {
        let mut table = BlockTable::default();
        let Some(prefixes) = &self.prefixes else { return table };
        table.parent = prefixes.root(salt);
        let usable = &tokens[..tokens.len().min(max_tokens as usize)];
        for chunk in usable.chunks_exact(self.block_size as usize) {
            let Some((block, hash)) = prefixes.find(table.parent, chunk) else { break };
            self.num_cached -= u32::from(self.pool.references(block) == 0);
            self.pool.reference(block);
            table.blocks.push(block);
            table.parent = hash.0;
            table.num_published += 1;
        }
        table
    }

    /// Gives `table` blocks for `num_tokens` tokens in all: all of them or none.
    pub fn grow(&mut self, table: &mut BlockTable, num_tokens: u32) -> Result<(), OutOfBlocks> {
        let needed = self.blocks_for(num_tokens).saturating_sub(table.num_blocks());
        if needed > self.pool.num_free() {
            return Err(OutOfBlocks);
        }
        for _ in 0..needed {
            let block = self.pool.alloc().expect("counted above");
            if let Some(prefixes) = &mut self.prefixes {
                self.num_cached -= u32::from(prefixes.evict(block));
            }
            table.blocks.push(block);
        }
        Ok(())
    }

    /// Makes the blocks of `table` that `tokens`, all computed, fill findable by later requests.
    /// O(blocks that became full since the last call).
    pub fn publish(&mut self, table: &mut BlockTable, tokens: &[TokenId]) {
        let Some(prefixes) = &mut self.prefixes else { return };
        let block_size = self.block_size as usize;
        let first = table.num_published as usize;
        for (index, chunk) in tokens.chunks_exact(block_size).enumerate().skip(first) {
            table.parent = prefixes.insert(table.parent, chunk, table.blocks[index]).0;
            table.num_published += 1;
        }
    }

    /// Returns the table's blocks; published ones stay findable until they are handed out again.
    pub fn free(&mut self, table: BlockTable) {
        for &block in table.blocks.iter().rev() {
            let cached = self.prefixes.as_ref().is_some_and(|prefixes| prefixes.contains(block));
            self.pool.release(block, cached);
            self.num_cached += u32::from(cached && self.pool.references(block) == 0);
        }
    }

    /// Asserts every invariant; `tables` are all tables there are. O(blocks).
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        self.pool.check();
        if let Some(prefixes) = &self.prefixes {
            prefixes.check();
        }
        let mut holders: HashMap<BlockId, u32> = HashMap::new();
        for table in tables {
            for (index, &block) in table.blocks.iter().enumerate() {
                *holders.entry(block).or_default() += 1;
                let shared = self.pool.references(block) > 1;
                assert!(!shared || (index as u32) < table.num_published, "block {} is shared but not full", block.0);
            }
        }
        for block in (0..self.num_blocks()).map(BlockId) {
            let expected = holders.get(&block).copied().unwrap_or(0);
            assert_eq!(self.pool.references(block), expected, "block {} has a wrong reference count", block.0);
        }
        let unreferenced = |block: &BlockId| self.pool.references(*block) == 0;
        let num_cached = self.prefixes.iter().flat_map(PrefixCache::blocks).filter(unreferenced).count();
        assert_eq!(num_cached as u32, self.num_cached);
        let counts = self.counts();
        assert_eq!(counts.free + counts.cached + counts.referenced, counts.total);
    }
}
