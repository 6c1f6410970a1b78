// Causal paged attention with an online softmax (Milakov and Gimelshein 2018): a block computes up to PAIRS pairs of a
// row of an item and a query head of one KV head, which share its loads.
//
// Scores: a lane holds one position of a tile of 32. Values: a lane holds elements of the head, 32 apart.

struct AttentionMergeParams {
    // (num_merges, 3): row of out, first cut, number of cuts
    const u32* merges;
    const f32* partials;
    f32* out;
    u32 num_merges;
    u32 num_heads;
    u32 head_dim;
};

static constexpr u32 WARPS = 4;
static constexpr u32 PAIRS_OF_WARP = 2;
static constexpr u32 PAIRS = WARPS * PAIRS_OF_WARP;

// What is known of some positions: their largest score, the sum of weights under it, and the values.
template <u32 PARTS>
struct Seen {
    f32 highest;
    f32 total;
    f32 values[PARTS];

    DEVICE_METHOD void clear() {
        highest = LOWEST;
        total = 0;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) values[part] = 0;
    }

    DEVICE_METHOD void merge(const Seen& cut) {
        if (cut.total == 0) return;
        if (total == 0) {
            *this = cut;
            return;
        }
        f32 both = highest > cut.highest ? highest : cut.highest;
        f32 shrink = expf(highest - both), weight = expf(cut.highest - both);
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) values[part] = fmaf(cut.values[part], weight, values[part] * shrink);
        total = fmaf(cut.total, weight, total * shrink);
        highest = both;
    }
};

// A tile of K or V, widened: position by position, `stride` apart, so that neither a row nor a column of it falls on
// one bank.
DEVICE void load_tile(const AttentionParams& p, const u32* cache, u32 table_row, u32 kv_head, u32 tile, u32 len, u32 stride,
                      f32* out) {
    for (u32 i = threadIdx.x; i < len * p.head_dim; i += WARPS * WARP) {
        u32 t = i / p.head_dim;
        u64 place = cached_place(p, table_row, kv_head, tile + t);
        out[t * stride + i % p.head_dim] = kv_element(cache + place * head_words(p.head_dim), p.head_dim, i % p.head_dim);
    }
}

