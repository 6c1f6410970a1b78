// Part of `add_norm.wgsl`: y in ROW_STEPS columns of a lane, from `first` on; behind the last column that one again.
#for S ROW_STEPS
            let i_{{S}} = first + {{S}}u * {{ROW_LANES}}u + lane;
            let at_{{S}} = min(i_{{S}}, last);
            let part_0_{{S}} = y[y_row + at_{{S}}];
#endfor
#if MAX_PARTIALS > 1
            // The product before this has left its last step to it: `mat_mul_sum.wgsl`.
#for P MAX_PARTIALS
#if P > 0
#for S ROW_STEPS
            var part_{{P}}_{{S}} = 0.0;
#endfor
#endif
#endfor
            if params.num_partials > 1u {
#for P MAX_PARTIALS
#if P > 0
                let from_{{P}} = y_row + min({{P}}u, params.num_partials - 1u) * params.partial_stride;
#for S ROW_STEPS
                part_{{P}}_{{S}} = y[from_{{P}} + at_{{S}}];
#endfor
#endif
#endfor
            }
#for S ROW_STEPS
            var y_{{S}} = 0.0 + part_0_{{S}};
#for P MAX_PARTIALS
#if P > 0
            y_{{S}} += select(0.0, part_{{P}}_{{S}}, {{P}}u < params.num_partials);
#endif
#endfor
#endfor
#else
#for S ROW_STEPS
            let y_{{S}} = part_0_{{S}};
#endfor
#endif
