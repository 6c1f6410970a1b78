// Causal paged attention with an online softmax: a workgroup computes some rows of an item for some query heads of one
// KV head, which share its loads.
//
// Scores: a lane holds one position of the KV tile (or TOKENS of them, TILE_LANES apart). Values: a lane holds pairs of
// elements of the head (fours where they are quantised), TILE_LANES of them apart. Tiles are 32 positions aligned to
// absolute positions, and cuts are CUT of them: each begins from nothing, and is merged with what earlier ones gave, or
// left to a later dispatch, whose workgroups behind the items take the same steps (`attention_merge.wgsl`). So a row's
// numbers depend on its own sequence alone.
#include "grid.wgsl"

struct Params {
    q: u32,
    items: u32,
    table: u32,
    out: u32,
    partials: u32,
    merges: u32,
    num_items: u32,
    num_merges: u32,
    // Workgroups that share the rows of an item.
    row_groups: u32,
    num_heads: u32,
    num_kv_heads: u32,
    table_cols: u32,
    block_size: u32,
    window: u32,
    scale: f32,
    soft_cap: f32,
}
#include "params.wgsl"

// (tokens, num_heads * head_dim)
@group(0) @binding(0) var<storage, read> q: array<f32>;
// [block][kv_head][token in block][HEAD_WORDS]: f16, two a word; or codes, then f16 scales, two a word.
@group(0) @binding(1) var<storage, read> k_cache: array<u32>;
@group(0) @binding(2) var<storage, read> v_cache: array<u32>;
// (items, 7): first row, rows, row of table, position of the first row, positions covered (begin, end), partial.
@group(0) @binding(3) var<storage, read> items: array<u32>;
// (slots, table_cols): block ids.
@group(0) @binding(4) var<storage, read> table: array<u32>;
// (tokens, num_heads * head_dim)
@group(0) @binding(5) var<storage, read_write> out: array<vec2<f32>>;
// (cuts, num_heads * (head_dim + 2)): values, largest score, sum of weights.
@group(0) @binding(6) var<storage, read_write> partials: array<vec2<f32>>;
// (split rows, 3): row of out, first cut, number of cuts.
@group(0) @binding(7) var<storage, read> merges: array<u32>;

const LOWEST = -3.0e38;
const NONE = 0xffffffffu;

#if !ONE_SUBGROUP
// [row][head][QUERY_FOURS], with zeros behind the elements of a head.
var<workgroup> queries: array<vec4<f32>, {{PAIRS}} * {{QUERY_FOURS}}>;
// [token][row][head]: scores, then weights.
var<workgroup> weights: array<f32, 32 * {{PAIRS}}>;
// By row and head: the largest score of a tile, the sum of weights of a cut.
var<workgroup> of_pair: array<f32, {{PAIRS}}>;
var<workgroup> cells: array<u32, 32>;
#endif

// Where the K and V of `position` begin, in words.
fn cache_at(table_row: u32, kv_head: u32, position: u32) -> u32 {
    let block = table[table_row + position / params.block_size];
    let row = (block * params.num_kv_heads + kv_head) * params.block_size + position % params.block_size;
    return row * {{HEAD_WORDS}}u;
}

#if CODE_BITS == 8
fn codes(word: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4(word) << vec4(24u, 16u, 8u, 0u)) >> vec4(24u));
}
#endif
#if CODE_BITS == 4
// The low halves of the bytes.
fn codes(word: u32) -> vec4<f32> {
    return vec4<f32>((vec4(word) >> vec4(0u, 8u, 16u, 24u)) & vec4(15u)) - vec4(8.0);
}
#endif

// Eight products, one after the other.
fn add_products(sum: f32, q_low: vec4<f32>, q_high: vec4<f32>, k_low: vec4<f32>, k_high: vec4<f32>) -> f32 {
    let low = fma(q_low.w, k_low.w, fma(q_low.z, k_low.z, fma(q_low.y, k_low.y, fma(q_low.x, k_low.x, sum))));
    return fma(q_high.w, k_high.w, fma(q_high.z, k_high.z, fma(q_high.y, k_high.y, fma(q_high.x, k_high.x, low))));
}

// tanh is clamped because some drivers overflow beyond; at 10 it is 1 in f32.
fn capped(score: f32) -> f32 {
    if params.soft_cap == 0.0 {
        return score;
    }
    return params.soft_cap * tanh(clamp(score / params.soft_cap, -10.0, 10.0));
}

#include "attention_merge.wgsl"

