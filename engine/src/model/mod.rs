//! A model on a device: config, weights and state. It emits ops and runs none.
//!
//! Invariant: this folder never mentions a scheduler, and uses a backend only to allocate while loading.

use std::ops::Range;

use crate::backend::{Backend, DeviceError, LoadError, Needs, Place};
use crate::batch::attention::{AttentionLimits, AttentionPlan, MAX_SPLIT_ITEMS};
use crate::batch::{BlockCopy, PackedBatch};
use crate::op::{ATTENTION_ITEM_WORDS, ATTENTION_MERGE_WORDS, CHOSEN_WORDS, MAX_BIASES, MAX_TOP, SAMPLE_ROW_WORDS};
use crate::recording::Recording;
use crate::tensor::{BufferId, KvTensor, KvType, Tensor};

mod checkpoint;
pub mod config;
mod config_gguf;
mod config_json;
mod llama;
mod portable;
mod shapes;
mod swap;
pub mod weights;

pub use checkpoint::Checkpoint;
pub use config::{Family, ModelConfig, ModelConfigError, UnfitKvType};
use llama::Scratch;
pub use portable::{KvLayout, PortableBlocks};
pub use shapes::shape_names;
use swap::SwapArena;
pub use weights::Weights;

/// What bounds the state of a model on a device; all of it is allocated at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateLimits {
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    /// Rows of a step that go through the output layer.
    pub max_logit_rows: u32,
    pub max_model_len: u32,
    pub kv_type: KvType,
    pub block_size: u32,
    pub num_blocks: u32,
    /// Blocks in the host's memory that others can be swapped to; 0 for none.
    pub num_host_blocks: u32,
}

impl StateLimits {
    pub fn max_blocks_per_seq(&self) -> u32 {
        self.max_model_len.div_ceil(self.block_size)
    }

    /// Words of a step's upload, at most: the sum of `PackedBatch`'s vectors at their limits.
    pub fn max_upload_words(&self, vocab_size: u32) -> u64 {
        let [tokens, seqs, logit_rows] =
            [self.max_num_batched_tokens, self.max_num_seqs, self.max_logit_rows].map(u64::from);
        let ids_positions_slots = 3 * tokens;
        // A model's layers have no window, or one: two lists at most.
        let items = u64::from(ATTENTION_ITEM_WORDS) * (tokens + u64::from(MAX_SPLIT_ITEMS));
        let attention = 2 * (items + u64::from(ATTENTION_MERGE_WORDS) * seqs.min(u64::from(MAX_SPLIT_ITEMS)));
        let new_blocks = tokens.div_ceil(u64::from(self.block_size)) + seqs;
        // A sequence admitted on a prefix hit writes its whole row of the table.
        let table_updates = 2 * (new_blocks + seqs * u64::from(self.max_blocks_per_seq()));
        // The scheduler admits no more in one step.
        let known_tokens = u64::from(self.max_model_len);
        let resets = 4 * seqs;
        let sample_rows = u64::from(SAMPLE_ROW_WORDS) * logit_rows;
        // A sequence chooses from one row of a step.
        let extras = seqs * (u64::from(2 * MAX_BIASES + vocab_size.div_ceil(32)));
        ids_positions_slots + attention + table_updates + known_tokens + resets + logit_rows + sample_rows + extras
    }
}

/// Bytes of a model's state on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    pub kv: u64,
    /// Activations of a step.
    pub scratch: u64,
    /// Block table, rope tables, upload, sampled ids, token counts.
    pub tables: u64,
    /// Swapped blocks, in the host's memory.
    pub swap: u64,
}

