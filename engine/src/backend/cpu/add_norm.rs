//! `x += y`, where y may go through a norm first; then the norm of x.

use super::{Memory, for_rows, rms_norm};
use crate::op::AddNorm;

pub(super) fn run(op: AddNorm, memory: &mut Memory) {
    let cols = op.x.cols as usize;
    memory.write_f32(op.x, |memory, x| {
        let (y, post_weight) = (memory.f32(op.y), op.post_weight.map(|weight| memory.f32(weight)));
        let add = |row: usize, x: &mut [f32]| add(&y[row * cols..][..cols], post_weight, op.eps, x);
        match op.rows {
            None => for_rows(x, cols, add),
            Some(rows) => {
                memory.u32(rows).iter().for_each(|&row| add(row as usize, &mut x[row as usize * cols..][..cols]))
            }
        }
    });
    memory.write_f32(op.out, |memory, out| {
        let (x, weight, rows) = (memory.f32(op.x), memory.f32(op.weight), op.rows.map(|rows| memory.u32(rows)));
        for_rows(out, cols, |index, out| {
            let row = rows.map_or(index, |rows| rows[index] as usize);
            rms_norm::norm(&x[row * cols..][..cols], weight, op.eps, out);
        });
    });
}

fn add(y: &[f32], post_weight: Option<&[f32]>, eps: f32, x: &mut [f32]) {
    match post_weight {
        None => x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
        Some(weight) => {
            let scale = rms_norm::scale(y, eps);
            x.iter_mut().zip(y).zip(weight).for_each(|((x, y), weight)| *x += y * scale * weight);
        }
    }
}
