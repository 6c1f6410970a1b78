// The second half of a sample: a row's slices become its choice; one workgroup a row.
//
// Rows with top-k, top-p or min-p read the row again: a radix search over the keys of its logits finds the least that
// each filter keeps, and the draw goes over what is kept. Counts and masses are integers, so sums have no order.
#include "grid.wgsl"

struct Params {
    logits: u32,
    rows: u32,
    extras: u32,
    counts: u32,
    slices: u32,
    sampled: u32,
    chosen: u32,
    top: u32,
    num_rows: u32,
    vocab: u32,
    num_slices: u32,
}
#include "params.wgsl"
#include "sample_row.wgsl"
// (slots, vocab)
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;
// (rows, num_slices, 8), as `sample_slices.wgsl` has it.
@group(0) @binding(4) var<storage, read> slices: array<u32>;
// (slots)
@group(0) @binding(5) var<storage, read_write> sampled: array<u32>;
// (rows, 4): token, bits of its log-probability, rank, 0.
@group(0) @binding(6) var<storage, read_write> chosen: array<u32>;
// (rows, 20, 2): token, bits of its log-probability.
@group(0) @binding(7) var<storage, read_write> top: array<u32>;

// Sums of weights by the bits of a key that are looked for.
var<workgroup> buckets: array<atomic<u32>, 2048>;
var<workgroup> lane_sums: array<u32, {{ROW_LANES}}>;
// What a level of the search found: bits of the key so far, and what is left of the wanted sum.
var<workgroup> found: vec2<u32>;
var<workgroup> top_keys: array<u32, 20>;
var<workgroup> top_places: array<u32, 20>;
var<workgroup> num_top: atomic<u32>;

fn count_of(row: Row, v: u32) -> u32 {
    return counts[params.counts + row.slot * params.vocab + v];
}

// The sum over lanes of a small count.
fn add_lanes(value: u32, lane: u32) -> u32 {
    workgroupBarrier();
    lane_sums[lane] = value;
    workgroupBarrier();
    var sum = 0u;
    for (var i = 0u; i < {{ROW_LANES}}u; i++) {
        sum += lane_sums[i];
    }
    return sum;
}

// What a search goes over, and what it wants.
struct Search {
    // 0: adjusted logits, each counts one. 1: their masses. 2: the logits as they came, each counts one.
    mode: u32,
    // Keys below have no mass.
    least: u32,
    // Of counts; with masses it is a share of their sum.
    wanted: u32,
    share: f32,
    // The adjusted key of weight 1, and the mass of weight 1.
    best: f32,
    unit: f32,
}

// The largest key such that the weights of it and all larger ones sum to what is wanted, 11 + 11 + 10 bits of it after
// one another, from the top.
fn least_key(row: Row, start: u32, search: Search, lane: u32) -> u32 {
    const LANE_BUCKETS = 2048u / {{ROW_LANES}}u;
    var prefix = 0u;
    var left = search.wanted;
    for (var level = 0u; level < 3u; level++) {
        let shift = select(select(0u, 10u, level == 1u), 21u, level == 0u);
        let bits = select(11u, 10u, level == 2u);
        workgroupBarrier();
        for (var i = lane; i < 2048u; i += {{ROW_LANES}}u) {
            atomicStore(&buckets[i], 0u);
        }
        workgroupBarrier();
        for (var v = lane; v < params.vocab; v += {{ROW_LANES}}u) {
            let logit = logits[start + v];
            var key = 0u;
            if search.mode == 2u {
                key = key_of(logit);
            } else {
                key = adjusted_key(row, logit, v);
            }
            if level == 0u || (key >> (shift + bits)) == prefix {
                var weight = 1u;
                if search.mode == 1u {
                    weight = 0u;
                    if key != 0u && key >= search.least {
                        weight = u32(exp(scaled(row, key, search.best)) * search.unit + 0.5);
                    }
                }
                if weight > 0u {
                    atomicAdd(&buckets[(key >> shift) & ((1u << bits) - 1u)], weight);
                }
            }
        }
        workgroupBarrier();
        var sum = 0u;
        for (var i = 0u; i < LANE_BUCKETS; i++) {
            sum += atomicLoad(&buckets[lane * LANE_BUCKETS + i]);
        }
        lane_sums[lane] = sum;
        workgroupBarrier();
        if lane == 0u {
            if search.mode == 1u && level == 0u {
                var total = 0u;
                for (var i = 0u; i < {{ROW_LANES}}u; i++) {
                    total += lane_sums[i];
                }
                left = clamp(u32(ceil(search.share * f32(total))), 1u, total);
            }
            var of_lane = {{ROW_LANES}}u - 1u;
            while of_lane > 0u && lane_sums[of_lane] < left {
                left -= lane_sums[of_lane];
                of_lane--;
            }
            var bucket = of_lane * LANE_BUCKETS + LANE_BUCKETS - 1u;
            while bucket > of_lane * LANE_BUCKETS && atomicLoad(&buckets[bucket]) < left {
                left -= atomicLoad(&buckets[bucket]);
                bucket--;
            }
            found = vec2((prefix << bits) | bucket, left);
        }
        workgroupBarrier();
        prefix = found.x;
        left = found.y;
    }
    return prefix;
}

