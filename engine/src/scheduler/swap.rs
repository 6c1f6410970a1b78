//! What becomes of the KV of a preempted sequence: copied to the host where that is cheaper than to compute it again.
//! What it begins with and will be found in the prefix cache is neither copied nor priced.
//!
//! Copies are done at the begin of the step that they are planned in, one after another: a block may leave and be
//! overwritten in the same step, or come back into one that has just left. Invariant: copies are recorded in the order
//! of their planning, and wait for the next step that has something to compute.

use std::ops::Range;

use super::Scheduler;
use crate::batch::CopyDirection::{ToDevice, ToHost};
use crate::batch::{BlockCopy, CopyDirection, SlotId};
use crate::cost::StepShape;
use crate::memory::swap::{HostBlocks, SwappedTable};
use crate::memory::{BlockId, BlockTable, KvCache};

impl Scheduler {
    /// Lets preempted sequences leave to `num_host_blocks` blocks of the host, each of which takes `copy_ns` to copy.
    pub fn enable_swap(&mut self, num_host_blocks: u32, copy_ns: u64) {
        self.host = HostBlocks::new(num_host_blocks);
        self.copy_ns = copy_ns;
    }

    /// What it takes to copy a block to the host or back; 0 where preempted sequences are recomputed.
    pub fn copy_ns(&self) -> u64 {
        self.copy_ns
    }

    /// Blocks of the host that hold something.
    pub fn num_swapped_blocks(&self) -> u32 {
        self.host.num_used()
    }

    /// Whether copies are planned that are part of no batch yet.
    pub fn has_copies(&self) -> bool {
        !self.copies.is_empty()
    }

    pub fn num_swaps(&self) -> u64 {
        self.num_swaps
    }

    /// Plans copies of what the sequence in `slot` has computed and would lose, if there is room and it is worth it.
    pub(super) fn swap_out(&mut self, slot: SlotId, cache: &KvCache) -> Option<SwappedTable> {
        let num_tokens = self.sequence(slot).num_computed_tokens;
        let num_lasting = cache.num_lasting(&self.sequence(slot).table);
        let num_blocks = cache.blocks_for(num_tokens).saturating_sub(num_lasting);
        let first_token = num_lasting * cache.block_size();
        if num_blocks == 0 || !self.is_swap_cheaper(first_token..num_tokens, num_blocks) {
            return None;
        }
        let swapped = self.host.take(num_blocks, first_token..num_tokens)?;
        self.num_swaps += 1;
        let mut copies = std::mem::take(&mut self.copies);
        let blocks = self.sequence(slot).table.blocks().iter().skip(num_lasting as usize);
        let pairs = blocks.zip(swapped.blocks());
        copies.extend(pairs.map(|(&device, &host)| copy(ToHost, device, host)));
        self.copies = copies;
        Some(swapped)
    }

    /// Plans copies back into the blocks of `table` after the first `num_found`; none where what came before is gone.
    pub(super) fn swap_in(&mut self, swapped: SwappedTable, table: &BlockTable, num_found: u32, block_size: u32) {
        let num_lasting = swapped.first_token / block_size;
        if let Some(num_known) = num_found.checked_sub(num_lasting) {
            let pairs = table.blocks().iter().skip(num_lasting as usize).zip(swapped.blocks());
            let pairs = pairs.skip(num_known as usize);
            self.copies.extend(pairs.map(|(&device, &host)| copy(ToDevice, device, host)));
        }
        // Whoever gets them next is copied there later.
        self.host.give_back(swapped);
    }

    /// There and back, against computing the tokens again in one step.
    fn is_swap_cheaper(&self, tokens: Range<u32>, num_blocks: u32) -> bool {
        let again = StepShape::default().with_slice(tokens.start, tokens.end - tokens.start, 0);
        // Nearly every device copies faster than it computes; it is believed until it has been measured.
        !self.cost.is_known() || 2 * u64::from(num_blocks) * self.copy_ns < self.cost.predict_ns(&again)
    }
}

fn copy(direction: CopyDirection, device: BlockId, host: BlockId) -> BlockCopy {
    BlockCopy { direction, device_block: device.0, host_block: host.0 }
}
