// Writes K and V of each token into its cache slot as f16; one invocation a pair of elements of both.
#include "grid.wgsl"

struct Params {
    k: u32,
    v: u32,
    slots: u32,
    num_words: u32,
    num_kv_heads: u32,
    // Of a head, half of its elements.
    head_words: u32,
    block_size: u32,
}
#include "params.wgsl"

// (tokens, num_kv_heads * head_dim)
@group(0) @binding(0) var<storage, read> k: array<f32>;
@group(0) @binding(1) var<storage, read> v: array<f32>;
@group(0) @binding(2) var<storage, read> slots: array<u32>;
// [block][kv_head][token in block][head_dim] of f16, two a word.
@group(0) @binding(3) var<storage, read_write> k_cache: array<u32>;
@group(0) @binding(4) var<storage, read_write> v_cache: array<u32>;

// Round to nearest, ties to even, in integers: drivers may round `pack2x16float` as they like.
fn half_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude >= 0x47800000u {
        // Infinity, a NaN, or 65536 and above.
        return sign | select(0x7c00u, 0x7e00u, magnitude > 0x7f800000u);
    }
    if magnitude >= 0x38800000u {
        let rounded = magnitude + 0xfffu + ((magnitude >> 13u) & 1u);
        return sign | ((rounded - 0x38000000u) >> 13u);
    }
    // Subnormal: units of 2^-24. Below 2^-25 nothing is left.
    let exponent = magnitude >> 23u;
    if exponent < 102u {
        return sign;
    }
    let shift = 126u - exponent;
    let significand = (magnitude & 0x7fffffu) | 0x800000u;
    let kept = significand >> shift;
    let rest = significand & ((1u << shift) - 1u);
    let half = 1u << (shift - 1u);
    let up = rest > half || (rest == half && (kept & 1u) == 1u);
    return sign | (kept + select(0u, 1u, up));
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    if i >= params.num_words {
        return;
    }
    let word = i % params.head_words;
    let head = i / params.head_words % params.num_kv_heads;
    let slot = slots[params.slots + i / params.head_words / params.num_kv_heads];
    let block = slot / params.block_size;
    let row = (block * params.num_kv_heads + head) * params.block_size + slot % params.block_size;
    let to = row * params.head_words + word;
    let k_start = params.k + 2u * i;
    k_cache[to] = half_bits(k[k_start]) | (half_bits(k[k_start + 1u]) << 16u);
    let v_start = params.v + 2u * i;
    v_cache[to] = half_bits(v[v_start]) | (half_bits(v[v_start + 1u]) << 16u);
}
