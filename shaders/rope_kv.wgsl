// From a product of q, k and v to attention: heads of q and k through their norm and rotated, k and v into the cache.
// One workgroup a token and head. A lane makes elements of q, or words of the cache: two elements of f16, or the scales
// and the codes of two groups of 32.
#include "grid.wgsl"

struct Params {
    qkv: u32,
    norms: u32,
    table: u32,
    positions: u32,
    slots: u32,
    q: u32,
    has_norms: u32,
    // Tokens times heads of q, k and v.
    num_items: u32,
    num_heads: u32,
    num_kv_heads: u32,
    half_dim: u32,
    // 0: pairs (2i, 2i + 1), 1: pairs (i, i + half_dim).
    halves: u32,
    block_size: u32,
    eps: f32,
}
#include "params.wgsl"

// (tokens, (num_heads + 2 * num_kv_heads) * HEAD_DIM): heads of q, of k, of v.
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
// (2, HEAD_DIM): of q, of k, if has_norms.
@group(0) @binding(1) var<storage, read> norms: array<f32>;
// (positions, 2 * half_dim): cosines, then sines.
@group(0) @binding(2) var<storage, read> table: array<f32>;
// (tokens, 1)
@group(0) @binding(3) var<storage, read> positions: array<u32>;
// (tokens, 1)
@group(0) @binding(4) var<storage, read> slots: array<u32>;
// (tokens, num_heads * HEAD_DIM)
@group(0) @binding(5) var<storage, read_write> q: array<f32>;
// [block][kv_head][token in block][HEAD_WORDS]: f16, two a word; or codes, then f16 scales, two a word.
@group(0) @binding(6) var<storage, read_write> k_cache: array<u32>;
@group(0) @binding(7) var<storage, read_write> v_cache: array<u32>;
#include "sum_lanes.wgsl"
#include "kv_head.wgsl"

struct Head {
    // Of its elements in qkv.
    start: u32,
    // Of its norm's weights.
    norm: u32,
    is_normed: bool,
    scale: f32,
    // Elements that rotate: none of v.
    rotary_dim: u32,
    // Of its cosines.
    angles: u32,
}

fn normed(head: Head, i: u32) -> f32 {
    let value = qkv[head.start + i];
    if head.is_normed {
        return value * head.scale * norms[head.norm + i];
    }
    return value;
}

fn element(head: Head, i: u32) -> f32 {
    let own = normed(head, i);
    if i >= head.rotary_dim {
        return own;
    }
    var is_first = (i & 1u) == 0u;
    var angle = i / 2u;
    var other = i ^ 1u;
    if params.halves == 1u {
        is_first = i < params.half_dim;
        angle = select(i - params.half_dim, i, is_first);
        other = select(angle, i + params.half_dim, is_first);
    }
    let cosine = table[head.angles + angle];
    let sine = table[head.angles + params.half_dim + angle];
    return own * cosine + normed(head, other) * select(sine, -sine, is_first);
}

fn set_word(is_k: bool, at: u32, word: u32) {
    if is_k {
        k_cache[at] = word;
    } else {
        v_cache[at] = word;
    }
}

// Element by element from `to` on in q.
fn store_q(head: Head, to: u32, lane: u32) {
    for (var i = lane; i < {{HEAD_DIM}}u; i += {{ROW_LANES}}u) {
        q[to + i] = element(head, i);
    }
}

#if CODE_BITS == 16
// Two elements a word, from `to` on in the cache.
fn store_kv(head: Head, is_k: bool, to: u32, lane: u32) {
    for (var word = lane; word < {{HEAD_WORDS}}u; word += {{ROW_LANES}}u) {
        let low = half_bits(element(head, 2u * word));
        set_word(is_k, to + word, low | (half_bits(element(head, 2u * word + 1u)) << 16u));
    }
}
#else
// Codes, then scales, from `to` on in the cache.
fn store_kv(head: Head, is_k: bool, to: u32, lane: u32) {
    for (var part = lane; part < {{HEAD_WORDS}}u - {{CODE_WORDS}}u; part += {{ROW_LANES}}u) {
        var scales = 0u;
        for (var group = 2u * part; group < min(2u * part + 2u, {{GROUPS}}u); group++) {
            scales |= store_group(head, is_k, to, group) << (16u * (group & 1u));
        }
        set_word(is_k, to + {{CODE_WORDS}}u + part, scales);
    }
}

// The codes of one group; returns the bits of its scale.
fn store_group(head: Head, is_k: bool, to: u32, group: u32) -> u32 {
    var x: array<f32, 32>;
    var highest = 0u;
    var extreme = 0.0;
    for (var i = 0u; i < 32u; i++) {
        x[i] = element(head, group * 32u + i);
        let magnitude = bitcast<u32>(x[i]) & 0x7fffffffu;
        extreme = select(extreme, x[i], magnitude > highest);
        highest = max(highest, magnitude);
    }
    let scale = scale_bits(highest, extreme);
    // Without steps an element is zero, whatever it is.
    let steps = inverse(scale);
    let some = steps != 0.0;
    for (var word = 0u; word < {{CODE_BITS}}u; word++) {
        var codes = 0u;
        for (var byte = 0u; byte < 4u; byte++) {
            let i = word * 4u + byte;
            codes |= code(select(0.0, x[i] * steps, some)) << (8u * byte);
#if CODE_BITS == 4
            codes |= code(select(0.0, x[16u + i] * steps, some)) << (8u * byte + 4u);
#endif
        }
        set_word(is_k, to + group * {{CODE_BITS}}u + word, codes);
    }
    return scale;
}
#endif

@compute @workgroup_size({{ROW_LANES}})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    place: Place,
) {
    let lane = place.lane;
    let index = workgroup_index(group, groups);
    if index >= params.num_items {
        return;
    }
    let num_heads = params.num_heads + 2u * params.num_kv_heads;
    let token = index / num_heads;
    let head_index = index % num_heads;
    let is_q = head_index < params.num_heads;
    let is_k = !is_q && head_index < params.num_heads + params.num_kv_heads;
    var head: Head;
    head.start = params.qkv + index * {{HEAD_DIM}}u;
    head.norm = params.norms + select({{HEAD_DIM}}u, 0u, is_q);
    head.is_normed = params.has_norms == 1u && (is_q || is_k);
    head.scale = 1.0;
    head.rotary_dim = select(0u, 2u * params.half_dim, is_q || is_k);
    head.angles = params.table + positions[params.positions + token] * 2u * params.half_dim;
    if head.is_normed {
        var sum = 0.0;
        for (var first = 0u; first < {{HEAD_DIM}}u; first += {{ROW_LANES}}u) {
            let i = first + lane;
            let value = select(0.0, qkv[head.start + min(i, {{HEAD_DIM}}u - 1u)], i < {{HEAD_DIM}}u);
            sum = fma(value, value, sum);
        }
        head.scale = 1.0 / sqrt(sum_lanes(sum, place) / {{HEAD_DIM}}.0 + params.eps);
    }
    if is_q {
        store_q(head, params.q + (token * params.num_heads + head_index) * {{HEAD_DIM}}u, lane);
        return;
    }
    let kv_head = (head_index - params.num_heads) % params.num_kv_heads;
    let slot = slots[params.slots + token];
    let block = slot / params.block_size;
    let row = (block * params.num_kv_heads + kv_head) * params.block_size + slot % params.block_size;
    store_kv(head, is_k, row * {{HEAD_WORDS}}u, lane);
}
