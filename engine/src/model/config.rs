//! The shape of a model, in our words: what GGUF metadata and config.json are read into.
//!
//! Invariant: a `ModelConfig` that exists can be run; whatever we do not run is refused by name while reading.

use crate::format::FormatError;
use crate::op::{Activation, RopeStyle};
use crate::tensor::{KV_GROUP, KvTensor, KvType};

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

/// A KV cache of a type that the model's heads do not fill.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--kv-type {} needs heads of whole groups of {KV_GROUP} elements, and this model's head size is {head_dim}: use \
     --kv-type f16",
    .kv_type.name()
)]
pub struct UnfitKvType {
    pub kv_type: KvType,
    pub head_dim: u32,
}

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelConfigError {
    #[error("the model file has {what}, which Fullbore does not run yet")]
    Unsupported { what: String },
    #[error("the model file does not say {key}")]
    Missing { key: String },
    #[error("the model file's {key} {problem}")]
    Bad { key: String, problem: String },
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl ModelConfigError {
    pub(super) fn unsupported(what: impl Into<String>) -> ModelConfigError {
        ModelConfigError::Unsupported { what: what.into() }
    }

    /// An architecture outside the families, named with the reason where we know it.
    pub(super) fn architecture(name: &str) -> ModelConfigError {
        let lower = name.to_lowercase();
        let reason = if lower.contains("moe") || lower.contains("mixtral") {
            ", a mixture of experts (MoE)"
        } else if ["conditionalgeneration", "vl", "clip", "mllama"].iter().any(|part| lower.contains(part)) {
            ", a model of images and text (vision)"
        } else if ["eagle", "medusa", "draft"].iter().any(|part| lower.contains(part)) {
            ", a draft for speculative decoding"
        } else {
            ""
        };
        Self::unsupported(format!("the architecture {name}{reason} (llama, mistral, qwen2, qwen3 and gemma3 run)"))
    }
}

/// Twice what the largest models have; a pass over them is one recording.
pub(super) const MAX_LAYERS: u32 = 256;
const MAX_WIDTH: u32 = 1 << 20;
/// Some ten times what the largest models take.
const MAX_KV_BYTES_PER_TOKEN: u64 = 1 << 26;

impl ModelConfig {
    /// Holds every number against what the ops can take; their products then fit.
    pub(super) fn check(&self) -> Result<(), ModelConfigError> {
        let bad = |key: &str, problem: String| Err(ModelConfigError::Bad { key: key.to_owned(), problem });
        let ranges = [
            ("number of layers", self.num_layers, 1, MAX_LAYERS),
            ("width", self.dim, 1, MAX_WIDTH),
            ("number of heads", self.num_heads, 1, 1024),
            ("number of KV heads", self.num_kv_heads, 1, self.num_heads),
            ("head size", self.head_dim, 4, 1024),
            ("feed-forward width", self.ffn_dim, 1, MAX_WIDTH),
            ("vocabulary size", self.vocab_size, 1, 1 << 24),
            ("context length", self.max_positions, 1, 1 << 28),
            ("rotated width", self.rope.rotary_dim, 2, self.head_dim),
        ];
        for (key, value, least, most) in ranges {
            if value < least || value > most {
                return bad(key, format!("is {value}; from {least} to {most} can be run"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return bad("number of KV heads", format!("is {} for {} heads", self.num_kv_heads, self.num_heads));
        }
        // Two f16 share a word of the cache.
        if !KvType::F16.takes(self.head_dim) || !self.rope.rotary_dim.is_multiple_of(2) {
            return bad("head size", "is odd".to_owned());
        }
        if self.kv_bytes_per_token(KvType::F16) > MAX_KV_BYTES_PER_TOKEN {
            return bad(
                "number of KV heads",
                format!("and head size take {} bytes a token", self.kv_bytes_per_token(KvType::F16)),
            );
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let bases = std::iter::once(&self.rope).chain(&self.local_rope).map(|rope| rope.base);
        let scales = [f64::from(self.embed_scale), f64::from(self.attention_scale), f64::from(self.norm_eps)];
        match bases.chain(scales).all(positive) {
            true => Ok(()),
            false => bad("norm epsilon, rope base or scale", "is not a positive number".to_owned()),
        }
    }

    /// Whether a KV cache of `kv_type` can hold this model's heads.
    pub fn check_kv_type(&self, kv_type: KvType) -> Result<(), UnfitKvType> {
        match kv_type.takes(self.head_dim) {
            true => Ok(()),
            false => Err(UnfitKvType { kv_type, head_dim: self.head_dim }),
        }
    }

    /// Bytes of K and V of one token over all layers.
    pub fn kv_bytes_per_token(&self, kv_type: KvType) -> u64 {
        let of_k = KvTensor::block_bytes(kv_type, 1, self.num_kv_heads, self.head_dim);
        u64::from(self.num_layers) * 2 * of_k
    }

    /// A small Llama for the simulator and tests; its weights may be random.
    pub fn tiny(vocab_size: u32, num_layers: u32) -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            num_layers,
            dim: 64,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 32,
            ffn_dim: 96,
            vocab_size,
            norm_eps: 1e-5,
            max_positions: 4096,
            rope_style: RopeStyle::Halves,
            rope: RopeConfig { base: 10_000.0, rotary_dim: 32, scaling: RopeScaling::None },
            local_rope: None,
            windows: vec![None; num_layers as usize],
            activation: Activation::Silu,
            embed_scale: 1.0,
            attention_scale: 0.176_776_7,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_heads_do_not_fill_is_refused_with_what_to_do() {
        let model = ModelConfig { head_dim: 80, ..ModelConfig::tiny(1024, 2) };
        assert_eq!(model.check_kv_type(KvType::F16), Ok(()));
        let error = model.check_kv_type(KvType::Q8_0).expect_err("80 is no multiple of 32").to_string();
        let sentence = "--kv-type q8_0 needs heads of whole groups of 32 elements, and this model's head size is 80: \
                        use --kv-type f16";
        assert_eq!(error, sentence);
    }
}
