//! The shape of a model, in our words: what GGUF metadata and config.json are read into.
//!
//! Invariant: a `ModelConfig` that exists can be run; whatever we do not run is refused by name while reading.

use crate::op::{Activation, RopeStyle};

/// The architecture families; they differ by data below, not by code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, Mistral, SmolLM2.
    Llama,
    Qwen2,
    Qwen3,
    Gemma3,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub num_layers: u32,
    pub dim: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub ffn_dim: u32,
    pub vocab_size: u32,
    pub norm_eps: f32,
    /// Positions the model was made for.
    pub max_positions: u32,
    pub rope_style: RopeStyle,
    pub rope: RopeConfig,
    /// Rotation of the layers with a window, where it differs (Gemma 3).
    pub local_rope: Option<RopeConfig>,
    /// For each layer, the positions a row sees at most; `None` for all.
    pub windows: Vec<Option<u32>>,
    pub activation: Activation,
    /// 1, or sqrt(dim) (Gemma).
    pub embed_scale: f32,
    /// Usually 1 / sqrt(head_dim).
    pub attention_scale: f32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub base: f64,
    /// Elements of a head that rotate.
    pub rotary_dim: u32,
    pub scaling: RopeScaling,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by this (Chen et al. 2023).
    Linear {
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
    /// One divisor a frequency, as in GGUF's `rope_freqs.weight`.
    Divisors(Vec<f32>),
}

impl ModelConfig {
    /// Bytes of K and V of one token over all layers, in f16.
    pub fn kv_bytes_per_token(&self) -> u64 {
        u64::from(self.num_layers) * u64::from(self.num_kv_heads) * u64::from(self.head_dim) * 2 * 2
    }

    /// A small Llama for the simulator and tests; its weights may be random.
    pub fn tiny(vocab_size: u32, num_layers: u32) -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            num_layers,
            dim: 64,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            ffn_dim: 96,
            vocab_size,
            norm_eps: 1e-5,
            max_positions: 4096,
            rope_style: RopeStyle::Halves,
            rope: RopeConfig { base: 10_000.0, rotary_dim: 16, scaling: RopeScaling::None },
            local_rope: None,
            windows: vec![None; num_layers as usize],
            activation: Activation::Silu,
            embed_scale: 1.0,
            attention_scale: 0.25,
        }
    }
}

impl RopeConfig {
    /// The `rotary_dim / 2` angular frequencies, in radians a position.
    pub fn frequencies(&self) -> Vec<f64> {
        let half = self.rotary_dim / 2;
        let plain = |i: u32| self.base.powf(-f64::from(2 * i) / f64::from(self.rotary_dim));
        (0..half)
            .map(|i| match &self.scaling {
                RopeScaling::None => plain(i),
                RopeScaling::Linear { factor } => plain(i) / factor,
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                    let turns = original_max_positions * plain(i) / std::f64::consts::TAU;
                    let ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = ramp.clamp(0.0, 1.0);
                    plain(i) * (keep + (1.0 - keep) / factor)
                }
                RopeScaling::Divisors(divisors) => plain(i) / f64::from(divisors[i as usize]),
            })
            .collect()
    }
}
