// `out = x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019); a block a row.

struct RmsNormParams {
    // (rows, cols)
    const f32* x;
    // (cols)
    const f32* weight;
    // (rows, cols)
    f32* out;
    // The same, or null
    u16* halves;
    u32 cols;
    f32 eps;
};

KERNEL(256, rms_norm, RmsNormParams) {
    const f32* x = p.x + (u64)blockIdx.x * p.cols;
    f32* out = p.out + (u64)blockIdx.x * p.cols;
    f32 sum = 0;
    for (u32 i = threadIdx.x; i < p.cols; i += 256) sum = fmaf(x[i], x[i], sum);
    f32 scale = 1 / sqrtf(sum_block<256>(sum) / (f32)p.cols + p.eps);
    for (u32 i = threadIdx.x; i < p.cols; i += 256) {
        f32 value = x[i] * scale * p.weight[i];
        out[i] = value;
        put_half(p.halves, (u64)blockIdx.x * p.cols + i, value);
    }
}
