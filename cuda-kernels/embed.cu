// Rows of the embedding table, unpacked and scaled; a thread takes eight values.

struct EmbedParams {
    // (num_tokens)
    const u32* ids;
    const u32* sampled;
    const u32* weight;
    // (num_tokens, cols)
    f32* out;
    u32 num_tokens;
    u32 cols;
    u32 num_units;
    f32 scale;
};

KERNEL(256, embed, EmbedParams) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    u32 token = i / (p.num_units * 4);
    if (token >= p.num_tokens) return;
    u32 id = p.ids[token];
    if (id >> 31) {
        id = p.sampled[id & 0x7fffffffu];
        // What a broken row sampled: its sequence has failed, and any token will do.
        if (id == NONE) id = 0;
    }
    u32 unit = i / 4 % p.num_units, part = i % 4;
    const u32* block = block_at(p.weight, id, unit, p.num_units);
    f32 w[8];
    eight_weights(block, unit % UNITS, part, w);
    u32 col = unit * 32 + part * 8;
    f32* out = p.out + (u64)token * p.cols;
    for (u32 j = 0; j < 8; j++)
        if (col + j < p.cols) out[col + j] = w[j] * p.scale;
}