// The draw over tokens from key `least` on.
fn winner_from(row: Row, start: u32, least: u32, best: f32, lane: u32) -> u32 {
    var winner = vec2(0u, NONE);
    for (var v = lane; v < params.vocab; v += {{ROW_LANES}}u) {
        let key = adjusted_key(row, logits[start + v], v);
        if key != 0u && key >= least {
            let score = key_of(bitcast<u32>(scaled(row, key, best) + noise(row, v)));
            if score > winner.x {
                winner = vec2(score, v);
            }
        }
    }
    return best_of_lanes(winner.x, winner.y, lane).y;
}

// Ranks the tokens from key `least` on, `count` of them, and writes them; among equals the lowest come first.
fn write_top(index: u32, start: u32, least: u32, count: u32, log_sum: f32, lane: u32) {
    if lane == 0u {
        atomicStore(&num_top, 0u);
    }
    workgroupBarrier();
    for (var v = lane; v < params.vocab; v += {{ROW_LANES}}u) {
        let key = key_of(logits[start + v]);
        if key > least {
            let place = atomicAdd(&num_top, 1u);
            if place < 20u {
                top_keys[place] = key;
                top_places[place] = v;
            }
        }
    }
    workgroupBarrier();
    let num_larger = atomicLoad(&num_top);
    // Those that equal the last one, from the lowest on.
    var next = 0u;
    for (var i = num_larger; i < count; i++) {
        var lowest = NONE;
        for (var v = next + lane; v < params.vocab && lowest == NONE; v += {{ROW_LANES}}u) {
            if key_of(logits[start + v]) == least {
                lowest = v;
            }
        }
        lowest = best_of_lanes(1u, lowest, lane).y;
        if lane == 0u {
            top_keys[i] = least;
            top_places[i] = lowest;
        }
        next = lowest + 1u;
    }
    workgroupBarrier();
    for (var i = lane; i < count; i += {{ROW_LANES}}u) {
        let key = top_keys[i];
        let place = top_places[i];
        var rank = 0u;
        for (var j = 0u; j < count; j++) {
            let other = top_keys[j];
            rank += select(0u, 1u, other > key || (other == key && top_places[j] < place));
        }
        let to = params.top + (index * 20u + rank) * 2u;
        top[to] = place;
        top[to + 1u] = bitcast<u32>(value_of(key) - log_sum);
    }
}

