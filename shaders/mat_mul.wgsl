// `out = x @ weight^T + bias`: a workgroup computes ROWS rows of COLUMNS tiles of 32 columns.
//
// Of more than four rows pairs that are not there are not computed. A lane holds one column of each tile and the units
// of 32 along K that its split owns: every eighth. Activations are staged in workgroup memory, zeros past the end of a
// row, and read from there four at a time; a weight is decoded once for all rows. K is a few spans. A sum runs along a
// span within a split, one fma a value, then over the splits, then over the spans, here or where workgroups take a
// span each. That order is the same for every ROWS and in `mat_mul_tile.wgsl`, so the bits of a row do not depend on
// how many rows there are.
//
// What a round waits for is loaded before any of it is used: a weight's words, and the activations of a stage.
#include "mat_mul_io.wgsl"

// (ROWS, 256 * ROUNDS) activations in fours along K; at the end of a span partial sums of four rows, by (four, split,
// lane).
var<workgroup> memory: array<vec4<f32>, {{MEMORY}}>;

// Stages K from `first` on, and what lies behind a span with it; of rows beyond the last the last one. A lane writes
// whole fours: to write a component may write its neighbours too.
fn stage(row: u32, first: u32, local: u32) {
#for I STAGE_FOURS
    let four_{{I}} = local + {{I}}u * 256u;
    let k_{{I}} = first + four_{{I}} * 4u % {{STAGE_K}}u;
    let x_row_{{I}} = params.x + min(row + four_{{I}} * 4u / {{STAGE_K}}u, params.num_rows - 1u) * params.inner;
#for J 4
    let x_{{I}}_{{J}} = x[x_row_{{I}} + min(k_{{I}} + {{J}}u, params.inner - 1u)];
#endfor
#endfor
#for I STAGE_FOURS
#for J 4
    let value_{{I}}_{{J}} = select(0.0, x_{{I}}_{{J}}, k_{{I}} + {{J}}u < params.inner);
#endfor
    memory[four_{{I}}] = vec4(value_{{I}}_0, value_{{I}}_1, value_{{I}}_2, value_{{I}}_3);
#endfor
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
#include "mat_mul_place.wgsl"
#if GROUPS > 1
    let live_pairs = (params.num_rows - row + 1u) / 2u;
#endif
#for C COLUMNS
    // Of four rows, in the lanes that add up the splits.
    var total_{{C}} = vec4(0.0);
#endfor
    let first_span = span_group * params.group_spans;
    for (var span = first_span; span < first_span + params.group_spans; span++) {
        let end_unit = min((span + 1u) * params.span_units, params.num_units);
#for C COLUMNS
#for G GROUPS
#for Q PAIRS
#for R PAIR_ROWS
        var sum_{{G}}_{{Q}}_{{R}}_{{C}} = 0.0;
#endfor
#endfor
#endfor
#endfor
        for (var first = span * params.span_units; first < end_unit; first += {{ROUNDS}}u * 8u) {
            workgroupBarrier();
            stage(row, first * 32u, local);
            workgroupBarrier();
            for (var round = 0u; round < {{ROUNDS}}u; round++) {
                let unit = first + round * 8u + own_split;
                if unit >= end_unit {
                    break;
                }
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
#endfor
                for (var first_part = 0u; first_part < 4u; first_part += {{PARTS}}u) {
#for P PARTS
                    {
                        let part = first_part + {{P}}u;
                        let at_x = round * 64u + own_split * 8u + part * 2u;
#for C COLUMNS
#if PARTS == 4
                        let w_{{C}} = weights_of(codes_{{P}}_{{C}}, part, scales_{{C}});
#else
                        let codes_{{C}} = codes_of(part, codes_0_{{C}}, codes_1_{{C}}, codes_2_{{C}}, codes_3_{{C}});
                        let w_{{C}} = weights_of(codes_{{C}}, part, scales_{{C}});
#endif
#endfor
#for G GROUPS
#for Q PAIRS
#if GROUPS > 1
                        if {{G}}u * 2u + {{Q}}u < live_pairs
#endif
                        {
#for R PAIR_ROWS
                            let at_x_{{R}} = at_x + ({{G}}u * 4u + {{Q}}u * 2u + {{R}}u) * {{STAGE_K}}u / 4u;
#for H 2
                            let x_{{R}}_{{H}} = memory[at_x_{{R}} + {{H}}u];
#for J 4
#for C COLUMNS
                            sum_{{G}}_{{Q}}_{{R}}_{{C}} =
                                fma(x_{{R}}_{{H}}[{{J}}], w_{{C}}[{{H}}][{{J}}], sum_{{G}}_{{Q}}_{{R}}_{{C}});
#endfor
#endfor
#endfor
#endfor
                        }
#endfor
#endfor
                    }
#endfor
                }
            }
        }
#for C COLUMNS
        workgroupBarrier();
#for G GROUPS
#if GROUP_ROWS == 4
        memory[({{G}}u * 8u + own_split) * 32u + lane] =
            vec4(sum_{{G}}_0_0_{{C}}, sum_{{G}}_0_1_{{C}}, sum_{{G}}_1_0_{{C}}, sum_{{G}}_1_1_{{C}});
#endif
#if GROUP_ROWS == 2
        memory[own_split * 32u + lane] = vec4(sum_0_0_0_{{C}}, sum_0_0_1_{{C}}, 0.0, 0.0);
#endif
#if GROUP_ROWS == 1
        memory[own_split * 32u + lane] = vec4(sum_0_0_0_{{C}}, 0.0, 0.0, 0.0);
#endif
#endfor
        workgroupBarrier();
        if own_split < {{GROUPS}}u {
            var of_span = vec4(0.0);
            for (var split = 0u; split < 8u; split++) {
                of_span += memory[(own_split * 8u + split) * 32u + lane];
            }
            total_{{C}} += of_span;
        }
#endfor
    }
    if own_split < {{GROUPS}}u {
#for C COLUMNS
#for R GROUP_ROWS
        store_of_spans(span_group, row + own_split * 4u + {{R}}u, column + {{C}}u * 32u + lane, total_{{C}}[{{R}}]);
#endfor
#endfor
    }
}
