//! Whole KV blocks outside of a cache, in a form that every backend reads and writes alike.
//!
//! Invariant: a block keeps its bits. Whose tokens are in it is the plan's to know.

use std::ops::Range;

use super::Model;
use crate::recording::{BufferCopy, Recording};
use crate::tensor::{DType, KvTensor, KvType, Tensor};

/// What the words of a block mean. Blocks go between caches of one layout alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub kv_type: KvType,
    pub block_size: u32,
    pub num_layers: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
}

/// Blocks as they were read from a cache.
///
/// ```text
/// words  [block][layer][K, then V][kv_head][token in block][head]   u32
/// ```
///
/// A head is as [`KvType::head_words`] says, K as rotated by its position. It is how each layer of a [`KvTensor`] has
/// its blocks too, on the cpu, on wgpu and on CUDA, whose kernels all find a head where [`KvTensor::head_at`] has it:
/// nothing is converted, and of quantised types codes and scales go as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortableBlocks {
    pub layout: KvLayout,
    pub words: Vec<u32>,
}

impl KvLayout {
    /// Words of one block: its parts, one after another.
    pub fn block_words(self) -> usize {
        self.parts_per_block() * self.part_words()
    }

    /// Of a block, the K and the V of each layer.
    pub fn parts_per_block(self) -> usize {
        2 * self.num_layers as usize
    }

    fn part_words(self) -> usize {
        KvTensor::block_bytes(self.kv_type, self.block_size, self.num_kv_heads, self.head_dim) as usize / 4
    }
}

impl Model {
    pub fn kv_layout(&self) -> KvLayout {
        KvLayout {
            kv_type: self.limits.kv_type,
            block_size: self.limits.block_size,
            num_layers: self.config.num_layers,
            num_kv_heads: self.config.num_kv_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// Has the recording bring back `blocks` of the cache, in this order, as [`PortableBlocks`] has them.
    pub fn record_reading(&self, blocks: &[u32], recording: &mut Recording) {
        let num_parts = blocks.len() * self.kv_layout().parts_per_block();
        recording.downloads.extend((0..num_parts).map(|part| self.part_of(blocks, part)));
    }

    /// Parts of blocks that one recording can write.
    pub fn max_parts_written(&self) -> usize {
        let max_words = self.limits.max_upload_words(self.config.vocab_size) as usize;
        max_words / self.kv_layout().part_words()
    }

    /// Appends the writing of some parts of `blocks`, whose words are all in `words`.
    pub fn record_writing(&self, blocks: &[u32], parts: Range<usize>, words: &[u32], recording: &mut Recording) {
        let part_words = self.kv_layout().part_words();
        for part in parts {
            let from = recording.upload(&words[part * part_words..][..part_words], part_words as u32);
            let to = self.part_of(blocks, part);
            recording.copy(BufferCopy {
                from: from.buffer,
                from_bytes: from.offset_bytes(),
                to: to.buffer,
                to_bytes: to.offset_bytes(),
                size_bytes: to.size_bytes(),
            });
        }
    }

    /// Where a part of some blocks lies, counted over all of them.
    fn part_of(&self, blocks: &[u32], part: usize) -> Tensor {
        let layout = self.kv_layout();
        let (block, part) = (blocks[part / layout.parts_per_block()], part % layout.parts_per_block());
        let layer = &self.kv[part / 2];
        assert!(block < layer.num_blocks, "block {block} of {}", layer.num_blocks);
        let buffer = if part.is_multiple_of(2) { layer.k } else { layer.v };
        let offset = u32::try_from(layer.head_at(block, 0, 0)).expect("K of a layer takes less than 16 GiB");
        Tensor { buffer, offset, rows: 1, cols: layout.part_words() as u32, dtype: DType::U32 }
    }
}
