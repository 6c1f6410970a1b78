//! A model's shape out of GGUF metadata.
//!
//! Invariant: a key that would change the numbers is either read or refused by name; none is passed over.

use super::config::{Family, MAX_LAYERS, ModelConfig, ModelConfigError, RopeConfig, RopeScaling};
use crate::format::gguf::{Array, Gguf, Value};
use crate::format::quant::dequantize_row;
use crate::op::{Activation, RopeStyle};
use crate::tensor::WeightFormat;

/// Layers of Gemma 3 from one without a window to the next, where the file does not say.
const GEMMA3_PATTERN: u32 = 6;
/// The rotation of Gemma 3's layers with a window, where the file does not say.
const GEMMA3_LOCAL_BASE: f64 = 10_000.0;
/// Gemma 3 with 27 billion parameters scales its scores by the width of the model instead of the head.
const GEMMA3_27B_LAYERS: u32 = 62;

impl ModelConfig {
    pub fn from_gguf(file: &Gguf) -> Result<ModelConfig, ModelConfigError> {
        if let Some(kind) = file.str("general.type")?.filter(|kind| *kind != "model") {
            return Err(ModelConfigError::unsupported(not_a_model(kind)));
        }
        let name = file.str("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
        let family = match name {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma3" => Family::Gemma3,
            name => return Err(ModelConfigError::architecture(name)),
        };
        let config = Reader { file, prefix: name.to_owned() }.config(family)?;
        config.check()?;
        Ok(config)
    }
}

struct Reader<'a> {
    file: &'a Gguf,
    prefix: String,
}

