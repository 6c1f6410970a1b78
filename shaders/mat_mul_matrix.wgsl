// `out = x @ weight^T + bias` on matrix units: a workgroup of SUBGROUPS subgroups computes ROWS rows of COLUMNS
// columns, a subgroup TILES_M x TILES_N matrices of SIZE x SIZE.
//
// Both operands go through workgroup memory as f16, a unit of 32 of K at a time; sums are f32. With 128 rows and 128
// columns a lane stages as much as with 64 and 64, for twice as many matrices. All that a lane
// stages next is loaded together, before the matrices of this unit are multiplied. In which order a matrix unit adds is
// its own affair, so that the bits of a row are not those of other kernels.
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
    let span_group = index / params.row_tiles % params.span_groups;
    // Beyond the last column nothing is stored: to leave before would be to leave a subgroup's control flow, for naga.
    let column = index / params.row_tiles / params.span_groups * {{COLUMNS}}u;
    let row = params.first_row + index % params.row_tiles * {{ROWS}}u;
    // Where the subgroup's matrices begin in the workgroup's.
    let own_row = subgroup / {{SUBGROUPS_N}}u * {{TILES_M}}u * {{SIZE}}u;
    let own_column = subgroup % {{SUBGROUPS_N}}u * {{TILES_N}}u * {{SIZE}}u;
#for A TILES_M
#for B TILES_N
    var sum_{{A}}_{{B}} = coop_mat{{SIZE}}x{{SIZE}}<f32, C>();
#endfor
#endfor
    // What this lane stages: activations of a unit, and eight weights of a column each (of a tile beyond the last those
    // of the last).
#for I X_LOADS
    let x_column_{{I}} = (local + {{I}}u * {{GROUP_LANES}}u) % 32u;
    let x_row_{{I}} = (local + {{I}}u * {{GROUP_LANES}}u) / 32u;
    let x_from_{{I}} = params.x + min(row + x_row_{{I}}, params.num_rows - 1u) * params.inner;
#endfor
#for I W_LOADS
    let w_column_{{I}} = (local + {{I}}u * {{GROUP_LANES}}u) % {{COLUMNS}}u;
    let w_part_{{I}} = (local + {{I}}u * {{GROUP_LANES}}u) / {{COLUMNS}}u;
    let packed_tile_{{I}} = min((column + w_column_{{I}}) / 32u, (params.shard_cols - 1u) / 32u);
    let packed_column_{{I}} = packed_tile_{{I}} * 32u + w_column_{{I}} % 32u;
#endfor
    let first_unit = span_group * params.group_spans * params.span_units;
    let end_unit = min(first_unit + params.group_spans * params.span_units, params.num_units);
#for I W_LOADS
    var at_{{I}} = block_at(packed_column_{{I}}, first_unit, params.num_units);
    var scale_words_{{I}} = scale_words(at_{{I}}, first_unit % {{UNITS}}u);
    var codes_{{I}} = codes_at(at_{{I}}, first_unit % {{UNITS}}u, w_part_{{I}});
#endfor
#for I X_LOADS
    var x_{{I}} = x[x_from_{{I}} + min(first_unit * 32u + x_column_{{I}}, params.inner - 1u)];
#endfor
    for (var unit = first_unit; unit < end_unit; unit++) {
        workgroupBarrier();
#for I X_LOADS
        x_tile[x_row_{{I}} * STRIDE + x_column_{{I}}] =
            rounded(select(0.0, x_{{I}}, unit * 32u + x_column_{{I}} < params.inner));
#endfor
#for I W_LOADS
        let weights_{{I}} = weights_of(codes_{{I}}, w_part_{{I}}, scales_of(scale_words_{{I}}, unit % {{UNITS}}u));
        let to_{{I}} = w_column_{{I}} * STRIDE + w_part_{{I}} * 8u;
#for H 2
#for J 4
        w_tile[to_{{I}} + {{H}}u * 4u + {{J}}u] = f16(weights_{{I}}[{{H}}][{{J}}]);
#endfor
#endfor
#endfor
        workgroupBarrier();
        // Behind the last unit that one again.
        let next = min(unit + 1u, params.num_units - 1u);
#for I W_LOADS
        at_{{I}} = block_at(packed_column_{{I}}, next, params.num_units);
        scale_words_{{I}} = scale_words(at_{{I}}, next % {{UNITS}}u);
        codes_{{I}} = codes_at(at_{{I}}, next % {{UNITS}}u, w_part_{{I}});
#endfor
#for I X_LOADS
        x_{{I}} = x[x_from_{{I}} + min(next * 32u + x_column_{{I}}, params.inner - 1u)];
#endfor
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
        let to_column = column + own_column + {{B}}u * {{SIZE}}u + i % {{SIZE}}u;
        store_of_spans(span_group, to_row, to_column, results[result + i]);
    }
#endfor
#endfor
}
