//! The closed list of what a backend must do.
//!
//! Invariant: an op is plain `Copy` data over tensor handles; a new variant fails to compile in every backend. One
//! base name in each place: `Op::RmsNorm`, `shaders/rms_norm.wgsl`, `backend/cpu/rms_norm.rs`. An op knows no model.

use crate::tensor::{KvTensor, Tensor, Weight};

/// A device operation. Outputs never alias inputs, except where a field says "in place".
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    UpdateTable(UpdateTable),
    Embed(Embed),
    RmsNorm(RmsNorm),
    MatMul(MatMul),
    Rope(Rope),
    StoreKv(StoreKv),
    Attention(Attention),
    GatedAct(GatedAct),
    Add(Add),
    GatherRows(GatherRows),
    ArgMax(ArgMax),
}

/// `table[index] = value` for each (index, value) of `entries`; indices are distinct.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateTable {
    /// u32 (entries, 2): flat element index into `table`, value.
    pub entries: Tensor,
    /// u32 (max_num_seqs, max_blocks_per_seq), in place.
    pub table: Tensor,
}

/// An input id with this bit set is not a token: its low bits name a slot, and the token is what that slot sampled
/// last.
pub const SAMPLED_BY_SLOT: u32 = 1 << 31;

/// `out[t] = scale * table[id(t)]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Embed {
    /// u32 (tokens, 1): a token id, or `SAMPLED_BY_SLOT | slot`.
    pub ids: Tensor,
    /// u32 (max_num_seqs, 1): what each slot sampled last.
    pub sampled: Tensor,
    /// (vocab, dim)
    pub table: Weight,
    pub scale: f32,
    /// f32 (tokens, dim)
    pub out: Tensor,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// f32 (rows, dim)
    pub x: Tensor,
    /// f32 (1, dim)
    pub weight: Tensor,
    pub eps: f32,
    /// f32 (rows, dim)
    pub out: Tensor,
}

/// `out = x @ weight^T + bias`. For one (N, K, format) the accumulation order is the same for every M.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatMul {
    /// f32 (M, K)
    pub x: Tensor,
    /// (N, K)
    pub weight: Weight,
    /// f32 (1, N)
    pub bias: Option<Tensor>,
    /// f32 (M, N)
    pub out: Tensor,
}

/// Which two elements of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: Llama in GGUF.
    Interleaved,
    /// `(i, i + rotary_dim / 2)`: safetensors, and the other families in GGUF ("NeoX").
    Halves,
}

/// Rotary position embedding (Su et al. 2021), in place on every head of `x`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// f32 (tokens, num_heads * head_dim), in place.
    pub x: Tensor,
    pub head_dim: u32,
    /// u32 (tokens, 1)
    pub positions: Tensor,
    /// f32 (max_positions, rotary_dim): the cosines of the `rotary_dim / 2` angles, then their sines.
    /// Elements of a head from `rotary_dim` on pass unchanged.
    pub table: Tensor,
    pub style: RopeStyle,
}

/// Writes K and V of each token into its cache slot, rounded to the cache's element type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoreKv {
    /// f32 (tokens, num_kv_heads * head_dim)
    pub k: Tensor,
    /// f32 (tokens, num_kv_heads * head_dim)
    pub v: Tensor,
    /// u32 (tokens, 1): `block * block_size + offset`.
    pub slots: Tensor,
    pub cache: KvTensor,
}

/// Query rows of one attention item at most.
pub const ATTENTION_ROWS: u32 = 8;
/// Positions of one KV tile. Softmax and the value sum go tile by tile, each tile aligned to an absolute position, so
/// that a row's numbers do not depend on chunking, sharing or neighbours.
pub const ATTENTION_TILE: u32 = 32;

/// Causal paged attention with an online softmax (Milakov and Gimelshein 2018) over KV tiles.
///
/// A row at position p sees positions `max(0, p + 1 - window) ..= p` of its sequence (all up to p if `window` is 0).
/// Query head h reads KV head `h / (num_heads / num_kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// f32 (tokens, num_heads * head_dim)
    pub q: Tensor,
    pub cache: KvTensor,
    /// u32 (items, 4): first row of q, number of rows (1 to `ATTENTION_ROWS`), row of `table`, position of the first
    /// row. Rows of an item are consecutive positions of one sequence. Every row of q is in exactly one item.
    pub items: Tensor,
    /// u32 (max_num_seqs, max_blocks_per_seq): block ids.
    pub table: Tensor,
    pub num_heads: u32,
    pub scale: f32,
    /// Positions a row sees at most, itself included; 0 for no limit.
    pub window: u32,
    /// f32 (tokens, num_heads * head_dim)
    pub out: Tensor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    Silu,
    /// The tanh approximation (Hendrycks and Gimpel 2016).
    GeluTanh,
}

/// `out = activation(gate) * up`, element by element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GatedAct {
    /// f32 (tokens, ffn_dim)
    pub gate: Tensor,
    /// f32 (tokens, ffn_dim)
    pub up: Tensor,
    pub activation: Activation,
    /// f32 (tokens, ffn_dim)
    pub out: Tensor,
}

/// `x += y`, element by element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Add {
    /// f32 (rows, cols), in place.
    pub x: Tensor,
    /// f32 (rows, cols)
    pub y: Tensor,
}

/// `out[i] = x[rows[i]]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GatherRows {
    /// f32 (tokens, dim)
    pub x: Tensor,
    /// u32 (n, 1)
    pub rows: Tensor,
    /// f32 (n, dim)
    pub out: Tensor,
}

/// What [`ArgMax`] writes for a row that holds a NaN or an infinity.
pub const NON_FINITE: u32 = u32::MAX;

/// `sampled[slots[i]] = ` the index of the largest logit of row i, the lowest among equals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ArgMax {
    /// f32 (n, vocab)
    pub logits: Tensor,
    /// u32 (n, 1): distinct slots; a row whose slot is `u32::MAX` is passed over.
    pub slots: Tensor,
    /// u32 (max_num_seqs, 1), in place.
    pub sampled: Tensor,
}
