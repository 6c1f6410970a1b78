// Products on tensor cores: 16 x 16 by 16 x 8, of f16 into f32, by a whole warp.
//
// Fragments are those of `mma.sync.m16n8k16` (PTX ISA 7.0): with g = lane / 4 and t = lane % 4, a lane holds of A the
// pairs of columns 2t and 2t + 8 of rows g and g + 8, of B those of column g, and of D columns 2t of rows g and g + 8.

// One of the halves of a word, in both.
DEVICE u32 twice_low(u32 pair) {
#ifdef FULLBORE_HOST
    return (pair & 0xffffu) | pair << 16;
#else
    u32 twice;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {low, low};\n}" : "=r"(twice) : "r"(pair));
    return twice;
#endif
}

DEVICE u32 twice_high(u32 pair) {
#ifdef FULLBORE_HOST
    return pair >> 16 | (pair & 0xffff0000u);
#else
    u32 twice;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {high, high};\n}" : "=r"(twice) : "r"(pair));
    return twice;
#endif
}

// `a * b`, pairs of f16.
DEVICE u32 multiply_pairs(u32 a, u32 b) {
#ifdef FULLBORE_HOST
    return host_pair_fma(a, b, 0x80008000u);
#else
    u32 pair;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
#endif
}

// `a * b + c`, rounded once.
DEVICE u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
#ifdef FULLBORE_HOST
    return host_pair_fma(a, b, c);
#else
    u32 pair;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
    return pair;
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
