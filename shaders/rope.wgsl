// Rotary position embedding, in place; one invocation a pair of elements.
#include "grid.wgsl"

struct Params {
    x: u32,
    positions: u32,
    table: u32,
    num_pairs: u32,
    // Of a row of x.
    cols: u32,
    head_dim: u32,
    half_dim: u32,
    // 0: pairs (2i, 2i + 1), 1: pairs (i, i + half_dim).
    halves: u32,
}
#include "params.wgsl"

// (tokens, cols)
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read> positions: array<u32>;
// (positions, 2 * half_dim): cosines, then sines.
@group(0) @binding(2) var<storage, read> table: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let pair = workgroup_index(group, groups) * 64u + lane;
    if pair >= params.num_pairs {
        return;
    }
    let i = pair % params.half_dim;
    let head = pair / params.half_dim;
    let token = head / (params.cols / params.head_dim);
    let angle = params.table + positions[params.positions + token] * 2u * params.half_dim + i;
    let cosine = table[angle];
    let sine = table[angle + params.half_dim];
    // Heads lie one after another, row after row.
    var a = params.x + head * params.head_dim + 2u * i;
    var b = a + 1u;
    if params.halves == 1u {
        a -= i;
        b = a + params.half_dim;
    }
    let left = x[a];
    let right = x[b];
    x[a] = left * cosine - right * sine;
    x[b] = left * sine + right * cosine;
}
