// Chooses a token from each row of logits (what counts, in which order: `op::Sample`), in two kernels: what each slice of
// a row says of it, and from that the row's choice. Rows with top-k, top-p or min-p read the row again: a radix search
// over the keys of its logits finds the least that each filter keeps, and the draw goes over what is kept. Counts and
// masses are integers, so sums have no order; draws are Gumbel-max over a hash.

// As `op::SampleRow` has it.
struct Row {
    u32 slot;
    u32 position;
    u32 seed_low;
    u32 seed_high;
    f32 temperature;
    u32 top_k;
    f32 top_p;
    f32 min_p;
    f32 presence;
    f32 frequency;
    f32 repetition;
    u32 target;
    u32 logprobs;
    u32 bias_at;
    u32 num_biases;
    u32 mask_at;
};

struct SampleParams {
    // (num_rows, vocab)
    const f32* logits;
    // (num_rows, 16)
    const Row* rows;
    // Biases and masks.
    const u32* extras;
    // (slots, vocab)
    u32* counts;
    // (num_rows, num_slices, 8): key of the largest logit; key and place of the largest adjusted one; score and place of
    // the draw that wins; sum of exp(logit - largest); sum of exp((adjusted - largest adjusted) / temperature)
    u32* slices;
    // (slots)
    u32* sampled;
    // (num_rows, 4): token, bits of its log-probability, rank, 0
    u32* chosen;
    // (num_rows, 20, 2): token, bits of its log-probability
    u32* top;
    u32 vocab;
    u32 num_slices;
    // Tokens of a slice, the last one's aside.
    u32 slice_len;
};

static constexpr u32 THREADS = 256;
// The key of what is not finite; above all others.
static constexpr u32 NON_FINITE = 0xffffffffu;
static constexpr f32 LARGEST = 3.4028234e38f;
static constexpr u32 MAX_TOP = 20;

DEVICE bool is_penalised(const Row& row) { return row.presence != 0 || row.frequency != 0 || row.repetition != 1; }
DEVICE bool is_idle(const Row& row) { return row.slot == NONE && row.target == NONE; }
// Whether the draw goes over a part of the vocabulary only.
DEVICE bool is_filtered(const Row& row) {
    return row.temperature > 0 && (row.top_k > 0 || row.top_p < 1 || row.min_p > 0);
}

// Larger floats have larger keys; both zeros have the same.
DEVICE u32 key_of(f32 value) {
    u32 bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return NON_FINITE;
    return bits > 0x80000000u ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}
DEVICE f32 value_of(u32 key) {
    return __uint_as_float(key >= 0x80000000u ? key - 0x80000000u : 0x80000000u | (0x80000000u - key));
}

// Of token v, among pairs sorted by token.
DEVICE f32 bias_of(const SampleParams& p, const Row& row, u32 v) {
    const u32* pairs = p.extras + row.bias_at;
    u32 first = 0, count = row.num_biases;
    while (count > 1) {
        u32 half = count / 2;
        if (pairs[2 * (first + half)] <= v) first += half;
        count -= half;
    }
    return pairs[2 * first] == v ? __uint_as_float(pairs[2 * first + 1]) : 0;
}

// The key of a token's logit after bias and penalties; 0 if the mask forbids it.
DEVICE u32 adjusted_key(const SampleParams& p, const Row& row, f32 logit, u32 v) {
    if (row.mask_at != NONE && (p.extras[row.mask_at + v / 32] >> (v % 32) & 1u) == 0) return 0;
    if (row.num_biases == 0 && !is_penalised(row)) return key_of(logit);
    f32 value = logit;
    if (row.num_biases > 0) value += bias_of(p, row, v);
    if (is_penalised(row)) {
        u32 count = p.counts[(u64)row.slot * p.vocab + v], generated = count & 0x7fffffffu;
        if (count) {
            value *= value > 0 ? 1 / row.repetition : row.repetition;
            value -= fmaf(row.frequency, (f32)generated, generated ? row.presence : 0);
        }
    }
    value = value < -LARGEST ? -LARGEST : value > LARGEST ? LARGEST : value;
    return key_of(value);
}

// How far a key's logit is behind the best one, which is not below it, in units of the temperature.
DEVICE f32 scaled(const Row& row, u32 key, f32 best) {
    f32 behind = (value_of(key) - best) / row.temperature;
    return behind > -1e30f ? behind : -1e30f;
}

