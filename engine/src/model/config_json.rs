//! A model's shape out of a Hugging Face config.json.
//!
//! Invariant: a field that would change the numbers is either read or refused by name; none is passed over.

use serde_json::Value;

use super::config::{Family, MAX_LAYERS, ModelConfig, ModelConfigError, RopeConfig, RopeScaling};
use crate::op::{Activation, RopeStyle};

impl ModelConfig {
    pub fn from_json(config: &Value) -> Result<ModelConfig, ModelConfigError> {
        let reader = Reader { config };
        let name = reader.config["architectures"][0].as_str().ok_or_else(|| missing("architectures"))?;
        let family = match name {
            "LlamaForCausalLM" | "MistralForCausalLM" => Family::Llama,
            "Qwen2ForCausalLM" => Family::Qwen2,
            "Qwen3ForCausalLM" => Family::Qwen3,
            "Gemma3ForCausalLM" => Family::Gemma3,
            name => return Err(ModelConfigError::architecture(name)),
        };
        reader.refuse_extras(family)?;
        let config = reader.config(family)?;
        config.check()?;
        Ok(config)
    }
}

struct Reader<'a> {
    config: &'a Value,
}

impl Reader<'_> {
    fn config(&self, family: Family) -> Result<ModelConfig, ModelConfigError> {
        let gemma = family == Family::Gemma3;
        let num_layers = self.u32("num_hidden_layers")?;
        let dim = self.u32("hidden_size")?;
        let num_heads = self.u32("num_attention_heads")?;
        let default_head_dim = dim.checked_div(num_heads).unwrap_or(0);
        let head_dim = self.optional_u32("head_dim")?.unwrap_or(default_head_dim);
        let scores_width = match gemma {
            true => self.f64("query_pre_attn_scalar")?.unwrap_or(256.0),
            false => f64::from(head_dim),
        };
        Ok(ModelConfig {
            family,
            num_layers,
            dim,
            num_heads,
            num_kv_heads: self.optional_u32("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            ffn_dim: self.u32("intermediate_size")?,
            vocab_size: self.u32("vocab_size")?,
            norm_eps: self.f64("rms_norm_eps")?.ok_or_else(|| missing("rms_norm_eps"))? as f32,
            max_positions: self.u32("max_position_embeddings")?,
            rope_style: RopeStyle::Halves,
            rope: self.rope(head_dim, gemma)?,
            local_rope: match gemma {
                true => Some(self.local_rope(head_dim)?),
                false => None,
            },
            windows: self.windows(family, num_layers.min(MAX_LAYERS))?,
            activation: self.activation()?,
            embed_scale: if gemma { (dim as f32).sqrt() } else { 1.0 },
            attention_scale: (1.0 / scores_width.sqrt()) as f32,
        })
    }

    fn activation(&self) -> Result<Activation, ModelConfigError> {
        let name = [&self.config["hidden_activation"], &self.config["hidden_act"]].into_iter().find_map(Value::as_str);
        match name {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(name) => Err(ModelConfigError::unsupported(format!("the activation {name}"))),
            None => Err(missing("hidden_act")),
        }
    }

    fn windows(&self, family: Family, num_layers: u32) -> Result<Vec<Option<u32>>, ModelConfigError> {
        let enabled = match family {
            // Mistral's layers have windows; Llama's do not, whatever is left over in its config.
            Family::Llama => self.config["architectures"][0] == "MistralForCausalLM",
            Family::Qwen2 | Family::Qwen3 => self.config["use_sliding_window"].as_bool().unwrap_or(false),
            Family::Gemma3 => true,
        };
        let window = self.optional_u32("sliding_window")?.filter(|&window| enabled && window > 0);
        if family == Family::Gemma3 && window.is_none() {
            return Err(missing("sliding_window"));
        }
        if let Some(types) = self.config["layer_types"].as_array() {
            let kinds = types.iter().map(Value::as_str);
            let known = kinds.clone().all(|kind| matches!(kind, Some("sliding_attention" | "full_attention")));
            if types.len() != num_layers as usize || !known {
                return Err(bad("layer_types", "does not say sliding_attention or full_attention for each layer"));
            }
            return Ok(kinds.map(|kind| window.filter(|_| kind == Some("sliding_attention"))).collect());
        }
        let pattern = self.optional_u32("sliding_window_pattern")?.unwrap_or(6).max(1);
        let first_local = self.optional_u32("max_window_layers")?.unwrap_or(28);
        let is_local = |layer: u32| match family {
            Family::Gemma3 => !(layer + 1).is_multiple_of(pattern),
            Family::Qwen2 | Family::Qwen3 => layer >= first_local,
            Family::Llama => true,
        };
        Ok((0..num_layers).map(|layer| window.filter(|_| is_local(layer))).collect())
    }

    /// Older files have `rope_theta` and `rope_scaling`; newer ones `rope_parameters`, a kind of layer each for Gemma.
    fn rope(&self, head_dim: u32, gemma: bool) -> Result<RopeConfig, ModelConfigError> {
        let mut parameters = &self.config["rope_parameters"];
        if gemma && !parameters.is_null() {
            parameters = parameters.get("full_attention").ok_or_else(|| missing("rope_parameters.full_attention"))?;
        }
        let default_base = if gemma { 1_000_000.0 } else { 10_000.0 };
        let theta = parameters["rope_theta"].as_f64().or(self.f64("rope_theta")?);
        let scaling = if parameters.is_object() { parameters } else { &self.config["rope_scaling"] };
        self.refuse_partial(parameters)?;
        Ok(RopeConfig { base: theta.unwrap_or(default_base), rotary_dim: head_dim, scaling: rope_scaling(scaling)? })
    }

    fn local_rope(&self, head_dim: u32) -> Result<RopeConfig, ModelConfigError> {
        let parameters = &self.config["rope_parameters"]["sliding_attention"];
        let base = parameters["rope_theta"].as_f64().or(self.f64("rope_local_base_freq")?).unwrap_or(10_000.0);
        self.refuse_partial(parameters)?;
        Ok(RopeConfig { base, rotary_dim: head_dim, scaling: rope_scaling(parameters)? })
    }

    fn refuse_partial(&self, parameters: &Value) -> Result<(), ModelConfigError> {
        let factor = parameters["partial_rotary_factor"].as_f64().or(self.f64("partial_rotary_factor")?);
        match factor.unwrap_or(1.0) == 1.0 {
            true => Ok(()),
            false => Err(ModelConfigError::unsupported("rotation of a part of each head (partial_rotary_factor)")),
        }
    }

    fn refuse_extras(&self, family: Family) -> Result<(), ModelConfigError> {
        let quantization = &self.config["quantization_config"];
        if !quantization.is_null() {
            let method = quantization["quant_method"].as_str().unwrap_or("unknown").to_uppercase();
            return Err(ModelConfigError::unsupported(format!("{method} weights (quantization_config)")));
        }
        // Qwen 2 always has biases of its own, and takes no word on it.
        let attention = (family != Family::Qwen2).then_some("attention_bias");
        for key in attention.into_iter().chain(["mlp_bias"]) {
            if self.config[key].as_bool() == Some(true) {
                return Err(ModelConfigError::unsupported(format!("biases where its family has none ({key})")));
            }
        }
        if self.config["use_bidirectional_attention"].as_bool() == Some(true) {
            return Err(ModelConfigError::unsupported("attention to later tokens (use_bidirectional_attention)"));
        }
        for key in ["final_logit_softcapping", "attn_logit_softcapping"] {
            if !self.config[key].is_null() {
                return Err(ModelConfigError::unsupported(format!("soft-capped logits ({key})")));
            }
        }
        Ok(())
    }

    fn u32(&self, key: &str) -> Result<u32, ModelConfigError> {
        self.optional_u32(key)?.ok_or_else(|| missing(key))
    }

    fn optional_u32(&self, key: &str) -> Result<Option<u32>, ModelConfigError> {
        let value = &self.config[key];
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        match value.is_null() || number.is_some() {
            true => Ok(number),
            false => Err(bad(key, "is not a whole number of 32 bits")),
        }
    }

    fn f64(&self, key: &str) -> Result<Option<f64>, ModelConfigError> {
        let value = &self.config[key];
        match value.is_null() || value.is_number() {
            true => Ok(value.as_f64()),
            false => Err(bad(key, "is not a number")),
        }
    }
}

fn rope_scaling(scaling: &Value) -> Result<RopeScaling, ModelConfigError> {
    let kind = [&scaling["rope_type"], &scaling["type"]].into_iter().find_map(Value::as_str);
    let number = |key: &str| {
        let value = scaling[key].as_f64().filter(|value| value.is_finite() && *value > 0.0);
        value.ok_or_else(|| bad(&format!("rope_scaling.{key}"), "is not a positive number"))
    };
    match kind {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: number("factor")? }),
        Some("llama3") => {
            let (low_freq_factor, high_freq_factor) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                return Err(bad("rope_scaling.high_freq_factor", "is not above low_freq_factor"));
            }
            let original_max_positions = number("original_max_position_embeddings")?;
            Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_positions,
            })
        }
        Some(kind) => Err(ModelConfigError::unsupported(format!("position scaling of type {kind}"))),
    }
}

fn missing(key: &str) -> ModelConfigError {
    ModelConfigError::Missing { key: key.to_owned() }
}

fn bad(key: &str, problem: &str) -> ModelConfigError {
    ModelConfigError::Bad { key: key.to_owned(), problem: problem.to_owned() }
}