@compute @workgroup_size({{TILE_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Those that read the same K and V lie together.
    let index = workgroup_index(group, groups);
    let first_head = index % (params.num_heads / {{HEADS}}u) * {{HEADS}}u;
    let row_group = index / (params.num_heads / {{HEADS}}u) % params.row_groups;
    let item = index / (params.num_heads / {{HEADS}}u) / params.row_groups;
    if item >= params.num_items {
        merge(index - params.num_items * params.row_groups * (params.num_heads / {{HEADS}}u), lane);
        return;
    }
    let item_at = params.items + item * 7u;
    let num_rows = items[item_at + 1u];
    let first_row = row_group * {{ROWS}}u;
    if first_row >= num_rows {
        return;
    }
    let table_row = params.table + items[item_at + 2u] * params.table_cols;
    let kv_head = first_head / (params.num_heads / params.num_kv_heads);
#for R ROWS
    // Behind the last row that one is computed again, and not written.
    let row_{{R}} = min(first_row + {{R}}u, num_rows - 1u);
    let position_{{R}} = items[item_at + 3u] + row_{{R}};
    let hides_{{R}} = params.window > 0u && position_{{R}} >= params.window;
    let first_{{R}} = select(0u, position_{{R}} + 1u - params.window, hides_{{R}});
#for H HEADS
    let at_{{R}}_{{H}} = ((items[item_at] + row_{{R}}) * params.num_heads + first_head + {{H}}u) * {{HEAD_DIM}}u;
    var merged_highest_{{R}}_{{H}} = LOWEST;
    var merged_total_{{R}}_{{H}} = 0.0;
#for W LANE_PARTS
    var merged_{{R}}_{{H}}_{{W}} = vec{{PART}}(0.0);
#endfor
#endfor
#endfor
    let last = position_{{LAST_ROW}};
    let begin = max(items[item_at + 4u], first_0 / 32u * 32u);
    let end = min(items[item_at + 5u], last + 1u);
#if ROWS == 1
    let partial = items[item_at + 6u];
#endif
#if !ONE_SUBGROUP
#for R ROWS
#for H HEADS
    for (var d = lane; d < {{QUERY_FOURS}}u; d += {{TILE_LANES}}u) {
        let query_at = params.q + at_{{R}}_{{H}} + 4u * d;
        var four = vec4(0.0);
#for I 4
        if 4u * d + {{I}}u < {{HEAD_DIM}}u {
            four[{{I}}] = q[query_at + {{I}}u];
        }
#endfor
        queries[({{R}}u * {{HEADS}}u + {{H}}u) * {{QUERY_FOURS}}u + d] = four;
    }
#endfor
#endfor
    workgroupBarrier();
#endif
#for W LANE_PARTS
#if CODE_BITS == 16
    let word_{{W}} = min({{W}}u * {{TILE_LANES}}u + lane, {{HEAD_WORDS}}u - 1u);
    let element_{{W}} = 2u * word_{{W}};
#else
    // Four elements: the words that hold their codes and their scale, and how far from the lowest bit.
    let four_{{W}} = min({{W}}u * {{TILE_LANES}}u + lane, {{HEAD_DIM}}u / 4u - 1u);
    let element_{{W}} = 4u * four_{{W}};
    let scale_word_{{W}} = {{CODE_WORDS}}u + four_{{W}} / 16u;
    let scale_shift_{{W}} = four_{{W}} / 8u % 2u * 16u;
#if CODE_BITS == 8
    let word_{{W}} = four_{{W}};
    let shift_{{W}} = 0u;
#else
    let word_{{W}} = four_{{W}} / 8u * 4u + four_{{W}} % 4u;
    let shift_{{W}} = four_{{W}} / 4u % 2u * 4u;
#endif
#endif
#endfor

    var cut = begin;
    while cut < end {
        let cut_end = min(cut / {{CUT}}u * {{CUT}}u + {{CUT}}u, end);
#for R ROWS
#for H HEADS
        var highest_{{R}}_{{H}} = LOWEST;
        // Of this lane's positions.
        var total_{{R}}_{{H}} = 0.0;
#for W LANE_PARTS
        var value_{{R}}_{{H}}_{{W}} = vec{{PART}}(0.0);
#endfor
#endfor
#endfor
        for (var tile = cut; tile < cut_end; tile += 32u) {
            // Positions that no row sees are read where the last row itself is, and count for nothing.
#for T TOKENS
            let seen_{{T}} = tile + {{T}}u * {{TILE_LANES}}u + lane;
            let exists_{{T}} = seen_{{T}} >= first_0 && seen_{{T}} < end;
            let cell_{{T}} = cache_at(table_row, kv_head, select(last, seen_{{T}}, exists_{{T}}));
#for R ROWS
#for H HEADS
            var score_{{T}}_{{R}}_{{H}} = 0.0;
#endfor
#endfor
#endfor
#if !ONE_SUBGROUP
            cells[lane] = cell_0;
#endif
#include "attention_scores.wgsl"
#for R ROWS
#for T TOKENS
            let visible_{{T}}_{{R}} = seen_{{T}} >= first_{{R}} && seen_{{T}} <= position_{{R}};
#for H HEADS
            score_{{T}}_{{R}}_{{H}} =
                select(LOWEST, capped(score_{{T}}_{{R}}_{{H}} * params.scale), visible_{{T}}_{{R}});
#endfor
#endfor
#endfor
#if !ONE_SUBGROUP
#for R ROWS
#for H HEADS
            weights[lane * {{PAIRS}}u + {{R}}u * {{HEADS}}u + {{H}}u] = score_0_{{R}}_{{H}};
#endfor
#endfor
            workgroupBarrier();
            for (var pair = lane; pair < {{PAIRS}}u; pair += {{TILE_LANES}}u) {
                var largest = LOWEST;
                for (var t = 0u; t < 32u; t += 8u) {
#for I 8
                    largest = max(largest, weights[(t + {{I}}u) * {{PAIRS}}u + pair]);
#endfor
                }
                of_pair[pair] = largest;
            }
            workgroupBarrier();
#endif
#for R ROWS
#for H HEADS
#if ONE_SUBGROUP
            var largest_{{R}}_{{H}} = score_0_{{R}}_{{H}};
#for T TOKENS
            largest_{{R}}_{{H}} = max(largest_{{R}}_{{H}}, score_{{T}}_{{R}}_{{H}});
#endfor
            let higher_{{R}}_{{H}} = max(highest_{{R}}_{{H}}, subgroupMax(largest_{{R}}_{{H}}));
#else
            let higher_{{R}}_{{H}} = max(highest_{{R}}_{{H}}, of_pair[{{R}}u * {{HEADS}}u + {{H}}u]);
#endif
            let shrink_{{R}}_{{H}} = exp(highest_{{R}}_{{H}} - higher_{{R}}_{{H}});
            highest_{{R}}_{{H}} = higher_{{R}}_{{H}};
            // Of this tile. A sum with a product in it is an fma, lest one variant be given one and another be not.
            var of_tile_{{R}}_{{H}} = 0.0;
#for W LANE_PARTS
            value_{{R}}_{{H}}_{{W}} *= shrink_{{R}}_{{H}};
#endfor
#for T TOKENS
            let weight_{{T}}_{{R}}_{{H}} =
                select(0.0, exp(score_{{T}}_{{R}}_{{H}} - higher_{{R}}_{{H}}), visible_{{T}}_{{R}});
            of_tile_{{R}}_{{H}} += weight_{{T}}_{{R}}_{{H}};
#if !ONE_SUBGROUP
            weights[lane * {{PAIRS}}u + {{R}}u * {{HEADS}}u + {{H}}u] = weight_{{T}}_{{R}}_{{H}};
#endif
#endfor
            total_{{R}}_{{H}} = fma(total_{{R}}_{{H}}, shrink_{{R}}_{{H}}, of_tile_{{R}}_{{H}});
#endfor
#endfor
#if !ONE_SUBGROUP
            workgroupBarrier();
#endif
#include "attention_values.wgsl"
        }
#for R ROWS
#for H HEADS
#if ONE_SUBGROUP
        total_{{R}}_{{H}} = subgroupAdd(total_{{R}}_{{H}});
#else
        weights[lane * {{PAIRS}}u + {{R}}u * {{HEADS}}u + {{H}}u] = total_{{R}}_{{H}};
#endif
#endfor
#endfor
#if !ONE_SUBGROUP
        workgroupBarrier();
        for (var pair = lane; pair < {{PAIRS}}u; pair += {{TILE_LANES}}u) {
            var sum = 0.0;
            for (var t = 0u; t < 32u; t += 8u) {
#for I 8
                sum += weights[(t + {{I}}u) * {{PAIRS}}u + pair];
#endfor
            }
            of_pair[pair] = sum;
        }
        workgroupBarrier();
#for R ROWS
#for H HEADS
        total_{{R}}_{{H}} = of_pair[{{R}}u * {{HEADS}}u + {{H}}u];
#endfor
#endfor
#endif
#for R ROWS
#for H HEADS
#include "attention_cut.wgsl"
#endfor
#endfor
        cut = cut_end;
    }
#if ROWS == 1
    if partial != NONE {
        return;
    }
#endif
#for R ROWS
    if first_row + {{R}}u < num_rows {
#for W LANE_PARTS
        if {{W}}u * {{TILE_LANES}}u + lane < {{HEAD_DIM}}u / {{PART}}u {
#for H HEADS
            let to_{{R}}_{{H}}_{{W}} = (params.out + at_{{R}}_{{H}} + element_{{W}}) / 2u;
            let share_{{R}}_{{H}}_{{W}} = merged_{{R}}_{{H}}_{{W}} * (1.0 / merged_total_{{R}}_{{H}});
            out[to_{{R}}_{{H}}_{{W}}] = share_{{R}}_{{H}}_{{W}}.xy;
#if PART == 4
            out[to_{{R}}_{{H}}_{{W}} + 1u] = share_{{R}}_{{H}}_{{W}}.zw;
#endif
#endfor
        }
#endfor
    }
#endfor
}
