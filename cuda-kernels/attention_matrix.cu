// Causal paged attention on tensor cores, as attention.cu in all but its products: of f16, sums in f32. After
// FlashAttention-2 (Dao 2023).
//
// A warp has 16 pairs of a row and a query head of one KV head, and up to 128 elements of their values; the warps of a
// block share the tiles of K and V. A lane holds what fragments give it: two pairs, g and g + 8, and of each two of eight
// positions or elements, 2t and 2t + 1.

static constexpr u32 PAIRS_OF_WARP = 16;

template <u32 DIM, u32 PAIR_WARPS>
struct Attention {
    static constexpr u32 PAIRS = PAIR_WARPS * PAIRS_OF_WARP;
    // Elements that a warp holds. Where these are not all, other warps compute the same scores.
    static constexpr u32 HELD = DIM < 128 ? DIM : 128;
    static constexpr u32 WARPS = PAIR_WARPS * DIM / HELD;
    // Words of a row of queries or K, and four more; of a row of V, and eight more: none begins on its neighbour's bank.
    static constexpr u32 PITCH = DIM / 2 + 4;
    static constexpr u32 V_PITCH = DIM + 8;
    // Of a tile: of K one row a position, of V one of two positions, whose elements are pairs.
    static constexpr u32 TILE_WORDS = 32 * PITCH > 16 * V_PITCH ? 32 * PITCH : 16 * V_PITCH;

    // Of the cut at hand, of pairs g and g + 8.
    f32 values[HELD / 8][4];
    f32 highest[2], total[2];

    DEVICE_METHOD void clear() {
#pragma unroll
        for (u32 n = 0; n < HELD / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) values[n][i] = 0;
        highest[0] = highest[1] = LOWEST;
        total[0] = total[1] = 0;
    }

    // The words of eight elements of a head at some place in the cache, as f16; zeros of one that is not there.
    static DEVICE_METHOD Quad eight(const AttentionParams& p, const u32* cache, u32 place, u32 first) {
        Quad words = {{0, 0, 0, 0}};
        if (place == NONE || first >= p.head_dim) return words;
        const u32* head = cache + (u64)place * head_words(p.head_dim);
#if CODE_BITS == 16
        return *(const Quad*)(head + first / 2);
#else
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            f32 low = kv_element(head, p.head_dim, first + 2 * i), high = kv_element(head, p.head_dim, first + 2 * i + 1);
            words.at[i] = pair_of_f16(low, high);
        }
        return words;
#endif
    }

    // Scores of 32 positions, of this lane's pairs: those of positions 8n + 2t and 8n + 2t + 1.
    static DEVICE_METHOD void multiply_k(f32 (&scores)[4][4], const u32* queries, const u32* tile, u32 head_dim) {
        for (u32 k = 0; k < head_dim / 2; k += 8) {
            Quad a = load_a(queries + k, PITCH);
#pragma unroll
            for (u32 n = 0; n < 4; n += 2) {
                Quad b = load_two_b(tile + n * 8 * PITCH + k, PITCH);
                multiply(scores[n], a.at, b.at[0], b.at[1]);
                multiply(scores[n + 1], a.at, b.at[2], b.at[3]);
            }
        }
    }

    // From scores to weights under the largest score of the cut, which takes what was summed before along.
    DEVICE_METHOD void weigh(const AttentionParams& p, f32 (&scores)[4][4], u32 tile, u32 end, const u32 (&position)[2]) {
        u32 t = threadIdx.x % 4;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 seen_from = p.window && position[half] >= p.window ? position[half] + 1 - p.window : 0;
            u32 seen_to = least(end, position[half] + 1);
            f32 of_tile = LOWEST;
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                f32& score = scores[i / 2][half * 2 + i % 2];
                u32 at = tile + i / 2 * 8 + 2 * t + i % 2;
                score *= p.scale;
                if (p.soft_cap != 0) score = p.soft_cap * tanhf(score / p.soft_cap);
                if (at < seen_from || at >= seen_to) score = LOWEST;
                of_tile = score > of_tile ? score : of_tile;
            }
            for (u32 width = 1; width < 4; width *= 2) {
                f32 other = __shfl_xor_sync(NONE, of_tile, width);
                of_tile = other > of_tile ? other : of_tile;
            }
            f32 both = of_tile > highest[half] ? of_tile : highest[half];
            f32 shrink = total[half] == 0 ? 0 : expf(highest[half] - both);
            f32 sum = 0;
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                f32& score = scores[i / 2][half * 2 + i % 2];
                score = score == LOWEST ? 0 : expf(score - both);
                sum += score;
            }
            for (u32 width = 1; width < 4; width *= 2) sum += __shfl_xor_sync(NONE, sum, width);
            total[half] = fmaf(total[half], shrink, sum);
            highest[half] = both;
