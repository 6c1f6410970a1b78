// `out = x @ weight^T + bias` with products and sums of a unit in f16: a workgroup computes ROWS rows of COLUMNS tiles
// of 32 columns, and a lane four rows at a time.
//
// As `mat_mul.wgsl`, but for the arithmetic: a weight is decoded in f32 and rounded once, an activation is rounded (and
// held within what f16 has); 32 products along K are added in f16, one after another, and the sums of units in f32.
// That order is the same for every ROWS and in `mat_mul_tile.wgsl`.
#include "mat_mul_io.wgsl"

// (fours of rows, 256 of K)
var<workgroup> memory: array<vec4<f16>, {{GROUPS}} * 256>;
// (split, lane), of four rows.
var<workgroup> partials: array<vec4<f32>, 256>;

// Stages K from `first` on; of rows beyond the last the last one.
fn stage(row: u32, first: u32, local: u32) {
    let k = first + local;
#for G GROUPS
#for R 4
    let x_row_{{G}}_{{R}} = params.x + min(row + {{G}}u * 4u + {{R}}u, params.num_rows - 1u) * params.inner;
    let x_{{G}}_{{R}} = x[x_row_{{G}}_{{R}} + min(k, params.inner - 1u)];
#endfor
#endfor
#for G GROUPS
#for R 4
    let value_{{G}}_{{R}} = rounded(select(0.0, x_{{G}}_{{R}}, k < params.inner));
#endfor
    memory[{{G}}u * 256u + local] = vec4(value_{{G}}_0, value_{{G}}_1, value_{{G}}_2, value_{{G}}_3);
#endfor
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
#include "mat_mul_place.wgsl"
    // Of four rows.
    let live_groups = (params.num_rows - row + 3u) / 4u;
#for C COLUMNS
    // Of four rows, in the lanes that add up the splits.
    var total_{{C}} = vec4(0.0);
#endfor
    let first_span = span_group * params.group_spans;
    for (var span = first_span; span < first_span + params.group_spans; span++) {
        let end_unit = min((span + 1u) * params.span_units, params.num_units);
#for C COLUMNS
#for G GROUPS
        var sum_{{G}}_{{C}} = vec4(0.0);
#endfor
#endfor
        for (var first = span * params.span_units; first < end_unit; first += 8u) {
            workgroupBarrier();
            stage(row, first * 32u, local);
            workgroupBarrier();
            let unit = first + own_split;
            if unit < end_unit {
                let in_block = unit % {{UNITS}}u;
#for C COLUMNS
                let at_{{C}} = block_at(column_{{C}}, unit, params.num_units);
                let scale_words_{{C}} = scale_words(at_{{C}}, in_block);
#for P 4
                let codes_{{P}}_{{C}} = codes_at(at_{{C}}, in_block, {{P}}u);
#endfor
#endfor
#for C COLUMNS
                let scales_{{C}} = scales_of(scale_words_{{C}}, in_block);
#for G GROUPS
                var of_unit_{{G}}_{{C}} = vec4(0.0h);
#endfor
#endfor
                for (var part = 0u; part < 4u; part++) {
                    let at_x = own_split * 32u + part * 8u;
#for C COLUMNS
                    let codes_{{C}} = codes_of(part, codes_0_{{C}}, codes_1_{{C}}, codes_2_{{C}}, codes_3_{{C}});
                    let decoded_{{C}} = weights_of(codes_{{C}}, part, scales_{{C}});
#for H 2
                    let w_{{C}}_{{H}} = vec4<f16>(decoded_{{C}}[{{H}}]);
#endfor
#endfor
#for G GROUPS
                    if {{G}}u < live_groups {
#for H 2
#for J 4
                        {
                            let rows = memory[{{G}}u * 256u + at_x + {{H}}u * 4u + {{J}}u];
#for C COLUMNS
                            of_unit_{{G}}_{{C}} = fma(rows, vec4(w_{{C}}_{{H}}[{{J}}]), of_unit_{{G}}_{{C}});
#endfor
                        }
#endfor
#endfor
                    }
#endfor
                }
#for C COLUMNS
#for G GROUPS
                sum_{{G}}_{{C}} += vec4<f32>(of_unit_{{G}}_{{C}});
#endfor
#endfor
            }
        }
#for C COLUMNS
#for G GROUPS
        workgroupBarrier();
        partials[local] = sum_{{G}}_{{C}};
        workgroupBarrier();
        if own_split == {{G}}u {
            var of_span = vec4(0.0);
            for (var split = 0u; split < 8u; split++) {
                of_span += partials[split * 32u + lane];
            }
            total_{{C}} += of_span;
        }
#endfor
#endfor
    }
    if own_split < {{GROUPS}}u {
#for C COLUMNS
#for R 4
        store_of_spans(span_group, row + own_split * 4u + {{R}}u, column + {{C}}u * 32u + lane, total_{{C}}[{{R}}]);
#endfor
#endfor
    }
}
