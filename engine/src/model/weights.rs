//! From a checkpoint to device memory: the table of tensor names, and the loader.
//!
//! Invariant: bytes go from the file to the backend a few rows at a time; no tensor is held whole on the host. Tensor
//! names here are GGUF's; a checkpoint with other names translates.

use std::collections::{HashSet, VecDeque};
use std::io;

use crate::backend::{Backend, LoadError, Place, RowSource, WeightSpec};
use crate::model::checkpoint::ENDS;
use crate::model::config::Family;
use crate::model::{Checkpoint, ModelConfig};
use crate::tensor::{Tensor, Weight, WeightFormat};
use crate::tuning::MatMulShape;

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
    /// ((num_heads + 2 * num_kv_heads) * head_dim, dim), with biases in Qwen 2.
    pub qkv: Linear,
    /// f32 (2, head_dim): of q, of k; Qwen 3 and Gemma 3.
    pub head_norms: Option<Tensor>,
    /// (dim, num_heads * head_dim)
    pub attn_output: Linear,
    /// f32 (1, dim); Gemma 3.
    pub post_attn_norm: Option<Tensor>,
    /// f32 (1, dim)
    pub ffn_norm: Tensor,
    /// (2 * ffn_dim, dim)
    pub gate_up: Linear,
    /// (dim, ffn_dim)
    pub down: Linear,
    /// f32 (1, dim); Gemma 3.
    pub post_ffn_norm: Option<Tensor>,
}

/// One matrix, or a few of different formats, whose products lie side by side in this order.
pub struct Linear(pub Vec<Part>);

#[derive(Clone, Copy)]
pub struct Part {
    /// (N, K)
    pub weight: Weight,
    /// f32 (1, N)
    pub bias: Option<Tensor>,
}

