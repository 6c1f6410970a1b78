//! Which CUDA kernel an op takes, and the text that it is in.

use fullbore_cuda_kernels::Module;

use crate::backend::packing::Layout;
use crate::tensor::{KvType, WeightFormat};

/// A kernel of one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    UpdateTable,
    Embed(WeightFormat),
    RmsNorm,
    MatMul(WeightFormat, MatMulVariant),
    MatMulSum,
    ToF16,
    RopeKv(KvType),
    Attention(KvType, HeadDim),
    /// On tensor cores.
    AttentionMatrix(KvType, HeadDim, MatrixPairs),
    AttentionMerge(KvType),
    GatedAct,
    AddNorm,
    ResetCounts,
    SampleSlices,
    Sample,
    MulAdd,
    /// On tensor cores.
    MulAddMatrix,
}

/// What matmuls and attention compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    #[default]
    F32,
    /// Tensor cores: products of f16, sums in f32, in matmuls of more than eight rows and in attention.
    MatrixUnits,
}

impl Arithmetic {
    pub const fn name(self) -> &'static str {
        match self {
            Arithmetic::F32 => "f32",
            Arithmetic::MatrixUnits => "matrix-units",
        }
    }

    /// By how much a product may differ from the plain cpu's, relative to the largest.
    pub const fn tolerance(self) -> f32 {
        match self {
            Arithmetic::F32 => 1e-5,
            Arithmetic::MatrixUnits => 2e-3,
        }
    }
}

/// By the rows that a block computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatMulVariant {
    Rows1,
    Rows2,
    Rows4,
    Rows8,
    Rows16,
    Rows64,
    /// On tensor cores; their sums have an order of their own.
    Matrix16,
    Matrix32,
    Matrix64,
    Matrix128,
}

impl MatMulVariant {
    pub const ALL: [MatMulVariant; 10] = [
        MatMulVariant::Rows1,
        MatMulVariant::Rows2,
        MatMulVariant::Rows4,
        MatMulVariant::Rows8,
        MatMulVariant::Rows16,
        MatMulVariant::Rows64,
        MatMulVariant::Matrix16,
        MatMulVariant::Matrix32,
        MatMulVariant::Matrix64,
        MatMulVariant::Matrix128,
    ];

    /// Rows and columns of a block.
    pub const fn shape(self) -> (u32, u32) {
        match self {
            MatMulVariant::Rows1 => (1, 32),
            MatMulVariant::Rows2 => (2, 32),
            MatMulVariant::Rows4 => (4, 32),
            MatMulVariant::Rows8 => (8, 32),
            MatMulVariant::Rows16 => (16, 128),
            MatMulVariant::Rows64 => (64, 64),
            MatMulVariant::Matrix16 => (16, 256),
            MatMulVariant::Matrix32 => (32, 256),
            MatMulVariant::Matrix64 => (64, 256),
            MatMulVariant::Matrix128 => (128, 128),
        }
    }

    /// Rows of a launch at most: activations of so many have room in f16.
    pub const fn max_rows(self) -> Option<u32> {
        match self {
            MatMulVariant::Matrix16 | MatMulVariant::Matrix32 | MatMulVariant::Matrix64 => Some(64),
            _ => None,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            MatMulVariant::Rows1 => "mat_mul_1",
            MatMulVariant::Rows2 => "mat_mul_2",
            MatMulVariant::Rows4 => "mat_mul_4",
            MatMulVariant::Rows8 => "mat_mul_8",
            MatMulVariant::Rows16 => "mat_mul_16",
            MatMulVariant::Rows64 => "mat_mul_64",
            MatMulVariant::Matrix16 => "mat_mul_matrix_16",
            MatMulVariant::Matrix32 => "mat_mul_matrix_32",
            MatMulVariant::Matrix64 => "mat_mul_matrix_64",
            MatMulVariant::Matrix128 => "mat_mul_matrix_128",
        }
    }

    pub const fn arithmetic(self) -> Arithmetic {
        match self {
            MatMulVariant::Matrix16 | MatMulVariant::Matrix32 | MatMulVariant::Matrix64 | MatMulVariant::Matrix128 => {
                Arithmetic::MatrixUnits
            }
            _ => Arithmetic::F32,
        }
    }
}

/// Elements of a head that a kernel has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadDim {
    Up64,
    Up128,
    Up256,
}

impl HeadDim {
    const ALL: [HeadDim; 3] = [HeadDim::Up64, HeadDim::Up128, HeadDim::Up256];

    pub fn of(head_dim: u32) -> HeadDim {
        match head_dim {
            0..=64 => HeadDim::Up64,
            65..=128 => HeadDim::Up128,
            129..=256 => HeadDim::Up256,
            _ => panic!("heads of {head_dim} elements are refused when a model is read"),
        }
    }
}

/// Pairs of a row and a query head that a block of attention on tensor cores computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatrixPairs {
    Of16,
    Of32,
}

impl MatrixPairs {
    const ALL: [MatrixPairs; 2] = [MatrixPairs::Of16, MatrixPairs::Of32];

    /// What leaves least of a block idle.
    pub const fn of(pairs_of_item: u32) -> MatrixPairs {
        if pairs_of_item <= 16 { MatrixPairs::Of16 } else { MatrixPairs::Of32 }
    }

    pub const fn count(self) -> u32 {
        match self {
            MatrixPairs::Of16 => 16,
            MatrixPairs::Of32 => 32,
        }
    }
}

/// Whether heads of so many elements go to tensor cores: fragments go by eight.
pub const fn attends_on_units(head_dim: u32) -> bool {
    head_dim.is_multiple_of(8)
}

