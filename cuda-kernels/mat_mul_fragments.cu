// `out = x @ weight^T + bias` on tensor cores, for rows so few that reading weights takes longest. A weight goes from
// memory into a register, is decoded there, two at a time in f16, and is then the fragment that tensor cores take:
// only activations, made f16 before (`to_f16`), pass through shared memory. Where K is split, `mat_mul_sum` adds the
// runs in order.
//
// A warp has 32 columns, a tile of weights, and all rows of the block. With g = lane / 4 and t = lane % 4, a lane reads
// part t of each unit of columns 4g to 4g + 3: they lie side by side. That is a fragment when columns, and K, have
// another order: rows g and g + 8 of matrix i of A are columns 4g + 2i and 4g + 2i + 1, and a lane's words 0 to 3 along
// K are the pairs of part t. Activations are given the order of the weights; what a lane needs of a row of them is then
// 16 bytes too.

static constexpr u32 THREADS = 256;
static constexpr u32 WARPS = THREADS / WARP;
static constexpr u32 COLUMNS = WARPS * 32;
// Units whose weights are on their way, as many as registers allow: few rows wait for memory, and the smaller weights
// are, the more units it takes to keep it busy.
static constexpr u32 UNIT_REGISTERS = 1 + (SUPER ? 1 : 0) + 4 * PART_WORDS + (HIGH_BITS ? 4 : 0);
static constexpr u32 AHEAD = UNIT_REGISTERS <= 6 ? 8 : UNIT_REGISTERS <= 10 ? 4 : UNIT_REGISTERS <= 18 ? 2 : 1;

// Which two of eight values are a pair: j and j + 4, as codes of four bits lie in a word, or 2j and 2j + 1.
#define HAS_BYTES (LOW_BITS == 8 || LOOKUP)
static constexpr bool IS_APART = !FLOAT && !HAS_BYTES;

// Where a lane reads: the scales of its column, and of four columns the first word of a block, or of part t where a
// block is a unit.
struct Source {
    const char* scales;
    const char* four;

    DEVICE_METHOD void begin(const MatMulParams& p, u32 tile) {
        u32 lane = threadIdx.x % WARP;
        const char* words = (const char*)p.weight + (u64)tile * (p.num_units / UNITS) * (BLOCK_WORDS * 128);
        scales = words + lane * 4;
        four = words + lane / 4 * 16 + (UNITS == 1 ? low_at(0, lane % 4) * 128 : 0);
    }
};

// What is on its way of a unit: part t of four columns, and the scales of column `lane`.
struct Packed {
    ScaleWords scales;
    Quad low[PART_WORDS];
    Quad high;

    DEVICE_METHOD void read(const Source& from, u32 unit) {
        u64 block = (u64)(unit / UNITS) * (BLOCK_WORDS * 128);
        u32 part = threadIdx.x % 4;
        scales = read_scales((const u32*)(from.scales + block), unit % UNITS);
        const Quad* words = (const Quad*)(from.four + block);
        if (UNITS > 1) words += low_at(unit % UNITS, part) * 8;
#pragma unroll
        for (u32 i = 0; i < PART_WORDS; i++) low[i] = words[i * 8];
#if HIGH_BITS
        high = ((const Quad*)(from.four + block))[(high_at(unit % UNITS, part) - (UNITS == 1 ? low_at(0, part) : 0)) * 8];
#endif
    }

    // Of column 4g + `column`.
    DEVICE_METHOD PartWords part(u32 column) const {
        PartWords words;
#pragma unroll
        for (u32 i = 0; i < PART_WORDS; i++) words.low[i] = low[i].at[column];
        words.high = HIGH_BITS ? high.at[column] : 0;
        return words;
    }
};

// Scale and min of column `lane`, each for all that decode parts of it.
struct PairScales {
    u32 words[2];

