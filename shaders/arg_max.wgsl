// `sampled[slots[i]] = ` the index of the largest logit of row i, the lowest among equals; one workgroup a row.
//
// Floats are compared as integers of the same order, because a compiler may assume that there are no NaNs.
#include "grid.wgsl"

struct Params {
    logits: u32,
    slots: u32,
    sampled: u32,
    rows: u32,
    cols: u32,
}
#include "params.wgsl"

// (rows, cols), floats by their bits
@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read> slots: array<u32>;
@group(0) @binding(2) var<storage, read_write> sampled: array<u32>;

const NON_FINITE = 0xffffffffu;

// Larger floats have larger keys; both zeros have the same. Above all: what is not finite.
fn key(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    if magnitude >= 0x7f800000u {
        return NON_FINITE;
    }
    return select(0x80000000u + magnitude, 0x80000000u - magnitude, bits > 0x80000000u);
}

#if !ONE_SUBGROUP
var<workgroup> keys: array<u32, {{ROW_LANES}}>;
var<workgroup> places: array<u32, {{ROW_LANES}}>;
#endif

@compute @workgroup_size({{ROW_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = workgroup_index(group, groups);
    if row >= params.rows {
        return;
    }
    let start = params.logits + row * params.cols;
    var best = 0u;
    var place = 0xffffffffu;
    for (var i = lane; i < params.cols; i += {{ROW_LANES}}u) {
        let found = key(logits[start + i]);
        place = select(place, i, found > best);
        best = max(best, found);
    }
#if ONE_SUBGROUP
    let best_of_all = subgroupMax(best);
    place = subgroupMin(select(0xffffffffu, place, best == best_of_all));
    best = best_of_all;
#else
    keys[lane] = best;
    places[lane] = place;
    workgroupBarrier();
    for (var width = {{ROW_LANES}}u / 2u; width > 0u; width /= 2u) {
        if lane < width {
            let other = keys[lane + width];
            let other_place = places[lane + width];
            if other > keys[lane] || (other == keys[lane] && other_place < places[lane]) {
                keys[lane] = other;
                places[lane] = other_place;
            }
        }
        workgroupBarrier();
    }
    best = keys[0];
    place = places[0];
#endif
    let slot = slots[params.slots + row];
    if lane == 0u && slot != 0xffffffffu {
        sampled[params.sampled + slot] = select(place, NON_FINITE, best == NON_FINITE);
    }
}
