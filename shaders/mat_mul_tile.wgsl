// `out = x @ weight^T + bias`: a workgroup computes 64 rows of 128 columns, an invocation 4 rows of 8 columns.
//
// Both operands go through workgroup memory, 16 values of K at a time; a weight is decoded once for 64 rows. K is
// walked split by split, and the sums of the splits are added in order: what `mat_mul.wgsl` does side by side is done
// here one after another, with the same bits. In f16 it does what `mat_mul_f16.wgsl` does.
#include "mat_mul_io.wgsl"

// (16 of K, 16 fours of rows)
var<workgroup> x_tile: array<vec4<f{{BITS}}>, 256>;
// (16 of K, 32 fours of columns)
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
    // What it computes: four rows, four columns and four columns 64 further on.
    let four_rows = local / 16u;
    let four_columns = local % 16u;
#for R 4
#for C 2
    var total_{{R}}_{{C}} = vec4(0.0);
#endfor
#endfor
    for (var split = 0u; split < 8u; split++) {
#for R 4
#for C 2
        var sum_{{R}}_{{C}} = vec4(0.0);
#if BITS == 16
        var of_unit_{{R}}_{{C}} = vec4(0.0h);
#endif
#endfor
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
#for J 4
#if BITS == 16
            x_tile[(x_part * 4u + {{J}}u) * 16u + x_row / 4u][x_row % 4u] = rounded(x_{{J}});
#else
            x_tile[(x_part * 4u + {{J}}u) * 16u + x_row / 4u][x_row % 4u] = x_{{J}};
#endif
#endfor
#for H 2
#for J 4
            w_tile[(w_part * 8u + {{H}}u * 4u + {{J}}u) * 32u + w_column / 4u][w_column % 4u] =
                f{{BITS}}(weights[{{H}}][{{J}}]);
#endfor
#endfor
            workgroupBarrier();
            for (var first = 0u; first < 16u; first += 4u) {
#for J 4
                {
                    let rows = x_tile[(first + {{J}}u) * 16u + four_rows];
#for C 2
                    let columns_{{C}} = w_tile[(first + {{J}}u) * 32u + {{C}}u * 16u + four_columns];
#endfor
#for R 4
#for C 2
#if BITS == 16
                    of_unit_{{R}}_{{C}} = fma(vec4(rows[{{R}}]), columns_{{C}}, of_unit_{{R}}_{{C}});
#else
                    sum_{{R}}_{{C}} = fma(vec4(rows[{{R}}]), columns_{{C}}, sum_{{R}}_{{C}});
#endif
#endfor
#endfor
                }
#endfor
            }
#if BITS == 16
            if piece % 2u == 1u {
#for R 4
#for C 2
                sum_{{R}}_{{C}} += vec4<f32>(of_unit_{{R}}_{{C}});
                of_unit_{{R}}_{{C}} = vec4(0.0h);
#endfor
#endfor
            }
#endif
        }
#for R 4
#for C 2
        total_{{R}}_{{C}} += sum_{{R}}_{{C}};
#endfor
#endfor
    }
#for R 4
#for C 2
#for J 4
    store(row + four_rows * 4u + {{R}}u, column + {{C}}u * 64u + four_columns * 4u + {{J}}u, total_{{R}}_{{C}}[{{J}}]);
#endfor
#endfor
#endfor
}
