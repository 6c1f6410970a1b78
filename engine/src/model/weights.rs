//! From a checkpoint to device memory: the table of tensor names, and the loader.
//!
//! Invariant: bytes go from the file to the backend a few rows at a time; no tensor is held whole on the host. Tensor
//! names here are GGUF's; a checkpoint with other names translates.

use std::collections::HashSet;

use crate::backend::{Backend, LoadError, WeightSpec};
use crate::model::config::Family;
use crate::model::{Checkpoint, ModelConfig};
use crate::tensor::{Tensor, Weight, WeightFormat};

/// A model's weights on a device, in the order of use.
pub struct Weights {
    pub embed: Weight,
    pub layers: Vec<Layer>,
    /// f32 (1, dim)
    pub final_norm: Tensor,
    /// (vocab, dim); the embedding again where the two are tied.
    pub output: Weight,
}

pub struct Layer {
    /// f32 (1, dim)
    pub attn_norm: Tensor,
    /// (num_heads * head_dim, dim)
    pub q: Weight,
    /// (num_kv_heads * head_dim, dim)
    pub k: Weight,
    /// (num_kv_heads * head_dim, dim)
    pub v: Weight,
    /// f32 (1, N of each); Qwen 2.
    pub q_bias: Option<Tensor>,
    pub k_bias: Option<Tensor>,
    pub v_bias: Option<Tensor>,
    /// f32 (1, head_dim); Qwen 3 and Gemma 3.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
    /// (dim, num_heads * head_dim)
    pub attn_output: Weight,
    /// f32 (1, dim); Gemma 3.
    pub post_attn_norm: Option<Tensor>,
    /// f32 (1, dim)
    pub ffn_norm: Tensor,
    /// (ffn_dim, dim)
    pub gate: Weight,
    pub up: Weight,
    /// (dim, ffn_dim)
    pub down: Weight,
    /// f32 (1, dim); Gemma 3.
    pub post_ffn_norm: Option<Tensor>,
}

impl Weights {
    /// Bytes that the weights would take on `backend`, without loading them.
    pub fn size_bytes(config: &ModelConfig, checkpoint: &Checkpoint, backend: &dyn Backend) -> u64 {
        let matrices = checkpoint.matrices(config);
        matrices.iter().map(|spec| backend.weight_bytes(spec)).sum()
    }

    /// Each format of a matrix, once.
    pub fn formats(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<WeightFormat> {
        let matrices = checkpoint.matrices(config);
        let used = |format: &WeightFormat| matrices.iter().any(|spec| spec.format == *format);
        WeightFormat::ALL.into_iter().filter(used).collect()
    }

    pub fn load(
        config: &ModelConfig,
        checkpoint: &mut Checkpoint,
        backend: &mut dyn Backend,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Weights, LoadError> {
        let mut loader = Loader { checkpoint, backend, progress, read_bytes: 0, used: HashSet::new() };
        let embed = loader.linear("token_embd.weight", config.vocab_size, config.dim)?;
        let layers = (0..config.num_layers).map(|layer| loader.layer(config, layer)).collect::<Result<_, _>>()?;
        let final_norm = loader.vector("output_norm.weight", config.dim)?;
        let output = match loader.checkpoint.contains("output.weight") {
            true => loader.linear("output.weight", config.vocab_size, config.dim)?,
            false => embed,
        };
        loader.checkpoint.refuse_others(&loader.used)?;
        Ok(Weights { embed, layers, final_norm, output })
    }
}

struct Loader<'a> {
    checkpoint: &'a mut Checkpoint,
    backend: &'a mut dyn Backend,
    progress: &'a mut dyn FnMut(u64),
    read_bytes: u64,
    /// Names of the tensors that have been asked for.
    used: HashSet<String>,
}

impl Loader<'_> {
    fn layer(&mut self, config: &ModelConfig, layer: u32) -> Result<Layer, LoadError> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let q_dim = config.num_heads * config.head_dim;
        let kv_dim = config.num_kv_heads * config.head_dim;
        // A family's own parts must be there: without them the numbers would be wrong.
        let has_biases = config.family == Family::Qwen2;
        let has_head_norms = matches!(config.family, Family::Qwen3 | Family::Gemma3);
        let has_post_norms = config.family == Family::Gemma3;
        Ok(Layer {
            attn_norm: self.vector(&name("attn_norm.weight"), config.dim)?,
            q: self.linear(&name("attn_q.weight"), q_dim, config.dim)?,
            k: self.linear(&name("attn_k.weight"), kv_dim, config.dim)?,
            v: self.linear(&name("attn_v.weight"), kv_dim, config.dim)?,
            q_bias: self.vector_if(has_biases, &name("attn_q.bias"), q_dim)?,
            k_bias: self.vector_if(has_biases, &name("attn_k.bias"), kv_dim)?,
            v_bias: self.vector_if(has_biases, &name("attn_v.bias"), kv_dim)?,
            q_norm: self.vector_if(has_head_norms, &name("attn_q_norm.weight"), config.head_dim)?,
            k_norm: self.vector_if(has_head_norms, &name("attn_k_norm.weight"), config.head_dim)?,
            attn_output: self.linear(&name("attn_output.weight"), config.dim, q_dim)?,
            post_attn_norm: self.vector_if(has_post_norms, &name("post_attention_norm.weight"), config.dim)?,
            ffn_norm: self.vector(&name("ffn_norm.weight"), config.dim)?,
            gate: self.linear(&name("ffn_gate.weight"), config.ffn_dim, config.dim)?,
            up: self.linear(&name("ffn_up.weight"), config.ffn_dim, config.dim)?,
            down: self.linear(&name("ffn_down.weight"), config.dim, config.ffn_dim)?,
            post_ffn_norm: self.vector_if(has_post_norms, &name("post_ffw_norm.weight"), config.dim)?,
        })
    }

    fn linear(&mut self, name: &str, rows: u32, cols: u32) -> Result<Weight, LoadError> {
        self.used.insert(name.to_owned());
        let (format, mut source) = self.checkpoint.open(name, rows, cols)?;
        let spec = WeightSpec { name: name.to_owned(), rows, cols, format };
        let weight = self.backend.load_weight(&spec, source.as_mut())?;
        self.read_bytes += u64::from(rows) * format.row_bytes(cols);
        (self.progress)(self.read_bytes);
        Ok(weight)
    }

    /// A vector that must be there, or may be.
    fn vector_if(&mut self, required: bool, name: &str, cols: u32) -> Result<Option<Tensor>, LoadError> {
        (required || self.checkpoint.contains(name)).then(|| self.vector(name, cols)).transpose()
    }

    fn vector(&mut self, name: &str, cols: u32) -> Result<Tensor, LoadError> {
        self.used.insert(name.to_owned());
        let values = self.checkpoint.read_vector(name, cols)?;
        let buffer = self.backend.alloc(name, u64::from(cols) * 4)?;
        self.backend.write(buffer, 0, bytemuck::cast_slice(&values))?;
        Ok(Tensor::f32(buffer, 1, cols))
    }
}
