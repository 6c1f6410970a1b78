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

#if FLOAT
fn unit_scales(at: u32, unit: u32) -> vec4<f32> {
    return vec4(1.0, 0.0, 1.0, 0.0);
}
#else
// (scale, min) of the first 16 values of a unit, then of the last 16.
fn unit_scales(at: u32, unit: u32) -> vec4<f32> {
    let block = unpack2x16float(word(at, 0u));
#if SUPER
    let small = word(at, 1u + unit / 2u) >> (unit % 2u * 16u);
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

// Values `8 * part ..` of a unit; `scales` is its `unit_scales`.
fn eight_weights(at: u32, unit: u32, part: u32, scales: vec4<f32>) -> mat2x4<f32> {
#if FLOAT == 1
    let a = vec4(word(at, part * 8u), word(at, part * 8u + 1u), word(at, part * 8u + 2u), word(at, part * 8u + 3u));
    let b = vec4(word(at, part * 8u + 4u), word(at, part * 8u + 5u), word(at, part * 8u + 6u), word(at, part * 8u + 7u));
    return mat2x4(bitcast<vec4<f32>>(a), bitcast<vec4<f32>>(b));
#endif
#if FLOAT > 1
    let a = vec4(floats(word(at, part * 4u)), floats(word(at, part * 4u + 1u)));
    let b = vec4(floats(word(at, part * 4u + 2u)), floats(word(at, part * 4u + 3u)));
    return mat2x4(a, b);
#endif
#if !FLOAT
#if LOW_BITS == 8
    let first = word(at, {{LOW_AT}}u + unit * 8u + part * 2u);
    let second = word(at, {{LOW_AT}}u + unit * 8u + part * 2u + 1u);
    var a = (vec4(first) >> vec4(0u, 8u, 16u, 24u)) & vec4(255u);
    var b = (vec4(second) >> vec4(0u, 8u, 16u, 24u)) & vec4(255u);
#endif
#if LOW_BITS == 4
    let low = word(at, {{LOW_AT}}u + unit * 4u + part);
    var a = (vec4(low) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u);
    var b = (vec4(low) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u);
#endif
#if LOW_BITS == 2
    let low = word(at, {{LOW_AT}}u + unit * 2u + part / 2u) >> (part % 2u * 16u);
    var a = (vec4(low) >> vec4(0u, 2u, 4u, 6u)) & vec4(3u);
    var b = (vec4(low) >> vec4(8u, 10u, 12u, 14u)) & vec4(3u);
#endif
#if HIGH_BITS == 1
    let high = word(at, {{HIGH_AT}}u + unit) >> (part * 8u);
    a |= ((vec4(high) >> vec4(0u, 1u, 2u, 3u)) & vec4(1u)) << vec4({{LOW_BITS}}u);
    b |= ((vec4(high) >> vec4(4u, 5u, 6u, 7u)) & vec4(1u)) << vec4({{LOW_BITS}}u);
#endif
#if HIGH_BITS == 2
    let high = word(at, {{HIGH_AT}}u + unit * 2u + part / 2u) >> (part % 2u * 16u);
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
