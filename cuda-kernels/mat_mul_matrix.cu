// `out = x @ weight^T + bias` on tensor cores: products of f16, sums in f32. A block computes 64 rows of 128 columns,
// unit by unit through shared memory; each of its eight warps 32 of 32.
//
// Fragments are those of `mma.sync.m16n8k16` (PTX ISA 7.0): with g = lane / 4 and t = lane % 4, a lane holds of A the
// pairs of columns 2t and 2t + 8 of rows g and g + 8, of B those of column g, and of D columns 2t of rows g and g + 8.

static constexpr u32 ROWS = 64;
static constexpr u32 COLUMNS = 128;
// Words of a row of a unit in f16, and four more: eight rows then begin on different banks.
static constexpr u32 PITCH = 16 + 4;

DEVICE u32 pair_of_f16(f32 low, f32 high) {
#ifdef FULLBORE_HOST
    return host_to_f16(low) | (u32)host_to_f16(high) << 16;
#else
    u32 pair;
    asm("{\n"
        ".reg .f16 low, high;\n"
        "cvt.rn.f16.f32 low, %1;\n"
        "cvt.rn.f16.f32 high, %2;\n"
        "mov.b32 %0, {low, high};\n"
        "}"
        : "=r"(pair)
        : "f"(low), "f"(high));
    return pair;
#endif
}

// `d += a * b`, 16 x 16 by 16 x 8, by a whole warp.
DEVICE void multiply(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef FULLBORE_HOST
    host_mma(d, a, b);
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

KERNEL(256, mat_mul_matrix, MatMulParams) {
    __shared__ u32 x[ROWS * PITCH];
    __shared__ u32 w[COLUMNS * PITCH];
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 g = lane / 4, t = lane % 4;
    u32 tiles = div_up(p.num_cols, COLUMNS), padded = div_up(p.num_cols, 32) * 32;
    u32 first_column = blockIdx.x % tiles * COLUMNS, first_row = blockIdx.x / tiles * ROWS;
    // Of this warp, in the block.
    u32 row = warp / 4 * 32, column = warp % 4 * 32;
    f32 sums[2][4][4];
#pragma unroll
    for (u32 m = 0; m < 2; m++)
#pragma unroll
        for (u32 n = 0; n < 4; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[m][n][i] = 0;
    for (u32 unit = 0; unit < p.num_units; unit++) {
        __syncthreads();
        for (u32 i = thread; i < ROWS * 16; i += 256) {
            const f32* from = p.x + (u64)least(first_row + i / 16, p.num_rows - 1) * p.inner;
            u32 k = unit * 32 + i % 16 * 2;
            f32 low = k < p.inner ? from[k] : 0, high = k + 1 < p.inner ? from[k + 1] : 0;
            x[i / 16 * PITCH + i % 16] = pair_of_f16(low, high);
        }
        for (u32 i = thread; i < COLUMNS * 4; i += 256) {
            // A tile beyond the last one is not there.
            u32 own = least(first_column + i % COLUMNS, padded - 1), part = i / COLUMNS;
            const u32* block = block_at(p.weight, own, unit, p.num_units);
            f32 values[8];
            eight_weights(block, unit % UNITS, part, unit_scales(block, unit % UNITS), values);
#pragma unroll
            for (u32 j = 0; j < 4; j++)
                w[i % COLUMNS * PITCH + part * 4 + j] = pair_of_f16(values[2 * j], values[2 * j + 1]);
        }
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < 16; k += 8) {
            u32 a[2][4], b[4][2];
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                const u32* top = x + (row + m * 16 + g) * PITCH + k + t;
                a[m][0] = top[0];
                a[m][1] = top[8 * PITCH];
                a[m][2] = top[4];
                a[m][3] = top[8 * PITCH + 4];
            }
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
                const u32* own = w + (column + n * 8 + g) * PITCH + k + t;
                b[n][0] = own[0];
                b[n][1] = own[4];
            }
#pragma unroll
            for (u32 m = 0; m < 2; m++)
#pragma unroll
                for (u32 n = 0; n < 4; n++) multiply(sums[m][n], a[m], b[n]);
        }
    }
#pragma unroll
    for (u32 m = 0; m < 2; m++)
#pragma unroll
        for (u32 n = 0; n < 4; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 to_row = first_row + row + m * 16 + g + i / 2 * 8;
                u32 to_column = first_column + column + n * 8 + 2 * t + i % 2;
                if (to_row >= p.num_rows || to_column >= p.num_cols) continue;
                f32 value = sums[m][n][i];
                if (p.bias) value += p.bias[to_column];
                p.out[(u64)to_row * p.stride + to_column] = value;
            }
}
