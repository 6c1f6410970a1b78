// Writes K and V of each token into its cache slot. As f16 an invocation rounds two elements of both; quantised it does
// two groups of 32, whose scales share a word, by the steps of the cpu's kv_head.rs.
#include "grid.wgsl"

struct Params {
    k: u32,
    v: u32,
    slots: u32,
    num_parts: u32,
    num_kv_heads: u32,
    // Of a head.
    parts: u32,
    block_size: u32,
}
#include "params.wgsl"

// (tokens, num_kv_heads * head_dim)
@group(0) @binding(0) var<storage, read> k: array<f32>;
@group(0) @binding(1) var<storage, read> v: array<f32>;
@group(0) @binding(2) var<storage, read> slots: array<u32>;
// [block][kv_head][token in block][HEAD_WORDS]: f16, two a word; or codes, then f16 scales, two a word.
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

#if CODE_BITS < 16
// Steps of a scale in 1, to 20 bits; 0 for a scale that is zero or not finite.
fn inverse(scale: u32) -> f32 {
    let exponent = (scale >> 10u) & 31u;
    let fraction = scale & 0x3ffu;
    if exponent == 31u || (scale & 0x7fffu) == 0u {
        return 0.0;
    }
    // The scale is significand * 2^(power - 25).
    let zeros = countLeadingZeros(fraction);
    let significand = select(fraction | 0x400u, fraction << ((zeros - 21u) & 31u), exponent == 0u);
    let power = select(i32(exponent), 22 - i32(zeros), exponent == 0u);
    let unit = bitcast<f32>(((scale & 0x8000u) << 16u) | (u32(127 - 6 - power) << 23u));
    return f32(0x80000000u / significand) * unit;
}

// The f16 bits of the scale of a group whose element of largest magnitude is given.
fn scale_bits(highest: u32, extreme: f32) -> u32 {
    if highest >= 0x7f800000u {
        return 0x7e00u;
    }
#if CODE_BITS == 8
    return half_bits(bitcast<f32>(highest) * 0.007874016);
#else
    return half_bits(extreme * -0.125);
#endif
}

#if CODE_BITS == 8
// A signed byte, from -127 to 127, halves away from zero.
fn code(steps: f32) -> u32 {
    let code = min((u32(abs(steps) * 2.0) + 1u) / 2u, 127u);
    return select(code, (256u - code) & 255u, steps < 0.0);
}
#else
// From 0 to 15, of which 8 means zero, halves up.
fn code(steps: f32) -> u32 {
    return u32(clamp((i32(floor(steps * 2.0)) + 17) >> 1u, 0, 15));
}
#endif

#for SIDE 2
fn element_{{SIDE}}(at: u32) -> f32 {
#if SIDE == 0
    return k[params.k + at];
#else
    return v[params.v + at];
#endif
}

fn set_{{SIDE}}(at: u32, word: u32) {
#if SIDE == 0
    k_cache[at] = word;
#else
    v_cache[at] = word;
#endif
}

// Two groups of the head whose elements begin at `start` and whose words at `to`.
fn store_{{SIDE}}(start: u32, to: u32, part: u32) {
    var scales = 0u;
    for (var group = 2u * part; group < min(2u * part + 2u, {{GROUPS}}u); group++) {
        let first = start + group * 32u;
        var highest = 0u;
        var extreme = 0.0;
        for (var i = 0u; i < 32u; i++) {
            let x = element_{{SIDE}}(first + i);
            let magnitude = bitcast<u32>(x) & 0x7fffffffu;
            extreme = select(extreme, x, magnitude > highest);
            highest = max(highest, magnitude);
        }
        let scale = scale_bits(highest, extreme);
        scales |= scale << (16u * (group & 1u));
        // Without steps an element is zero, whatever it is.
        let steps = inverse(scale);
        let some = steps != 0.0;
        for (var word = 0u; word < {{CODE_BITS}}u; word++) {
            var codes = 0u;
            for (var byte = 0u; byte < 4u; byte++) {
                let i = word * 4u + byte;
                codes |= code(select(0.0, element_{{SIDE}}(first + i) * steps, some)) << (8u * byte);
#if CODE_BITS == 4
                codes |= code(select(0.0, element_{{SIDE}}(first + 16u + i) * steps, some)) << (8u * byte + 4u);
#endif
            }
            set_{{SIDE}}(to + group * {{CODE_BITS}}u + word, codes);
        }
    }
    set_{{SIDE}}(to + {{CODE_WORDS}}u + part, scales);
}
#endfor
#endif

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = workgroup_index(group, groups) * 64u + lane;
    if i >= params.num_parts {
        return;
    }
    let part = i % params.parts;
    let head = i / params.parts % params.num_kv_heads;
    let slot = slots[params.slots + i / params.parts / params.num_kv_heads];
    let block = slot / params.block_size;
    let row = (block * params.num_kv_heads + head) * params.block_size + slot % params.block_size;
    let to = row * {{HEAD_WORDS}}u;
#if CODE_BITS == 16
    let k_start = params.k + 2u * i;
    k_cache[to + part] = half_bits(k[k_start]) | (half_bits(k[k_start + 1u]) << 16u);
    let v_start = params.v + 2u * i;
    v_cache[to + part] = half_bits(v[v_start]) | (half_bits(v[v_start + 1u]) << 16u);
#else
    let start = i / params.parts * {{HEAD_DIM}}u;
    store_0(start, to, part);
    store_1(start, to, part);
#endif
}
