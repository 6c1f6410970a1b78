//! The closed list of what a backend must do.
//!
//! Invariant: an op is plain `Copy` data over tensor handles; a new variant fails to compile in every backend. One
//! base name in each place: `Op::RmsNorm`, `shaders/rms_norm.wgsl`, `backend/cpu/rms_norm.rs`. An op knows no model.

use bytemuck::{Pod, Zeroable};

use crate::tensor::{KvTensor, Tensor, Weight};

/// A device operation. Outputs never alias inputs, except where a field says "in place".
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    UpdateTable(UpdateTable),
    Embed(Embed),
    RmsNorm(RmsNorm),
    MatMul(MatMul),
    RopeKv(RopeKv),
    Attention(Attention),
    GatedAct(GatedAct),
    AddNorm(AddNorm),
    ResetCounts(ResetCounts),
    Sample(Sample),
    MulAdd(MulAdd),
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

/// `out[.., first_col .. first_col + N] = x @ weight^T + bias`; other columns stay as they are. For one (N, K, format)
/// the accumulation order is the same for every M.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatMul {
    /// f32 (M, K)
    pub x: Tensor,
    /// (N, K)
    pub weight: Weight,
    /// f32 (1, N)
    pub bias: Option<Tensor>,
    pub first_col: u32,
    /// f32 (M, `first_col + N` or more)
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

/// From a product of q, k and v to attention: each head of q and k through its norm, where there is one, then rotary
/// position embedding (Su et al. 2021); k and v into the token's cache slot, rounded to the cache's element type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeKv {
    /// f32 (tokens, (num_heads + 2 * num_kv_heads) * head_dim): the heads of q, of k, of v.
    pub qkv: Tensor,
    /// f32 (2, head_dim): weights of the norms of q and of k, as [`RmsNorm`]'s.
    pub norms: Option<Tensor>,
    pub eps: f32,
    /// u32 (tokens, 1)
    pub positions: Tensor,
    /// f32 (max_positions, rotary_dim): the cosines of the `rotary_dim / 2` angles, then their sines.
    /// Elements of a head from `rotary_dim` on pass unchanged.
    pub table: Tensor,
    pub style: RopeStyle,
    /// u32 (tokens, 1): `block * block_size + offset`.
    pub slots: Tensor,
    pub cache: KvTensor,
    /// f32 (tokens, num_heads * head_dim)
    pub q: Tensor,
}

/// Query rows of one attention item at most.
pub const ATTENTION_ROWS: u32 = 8;
/// Positions of one KV tile. Softmax and the value sum go tile by tile, each tile aligned to an absolute position, so
/// that a row's numbers do not depend on chunking, sharing or neighbours.
pub const ATTENTION_TILE: u32 = 32;
/// Positions of one cut, whole tiles, aligned like them. What a cut gives a row is computed from nothing, and the cuts
/// that the row sees are merged in order, whether one item covers them all or several do: so a row's numbers do not
/// depend on that either.
pub const ATTENTION_CUT: u32 = 256;
/// Words of an item of [`Attention::items`].
pub const ATTENTION_ITEM_WORDS: u32 = 7;
/// Words of a row of [`Attention::merges`].
pub const ATTENTION_MERGE_WORDS: u32 = 3;

/// Causal paged attention with an online softmax (Milakov and Gimelshein 2018) over KV tiles.
///
/// A row at position p sees positions `max(0, p + 1 - window) ..= p` of its sequence (all up to p if `window` is 0).
/// Query head h reads KV head `h / (num_heads / num_kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// f32 (tokens, num_heads * head_dim)
    pub q: Tensor,
    pub cache: KvTensor,
    /// u32 (items, `ATTENTION_ITEM_WORDS`): first row of q, number of rows (1 to `ATTENTION_ROWS`), row of `table`,
    /// position of the first row, the positions that the item covers (the first, which begins a tile, and the end),
    /// and the row of `partials` of the first cut that it covers, or `NONE`. Rows of an item are consecutive positions
    /// of one sequence. Without a partial the item covers all that its rows see, and `out` is written. With one the
    /// item has one row and covers whole cuts of what that sees; the others are covered by other items.
    pub items: Tensor,
    /// Items, from the first, that have one row, and among them all that have a partial: backends may treat them apart.
    pub num_single_rows: u32,
    /// u32 (split rows, `ATTENTION_MERGE_WORDS`): a row of q, and where in `partials` its cuts begin and how many there
    /// are. Without split rows there is nothing to merge.
    pub merges: Tensor,
    /// f32 (cuts, `partial_cols`), in place: for each query head the values of one row and cut under its largest score,
    /// not yet divided; that score; the sum of weights.
    pub partials: Tensor,
    /// u32 (max_num_seqs, max_blocks_per_seq): block ids.
    pub table: Tensor,
    pub num_heads: u32,
    pub scale: f32,
    /// If not 0, a score s, after `scale`, becomes `soft_cap * tanh(s / soft_cap)` (Gemma 2).
    pub soft_cap: f32,
    /// Positions a row sees at most, itself included; 0 for no limit.
    pub window: u32,
    /// f32 (tokens, num_heads * head_dim)
    pub out: Tensor,
}

