// Part of `attention.wgsl`: a tile's values, times the weights of all rows and heads. A value that a row does not see
// is nothing to it, whatever it is: 0 times an infinity is none.
#for T TOKENS
#if ONE_SUBGROUP
            let num_tokens_{{T}} =
                min(max(cut_end, tile + {{T}}u * {{TILE_LANES}}u) - tile - {{T}}u * {{TILE_LANES}}u, {{TILE_LANES}}u);
            for (var t = 0u; t < num_tokens_{{T}}; t++) {
                let cell = subgroupShuffle(cell_{{T}}, t);
#else
            for (var t = 0u; t < min(cut_end - tile, 32u); t++) {
                let cell = cells[t];
#endif
#for W LANE_PARTS
#if CODE_BITS == 16
                let part_{{W}} = unpack2x16float(v_cache[cell + word_{{W}}]);
#else
                let scale_{{W}} = unpack2x16float(v_cache[cell + scale_word_{{W}}] >> scale_shift_{{W}}).x;
                let part_{{W}} = scale_{{W}} * codes(v_cache[cell + word_{{W}}] >> shift_{{W}});
#endif
#endfor
#for R ROWS
#if ROWS > 1
                let token_{{R}} = tile + {{T}}u * {{TILE_LANES}}u + t;
                let hidden_{{R}} = token_{{R}} < first_{{R}} || token_{{R}} > position_{{R}};
#for W LANE_PARTS
                let part_{{R}}_{{W}} = select(part_{{W}}, vec{{PART}}(0.0), hidden_{{R}});
#endfor
#else
#for W LANE_PARTS
                let part_{{R}}_{{W}} = part_{{W}};
#endfor
#endif
#for H HEADS
#if ONE_SUBGROUP
                let weight_{{R}}_{{H}} = subgroupShuffle(weight_{{T}}_{{R}}_{{H}}, t);
#else
                let weight_{{R}}_{{H}} = weights[t * {{PAIRS}}u + {{R}}u * {{HEADS}}u + {{H}}u];
#endif
#for W LANE_PARTS
                value_{{R}}_{{H}}_{{W}} =
                    fma(vec{{PART}}(weight_{{R}}_{{H}}), part_{{R}}_{{W}}, value_{{R}}_{{H}}_{{W}});
#endfor
#endfor
#endfor
            }
#endfor
#if !ONE_SUBGROUP
            workgroupBarrier();
#endif
