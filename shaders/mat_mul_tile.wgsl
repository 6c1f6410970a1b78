// `out = x @ weight^T + bias`: a workgroup computes ROWS rows of COLUMNS columns, an invocation 4 rows of
// INVOCATION_COLUMNS.
//
// Both operands go through workgroup memory, FOURS fours of K at a time; a weight is decoded once for all rows, and
// what is staged next is loaded before this is multiplied. K is walked span by span and split by split, and their sums
// are added in order: what the lanes of `mat_mul.wgsl` do side by side is done here one after another, with the same
// bits. In f16 it does what `mat_mul_f16.wgsl` does.
#include "mat_mul_io.wgsl"

// Fours along K, which one lane writes whole. (FOURS, ROWS)
var<workgroup> x_tile: array<vec4<f{{BITS}}>, {{FOURS}} * {{ROWS}}>;
// (FOURS, COLUMNS)
var<workgroup> w_tile: array<vec4<f{{BITS}}>, {{FOURS}} * {{COLUMNS}}>;

// Of a row that begins at `begin`: whatever it is where the row has ended.
fn four_at(begin: u32, k: u32) -> vec4<f32> {
#for J 4
    let value_{{J}} = x[begin + min(k + {{J}}u, params.inner - 1u)];
#endfor
    return vec4(value_0, value_1, value_2, value_3);
}

// The same with zeros there.
fn within_row(four: vec4<f32>, k: u32) -> vec4<f32> {
    return select(vec4(0.0), four, vec4(k) + vec4(0u, 1u, 2u, 3u) < vec4(params.inner));
}

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
    let first_unit = span_group * params.group_spans * params.span_units;
    let end_unit = min(first_unit + params.group_spans * params.span_units, params.num_units);
    // What this invocation stages: fours of a row's activations (if there are as many), and eight weights of a column
    // (of a tile beyond the last those of the last).
    let x_row = local % {{ROWS}}u;
    let x_from = params.x + min(row + x_row, params.num_rows - 1u) * params.inner;
    let w_column = local % {{COLUMNS}}u;
    let packed_column = min((column + w_column) / 32u, (params.shard_cols - 1u) / 32u) * 32u + local % 32u;
    var at = block_at(packed_column, first_unit, params.num_units);
    var scale_words_of = scale_words(at, first_unit % {{UNITS}}u);
#for I W_EIGHTS
    let w_part_{{I}} = local / {{COLUMNS}}u + {{I}}u * 256u / {{COLUMNS}}u;
    var codes_{{I}} = codes_at(at, first_unit % {{UNITS}}u, w_part_{{I}});
#endfor
#for I X_FOURS
    let x_four_{{I}} = local / {{ROWS}}u + {{I}}u * 256u / {{ROWS}}u;
    var loaded_{{I}} = four_at(x_from, first_unit * 32u + x_four_{{I}} * 4u);
#endfor
    // What it computes: four rows, and columns that lie apart.
    let four_rows = local / {{COLUMN_STRIDE}}u;
    let first_column = local % {{COLUMN_STRIDE}}u;
    // Fours of K in a step; none where no row is there.
    let live_fours = select(0u, {{FOURS}}u, row + four_rows * 4u < params.num_rows);
#for C INVOCATION_COLUMNS
    var total_{{C}} = vec4(0.0);
    var of_span_{{C}} = vec4(0.0);
    var sum_{{C}} = vec4(0.0);
#if BITS == 16
    var of_unit_{{C}} = vec4(0.0h);
#endif
#endfor
    var unit = first_unit;
    var span = first_unit;
    while unit < end_unit {
        // The next unit of this split, or the first of the next, or that of the next span.
        let end_span = min(span + params.span_units, params.num_units);
        let split = (unit - span) % 8u;
        let ends_split = unit + 8u >= end_span;
        let ends_span = ends_split && (split == 7u || span + split + 1u >= end_span);
        var next = select(unit + 8u, span + split + 1u, ends_split);
        next = select(next, end_span, ends_span);
        for (var four_of_unit = 0u; four_of_unit < 8u; four_of_unit += {{FOURS}}u) {
            workgroupBarrier();
#for I X_FOURS
            if x_four_{{I}} < {{FOURS}}u {
                let four = within_row(loaded_{{I}}, unit * 32u + (four_of_unit + x_four_{{I}}) * 4u);
#if BITS == 16
                x_tile[x_four_{{I}} * {{ROWS}}u + x_row] =
                    vec4(rounded(four.x), rounded(four.y), rounded(four.z), rounded(four.w));
#else
                x_tile[x_four_{{I}} * {{ROWS}}u + x_row] = four;
#endif
            }
#endfor
            let scales = scales_of(scale_words_of, unit % {{UNITS}}u);
#for I W_EIGHTS
            let weights_{{I}} = weights_of(codes_{{I}}, four_of_unit / 2u + w_part_{{I}}, scales);
#for H 2
            w_tile[(w_part_{{I}} * 2u + {{H}}u) * {{COLUMNS}}u + w_column] = vec4<f{{BITS}}>(weights_{{I}}[{{H}}]);
#endfor
#endfor
            workgroupBarrier();
            // Behind the last unit that one again.
            let is_last_of_unit = four_of_unit + {{FOURS}}u == 8u;
            let staged_unit = min(select(unit, next, is_last_of_unit), params.num_units - 1u);
            let staged_four = select(four_of_unit + {{FOURS}}u, 0u, is_last_of_unit);
            at = block_at(packed_column, staged_unit, params.num_units);
            scale_words_of = scale_words(at, staged_unit % {{UNITS}}u);
#for I W_EIGHTS
            codes_{{I}} = codes_at(at, staged_unit % {{UNITS}}u, staged_four / 2u + w_part_{{I}});
#endfor
#for I X_FOURS
            loaded_{{I}} = four_at(x_from, staged_unit * 32u + (staged_four + x_four_{{I}}) * 4u);
#endfor
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
        }
#if BITS == 16
#for C INVOCATION_COLUMNS
        sum_{{C}} += vec4<f32>(of_unit_{{C}});
        of_unit_{{C}} = vec4(0.0h);
#endfor
#endif
        if ends_split {
#for C INVOCATION_COLUMNS
            of_span_{{C}} += sum_{{C}};
            sum_{{C}} = vec4(0.0);
#endfor
        }
        if ends_span {
#for C INVOCATION_COLUMNS
            total_{{C}} += of_span_{{C}};
            of_span_{{C}} = vec4(0.0);
#endfor
            span = end_span;
        }
        unit = next;
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