pub struct Model {
    pub config: ModelConfig,
    pub limits: StateLimits,
    /// What a step's attention is planned by.
    pub attention: AttentionLimits,
    weights: Weights,
    scratch: Scratch,
    /// One a layer.
    kv: Vec<KvTensor>,
    swap: Option<SwapArena>,
    /// f32 (max_model_len, rotary_dim)
    rope_table: Tensor,
    local_rope_table: Option<Tensor>,
    /// u32 (max_num_seqs, max_blocks_per_seq)
    block_table: Tensor,
    /// u32 (max_num_seqs, 1): what each slot sampled last.
    sampled: Tensor,
    /// u32 (max_num_seqs, vocab): each slot's known tokens, for penalties.
    counts: Tensor,
    upload_buffer: BufferId,
}

/// A packed batch as tensors of a recording's upload.
pub struct Inputs {
    ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    /// By window.
    attention: Vec<AttentionInputs>,
    table_updates: Option<Tensor>,
    logit_rows: Option<Tensor>,
    /// Resets and known tokens.
    resets: Option<(Tensor, Tensor)>,
    sampling: SamplingInputs,
}

/// What is asked of each logit row, as tensors of a recording's upload.
#[derive(Clone, Copy)]
pub struct SamplingInputs {
    rows: Tensor,
    extras: Tensor,
}

impl SamplingInputs {
    /// Appends that part of `batch` to the recording's upload.
    pub fn upload(batch: &PackedBatch, recording: &mut Recording) -> SamplingInputs {
        let rows = recording.upload(bytemuck::cast_slice(&batch.sample_rows), SAMPLE_ROW_WORDS);
        SamplingInputs { rows, extras: recording.upload(&batch.extras, 1) }
    }
}

/// An attention plan as tensors.
#[derive(Clone, Copy)]
struct AttentionInputs {
    items: Tensor,
    num_single_rows: u32,
    merges: Tensor,
}

/// Where a step's choices lie, one row a logit row.
#[derive(Clone, Copy, Debug)]
pub struct Choices {
    /// u32 (logit rows, `CHOSEN_WORDS`)
    pub chosen: Tensor,
    /// u32 (logit rows, 2 * `MAX_TOP`)
    pub top: Tensor,
    /// f32 (logit rows, dim): what the output layer was given.
    pub hidden: Tensor,
}

impl Inputs {
    /// Appends `batch` to the recording's upload. It may come without sample rows, for [`Model::record_logits`] alone.
    pub fn upload(batch: &PackedBatch, recording: &mut Recording) -> Inputs {
        let non_empty = |tensor: Tensor| (tensor.rows > 0).then_some(tensor);
        let plan = |plan: &AttentionPlan, recording: &mut Recording| AttentionInputs {
            items: recording.upload(&plan.items, ATTENTION_ITEM_WORDS),
            num_single_rows: plan.num_single_rows,
            merges: recording.upload(&plan.merges, ATTENTION_MERGE_WORDS),
        };
        // What a batch of that size always has goes first: its places are then those of the step before.
        let [ids, positions, slots] =
            [&batch.ids, &batch.positions, &batch.slots].map(|words| recording.upload(words, 1));
        let logit_rows = non_empty(recording.upload(&batch.logit_rows, 1));
        let sampling = SamplingInputs::upload(batch, recording);
        let attention = batch.attention.iter().map(|of| plan(of, recording)).collect();
        let table_updates = non_empty(recording.upload(&batch.table_updates, 2));
        let resets = non_empty(recording.upload(&batch.resets, 4))
            .map(|resets| (resets, recording.upload(&batch.known_tokens, 1)));
        Inputs { ids, positions, slots, attention, table_updates, logit_rows, resets, sampling }
    }
}

