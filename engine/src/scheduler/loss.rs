//! What is left of the plan when the device is gone, and with it all K and V.
//!
//! Invariant: afterwards nothing points at what was computed: no table, no prefix, no block of the host, no copy.

use super::Scheduler;
use crate::batch::SequenceId;
use crate::memory::KvCache;
use crate::request::Usage;

impl Scheduler {
    /// Ends whoever runs, or waits for a token that the device alone knew, and returns what each of them used. Whoever
    /// else waits, preempted ones included, keeps its place and is computed from its first token on.
    pub fn lose_device(&mut self, cache: &mut KvCache) -> Vec<(SequenceId, Usage)> {
        let pending = self.queue.iter().filter(|sequence| sequence.num_pending > 0);
        let lost: Vec<SequenceId> = self.running().chain(pending).map(|sequence| sequence.id).collect();
        let end = |id| (id, self.abort(cache, id).expect("it runs or waits"));
        let ended = lost.into_iter().map(end).collect();
        for sequence in self.queue.iter_mut() {
            sequence.swapped.take().into_iter().for_each(|swapped| self.host.give_back(swapped));
        }
        self.copies.clear();
        self.blocked = None;
        cache.forget_all();
        ended
    }
}
