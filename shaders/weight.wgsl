// Packed weights: `value = scale * code + min`, bit for bit the value that the file's format defines.
//
// [tile of 32 rows of the matrix][block][word of a block][row in tile], so that neighbouring lanes read neighbouring
// words. A unit is 32 values along K; a block has UNITS of them. Words of a block:
//   FLOAT             the values, UNITS is 1
//   SUPER == 0        f16 scale | f16 min << 16
//   SUPER == 1        f16 scale | f16 scale of the mins << 16, then 16 bits of small scales for each unit
//   then              LOW_BITS of every code, unit by unit, then HIGH_BITS of every code
// Every product below is exact in f32, so it does not matter whether a compiler contracts it.
// The includer binds `weight: array<u32>`.

fn word(at: u32, index: u32) -> u32 {
    return weight[at + index * 32u];
}

// Where `column`'s block that holds `unit` begins.
fn block_at(column: u32, unit: u32, num_units: u32) -> u32 {
    let block = (column / 32u) * (num_units / {{UNITS}}u) + unit / {{UNITS}}u;
    return block * {{BLOCK_WORDS}}u * 32u + column % 32u;
}

// What a unit's scales are decoded from, which can be loaded ahead.
fn scale_words(at: u32, unit: u32) -> vec2<u32> {
#if FLOAT
    return vec2(0u);
#else
#if SUPER
    return vec2(word(at, 0u), word(at, 1u + unit / 2u));
#else
    return vec2(word(at, 0u), 0u);
#endif
#endif
}

#if FLOAT
fn scales_of(words: vec2<u32>, unit: u32) -> vec4<f32> {
    return vec4(1.0, 0.0, 1.0, 0.0);
}
#else
// (scale, min) of the first 16 values of a unit, then of the last 16.
fn scales_of(words: vec2<u32>, unit: u32) -> vec4<f32> {
    let block = unpack2x16float(words.x);
#if SUPER
    let small = words.y >> (unit % 2u * 16u);
#if MIN_GROUP == 32
    let pair = vec2(block.x * f32(small & 255u), -block.y * f32((small >> 8u) & 255u));
    return pair.xyxy;
#else
#if MIN_GROUP == 16
    let nibbles = vec4<f32>((vec4(small) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u));
    return vec4(block.x, -block.y, block.x, -block.y) * nibbles;
#else
    let first = block.x * f32(extractBits(i32(small), 0u, 8u));
    let second = block.x * f32(extractBits(i32(small), 8u, 8u));
    return vec4(first, -{{OFFSET}}.0 * first, second, -{{OFFSET}}.0 * second);
#endif
#endif
#else
#if MIN_GROUP == 32
    return block.xyxy;
#else
    let pair = vec2(block.x, -{{OFFSET}}.0 * block.x);
    return pair.xyxy;
#endif
#endif
}
#endif

fn unit_scales(at: u32, unit: u32) -> vec4<f32> {
    return scales_of(scale_words(at, unit), unit);
}

#if FLOAT == 2
fn floats(bits: u32) -> vec2<f32> {
    return unpack2x16float(bits);
}
#endif
#if FLOAT == 3
fn floats(bits: u32) -> vec2<f32> {
    return vec2(bitcast<f32>(bits << 16u), bitcast<f32>(bits & 0xffff0000u));
}
#endif

#if LOOKUP
// IQ4_NL's table: 16 signed bytes, -127 to 113.
fn looked_up(code: vec4<u32>) -> vec4<f32> {
    let low = select(vec4(0xf6eaddcfu), vec4(0xbfad9881u), code < vec4(4u));
    let high = select(vec4(0x71594535u), vec4(0x26190d01u), code < vec4(12u));
    let bytes = select(high, low, code < vec4(8u)) << (vec4(24u) - (code & vec4(3u)) * vec4(8u));
    return vec4<f32>(bitcast<vec4<i32>>(bytes) >> vec4(24u));
}
#endif

// What eight values are decoded from, which can be loaded ahead: two words with their bits, or the values themselves.
#if FLOAT == 1
alias Codes = mat2x4<f32>;
#endif
#if FLOAT > 1
alias Codes = vec4<u32>;
#endif
#if !FLOAT
alias Codes = vec2<u32>;
#endif