impl Attention {
    /// Columns of `partials`.
    pub const fn partial_cols(num_heads: u32, head_dim: u32) -> u32 {
        num_heads * (head_dim + 2)
    }
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
    /// f32 (tokens, 2 * ffn_dim): gate, then up.
    pub gate_up: Tensor,
    pub activation: Activation,
    /// f32 (tokens, ffn_dim)
    pub out: Tensor,
}

/// Ends a branch of the residual stream and begins the next one: `x += y`, then `out = norm(x)`, as [`RmsNorm`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AddNorm {
    /// f32 (tokens, dim), in place.
    pub x: Tensor,
    /// f32 (tokens, dim): undefined afterwards, so that a product right before this may leave its last additions to it.
    pub y: Tensor,
    /// f32 (1, dim): if there is one, y goes through a norm of its own before it is added.
    pub post_weight: Option<Tensor>,
    /// u32 (n, 1): distinct rows of x and y, the only ones that are touched; `None` for all.
    pub rows: Option<Tensor>,
    /// f32 (1, dim)
    pub weight: Tensor,
    pub eps: f32,
    /// f32 (n, dim): of `rows[i]` at i.
    pub out: Tensor,
}

/// `x = scale * x + offset`, `rounds` times over, element by element: how fast a device multiplies and adds at most. No
/// model has it. With a `scale` of 1 it tells the same of matrix units, where products go to them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MulAdd {
    /// f32 (rows, cols), in place.
    pub x: Tensor,
    pub scale: f32,
    pub offset: f32,
    /// A multiple of `MUL_ADD_ROUNDS`.
    pub rounds: u32,
}

/// Rounds that a backend may take in one go.
pub const MUL_ADD_ROUNDS: u32 = 8;

/// In a word of `counts`: the token is in the prompt. The other bits count how often it was generated.
pub const IN_PROMPT: u32 = 1 << 31;

/// Begins the token counts of slots anew: each row is cleared, and then the sequence's tokens are counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ResetCounts {
    /// u32 (n, 4): a slot; where its tokens begin in `tokens`, where the generated ones begin, and where they end.
    /// Slots are distinct.
    pub resets: Tensor,
    /// u32 (tokens, 1)
    pub tokens: Tensor,
    /// u32 (max_num_seqs, vocab), in place.
    pub counts: Tensor,
}

/// What [`Sample`] writes for a row that holds a NaN or an infinity, or whose mask allows nothing. Read by [`Embed`] it
/// is harmless: any token.
pub const NON_FINITE: u32 = u32::MAX;

/// In a [`SampleRow`]: no slot, no target, no mask. In an item of [`Attention`]: no partial.
pub const NONE: u32 = u32::MAX;

/// How to choose a token from one row of logits. Words, as the upload has them.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SampleRow {
    /// Where the choice goes; `NONE` if no token is chosen.
    pub slot: u32,
    /// Of the token to be chosen.
    pub position: u32,
    /// Low word first. A draw depends on (seed, position) alone.
    pub seed: [u32; 2],
    /// 0 is greedy; then nothing from here to `min_p` counts.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Taken off the logit of a token that was generated.
    pub presence: f32,
    /// Taken off a token's logit once for each time that it was generated.
    pub frequency: f32,
    /// Above 0. Divides the positive logit of a token that is known, prompt included, and multiplies a negative one.
    pub repetition: f32,
    /// Instead of a choice: the token whose log-probability is asked; `NONE` for none.
    pub target: u32,
    /// 0 for no log-probabilities; else that of the token, and of `logprobs - 1` most likely ones.
    pub logprobs: u32,
    /// Word of `extras` where pairs of (token, bits of the bias) begin, sorted by token.
    pub bias_at: u32,
    /// At most `MAX_BIASES`.
    pub num_biases: u32,
    /// Word of `extras` where the mask begins, bit `v % 32` of word `v / 32` for token v; `NONE` to allow all.
    pub mask_at: u32,
}

