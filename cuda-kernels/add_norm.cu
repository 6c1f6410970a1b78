// `x += y`, where y may go through a norm of its own first; then `out` is the norm of x. A block a row.

struct AddNormParams {
    // (rows, cols), in place
    f32* x;
    // (rows, cols)
    const f32* y;
    // (cols), or null
    const f32* post_weight;
    // (num_rows): rows of x and y, or null for all
    const u32* rows;
    // (cols)
    const f32* weight;
    // (num_rows, cols)
    f32* out;
    // The same, or null
    u16* halves;
    u32 cols;
    f32 eps;
};

KERNEL(256, add_norm, AddNormParams) {
    u32 row = p.rows ? p.rows[blockIdx.x] : blockIdx.x;
    f32* x = p.x + (u64)row * p.cols;
    const f32* y = p.y + (u64)row * p.cols;
    f32* out = p.out + (u64)blockIdx.x * p.cols;
    f32 post = 1;
    if (p.post_weight) {
        f32 sum = 0;
        for (u32 i = threadIdx.x; i < p.cols; i += 256) sum = fmaf(y[i], y[i], sum);
        post = 1 / sqrtf(sum_block<256>(sum) / (f32)p.cols + p.eps);
    }
    f32 sum = 0;
    for (u32 i = threadIdx.x; i < p.cols; i += 256) {
        f32 added = p.post_weight ? y[i] * post * p.post_weight[i] : y[i];
        f32 value = x[i] + added;
        x[i] = value;
        sum = fmaf(value, value, sum);
    }
    f32 scale = 1 / sqrtf(sum_block<256>(sum) / (f32)p.cols + p.eps);
    // A thread reads what it wrote.
    for (u32 i = threadIdx.x; i < p.cols; i += 256) {
        f32 value = x[i] * scale * p.weight[i];
        out[i] = value;
        put_half(p.halves, (u64)blockIdx.x * p.cols + i, value);
    }
}
