// Products on tensor cores: 16 x 16 by 16 x 8, of f16 into f32, by a whole warp.
//
// Fragments are those of `mma.sync.m16n8k16` (PTX ISA 7.0): with g = lane / 4 and t = lane % 4, a lane holds of A the
// pairs of columns 2t and 2t + 8 of rows g and g + 8, of B those of column g, and of D columns 2t of rows g and g + 8.

struct alignas(16) Quad {
    u32 at[4];
};

DEVICE u32 pair_of_f16(f32 low, f32 high) {
#ifdef FULLBORE_HOST
    return host_to_f16(low) | (u32)host_to_f16(high) << 16;
#else
    u32 pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
#else
    asm("{\n"
        ".reg .f16 low, high;\n"
        "cvt.rn.f16.f32 low, %1;\n"
        "cvt.rn.f16.f32 high, %2;\n"
        "mov.b32 %0, {low, high};\n"
        "}"
        : "=r"(pair)
        : "f"(low), "f"(high));
#endif
    return pair;
#endif
}

// Two activations, held within what f16 has; what is no number stays none.
DEVICE u32 pair_of_activations(f32 low, f32 high) {
#if __CUDA_ARCH__ >= 800
    // What was too large is infinite by now.
    u32 pair = pair_of_f16(low, high);
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(pair), "r"(0x7bff7bffu));
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(pair), "r"(0xfbfffbffu));
    return pair;
#else
    const f32 most = 65504;
    low = low > most ? most : low < -most ? -most : low;
    high = high > most ? most : high < -most ? -most : high;
    return pair_of_f16(low, high);
#endif
}

// `d += a * b`.
DEVICE void multiply(f32 (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
#ifdef FULLBORE_HOST
    host_mma(d, a, b_low, b_high);
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b_low));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b_high));
#endif
}

// Four matrices of 8 x 8 halves in shared memory: lane `8 i + j` names row j of matrix i, 16 bytes, and each lane gets
// its word of each: word t of row g.
DEVICE Quad load_matrices(const u32* row) {
#ifdef FULLBORE_HOST
    Quad words;
    host_ldmatrix(words.at, row);
    return words;
#else
    Quad words;
    asm volatile("{\n"
                 ".reg .u64 shared;\n"
                 ".reg .u32 at;\n"
                 "cvta.to.shared.u64 shared, %4;\n"
                 "cvt.u32.u64 at, shared;\n"
                 "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [at];\n"
                 "}"
                 : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
                 : "l"(row)
                 : "memory");
    return words;
#endif
}

// The fragment of A whose first row and pair of columns are given, of rows that are `pitch` words apart.
DEVICE Quad load_a(const u32* first, u32 pitch) {
    u32 lane = threadIdx.x % WARP;
    return load_matrices(first + lane % 16 * pitch + lane / 16 * 4);
}

// Two fragments of B, of columns from the given one on, each of which lies like a row of A: words 0 and 1 are of the
// first eight columns.
DEVICE Quad load_two_b(const u32* first, u32 pitch) {
    u32 lane = threadIdx.x % WARP;
    return load_matrices(first + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 4);
}
