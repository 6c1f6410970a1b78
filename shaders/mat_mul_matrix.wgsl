// `out = x @ weight^T + bias` on matrix units: a workgroup of SUBGROUPS subgroups computes ROWS rows of COLUMNS
// columns, a subgroup TILES_M x TILES_N matrices of SIZE x SIZE.
//
// Both operands go through workgroup memory as f16, a unit of 32 of K at a time; sums are f32. With 128 rows and 128
// columns a lane stages as much as with 64 and 64, for twice as many matrices. In which order a matrix
// unit adds is its own affair, so that the bits of a row are not those of other kernels.
#include "mat_mul_io.wgsl"

// Rows of 32 of K and 8 more, so that neighbouring rows lie in different banks.
const STRIDE = 40u;
// (ROWS, STRIDE)
var<workgroup> x_tile: array<f16, {{ROWS}} * 40>;
// (COLUMNS, STRIDE)
var<workgroup> w_tile: array<f16, {{COLUMNS}} * 40>;
// A matrix of each subgroup, on its way out.
var<workgroup> results: array<f32, {{SUBGROUPS}} * {{SIZE}} * {{SIZE}}>;

@compute @workgroup_size({{GROUP_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let index = workgroup_index(group, groups);
    // Beyond the last column nothing is stored: to leave before would be to leave a subgroup's control flow, for naga.
    let column = index / params.row_tiles * {{COLUMNS}}u;
    let row = params.first_row + index % params.row_tiles * {{ROWS}}u;
    // Where the subgroup's matrices begin in the workgroup's.
    let own_row = subgroup / {{SUBGROUPS_N}}u * {{TILES_M}}u * {{SIZE}}u;
    let own_column = subgroup % {{SUBGROUPS_N}}u * {{TILES_N}}u * {{SIZE}}u;
#for A TILES_M
#for B TILES_N
    var sum_{{A}}_{{B}} = coop_mat{{SIZE}}x{{SIZE}}<f32, C>();
#endfor
#endfor
    for (var unit = 0u; unit < params.num_units; unit++) {
        workgroupBarrier();
        for (var i = local; i < {{ROWS}}u * 32u; i += {{GROUP_LANES}}u) {
            let k = unit * 32u + i % 32u;
            let x_row = min(row + i / 32u, params.num_rows - 1u) * params.inner;
            let value = x[params.x + x_row + min(k, params.inner - 1u)];
            x_tile[i / 32u * STRIDE + i % 32u] = rounded(select(0.0, value, k < params.inner));
        }
        let in_block = unit % {{UNITS}}u;
        for (var i = local; i < {{COLUMNS}}u * 4u; i += {{GROUP_LANES}}u) {
            // A tile beyond the last is the last.
            let tile = min((column + i % {{COLUMNS}}u) / 32u, (params.shard_cols - 1u) / 32u);
            let at = block_at(tile * 32u + i % 32u, unit, params.num_units);
            let part = i / {{COLUMNS}}u;
            let weights = eight_weights(at, in_block, part, unit_scales(at, in_block));
            let to = i % {{COLUMNS}}u * STRIDE + part * 8u;
#for H 2
#for J 4
            w_tile[to + {{H}}u * 4u + {{J}}u] = f16(weights[{{H}}][{{J}}]);
#endfor
#endfor
        }
        workgroupBarrier();
#for K STEPS
#for A TILES_M
        let a_{{K}}_{{A}} = coopLoadT<coop_mat{{SIZE}}x{{SIZE}}<f16, A>>(
            &x_tile[(own_row + {{A}}u * {{SIZE}}u) * STRIDE + {{K}}u * {{SIZE}}u],
            STRIDE,
        );
#endfor
#for B TILES_N
        let b_{{K}}_{{B}} = coopLoad<coop_mat{{SIZE}}x{{SIZE}}<f16, B>>(
            &w_tile[(own_column + {{B}}u * {{SIZE}}u) * STRIDE + {{K}}u * {{SIZE}}u],
            STRIDE,
        );
#endfor
#for A TILES_M
#for B TILES_N
        sum_{{A}}_{{B}} = coopMultiplyAdd(a_{{K}}_{{A}}, b_{{K}}_{{B}}, sum_{{A}}_{{B}});
#endfor
#endfor
#endfor
    }
    let result = subgroup * {{SIZE}}u * {{SIZE}}u;
#for A TILES_M
#for B TILES_N
    workgroupBarrier();
    {
        // Of their own, because naga does not emit the operands of a store by itself.
        let sums = sum_{{A}}_{{B}};
        let to = &results[result];
        coopStoreT(sums, to, {{SIZE}}u);
    }
    workgroupBarrier();
    for (var i = lane; i < {{SIZE}}u * {{SIZE}}u; i += {{SUBGROUP_LANES}}u) {
        let to_row = row + own_row + {{A}}u * {{SIZE}}u + i / {{SIZE}}u;
        store(to_row, column + own_column + {{B}}u * {{SIZE}}u + i % {{SIZE}}u, results[result + i]);
    }
#endfor
#endfor
}
