//! One sequence alone on the device, before the first request: what a token takes, and pipelines that are compiled.
//!
//! Invariant: nothing of it is seen later. It passes by the scheduler, the cache, the counters and the fitted prices,
//! and what it leaves in slot 0 and block 0 of the device is written again before it is read.

use std::time::Duration;

use super::{Engine, record};
use crate::backend::DeviceError;
use crate::batch::{Batch, InputToken, Logits, SequenceId, Slice, SlotId};
use crate::request::{Request, TokenId};

/// Steps that are timed, after one that is not.
const NUM_STEPS: u32 = 4;
/// No further step is timed after this long.
const MAX_TIME: Duration = Duration::from_millis(300);

impl Engine {
    /// What one decode step of one sequence takes on this device, at its best. Before the first request.
    pub fn warm_up(&mut self) -> Result<Duration, DeviceError> {
        assert!(self.stats.num_steps == 0 && self.is_idle(), "a warm-up comes before the first request");
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
        Ok(least)
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
    };
    Batch {
        slices: vec![slice],
        input: vec![InputToken::Id(TokenId(0))],
        slot_mapping: vec![0],
        table_updates: vec![(SlotId(0), 0, 0)],
        ..Batch::default()
    }
}
