// Causal paged attention with an online softmax: a workgroup computes one row of one query head.
//
// Scores: a lane holds one position of the KV tile (or TOKENS of them, TILE_LANES apart). Values: a lane holds pairs of
// elements of the head (fours where they are quantised), TILE_LANES of them apart. Tiles are 32 positions aligned to
// absolute positions; a tile that a row does not see is passed over. So a row's numbers depend on its own sequence
// alone.
#include "grid.wgsl"

struct Params {
    q: u32,
    items: u32,
    table: u32,
    out: u32,
    num_items: u32,
    rows_per_item: u32,
    num_heads: u32,
    num_kv_heads: u32,
    table_cols: u32,
    block_size: u32,
    window: u32,
    scale: f32,
}
#include "params.wgsl"

// (tokens, num_heads * head_dim)
@group(0) @binding(0) var<storage, read> q: array<f32>;
// [block][kv_head][token in block][HEAD_WORDS]: f16, two a word; or codes, then f16 scales, two a word.
@group(0) @binding(1) var<storage, read> k_cache: array<u32>;
@group(0) @binding(2) var<storage, read> v_cache: array<u32>;
// (items, 4): first row, rows, row of table, position of the first row.
@group(0) @binding(3) var<storage, read> items: array<u32>;
// (slots, table_cols): block ids.
@group(0) @binding(4) var<storage, read> table: array<u32>;
// (tokens, num_heads * head_dim)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

const LOWEST = -3.0e38;

#if !ONE_SUBGROUP
var<workgroup> scores: array<f32, 32>;
var<workgroup> rows_at: array<u32, 32>;
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

#if CODE_BITS < 16
fn query_at(at: u32) -> vec4<f32> {
    return vec4(q[at], q[at + 1u], q[at + 2u], q[at + 3u]);
}
#endif