// pcg4d's last word (Jarzynski and Olano 2020).
DEVICE u32 hash(u32 x, u32 y, u32 z, u32 w) {
    x = x * 1664525u + 1013904223u;
    y = y * 1664525u + 1013904223u;
    z = z * 1664525u + 1013904223u;
    w = w * 1664525u + 1013904223u;
    x += y * w;
    y += z * x;
    z += x * y;
    w += y * z;
    x ^= x >> 16;
    y ^= y >> 16;
    z ^= z >> 16;
    w ^= w >> 16;
    x += y * w;
    y += z * x;
    z += x * y;
    return w + y * z;
}

// `-ln(E)` for the exponential draw of token v. E is `-ln(1 - x)` for the x in (0, 1) that 32 random bits stand for; a
// series keeps those of a small x.
DEVICE f32 noise(const Row& row, u32 v) {
    const f32 UNIT = 2.3283064365386963e-10f;
    u32 bits = hash(row.seed_low, row.seed_high, row.position, v);
    f32 x = ((f32)bits + 0.5f) * UNIT;
    if (x < 0.125f) {
        f32 series = 1 / 5.0f + x / 6;
        series = 1 / 4.0f + x * series;
        series = 1 / 3.0f + x * series;
        series = 1 / 2.0f + x * series;
        return -logf(x * (1 + x * series));
    }
    return -logf(-logf(((f32)~bits + 0.5f) * UNIT));
}

struct Best {
    u32 key;
    u32 place;
};

DEVICE Best better(Best a, Best b) { return b.key > a.key || (b.key == a.key && b.place < a.place) ? b : a; }

// The largest key of a block, and the lowest place that has it, in every thread.
DEVICE Best best_of_block(Best best) {
    __shared__ Best bests[THREADS / 32];
    for (u32 width = WARP / 2; width > 0; width /= 2) {
        Best other;
        other.key = __shfl_xor_sync(NONE, best.key, width);
        other.place = __shfl_xor_sync(NONE, best.place, width);
        best = better(best, other);
    }
    // What was found before may still be read.
    __syncthreads();
    if (threadIdx.x % WARP == 0) bests[threadIdx.x / WARP] = best;
    __syncthreads();
    best = bests[0];
    for (u32 i = 1; i < THREADS / 32; i++) best = better(best, bests[i]);
    return best;
}

KERNEL(256, sample_slices, SampleParams) {
    u32 index = blockIdx.x / p.num_slices;
    const Row row = p.rows[index];
    if (is_idle(row)) return;
    const f32* logits = p.logits + (u64)index * p.vocab;
    u32 first = blockIdx.x % p.num_slices * p.slice_len, end = least(first + p.slice_len, p.vocab);
    Best largest = {0, 0}, best = {0, NONE};
    for (u32 v = first + threadIdx.x; v < end; v += THREADS) {
        largest.key = most(largest.key, key_of(logits[v]));
        u32 adjusted = adjusted_key(p, row, logits[v], v);
        if (adjusted > best.key) best = {adjusted, v};
    }
    largest = best_of_block(largest);
    best = best_of_block(best);
    bool draws = row.temperature > 0 && !is_filtered(row), weighs = row.temperature > 0 && row.top_p < 1;
    Best winner = {0, NONE};
    f32 sum = 0, weight = 0;
    // A greedy row needs no more.
    if (largest.key != NON_FINITE && (row.logprobs > 0 || draws || weighs)) {
        f32 top = value_of(largest.key), best_value = value_of(best.key);
        for (u32 v = first + threadIdx.x; v < end; v += THREADS) {
            if (row.logprobs > 0) sum += expf(logits[v] - top);
            if (!draws && !weighs) continue;
            u32 key = adjusted_key(p, row, logits[v], v);
            if (key == 0) continue;
            f32 behind = scaled(row, key, best_value);
            if (weighs) weight += expf(behind);
            if (!draws) continue;
            u32 score = key_of(behind + noise(row, v));
            if (score > winner.key) winner = {score, v};
        }
        sum = sum_block<THREADS>(sum);
        weight = sum_block<THREADS>(weight);
        winner = best_of_block(winner);
    }
    if (threadIdx.x > 0) return;
    u32* slice = p.slices + (u64)blockIdx.x * 8;
    slice[0] = largest.key;
    slice[1] = best.key;
    slice[2] = best.place;
    slice[3] = __float_as_uint(value_of(winner.key));
    slice[4] = winner.place;
    slice[5] = __float_as_uint(sum);
    slice[6] = __float_as_uint(weight);
}

