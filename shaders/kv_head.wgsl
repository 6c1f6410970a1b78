// The elements of K and V as a cache stores them, by the steps of the cpu's kv_head.rs.

// Round to nearest, ties to even, in integers: drivers may round `pack2x16float` as they like. Any NaN is 0x7e00, for
// the sign of one that was made is a device's own.
fn half_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude >= 0x47800000u {
        // Infinity, a NaN, or 65536 and above.
        return select(sign | 0x7c00u, 0x7e00u, magnitude > 0x7f800000u);
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
#endif
