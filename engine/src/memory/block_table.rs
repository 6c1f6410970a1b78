//! A sequence's logical blocks: which `BlockId` holds its tokens `i * block_size ..`.
//!
//! Invariant: append-only while live, so that a device needs only the new entries. A table is consumed when freed.

use crate::memory::block_pool::BlockId;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    pub(super) blocks: Vec<BlockId>,
    /// Blocks of the front that the prefix cache knows.
    pub(super) num_published: u32,
}

impl BlockTable {
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    pub fn num_blocks(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// The cache slot of the token at `position`: `block * block_size + offset`.
    pub fn slot(&self, position: u32, block_size: u32) -> u32 {
        self.blocks[(position / block_size) as usize].0 * block_size + position % block_size
    }
}
