// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row; one workgroup a row.
#include "grid.wgsl"

struct Params {
    x: u32,
    weight: u32,
    out: u32,
    rows: u32,
    cols: u32,
    eps: f32,
}
#include "params.wgsl"

// (rows, cols)
@group(0) @binding(0) var<storage, read> x: array<f32>;
// (1, cols)
@group(0) @binding(1) var<storage, read> weight: array<f32>;
// (rows, cols)
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
#include "sum_lanes.wgsl"

@compute @workgroup_size({{ROW_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    place: Place,
) {
    let lane = place.lane;
    let row = workgroup_index(group, groups);
    if row >= params.rows {
        return;
    }
    let start = params.x + row * params.cols;
    var sum = 0.0;
    for (var first = 0u; first < params.cols; first += {{ROW_LANES}}u) {
        let i = first + lane;
        let value = select(0.0, x[start + min(i, params.cols - 1u)], i < params.cols);
        sum = fma(value, value, sum);
    }
    let scale = 1.0 / sqrt(sum_lanes(sum, place) / f32(params.cols) + params.eps);
    let to = params.out + row * params.cols;
    for (var i = lane; i < params.cols; i += {{ROW_LANES}}u) {
        out[to + i] = x[start + i] * scale * weight[params.weight + i];
    }
}
