//! The index of the largest logit of each row, into the slot's place.

use super::Memory;
use crate::op::{ArgMax, NON_FINITE};

pub(super) fn run(op: ArgMax, memory: &mut Memory) {
    memory.write_u32(op.sampled, |memory, sampled| {
        let rows = memory.f32(op.logits).chunks_exact(op.logits.cols as usize);
        for (row, &slot) in rows.zip(memory.u32(op.slots)) {
            if slot != u32::MAX {
                sampled[slot as usize] = arg_max(row);
            }
        }
    });
}

fn arg_max(row: &[f32]) -> u32 {
    // A finite value times 0 is 0; NaN and the infinities are not.
    if row.iter().map(|value| value * 0.0).sum::<f32>() != 0.0 {
        return NON_FINITE;
    }
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}