    DEVICE_METHOD void compute(const ScaleWords& read, u32 unit) {
#if SUPER
        Scales s = unit_scales(read, unit % UNITS);
#if MIN_GROUP
        words[0] = pair_of_f16(s.scale[0], s.min[0]);
        words[1] = MIN_GROUP == 16 ? pair_of_f16(s.scale[1], s.min[1]) : words[0];
#else
        words[0] = words[1] = pair_of_f16(s.scale[0], s.scale[1]);
#endif
#else
        words[0] = words[1] = read.whole;
#endif
    }

    // Of column 4g + `column`, for part t.
    DEVICE_METHOD u32 of(u32 column) const {
#if FLOAT
        return 0;
#else
        u32 lane = threadIdx.x % WARP, owner = lane / 4 * 4 + column;
        u32 word = __shfl_sync(NONE, words[0], owner);
#if SUPER && MIN_GROUP == 16
        u32 other = __shfl_sync(NONE, words[1], owner);
        return lane % 4 < 2 ? word : other;
#elif SUPER && !MIN_GROUP
        return lane % 4 < 2 ? word : word >> 16;
#else
        return word;
#endif
#endif
    }
};

// An integer of up to 11 bits as f16, in both halves of a word; `sign` is 0x8000 or 0.
constexpr u32 both_of(u32 value, u32 sign) {
    u32 exponent = 0;
    while (value >> (exponent + 1)) exponent++;
    u32 half = sign | ((exponent + 15) << 10) | ((value << (10 - exponent)) & 0x3ff);
    return half * 0x10001;
}

// 1024 as f16, twice: a code of up to ten bits in its last bits is 1024 more than the code.
static constexpr u32 BOTH_1024 = 0x64006400;

// Two bytes of a word, behind 1024: the first two, or the last.
DEVICE u32 bytes_of(u32 word, u32 which) { return pick_bytes(word, 0x64646464u, which ? 0x4342u : 0x4140u); }

// IQ4_NL's table at four codes, plus 128.
DEVICE u32 four_looked_up(u32 codes) {
    u32 within = codes & 0x7777u;
    u32 low = pick_bytes(0x3f2d1801u, 0x766a5d4fu, within), high = pick_bytes(0xa6998d81u, 0xf1d9c5b5u, within);
    return pick_bytes(low, high, 0x3210u | (codes & 0x8888u) >> 1);
}

// The low byte, or nibble, in the low half, the next in the high one.
DEVICE u32 spread_bytes(u32 bits) { return (bits & 0xffu) | (bits & 0xff00u) << 8; }
DEVICE u32 spread_nibbles(u32 bits) { return (bits & 0xfu) | (bits & 0xf0u) << 12; }

// Eight values of a part as four pairs. Codes become the last bits of 1024 and what 2^place makes of them, exactly;
// what they are above that is computed in one go, exactly too; scale, or scale and min, are what rounds.
DEVICE void part_pairs(const PartWords& words, u32 part, u32 scales, u32 (&pairs)[4]) {
#if FLOAT == 2
    for (u32 j = 0; j < 4; j++) pairs[j] = words.low[j];
#elif FLOAT
    f32 values[8];
    part_weights(words, part, Scales(), values);
    for (u32 j = 0; j < 4; j++) pairs[j] = pair_of_f16(values[2 * j], values[2 * j + 1]);
#else
    u32 scale = twice_low(scales);
#if LOOKUP
    u32 bytes[2] = {four_looked_up(words.low[0]), four_looked_up(words.low[0] >> 16)};
#elif LOW_BITS == 8
    const u32 (&bytes)[2] = words.low;
#endif
#if LOW_BITS == 2
    u32 low = spread_bytes(words.low[0] >> (part % 2 * 16));
#endif
#if HIGH_BITS
    // Pair j has bits from `HIGH_BITS * j` on in each half.
    u32 high = HIGH_BITS == 1 ? spread_nibbles(words.high >> (part * 8)) : spread_bytes(words.high >> (part % 2 * 16));
#endif
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
#if HAS_BYTES
        const u32 place = 0, offset = 128;
        u32 codes = bytes_of(bytes[j / 2], j % 2);
#elif LOW_BITS == 4
        const u32 place = j % 2 * 4, offset = MIN_GROUP ? 0 : OFFSET;
        u32 codes = masked_into(BOTH_1024, j < 2 ? words.low[0] : words.low[0] >> 8, 0x000f000fu << place);
#else
        const u32 place = j * 2, offset = MIN_GROUP ? 0 : OFFSET;
        u32 codes = masked_into(BOTH_1024, low, 0x00030003u << place);
#endif
#if HIGH_BITS
        u32 high_place = place + LOW_BITS;
        codes |= high << (high_place - j * HIGH_BITS) & (HIGH_BITS == 1 ? 0x00010001u : 0x00030003u) << high_place;
#endif
        // 2^-place.
        u32 down = ((15 - place) << 10) * 0x10001;
        pairs[j] = multiply_add_pairs(codes, down, both_of((1024 >> place) + offset, 0x8000));
#if MIN_GROUP
        pairs[j] = multiply_add_pairs(pairs[j], scale, twice_high(scales));
#else
        pairs[j] = multiply_pairs(pairs[j], scale);
#endif
    }