template <u32 PARTS>
DEVICE void attend(const AttentionParams& p) {
    constexpr u32 MAX_DIM = PARTS * 32;
    // K, and then V in its place.
    __shared__ f32 tile_values[32 * (MAX_DIM + 1)];
    __shared__ f32 queries[PAIRS][MAX_DIM];
    __shared__ f32 weights[PAIRS][32];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 stride = p.head_dim + 1;
    u32 group = p.num_heads / p.num_kv_heads;
    u32 pair_block = blockIdx.x % p.pair_blocks;
    u32 kv_head = blockIdx.x / p.pair_blocks % p.num_kv_heads;
    const u32* item = p.items + (u64)(blockIdx.x / p.pair_blocks / p.num_kv_heads) * 7;
    u32 num_pairs = item[1] * group, first_pair = pair_block * PAIRS;
    if (first_pair >= num_pairs) return;
    u32 here = least(num_pairs - first_pair, PAIRS);
    for (u32 i = threadIdx.x; i < here * p.head_dim; i += WARPS * WARP) {
        u32 pair = first_pair + i / p.head_dim;
        u64 head = (u64)(item[0] + pair / group) * p.num_heads + kv_head * group + pair % group;
        queries[i / p.head_dim][i % p.head_dim] = p.q[head * p.head_dim + i % p.head_dim];
    }
    Seen<PARTS> merged[PAIRS_OF_WARP], cut[PAIRS_OF_WARP];
#pragma unroll
    for (u32 i = 0; i < PAIRS_OF_WARP; i++) {
        merged[i].clear();
        cut[i].clear();
    }
    // What the first and the last row of these pairs see.
    u32 first_position = item[3] + first_pair / group, last_position = item[3] + (first_pair + here - 1) / group;
    u32 first_seen = p.window && first_position >= p.window ? first_position + 1 - p.window : 0;
    u32 begin = most(item[4], first_seen / 32 * 32), end = least(item[5], last_position + 1);
    for (u32 tile = begin; tile < end; tile += 32) {
        u32 len = least(end - tile, 32);
        __syncthreads();
        load_tile(p, p.k_cache, item[2], kv_head, tile, len, stride, tile_values);
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < PAIRS_OF_WARP; i++) {
            u32 pair = warp + i * WARPS;
            if (pair >= here) continue;
            u32 position = item[3] + (first_pair + pair) / group;
            u32 seen_from = p.window && position >= p.window ? position + 1 - p.window : 0;
            bool is_seen = lane < len && tile + lane >= seen_from && tile + lane <= position;
            f32 score = LOWEST;
            if (is_seen) {
                f32 sum = 0;
                for (u32 d = 0; d < p.head_dim; d++) sum = fmaf(queries[pair][d], tile_values[lane * stride + d], sum);
                score = sum * p.scale;
                if (p.soft_cap != 0) score = p.soft_cap * tanhf(score / p.soft_cap);
            }
            f32 of_tile = largest_of_warp(score);
            f32 highest = of_tile > cut[i].highest ? of_tile : cut[i].highest;
            f32 weight = is_seen ? expf(score - highest) : 0;
            f32 shrink = cut[i].total == 0 ? 0 : expf(cut[i].highest - highest);
            weights[pair][lane] = weight;
            cut[i].total = fmaf(cut[i].total, shrink, sum_warp(weight));
#pragma unroll
            for (u32 part = 0; part < PARTS; part++) cut[i].values[part] *= shrink;
            cut[i].highest = highest;
        }
        __syncthreads();
        load_tile(p, p.v_cache, item[2], kv_head, tile, len, stride, tile_values);
        __syncthreads();
        bool ends_cut = (tile + 32) % CUT == 0 || tile + 32 >= end;
#pragma unroll
        for (u32 i = 0; i < PAIRS_OF_WARP; i++) {
            u32 pair = warp + i * WARPS;
            if (pair >= here) continue;
#pragma unroll
            for (u32 part = 0; part < PARTS; part++) {
                u32 d = part * 32 + lane;
                if (d >= p.head_dim) continue;
                f32 value = cut[i].values[part];
                for (u32 t = 0; t < len; t++) value = fmaf(weights[pair][t], tile_values[t * stride + d], value);
                cut[i].values[part] = value;
            }
            if (!ends_cut) continue;
            u32 row_pair = first_pair + pair, head = kv_head * group + row_pair % group;
            if (item[6] != NONE) {
                u64 place = item[6] + tile / CUT - item[4] / CUT;
                f32* slot = p.partials + (place * p.num_heads + head) * (p.head_dim + 2);
#pragma unroll
                for (u32 part = 0; part < PARTS; part++)
                    if (part * 32 + lane < p.head_dim) slot[part * 32 + lane] = cut[i].values[part];
                if (lane == 0) {
                    slot[p.head_dim] = cut[i].highest;
                    slot[p.head_dim + 1] = cut[i].total;
                }
            } else {
                merged[i].merge(cut[i]);
            }
            cut[i].clear();
        }
    }
    if (item[6] != NONE) return;
#pragma unroll
    for (u32 i = 0; i < PAIRS_OF_WARP; i++) {
        u32 pair = first_pair + warp + i * WARPS;
        if (pair >= num_pairs) continue;
        u64 head = (u64)(item[0] + pair / group) * p.num_heads + kv_head * group + pair % group;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++)
            if (part * 32 + lane < p.head_dim)
                p.out[head * p.head_dim + part * 32 + lane] = merged[i].values[part] / merged[i].total;
    }
}

KERNEL(128, attention_64, AttentionParams) { attend<2>(p); }
KERNEL(128, attention_128, AttentionParams) { attend<4>(p); }
KERNEL(128, attention_256, AttentionParams) { attend<8>(p); }

// What was left in parts, cut by cut, becomes the output of its row: a thread an element.
KERNEL(128, attention_merge, AttentionMergeParams) {
    u32 i = blockIdx.x * 128 + threadIdx.x, row_len = p.num_heads * p.head_dim;
    if (i >= p.num_merges * row_len) return;
    const u32* merge = p.merges + i / row_len * 3;
    u32 head = i % row_len / p.head_dim, d = i % p.head_dim;
    Seen<1> merged, cut;
    merged.clear();
    for (u32 at = merge[1]; at < merge[1] + merge[2]; at++) {
        const f32* slot = p.partials + ((u64)at * p.num_heads + head) * (p.head_dim + 2);
        cut.values[0] = slot[d];
        cut.highest = slot[p.head_dim];
        cut.total = slot[p.head_dim + 1];
        merged.merge(cut);
    }
    p.out[(u64)merge[0] * row_len + i % row_len] = merged.values[0] / merged.total;
}
