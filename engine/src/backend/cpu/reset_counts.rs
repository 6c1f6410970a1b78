//! A slot's counts cleared, and its sequence's tokens counted.

use super::Memory;
use crate::op::{IN_PROMPT, ResetCounts};

pub(super) fn run(op: ResetCounts, memory: &mut Memory) {
    memory.write_u32(op.counts, |memory, counts| {
        let tokens = memory.u32(op.tokens);
        for reset in memory.u32(op.resets).chunks_exact(4) {
            let [slot, begin, generated, end] = [reset[0], reset[1], reset[2], reset[3]].map(|word| word as usize);
            let counts = &mut counts[slot * op.counts.cols as usize..][..op.counts.cols as usize];
            counts.fill(0);
            tokens[begin..generated].iter().for_each(|&token| counts[token as usize] |= IN_PROMPT);
            tokens[generated..end].iter().for_each(|&token| counts[token as usize] += 1);
        }
    });
}
