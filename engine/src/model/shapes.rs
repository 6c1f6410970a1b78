//! The dimensions of known models, to serve and measure a model of that size without its weights.
//!
//! They are plain Llamas, as config.json of each states them; the output is the embedding in all of them, so that those
//! whose output is a matrix of its own take less memory here, and the same time a step.

use super::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use crate::op::{Activation, RopeStyle};

struct Shape {
    name: &'static str,
    num_layers: u32,
    dim: u32,
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    ffn_dim: u32,
    vocab_size: u32,
    max_positions: u32,
    rope_base: f64,
    /// Of Llama 3's scaling.
    rope_factor: Option<f64>,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "smollm2-135m",
        num_layers: 30,
        dim: 576,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        ffn_dim: 1536,
        vocab_size: 49_152,
        max_positions: 8192,
        rope_base: 100_000.0,
        rope_factor: None,
    },
    Shape {
        name: "llama-3.2-1b",
        num_layers: 16,
        dim: 2048,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 64,
        ffn_dim: 8192,
        rope_factor: Some(32.0),
        ..LLAMA_3
    },
    Shape {
        name: "llama-3.2-3b",
        num_layers: 28,
        dim: 3072,
        num_heads: 24,
        num_kv_heads: 8,
        head_dim: 128,
        ffn_dim: 8192,
        rope_factor: Some(32.0),
        ..LLAMA_3
    },
    LLAMA_3,
    Shape { name: "llama-3.1-70b", num_layers: 80, dim: 8192, num_heads: 64, ffn_dim: 28_672, ..LLAMA_3 },
];

const LLAMA_3: Shape = Shape {
    name: "llama-3.1-8b",
    num_layers: 32,
    dim: 4096,
    num_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    ffn_dim: 14_336,
    vocab_size: 128_256,
    max_positions: 131_072,
    rope_base: 500_000.0,
    rope_factor: Some(8.0),
};

impl ModelConfig {
    /// Of the model of this name, one of [`shape_names`].
    pub fn of_shape(name: &str) -> Option<ModelConfig> {
        SHAPES.iter().find(|shape| shape.name == name).map(Shape::config)
    }
}

pub fn shape_names() -> [&'static str; SHAPES.len()] {
    SHAPES.map(|shape| shape.name)
}

impl Shape {
    fn config(&self) -> ModelConfig {
        let llama_3 = |factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192.0,
        };
        ModelConfig {
            family: Family::Llama,
            num_layers: self.num_layers,
            dim: self.dim,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            ffn_dim: self.ffn_dim,
            vocab_size: self.vocab_size,
            norm_eps: 1e-5,
            max_positions: self.max_positions,
            rope_style: RopeStyle::Interleaved,
            rope: RopeConfig {
                base: self.rope_base,
                rotary_dim: self.head_dim,
                scaling: self.rope_factor.map_or(RopeScaling::None, llama_3),
            },
            local_rope: None,
            windows: vec![None; self.num_layers as usize],
            activation: Activation::Silu,
            embed_scale: 1.0,
            attention_scale: 1.0 / (self.head_dim as f32).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::KvType;

    #[test]
    fn every_shape_can_be_run() {
        for name in shape_names() {
            let config = ModelConfig::of_shape(name).expect("it is listed");
            config.check().unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert_eq!(ModelConfig::of_shape("llama-4"), None);
        // 2 x 32 layers x 8 heads x 128 elements of f16.
        let llama = ModelConfig::of_shape("llama-3.1-8b").expect("it is listed");
        assert_eq!(llama.kv_bytes_per_token(KvType::F16), 131_072);
    }
}
