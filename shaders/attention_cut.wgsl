// Part of `attention.wgsl`: what a cut gave one row and head is merged with what earlier ones gave, or goes to
// `partials`.
        if cut <= position_{{R}} && cut_end > first_{{R}} {
#if ROWS == 1
            if partial != NONE {
                let cut_row = partial + cut / {{CUT}}u - begin / {{CUT}}u;
                let slot = cut_row * params.num_heads + first_head + {{H}}u;
                let to = (params.partials + slot * ({{HEAD_DIM}}u + 2u)) / 2u;
#for W LANE_PARTS
                if {{W}}u * {{TILE_LANES}}u + lane < {{HEAD_DIM}}u / {{PART}}u {
                    partials[to + element_{{W}} / 2u] = value_{{R}}_{{H}}_{{W}}.xy;
#if PART == 4
                    partials[to + element_{{W}} / 2u + 1u] = value_{{R}}_{{H}}_{{W}}.zw;
#endif
                }
#endfor
                if lane == 0u {
                    partials[to + {{HEAD_DIM}}u / 2u] = vec2(highest_{{R}}_{{H}}, total_{{R}}_{{H}});
                }
            }
#endif
            let both = max(merged_highest_{{R}}_{{H}}, highest_{{R}}_{{H}});
            let is_first = merged_total_{{R}}_{{H}} == 0.0;
            let shrink = select(exp(merged_highest_{{R}}_{{H}} - both), 0.0, is_first);
            let weight = select(exp(highest_{{R}}_{{H}} - both), 1.0, is_first);
            merged_highest_{{R}}_{{H}} = both;
            merged_total_{{R}}_{{H}} = fma(total_{{R}}_{{H}}, weight, merged_total_{{R}}_{{H}} * shrink);
#for W LANE_PARTS
            merged_{{R}}_{{H}}_{{W}} =
                fma(value_{{R}}_{{H}}_{{W}}, vec{{PART}}(weight), merged_{{R}}_{{H}}_{{W}} * shrink);
#endfor
        }