/// Matrices of the file that are multiplied with the same input.
struct Matrices {
    cols: u32,
    /// Name without layer and `.weight`, and rows.
    parts: Vec<(&'static str, u32)>,
    /// Whether they must have biases; `None` if they cannot.
    biases: Option<bool>,
}

/// A layer's: q, k and v; their output; gate and up; down.
fn matrices(config: &ModelConfig) -> [Matrices; 4] {
    let (dim, ffn_dim) = (config.dim, config.ffn_dim);
    let (q_dim, kv_dim) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let of = |cols, parts: &[(&'static str, u32)]| Matrices { cols, parts: parts.to_vec(), biases: None };
    // A family's own parts must be there: without them the numbers would be wrong.
    let biases = Some(config.family == Family::Qwen2);
    [
        Matrices { biases, ..of(dim, &[("attn_q", q_dim), ("attn_k", kv_dim), ("attn_v", kv_dim)]) },
        of(q_dim, &[("attn_output", dim)]),
        of(dim, &[("ffn_gate", ffn_dim), ("ffn_up", ffn_dim)]),
        of(ffn_dim, &[("ffn_down", dim)]),
    ]
}

impl Matrices {
    fn names(&self, layer: u32) -> impl Iterator<Item = (String, u32)> + use<> {
        self.parts.clone().into_iter().map(move |(part, rows)| (format!("blk.{layer}.{part}.weight"), rows))
    }
}

/// Matrices of one width and format, one below the other.
fn stacked(specs: &[WeightSpec]) -> WeightSpec {
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let rows = specs.iter().map(|spec| spec.rows).sum();
    WeightSpec { name: names.join(" + "), rows, ..specs[0].clone() }
}

/// A matrix, if it is there.
fn spec(checkpoint: &Checkpoint, name: &str, rows: u32, cols: u32) -> Option<WeightSpec> {
    let format = checkpoint.format(name)?;
    Some(WeightSpec { name: name.to_owned(), rows, cols, format })
}

impl Weights {
    /// Every matrix as it is handed to a backend, in the order of loading.
    fn specs(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<WeightSpec> {
        let layers = (0..config.num_layers).flat_map(|layer| Self::layer_specs(config, checkpoint, layer));
        layers.chain(ENDS.into_iter().filter_map(|name| Self::end_spec(config, checkpoint, name))).collect()
    }

    fn layer_specs(config: &ModelConfig, checkpoint: &Checkpoint, layer: u32) -> Vec<WeightSpec> {
        let of = |matrices: Matrices| {
            let names = matrices.names(layer).map(|(name, rows)| (name, rows, matrices.cols));
            let specs: Vec<WeightSpec> =
                names.filter_map(|(name, rows, cols)| spec(checkpoint, &name, rows, cols)).collect();
            specs.chunk_by(|one, next| one.format == next.format).map(stacked).collect::<Vec<WeightSpec>>()
        };
        matrices(config).into_iter().flat_map(of).collect()
    }

    fn end_spec(config: &ModelConfig, checkpoint: &Checkpoint, name: &str) -> Option<WeightSpec> {
        spec(checkpoint, name, config.vocab_size, config.dim)
    }

    /// Bytes that the weights would take on `backend`, without loading them, with what products take beside them.
    pub fn size_bytes(config: &ModelConfig, checkpoint: &Checkpoint, backend: &dyn Backend) -> u64 {
        let weights: u64 = Self::specs(config, checkpoint).iter().map(|spec| backend.weight_bytes(spec)).sum();
        weights + backend.beside_weights_bytes(Self::max_cols(config, checkpoint))
    }

    /// Columns of the widest.
    pub fn max_cols(config: &ModelConfig, checkpoint: &Checkpoint) -> u32 {
        Self::specs(config, checkpoint).iter().map(|spec| spec.cols).max().unwrap_or(0)
    }

    /// The same of a layer alone.
    pub fn layer_bytes(config: &ModelConfig, checkpoint: &Checkpoint, layer: u32, backend: &dyn Backend) -> u64 {
        Self::layer_specs(config, checkpoint, layer).iter().map(|spec| backend.weight_bytes(spec)).sum()
    }

    /// The same of the embedding, and of the output layer where that is on another device.
    pub fn end_bytes(config: &ModelConfig, checkpoint: &Checkpoint, backend: &dyn Backend) -> [u64; 2] {
        let [embed, output] = ENDS.map(|name| Self::end_spec(config, checkpoint, name));
        let output = output.or_else(|| embed.clone());
        [embed, output].map(|spec| spec.map_or(0, |spec| backend.weight_bytes(&spec)))
    }

    /// Each shape of a matrix that is multiplied by, once.
    pub fn mat_mul_shapes(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<MatMulShape> {
        let mut shapes = Vec::new();
        for WeightSpec { format, rows, cols, .. } in Self::specs(config, checkpoint) {
            let shape = MatMulShape { format, rows, cols };
            if !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
        shapes
    }

    /// What a step multiplies by: each matrix of the layers, and the output layer's; `None` without the latter.
    pub fn products(config: &ModelConfig, checkpoint: &Checkpoint) -> Option<(Vec<MatMulShape>, MatMulShape)> {
        let num_ends = ENDS.iter().filter(|name| checkpoint.format(name).is_some()).count();
        let specs = Self::specs(config, checkpoint);
        let shape = |&WeightSpec { format, rows, cols, .. }: &WeightSpec| MatMulShape { format, rows, cols };
        let layers = specs[..specs.len() - num_ends].iter().map(shape).collect();
        specs.last().filter(|_| num_ends > 0).map(|output| (layers, shape(output)))
    }

    /// Bytes that loading reads of matrices, as they are handed to a backend.
    pub fn file_bytes(config: &ModelConfig, checkpoint: &Checkpoint) -> u64 {
        let bytes = |name: &str, rows: u32, cols: u32| {
            checkpoint.format(name).map_or(0, |format| u64::from(rows) * format.row_bytes(cols))
        };
        let of_layer = |layer| {
            let of = |matrices: &Matrices| {
                let parts = matrices.names(layer);
                parts.map(|(name, rows)| bytes(&name, rows, matrices.cols)).sum::<u64>()
            };
            matrices(config).iter().map(of).sum::<u64>()
        };
        let ends: u64 = ENDS.iter().map(|name| bytes(name, config.vocab_size, config.dim)).sum();
        (0..config.num_layers).map(of_layer).sum::<u64>() + ends
    }

    /// Each format of a matrix, once.
    pub fn formats(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<WeightFormat> {
        let of_layer = |layer| matrices(config).into_iter().flat_map(move |matrices| matrices.names(layer));
        let layers = (0..config.num_layers).flat_map(of_layer).map(|(name, _)| name);
        let names = layers.chain(ENDS.map(str::to_owned));
        let used: Vec<WeightFormat> = names.filter_map(|name| checkpoint.format(&name)).collect();
        WeightFormat::ALL.into_iter().filter(|format| used.contains(format)).collect()
    }

    /// The format that most bytes have.
    pub fn main_format(config: &ModelConfig, checkpoint: &Checkpoint) -> WeightFormat {
        let specs = Self::specs(config, checkpoint);
        let bytes = |format: WeightFormat| -> u64 {
            let of_format = specs.iter().filter(|spec| spec.format == format);
            of_format.map(|spec| u64::from(spec.rows) * format.row_bytes(spec.cols)).sum()
        };
        WeightFormat::ALL.into_iter().max_by_key(|&format| bytes(format)).expect("there are formats")
    }

    pub fn load(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        backend: &mut dyn Backend,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Weights, LoadError> {
        let mut loader = Loader { checkpoint, backend, progress, read_bytes: 0, used: HashSet::new() };
        let [embed_name, output_name] = ENDS;
        loader.backend.place(Place::First);
        let embed = loader.matrix(embed_name, config.vocab_size, config.dim)?;
        let layers = (0..config.num_layers).map(|layer| loader.layer(config, layer)).collect::<Result<_, _>>()?;
        loader.backend.place(Place::Last);
        let final_norm = loader.vector("output_norm.weight", config.dim)?;
        let output = match loader.checkpoint.contains(output_name) {
            true => loader.matrix(output_name, config.vocab_size, config.dim)?,
            false if loader.backend.are_ends_apart() => loader.matrix(embed_name, config.vocab_size, config.dim)?,
            false => embed,
        };
        loader.checkpoint.refuse_others(&loader.used)?;
        Ok(Weights { embed, layers, final_norm, output })
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    backend: &'a mut dyn Backend,
    progress: &'a mut dyn FnMut(u64),
    read_bytes: u64,
    /// Names of the tensors that have been asked for.
    used: HashSet<String>,
}

impl Loader<'_> {
    fn layer(&mut self, config: &ModelConfig, layer: u32) -> Result<Layer, LoadError> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let [qkv, attn_output, gate_up, down] = matrices(config);
        let has_head_norms = matches!(config.family, Family::Qwen3 | Family::Gemma3);
        let has_post_norms = config.family == Family::Gemma3;
        let head_norms = ["attn_q_norm.weight", "attn_k_norm.weight"].map(name);
        self.backend.place(Place::Layer(layer));
        let attn_norm = self.vector(&name("attn_norm.weight"), config.dim)?;
        let qkv = self.linear(layer, &qkv)?;
        let head_norms = self.vectors_if(has_head_norms, &head_norms, config.head_dim)?;
        let attn_output = self.linear(layer, &attn_output)?;
        let post_attn_norm = self.vectors_if(has_post_norms, &[name("post_attention_norm.weight")], config.dim)?;
        let ffn_norm = self.vector(&name("ffn_norm.weight"), config.dim)?;
        let gate_up = self.linear(layer, &gate_up)?;
        let down = self.linear(layer, &down)?;
        // It ends the layer in the op that begins what comes next.
        self.backend.place(if layer + 1 < config.num_layers { Place::Layer(layer + 1) } else { Place::Last });
        let post_ffn_norm = self.vectors_if(has_post_norms, &[name("post_ffw_norm.weight")], config.dim)?;
        Ok(Layer { attn_norm, qkv, head_norms, attn_output, post_attn_norm, ffn_norm, gate_up, down, post_ffn_norm })
    }

    /// Neighbours of one format become one matrix, as `Weights::size_bytes` counts them.
    fn linear(&mut self, layer: u32, matrices: &Matrices) -> Result<Linear, LoadError> {
        let mut opened: Vec<(WeightSpec, Box<dyn RowSource>)> = Vec::new();
        for (name, rows) in matrices.names(layer) {
            opened.push(self.open(&name, rows, matrices.cols)?);
        }
        let mut parts = Vec::new();
        while !opened.is_empty() {
            let format = opened[0].0.format;
            let len = opened.iter().take_while(|(spec, _)| spec.format == format).count();
            let (specs, sources): (Vec<WeightSpec>, Vec<_>) = opened.drain(..len).unzip();
            let sizes = specs.iter().map(|spec| u64::from(spec.rows) * spec.format.row_bytes(spec.cols));
            let mut source = StackedRows(sizes.zip(sources).collect());
            let weight = self.load(&stacked(&specs), &mut source)?;
            let bias = matrices.biases.map(|required| self.bias(required, &specs)).transpose()?.flatten();
            parts.push(Part { weight, bias });
        }
        Ok(Linear(parts))
    }

    /// The biases of matrices that are one now; those that a file leaves out are zero.
    fn bias(&mut self, required: bool, specs: &[WeightSpec]) -> Result<Option<Tensor>, LoadError> {
        let names: Vec<String> = specs.iter().map(|spec| spec.name.replace(".weight", ".bias")).collect();
        if !required && !names.iter().any(|name| self.checkpoint.contains(name)) {
            return Ok(None);
        }
        let mut values = Vec::new();
        for (name, spec) in names.iter().zip(specs) {
            match required || self.checkpoint.contains(name) {
                true => values.extend(self.read_vector(name, spec.rows)?),
                false => values.resize(values.len() + spec.rows as usize, 0.0),
            }
        }
        Ok(Some(self.tensor(&names.join(" + "), 1, &values)?))
    }

    fn matrix(&mut self, name: &str, rows: u32, cols: u32) -> Result<Weight, LoadError> {
        let (spec, mut source) = self.open(name, rows, cols)?;
        self.load(&spec, source.as_mut())
    }

    fn open(&mut self, name: &str, rows: u32, cols: u32) -> Result<(WeightSpec, Box<dyn RowSource>), LoadError> {
        self.used.insert(name.to_owned());
        let (format, source) = self.checkpoint.open(name, rows, cols)?;
        Ok((WeightSpec { name: name.to_owned(), rows, cols, format }, source))
    }

    fn load(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        let weight = self.backend.load_weight(spec, source)?;
        self.read_bytes += u64::from(spec.rows) * spec.format.row_bytes(spec.cols);
        (self.progress)(self.read_bytes);
        Ok(weight)
    }

    /// Vectors that must be there, or may be, as rows.
    fn vectors_if(&mut self, required: bool, names: &[String], cols: u32) -> Result<Option<Tensor>, LoadError> {
        if !required && !names.iter().any(|name| self.checkpoint.contains(name)) {
            return Ok(None);
        }
        let mut values = Vec::new();
        for name in names {
            values.extend(self.read_vector(name, cols)?);
        }
        Ok(Some(self.tensor(&names.join(" + "), names.len() as u32, &values)?))
    }

    fn vector(&mut self, name: &str, cols: u32) -> Result<Tensor, LoadError> {
        let values = self.read_vector(name, cols)?;
        self.tensor(name, 1, &values)
    }

    fn read_vector(&mut self, name: &str, cols: u32) -> Result<Vec<f32>, LoadError> {
        self.used.insert(name.to_owned());
        self.checkpoint.read_vector(name, cols)
    }

    fn tensor(&mut self, label: &str, rows: u32, values: &[f32]) -> Result<Tensor, LoadError> {
        let buffer = self.backend.alloc(label, values.len() as u64 * 4)?;
        self.backend.write(buffer, 0, bytemuck::cast_slice(values))?;
        Ok(Tensor::f32(buffer, rows, values.len() as u32 / rows))
    }
}

/// The rows of matrices one below the other, with the bytes that are left of each.
struct StackedRows(VecDeque<(u64, Box<dyn RowSource>)>);

impl RowSource for StackedRows {
    fn read_rows(&mut self, mut out: &mut [u8]) -> io::Result<()> {
        while let Some((left_bytes, source)) = self.0.front_mut().filter(|_| !out.is_empty()) {
            let len = usize::try_from(*left_bytes).unwrap_or(usize::MAX).min(out.len());
            let (now, later) = std::mem::take(&mut out).split_at_mut(len);
            source.read_rows(now)?;
            *left_bytes -= len as u64;
            if *left_bytes == 0 {
                self.0.pop_front();
            }
            out = later;
        }
        assert!(out.is_empty(), "{} bytes beyond the last row", out.len());
        Ok(())
    }
}
