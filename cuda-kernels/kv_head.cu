// The elements of K and V as a cache stores them, by the steps of the cpu's kv_head.rs: the same bits everywhere.
// CODE_BITS is 16 for f16, 8 for q8_0, 4 for q4_0.

// Words of the codes of a head, and of all of it with the scales of its groups of 32.
DEVICE u32 code_words(u32 head_dim) { return head_dim * CODE_BITS / 32; }
DEVICE u32 head_words(u32 head_dim) {
#if CODE_BITS == 16
    return head_dim / 2;
#else
    return code_words(head_dim) + div_up(head_dim / 32, 2);
#endif
}

// Round to nearest, ties to even; any NaN is 0x7e00, for the sign of one that was made is a device's own.
DEVICE u32 half_bits(f32 value) {
    u32 bits = __float_as_uint(value);
    u32 sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Infinity, a NaN, or 65536 and above.
    if (magnitude >= 0x47800000u) return magnitude > 0x7f800000u ? 0x7e00u : sign | 0x7c00u;
    if (magnitude >= 0x38800000u) return sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    // Subnormal: units of 2^-24. Below 2^-25 nothing is left.
    u32 exponent = magnitude >> 23;
    if (exponent < 102) return sign;
    u32 shift = 126 - exponent, significand = (magnitude & 0x7fffffu) | 0x800000u;
    u32 kept = significand >> shift, rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
    return sign | (kept + (rest > half || (rest == half && (kept & 1u))));
}

#if CODE_BITS < 16
// Steps of a scale in 1, to 20 bits; 0 for a scale that is zero or not finite.
DEVICE f32 inverse(u32 scale) {
    u32 exponent = scale >> 10 & 31u, fraction = scale & 0x3ffu;
    if (exponent == 31 || (scale & 0x7fffu) == 0) return 0;
    // The scale is significand * 2^(power - 25).
    u32 zeros = __clz(fraction);
    u32 significand = exponent ? fraction | 0x400u : fraction << (zeros - 21 & 31u);
    int power = exponent ? (int)exponent : 22 - (int)zeros;
    f32 unit = __uint_as_float((scale & 0x8000u) << 16 | (u32)(127 - 6 - power) << 23);
    return (f32)(0x80000000u / significand) * unit;
}

// The f16 bits of the scale of a group whose element of largest magnitude is given, and the bits of that magnitude.
DEVICE u32 scale_bits(u32 highest, f32 extreme) {
    if (highest >= 0x7f800000u) return 0x7e00u;
#if CODE_BITS == 8
    return half_bits(__uint_as_float(highest) * 0.007874016f);
#else
    return half_bits(extreme * -0.125f);
#endif
}

#if CODE_BITS == 8
// A signed byte, from -127 to 127, halves away from zero.
DEVICE u32 code(f32 steps) {
    u32 magnitude = least(((u32)(fabsf(steps) * 2) + 1) / 2, 127);
    return steps < 0 ? (256 - magnitude) & 255u : magnitude;
}
#else
// From 0 to 15, of which 8 means zero, halves up.
DEVICE u32 code(f32 steps) {
    int halves = ((int)floorf(steps * 2) + 17) >> 1;
    return (u32)(halves < 0 ? 0 : halves > 15 ? 15 : halves);
}
#endif
#endif

// Element `i` of the head whose words begin at `words`.
DEVICE f32 kv_element(const u32* words, u32 head_dim, u32 i) {
#if CODE_BITS == 16
    return from_f16(words[i / 2] >> (i % 2 * 16) & 0xffffu);
#else
    u32 group = i / 32;
    f32 scale = from_f16(words[code_words(head_dim) + group / 2] >> (group % 2 * 16) & 0xffffu);
#if CODE_BITS == 8
    return scale * (f32)(int)(signed char)(words[i / 4] >> (i % 4 * 8) & 255u);
#else
    u32 byte = words[group * 4 + i % 16 / 4] >> (i % 4 * 8);
    return scale * (from_code(byte >> (i % 32 / 16 * 4) & 15u) - 8);
#endif
#endif
}
