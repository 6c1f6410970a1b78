//! `x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019).

use super::{Memory, for_rows};
use crate::op::RmsNorm;

pub(super) fn run(op: RmsNorm, memory: &mut Memory) {
    memory.write_f32(op.out, |memory, out| {
        let (x, weight) = (memory.f32(op.x), memory.f32(op.weight));
        for_rows(out, weight.len(), |row, out| norm(&x[row * weight.len()..][..weight.len()], weight, op.eps, out));
    });
}

pub(super) fn norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = scale(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
pub(super) fn scale(x: &[f32], eps: f32) -> f32 {
    // Eight sums at a time: a fixed order that fits any vector width.
    let mut sums = [0.0f32; 8];
    for part in x.chunks(8) {
        part.iter().zip(&mut sums).for_each(|(x, sum)| *sum += x * x);
    }
    let mean = sums.iter().sum::<f32>() / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}
