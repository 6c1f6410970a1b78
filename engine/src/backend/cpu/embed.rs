//! Rows of the embedding table, unpacked and scaled.

use super::Memory;
use crate::op::{Embed, NON_FINITE, SAMPLED_BY_SLOT};

pub(super) fn run(op: Embed, memory: &mut Memory) {
    memory.write_f32(op.out, |memory, out| {
        let table = &memory.weights[op.table.id.0 as usize];
        let sampled = memory.u32(op.sampled);
        for (out, &id) in out.chunks_exact_mut(table.cols).zip(memory.u32(op.ids)) {
            let id = if id & SAMPLED_BY_SLOT == 0 { id } else { sampled[(id & !SAMPLED_BY_SLOT) as usize] };
            let id = if id == NON_FINITE { 0 } else { id };
            table.unpack_row(id as usize, out);
            out.iter_mut().for_each(|value| *value *= op.scale);
        }
    });
}
