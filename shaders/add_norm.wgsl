// `x += y`, where y may go through a norm first; then `out = norm(x)`, row by row; one workgroup a row.
#include "grid.wgsl"

struct Params {
    x: u32,
    y: u32,
    post_weight: u32,
    rows: u32,
    weight: u32,
    out: u32,
    has_post: u32,
    has_rows: u32,
    // Of out.
    num_rows: u32,
    cols: u32,
    eps: f32,
    // y is the sum of so many, with so many elements from one to the next.
    num_partials: u32,
    partial_stride: u32,
}
#include "params.wgsl"

// (tokens, cols)
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
// (num_partials, tokens, cols)
@group(0) @binding(1) var<storage, read> y: array<f32>;
// (1, cols), if has_post
@group(0) @binding(2) var<storage, read> post_weight: array<f32>;
// (num_rows, 1): rows of x and y, if has_rows; else they are those of out.
@group(0) @binding(3) var<storage, read> rows: array<u32>;
// (1, cols)
@group(0) @binding(4) var<storage, read> weight: array<f32>;
// (num_rows, cols)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;
#include "sum_lanes.wgsl"

#if SPANS
// The product before this has left its last step to it: `mat_mul_sum.wgsl`.
fn y_at(index: u32) -> f32 {
    var sum = 0.0;
    for (var part = 0u; part < params.num_partials; part++) {
        sum += y[index + part * params.partial_stride];
    }
    return sum;
}
#else
fn y_at(index: u32) -> f32 {
    return y[index];
}
#endif

fn norm_scale(squares: f32, place: Place) -> f32 {
    return 1.0 / sqrt(sum_lanes(squares, place) / f32(params.cols) + params.eps);
}

// x at `index` and `y`, which it is from now on if it is `there`; their square goes to `sum`.
fn added(index: u32, y: f32, there: bool, sum: f32) -> f32 {
    let value = select(0.0, x[index] + y, there);
    if there {
        x[index] = value;
    }
    return fma(value, value, sum);
}

@compute @workgroup_size({{ROW_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    place: Place,
) {
    let lane = place.lane;
    let index = workgroup_index(group, groups);
    if index >= params.num_rows {
        return;
    }
    var row = index;
    if params.has_rows == 1u {
        row = rows[params.rows + index];
    }
    let x_row = params.x + row * params.cols;
    let y_row = params.y + row * params.cols;
    let last = params.cols - 1u;
    var sum = 0.0;
    if params.has_post == 1u {
        for (var first = 0u; first < params.cols; first += {{ROW_LANES}}u) {
            let i = first + lane;
            let value = select(0.0, y_at(y_row + min(i, last)), i < params.cols);
            sum = fma(value, value, sum);
        }
        let scale = norm_scale(sum, place);
        sum = 0.0;
        for (var first = 0u; first < params.cols; first += {{ROW_LANES}}u) {
            let at = min(first + lane, last);
            let post = post_weight[params.post_weight + at];
            sum = added(x_row + at, y_at(y_row + at) * scale * post, first + lane < params.cols, sum);
        }
    } else {
        for (var first = 0u; first < params.cols; first += {{ROW_LANES}}u) {
            let at = min(first + lane, last);
            sum = added(x_row + at, y_at(y_row + at), first + lane < params.cols, sum);
        }
    }
    let scale = norm_scale(sum, place);
    // A lane reads what it has written itself.
    let to = params.out + index * params.cols;
    for (var i = lane; i < params.cols; i += {{ROW_LANES}}u) {
        out[to + i] = x[x_row + i] * scale * weight[params.weight + i];
    }
}
