// `out = x @ weight^T + bias` in f32. K is divided into SLICES runs of whole units; within a run a sum goes along K, one
// fma a value, and then over the runs in order. That order is the same in all kernels here, so the bits of a row do not
// depend on how many rows there are.

static constexpr u32 SLICES = 16;

// Adds products of one unit of a column. All lanes of a warp read the same activations: four at a time of a whole unit
// whose rows are aligned, else one by one up to the end of K. Rows are given by where they begin in x: addresses of eight
// would be too many registers.
template <u32 ROWS, bool WHOLE>
DEVICE void add_unit(const MatMulParams& p, const u32 (&rows)[ROWS], u32 column, u32 unit, f32 (&sum)[ROWS]) {
    const u32* block = block_at(p.weight, column, unit, p.num_units);
    Scales scales = unit_scales(read_scales(block, unit % UNITS), unit % UNITS);
    // In flight at once: as many as registers allow.
    constexpr u32 PARTS = WHOLE && ROWS <= 2 ? 4 : 1;
#pragma unroll PARTS
    for (u32 part = 0; part < 4; part++) {
        f32 w[8];
        part_weights(read_part(block, unit % UNITS, part), part, scales, w);
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            f32 values[8];
            if (WHOLE) {
                const Floats* fours = (const Floats*)(p.x + (rows[r] + unit * 32 + part * 8));
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    Floats four = fours[i];
#pragma unroll
                    for (u32 j = 0; j < 4; j++) values[i * 4 + j] = four.at[j];
                }
            } else {
#pragma unroll
                for (u32 j = 0; j < 8; j++) {
                    u32 k = unit * 32 + part * 8 + j;
                    values[j] = k < p.inner ? p.x[rows[r] + k] : 0;
                }
            }
#pragma unroll
            for (u32 j = 0; j < 8; j++) sum[r] = fmaf(values[j], w[j], sum[r]);
        }
    }
}

// For few rows: a warp a slice, a lane a column, so that a weight is read once, by neighbouring lanes.
template <u32 ROWS>
DEVICE void few_rows(const MatMulParams& p) {
    __shared__ f32 sums[SLICES][ROWS][32];
    u32 lane = threadIdx.x % WARP, slice = threadIdx.x / WARP;
    u32 tiles = div_up(p.num_cols, 32);
    u32 column = blockIdx.x % tiles * 32 + lane;
    u32 first_row = blockIdx.x / tiles * ROWS;
    u32 units = div_up(p.num_units, SLICES);
    u32 end = least((slice + 1) * units, p.num_units);
    u32 rows[ROWS];
    f32 sum[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        // Behind the last row that one is computed again, and not written.
        rows[r] = least(first_row + r, p.num_rows - 1) * p.inner;
        sum[r] = 0;
    }
    u32 unit = slice * units, whole = is_aligned(p) ? least(end, p.inner / 32) : 0;
    for (; unit < whole; unit++) add_unit<ROWS, true>(p, rows, column, unit, sum);
    for (; unit < end; unit++) add_unit<ROWS, false>(p, rows, column, unit, sum);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) sums[slice][r][lane] = sum[r];
    __syncthreads();
    if (slice >= ROWS || first_row + slice >= p.num_rows || column >= p.num_cols) return;
    // A warp a row from here on.
    f32 total = 0;
    for (u32 s = 0; s < SLICES; s++) total += sums[s][slice][lane];
    if (p.bias) total += p.bias[column];
    p.out[(u64)(first_row + slice) * p.stride + column] = total;
}

