// From a product of q, k and v to attention: heads of q and k through their norm and rotated (Su et al. 2021), k and v
// into the cache. A warp a token and head; a lane makes elements of q, or words of the cache.

struct RopeKvParams {
    // (tokens, (num_heads + 2 * num_kv_heads) * head_dim): heads of q, of k, of v
    const f32* qkv;
    // (2, head_dim): of q, of k; or null
    const f32* norms;
    // (positions, 2 * half_dim): cosines, then sines
    const f32* table;
    // (tokens)
    const u32* positions;
    // (tokens)
    const u32* slots;
    // (tokens, num_heads * head_dim)
    f32* q;
    // [block][kv_head][token in block][head_words]
    u32* k_cache;
    u32* v_cache;
    // Tokens times heads of q, k and v.
    u32 num_items;
    u32 num_heads;
    u32 num_kv_heads;
    u32 head_dim;
    u32 half_dim;
    // 0: pairs (2i, 2i + 1), 1: pairs (i, i + half_dim).
    u32 halves;
    u32 block_size;
    f32 eps;
};

struct Head {
    const f32* x;
    // Of its norm's weights, or null.
    const f32* norm;
    f32 scale;
    // Elements that rotate: none of v.
    u32 rotary_dim;
    const f32* angles;
};

DEVICE f32 normed(const Head& head, u32 i) { return head.norm ? head.x[i] * head.scale * head.norm[i] : head.x[i]; }

DEVICE f32 element(const RopeKvParams& p, const Head& head, u32 i) {
    f32 own = normed(head, i);
    if (i >= head.rotary_dim) return own;
    bool is_first = p.halves ? i < p.half_dim : i % 2 == 0;
    u32 angle = p.halves ? (is_first ? i : i - p.half_dim) : i / 2;
    u32 other = p.halves ? (is_first ? i + p.half_dim : angle) : i ^ 1;
    f32 cosine = head.angles[angle], sine = head.angles[p.half_dim + angle];
    return own * cosine + normed(head, other) * (is_first ? -sine : sine);
}

#if CODE_BITS == 16
DEVICE void store(const RopeKvParams& p, const Head& head, u32* words, u32 lane) {
    for (u32 word = lane; word < p.head_dim / 2; word += WARP) {
        u32 low = half_bits(element(p, head, 2 * word));
        words[word] = low | half_bits(element(p, head, 2 * word + 1)) << 16;
    }
}
#else
// The codes of one group; returns the bits of its scale.
DEVICE u32 store_group(const RopeKvParams& p, const Head& head, u32* words, u32 group) {
    f32 x[32];
    u32 highest = 0;
    f32 extreme = 0;
    for (u32 i = 0; i < 32; i++) {
        x[i] = element(p, head, group * 32 + i);
        u32 magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
        if (magnitude > highest) extreme = x[i];
        highest = most(highest, magnitude);
    }
    u32 scale = scale_bits(highest, extreme);
    // Without steps an element is zero, whatever it is.
    f32 steps = inverse(scale);
    bool some = steps != 0;
    for (u32 word = 0; word < CODE_BITS; word++) {
        u32 codes = 0;
        for (u32 byte = 0; byte < 4; byte++) {
            u32 i = word * 4 + byte;
            codes |= code(some ? x[i] * steps : 0) << (8 * byte);
#if CODE_BITS == 4
            codes |= code(some ? x[16 + i] * steps : 0) << (8 * byte + 4);
#endif
        }
        words[group * CODE_BITS + word] = codes;
    }
    return scale;
}

DEVICE void store(const RopeKvParams& p, const Head& head, u32* words, u32 lane) {
    u32 groups = p.head_dim / 32;
    for (u32 part = lane; part < div_up(groups, 2); part += WARP) {
        u32 scales = 0;
        for (u32 group = 2 * part; group < least(2 * part + 2, groups); group++)
            scales |= store_group(p, head, words, group) << (16 * (group % 2));
        words[code_words(p.head_dim) + part] = scales;
    }
}
#endif

KERNEL(128, rope_kv, RopeKvParams) {
    u32 lane = threadIdx.x % WARP, index = blockIdx.x * 4 + threadIdx.x / WARP;
    if (index >= p.num_items) return;
    u32 all_heads = p.num_heads + 2 * p.num_kv_heads;
    u32 token = index / all_heads, place = index % all_heads;
    bool is_q = place < p.num_heads, is_k = !is_q && place < p.num_heads + p.num_kv_heads;
    Head head;
    head.x = p.qkv + (u64)index * p.head_dim;
    head.norm = p.norms && (is_q || is_k) ? p.norms + (is_q ? 0 : p.head_dim) : 0;
    head.scale = 1;
    head.rotary_dim = is_q || is_k ? 2 * p.half_dim : 0;
    head.angles = p.table + (u64)p.positions[token] * 2 * p.half_dim;
    if (head.norm) {
        f32 sum = 0;
        for (u32 i = lane; i < p.head_dim; i += WARP) sum = fmaf(head.x[i], head.x[i], sum);
        head.scale = 1 / sqrtf(sum_warp(sum) / (f32)p.head_dim + p.eps);
    }
    if (is_q) {
        f32* q = p.q + ((u64)token * p.num_heads + place) * p.head_dim;
        for (u32 i = lane; i < p.head_dim; i += WARP) q[i] = element(p, head, i);
        return;
    }
    u32 kv_head = (place - p.num_heads) % p.num_kv_heads, slot = p.slots[token];
    u64 row = ((u64)(slot / p.block_size) * p.num_kv_heads + kv_head) * p.block_size + slot % p.block_size;
    store(p, head, (is_k ? p.k_cache : p.v_cache) + row * head_words(p.head_dim), lane);
}
