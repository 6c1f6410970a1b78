// Activations in f16, as tensor cores take them.

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

// One element of the rows of f16 that a kernel leaves besides, for the product that comes next; null for none.
DEVICE void put_half(u16* halves, u64 at, f32 value) {
    if (halves) halves[at] = (u16)pair_of_activations(value, 0);
}
