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

fn norm_scale(squares: f32, place: Place) -> f32 {
    return 1.0 / sqrt(sum_lanes(squares, place) / f32(params.cols) + params.eps);
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
    // ROW_STEPS columns are loaded together, so that one wait serves them all; then they are added and stored in order.
    if params.has_post == 1u {
        for (var first = 0u; first < params.cols; first += {{ROW_STEPS}}u * {{ROW_LANES}}u) {
#include "add_norm_y.wgsl"
#for S ROW_STEPS
            let value_{{S}} = select(0.0, y_{{S}}, i_{{S}} < params.cols);
            sum = fma(value_{{S}}, value_{{S}}, sum);
#endfor
        }
        let scale = norm_scale(sum, place);
        sum = 0.0;
        for (var first = 0u; first < params.cols; first += {{ROW_STEPS}}u * {{ROW_LANES}}u) {
#for S ROW_STEPS
            let x_at_{{S}} = min(first + {{S}}u * {{ROW_LANES}}u + lane, last);
            let x_{{S}} = x[x_row + x_at_{{S}}];
            let post_{{S}} = post_weight[params.post_weight + x_at_{{S}}];
#endfor
#include "add_norm_y.wgsl"
#for S ROW_STEPS
            let value_{{S}} = select(0.0, x_{{S}} + y_{{S}} * scale * post_{{S}}, i_{{S}} < params.cols);
            sum = fma(value_{{S}}, value_{{S}}, sum);
            if i_{{S}} < params.cols {
                x[x_row + at_{{S}}] = value_{{S}};
            }
#endfor
        }
    } else {
        for (var first = 0u; first < params.cols; first += {{ROW_STEPS}}u * {{ROW_LANES}}u) {
#for S ROW_STEPS
            let x_{{S}} = x[x_row + min(first + {{S}}u * {{ROW_LANES}}u + lane, last)];
#endfor
#include "add_norm_y.wgsl"
#for S ROW_STEPS
            let value_{{S}} = select(0.0, x_{{S}} + y_{{S}}, i_{{S}} < params.cols);
            sum = fma(value_{{S}}, value_{{S}}, sum);
            if i_{{S}} < params.cols {
                x[x_row + at_{{S}}] = value_{{S}};
            }
#endfor
        }
    }
    let scale = norm_scale(sum, place);
    // A lane reads what it has written itself.
    let to = params.out + index * params.cols;
    for (var i = lane; i < params.cols; i += {{ROW_STEPS}}u * {{ROW_LANES}}u) {
#for S ROW_STEPS
        let at_{{S}} = min(i + {{S}}u * {{ROW_LANES}}u, last);
        let x_{{S}} = x[x_row + at_{{S}}];
        let weight_{{S}} = weight[params.weight + at_{{S}}];
#endfor
#for S ROW_STEPS
#if S > 0
        if i + {{S}}u * {{ROW_LANES}}u < params.cols
#endif
        {
            out[to + at_{{S}}] = x_{{S}} * scale * weight_{{S}};
        }
#endfor
    }
}
