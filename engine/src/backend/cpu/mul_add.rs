//! `x = scale * x + offset`, `rounds` times, each a fused multiply-add.

use rayon::prelude::*;

use super::Memory;
use super::avx2::Avx2;
use crate::op::MulAdd;

/// Elements that a thread takes at a time: they stay in its first-level cache.
const CHUNK: usize = 96 * 32;

pub(super) fn run(op: MulAdd, memory: &mut Memory, avx2: Option<Avx2>) {
    memory.write_f32(op.x, |_, x| {
        x.par_chunks_mut(CHUNK).for_each(|x| match avx2 {
            Some(avx2) => avx2.mul_add(x, op.scale, op.offset, op.rounds),
            None => plain(x, op),
        });
    });
}

/// The reference.
fn plain(x: &mut [f32], op: MulAdd) {
    for x in x {
        *x = (0..op.rounds).fold(*x, |x, _| x.mul_add(op.scale, op.offset));
    }
}
