//! Handles to device memory: what an op reads and writes, as plain `Copy` data.
//!
//! Invariant: a tensor is contiguous and row-major. A handle owns nothing and is never freed; everything is
//! allocated at start. This file knows no backend.

/// A buffer of one backend, as [`Backend::alloc`](crate::backend::Backend::alloc) named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BufferId(pub u32);

/// A weight matrix of one backend, as [`Backend::load_weight`](crate::backend::Backend::load_weight) named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightId(pub u32);

/// Element type of an activation or of step data. Both are four bytes wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    U32,
}

/// `rows` x `cols` elements in `buffer`, starting `offset` elements from its begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    pub buffer: BufferId,
    pub offset: u32,
    pub rows: u32,
    pub cols: u32,
    pub dtype: DType,
}

impl Tensor {
    pub fn f32(buffer: BufferId, rows: u32, cols: u32) -> Tensor {
        Tensor { buffer, offset: 0, rows, cols, dtype: DType::F32 }
    }

    pub fn u32(buffer: BufferId, rows: u32, cols: u32) -> Tensor {
        Tensor { buffer, offset: 0, rows, cols, dtype: DType::U32 }
    }

    /// The first `rows` rows.
    pub fn first_rows(self, rows: u32) -> Tensor {
        assert!(rows <= self.rows, "{rows} rows of a tensor with {}", self.rows);
        Tensor { rows, ..self }
    }

    pub fn num_elements(self) -> u32 {
        self.rows * self.cols
    }

    /// Size in bytes; elements are four bytes wide.
    pub fn size_bytes(self) -> u64 {
        u64::from(self.num_elements()) * 4
    }

    /// Distance from the begin of the buffer, in bytes.
    pub fn offset_bytes(self) -> u64 {
        u64::from(self.offset) * 4
    }
}

/// How the elements of a weight are stored in a model file. Names and layouts are GGML's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    IQ4NL,
    IQ4XS,
}

impl WeightFormat {
    pub const ALL: [WeightFormat; 15] = [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::BF16,
        WeightFormat::Q4_0,
        WeightFormat::Q4_1,
        WeightFormat::Q5_0,
        WeightFormat::Q5_1,
        WeightFormat::Q8_0,
        WeightFormat::Q2K,
        WeightFormat::Q3K,
        WeightFormat::Q4K,
        WeightFormat::Q5K,
        WeightFormat::Q6K,
        WeightFormat::IQ4NL,
        WeightFormat::IQ4XS,
    ];

    /// Elements in a block: the unit that shares scales.
    pub const fn block_len(self) -> u32 {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => 1,
            WeightFormat::Q4_0
            | WeightFormat::Q4_1
            | WeightFormat::Q5_0
            | WeightFormat::Q5_1
            | WeightFormat::Q8_0
            | WeightFormat::IQ4NL => 32,
            _ => 256,
        }
    }

    /// Bytes of a block in the file.
    pub const fn block_bytes(self) -> u32 {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::BF16 => 2,
            WeightFormat::Q4_0 | WeightFormat::IQ4NL => 18,
            WeightFormat::Q4_1 => 20,
            WeightFormat::Q5_0 => 22,
            WeightFormat::Q5_1 => 24,
            WeightFormat::Q8_0 => 34,
            WeightFormat::Q2K => 84,
            WeightFormat::Q3K => 110,
            WeightFormat::Q4K => 144,
            WeightFormat::Q5K => 176,
            WeightFormat::Q6K => 210,
            WeightFormat::IQ4XS => 136,
        }
    }

    /// Bytes of a row of `cols` elements in the file; `cols` is a multiple of the block length.
    pub const fn row_bytes(self, cols: u32) -> u64 {
        (cols / self.block_len()) as u64 * self.block_bytes() as u64
    }

    /// Whether rows of `cols` values fill whole blocks.
    pub const fn has_whole_blocks(self, cols: u32) -> bool {
        cols.is_multiple_of(self.block_len())
    }

    /// The format that [`WeightFormat::name`] calls so.
    pub fn from_name(name: &str) -> Option<WeightFormat> {
        WeightFormat::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The name that tools print: `q4_1`, `q4_k`, `iq4_nl`.
    pub const fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
            WeightFormat::BF16 => "bf16",
            WeightFormat::Q4_0 => "q4_0",
            WeightFormat::Q4_1 => "q4_1",
            WeightFormat::Q5_0 => "q5_0",
            WeightFormat::Q5_1 => "q5_1",
            WeightFormat::Q8_0 => "q8_0",
            WeightFormat::Q2K => "q2_k",
            WeightFormat::Q3K => "q3_k",
            WeightFormat::Q4K => "q4_k",
            WeightFormat::Q5K => "q5_k",
            WeightFormat::Q6K => "q6_k",
            WeightFormat::IQ4NL => "iq4_nl",
            WeightFormat::IQ4XS => "iq4_xs",
        }
    }
}

