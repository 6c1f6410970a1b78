// What both kernels of `attention` are given, and how far they go.

struct AttentionParams {
    // (tokens, num_heads * head_dim)
    const f32* q;
    // [block][kv_head][token in block][head_words]
    const u32* k_cache;
    const u32* v_cache;
    // (items, 7): first row, rows, row of table, position of the first row, positions covered (begin, end), partial
    const u32* items;
    // (slots, table_cols): block ids
    const u32* table;
    // (tokens, num_heads * head_dim)
    f32* out;
    // (cuts, num_heads * (head_dim + 2)): values, largest score, sum of weights
    f32* partials;
    // Of the items' rows times query heads, blocks of PAIRS.
    u32 pair_blocks;
    u32 num_heads;
    u32 num_kv_heads;
    u32 head_dim;
    u32 table_cols;
    u32 block_size;
    u32 window;
    f32 scale;
    // 0 for none.
    f32 soft_cap;
};

// Tiles of 32 positions are aligned to absolute positions, and cuts are CUT of these: each begins from nothing, and is
// merged with what earlier ones gave, or left to `attention_merge`, which takes the same steps. So a row's numbers depend
// on its own sequence alone. After FlashDecoding (Dao et al. 2023), with the cuts fixed.
static constexpr u32 CUT = 256;
static constexpr f32 LOWEST = -3.0e38f;

// Where one position's head is in a cache, counted in heads.
DEVICE u32 cached_place(const AttentionParams& p, u32 table_row, u32 kv_head, u32 position) {
    u32 block = p.table[table_row * p.table_cols + position / p.block_size];
    return (block * p.num_kv_heads + kv_head) * p.block_size + position % p.block_size;
}

#ifndef FULLBORE_HOST
// With as many registers as a block alone may have: the compiler would spill some to have two.
#undef KERNEL
#define KERNEL(THREADS, NAME, PARAMS) extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const PARAMS p)
#endif
