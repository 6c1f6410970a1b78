// Packed weights: `value = scale * code + min`, bit for bit the value that the file's format defines. The layout is
// that of shaders/weight.wgsl: [tile of 32 rows][block][word of a block][row in tile], so that lanes of a warp read
// neighbouring words.
//
// FLOAT is 1 for f32, 2 for f16, 3 for bf16, 0 for codes; the other constants are of codes.

// Where the words of `row` begin in the block that holds `unit`; they are 32 apart.
DEVICE const u32* block_at(const u32* weight, u32 row, u32 unit, u32 num_units) {
    u64 block = (u64)(row / 32) * (num_units / UNITS) + unit / UNITS;
    return weight + block * (BLOCK_WORDS * 32) + row % 32;
}

// What the scales of a unit are made of, as it lies in the block.
struct ScaleWords {
    u32 whole;
    u32 small;
};

DEVICE ScaleWords read_scales(const u32* block, u32 unit) {
    ScaleWords words = {0, 0};
#if !FLOAT
    words.whole = block[0];
#if SUPER
    words.small = block[(1 + unit / 2) * 32];
#endif
#endif
    return words;
}

struct Scales {
    // Of the first 16 values of a unit, and of the last 16.
    f32 scale[2];
    f32 min[2];
};

DEVICE Scales unit_scales(const ScaleWords& words, u32 unit) {
    Scales s;
#if FLOAT
    s.scale[0] = s.scale[1] = 1;
    s.min[0] = s.min[1] = 0;
#else
    f32 scale = from_f16(words.whole & 0xffffu);
    f32 min = from_f16(words.whole >> 16);
#if SUPER
    u32 small = words.small >> (unit % 2 * 16);
#if MIN_GROUP == 32
    s.scale[0] = s.scale[1] = scale * from_code(small & 255u);
    s.min[0] = s.min[1] = -min * from_code(small >> 8 & 255u);
#elif MIN_GROUP == 16
    s.scale[0] = scale * from_code(small & 15u);
    s.min[0] = -min * from_code(small >> 4 & 15u);
    s.scale[1] = scale * from_code(small >> 8 & 15u);
    s.min[1] = -min * from_code(small >> 12 & 15u);
#else
    s.scale[0] = scale * (f32)(int)(signed char)(small & 255u);
    s.scale[1] = scale * (f32)(int)(signed char)(small >> 8 & 255u);
    s.min[0] = -(f32)OFFSET * s.scale[0];
    s.min[1] = -(f32)OFFSET * s.scale[1];
#endif
#else
    s.scale[0] = s.scale[1] = scale;
#if MIN_GROUP == 32
    s.min[0] = s.min[1] = min;
#else
    s.min[0] = s.min[1] = -(f32)OFFSET * scale;
#endif
#endif
#endif
    return s;
}

#if LOOKUP
// IQ4_NL's table: 16 signed bytes, -127 to 113, four a word.
DEVICE f32 looked_up(u32 code) {
    u32 low = code < 4 ? 0xbfad9881u : 0xf6eaddcfu;
    u32 high = code < 12 ? 0x26190d01u : 0x71594535u;
    return (f32)(int)(signed char)((code < 8 ? low : high) >> (code % 4 * 8) & 255u);
}
#endif

// A part of a unit is eight values.
#if FLOAT == 1
static constexpr u32 PART_WORDS = 8;
#elif FLOAT
static constexpr u32 PART_WORDS = 4;
#elif LOW_BITS == 8
static constexpr u32 PART_WORDS = 2;
#else
static constexpr u32 PART_WORDS = 1;
#endif

// What a part is made of, as it lies in the block. Two parts share words of two bits a value.
struct PartWords {
    u32 low[PART_WORDS];
    u32 high;
};

// Which word of a block a part of a unit begins with.
DEVICE u32 low_at(u32 unit, u32 part) {
#if FLOAT
    return part * PART_WORDS;
#elif LOW_BITS > 2
    return LOW_AT + (unit * 4 + part) * PART_WORDS;
#else
    return LOW_AT + unit * 2 + part / 2;
#endif
}

DEVICE u32 high_at(u32 unit, u32 part) { return HIGH_AT + (HIGH_BITS == 1 ? unit : unit * 2 + part / 2); }

DEVICE PartWords read_part(const u32* block, u32 unit, u32 part) {
    PartWords words;
    const u32* low = block + low_at(unit, part) * 32;
    for (u32 i = 0; i < PART_WORDS; i++) words.low[i] = low[i * 32];
    words.high = HIGH_BITS ? block[high_at(unit, part) * 32] : 0;
    return words;
}

DEVICE void part_weights(const PartWords& words, u32 part, const Scales& s, f32 (&w)[8]) {
#if FLOAT == 1
    for (u32 i = 0; i < 8; i++) w[i] = __uint_as_float(words.low[i]);
#elif FLOAT
    for (u32 i = 0; i < 4; i++) {
        u32 two = words.low[i];
#if FLOAT == 2
        w[2 * i] = from_f16(two & 0xffffu);
        w[2 * i + 1] = from_f16(two >> 16);
#else
        w[2 * i] = __uint_as_float(two << 16);
        w[2 * i + 1] = __uint_as_float(two & 0xffff0000u);
#endif
    }
#else
    // Not by an index: what has one lies in local memory.
    f32 scale = part < 2 ? s.scale[0] : s.scale[1];
    f32 min = part < 2 ? s.min[0] : s.min[1];
#if LOW_BITS == 4 && !HIGH_BITS && !LOOKUP
    // Codes stay where they lie: one is 16^place times what it is, and its scale as much less, both exactly.
    for (u32 i = 0; i < 8; i++) {
        u32 place = i < 5 ? i : i - 5;
        u32 codes = i < 5 ? words.low[0] : words.low[0] >> 20;
        w[i] = fmaf(from_masked(codes, 15u << (4 * place)), scale * (1.0f / (1u << (4 * place))), min);
    }
#elif LOW_BITS == 8
    for (u32 i = 0; i < 8; i++) w[i] = fmaf(from_byte(words.low[i / 4], i % 4), scale, min);
#else
    u32 codes[8];
#if LOW_BITS == 4
    for (u32 i = 0; i < 8; i++) codes[i] = words.low[0] >> (4 * i) & 15u;
#else
    u32 low = words.low[0] >> (part % 2 * 16);
    for (u32 i = 0; i < 8; i++) codes[i] = low >> (2 * i) & 3u;
#endif
#if HIGH_BITS == 1
    u32 high = words.high >> (part * 8);
    for (u32 i = 0; i < 8; i++) codes[i] |= (high >> i & 1u) << LOW_BITS;
#elif HIGH_BITS == 2
    u32 high = words.high >> (part % 2 * 16);
    for (u32 i = 0; i < 8; i++) codes[i] |= (high >> (2 * i) & 3u) << LOW_BITS;
#endif
    for (u32 i = 0; i < 8; i++) {
#if LOOKUP
        w[i] = looked_up(codes[i]) * scale;
#else
        w[i] = fmaf(from_code(codes[i]), scale, min);
#endif
    }
#endif
#endif
}

// Values `8 * part ..` of a unit.
DEVICE void eight_weights(const u32* block, u32 unit, u32 part, f32 (&w)[8]) {
    part_weights(read_part(block, unit, part), part, unit_scales(read_scales(block, unit), unit), w);
}