// For many: a block computes ROW_GROUPS * TR rows of COLUMN_GROUPS * TC columns, unit by unit through shared memory; a
// thread has TR x TC of them.
template <u32 TR, u32 TC, u32 ROW_GROUPS, u32 COLUMN_GROUPS>
DEVICE void many_rows(const MatMulParams& p) {
    constexpr u32 ROWS = TR * ROW_GROUPS, COLUMNS = TC * COLUMN_GROUPS, THREADS = ROW_GROUPS * COLUMN_GROUPS;
    __shared__ f32 x[32][ROWS + 1];
    __shared__ f32 w[32][COLUMNS];
    u32 thread = threadIdx.x;
    u32 own_row = thread / COLUMN_GROUPS, own_column = thread % COLUMN_GROUPS;
    u32 tiles = div_up(p.num_cols, COLUMNS);
    u32 first_column = blockIdx.x % tiles * COLUMNS;
    u32 first_row = blockIdx.x / tiles * ROWS;
    u32 units = div_up(p.num_units, SLICES);
    u32 padded = div_up(p.num_cols, 32) * 32;
    f32 total[TR][TC], sum[TR][TC];
#pragma unroll
    for (u32 r = 0; r < TR; r++)
#pragma unroll
        for (u32 c = 0; c < TC; c++) total[r][c] = sum[r][c] = 0;
    for (u32 unit = 0; unit < p.num_units; unit++) {
        __syncthreads();
        for (u32 i = thread; i < ROWS * 32; i += THREADS) {
            u32 row = least(first_row + i / 32, p.num_rows - 1), k = unit * 32 + i % 32;
            x[i % 32][i / 32] = k < p.inner ? p.x[(u64)row * p.inner + k] : 0;
        }
        for (u32 i = thread; i < COLUMNS * 4; i += THREADS) {
            // A tile beyond the last one is not there.
            u32 column = least(first_column + i % COLUMNS, padded - 1), part = i / COLUMNS;
            const u32* block = block_at(p.weight, column, unit, p.num_units);
            f32 values[8];
            eight_weights(block, unit % UNITS, part, values);
#pragma unroll
            for (u32 j = 0; j < 8; j++) w[part * 8 + j][i % COLUMNS] = values[j];
        }
        __syncthreads();
#pragma unroll 8
        for (u32 k = 0; k < 32; k++) {
            f32 rows[TR], columns[TC];
#pragma unroll
            for (u32 r = 0; r < TR; r++) rows[r] = x[k][own_row * TR + r];
#pragma unroll
            for (u32 c = 0; c < TC; c++) columns[c] = w[k][own_column + c * COLUMN_GROUPS];
#pragma unroll
            for (u32 r = 0; r < TR; r++)
#pragma unroll
                for (u32 c = 0; c < TC; c++) sum[r][c] = fmaf(rows[r], columns[c], sum[r][c]);
        }
        if ((unit + 1) % units == 0 || unit + 1 == p.num_units) {
#pragma unroll
            for (u32 r = 0; r < TR; r++)
#pragma unroll
                for (u32 c = 0; c < TC; c++) {
                    total[r][c] += sum[r][c];
                    sum[r][c] = 0;
                }
        }
    }
    for (u32 r = 0; r < TR; r++) {
        u32 row = first_row + own_row * TR + r;
        for (u32 c = 0; c < TC; c++) {
            u32 column = first_column + own_column + c * COLUMN_GROUPS;
            if (row >= p.num_rows || column >= p.num_cols) continue;
            f32 value = total[r][c];
            if (p.bias) value += p.bias[column];
            p.out[(u64)row * p.stride + column] = value;
        }
    }
}

KERNEL(512, mat_mul_8, MatMulParams) { few_rows<8>(p); }
// 16 rows of 128 columns, 64 of 64.
KERNEL(256, mat_mul_16, MatMulParams) { many_rows<2, 4, 8, 32>(p); }
KERNEL(256, mat_mul_64, MatMulParams) { many_rows<4, 4, 16, 16>(p); }

#ifndef FULLBORE_HOST
// Left to itself the compiler makes room for more blocks of a multiprocessor, and spills.
#undef KERNEL
#define KERNEL(THREADS, NAME, PARAMS) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const PARAMS p)
#endif

#define BLOCKS 1
KERNEL(512, mat_mul_4, MatMulParams) { few_rows<4>(p); }
#undef BLOCKS
#define BLOCKS 2
KERNEL(512, mat_mul_1, MatMulParams) { few_rows<1>(p); }
KERNEL(512, mat_mul_2, MatMulParams) { few_rows<2>(p); }