#pragma unroll
            for (u32 n = 0; n < HELD / 8; n++) {
                values[n][half * 2] *= shrink;
                values[n][half * 2 + 1] *= shrink;
            }
        }
    }

    DEVICE_METHOD void multiply_v(const f32 (&weights)[4][4], const u32* tile) {
        u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
            u32 a[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const f32(&four)[4] = weights[2 * k + i / 2];
                a[i] = pair_of_f16(four[i % 2 * 2], four[i % 2 * 2 + 1]);
            }
            const u32* low = tile + (k * 8 + t) * V_PITCH + g;
#pragma unroll
            for (u32 n = 0; n < HELD / 8; n++) multiply(values[n], a, low[n * 8], low[4 * V_PITCH + n * 8]);
        }
    }

    DEVICE void attend(const AttentionParams& p) {
        __shared__ Quad query_quads[PAIRS * PITCH / 4], tile_quads[TILE_WORDS / 4];
        // Where the positions of a tile are in the cache, counted in heads.
        __shared__ u32 places[32];
        u32* queries = (u32*)query_quads;
        u32* tile_words = (u32*)tile_quads;
        u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
        u32 first_own = warp % PAIR_WARPS * PAIRS_OF_WARP, first_held = HELD < DIM ? warp / PAIR_WARPS * HELD : 0;
        u32 group = p.num_heads / p.num_kv_heads;
        u32 pair_block = blockIdx.x % p.pair_blocks;
        u32 kv_head = blockIdx.x / p.pair_blocks % p.num_kv_heads;
        const u32* item = p.items + (u64)(blockIdx.x / p.pair_blocks / p.num_kv_heads) * 7;
        u32 num_pairs = item[1] * group, first_pair = pair_block * PAIRS;
        if (first_pair >= num_pairs) return;
        u32 here = least(num_pairs - first_pair, PAIRS);
        for (u32 i = threadIdx.x; i < PAIRS * (DIM / 2); i += WARPS * WARP) {
            u32 own = i / (DIM / 2), d = i % (DIM / 2) * 2, pair = first_pair + own;
            bool is_there = own < here && d < p.head_dim;
            u64 head = (u64)(item[0] + pair / group) * p.num_heads + kv_head * group + pair % group;
            const f32* q = p.q + head * p.head_dim + d;
            queries[own * PITCH + d / 2] = is_there ? pair_of_activations(q[0], q[1]) : 0;
        }
        Attention cut;
        cut.clear();
        // Of this lane's pairs: in the block, of the row in its sequence, and where its values go, which before the end are
        // those of the cuts that have ended. One that is not there sees what the last does.
        u32 own[2], position[2];
        f32* out[2];
        f32 merged_highest[2], merged_total[2];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            own[half] = first_own + half * 8 + g;
            u32 pair = first_pair + least(own[half], here - 1), row = item[0] + pair / group;
            position[half] = item[3] + pair / group;
            u64 head = (u64)row * p.num_heads + kv_head * group + pair % group;
            out[half] = p.out + head * p.head_dim + first_held + 2 * t;
            merged_highest[half] = LOWEST;
            merged_total[half] = 0;
        }
        // What the first and the last row of these pairs see.
        u32 first_position = item[3] + first_pair / group, last_position = item[3] + (first_pair + here - 1) / group;
        u32 first_seen = p.window && first_position >= p.window ? first_position + 1 - p.window : 0;
        u32 begin = most(item[4], first_seen / 32 * 32), end = least(item[5], last_position + 1);
        for (u32 tile = begin; tile < end; tile += 32) {
            if (warp == 0) places[lane] = tile + lane < end ? cached_place(p, item[2], kv_head, tile + lane) : NONE;
            __syncthreads();
            // Decoding takes registers that loads ahead would.
#pragma unroll CODE_BITS == 16 ? 4 : 1
            for (u32 i = threadIdx.x; i < 32 * (DIM / 8); i += WARPS * WARP) {
                u32 at = i / (DIM / 8), d = i % (DIM / 8) * 8;
                *(Quad*)(tile_words + at * PITCH + d / 2) = eight(p, p.k_cache, places[at], d);
            }
            __syncthreads();
            f32 scores[4][4] = {};
            multiply_k(scores, queries + first_own * PITCH, tile_words, div_up(p.head_dim, 16) * 16);
            cut.weigh(p, scores, tile, end, position);
            __syncthreads();
#pragma unroll 1
            for (u32 i = threadIdx.x; i < 16 * (DIM / 8); i += WARPS * WARP) {
                u32 at = i / (DIM / 8), d = i % (DIM / 8) * 8;
                Quad even = eight(p, p.v_cache, places[2 * at], d), odd = eight(p, p.v_cache, places[2 * at + 1], d);
                Quad pairs[2];
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    pairs[j / 2].at[j % 2 * 2] = (even.at[j] & 0xffffu) | odd.at[j] << 16;
                    pairs[j / 2].at[j % 2 * 2 + 1] = even.at[j] >> 16 | (odd.at[j] & 0xffff0000u);
                }
                *(Quad*)(tile_words + at * V_PITCH + d) = pairs[0];
                *(Quad*)(tile_words + at * V_PITCH + d + 4) = pairs[1];
            }
            __syncthreads();
            cut.multiply_v(scores, tile_words + first_held);
            if ((tile + 32) % CUT != 0 && tile + 32 < end) continue;
            // The cut ends.
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                if (own[half] >= here) continue;
                if (item[6] != NONE) {
                    u32 head = kv_head * group + (first_pair + own[half]) % group;
                    u64 place = item[6] + tile / CUT - item[4] / CUT;
                    f32* slot = p.partials + (place * p.num_heads + head) * (p.head_dim + 2);
                    f32* to = slot + first_held + 2 * t;
#pragma unroll
                    for (u32 n = 0; n < HELD / 8; n++) {
                        if (first_held + n * 8 >= p.head_dim) continue;
                        to[n * 8] = cut.values[n][half * 2];
                        to[n * 8 + 1] = cut.values[n][half * 2 + 1];
                    }
                    if (t == 0 && first_held == 0) {
                        slot[p.head_dim] = cut.highest[half];
                        slot[p.head_dim + 1] = cut.total[half];
                    }
                    continue;
                }
                if (cut.total[half] == 0) continue;
                // As attention.cu merges.
                bool is_first = merged_total[half] == 0;
                f32 both = is_first || cut.highest[half] > merged_highest[half] ? cut.highest[half] : merged_highest[half];
                f32 shrink = is_first ? 0 : expf(merged_highest[half] - both), weight = expf(cut.highest[half] - both);
