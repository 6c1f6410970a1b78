//! Before the first request, and again after a loss: what a copy of a block takes, and a token of one sequence alone,
//! which compiles pipelines.
//!
//! Invariant: nothing of it is seen later. It passes by the cache, the counters and the fitted prices, and what it
//! leaves in slot 0 and in blocks of the device is written again before it is read.

use std::time::Duration;

use super::{Engine, record};
use crate::backend::{DeviceError, LoadTimes};
use crate::batch::{Batch, BlockCopy, CopyDirection, InputToken, Logits, SequenceId, Slice, SlotId};
use crate::request::{Request, TokenId};

/// Steps that are timed, after one that is not.
const NUM_STEPS: u32 = 4;
/// No further step is timed after this long.
const MAX_TIME: Duration = Duration::from_millis(300);

/// Blocks that are copied there and back to see what a copy takes.
const MEASURED_BLOCKS: u32 = 8;

impl Engine {
    /// Measures what it takes to copy blocks to the host and back, and has preempted sequences leave there from now on
    /// where that is cheaper than to compute them again. While nothing runs: it writes blocks.
    pub fn enable_swap(&mut self) -> Result<(), DeviceError> {
        let num_host_blocks = self.model.num_host_blocks();
        let num_blocks = num_host_blocks.min(self.config.num_blocks).min(MEASURED_BLOCKS);
        if num_blocks == 0 {
            return Ok(());
        }
        assert!(self.scheduler.num_running() == 0 && self.in_flight.is_empty(), "blocks are in use");
        let copy = |direction, block| BlockCopy { direction, device_block: block, host_block: block };
        let there = (0..num_blocks).map(|block| copy(CopyDirection::ToHost, block));
        let back = (0..num_blocks).map(|block| copy(CopyDirection::ToDevice, block));
        let copies: Vec<BlockCopy> = there.chain(back).collect();
        let mut least = Duration::MAX;
        // The first touches memory that nothing has touched before.
        for _ in 0..3 {
            self.recording.clear();
            self.model.record_copies(&copies, &mut self.recording);
            let begun = self.backend.now();
            let ticket = self.backend.submit(&self.recording)?;
            self.downloads.clear();
            self.backend.wait(ticket, &mut self.downloads)?;
            least = least.min(self.backend.now() - begun);
        }
        self.scheduler.enable_swap(num_host_blocks, least.as_nanos() as u64 / u64::from(2 * num_blocks));
        Ok(())
    }

    /// Lets the device keep what makes the next start faster, and says what loading took since this was asked last.
    pub fn settle(&mut self) -> LoadTimes {
        self.backend.settle()
    }

    /// What one decode step of one sequence takes on this device, at its best. While nothing is on it.
    pub fn warm_up(&mut self) -> Result<Duration, DeviceError> {
        let is_clean = self.cache.counts().free == self.cache.counts().total;
        assert!(is_clean && self.in_flight.is_empty(), "a warm-up writes a block");
        let request = Request { prompt: vec![TokenId(0)], max_tokens: 1, ..Request::default() };
        let batch = single_token();
        let mut least = Duration::MAX;
        let mut timed = Duration::ZERO;
        for nth in 0..=NUM_STEPS {
            let begun = self.backend.now();
            record(&batch, |_| Some(&request), &self.model, &mut self.packed, &mut self.recording);
            let ticket = self.backend.submit(&self.recording)?;
            self.downloads.clear();
            self.backend.wait(ticket, &mut self.downloads)?;
            let elapsed = self.backend.now() - begun;
            if nth > 0 {
                least = least.min(elapsed);
                timed += elapsed;
            }
            if timed > MAX_TIME {
                break;
            }
        }
        self.device_free_at = self.backend.now();
        self.alone = least;
        Ok(least)
    }

    /// What that took when it was tried last; nothing where it was not.
    pub fn alone(&self) -> Duration {
        self.alone
    }
}

/// A token at position 0 in slot 0, from which the next is chosen.
fn single_token() -> Batch {
    let slice = Slice {
        sequence: SequenceId(0),
        slot: SlotId(0),
        start: 0,
        tokens: 0..1,
        logits: Logits::Last,
        sample: true,
        logprobs: None,
        num_targets: 0,
        prompt_logprobs: 0,
        pooled: false,
    };
    Batch {
        slices: vec![slice],
        input: vec![InputToken::Id(TokenId(0))],
        slot_mapping: vec![0],
        table_updates: vec![(SlotId(0), 0, 0)],
        ..Batch::default()
    }
}
