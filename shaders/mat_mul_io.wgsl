// What the matmul kernels read and write, and how an output is stored: `out = x @ weight^T + bias`.
#if BITS == 16
enable f16;
#endif
#if MATRIX
enable wgpu_cooperative_matrix;
#endif
#include "grid.wgsl"

struct Params {
    x: u32,
    bias: u32,
    out: u32,
    has_bias: u32,
    // The rows of x that this dispatch covers: `first_row .. num_rows`.
    first_row: u32,
    num_rows: u32,
    // K, and its units of 32.
    inner: u32,
    num_units: u32,
    // Of a row of out.
    cols: u32,
    // The shard's part of N.
    first_col: u32,
    shard_cols: u32,
    // Workgroups beside one another on the same tile, each with its own rows.
    row_tiles: u32,
    // K is a few spans of so many units, and a workgroup sums so many of them: all, or one.
    span_units: u32,
    group_spans: u32,
    // Workgroups that share the spans of a tile, and elements from what one writes to what the next does.
    span_groups: u32,
    partial_stride: u32,
}
#include "params.wgsl"

// (rows, inner)
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<u32>;
// (1, N), if has_bias
@group(0) @binding(2) var<storage, read> bias: array<f32>;
// (rows, cols), from the product's first column on.
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
#include "weight.wgsl"

#if BITS == 16
// Held within what f16 has: a model's largest activations are beyond.
fn rounded(value: f32) -> f16 {
    return f16(clamp(value, -65504.0, 65504.0));
}
#endif

fn store(row: u32, shard_col: u32, sum: f32) {
    store_of_spans(0u, row, shard_col, sum);
}

// What a workgroup sums, of all that share the spans.
fn store_of_spans(span_group: u32, row: u32, shard_col: u32, sum: f32) {
    if row < params.num_rows && shard_col < params.shard_cols {
        let col = params.first_col + shard_col;
        var value = sum;
        if params.has_bias == 1u {
            value += bias[params.bias + col];
        }
        out[params.out + span_group * params.partial_stride + row * params.cols + col] = value;
    }
}
