// `out = activation(gate) * up`; a thread an element.

struct GatedActParams {
    // (rows, 2 * cols): gate, then up
    const f32* gate_up;
    // (rows, cols)
    f32* out;
    // The same, or null
    u16* halves;
    u32 rows;
    u32 cols;
    // 0: silu, 1: gelu by the tanh approximation.
    u32 activation;
};

KERNEL(256, gated_act, GatedActParams) {
    u32 blocks = div_up(p.cols, 256);
    u32 row = blockIdx.x / blocks, i = blockIdx.x % blocks * 256 + threadIdx.x;
    if (i >= p.cols) return;
    const f32* gate = p.gate_up + (u64)row * 2 * p.cols;
    f32 v = gate[i];
    // Both are v times a sigmoid: silu of v, gelu of 2y, for (1 + tanh(y)) / 2 is the sigmoid of 2y.
    f32 exponent = p.activation ? 1.5957691216057308f * (v + 0.044715f * v * v * v) : v;
    u64 at = (u64)row * p.cols + i;
    f32 value = v / (1 + expf(-exponent)) * gate[p.cols + i];
    p.out[at] = value;
    put_half(p.halves, at, value);
}
