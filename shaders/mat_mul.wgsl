// `out = x @ weight^T + bias`: a workgroup computes ROWS rows of a tile of 32 columns.
//
// A lane holds COLUMNS columns of the tile, LANES apart, and the units of 32 along K that its split owns: every
// SPLITS-th. A sum runs along K within a split, one fma a value, then over the splits. That order is the same for every
// ROWS, so the bits of a row do not depend on how many rows there are.
#include "grid.wgsl"

struct Params {
    x: u32,
    bias: u32,
    out: u32,
    has_bias: u32,
    // The rows of x that this dispatch covers: `first_row .. num_rows`.
    first_row: u32,
    num_rows: u32,
    // K, and its units of 32.
    inner: u32,
    num_units: u32,
    // Of a row of out.
    cols: u32,
    // The shard's part of N.
    first_col: u32,
    shard_cols: u32,
    // Workgroups beside one another on the same tile, each with its own rows.
    row_tiles: u32,
}
#include "params.wgsl"

// (rows, inner)
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<u32>;
// (1, N), if has_bias
@group(0) @binding(2) var<storage, read> bias: array<f32>;
// (rows, cols), from the product's first column on.
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
#include "weight.wgsl"

fn store(row: u32, shard_col: u32, sum: f32) {
    if row < params.num_rows && shard_col < params.shard_cols {
        let col = params.first_col + shard_col;
        var value = sum;
        if params.has_bias == 1u {
            value += bias[params.bias + col];
        }
        out[params.out + row * params.cols + col] = value;
    }
}

#if SPLITS > 1
// COLUMNS is 1.
var<workgroup> partial: array<f32, {{PARTIALS}}>;
#endif

// LANES x SPLITS, lanes first; in one dimension, because subgroups are only defined there.
@compute @workgroup_size({{GROUP_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
#if SUBGROUPS
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
#endif
) {
    let index = workgroup_index(group, groups);
    let tile = index / params.row_tiles;
    if tile * 32u >= params.shard_cols {
        return;
    }
    let lane = local % {{LANES}}u;
    let own_split = local / {{LANES}}u;
    let row = params.first_row + index % params.row_tiles * {{ROWS}}u;
    let last = params.num_rows - 1u;
#for R ROWS
    let x_row_{{R}} = params.x + min(row + {{R}}u, last) * params.inner;
#for C COLUMNS
    var sum_{{R}}_{{C}} = 0.0;
#endfor
#endfor
    for (var unit = own_split; unit < params.num_units; unit += {{SPLITS}}u) {
        let in_block = unit % {{UNITS}}u;
        let at_0 = block_at(tile * 32u + lane, unit, params.num_units);
        let scales_0 = unit_scales(at_0, in_block);
#for C COLUMNS
#if C > 0
        let at_{{C}} = at_0 + {{C}}u * {{LANES}}u;
        let scales_{{C}} = unit_scales(at_{{C}}, in_block);
#endif
#endfor
        // Not unrolled: software drivers would compile twice as long, and run no faster.
        for (var part = 0u; part < 4u; part++) {
            let k = unit * 32u + part * 8u;
#for C COLUMNS
            let w_{{C}} = eight_weights(at_{{C}}, in_block, part, scales_{{C}});
#endfor
            // Past the end of a row the weights are zero.
#for R ROWS
#if SUBGROUPS
            let x_{{R}} = x[x_row_{{R}} + min(k + subgroup_lane % 8u, params.inner - 1u)];
#endif
#endfor
#for H 2
#for J 4
#for R ROWS
            {
#if SUBGROUPS
                let v = subgroupBroadcast(x_{{R}}, {{H}}u * 4u + {{J}}u);
#else
                let v = x[x_row_{{R}} + min(k + {{H}}u * 4u + {{J}}u, params.inner - 1u)];
#endif
#for C COLUMNS
                sum_{{R}}_{{C}} = fma(v, w_{{C}}[{{H}}][{{J}}], sum_{{R}}_{{C}});
#endfor
            }
#endfor
#endfor
#endfor
        }
    }
#if SPLITS > 1
#for R ROWS
    partial[({{R}}u * {{SPLITS}}u + own_split) * {{LANES}}u + lane] = sum_{{R}}_0;
#endfor
    workgroupBarrier();
    for (var r = own_split; r < {{ROWS}}u; r += {{SPLITS}}u) {
        var sum = 0.0;
        for (var split = 0u; split < {{SPLITS}}u; split++) {
            sum += partial[(r * {{SPLITS}}u + split) * {{LANES}}u + lane];
        }
        store(row + r, tile * 32u + lane, sum);
    }
#else
#for R ROWS
#for C COLUMNS
    store(row + {{R}}u, tile * 32u + lane + {{C}}u * {{LANES}}u, sum_{{R}}_{{C}});
#endfor
#endfor
#endif
}
