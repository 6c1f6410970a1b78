// `x = x + offset`, `rounds` times over, on tensor cores: what `mul_add` tells of a device's products of matrices of f16.
// A warp has eight fragments of sums in flight. Operands are as good as random, for those of few bits take less power;
// products along K cancel in pairs, but for the last two, which are `offset`.

// An f16 of 2^-7 to 2^-3, or its negative.
DEVICE u32 random_f16(u32 seed) {
    seed = (seed ^ seed >> 16) * 0x7feb352du;
    seed = (seed ^ seed >> 15) * 0x846ca68bu;
    return ((seed ^ seed >> 16) & 0x8fff) | 0x2000;
}

// x is as many elements as whole blocks take.
KERNEL(256, mul_add_matrix, MulAddParams) {
    u32 lane = threadIdx.x % WARP;
    f32* x = p.x + blockIdx.x * 8192 + threadIdx.x / WARP * 1024 + lane;
    u32 a[2][4], b[4][2];
    f32 sums[2][4][4];
#pragma unroll
    for (u32 m = 0; m < 2; m++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 value = random_f16(lane * 16 + m * 4 + j);
            bool is_last = lane % 4 == 3 && j >= 2;
            a[m][j] = is_last ? pair_of_f16(0.5f, 0.5f) : value | (value ^ 0x8000) << 16;
        }
#pragma unroll
    for (u32 n = 0; n < 4; n++)
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            u32 value = random_f16(lane * 16 + 8 + n * 2 + j);
            bool is_last = lane % 4 == 3 && j == 1;
            b[n][j] = is_last ? pair_of_f16(p.offset, p.offset) : value | value << 16;
        }
#pragma unroll
    for (u32 i = 0; i < 32; i++) sums[i / 16][i / 4 % 4][i % 4] = x[i * WARP];
    for (u32 round = 0; round < p.rounds; round++) {
#pragma unroll
        for (u32 m = 0; m < 2; m++)
#pragma unroll
            for (u32 n = 0; n < 4; n++) multiply(sums[m][n], a[m], b[n][0], b[n][1]);
    }
#pragma unroll
    for (u32 i = 0; i < 32; i++) x[i * WARP] = sums[i / 16][i / 4 % 4][i % 4];
}
