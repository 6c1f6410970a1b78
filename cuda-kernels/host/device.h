// CUDA's execution model on the host, as far as the kernels use it: a thread of a block is a fiber, and fibers take
// turns where threads wait for one another: at barriers of the block and at exchanges within a warp. It is for tests on
// machines without a GPU: indices, barriers and results are the kernels' own; speed is not.
//
// A block checks what hardware leaves undefined: lanes of a warp that wait for different things, threads that end while
// others wait for them. Threads run in order or, where asked, in reverse, so that a missing barrier shows as a wrong
// number in one of the two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local

struct Index3 {
    unsigned x, y, z;
};

namespace host {
// Which thread of which block runs on this thread of the host.
extern thread_local Index3 thread_index, block_index;
enum Wait { NOT, WARP_WAIT, BLOCK_WAIT };
// Gives the turn away until all whom the wait concerns have come to it.
void wait_for(Wait wait);
// The words that lanes of this warp put up for exchange: `EXCHANGED` for each.
constexpr unsigned EXCHANGED = 8;
unsigned* exchange();

typedef void (*Kernel)(const void* params);
struct Registered {
    Registered(const char* module, const char* name, unsigned threads, unsigned params_size, Kernel kernel);
};
}  // namespace host

#define threadIdx host::thread_index
#define blockIdx host::block_index

inline void __syncthreads() { host::wait_for(host::BLOCK_WAIT); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    static_assert(sizeof(T) == 4, "words");
    unsigned lane = threadIdx.x % 32;
    unsigned* words = host::exchange();
    memcpy(words + lane, &value, 4);
    host::wait_for(host::WARP_WAIT);
    memcpy(&value, words + (lane ^ mask), 4);
    // Before the next exchange begins.
    host::wait_for(host::WARP_WAIT);
    return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, unsigned from) {
    static_assert(sizeof(T) == 4, "words");
    unsigned* words = host::exchange();
    memcpy(words + threadIdx.x % 32, &value, 4);
    host::wait_for(host::WARP_WAIT);
    memcpy(&value, words + from % 32, 4);
    host::wait_for(host::WARP_WAIT);
    return value;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline unsigned __clz(unsigned word) { return word ? (unsigned)__builtin_clz(word) : 32; }
inline unsigned atomicAdd(unsigned* word, unsigned value) { return __atomic_fetch_add(word, value, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* word, unsigned value) { return __atomic_fetch_or(word, value, __ATOMIC_RELAXED); }

inline float host_from_f16(unsigned short bits) {
    unsigned exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    float magnitude = exponent == 0    ? ldexpf((float)fraction, -24)
                      : exponent == 31 ? (fraction ? NAN : INFINITY)
                                       : ldexpf((float)(fraction | 0x400), (int)exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
}

inline unsigned short host_to_f16(float value) {
    unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
    // In units of the last place of what it rounds to, ties to even, as the host rounds.
    int exponent = magnitude < 0x38800000 ? -14 : (int)(magnitude >> 23) - 127;
    unsigned steps = (unsigned)lrintf(ldexpf(__uint_as_float(magnitude), 10 - exponent));
    return sign | (steps < 0x400 ? steps : ((unsigned)(exponent + 15) << 10) + steps - 0x400);
}

// `a * b + c` of both halves; a product is exact in f32.
inline unsigned host_pair_fma(unsigned a, unsigned b, unsigned c) {
    unsigned pair = 0;
    for (unsigned shift = 0; shift < 32; shift += 16) {
        auto half = [&](unsigned word) { return host_from_f16((unsigned short)(word >> shift)); };
        pair |= (unsigned)host_to_f16(half(a) * half(b) + half(c)) << shift;
    }
    return pair;
}

// `d += a * b` on fragments of mma.m16n8k16, with sums in f32 along K.
inline void host_mma(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
    unsigned lane = threadIdx.x % 32, *words = host::exchange(), *own = words + lane * host::EXCHANGED;
    memcpy(own, a, sizeof a);
    own[4] = b_low;
    own[5] = b_high;
    host::wait_for(host::WARP_WAIT);
    auto half = [&](unsigned owner, unsigned word, unsigned k) {
        return host_from_f16((unsigned short)(words[owner * host::EXCHANGED + word] >> (k % 2 * 16)));
    };
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            float left = half(row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row / 8, k);
            float right = half(column * 4 + k % 8 / 2, 4 + k / 8, k);
            d[i] = fmaf(left, right, d[i]);
        }
    }
    host::wait_for(host::WARP_WAIT);
}

// Four matrices, whose rows are where lanes say, as ldmatrix.x4 gives them out.
inline void host_ldmatrix(unsigned (&words)[4], const unsigned* row) {
    if ((uintptr_t)row % 16 != 0) {
        fprintf(stderr, "a row of a matrix does not begin at 16 bytes\n");
        abort();
    }
    unsigned lane = threadIdx.x % 32, *exchange = host::exchange();
    memcpy(exchange + lane * host::EXCHANGED, &row, sizeof row);
    host::wait_for(host::WARP_WAIT);
    for (unsigned i = 0; i < 4; i++) {
        memcpy(&row, exchange + (i * 8 + lane / 4) * host::EXCHANGED, sizeof row);
        words[i] = row[lane % 4];
    }
    host::wait_for(host::WARP_WAIT);
}

#define KERNEL(THREADS, NAME, PARAMS)                                                                        \
    static void NAME(const PARAMS& p);                                                                        \
    static host::Registered registered_##NAME(MODULE, #NAME, THREADS, sizeof(PARAMS),                        \
                                              [](const void* params) { NAME(*(const PARAMS*)params); });     \
    static void NAME(const PARAMS& p)
