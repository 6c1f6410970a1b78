// `out = x @ weight^T + bias` on tensor cores, for many rows: products of f16, sums in f32. A block computes 128 rows of
// 128 columns in one of `splits` runs of K, unit by unit, which take turns in two halves of shared memory. What is needed
// of the next unit is read before this one is multiplied, and decoded after. Where K is split, `mat_mul_sum` adds the runs
// in order.

static constexpr u32 COLUMNS = 128;
static constexpr u32 THREADS = 256;
// Words of a row of a unit in f16, and four more: eight rows then begin on different banks.
static constexpr u32 PITCH = 16 + 4;

// Two parts of a unit of one column, as a thread has read them.
struct Packed {
    ScaleWords scales;
    PartWords parts[2];

    // Which of a unit's parts are this thread's.
    static DEVICE_METHOD u32 first_part() { return threadIdx.x / COLUMNS * 2; }

    DEVICE_METHOD void read(const MatMulParams& p, u32 first_column, u32 unit) {
        // A tile beyond the last one is not there.
        u32 column = least(first_column + threadIdx.x % COLUMNS, div_up(p.num_cols, 32) * 32 - 1);
        const u32* block = block_at(p.weight, column, unit, p.num_units);
        scales = read_scales(block, unit % UNITS);
#pragma unroll
        for (u32 i = 0; i < 2; i++) parts[i] = read_part(block, unit % UNITS, first_part() + i);
    }

    DEVICE_METHOD void put(u32 unit, u32* w_unit) const {
        Scales s = unit_scales(scales, unit % UNITS);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            f32 values[8];
            part_weights(parts[i], first_part() + i, s, values);
            Quad quad;
#pragma unroll
            for (u32 j = 0; j < 4; j++) quad.at[j] = pair_of_f16(values[2 * j], values[2 * j + 1]);
            *(Quad*)(w_unit + threadIdx.x % COLUMNS * PITCH + (first_part() + i) * 4) = quad;
        }
    }
};

// Eight warps, ROW_WARPS of them below one another; each has ROW_TILES x 16 rows of COLUMN_TILES x 8 columns.
template <u32 ROW_WARPS, u32 ROW_TILES>
struct Product {
    static constexpr u32 ROWS = ROW_WARPS * ROW_TILES * 16;
    static constexpr u32 COLUMN_TILES = COLUMNS * ROW_WARPS / 64;
    // Groups of four values of x that a thread brings.
    static constexpr u32 BROUGHT = (ROWS * 8 + THREADS - 1) / THREADS;

    // What a thread has read of activations of a unit, and not yet put into shared memory.
    f32 x[BROUGHT][4];
    // Of this warp.
    f32 sums[ROW_TILES][COLUMN_TILES][4];

    DEVICE_METHOD void read_x(const MatMulParams& p, u32 first_row, u32 unit, bool aligned) {
        bool whole = aligned && (unit + 1) * 32 <= p.inner;
#pragma unroll
        for (u32 i = 0; i < BROUGHT; i++) {
            u32 at = threadIdx.x + i * THREADS, k = unit * 32 + at % 8 * 4;
            // Behind the last row that one is computed again, and not written.
            const f32* from = p.x + (u64)least(first_row + at / 8, p.num_rows - 1) * p.inner + k;
            if (whole) {
                Floats four = *(const Floats*)from;
#pragma unroll
                for (u32 j = 0; j < 4; j++) x[i][j] = four.at[j];
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; j++) x[i][j] = k + j < p.inner ? from[j] : 0;
            }
        }
    }

    DEVICE_METHOD void put_x(u32* x_unit) const {
#pragma unroll
        for (u32 i = 0; i < BROUGHT; i++) {
            u32 at = threadIdx.x + i * THREADS;
            if (BROUGHT * THREADS > ROWS * 8 && at >= ROWS * 8) break;
            u32* to = x_unit + at / 8 * PITCH + at % 8 * 2;
            to[0] = pair_of_activations(x[i][0], x[i][1]);
            to[1] = pair_of_activations(x[i][2], x[i][3]);
        }
    }

    // From this warp's first row and column of a unit on.
    DEVICE_METHOD void multiply_unit(const u32* x_rows, const u32* w_columns) {
#pragma unroll
        for (u32 k = 0; k < 16; k += 8) {
            Quad a[ROW_TILES];
#pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++) a[m] = load_a(x_rows + m * 16 * PITCH + k, PITCH);
#pragma unroll
            for (u32 n = 0; n < COLUMN_TILES; n += 2) {
                Quad b = load_two_b(w_columns + n * 8 * PITCH + k, PITCH);
#pragma unroll
                for (u32 m = 0; m < ROW_TILES; m++) {
                    multiply(sums[m][n], a[m].at, b.at[0], b.at[1]);
                    multiply(sums[m][n + 1], a[m].at, b.at[2], b.at[3]);
                }
            }
        }
    }

    DEVICE void compute(const MatMulParams& p) {
        __shared__ Quad x_quads[2][ROWS * PITCH / 4], w_quads[2][COLUMNS * PITCH / 4];
        u32 tiles = div_up(p.num_cols, COLUMNS), split = blockIdx.x / tiles % p.splits;
        u32 first_column = blockIdx.x % tiles * COLUMNS, first_row = blockIdx.x / tiles / p.splits * ROWS;
        u32 units = div_up(p.num_units, p.splits);
        u32 begin = least(split * units, p.num_units), end = least(begin + units, p.num_units);
        bool aligned = is_aligned(p);
        // Of this warp, in the block.
        u32 warp = threadIdx.x / WARP;
        u32 row = warp % ROW_WARPS * ROW_TILES * 16, column = warp / ROW_WARPS * COLUMN_TILES * 8;
        Product product;
#pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++)
#pragma unroll
            for (u32 n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) product.sums[m][n][i] = 0;
        // Of the unit behind the one that is multiplied; behind the last one that is read again.
        Packed ahead;
        if (begin < end) {
            product.read_x(p, first_row, begin, aligned);
            ahead.read(p, first_column, begin);
            product.put_x((u32*)x_quads[begin % 2]);
            ahead.put(begin, (u32*)w_quads[begin % 2]);
            ahead.read(p, first_column, least(begin + 1, end - 1));
        }
        for (u32 unit = begin; unit < end; unit++) {
            u32 half = unit % 2, other = 1 - half;
            __syncthreads();
            bool more = unit + 1 < end;
            if (more) product.read_x(p, first_row, unit + 1, aligned);
            product.multiply_unit((const u32*)x_quads[half] + row * PITCH, (const u32*)w_quads[half] + column * PITCH);
            if (!more) break;
            // The other half was read before the last barrier.
            product.put_x((u32*)x_quads[other]);
            ahead.put(unit + 1, (u32*)w_quads[other]);
            ahead.read(p, first_column, least(unit + 2, end - 1));
        }
        u32 g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        f32* out = p.out + (u64)split * p.num_rows * p.stride;
#pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++)
#pragma unroll
            for (u32 n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 to_row = first_row + row + m * 16 + g + i / 2 * 8;
                    u32 to_column = first_column + column + n * 8 + 2 * t + i % 2;
                    if (to_row >= p.num_rows || to_column >= p.num_cols) continue;
                    f32 value = product.sums[m][n][i];
                    if (p.bias) value += p.bias[to_column];
                    out[(u64)to_row * p.stride + to_column] = value;
                }
    }
};

KERNEL(256, mat_mul_matrix_128, MatMulParams) { Product<2, 4>::compute(p); }