#pragma unroll
                for (u32 n = 0; n < HELD / 8; n++) {
                    if (first_held + n * 8 >= p.head_dim) continue;
#pragma unroll
                    for (u32 j = 0; j < 2; j++) {
                        f32& before = out[half][n * 8 + j];
                        f32 value = cut.values[n][half * 2 + j];
                        before = is_first ? value : fmaf(value, weight, before * shrink);
                    }
                }
                merged_total[half] = is_first ? cut.total[half] : fmaf(cut.total[half], weight, merged_total[half] * shrink);
                merged_highest[half] = both;
            }
            cut.clear();
        }
        if (item[6] != NONE) return;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            if (own[half] >= here) continue;
            for (u32 d = 0; d < HELD && first_held + d < p.head_dim; d += 8) {
                out[half][d] /= merged_total[half];
                out[half][d + 1] /= merged_total[half];
            }
        }
    }
};

// Up to 16 pairs an item, as one row mostly has, and more.
KERNEL(32, attention_matrix_64_16, AttentionParams) { Attention<64, 1>::attend(p); }
KERNEL(32, attention_matrix_128_16, AttentionParams) { Attention<128, 1>::attend(p); }
KERNEL(64, attention_matrix_256_16, AttentionParams) { Attention<256, 1>::attend(p); }
KERNEL(64, attention_matrix_64_32, AttentionParams) { Attention<64, 2>::attend(p); }
KERNEL(64, attention_matrix_128_32, AttentionParams) { Attention<128, 2>::attend(p); }
KERNEL(128, attention_matrix_256_32, AttentionParams) { Attention<256, 2>::attend(p); }