fn codes_at(at: u32, unit: u32, part: u32) -> Codes {
#if FLOAT == 1
    let i = part * 8u;
    let a = vec4(word(at, i), word(at, i + 1u), word(at, i + 2u), word(at, i + 3u));
    let b = vec4(word(at, i + 4u), word(at, i + 5u), word(at, i + 6u), word(at, i + 7u));
    return mat2x4(bitcast<vec4<f32>>(a), bitcast<vec4<f32>>(b));
#endif
#if FLOAT > 1
    let i = part * 4u;
    return vec4(word(at, i), word(at, i + 1u), word(at, i + 2u), word(at, i + 3u));
#endif
#if !FLOAT
#if LOW_BITS == 8
    let i = {{LOW_AT}}u + unit * 8u + part * 2u;
    return vec2(word(at, i), word(at, i + 1u));
#else
#if LOW_BITS == 4
    let low = word(at, {{LOW_AT}}u + unit * 4u + part);
#else
    let low = word(at, {{LOW_AT}}u + unit * 2u + part / 2u);
#endif
#if HIGH_BITS == 0
    return vec2(low, 0u);
#endif
#if HIGH_BITS == 1
    return vec2(low, word(at, {{HIGH_AT}}u + unit));
#endif
#if HIGH_BITS == 2
    return vec2(low, word(at, {{HIGH_AT}}u + unit * 2u + part / 2u));
#endif
#endif
#endif
}

fn either(first: Codes, second: Codes, is_second: bool) -> Codes {
#if FLOAT == 1
    return Codes(select(first[0], second[0], is_second), select(first[1], second[1], is_second));
#else
    return select(first, second, is_second);
#endif
}

// Those of one part of a unit, where all four are loaded.
fn codes_of(part: u32, codes_0: Codes, codes_1: Codes, codes_2: Codes, codes_3: Codes) -> Codes {
    let second = part % 2u == 1u;
    return either(either(codes_0, codes_1, second), either(codes_2, codes_3, second), part >= 2u);
}

// Values `8 * part ..` of a unit; `scales` is its `scales_of`.
fn weights_of(codes: Codes, part: u32, scales: vec4<f32>) -> mat2x4<f32> {
#if FLOAT == 1
    return codes;
#endif
#if FLOAT > 1
    let a = vec4(floats(codes.x), floats(codes.y));
    let b = vec4(floats(codes.z), floats(codes.w));
    return mat2x4(a, b);
#endif
#if !FLOAT
#if LOW_BITS == 8
    var a = (vec4(codes.x) >> vec4(0u, 8u, 16u, 24u)) & vec4(255u);
    var b = (vec4(codes.y) >> vec4(0u, 8u, 16u, 24u)) & vec4(255u);
#endif
#if LOW_BITS == 4
    var a = (vec4(codes.x) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u);
    var b = (vec4(codes.x) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u);
#endif
#if LOW_BITS == 2
    let low = codes.x >> (part % 2u * 16u);
    var a = (vec4(low) >> vec4(0u, 2u, 4u, 6u)) & vec4(3u);
    var b = (vec4(low) >> vec4(8u, 10u, 12u, 14u)) & vec4(3u);
#endif
#if HIGH_BITS == 1
    let high = codes.y >> (part * 8u);
    a |= ((vec4(high) >> vec4(0u, 1u, 2u, 3u)) & vec4(1u)) << vec4({{LOW_BITS}}u);
    b |= ((vec4(high) >> vec4(4u, 5u, 6u, 7u)) & vec4(1u)) << vec4({{LOW_BITS}}u);
#endif
#if HIGH_BITS == 2
    let high = codes.y >> (part % 2u * 16u);
    a |= ((vec4(high) >> vec4(0u, 2u, 4u, 6u)) & vec4(3u)) << vec4({{LOW_BITS}}u);
    b |= ((vec4(high) >> vec4(8u, 10u, 12u, 14u)) & vec4(3u)) << vec4({{LOW_BITS}}u);
#endif
    let scale_min = select(scales.zw, scales.xy, part < 2u);
#if LOOKUP
    return mat2x4(looked_up(a) * scale_min.x, looked_up(b) * scale_min.x);
#else
    let scale = vec4(scale_min.x);
    let min = vec4(scale_min.y);
    return mat2x4(fma(vec4<f32>(a), scale, min), fma(vec4<f32>(b), scale, min));
#endif
#endif
}

// The same; `scales` is the unit's `unit_scales`.
fn eight_weights(at: u32, unit: u32, part: u32, scales: vec4<f32>) -> mat2x4<f32> {
    return weights_of(codes_at(at, unit, part), part, scales);
}
