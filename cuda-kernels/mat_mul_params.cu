// What every kernel of `mat_mul` is given.

struct alignas(16) Floats {
    f32 at[4];
};

struct MatMulParams {
    // (num_rows, inner)
    const f32* x;
    const u32* weight;
    // (num_cols), or null
    const f32* bias;
    // (num_rows, stride), from the first column that is written; where K is split, as many of these
    f32* out;
    u32 num_rows;
    u32 inner;
    u32 num_units;
    u32 num_cols;
    u32 stride;
    // Runs of K, of which only tensor cores have more than one.
    u32 splits;
};

// Whether rows of activations can be read four at a time.
DEVICE bool is_aligned(const MatMulParams& p) { return p.inner % 4 == 0 && (u64)p.x % 16 == 0; }
