// A slot's token counts cleared, and its sequence's tokens counted; a block a slot.

struct ResetCountsParams {
    // (num_resets, 4): slot; where its tokens begin in `tokens`, where the generated ones begin, and where they end
    const u32* resets;
    const u32* tokens;
    // (slots, vocab)
    u32* counts;
    u32 vocab;
};

KERNEL(256, reset_counts, ResetCountsParams) {
    const u32* reset = p.resets + blockIdx.x * 4;
    u32* counts = p.counts + (u64)reset[0] * p.vocab;
    for (u32 i = threadIdx.x; i < p.vocab; i += 256) counts[i] = 0;
    __syncthreads();
    for (u32 i = reset[1] + threadIdx.x; i < reset[2]; i += 256) atomicOr(counts + p.tokens[i], 0x80000000u);
    for (u32 i = reset[2] + threadIdx.x; i < reset[3]; i += 256) atomicAdd(counts + p.tokens[i], 1u);
}
