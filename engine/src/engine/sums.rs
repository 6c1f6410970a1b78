//! What several engines have done together. Invariant: what is counted is added, and what is measured of the last step
//! is the longest.

use std::ops::AddAssign;

use super::{EngineStats, Part, StepParts, StepTokens};

impl AddAssign<&EngineStats> for EngineStats {
    fn add_assign(&mut self, other: &EngineStats) {
        self.num_running += other.num_running;
        self.num_waiting += other.num_waiting;
        self.num_preempted += other.num_preempted;
        self.blocks.total += other.blocks.total;
        self.blocks.referenced += other.blocks.referenced;
        self.blocks.cached += other.blocks.cached;
        self.blocks.free += other.blocks.free;
        self.unused_kv_slots += other.unused_kv_slots;
        self.num_steps += other.num_steps;
        self.prefill_tokens += other.prefill_tokens;
        self.generated_tokens += other.generated_tokens;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.num_preemptions += other.num_preemptions;
        self.num_swaps += other.num_swaps;
        self.num_swapped_blocks += other.num_swapped_blocks;
        self.grammar_bytes += other.grammar_bytes;
        self.num_aborted += other.num_aborted;
        self.num_stopped += other.num_stopped;
        self.num_length += other.num_length;
        self.num_failed += other.num_failed;
        self.num_not_finite += other.num_not_finite;
        self.num_moved += other.num_moved;
        self.num_fetched_blocks += other.num_fetched_blocks;
        self.num_missed_blocks += other.num_missed_blocks;
        self.num_device_losses += other.num_device_losses;
        self.last_step_ms = self.last_step_ms.max(other.last_step_ms);
        self.total_step_ms += other.total_step_ms;
        self.step_tokens += &other.step_tokens;
        self.step_parts += &other.step_parts;
        self.limits += &other.limits;
    }
}

impl AddAssign<&StepTokens> for StepTokens {
    fn add_assign(&mut self, other: &StepTokens) {
        self.sum += other.sum;
        self.num_steps.iter_mut().zip(other.num_steps).for_each(|(sum, more)| *sum += more);
    }
}

impl AddAssign<&StepParts> for StepParts {
    fn add_assign(&mut self, other: &StepParts) {
        let StepParts { prefill, decode, mixed, sampling, read_back } = self;
        let parts = [prefill, decode, mixed, sampling, read_back];
        let others = [other.prefill, other.decode, other.mixed, other.sampling, other.read_back];
        for (Part { num, ns, num_by_time }, other) in parts.into_iter().zip(others) {
            *num += other.num;
            *ns += other.ns;
            num_by_time.iter_mut().zip(other.num_by_time).for_each(|(sum, more)| *sum += more);
        }
    }
}
