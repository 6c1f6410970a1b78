//! `out[i] = x[rows[i]]`.

use super::Memory;
use crate::op::GatherRows;

pub(super) fn run(op: GatherRows, memory: &mut Memory) {
    memory.write_f32(op.out, |memory, out| {
        let (x, cols) = (memory.f32(op.x), op.x.cols as usize);
        for (out, &row) in out.chunks_exact_mut(cols).zip(memory.u32(op.rows)) {
            out.copy_from_slice(&x[row as usize * cols..][..cols]);
        }
    });
}
