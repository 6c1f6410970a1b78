//! Rotates pairs of a head's elements by their position's angles, in place.

use super::{Memory, for_rows};
use crate::op::{Rope, RopeStyle};

pub(super) fn run(op: Rope, memory: &mut Memory) {
    memory.write_f32(op.x, |memory, x| {
        let (positions, table) = (memory.u32(op.positions), memory.f32(op.table));
        let rotary_dim = op.table.cols as usize;
        for_rows(x, op.x.cols as usize, |row, x| {
            let (cos, sin) = table[positions[row] as usize * rotary_dim..][..rotary_dim].split_at(rotary_dim / 2);
            for head in x.chunks_exact_mut(op.head_dim as usize) {
                rotate(head, cos, sin, op.style);
            }
        });
    });
}

fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], style: RopeStyle) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = match style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Halves => (i, i + half),
        };
        let (x, y) = (head[a], head[b]);
        head[a] = x * cos[i] - y * sin[i];
        head[b] = x * sin[i] + y * cos[i];
    }
}
