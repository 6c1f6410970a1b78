// Part of `attention.wgsl`: the products of a tile's keys with all queries. Eight elements of a key are widened and
// meet every row and head; several such steps load their keys together. A query's elements come eight at a time, and
// where one subgroup is a workgroup, one a lane and handed round.
#if CODE_BITS == 16
            for (var first = 0u; first < {{QUERY_FOURS}}u / 2u; first += {{KEY_STEPS}}u) {
#for S KEY_STEPS
                let low_four_{{S}} = 2u * (first + {{S}}u);
                let high_four_{{S}} = low_four_{{S}} + 1u;
#for T TOKENS
#for I 4
                let word_{{S}}_{{T}}_{{I}} = 4u * (first + {{S}}u) + {{I}}u;
#if HEAD_TAIL
                let loaded_{{S}}_{{T}}_{{I}} = k_cache[cell_{{T}} + min(word_{{S}}_{{T}}_{{I}}, {{HEAD_WORDS}}u - 1u)];
#else
                let loaded_{{S}}_{{T}}_{{I}} = k_cache[cell_{{T}} + word_{{S}}_{{T}}_{{I}}];
#endif
#endfor
#endfor
#endfor
#else
            for (var group = 0u; group < {{GROUPS}}u; group++) {
#for T TOKENS
                let scales_{{T}} = k_cache[cell_{{T}} + {{CODE_WORDS}}u + group / 2u];
#for R ROWS
#for H HEADS
                var steps_{{T}}_{{R}}_{{H}} = 0.0;
#endfor
#endfor
#endfor
            for (var first = 0u; first < 4u; first += {{KEY_STEPS}}u) {
#for S KEY_STEPS
                let low_four_{{S}} = group * 8u + first + {{S}}u;
                let high_four_{{S}} = low_four_{{S}} + 4u;
#for T TOKENS
#if CODE_BITS == 8
                let loaded_{{S}}_{{T}}_0 = k_cache[cell_{{T}} + low_four_{{S}}];
                let loaded_{{S}}_{{T}}_1 = k_cache[cell_{{T}} + high_four_{{S}}];
#else
                let loaded_{{S}}_{{T}}_0 = k_cache[cell_{{T}} + group * 4u + first + {{S}}u];
                let loaded_{{S}}_{{T}}_1 = loaded_{{S}}_{{T}}_0 >> 4u;
#endif
#endfor
#endfor
#endif
#for S KEY_STEPS
#for T TOKENS
#if CODE_BITS == 16
#for I 4
                let key_{{S}}_{{T}}_{{I}} = unpack2x16float(loaded_{{S}}_{{T}}_{{I}});
#endfor
                let low_{{S}}_{{T}} = vec4(key_{{S}}_{{T}}_0, key_{{S}}_{{T}}_1);
                let high_{{S}}_{{T}} = vec4(key_{{S}}_{{T}}_2, key_{{S}}_{{T}}_3);
#else
                let low_{{S}}_{{T}} = codes(loaded_{{S}}_{{T}}_0);
                let high_{{S}}_{{T}} = codes(loaded_{{S}}_{{T}}_1);
#endif
#endfor
#if ONE_SUBGROUP
                let element_{{S}} = select(4u * high_four_{{S}}, 4u * low_four_{{S}}, lane < 4u) + lane % 4u;
#endif
#for R ROWS
#for H HEADS
#if ONE_SUBGROUP
#if HEAD_TAIL
                let read_{{S}}_{{R}}_{{H}} = q[params.q + at_{{R}}_{{H}} + min(element_{{S}}, {{HEAD_DIM}}u - 1u)];
                let query_{{S}}_{{R}}_{{H}} = select(0.0, read_{{S}}_{{R}}_{{H}}, element_{{S}} < {{HEAD_DIM}}u);
#else
                let query_{{S}}_{{R}}_{{H}} = q[params.q + at_{{R}}_{{H}} + element_{{S}}];
#endif
                let q_low_{{S}}_{{R}}_{{H}} = vec4(
#for I 4
                    subgroupBroadcast(query_{{S}}_{{R}}_{{H}}, {{I}}u),
#endfor
                );
                let q_high_{{S}}_{{R}}_{{H}} = vec4(
                    subgroupBroadcast(query_{{S}}_{{R}}_{{H}}, 4u),
                    subgroupBroadcast(query_{{S}}_{{R}}_{{H}}, 5u),
                    subgroupBroadcast(query_{{S}}_{{R}}_{{H}}, 6u),
                    subgroupBroadcast(query_{{S}}_{{R}}_{{H}}, 7u),
                );
#else
                let query_at_{{S}}_{{R}}_{{H}} = ({{R}}u * {{HEADS}}u + {{H}}u) * {{QUERY_FOURS}}u;
                let q_low_{{S}}_{{R}}_{{H}} = queries[query_at_{{S}}_{{R}}_{{H}} + low_four_{{S}}];
                let q_high_{{S}}_{{R}}_{{H}} = queries[query_at_{{S}}_{{R}}_{{H}} + high_four_{{S}}];
#endif
#for T TOKENS
#if CODE_BITS == 16
                score_{{T}}_{{R}}_{{H}} = add_products(
                    score_{{T}}_{{R}}_{{H}},
                    q_low_{{S}}_{{R}}_{{H}},
                    q_high_{{S}}_{{R}}_{{H}},
                    low_{{S}}_{{T}},
                    high_{{S}}_{{T}},
                );
#else
                steps_{{T}}_{{R}}_{{H}} = add_products(
                    steps_{{T}}_{{R}}_{{H}},
                    q_low_{{S}}_{{R}}_{{H}},
                    q_high_{{S}}_{{R}}_{{H}},
                    low_{{S}}_{{T}},
                    high_{{S}}_{{T}},
                );
#endif
#endfor
#endfor
#endfor
#endfor
            }
#if CODE_BITS < 16
#for T TOKENS
                let scale_{{T}} = unpack2x16float(scales_{{T}} >> (group % 2u * 16u)).x;
#for R ROWS
#for H HEADS
                score_{{T}}_{{R}}_{{H}} = fma(scale_{{T}}, steps_{{T}}_{{R}}_{{H}}, score_{{T}}_{{R}}_{{H}});
#endfor
#endfor
#endfor
            }
#endif
