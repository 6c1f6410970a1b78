// The first half of a sample: what one slice of a row says of it; one workgroup a slice of a row.
//
// A greedy row needs its largest adjusted logit alone; the sums and the draw read the slice once more, where asked.
#include "grid.wgsl"

struct Params {
    logits: u32,
    rows: u32,
    extras: u32,
    counts: u32,
    slices: u32,
    num_rows: u32,
    vocab: u32,
    num_slices: u32,
    // Tokens of a slice, the last one's aside.
    slice_len: u32,
}
#include "params.wgsl"
#include "sample_row.wgsl"
// (slots, vocab)
@group(0) @binding(3) var<storage, read> counts: array<u32>;
// (rows, num_slices, 8): key of the largest logit; key and place of the largest adjusted one; score and place of the
// draw that wins; sum of exp(logit - largest); sum of exp((adjusted - largest adjusted) / temperature).
@group(0) @binding(4) var<storage, read_write> slices: array<u32>;

fn count_of(row: Row, v: u32) -> u32 {
    return counts[params.counts + row.slot * params.vocab + v];
}

@compute @workgroup_size({{ROW_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = workgroup_index(group, groups);
    let index = item / params.num_slices;
    if index >= params.num_rows {
        return;
    }
    let row = read_row(index);
    if row.slot == NONE && row.given == NONE {
        return;
    }
    let start = params.logits + index * params.vocab;
    let first = item % params.num_slices * params.slice_len;
    let end = min(first + params.slice_len, params.vocab);
    let adjusts = is_adjusted(row);

    var largest = 0u;
    var best = vec2(0u, NONE);
    for (var v = first + lane; v < end; v += {{ROW_LANES}}u) {
        let bits = logits[start + v];
        let key = key_of(bits);
        largest = max(largest, key);
        var adjusted = key;
        if adjusts {
            adjusted = adjusted_key(row, bits, v);
        }
        if adjusted > best.x {
            best = vec2(adjusted, v);
        }
    }
    largest = best_of_lanes(largest, 0u, lane).x;
    best = best_of_lanes(best.x, best.y, lane);

    let draws = row.temperature > 0.0 && !is_filtered(row);
    let weighs = row.temperature > 0.0 && row.top_p < 1.0;
    var winner = vec2(0u, NONE);
    var sum = 0.0;
    var weight = 0.0;
    if largest != NON_FINITE && (row.logprobs > 0u || draws || weighs) {
        let top = value_of(largest);
        let best_value = value_of(best.x);
        for (var v = first + lane; v < end; v += {{ROW_LANES}}u) {
            let bits = logits[start + v];
            if row.logprobs > 0u {
                sum += exp(bitcast<f32>(bits) - top);
            }
            if draws || weighs {
                let key = adjusted_key(row, bits, v);
                if key != 0u && draws {
                    let score = key_of(bitcast<u32>(scaled(row, key, best_value) + noise(row, v)));
                    if score > winner.x {
                        winner = vec2(score, v);
                    }
                }
                if key != 0u && weighs {
                    weight += exp(scaled(row, key, best_value));
                }
            }
        }
        sum = sum_lanes(sum, lane);
        weight = sum_lanes(weight, lane);
        winner = best_of_lanes(winner.x, winner.y, lane);
    }
    if lane == 0u {
        let to = params.slices + item * 8u;
        slices[to] = largest;
        slices[to + 1u] = best.x;
        slices[to + 2u] = best.y;
        slices[to + 3u] = bitcast<u32>(value_of(winner.x));
        slices[to + 4u] = winner.y;
        slices[to + 5u] = bitcast<u32>(sum);
        slices[to + 6u] = bitcast<u32>(weight);
    }
}