// What a search goes over, and what it wants.
struct Search {
    // 0: adjusted logits, each counts one. 1: their masses. 2: the logits as they came, each counts one.
    u32 mode;
    // Keys below have no mass.
    u32 least;
    // Of counts; with masses it is a share of their sum.
    u32 wanted;
    // The adjusted value of weight 1, and the mass of weight 1.
    f32 best;
    f32 unit;
};

// The largest key such that the weights of it and all larger ones sum to what is wanted, 11 + 11 + 10 bits of it after
// one another, from the top.
DEVICE u32 least_key(const SampleParams& p, const Row& row, const f32* logits, const Search& search) {
    constexpr u32 BUCKETS = 2048, OWN = BUCKETS / THREADS;
    __shared__ u32 buckets[BUCKETS];
    __shared__ u32 sums[THREADS];
    // Bits of the key so far, and what is left of the wanted sum.
    __shared__ u32 found[2];
    u32 prefix = 0, left = search.wanted;
    for (u32 level = 0; level < 3; level++) {
        u32 shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
        __syncthreads();
        for (u32 i = threadIdx.x; i < BUCKETS; i += THREADS) buckets[i] = 0;
        __syncthreads();
        for (u32 v = threadIdx.x; v < p.vocab; v += THREADS) {
            u32 key = search.mode == 2 ? key_of(logits[v]) : adjusted_key(p, row, logits[v], v);
            if (level > 0 && key >> (shift + bits) != prefix) continue;
            u32 weight = 1;
            if (search.mode == 1) {
                bool counts = key != 0 && key >= search.least;
                weight = counts ? (u32)(expf(scaled(row, key, search.best)) * search.unit + 0.5f) : 0;
            }
            if (weight > 0) atomicAdd(buckets + (key >> shift & ((1u << bits) - 1)), weight);
        }
        __syncthreads();
        u32 sum = 0;
        for (u32 i = 0; i < OWN; i++) sum += buckets[threadIdx.x * OWN + i];
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            if (search.mode == 1 && level == 0) {
                u32 total = 0;
                for (u32 i = 0; i < THREADS; i++) total += sums[i];
                u32 share = (u32)ceilf(row.top_p * (f32)total);
                left = share < 1 ? 1 : least(share, total);
            }
            u32 owner = THREADS - 1;
            while (owner > 0 && sums[owner] < left) left -= sums[owner--];
            u32 bucket = owner * OWN + OWN - 1;
            while (bucket > owner * OWN && buckets[bucket] < left) left -= buckets[bucket--];
            found[0] = prefix << bits | bucket;
            found[1] = left;
        }
        __syncthreads();
        prefix = found[0];
        left = found[1];
    }
    return prefix;
}

// The draw over tokens from key `from` on.
DEVICE u32 winner_from(const SampleParams& p, const Row& row, const f32* logits, u32 from, f32 best) {
    Best winner = {0, NONE};
    for (u32 v = threadIdx.x; v < p.vocab; v += THREADS) {
        u32 key = adjusted_key(p, row, logits[v], v);
        if (key == 0 || key < from) continue;
        u32 score = key_of(scaled(row, key, best) + noise(row, v));
        if (score > winner.key) winner = {score, v};
    }
    return best_of_block(winner).place;
}

// Ranks the tokens from key `from` on, `count` of them, and writes them; among equals the lowest come first.
DEVICE void write_top(const SampleParams& p, u32 index, const f32* logits, u32 from, u32 count, f32 log_sum) {
    __shared__ Best tops[MAX_TOP];
    __shared__ u32 num_top;
    if (threadIdx.x == 0) num_top = 0;
    __syncthreads();
    for (u32 v = threadIdx.x; v < p.vocab; v += THREADS) {
        u32 key = key_of(logits[v]);
        if (key <= from) continue;
        u32 place = atomicAdd(&num_top, 1u);
        if (place < MAX_TOP) tops[place] = {key, v};
    }
    __syncthreads();
    // Those that equal the last one, from the lowest on.
    u32 next = 0;
    for (u32 i = num_top; i < count; i++) {
        Best lowest = {1, NONE};
        for (u32 v = next + threadIdx.x; v < p.vocab && lowest.place == NONE; v += THREADS)
            if (key_of(logits[v]) == from) lowest.place = v;
        lowest = best_of_block(lowest);
        if (threadIdx.x == 0) tops[i] = {from, lowest.place};
        next = lowest.place + 1;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        u32 rank = 0;
        for (u32 j = 0; j < count; j++)
            rank += tops[j].key > tops[i].key || (tops[j].key == tops[i].key && tops[j].place < tops[i].place);
        u32* to = p.top + (index * MAX_TOP + rank) * 2;
        to[0] = tops[i].place;
        to[1] = __float_as_uint(value_of(tops[i].key) - log_sum);
    }
}