#endif
}

// All warps have the same rows.
template <u32 ROWS>
struct Product {
    static constexpr u32 ROW_TILES = ROWS / 8;
    // Units whose activations lie in shared memory at a time.
    static constexpr u32 STAGE = FLOAT && ROWS == 64 ? 2 : 4;
    static constexpr u32 UNROLLED = AHEAD > STAGE ? AHEAD : STAGE;
    // Pieces of eight activations of a stage that a thread brings.
    static constexpr u32 BROUGHT = ROWS * STAGE * 4 / THREADS;
    // Pieces of a unit, and what lets eight lanes write on different banks.
    static constexpr u32 UNIT_PIECES = ROWS * 4 + 4;

    Quad brought[BROUGHT];
    // Columns 4g + 2i and 4g + 2i + 1, of rows 2t and 2t + 1 of each eight.
    f32 sums[2][ROW_TILES][4];

    DEVICE_METHOD void read_x(const MatMulParams& p, u32 first_row, u32 first_unit, u32 end) {
#pragma unroll
        for (u32 i = 0; i < BROUGHT; i++) {
            u32 at = threadIdx.x + i * THREADS, unit = least(first_unit + at / 4 % STAGE, end - 1);
            // Behind the last row that one is computed again, and not written.
            u64 row = least(first_row + at / (STAGE * 4), p.num_rows - 1);
            brought[i] = ((const Quad*)p.x)[(row * p.num_units + unit) * 4 + at % 4];
        }
    }

    DEVICE_METHOD void put_x(Quad* stage) const {
#pragma unroll
        for (u32 i = 0; i < BROUGHT; i++) {
            u32 at = threadIdx.x + i * THREADS;
            Quad piece = brought[i];
            if (IS_APART) {
                Quad whole = piece;
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    piece.at[2 * j] = (whole.at[j] & 0xffffu) | whole.at[j + 2] << 16;
                    piece.at[2 * j + 1] = whole.at[j] >> 16 | (whole.at[j + 2] & 0xffff0000u);
                }
            }
            stage[at / 4 % STAGE * UNIT_PIECES + at / (STAGE * 4) * 4 + at % 4] = piece;
        }
    }

    DEVICE_METHOD void multiply_unit(const Quad* x_unit, const Packed& packed, u32 unit) {
        u32 lane = threadIdx.x % WARP;
        PairScales scales;
        scales.compute(packed.scales, unit);
        Quad x[ROW_TILES];
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; r++) x[r] = x_unit[r * 32 + lane];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 pairs[2][4];
#pragma unroll
            for (u32 j = 0; j < 2; j++)
                part_pairs(packed.part(2 * i + j), lane % 4, scales.of(2 * i + j), pairs[j]);
