// `out = x @ weight^T + bias` where a subgroup of 8 is a workgroup: ROWS rows of a tile of 32 columns.
//
// A lane holds 4 columns, 8 apart. Each lane loads one of 8 activations of a row, and hands it round: on software
// Vulkan a load costs as much as 15 multiply-adds. A sum is one chain of fmas over K, the same for every ROWS.
#include "mat_mul_io.wgsl"

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    let index = workgroup_index(group, groups);
    let tile = index / params.row_tiles;
    if tile * 32u >= params.shard_cols {
        return;
    }
    let row = params.first_row + index % params.row_tiles * {{ROWS}}u;
    let last = params.num_rows - 1u;
#for R ROWS
    let x_row_{{R}} = params.x + min(row + {{R}}u, last) * params.inner;
#for C 4
    var sum_{{R}}_{{C}} = 0.0;
#endfor
#endfor
    for (var unit = 0u; unit < params.num_units; unit++) {
        let in_block = unit % {{UNITS}}u;
        let at_0 = block_at(tile * 32u + lane, unit, params.num_units);
        let scales_0 = unit_scales(at_0, in_block);
#for C 4
#if C > 0
        let at_{{C}} = at_0 + {{C}}u * 8u;
        let scales_{{C}} = unit_scales(at_{{C}}, in_block);
#endif
#endfor
        // Not unrolled: software drivers would compile twice as long, and run no faster.
        for (var part = 0u; part < 4u; part++) {
            let k = unit * 32u + part * 8u;
#for C 4
            let w_{{C}} = eight_weights(at_{{C}}, in_block, part, scales_{{C}});
#endfor
            // Past the end of a row the weights are zero.
#for R ROWS
            let x_{{R}} = x[x_row_{{R}} + min(k + subgroup_lane, params.inner - 1u)];
#endfor
#for H 2
#for J 4
#for R ROWS
            {
                let v = subgroupBroadcast(x_{{R}}, {{H}}u * 4u + {{J}}u);
#for C 4
                sum_{{R}}_{{C}} = fma(v, w_{{C}}[{{H}}][{{J}}], sum_{{R}}_{{C}});
#endfor
            }
#endfor
#endfor
#endfor
        }
    }
#for R ROWS
#for C 4
    store(row + {{R}}u, tile * 32u + lane + {{C}}u * 8u, sum_{{R}}_{{C}});
#endfor
#endfor
}