@compute @workgroup_size({{TILE_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup_index(group, groups);
    let head = index % params.num_heads;
    let item_row = index / params.num_heads % params.rows_per_item;
    let item = index / params.num_heads / params.rows_per_item;
    if item >= params.num_items {
        return;
    }
    let item_at = params.items + item * 4u;
    if item_row >= items[item_at + 1u] {
        return;
    }
    let row = items[item_at] + item_row;
    let table_row = params.table + items[item_at + 2u] * params.table_cols;
    let position = items[item_at + 3u] + item_row;
    let kv_head = head / (params.num_heads / params.num_kv_heads);
    let first = select(0u, position + 1u - params.window, params.window > 0u && position >= params.window);
    let q_at = params.q + (row * params.num_heads + head) * {{HEAD_DIM}}u;

    var highest = LOWEST;
    var total = 0.0;
#for W LANE_PARTS
#if CODE_BITS == 16
    let word_{{W}} = min({{W}}u * {{TILE_LANES}}u + lane, {{HEAD_WORDS}}u - 1u);
    var value_{{W}} = vec2(0.0);
#else
    // Four elements: the words that hold their codes and their scale, and how far from the lowest bit.
    let four_{{W}} = min({{W}}u * {{TILE_LANES}}u + lane, {{HEAD_DIM}}u / 4u - 1u);
    let scale_word_{{W}} = {{CODE_WORDS}}u + four_{{W}} / 16u;
    let scale_shift_{{W}} = four_{{W}} / 8u % 2u * 16u;
#if CODE_BITS == 8
    let word_{{W}} = four_{{W}};
    let shift_{{W}} = 0u;
#else
    let word_{{W}} = four_{{W}} / 8u * 4u + four_{{W}} % 4u;
    let shift_{{W}} = four_{{W}} / 4u % 2u * 4u;
#endif
    var value_{{W}} = vec4(0.0);
#endif
#endfor
    for (var tile = first / 32u * 32u; tile <= position; tile += 32u) {
        // Positions outside are read where the row itself is, and count for nothing.
#for T TOKENS
        let seen_{{T}} = tile + {{T}}u * {{TILE_LANES}}u + lane;
        let visible_{{T}} = seen_{{T}} >= first && seen_{{T}} <= position;
        let at_{{T}} = cache_at(table_row, kv_head, select(position, seen_{{T}}, visible_{{T}}));
        var score_{{T}} = 0.0;
#endfor
#if CODE_BITS == 16
        for (var w = 0u; w < {{HEAD_WORDS}}u; w++) {
            let query = vec2(q[q_at + 2u * w], q[q_at + 2u * w + 1u]);
#for T TOKENS
            let key_{{T}} = unpack2x16float(k_cache[at_{{T}} + w]);
            score_{{T}} = fma(query.y, key_{{T}}.y, fma(query.x, key_{{T}}.x, score_{{T}}));
#endfor
        }
#else
        for (var group = 0u; group < {{GROUPS}}u; group++) {
#for T TOKENS
            var steps_{{T}} = 0.0;
#endfor
            for (var w = 0u; w < 4u; w++) {
                let low_query = query_at(q_at + group * 32u + w * 4u);
                let high_query = query_at(q_at + group * 32u + w * 4u + 16u);
#for T TOKENS
#if CODE_BITS == 8
                let low_{{T}} = codes(k_cache[at_{{T}} + group * 8u + w]);
                let high_{{T}} = codes(k_cache[at_{{T}} + group * 8u + w + 4u]);
#else
                let both_{{T}} = k_cache[at_{{T}} + group * 4u + w];
                let low_{{T}} = codes(both_{{T}});
                let high_{{T}} = codes(both_{{T}} >> 4u);
#endif
                steps_{{T}} += dot(low_query, low_{{T}}) + dot(high_query, high_{{T}});
#endfor
            }
#for T TOKENS
            let scales_{{T}} = k_cache[at_{{T}} + {{CODE_WORDS}}u + group / 2u];
            score_{{T}} = fma(unpack2x16float(scales_{{T}} >> (group % 2u * 16u)).x, steps_{{T}}, score_{{T}});
#endfor
        }
#endif
#for T TOKENS
        score_{{T}} = select(LOWEST, score_{{T}} * params.scale, visible_{{T}});
#endfor
#if ONE_SUBGROUP
        var tile_highest = score_0;
#for T TOKENS
        tile_highest = max(tile_highest, score_{{T}});
#endfor
        tile_highest = subgroupMax(tile_highest);
#else
        scores[lane] = score_0;
        rows_at[lane] = at_0;
        workgroupBarrier();
        var tile_highest = LOWEST;
        for (var t = 0u; t < 32u; t++) {
            tile_highest = max(tile_highest, scores[t]);
        }
        workgroupBarrier();
#endif
        let higher = max(highest, tile_highest);
        let shrink = exp(highest - higher);
        highest = higher;
        total *= shrink;
#for W LANE_PARTS
        value_{{W}} *= shrink;
#endfor
#if ONE_SUBGROUP
#for T TOKENS
        let weight_{{T}} = select(0.0, exp(score_{{T}} - higher), visible_{{T}});
        total += subgroupAdd(weight_{{T}});
        for (var t = 0u; t < {{TILE_LANES}}u; t++) {
            let weight = subgroupShuffle(weight_{{T}}, t);
            let at = subgroupShuffle(at_{{T}}, t);
#for W LANE_PARTS
#if CODE_BITS == 16
            value_{{W}} = fma(vec2(weight), unpack2x16float(v_cache[at + word_{{W}}]), value_{{W}});
#else
            let scale_{{W}} = unpack2x16float(v_cache[at + scale_word_{{W}}] >> scale_shift_{{W}}).x;
            let codes_{{W}} = codes(v_cache[at + word_{{W}}] >> shift_{{W}});
            value_{{W}} = fma(vec4(weight * scale_{{W}}), codes_{{W}}, value_{{W}});
#endif
#endfor
        }
#endfor
#else
        scores[lane] = select(0.0, exp(score_0 - higher), visible_0);
        workgroupBarrier();
        for (var t = 0u; t < 32u; t++) {
            let weight = scores[t];
            total += weight;
            let at = rows_at[t];
#for W LANE_PARTS
#if CODE_BITS == 16
            value_{{W}} = fma(vec2(weight), unpack2x16float(v_cache[at + word_{{W}}]), value_{{W}});
#else
            let scale_{{W}} = unpack2x16float(v_cache[at + scale_word_{{W}}] >> scale_shift_{{W}}).x;
            let codes_{{W}} = codes(v_cache[at + word_{{W}}] >> shift_{{W}});
            value_{{W}} = fma(vec4(weight * scale_{{W}}), codes_{{W}}, value_{{W}});
#endif
#endfor
        }
        workgroupBarrier();
#endif
    }
#for W LANE_PARTS
    let to_{{W}} = params.out + (row * params.num_heads + head) * {{HEAD_DIM}}u;
#if CODE_BITS == 16
    if {{W}}u * {{TILE_LANES}}u + lane < {{HEAD_WORDS}}u {
        out[to_{{W}} + 2u * word_{{W}}] = value_{{W}}.x / total;
        out[to_{{W}} + 2u * word_{{W}} + 1u] = value_{{W}}.y / total;
    }
#else
    if {{W}}u * {{TILE_LANES}}u + lane < {{HEAD_DIM}}u / 4u {
#for I 4
        out[to_{{W}} + 4u * four_{{W}} + {{I}}u] = value_{{W}}[{{I}}] / total;
#endfor
    }
#endif
#endfor
}
