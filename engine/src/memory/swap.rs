//! Blocks in the host's memory: what a preempted sequence had computed, kept until it runs again.
//!
//! Invariant: a host block is held by one swapped table or by none. Nothing here moves bytes: what is to be copied is
//! the caller's to record, in the order in which blocks are handed out here.

use std::ops::Range;

use crate::memory::block_pool::{BlockId, BlockPool};

#[derive(Debug)]
pub struct HostBlocks {
    pool: BlockPool,
}

/// The blocks of a sequence that left the device.
#[derive(Debug, PartialEq, Eq)]
pub struct SwappedTable {
    blocks: Vec<BlockId>,
    /// Of its tokens the first whose K and V are in them, at the begin of a block; those before are in other tables.
    pub first_token: u32,
    /// Tokens up to the last of them.
    pub num_tokens: u32,
}

impl HostBlocks {
    pub fn new(num_blocks: u32) -> HostBlocks {
        HostBlocks { pool: BlockPool::new(num_blocks) }
    }

    pub fn num_free(&self) -> u32 {
        self.pool.num_free()
    }

    pub fn num_used(&self) -> u32 {
        self.pool.num_blocks() - self.pool.num_free()
    }

    /// Room for `num_blocks` blocks with these tokens of a sequence; `None` where there is too little.
    pub fn take(&mut self, num_blocks: u32, tokens: Range<u32>) -> Option<SwappedTable> {
        if num_blocks > self.pool.num_free() {
            return None;
        }
        let blocks = (0..num_blocks).map(|_| self.pool.alloc().expect("counted above")).collect();
        Some(SwappedTable { blocks, first_token: tokens.start, num_tokens: tokens.end })
    }

    pub fn give_back(&mut self, table: SwappedTable) {
        table.blocks.iter().for_each(|&block| self.pool.release(block, false));
    }

    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a SwappedTable>) {
        self.pool.check();
        let num_held: usize = tables.map(|table| table.blocks.len()).sum();
        assert_eq!(num_held as u32, self.num_used(), "host blocks leaked, or are held twice");
    }
}

impl SwappedTable {
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
}
