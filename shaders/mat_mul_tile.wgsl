// `out = x @ weight^T + bias`: a workgroup computes 64 rows of 128 columns, an invocation 4 rows of 8 columns.
//
// Both operands go through workgroup memory, 16 values of K at a time; a weight is decoded once for 64 rows. K is
// walked split by split, and the sums of the splits are added in order: what `mat_mul.wgsl` does side by side is done
// here one after another, with the same bits. In f16 it does what `mat_mul_f16.wgsl` does.
#include "mat_mul_io.wgsl"

// Fours along K, which one lane writes whole. (4, 64 rows)
var<workgroup> x_tile: array<vec4<f{{BITS}}>, 256>;
// (4, 128 columns)
var<workgroup> w_tile: array<vec4<f{{BITS}}>, 512>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup_index(group, groups);
    let column = index / params.row_tiles * 128u;
    if column >= params.shard_cols {
        return;
    }
    let row = params.first_row + index % params.row_tiles * 64u;
    // What this invocation stages: four activations of a row, and eight weights of a column (of a tile beyond the last
    // those of the last).
    let x_row = local % 64u;
    let x_part = local / 64u;
    let x_from = params.x + min(row + x_row, params.num_rows - 1u) * params.inner;
    let w_column = local % 128u;
    let w_part = local / 128u;
    let packed_column = min((column + w_column) / 32u, (params.shard_cols - 1u) / 32u) * 32u + local % 32u;
    // What it computes: four rows, and eight columns 16 apart.
    let four_rows = local / 16u;
    let first_column = local % 16u;
#for C 8
    var total_{{C}} = vec4(0.0);
#endfor
    for (var split = 0u; split < 8u; split++) {
#for C 8
        var sum_{{C}} = vec4(0.0);
#if BITS == 16
        var of_unit_{{C}} = vec4(0.0h);
#endif
#endfor
        // By halves of a unit.
        for (var piece = split * 2u; piece < params.num_units * 2u; piece += select(15u, 1u, piece % 2u == 0u)) {
            let unit = piece / 2u;
            let in_block = unit % {{UNITS}}u;
            let at = block_at(packed_column, unit, params.num_units);
            let part = piece % 2u * 2u + w_part;
            let weights = eight_weights(at, in_block, part, unit_scales(at, in_block));
            let k = piece * 16u + x_part * 4u;
#for J 4
            let x_{{J}} = select(0.0, x[x_from + min(k + {{J}}u, params.inner - 1u)], k + {{J}}u < params.inner);
#endfor
            workgroupBarrier();
#if BITS == 16
            x_tile[x_part * 64u + x_row] = vec4(rounded(x_0), rounded(x_1), rounded(x_2), rounded(x_3));
#else
            x_tile[x_part * 64u + x_row] = vec4(x_0, x_1, x_2, x_3);
#endif
#for H 2
            w_tile[(w_part * 2u + {{H}}u) * 128u + w_column] = vec4<f{{BITS}}>(weights[{{H}}]);
#endfor
            workgroupBarrier();
            for (var four = 0u; four < 4u; four++) {
#for R 4
                let x_of_{{R}} = x_tile[four * 64u + four_rows * 4u + {{R}}u];
#endfor
#for J 4
                let rows_{{J}} = vec4(x_of_0[{{J}}], x_of_1[{{J}}], x_of_2[{{J}}], x_of_3[{{J}}]);
#endfor
#for C 8
                let w_{{C}} = w_tile[four * 128u + {{C}}u * 16u + first_column];
#for J 4
#if BITS == 16
                of_unit_{{C}} = fma(rows_{{J}}, vec4(w_{{C}}[{{J}}]), of_unit_{{C}});
#else
                sum_{{C}} = fma(rows_{{J}}, vec4(w_{{C}}[{{J}}]), sum_{{C}});
#endif
#endfor
#endfor
            }
#if BITS == 16
            if piece % 2u == 1u {
#for C 8
                sum_{{C}} += vec4<f32>(of_unit_{{C}});
                of_unit_{{C}} = vec4(0.0h);
#endfor
            }
#endif
        }
#for C 8
        total_{{C}} += sum_{{C}};
#endfor
    }
#for C 8
#for R 4
    store(row + four_rows * 4u + {{R}}u, column + {{C}}u * 16u + first_column, total_{{C}}[{{R}}]);
#endfor
#endfor
}
