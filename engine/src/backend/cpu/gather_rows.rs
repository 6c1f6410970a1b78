//! `out[i] = x[rows[i]]`.

use super::{Memory, for_rows};
use crate::op::GatherRows;

pub(super) fn run(op: GatherRows, memory: &mut Memory) {
    memory.write_f32(op.out, |memory, out| {
        let (x, rows, cols) = (memory.f32(op.x), memory.u32(op.rows), op.x.cols as usize);
        for_rows(out, cols, |i, out| out.copy_from_slice(&x[rows[i] as usize * cols..][..cols]));
    });
}
