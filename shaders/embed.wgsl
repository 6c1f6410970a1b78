// `out[t] = scale * table[id(t)]`; one invocation 8 elements of a token. A shard serves the ids that it holds.
#include "grid.wgsl"

struct Params {
    ids: u32,
    sampled: u32,
    out: u32,
    num_tokens: u32,
    cols: u32,
    // Of a row, units of 32 columns.
    num_units: u32,
    // The shard's rows of the table.
    first_row: u32,
    num_rows: u32,
    scale: f32,
}
#include "params.wgsl"

// (tokens, 1): a token id, or, with the top bit set, the slot that sampled it.
@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read> sampled: array<u32>;
@group(0) @binding(2) var<storage, read> weight: array<u32>;
// (tokens, cols)
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
#include "weight.wgsl"

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    let token = i / (params.num_units * 4u);
    if token >= params.num_tokens {
        return;
    }
    var id = ids[params.ids + token];
    if (id & 0x80000000u) != 0u {
        id = sampled[params.sampled + (id & 0x7fffffffu)];
        // What a broken row sampled: its sequence has failed, and any token will do.
        id = select(id, 0u, id == 0xffffffffu);
    }
    let row = id - params.first_row;
    if id < params.first_row || row >= params.num_rows {
        return;
    }
    let unit = i / 4u % params.num_units;
    let part = i % 4u;
    let at = block_at(row, unit, params.num_units);
    let in_block = unit % {{UNITS}}u;
    let values = eight_weights(at, in_block, part, unit_scales(at, in_block)) * params.scale;
    let col = unit * 32u + part * 8u;
    let to = params.out + token * params.cols + col;
#for H 2
#for J 4
    if col + {{H}}u * 4u + {{J}}u < params.cols {
        out[to + {{H}}u * 4u + {{J}}u] = values[{{H}}][{{J}}];
    }
#endfor
#endfor
}
