//! Models by their dimensions: what decides which ops they run. Nothing here knows a device.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ModelShape {
    pub model: &'static str,
    pub dim: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub ffn_dim: u32,
    pub vocab_size: u32,
    /// Positions that attention sees.
    pub context: u32,
}

impl ModelShape {
    /// For tests.
    pub const TINY: ModelShape = ModelShape {
        model: "tiny",
        dim: 64,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 32,
        ffn_dim: 96,
        vocab_size: 100,
        context: 40,
    };

    pub const SMALL: ModelShape = ModelShape {
        model: "SmolLM2-135M",
        dim: 576,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        ffn_dim: 1536,
        vocab_size: 49_152,
        context: 256,
    };

    pub const B1: ModelShape = ModelShape {
        model: "Llama-3.2-1B",
        dim: 2048,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 64,
        ffn_dim: 8192,
        vocab_size: 128_256,
        context: 1024,
    };

    pub const B8: ModelShape = ModelShape {
        model: "Llama-3.1-8B",
        dim: 4096,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        ffn_dim: 14_336,
        vocab_size: 128_256,
        context: 1024,
    };

    pub const B70: ModelShape = ModelShape {
        model: "Llama-3.1-70B",
        dim: 8192,
        num_heads: 64,
        num_kv_heads: 8,
        head_dim: 128,
        ffn_dim: 28_672,
        vocab_size: 128_256,
        context: 1024,
    };

    /// Matrices of a layer and of the output by name, N and K; equal ones once, under the first name.
    pub fn mat_muls(&self) -> Vec<(&'static str, u32, u32)> {
        let (q_dim, kv_dim) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let mut all = vec![
            ("attn_q", q_dim, self.dim),
            ("attn_k", kv_dim, self.dim),
            ("attn_output", self.dim, q_dim),
            ("ffn_gate", self.ffn_dim, self.dim),
            ("ffn_down", self.dim, self.ffn_dim),
            ("output", self.vocab_size, self.dim),
        ];
        if (all[0].1, all[0].2) == (all[2].1, all[2].2) {
            all.remove(2);
        }
        all
    }
}
