//! `x += y`.

use super::Memory;
use crate::op::Add;

pub(super) fn run(op: Add, memory: &mut Memory) {
    memory.write_f32(op.x, |memory, x| {
        x.iter_mut().zip(memory.f32(op.y)).for_each(|(x, y)| *x += y);
    });
}
