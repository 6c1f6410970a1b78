// `x = x + offset`, `rounds` times, on matrix units: a matrix with `offset` on its diagonal times one of ones is added
// to x, which is taken as matrices of SIZE x SIZE. A subgroup takes four, so that as many chains run side by side.
enable f16;
enable wgpu_cooperative_matrix;
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

var<workgroup> diagonal: array<f16, {{SIZE}} * {{SIZE}}>;
var<workgroup> ones: array<f16, {{SIZE}} * {{SIZE}}>;

@compute @workgroup_size({{GROUP_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    for (var i = local; i < {{SIZE}}u * {{SIZE}}u; i += {{GROUP_LANES}}u) {
        diagonal[i] = select(0.0h, f16(params.offset), i / {{SIZE}}u == i % {{SIZE}}u);
        ones[i] = 1.0h;
    }
    workgroupBarrier();
    // All matrices are whole, and as many as whole workgroups take.
    let first = params.x + (workgroup_index(group, groups) * {{SUBGROUPS}}u + subgroup) * 4u * {{SIZE}}u * {{SIZE}}u;
    let a = coopLoadT<coop_mat{{SIZE}}x{{SIZE}}<f16, A>>(&diagonal[0], {{SIZE}}u);
    let b = coopLoadT<coop_mat{{SIZE}}x{{SIZE}}<f16, B>>(&ones[0], {{SIZE}}u);
#for I 4
    var x_{{I}} = coopLoadT<coop_mat{{SIZE}}x{{SIZE}}<f32, C>>(&x[first + {{I}}u * {{SIZE}}u * {{SIZE}}u], {{SIZE}}u);
#endfor
    for (var eight = 0u; eight < params.num_eights; eight++) {
#for R 8
#for I 4
        x_{{I}} = coopMultiplyAdd(a, b, x_{{I}});
#endfor
#endfor
    }
#for I 4
    {
        // Of their own, because naga does not emit the operands of a store by itself.
        let sums = x_{{I}};
        let to = &x[first + {{I}}u * {{SIZE}}u * {{SIZE}}u];
        coopStoreT(sums, to, {{SIZE}}u);
    }
#endfor
}