KERNEL(256, sample, SampleParams) {
    u32 index = blockIdx.x;
    const Row row = p.rows[index];
    if (is_idle(row)) return;
    const f32* logits = p.logits + (u64)index * p.vocab;
    const u32* slices = p.slices + (u64)index * p.num_slices * 8;
    Best largest = {0, 0}, best = {0, NONE}, winner = {0, NONE};
    for (u32 i = threadIdx.x; i < p.num_slices; i += THREADS) {
        largest.key = most(largest.key, slices[i * 8]);
        best = better(best, {slices[i * 8 + 1], slices[i * 8 + 2]});
    }
    largest = best_of_block(largest);
    best = best_of_block(best);
    f32 best_value = value_of(best.key);
    bool filters = is_filtered(row), finite = largest.key != NON_FINITE;
    // Draws and sums of the slices are relative to each slice's own largest.
    f32 log_sum = 0, total = 1;
    if (finite && (row.logprobs > 0 || row.temperature > 0)) {
        f32 sum = 0, weight = 0;
        for (u32 i = threadIdx.x; i < p.num_slices; i += THREADS) {
            const u32* slice = slices + i * 8;
            sum += __uint_as_float(slice[5]) * expf(value_of(slice[0]) - value_of(largest.key));
            if (row.temperature == 0 || slice[1] == 0) continue;
            f32 behind = scaled(row, slice[1], best_value);
            weight += __uint_as_float(slice[6]) * expf(behind);
            u32 score = key_of(behind + __uint_as_float(slice[3]));
            if (score > winner.key) winner = {score, slice[4]};
        }
        log_sum = value_of(largest.key) + logf(sum_block<THREADS>(sum));
        total = sum_block<THREADS>(weight);
        winner = best_of_block(winner);
    }
    Search search = {0, 0, row.top_k, best_value, 2147483648.0f / total};
    u32 asked_top = least(most(row.logprobs, 1) - 1, p.vocab), least_of_top = 0;
    if (finite && filters) {
        // Top-k, then top-p among what that keeps.
        if (row.top_k > 0 && row.top_k < p.vocab) search.least = least_key(p, row, logits, search);
        search.mode = 1;
        if (row.top_p < 1) search.least = least_key(p, row, logits, search);
    }
    if (finite && asked_top > 0) {
        search.mode = 2;
        search.wanted = asked_top;
        least_of_top = least_key(p, row, logits, search);
    }
    u32 id = row.target;
    if (id == NONE) {
        id = row.temperature > 0 ? winner.place : best.place;
        if (filters && finite) {
            u32 from = search.least;
            if (row.min_p > 0) {
                f32 value = best_value + row.temperature * logf(row.min_p);
                from = most(from, key_of(value > -LARGEST ? value : -LARGEST));
            }
            id = winner_from(p, row, logits, from, best_value);
        }
        // The best token is kept whatever rounding did to the filters. A mask that allows nothing leaves none.
        if (id == NONE) id = best.place;
    }
    if (!finite) id = NONE;
    f32 logprob = 0;
    u32 rank = 0;
    if (row.logprobs > 0 && id != NONE) {
        u32 own = key_of(logits[id]);
        f32 num_larger = 0;
        for (u32 v = threadIdx.x; v < p.vocab; v += THREADS) num_larger += key_of(logits[v]) > own;
        // Below 2^24: exact.
        rank = 1 + (u32)sum_block<THREADS>(num_larger);
        logprob = value_of(own) - log_sum;
        if (asked_top > 0) write_top(p, index, logits, least_of_top, asked_top, log_sum);
    }
    if (threadIdx.x > 0) return;
    u32* chosen = p.chosen + index * 4;
    chosen[0] = id;
    chosen[1] = __float_as_uint(logprob);
    chosen[2] = rank;
    chosen[3] = 0;
    if (row.slot == NONE) return;
    p.sampled[row.slot] = id;
    if (is_penalised(row) && id != NONE) p.counts[(u64)row.slot * p.vocab + id] += 1;
}