@compute @workgroup_size({{ROW_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup_index(group, groups);
    // Read before anything branches: software Vulkan then knows that all lanes read the same.
    let row = read_row(min(index, params.num_rows - 1u));
    if index >= params.num_rows {
        return;
    }
    if row.slot == NONE && row.given == NONE {
        return;
    }
    let start = params.logits + index * params.vocab;
    let first_slice = params.slices + index * params.num_slices * 8u;
    var largest = 0u;
    var best = vec2(0u, NONE);
    var winner = vec2(0u, NONE);
    for (var i = lane; i < params.num_slices; i += {{ROW_LANES}}u) {
        let at = first_slice + i * 8u;
        largest = max(largest, slices[at]);
        if slices[at + 1u] > best.x {
            best = vec2(slices[at + 1u], slices[at + 2u]);
        }
    }
    largest = best_of_lanes(largest, 0u, lane).x;
    best = best_of_lanes(best.x, best.y, lane);
    let best_value = value_of(best.x);
    let filters = is_filtered(row);
    let finite = largest != NON_FINITE;

    // Draws and sums of the slices are relative to each slice's own largest.
    var log_sum = 0.0;
    var total = 1.0;
    if finite && (row.logprobs > 0u || row.temperature > 0.0) {
        var sum = 0.0;
        var weight = 0.0;
        for (var i = lane; i < params.num_slices; i += {{ROW_LANES}}u) {
            let at = first_slice + i * 8u;
            sum += bitcast<f32>(slices[at + 5u]) * exp(value_of(slices[at]) - value_of(largest));
            if row.temperature > 0.0 && slices[at + 1u] != 0u {
                let behind = scaled(row, slices[at + 1u], best_value);
                weight += bitcast<f32>(slices[at + 6u]) * exp(behind);
                let score = key_of(bitcast<u32>(behind + bitcast<f32>(slices[at + 3u])));
                if score > winner.x {
                    winner = vec2(score, slices[at + 4u]);
                }
            }
        }
        log_sum = value_of(largest) + log(sum_lanes(sum, lane));
        total = sum_lanes(weight, lane);
        winner = best_of_lanes(winner.x, winner.y, lane);
    }

    var search = Search(0u, 0u, row.top_k, row.top_p, best_value, 2147483648.0 / total);
    var least_by_best = 0u;
    if filters && row.min_p > 0.0 {
        least_by_best = key_of(bitcast<u32>(max(best_value + row.temperature * log(row.min_p), LOWEST)));
    }
    let asked_top = min(max(row.logprobs, 1u) - 1u, params.vocab);
    var least_of_top = 0u;
    if finite {
        // Top-k, then top-p among what that keeps, then the most likely tokens.
        for (var mode = 0u; mode < 3u; mode++) {
            let by_count = mode == 0u && filters && row.top_k > 0u && row.top_k < params.vocab;
            let by_mass = mode == 1u && filters && row.top_p < 1.0;
            let of_top = mode == 2u && asked_top > 0u;
            if by_count || by_mass || of_top {
                search.mode = mode;
                search.wanted = select(row.top_k, asked_top, of_top);
                let least = least_key(row, start, search, lane);
                search.least = select(least, search.least, of_top);
                least_of_top = least;
            }
        }
    }

    var id = row.given;
    if id == NONE {
        id = best.y;
        if row.temperature > 0.0 {
            id = winner.y;
        }
        if filters && finite {
            id = winner_from(row, start, max(search.least, least_by_best), best_value, lane);
        }
        // The best token is kept whatever rounding did to the filters.
        id = select(id, best.y, id == NONE);
    }
    // A mask that allows nothing leaves no best token.
    id = select(NONE, id, finite);

    var rank = 0u;
    var logprob = 0.0;
    if row.logprobs > 0u && id != NONE {
        let own = key_of(logits[start + id]);
        var num_larger = 0u;
        for (var v = lane; v < params.vocab; v += {{ROW_LANES}}u) {
            num_larger += select(0u, 1u, key_of(logits[start + v]) > own);
        }
        rank = 1u + add_lanes(num_larger, lane);
        logprob = value_of(own) - log_sum;
        if asked_top > 0u {
            write_top(index, start, least_of_top, asked_top, log_sum, lane);
        }
    }
    if lane == 0u {
        let to = params.chosen + index * 4u;
        chosen[to] = id;
        chosen[to + 1u] = bitcast<u32>(logprob);
        chosen[to + 2u] = rank;
        chosen[to + 3u] = 0u;
        if row.slot != NONE {
            sampled[params.sampled + row.slot] = id;
            if is_penalised(row) && id != NONE {
                counts[params.counts + row.slot * params.vocab + id] += 1u;
            }
        }
    }
}
