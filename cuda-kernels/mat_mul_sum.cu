// The runs of K of a matmul that was split, added in order: a thread an element.

struct MatMulSumParams {
    // (splits, num_rows, num_cols)
    const f32* parts;
    // (num_cols), or null
    const f32* bias;
    // (num_rows, stride), from the first column that is written
    f32* out;
    u32 num_rows;
    u32 num_cols;
    u32 stride;
    u32 splits;
};

KERNEL(256, mat_mul_sum, MatMulSumParams) {
    u32 i = blockIdx.x * 256 + threadIdx.x, len = p.num_rows * p.num_cols;
    if (i >= len) return;
    f32 sum = 0;
    for (u32 split = 0; split < p.splits; split++) sum += p.parts[(u64)split * len + i];
    u32 column = i % p.num_cols;
    if (p.bias) sum += p.bias[column];
    p.out[(u64)(i / p.num_cols) * p.stride + column] = sum;
}
