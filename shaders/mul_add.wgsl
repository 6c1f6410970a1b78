// `x = scale * x + offset`, `rounds` times; an invocation takes 16 elements, 64 apart, so that as many chains run side
// by side.
#include "grid.wgsl"

struct Params {
    x: u32,
    num_elements: u32,
    scale: f32,
    offset: f32,
    // Eights of rounds.
    num_eights: u32,
}
#include "params.wgsl"

@group(0) @binding(0) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = workgroup_index(group, groups) * 1024u + lane;
    if first >= params.num_elements {
        return;
    }
    let last = params.num_elements - 1u;
#for I 16
    var x_{{I}} = x[params.x + min(first + {{I}}u * 64u, last)];
#endfor
    for (var eight = 0u; eight < params.num_eights; eight++) {
#for R 8
#for I 16
        x_{{I}} = fma(x_{{I}}, params.scale, params.offset);
#endfor
#endfor
    }
#for I 16
    if first + {{I}}u * 64u <= last {
        x[params.x + first + {{I}}u * 64u] = x_{{I}};
    }
#endfor
}
