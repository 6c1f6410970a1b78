// Part of `attention.wgsl`: the products of a tile's keys with all queries. Eight elements of a key are widened and
// meet every row and head; a query's elements come eight at a time, and where one subgroup is a workgroup, one a lane
// and handed round.
#if CODE_BITS == 16
            for (var step = 0u; step < {{QUERY_FOURS}}u / 2u; step++) {
                let low_four = 2u * step;
                let high_four = 2u * step + 1u;
#for T TOKENS
#for I 4
#if HEAD_TAIL
                let word_{{T}}_{{I}} = min(4u * step + {{I}}u, {{HEAD_WORDS}}u - 1u);
                let key_{{T}}_{{I}} = unpack2x16float(k_cache[cell_{{T}} + word_{{T}}_{{I}}]);
#else
                let key_{{T}}_{{I}} = unpack2x16float(k_cache[cell_{{T}} + 4u * step + {{I}}u]);
#endif
#endfor
                let low_{{T}} = vec4(key_{{T}}_0, key_{{T}}_1);
                let high_{{T}} = vec4(key_{{T}}_2, key_{{T}}_3);
#endfor
#else
            for (var group = 0u; group < {{GROUPS}}u; group++) {
#for T TOKENS
                let scales_{{T}} = k_cache[cell_{{T}} + {{CODE_WORDS}}u + group / 2u];
                let scale_{{T}} = unpack2x16float(scales_{{T}} >> (group % 2u * 16u)).x;
#for R ROWS
#for H HEADS
                var steps_{{T}}_{{R}}_{{H}} = 0.0;
#endfor
#endfor
#endfor
            for (var w = 0u; w < 4u; w++) {
                let low_four = group * 8u + w;
                let high_four = group * 8u + w + 4u;
#for T TOKENS
#if CODE_BITS == 8
                let low_{{T}} = codes(k_cache[cell_{{T}} + group * 8u + w]);
                let high_{{T}} = codes(k_cache[cell_{{T}} + group * 8u + w + 4u]);
#else
                let both_{{T}} = k_cache[cell_{{T}} + group * 4u + w];
                let low_{{T}} = codes(both_{{T}});
                let high_{{T}} = codes(both_{{T}} >> 4u);
#endif
#endfor
#endif
#if ONE_SUBGROUP
                let element = select(4u * high_four, 4u * low_four, lane < 4u) + lane % 4u;
#endif
#for R ROWS
#for H HEADS
#if ONE_SUBGROUP
#if HEAD_TAIL
                let loaded_{{R}}_{{H}} = q[params.q + at_{{R}}_{{H}} + min(element, {{HEAD_DIM}}u - 1u)];
                let query_{{R}}_{{H}} = select(0.0, loaded_{{R}}_{{H}}, element < {{HEAD_DIM}}u);
#else
                let query_{{R}}_{{H}} = q[params.q + at_{{R}}_{{H}} + element];
#endif
                let q_low_{{R}}_{{H}} = vec4(
#for I 4
                    subgroupBroadcast(query_{{R}}_{{H}}, {{I}}u),
#endfor
                );
                let q_high_{{R}}_{{H}} = vec4(
                    subgroupBroadcast(query_{{R}}_{{H}}, 4u),
                    subgroupBroadcast(query_{{R}}_{{H}}, 5u),
                    subgroupBroadcast(query_{{R}}_{{H}}, 6u),
                    subgroupBroadcast(query_{{R}}_{{H}}, 7u),
                );
#else
                let q_low_{{R}}_{{H}} = queries[({{R}}u * {{HEADS}}u + {{H}}u) * {{QUERY_FOURS}}u + low_four];
                let q_high_{{R}}_{{H}} = queries[({{R}}u * {{HEADS}}u + {{H}}u) * {{QUERY_FOURS}}u + high_four];
#endif
#for T TOKENS
#if CODE_BITS == 16
                score_{{T}}_{{R}}_{{H}} =
                    add_products(score_{{T}}_{{R}}_{{H}}, q_low_{{R}}_{{H}}, q_high_{{R}}_{{H}}, low_{{T}}, high_{{T}});
#else
                steps_{{T}}_{{R}}_{{H}} =
                    add_products(steps_{{T}}_{{R}}_{{H}}, q_low_{{R}}_{{H}}, q_high_{{R}}_{{H}}, low_{{T}}, high_{{T}});
#endif
#endfor
#endfor
#endfor
            }
#if CODE_BITS < 16
#for T TOKENS
#for R ROWS
#for H HEADS
                score_{{T}}_{{R}}_{{H}} = fma(scale_{{T}}, steps_{{T}}_{{R}}_{{H}}, score_{{T}}_{{R}}_{{H}});
#endfor
#endfor
#endfor
            }
#endif
