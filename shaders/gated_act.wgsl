// `out = activation(gate) * up`, element by element; one invocation an element.
#include "grid.wgsl"

struct Params {
    gate_up: u32,
    out: u32,
    // Of out.
    cols: u32,
    num_elements: u32,
    // 0: silu, 1: gelu by the tanh approximation.
    activation: u32,
}
#include "params.wgsl"

// (tokens, 2 * cols): gate, then up.
@group(0) @binding(0) var<storage, read> gate_up: array<f32>;
// (tokens, cols)
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

fn silu(v: f32) -> f32 {
    return v / (1.0 + exp(-v));
}

// tanh is clamped because some drivers overflow beyond; at 10 it is 1 in f32.
fn gelu_tanh(v: f32) -> f32 {
    let inner = clamp(0.7978845608028654 * (v + 0.044715 * v * v * v), -10.0, 10.0);
    return 0.5 * v * (1.0 + tanh(inner));
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    if i < params.num_elements {
        let at = params.gate_up + i + i / params.cols * params.cols;
        let g = gate_up[at];
        var activated = silu(g);
        if params.activation == 1u {
            activated = gelu_tanh(g);
        }
        out[params.out + i] = activated * gate_up[at + params.cols];
    }
}