#pragma unroll
            for (u32 k = 0; k < 4; k += 2) {
                u32 a[4] = {pairs[0][k], pairs[1][k], pairs[0][k + 1], pairs[1][k + 1]};
#pragma unroll
                for (u32 r = 0; r < ROW_TILES; r++) multiply(sums[i][r], a, x[r].at[k], x[r].at[k + 1]);
            }
        }
    }

    DEVICE_METHOD void write(const MatMulParams& p, f32* out, u32 first_row, u32 first_column) const {
        u32 lane = threadIdx.x % WARP, column = first_column + lane / 4 * 4;
        bool is_whole = column + 4 <= p.num_cols && p.stride % 4 == 0 && (u64)out % 16 == 0;
        f32 bias[4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) bias[j] = p.bias && column + j < p.num_cols ? p.bias[column + j] : 0;
#pragma unroll
        for (u32 r = 0; r < ROW_TILES * 2; r++) {
            u32 row = first_row + r / 2 * 8 + lane % 4 * 2 + r % 2;
            if (row >= p.num_rows) continue;
            f32* to = out + (u64)row * p.stride + column;
            Floats four;
#pragma unroll
            for (u32 j = 0; j < 4; j++) four.at[j] = sums[j / 2][r / 2][j % 2 * 2 + r % 2] + bias[j];
            if (is_whole) {
                *(Floats*)to = four;
                continue;
            }
#pragma unroll
            for (u32 j = 0; j < 4; j++)
                if (column + j < p.num_cols) to[j] = four.at[j];
        }
    }

    DEVICE void compute(const MatMulParams& p) {
        __shared__ Quad stages[2][STAGE * UNIT_PIECES];
        u32 tiles = div_up(p.num_cols, COLUMNS), split = blockIdx.x / tiles % p.splits;
        u32 first_column = blockIdx.x % tiles * COLUMNS + threadIdx.x / WARP * 32;
        u32 first_row = blockIdx.x / tiles / p.splits * ROWS;
        u32 units = div_up(p.num_units, p.splits);
        u32 begin = least(split * units, p.num_units), end = least(begin + units, p.num_units);
        // A tile beyond the last one is not there.
        u32 tile = least(first_column, p.num_cols - 1) / 32;
        Source weights;
        weights.begin(p, tile);
        Product product;
#pragma unroll
        for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) product.sums[i][r][j] = 0;
        // Behind the last unit that one is read again.
        Packed ahead[AHEAD];
        if (begin < end) {
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) ahead[i].read(weights, least(begin + i, end - 1));
            product.read_x(p, first_row, begin, end);
        }
        u32 half = 0;
        for (u32 first = begin; first < end; first += UNROLLED) {
#pragma unroll
            for (u32 i = 0; i < UNROLLED; i++) {
                u32 unit = first + i;
                if (unit >= end) break;
                if (i % STAGE == 0) {
                    // Who is behind reads the other half: this one was left before the last barrier.
                    half = 1 - half;
                    product.put_x(stages[half]);
                    __syncthreads();
                    product.read_x(p, first_row, unit + STAGE, end);
                }
                product.multiply_unit(stages[half] + i % STAGE * UNIT_PIECES, ahead[i % AHEAD], unit);
                ahead[i % AHEAD].read(weights, least(unit + AHEAD, end - 1));
            }
        }
        product.write(p, p.out + (u64)split * p.num_rows * p.stride, first_row, first_column);
    }
};

#ifndef FULLBORE_HOST
// Left to itself the compiler makes room for two blocks of a multiprocessor, and spills.
#undef KERNEL
#define KERNEL(THREADS, NAME, PARAMS) extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const PARAMS p)
#endif

KERNEL(256, mat_mul_matrix_16, MatMulParams) { Product<16>::compute(p); }
KERNEL(256, mat_mul_matrix_32, MatMulParams) { Product<32>::compute(p); }
KERNEL(256, mat_mul_matrix_64, MatMulParams) { Product<64>::compute(p); }
