//! Models by their dimensions: what decides which ops they run. Nothing here knows a device.

use fullbore_engine::model::ModelConfig;
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

    /// Of the model that is known by this name, with sequences of `context` positions.
    pub fn of_model(model: &'static str, context: u32) -> Option<ModelShape> {
        let ModelConfig { dim, num_heads, num_kv_heads, head_dim, ffn_dim, vocab_size, .. } =
            ModelConfig::of_shape(model)?;
        Some(ModelShape { model, dim, num_heads, num_kv_heads, head_dim, ffn_dim, vocab_size, context })
    }

    /// Products of a layer and of the output by name, N and K, as a model runs them: q, k and v in one, gate and up
    /// in another.
    pub fn mat_muls(&self) -> Vec<(&'static str, u32, u32)> {
        let (q_dim, kv_dim) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        vec![
            ("attn_qkv", q_dim + 2 * kv_dim, self.dim),
            ("attn_output", self.dim, q_dim),
            ("ffn_gate_up", 2 * self.ffn_dim, self.dim),
            ("ffn_down", self.dim, self.ffn_dim),
            ("output", self.vocab_size, self.dim),
        ]
    }
}
