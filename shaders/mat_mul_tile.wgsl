// `out = x @ weight^T + bias`: a workgroup computes ROWS rows of COLUMNS columns, an invocation 4 rows of
// INVOCATION_COLUMNS.
//
// Both operands go through workgroup memory, 16 values of K at a time; a weight is decoded once for all rows. K is
// walked span by span and split by split, and their sums are added in order: what the lanes of `mat_mul.wgsl` do side
// by side is done here one after another, with the same bits. In f16 it does what `mat_mul_f16.wgsl` does.
#include "mat_mul_io.wgsl"

// Fours along K, which one lane writes whole. (4, ROWS)
var<workgroup> x_tile: array<vec4<f{{BITS}}>, 4 * {{ROWS}}>;
// (4, COLUMNS)
var<workgroup> w_tile: array<vec4<f{{BITS}}>, 4 * {{COLUMNS}}>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup_index(group, groups);
    let span_group = index / params.row_tiles % params.span_groups;
    let column = index / params.row_tiles / params.span_groups * {{COLUMNS}}u;
    if column >= params.shard_cols {
        return;
    }
    let row = params.first_row + index % params.row_tiles * {{ROWS}}u;
    // What this invocation stages, if there is as much: four activations of a row, and eight weights of a column (of a
    // tile beyond the last those of the last).
    let x_row = local % {{ROWS}}u;
    let x_part = local / {{ROWS}}u;
    let x_from = params.x + min(row + x_row, params.num_rows - 1u) * params.inner;
    let w_column = local % {{COLUMNS}}u;
    let w_part = local / {{COLUMNS}}u;
    let packed_column = min((column + w_column) / 32u, (params.shard_cols - 1u) / 32u) * 32u + local % 32u;
    // What it computes: four rows, and columns that lie apart.
    let four_rows = local / {{COLUMN_STRIDE}}u;
    let first_column = local % {{COLUMN_STRIDE}}u;
    // Fours of K in a step; none where no row is there.
    let live_fours = select(0u, 4u, row + four_rows * 4u < params.num_rows);
#for C INVOCATION_COLUMNS
    var total_{{C}} = vec4(0.0);
#endfor
    let first_span = span_group * params.group_spans;
    for (var span = first_span; span < first_span + params.group_spans; span++) {
#for C INVOCATION_COLUMNS
        var of_span_{{C}} = vec4(0.0);
#endfor
        let first_unit = span * params.span_units;
        let end_piece = min(first_unit + params.span_units, params.num_units) * 2u;
        for (var split = 0u; split < 8u; split++) {
#for C INVOCATION_COLUMNS
            var sum_{{C}} = vec4(0.0);
#if BITS == 16
            var of_unit_{{C}} = vec4(0.0h);
#endif
#endfor
            // By halves of a unit.
            for (
                var piece = (first_unit + split) * 2u;
                piece < end_piece;
                piece += select(15u, 1u, piece % 2u == 0u)
            ) {
                let unit = piece / 2u;
                let in_block = unit % {{UNITS}}u;
                let at = block_at(packed_column, unit, params.num_units);
                let part = piece % 2u * 2u + w_part;
                var weights: mat2x4<f32>;
                if w_part < 2u {
                    weights = eight_weights(at, in_block, part, unit_scales(at, in_block));
                }
                let k = piece * 16u + x_part * 4u;
#for J 4
                let x_{{J}} = select(0.0, x[x_from + min(k + {{J}}u, params.inner - 1u)], k + {{J}}u < params.inner);
#endfor
                workgroupBarrier();
                if x_part < 4u {
#if BITS == 16
                    x_tile[x_part * {{ROWS}}u + x_row] = vec4(rounded(x_0), rounded(x_1), rounded(x_2), rounded(x_3));
#else
                    x_tile[x_part * {{ROWS}}u + x_row] = vec4(x_0, x_1, x_2, x_3);
#endif
                }
                if w_part < 2u {
#for H 2
                    w_tile[(w_part * 2u + {{H}}u) * {{COLUMNS}}u + w_column] = vec4<f{{BITS}}>(weights[{{H}}]);
#endfor
                }
                workgroupBarrier();
                for (var four = 0u; four < live_fours; four++) {
#for R 4
                    let x_of_{{R}} = x_tile[four * {{ROWS}}u + four_rows * 4u + {{R}}u];
#endfor
#for J 4
                    let rows_{{J}} = vec4(x_of_0[{{J}}], x_of_1[{{J}}], x_of_2[{{J}}], x_of_3[{{J}}]);
#endfor
#for C INVOCATION_COLUMNS
                    let w_{{C}} = w_tile[four * {{COLUMNS}}u + {{C}}u * {{COLUMN_STRIDE}}u + first_column];
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
#for C INVOCATION_COLUMNS
                    sum_{{C}} += vec4<f32>(of_unit_{{C}});
                    of_unit_{{C}} = vec4(0.0h);
#endfor
                }
#endif
            }
#for C INVOCATION_COLUMNS
            of_span_{{C}} += sum_{{C}};
#endfor
        }
#for C INVOCATION_COLUMNS
        total_{{C}} += of_span_{{C}};
#endfor
    }
    let to_row = row + four_rows * 4u;
#for C INVOCATION_COLUMNS
#for R 4
    store_of_spans(
        span_group,
        to_row + {{R}}u,
        column + {{C}}u * {{COLUMN_STRIDE}}u + first_column,
        total_{{C}}[{{R}}],
    );
#endfor
#endfor
}
