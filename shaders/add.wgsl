// `x += y`, element by element; one invocation an element.
#include "grid.wgsl"

struct Params {
    x: u32,
    y: u32,
    num_elements: u32,
}
#include "params.wgsl"

@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read> y: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    if i < params.num_elements {
        x[params.x + i] += y[params.y + i];
    }
}
