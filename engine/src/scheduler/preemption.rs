//! Who goes back to the queue, and for whom.
//!
//! For memory: of the tenant that is furthest above its share, what comes last by priority, the newest. For fairness:
//! a waiting sequence of a tenant below its share takes the place of one of a tenant above, which must have advanced by
//! a block since it was admitted, so that nobody is sent back and forth without progress. For priority: only within a
//! tenant.

use super::{Budget, Scheduler, StepTrace};
use crate::batch::SlotId;
use crate::memory::KvCache;
use crate::queue::TenantIndex;
use crate::sequence::Sequence;

impl Scheduler {
    /// The running sequence that frees its blocks when they run out.
    pub(super) fn memory_victim(&self) -> SlotId {
        let rank = |&slot: &SlotId| self.rank_of_victim(self.sequence(slot));
        self.order.iter().copied().max_by_key(rank).expect("a sequence that needs blocks is running")
    }

    /// The running sequence whose place a waiting one of `tenant` and `priority` may take, of those that free enough.
    pub(super) fn fair_victim(
        &self,
        tenant: TenantIndex,
        priority: i32,
        frees_enough: impl Fn(&Sequence) -> bool,
    ) -> Option<SlotId> {
        let is_below_share = self.is_below_share(tenant);
        let gives_way = |slot: &SlotId| {
            let sequence = self.sequence(*slot);
            if !frees_enough(sequence) {
                return false;
            }
            if sequence.tenant == tenant {
                return sequence.request.priority > priority;
            }
            let advanced = sequence.num_computed_tokens - sequence.num_admitted_tokens >= self.config.block_size;
            let is_above_share = self.queue.above_share(sequence.tenant, self.num_at_once()) > 0;
            let got_more = self.queue.counter(sequence.tenant) >= self.queue.counter(tenant);
            is_below_share && advanced && is_above_share && got_more
        };
        let rank = |&slot: &SlotId| self.rank_of_victim(self.sequence(slot));
        self.order.iter().copied().filter(gives_way).max_by_key(rank)
    }

    pub(super) fn is_below_share(&self, tenant: TenantIndex) -> bool {
        self.queue.above_share(tenant, self.num_at_once()) < 0
    }

    /// Sequences that run at once where as many run as can: slots bound them, or memory as it does now.
    fn num_at_once(&self) -> u32 {
        self.config.max_num_seqs.min(self.num_running() + 1)
    }

    /// Sends a running sequence back to the queue. What it computed is copied to the host, or computed again from what
    /// the prefix cache keeps of it.
    pub(super) fn preempt(&mut self, slot: SlotId, cache: &mut KvCache, budget: &mut Budget, trace: &mut StepTrace) {
        if let Some(index) = self.plan.iter().position(|planned| planned.slot == slot) {
            let planned = self.plan.remove(index);
            budget.give_back(self.sequence(slot), planned);
        }
        let swapped = self.swap_out(slot, cache);
        let mut victim = self.leave(slot, cache, true);
        victim.swapped = swapped;
        trace.admitted.retain(|&(id, _)| id != victim.id);
        trace.preempted.push(victim.id);
        self.num_preemptions += 1;
        victim.num_preemptions += 1;
        victim.num_computed_tokens = 0;
        victim.num_uploaded_blocks = 0;
        self.queue.push_preempted(victim);
    }

    fn rank_of_victim(&self, sequence: &Sequence) -> impl Ord + use<> {
        let above_share = self.queue.above_share(sequence.tenant, self.num_at_once());
        (above_share, sequence.request.priority, sequence.id)
    }
}
