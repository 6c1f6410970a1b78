// `x = scale * x + offset`, `rounds` times over: how fast a device multiplies and adds at most. A thread has eight
// elements in flight, 256 apart.

struct MulAddParams {
    f32* x;
    u32 num_elements;
    f32 scale;
    f32 offset;
    u32 rounds;
};

KERNEL(256, mul_add, MulAddParams) {
    u32 first = blockIdx.x * 2048 + threadIdx.x;
    f32 values[8];
#pragma unroll
    for (u32 i = 0; i < 8; i++) values[i] = first + i * 256 < p.num_elements ? p.x[first + i * 256] : 0;
    for (u32 round = 0; round < p.rounds; round++) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) values[i] = fmaf(values[i], p.scale, p.offset);
    }
#pragma unroll
    for (u32 i = 0; i < 8; i++)
        if (first + i * 256 < p.num_elements) p.x[first + i * 256] = values[i];
}