impl Model {
    /// Loads weights and allocates all state. Progress is reported in bytes read so far.
    pub fn load(
        config: ModelConfig,
        limits: StateLimits,
        checkpoint: &Checkpoint,
        backend: &mut dyn Backend,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Model, LoadError> {
        backend.prepare(&needs(&config, &limits, checkpoint, backend))?;
        let weights = Weights::load(&config, checkpoint, backend, progress)?;
        backend.place(Place::Throughout);
        let rope_table = rope_table(&config.rope, limits.max_model_len, backend)?;
        let local_rope_table = match &config.local_rope {
            Some(rope) => Some(self::rope_table(rope, limits.max_model_len, backend)?),
            None => None,
        };
        let scratch = Scratch::alloc(&config, &limits, backend)?;
        let kv = alloc_kv(&config, &limits, backend)?;
        let swap = SwapArena::alloc(&config, &limits, &kv, backend)?;
        let table_cols = limits.max_blocks_per_seq();
        backend.place(Place::Throughout);
        let block_table = alloc_u32("block table", limits.max_num_seqs, table_cols, backend)?;
        backend.place(Place::Choices);
        let sampled = alloc_u32("sampled", limits.max_num_seqs, 1, backend)?;
        backend.place(Place::Last);
        let counts = alloc_u32("token counts", limits.max_num_seqs, config.vocab_size, backend)?;
        let attention = attention_limits(&config, &limits);
        backend.place(Place::Inputs);
        let upload_buffer = backend.alloc("step upload", limits.max_upload_words(config.vocab_size) * 4)?;
        Ok(Model {
            config,
            limits,
            attention,
            weights,
            scratch,
            kv,
            swap,
            rope_table,
            local_rope_table,
            block_table,
            sampled,
            counts,
            upload_buffer,
        })
    }

    /// Bytes that `load` would allocate beside the weights.
    pub fn footprint(config: &ModelConfig, limits: &StateLimits) -> Footprint {
        let words = |rows: u32, cols: u32| u64::from(rows) * u64::from(cols) * 4;
        let ropes = std::iter::once(&config.rope).chain(&config.local_rope);
        let rope_tables: u64 = ropes.map(|rope| words(limits.max_model_len, rope.rotary_dim)).sum();
        let slots = words(limits.max_num_seqs, limits.max_blocks_per_seq() + 1 + config.vocab_size);
        Footprint {
            kv: u64::from(limits.num_blocks) * u64::from(limits.block_size) * config.kv_bytes_per_token(limits.kv_type),
            scratch: Scratch::size_bytes(config, limits),
            tables: rope_tables + slots + limits.max_upload_words(config.vocab_size) * 4,
            swap: SwapArena::size_bytes(config, limits),
        }
    }

    /// The same of a stage that has some of the layers, where the model is split.
    pub fn footprint_of_stage(config: &ModelConfig, limits: &StateLimits, layers: &Range<u32>) -> Footprint {
        let words = |rows: u32, cols: u32| u64::from(rows) * u64::from(cols) * 4;
        let of_layers = ModelConfig { num_layers: layers.end - layers.start, ..config.clone() };
        let Footprint { kv, mut scratch, mut tables, swap } = Model::footprint(&of_layers, limits);
        let (is_first, is_last) = (layers.start == 0, layers.end == config.num_layers);
        if !is_last {
            scratch -= Scratch::last_bytes(config, limits);
            tables -= words(limits.max_num_seqs, config.vocab_size);
        }
        // In its upload too: what a stage is handed.
        tables += match is_first {
            true => words(limits.max_num_seqs, 1),
            false => 2 * words(limits.max_num_batched_tokens, config.dim),
        };
        if !is_first && !is_last {
            tables -= words(limits.max_num_seqs, 1);
        }
        Footprint { kv, scratch, tables, swap }
    }

    /// An empty recording whose upload goes to this model's step buffer.
    pub fn recording(&self) -> Recording {
        Recording::new(self.upload_buffer)
    }

    /// Blocks that can be swapped to the host: as many as the limits say, or none where the device cannot.
    pub fn num_host_blocks(&self) -> u32 {
        self.swap.as_ref().map_or(0, SwapArena::num_blocks)
    }

    /// Appends copies between the cache and the host's memory, all layers of each block.
    pub fn record_copies(&self, copies: &[BlockCopy], recording: &mut Recording) {
        if let Some(swap) = &self.swap {
            swap.record(copies, &self.kv, recording);
        } else {
            assert!(copies.is_empty(), "nothing can be swapped here: {copies:?}");
        }
    }

    /// u32 (max_num_seqs, 1): what each slot sampled last.
    pub fn sampled(&self) -> Tensor {
        self.sampled
    }
}

fn needs(config: &ModelConfig, limits: &StateLimits, checkpoint: &Checkpoint, backend: &dyn Backend) -> Needs {
    let Footprint { kv, scratch, tables, .. } = Model::footprint(config, limits);
    Needs {
        weights_bytes: Weights::size_bytes(config, checkpoint, backend),
        weight_cols: Weights::max_cols(config, checkpoint),
        buffers_bytes: kv + scratch + tables,
        upload_bytes: limits.max_upload_words(config.vocab_size) * 4,
        download_bytes: u64::from(limits.max_logit_rows) * u64::from(CHOSEN_WORDS + 2 * MAX_TOP) * 4,
        kv_type: limits.kv_type,
        head_dim: config.head_dim,
    }
}

fn attention_limits(config: &ModelConfig, limits: &StateLimits) -> AttentionLimits {
    let mut windows: Vec<u32> = config.windows.iter().map(|window| window.unwrap_or(0)).collect();
    windows.sort_unstable();
    windows.dedup();
    assert!(windows.len() <= 2, "room for the plans of two windows: {windows:?}");
    let num_partials = AttentionLimits::num_partials(limits.max_model_len, limits.max_num_seqs);
    AttentionLimits { windows, num_kv_heads: config.num_kv_heads, num_partials }
}

fn alloc_kv(
    config: &ModelConfig,
    limits: &StateLimits,
    backend: &mut dyn Backend,
) -> Result<Vec<KvTensor>, DeviceError> {
    let StateLimits { kv_type, block_size, .. } = *limits;
    let block_bytes = KvTensor::block_bytes(kv_type, block_size, config.num_kv_heads, config.head_dim);
    let size_bytes = u64::from(limits.num_blocks) * block_bytes;
    (0..config.num_layers)
        .map(|layer| {
            backend.place(Place::Layer(layer));
            Ok(KvTensor {
                k: backend.alloc("K cache", size_bytes)?,
                v: backend.alloc("V cache", size_bytes)?,
                kv_type,
                num_blocks: limits.num_blocks,
                block_size,
                num_kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
            })
        })
        .collect()
}

/// f32 (max_model_len, rotary_dim): cosines, then sines. Angles are computed in f64, because f32 loses them at large
/// positions.
fn rope_table(rope: &config::RopeConfig, max_model_len: u32, backend: &mut dyn Backend) -> Result<Tensor, DeviceError> {
    let frequencies = rope.frequencies();
    let mut table = Vec::with_capacity((max_model_len * rope.rotary_dim) as usize);
    for position in 0..max_model_len {
        let angles = frequencies.iter().map(|frequency| f64::from(position) * frequency);
        table.extend(angles.clone().map(|angle| angle.cos() as f32));
        table.extend(angles.map(|angle| angle.sin() as f32));
    }
    let buffer = backend.alloc("rope table", table.len() as u64 * 4)?;
    backend.write(buffer, 0, bytemuck::cast_slice(&table))?;
    Ok(Tensor::f32(buffer, max_model_len, rope.rotary_dim))
}

fn alloc_f32(label: &str, rows: u32, cols: u32, backend: &mut dyn Backend) -> Result<Tensor, DeviceError> {
    let buffer = backend.alloc(label, u64::from(rows) * u64::from(cols) * 4)?;
    Ok(Tensor::f32(buffer, rows, cols))
}

fn alloc_u32(label: &str, rows: u32, cols: u32, backend: &mut dyn Backend) -> Result<Tensor, DeviceError> {
    let buffer = backend.alloc(label, u64::from(rows) * u64::from(cols) * 4)?;
    Ok(Tensor::u32(buffer, rows, cols))
}
