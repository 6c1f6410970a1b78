// `out[i] = x[rows[i]]`; one invocation an element.
#include "grid.wgsl"

struct Params {
    x: u32,
    rows: u32,
    out: u32,
    cols: u32,
    num_elements: u32,
}
#include "params.wgsl"

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> rows: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    if i < params.num_elements {
        let row = rows[params.rows + i / params.cols];
        out[params.out + i] = x[params.x + row * params.cols + i % params.cols];
    }
}
