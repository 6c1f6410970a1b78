// What `attention.wgsl` has left in parts, cut by cut, becomes the output of its row: one invocation an element, in the
// steps that the cuts of a row that is not split go together in.
#include "grid.wgsl"

struct Params {
    merges: u32,
    partials: u32,
    out: u32,
    num_merges: u32,
    num_heads: u32,
    head_dim: u32,
}
#include "params.wgsl"

// (split rows, 3): row of out, first cut, number of cuts.
@group(0) @binding(0) var<storage, read> merges: array<u32>;
// (cuts, num_heads * (head_dim + 2)): values, largest score, sum of weights.
@group(0) @binding(1) var<storage, read> partials: array<f32>;
// (tokens, num_heads * head_dim)
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

const LOWEST = -3.0e38;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    let width = params.num_heads * params.head_dim;
    if i >= params.num_merges * width {
        return;
    }
    let merge_at = params.merges + i / width * 3u;
    let head = i % width / params.head_dim;
    let element = i % params.head_dim;
    let slot = params.head_dim + 2u;
    var at = params.partials + (merges[merge_at + 1u] * params.num_heads + head) * slot;
    var value = 0.0;
    var highest = LOWEST;
    var total = 0.0;
    for (var cut = 0u; cut < merges[merge_at + 2u]; cut++) {
        let cut_highest = partials[at + params.head_dim];
        let both = max(highest, cut_highest);
        let is_first = total == 0.0;
        let shrink = select(exp(highest - both), 0.0, is_first);
        let weight = select(exp(cut_highest - both), 1.0, is_first);
        value = fma(partials[at + element], weight, value * shrink);
        total = fma(partials[at + params.head_dim + 1u], weight, total * shrink);
        highest = both;
        at += params.num_heads * slot;
    }
    out[params.out + merges[merge_at] * width + i % width] = value * (1.0 / total);
}
