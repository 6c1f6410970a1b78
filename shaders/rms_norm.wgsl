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
    let last = params.cols - 1u;
    var sum = 0.0;
    // ROW_STEPS columns are loaded together, so that one wait serves them all.
    for (var first = 0u; first < params.cols; first += {{ROW_STEPS}}u * {{ROW_LANES}}u) {
#for S ROW_STEPS
        let i_{{S}} = first + {{S}}u * {{ROW_LANES}}u + lane;
        let x_{{S}} = x[start + min(i_{{S}}, last)];
#endfor
#for S ROW_STEPS
        let value_{{S}} = select(0.0, x_{{S}}, i_{{S}} < params.cols);
        sum = fma(value_{{S}}, value_{{S}}, sum);
#endfor
    }
    let scale = 1.0 / sqrt(sum_lanes(sum, place) / f32(params.cols) + params.eps);
    let to = params.out + row * params.cols;
    for (var i = lane; i < params.cols; i += {{ROW_STEPS}}u * {{ROW_LANES}}u) {
#for S ROW_STEPS
        let at_{{S}} = min(i + {{S}}u * {{ROW_LANES}}u, last);
        let x_{{S}} = x[start + at_{{S}}];
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