/// A loaded weight matrix: `rows` output features (N) x `cols` input features (K).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Weight {
    pub id: WeightId,
    pub rows: u32,
    pub cols: u32,
    pub format: WeightFormat,
}

/// How the elements of a KV cache are stored. Names are GGML's, and so is what a name means: see `head_words`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvType {
    #[default]
    F16,
    Q8_0,
    Q4_0,
}

/// Elements of K or V that share a scale, in the quantised types.
pub const KV_GROUP: u32 = 32;

impl KvType {
    pub const ALL: [KvType; 3] = [KvType::F16, KvType::Q8_0, KvType::Q4_0];

    /// The name that people give and tools print: `q8_0`.
    pub const fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::Q8_0 => "q8_0",
            KvType::Q4_0 => "q4_0",
        }
    }

    /// Bits of an element, without its share of a scale.
    pub const fn code_bits(self) -> u32 {
        match self {
            KvType::F16 => 16,
            KvType::Q8_0 => 8,
            KvType::Q4_0 => 4,
        }
    }

    /// Whether heads of `head_dim` elements fill whole words and groups.
    pub const fn takes(self, head_dim: u32) -> bool {
        match self {
            KvType::F16 => head_dim.is_multiple_of(2),
            KvType::Q8_0 | KvType::Q4_0 => head_dim.is_multiple_of(KV_GROUP),
        }
    }

    /// Words that the codes of a head take.
    pub const fn code_words(self, head_dim: u32) -> u32 {
        head_dim * self.code_bits() / 32
    }

    /// Words of one token's K (V has as many) of one KV head, so that no two heads share a word.
    ///
    /// ```text
    /// f16   the elements, two a word
    /// q8_0  the codes, four a word; then the f16 scales of the groups, two a word
    /// q4_0  the codes, four words a group: byte j has element j in its low half and element 16 + j in its high one;
    ///       then the scales
    /// ```
    pub const fn head_words(self, head_dim: u32) -> u32 {
        assert!(self.takes(head_dim), "a head is no whole number of groups");
        match self {
            KvType::F16 => self.code_words(head_dim),
            KvType::Q8_0 | KvType::Q4_0 => self.code_words(head_dim) + (head_dim / KV_GROUP).div_ceil(2),
        }
    }
}

/// The paged K and V of one layer, in two buffers.
///
/// Layout of each: `[block][kv_head][token in block][head]`, a head as [`KvType::head_words`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvTensor {
    pub k: BufferId,
    pub v: BufferId,
    pub kv_type: KvType,
    pub num_blocks: u32,
    pub block_size: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
}

impl KvTensor {
    /// Bytes of the K of one block (V has as many).
    pub const fn block_bytes(kv_type: KvType, block_size: u32, num_kv_heads: u32, head_dim: u32) -> u64 {
        block_size as u64 * num_kv_heads as u64 * kv_type.head_words(head_dim) as u64 * 4
    }

    /// Bytes of the K of one of its blocks.
    pub const fn size_of_block(self) -> u64 {
        KvTensor::block_bytes(self.kv_type, self.block_size, self.num_kv_heads, self.head_dim)
    }

    /// Where a token's head begins in either buffer, in words.
    pub const fn head_at(self, block: u32, kv_head: u32, token: u32) -> usize {
        let heads = block as usize * self.num_kv_heads as usize + kv_head as usize;
        (heads * self.block_size as usize + token as usize) * self.head_words() as usize
    }

    pub const fn head_words(self) -> u32 {
        self.kv_type.head_words(self.head_dim)
    }
}
