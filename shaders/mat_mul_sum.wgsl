// The last step of a product whose spans of K went to several workgroups: their sums, in order, and the bias.
#include "grid.wgsl"

struct Params {
    partials: u32,
    bias: u32,
    out: u32,
    has_bias: u32,
    num_rows: u32,
    // N, and columns of a row of out.
    num_cols: u32,
    cols: u32,
    num_partials: u32,
    partial_stride: u32,
}
#include "params.wgsl"

// (num_partials, num_rows, num_cols)
@group(0) @binding(0) var<storage, read> partials: array<f32>;
// (1, num_cols), if has_bias
@group(0) @binding(1) var<storage, read> bias: array<f32>;
// (num_rows, cols), from the product's first column on.
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup_index(group, groups) * 64u + lane;
    if index >= params.num_rows * params.num_cols {
        return;
    }
    var sum = 0.0;
    for (var part = 0u; part < params.num_partials; part++) {
        sum += partials[params.partials + part * params.partial_stride + index];
    }
    let col = index % params.num_cols;
    if params.has_bias == 1u {
        sum += bias[params.bias + col];
    }
    out[params.out + index / params.num_cols * params.cols + col] = sum;
}
