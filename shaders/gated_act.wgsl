// `out = activation(gate) * up`; a workgroup makes up to `span` columns of a row. Rows are divided into a power of two
// of parts, so that no lane divides to find its row: software Vulkan divides integers lane by lane.
#include "grid.wgsl"

struct Params {
    gate_up: u32,
    out: u32,
    // Of out.
    rows: u32,
    cols: u32,
    parts_log2: u32,
    span: u32,
    // 0: silu, 1: gelu by the tanh approximation.
    activation: u32,
}
#include "params.wgsl"

// (tokens, 2 * cols): gate, then up.
@group(0) @binding(0) var<storage, read> gate_up: array<f32>;
// (tokens, cols)
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

// Both are v times a sigmoid: silu of v, gelu of 2y, for (1 + tanh(y)) / 2 is the sigmoid of 2y. The exponent is held
// below what overflows f32, of which some drivers make no infinity.
fn activated(v: f32) -> f32 {
    let gelu = 1.5957691216057308 * (v + 0.044715 * v * v * v);
    let exponent = select(-v, -gelu, params.activation == 1u);
    return v / (1.0 + exp(min(exponent, 80.0)));
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup_index(group, groups);
    let row = index >> params.parts_log2;
    if row >= params.rows {
        return;
    }
    let part = index & ((1u << params.parts_log2) - 1u);
    let gate = params.gate_up + row * 2u * params.cols;
    let to = params.out + row * params.cols;
    let end = min((part + 1u) * params.span, params.cols);
    for (var i = part * params.span + lane; i < end; i += 64u) {
        out[to + i] = activated(gate_up[gate + i]) * gate_up[gate + params.cols + i];
    }
}
