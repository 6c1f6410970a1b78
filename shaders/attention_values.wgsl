// Part of `attention.wgsl`: a tile's values, times the weights of all rows and heads. Several positions load theirs
// together, so that one wait serves them all, and are multiplied in order. A value that a row does not see is nothing
// to it, whatever it is: 0 times an infinity is none.
#for T TOKENS
#if ONE_SUBGROUP
            let num_tokens_{{T}} =
                min(max(cut_end, tile + {{T}}u * {{TILE_LANES}}u) - tile - {{T}}u * {{TILE_LANES}}u, {{TILE_LANES}}u);
            for (var t = 0u; t < num_tokens_{{T}}; t += {{VALUE_STEPS}}u) {
#else
            // The last ones may lie behind the cut, where no row sees them and there is a cell.
            for (var t = 0u; t < min(cut_end - tile, 32u); t += {{VALUE_STEPS}}u) {
#endif
#for S VALUE_STEPS
#if ONE_SUBGROUP
                let value_cell_{{S}} = subgroupShuffle(cell_{{T}}, t + {{S}}u);
#else
                let value_cell_{{S}} = cells[t + {{S}}u];
#endif
#for W LANE_PARTS
                let loaded_{{S}}_{{W}} = v_cache[value_cell_{{S}} + word_{{W}}];
#if CODE_BITS < 16
                let scales_{{S}}_{{W}} = v_cache[value_cell_{{S}} + scale_word_{{W}}];
#endif
#endfor
#endfor
#for S VALUE_STEPS
#for W LANE_PARTS
#if CODE_BITS == 16
                let part_{{S}}_{{W}} = unpack2x16float(loaded_{{S}}_{{W}});
#else
                let scale_{{S}}_{{W}} = unpack2x16float(scales_{{S}}_{{W}} >> scale_shift_{{W}}).x;
                let part_{{S}}_{{W}} = scale_{{S}}_{{W}} * codes(loaded_{{S}}_{{W}} >> shift_{{W}});
#endif
#endfor
#for R ROWS
#if HIDES
                let token_{{S}}_{{R}} = tile + {{T}}u * {{TILE_LANES}}u + t + {{S}}u;
                let hidden_{{S}}_{{R}} = token_{{S}}_{{R}} < first_{{R}} || token_{{S}}_{{R}} > position_{{R}};
#for W LANE_PARTS
                let part_{{S}}_{{R}}_{{W}} = select(part_{{S}}_{{W}}, vec{{PART}}(0.0), hidden_{{S}}_{{R}});
#endfor
#else
#for W LANE_PARTS
                let part_{{S}}_{{R}}_{{W}} = part_{{S}}_{{W}};
#endfor
#endif
#for H HEADS
#if ONE_SUBGROUP
                let weight_{{S}}_{{R}}_{{H}} = subgroupShuffle(weight_{{T}}_{{R}}_{{H}}, t + {{S}}u);
#else
                let weight_{{S}}_{{R}}_{{H}} = weights[(t + {{S}}u) * {{PAIRS}}u + {{R}}u * {{HEADS}}u + {{H}}u];
#endif
#for W LANE_PARTS
                value_{{R}}_{{H}}_{{W}} =
                    fma(vec{{PART}}(weight_{{S}}_{{R}}_{{H}}), part_{{S}}_{{R}}_{{W}}, value_{{R}}_{{H}}_{{W}});
#endfor
#endfor
#endfor
#endfor
            }
#endfor
#if !ONE_SUBGROUP
            workgroupBarrier();
#endif