impl Kernel {
    /// All that there are.
    pub fn all() -> Vec<Kernel> {
        let mut all = vec![
            Kernel::UpdateTable,
            Kernel::RmsNorm,
            Kernel::GatedAct,
            Kernel::AddNorm,
            Kernel::ResetCounts,
            Kernel::SampleSlices,
            Kernel::Sample,
            Kernel::MulAdd,
            Kernel::MulAddMatrix,
            Kernel::MatMulSum,
            Kernel::ToF16,
        ];
        for format in WeightFormat::ALL {
            all.push(Kernel::Embed(format));
            all.extend(MatMulVariant::ALL.map(|variant| Kernel::MatMul(format, variant)));
        }
        for kv_type in KvType::ALL {
            all.extend([Kernel::RopeKv(kv_type), Kernel::AttentionMerge(kv_type)]);
            for head_dim in HeadDim::ALL {
                all.push(Kernel::Attention(kv_type, head_dim));
                all.extend(MatrixPairs::ALL.map(|pairs| Kernel::AttentionMatrix(kv_type, head_dim, pairs)));
            }
        }
        all
    }

    /// Those that a model calls beside its products and its embedding, which come with their weights.
    pub fn beside_products(kv_type: KvType, head_dim: u32, arithmetic: Arithmetic) -> Vec<Kernel> {
        let on_units = arithmetic == Arithmetic::MatrixUnits;
        let (attends_on_units, room) = (on_units && attends_on_units(head_dim), HeadDim::of(head_dim));
        let is_called = |kernel: &Kernel| match *kernel {
            Kernel::MatMul(..) | Kernel::Embed(_) | Kernel::MulAdd | Kernel::MulAddMatrix => false,
            Kernel::MatMulSum | Kernel::ToF16 => on_units,
            Kernel::RopeKv(of) | Kernel::AttentionMerge(of) => of == kv_type,
            Kernel::Attention(of, dim) => !attends_on_units && (of, dim) == (kv_type, room),
            Kernel::AttentionMatrix(of, dim, _) => attends_on_units && (of, dim) == (kv_type, room),
            _ => true,
        };
        Kernel::all().into_iter().filter(is_called).collect()
    }

    /// Its module, and its name in it.
    pub fn source(self) -> (Module, &'static str) {
        let plain = |parts, name| (Module { parts, constants: Vec::new() }, name);
        let weights = |format, parts, name| (Module { parts, constants: Layout::of(format).constants() }, name);
        let cache = |kv_type: KvType, parts, name| {
            (Module { parts, constants: vec![("CODE_BITS", kv_type.code_bits())] }, name)
        };
        match self {
            Kernel::UpdateTable => plain(&["update_table"], "update_table"),
            Kernel::Embed(format) => weights(format, &["weight", "embed"], "embed"),
            Kernel::RmsNorm => plain(&["halves", "rms_norm"], "rms_norm"),
            Kernel::MatMul(format, variant) => match (variant.arithmetic(), variant.max_rows()) {
                (Arithmetic::F32, _) => weights(format, &["weight", "mat_mul_params", "mat_mul"], variant.name()),
                (Arithmetic::MatrixUnits, None) => {
                    weights(format, &["weight", "mat_mul_params", "halves", "matrix", "mat_mul_matrix"], variant.name())
                }
                (Arithmetic::MatrixUnits, Some(_)) => weights(
                    format,
                    &["weight", "mat_mul_params", "halves", "matrix", "mat_mul_fragments"],
                    variant.name(),
                ),
            },
            Kernel::MatMulSum => plain(&["mat_mul_sum"], "mat_mul_sum"),
            Kernel::ToF16 => plain(&["halves", "to_f16"], "to_f16"),
            Kernel::RopeKv(kv_type) => cache(kv_type, &["kv_head", "rope_kv"], "rope_kv"),
            Kernel::Attention(kv_type, head_dim) => {
                let name = match head_dim {
                    HeadDim::Up64 => "attention_64",
                    HeadDim::Up128 => "attention_128",
                    HeadDim::Up256 => "attention_256",
                };
                cache(kv_type, &["kv_head", "attention_params", "attention"], name)
            }
            Kernel::AttentionMatrix(kv_type, head_dim, pairs) => {
                let name = match (head_dim, pairs) {
                    (HeadDim::Up64, MatrixPairs::Of16) => "attention_matrix_64_16",
                    (HeadDim::Up64, MatrixPairs::Of32) => "attention_matrix_64_32",
                    (HeadDim::Up128, MatrixPairs::Of16) => "attention_matrix_128_16",
                    (HeadDim::Up128, MatrixPairs::Of32) => "attention_matrix_128_32",
                    (HeadDim::Up256, MatrixPairs::Of16) => "attention_matrix_256_16",
                    (HeadDim::Up256, MatrixPairs::Of32) => "attention_matrix_256_32",
                };
                cache(kv_type, &["kv_head", "attention_params", "halves", "matrix", "attention_matrix"], name)
            }
            Kernel::AttentionMerge(kv_type) => {
                cache(kv_type, &["kv_head", "attention_params", "attention"], "attention_merge")
            }
            Kernel::GatedAct => plain(&["halves", "gated_act"], "gated_act"),
            Kernel::AddNorm => plain(&["halves", "add_norm"], "add_norm"),
            Kernel::ResetCounts => plain(&["reset_counts"], "reset_counts"),
            Kernel::SampleSlices => plain(&["sample"], "sample_slices"),
            Kernel::Sample => plain(&["sample"], "sample"),
            Kernel::MulAdd => plain(&["mul_add"], "mul_add"),
            Kernel::MulAddMatrix => plain(&["mul_add", "halves", "matrix", "mul_add_matrix"], "mul_add_matrix"),
        }
    }
}
