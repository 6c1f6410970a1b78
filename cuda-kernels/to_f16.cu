// Activations as tensor cores take them: a thread eight values. A row's last unit is filled up with zeros.

struct ToF16Params {
    // (num_rows, inner)
    const f32* x;
    // (num_rows, 16 num_units), two f16 a word
    u32* out;
    u32 num_rows;
    u32 inner;
    u32 num_units;
};

KERNEL(256, to_f16, ToF16Params) {
    u32 i = blockIdx.x * 256 + threadIdx.x, row = i / (p.num_units * 4), k = i % (p.num_units * 4) * 8;
    if (row >= p.num_rows) return;
    f32 values[8];
#pragma unroll
    for (u32 j = 0; j < 8; j++) values[j] = k + j < p.inner ? p.x[(u64)row * p.inner + k + j] : 0;
    Quad quad;
#pragma unroll
    for (u32 j = 0; j < 4; j++) quad.at[j] = pair_of_activations(values[2 * j], values[2 * j + 1]);
    ((Quad*)p.out)[i] = quad;
}
