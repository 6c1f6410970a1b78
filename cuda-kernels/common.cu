// What every kernel is written with: short types, conversions, sums over a warp or a block. No header is needed: neither
// CUDA's nor a system's. With FULLBORE_HOST the same text is C++ for the host (host/device.h).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;

#ifndef FULLBORE_HOST
// A kernel of so many threads a block, whose one parameter is `p`.
#define KERNEL(THREADS, NAME, PARAMS) extern "C" __global__ void __launch_bounds__(THREADS) NAME(const PARAMS p)
#endif

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__

static constexpr u32 NONE = 0xffffffffu;
static constexpr u32 WARP = 32;

DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 most(u32 a, u32 b) { return a < b ? b : a; }
DEVICE u32 div_up(u32 a, u32 b) { return (a + b - 1) / b; }

DEVICE f32 from_f16(u32 bits) {
#ifdef FULLBORE_HOST
    return host_from_f16((u16)bits);
#else
    f32 value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
#endif
}

// `into`, with the bits of `word` that `mask` names, in one instruction.
DEVICE u32 masked_into(u32 into, u32 word, u32 mask) {
#ifdef FULLBORE_HOST
    return (word & mask) | into;
#else
    u32 both;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(both) : "r"(word), "r"(mask), "r"(into));
    return both;
#endif
}

// Four of the eight bytes of two words, by the nibbles of `which`: below 4 of `low`, else of `high`.
DEVICE u32 pick_bytes(u32 low, u32 high, u32 which) {
#ifdef FULLBORE_HOST
    u64 bytes = low | (u64)high << 32;
    u32 picked = 0;
    for (u32 i = 0; i < 4; i++) picked |= (u32)(bytes >> (which >> (4 * i) & 7u) * 8 & 0xffu) << (8 * i);
    return picked;
#else
    u32 picked;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(which));
    return picked;
#endif
}

// An integer below 2^23, without the slow conversion: the low bits of 2^23 + code.
DEVICE f32 from_code(u32 code) { return __uint_as_float(0x4b000000u | code) - 8388608.0f; }

// The same of the bits of `word` that `mask` names, and of its byte `which`.
DEVICE f32 from_masked(u32 word, u32 mask) {
    return __uint_as_float(masked_into(0x4b000000u, word, mask)) - 8388608.0f;
}
DEVICE f32 from_byte(u32 word, u32 which) {
    return __uint_as_float(pick_bytes(word, 0x4b000000u, 0x7440u | which)) - 8388608.0f;
}

// The sum over a warp, in every lane.
DEVICE f32 sum_warp(f32 value) {
    for (u32 width = WARP / 2; width > 0; width /= 2) value += __shfl_xor_sync(NONE, value, width);
    return value;
}

DEVICE f32 largest_of_warp(f32 value) {
    for (u32 width = WARP / 2; width > 0; width /= 2) {
        f32 other = __shfl_xor_sync(NONE, value, width);
        value = other > value ? other : value;
    }
    return value;
}

// The sum over a block of THREADS, in every thread.
template <int THREADS>
DEVICE f32 sum_block(f32 value) {
    __shared__ f32 sums[THREADS / 32];
    value = sum_warp(value);
    // What an earlier sum left may still be read.
    __syncthreads();
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
    __syncthreads();
    f32 sum = 0;
    for (u32 i = 0; i < THREADS / 32; i++) sum += sums[i];
    return sum;
}