impl Reader<'_> {
    fn config(&self, family: Family) -> Result<ModelConfig, ModelConfigError> {
        self.refuse_extras()?;
        let num_layers = self.u32("block_count")?;
        let dim = self.u32("embedding_length")?;
        let num_heads = self.u32("attention.head_count")?;
        let num_kv_heads = self.optional_u32("attention.head_count_kv")?.unwrap_or(num_heads);
        let default_head_dim = dim.checked_div(num_heads).unwrap_or(0);
        let head_dim = self.optional_u32("attention.key_length")?.unwrap_or(default_head_dim);
        let value_dim = self.optional_u32("attention.value_length")?.unwrap_or(head_dim);
        if value_dim != head_dim {
            return Err(ModelConfigError::unsupported(format!("values of {value_dim} beside keys of {head_dim}")));
        }
        let gemma = family == Family::Gemma3;
        let rotary_dim = self.optional_u32("rope.dimension_count")?.unwrap_or(head_dim);
        let scores_width = if gemma && num_layers == GEMMA3_27B_LAYERS { default_head_dim } else { head_dim };
        let embed = self.file.tensor("token_embd.weight").ok_or_else(|| missing("token_embd.weight"))?;
        Ok(ModelConfig {
            family,
            num_layers,
            dim,
            num_heads,
            num_kv_heads,
            head_dim,
            ffn_dim: self.u32("feed_forward_length")?,
            vocab_size: embed.rows,
            norm_eps: self.f32("attention.layer_norm_rms_epsilon")?.ok_or_else(|| self.missing("rms_epsilon"))?,
            max_positions: self.u32("context_length")?,
            rope_style: if family == Family::Llama { RopeStyle::Interleaved } else { RopeStyle::Halves },
            rope: self.rope(rotary_dim, if gemma { 1_000_000.0 } else { 10_000.0 })?,
            local_rope: if gemma { Some(self.local_rope(rotary_dim)?) } else { None },
            windows: self.windows(gemma, num_layers.min(MAX_LAYERS))?,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            embed_scale: if gemma { (dim as f32).sqrt() } else { 1.0 },
            attention_scale: 1.0 / (scores_width as f32).sqrt(),
        })
    }

    fn windows(&self, gemma: bool, num_layers: u32) -> Result<Vec<Option<u32>>, ModelConfigError> {
        let window = self.optional_u32("attention.sliding_window")?.filter(|&window| window > 0);
        let key = self.key("attention.sliding_window_pattern");
        let is_local: Vec<bool> = match self.file.metadata(&key) {
            Some(Value::Array(Array::Bool(layers))) if layers.len() == num_layers as usize => layers.clone(),
            Some(Value::Array(_)) => return Err(bad(&key, "is not a bool for each layer")),
            _ => {
                let default = if gemma { GEMMA3_PATTERN } else { 0 };
                let pattern = self.file.u32(&key)?.unwrap_or(default);
                (1..=num_layers).map(|layer| pattern == 0 || !layer.is_multiple_of(pattern)).collect()
            }
        };
        Ok(is_local.into_iter().map(|is_local| window.filter(|_| is_local)).collect())
    }

    fn local_rope(&self, rotary_dim: u32) -> Result<RopeConfig, ModelConfigError> {
        let base = self.f32("rope.freq_base_swa")?.map_or(GEMMA3_LOCAL_BASE, f64::from);
        Ok(RopeConfig { base, rotary_dim, scaling: RopeScaling::None })
    }

    fn rope(&self, rotary_dim: u32, default_base: f64) -> Result<RopeConfig, ModelConfigError> {
        let base = self.f32("rope.freq_base")?.map_or(default_base, f64::from);
        let factor = self.f32("rope.scaling.factor")?.map(f64::from);
        let kind = self.file.str(&self.key("rope.scaling.type"))?;
        if let Some(kind) = kind.filter(|kind| !matches!(*kind, "none" | "linear")) {
            return Err(ModelConfigError::unsupported(format!("position scaling of type {kind}")));
        }
        let scaling = match (kind, factor, self.divisors(rotary_dim)?) {
            (_, None | Some(0.0 | 1.0), Some(divisors)) | (Some("none"), _, Some(divisors)) => {
                RopeScaling::Divisors(divisors)
            }
            (_, Some(_), Some(_)) => {
                return Err(ModelConfigError::unsupported("position scaling of two kinds at once"));
            }
            (Some("none"), ..) | (_, None | Some(0.0 | 1.0), None) => RopeScaling::None,
            (_, Some(factor), None) if factor.is_finite() && factor > 0.0 => RopeScaling::Linear { factor },
            (_, Some(_), None) => return Err(bad(&self.key("rope.scaling.factor"), "is not a positive number")),
        };
        Ok(RopeConfig { base, rotary_dim, scaling })
    }

    /// `rope_freqs.weight`: how converters store Llama 3's scaling.
    fn divisors(&self, rotary_dim: u32) -> Result<Option<Vec<f32>>, ModelConfigError> {
        const NAME: &str = "rope_freqs.weight";
        let Some(tensor) = self.file.tensor(NAME) else { return Ok(None) };
        let shape_is_right = (tensor.rows, tensor.cols, tensor.format) == (1, rotary_dim / 2, WeightFormat::F32);
        if !shape_is_right {
            return Err(bad(NAME, "is not one f32 for each rotated pair"));
        }
        let mut bytes = vec![0; tensor.size_bytes as usize];
        self.file.rows(NAME)?.read_rows(&mut bytes).map_err(|error| bad(NAME, &error.to_string()))?;
        let mut divisors = vec![0.0; (rotary_dim / 2) as usize];
        dequantize_row(tensor.format, &bytes, &mut divisors);
        match divisors.iter().all(|divisor| divisor.is_finite() && *divisor > 0.0) {
            true => Ok(Some(divisors)),
            false => Err(bad(NAME, "holds a number that is not positive")),
        }
    }

    fn refuse_extras(&self) -> Result<(), ModelConfigError> {
        if self.optional_u32("expert_count")?.unwrap_or(0) > 0 {
            return Err(ModelConfigError::unsupported("a mixture of experts (MoE)"));
        }
        for key in ["final_logit_softcapping", "attn_logit_softcapping"] {
            if self.f32(key)?.unwrap_or(0.0) != 0.0 {
                return Err(ModelConfigError::unsupported(format!("soft-capped logits ({})", self.key(key))));
            }
        }
        Ok(())
    }

    fn u32(&self, key: &str) -> Result<u32, ModelConfigError> {
        self.optional_u32(key)?.ok_or_else(|| self.missing(key))
    }

    /// An integer, or an array that says the same for every layer.
    fn optional_u32(&self, key: &str) -> Result<Option<u32>, ModelConfigError> {
        let key = self.key(key);
        match self.file.metadata(&key) {
            Some(Value::Array(_)) => {
                let values = self.file.i32s(&key)?.unwrap_or(&[]);
                let first = values.first().and_then(|&first| u32::try_from(first).ok());
                match (first, values.iter().all(|value| Some(value) == values.first())) {
                    (Some(first), true) => Ok(Some(first)),
                    _ => Err(ModelConfigError::unsupported(format!("layers that differ in {key}"))),
                }
            }
            _ => Ok(self.file.u32(&key)?),
        }
    }

    fn f32(&self, key: &str) -> Result<Option<f32>, ModelConfigError> {
        Ok(self.file.f32(&self.key(key))?)
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn missing(&self, key: &str) -> ModelConfigError {
        missing(&self.key(key))
    }
}

/// A file that goes with a model, by what its `general.type` says.
fn not_a_model(kind: &str) -> String {
    match kind {
        "adapter" => "an adapter (LoRA) instead of a model; merge it into its model".to_owned(),
        "mmproj" => "the projector of a model of images and text (vision) instead of a model".to_owned(),
        kind => format!("the type {kind} instead of a model"),
    }
}

fn bad(key: &str, problem: &str) -> ModelConfigError {
    ModelConfigError::Bad { key: key.to_owned(), problem: problem.to_owned() }
}

fn missing(key: &str) -> ModelConfigError {
    ModelConfigError::Missing { key: key.to_owned() }
}