/// Words of a [`SampleRow`].
pub const SAMPLE_ROW_WORDS: u32 = 16;
/// Words of a row of [`Sample::chosen`].
pub const CHOSEN_WORDS: u32 = 4;
/// Most likely tokens that [`Sample`] gives at most.
pub const MAX_TOP: u32 = 20;
/// Biases of a row at most.
pub const MAX_BIASES: u32 = 1024;
/// Tokens of a row that are looked at together where a backend splits rows.
pub const SAMPLE_SLICE: u32 = 4096;
/// What a backend may note of a slice, in words.
pub const SLICE_WORDS: u32 = 8;

/// Chooses a token from each row of logits.
///
/// In this order: bias, penalties (repetition, then frequency and presence), mask; the largest of what that gives is
/// the greedy choice, the lowest token among equals. Else temperature; then a token must pass top-k, top-p and min-p.
/// Top-p looks at the distribution after temperature and top-k, min-p at the largest after temperature. Tokens equal
/// to the last that a filter keeps are kept too. Each kept token v of weight w draws E from the exponential
/// distribution by a hash of (seed, position, v); the largest w / E wins (Gumbel-max), which is v with its probability.
///
/// Log-probabilities and ranks are those of the logits as they came: temperature 1, nothing adjusted or cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// f32 (n, vocab)
    pub logits: Tensor,
    /// u32 (n, `SAMPLE_ROW_WORDS`): a [`SampleRow`] each. Slots are distinct.
    pub rows: Tensor,
    /// u32 (words, 1): biases and masks of all rows.
    pub extras: Tensor,
    /// u32 (max_num_seqs, vocab), in place: read for rows with penalties, whose choice is counted.
    pub counts: Tensor,
    /// u32 (n, slices of the vocabulary * `SLICE_WORDS`): for the backend's own use.
    pub slices: Tensor,
    /// u32 (max_num_seqs, 1), in place: the choice of each row that has a slot.
    pub sampled: Tensor,
    /// u32 (n, `CHOSEN_WORDS`): the choice or the target, bits of its log-probability, how many tokens are more likely
    /// plus one, 0. The token is `NON_FINITE` for a broken row; log-probability and rank only where they are asked.
    pub chosen: Tensor,
    /// u32 (n, 2 * `MAX_TOP`): the most likely tokens where they are asked, lowest first among equals: token, bits of
    /// its log-probability.
    pub top: Tensor,
}

impl SampleRow {
    /// A row of which nothing is asked.
    pub const IDLE: SampleRow = SampleRow {
        slot: NONE,
        position: 0,
        seed: [0; 2],
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        presence: 0.0,
        frequency: 0.0,
        repetition: 1.0,
        target: NONE,
        logprobs: 0,
        bias_at: 0,
        num_biases: 0,
        mask_at: NONE,
    };

    pub fn words(&self) -> [u32; SAMPLE_ROW_WORDS as usize] {
        bytemuck::cast(*self)
    }

    pub fn is_idle(&self) -> bool {
        self.slot == NONE && self.target == NONE
    }

    /// Whether the slot's counts are read and updated.
    pub fn is_penalised(&self) -> bool {
        self.presence != 0.0 || self.frequency != 0.0 || self.repetition != 1.0
    }

    /// Most likely tokens that are asked, of a vocabulary.
    pub fn num_top(&self, vocab_size: u32) -> u32 {
        self.logprobs.saturating_sub(1).min(vocab_size)
    }
}

/// Columns of [`Sample::slices`].
pub const fn slice_cols(vocab_size: u32) -> u32 {
    vocab_size.div_ceil(SAMPLE_SLICE) * SLICE_WORDS
}
