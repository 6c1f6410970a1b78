// Clears a slot's counts and counts its sequence's tokens; one workgroup a slot.
#include "grid.wgsl"

struct Params {
    resets: u32,
    tokens: u32,
    counts: u32,
    num_resets: u32,
    vocab: u32,
}
#include "params.wgsl"

// (n, 4): slot; where its tokens begin, where the generated ones begin, and where they end.
@group(0) @binding(0) var<storage, read> resets: array<u32>;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
// (slots, vocab): the top bit for a token of the prompt, below it how often it was generated.
@group(0) @binding(2) var<storage, read_write> counts: array<atomic<u32>>;

@compute @workgroup_size({{ROW_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup_index(group, groups);
    if index >= params.num_resets {
        return;
    }
    let at = params.resets + index * 4u;
    let row = params.counts + resets[at] * params.vocab;
    for (var v = lane; v < params.vocab; v += {{ROW_LANES}}u) {
        atomicStore(&counts[row + v], 0u);
    }
    storageBarrier();
    for (var i = resets[at + 1u] + lane; i < resets[at + 3u]; i += {{ROW_LANES}}u) {
        let to = row + tokens[params.tokens + i];
        if i < resets[at + 2u] {
            atomicOr(&counts[to], 0x80000000u);
        } else {
            atomicAdd(&counts[to], 1u);
        }
    }
}
