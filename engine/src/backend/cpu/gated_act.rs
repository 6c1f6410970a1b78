//! `activation(gate) * up`.

use super::{Memory, for_rows};
use crate::op::{Activation, GatedAct};

pub(super) fn run(op: GatedAct, memory: &mut Memory) {
    memory.write_f32(op.out, |memory, out| {
        let gate_up = memory.f32(op.gate_up);
        let cols = op.out.cols as usize;
        for_rows(out, cols, |row, out| {
            let (gate, up) = gate_up[2 * row * cols..][..2 * cols].split_at(cols);
            let inputs = gate.iter().zip(up);
            match op.activation {
                Activation::Silu => out.iter_mut().zip(inputs).for_each(|(out, (x, up))| *out = silu(*x) * up),
                Activation::GeluTanh => out.iter_mut().zip(inputs).for_each(|(out, (x, up))| *out = gelu(*x) * up),
            }
        });
    });
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x)).tanh())
}
