//! What a layer of a model takes on a device, tried before the model is loaded: layers like its own, of random weights.
//!
//! Invariant: nothing of it stays on the device.

use std::time::Duration;

use super::step::record_forward;
use crate::backend::{Backend, LoadError};
use crate::batch::{Batch, InputToken, Logits, PackedBatch, SequenceId, Slice, SlotId};
use crate::model::{Checkpoint, Model, ModelConfig, StateLimits};
use crate::request::TokenId;
use crate::tensor::{KvType, WeightFormat};

/// Sequences of the step that is tried, each with a token.
pub const NUM_ROWS: u32 = 16;
/// Layers that are tried together, so that what a step takes beside them is little.
pub const NUM_LAYERS: u32 = 4;
/// Times that it is tried, after one that is not counted.
const NUM_TRIES: u32 = 3;

/// What one layer of `config`, with weights of `format`, takes of a step of [`NUM_ROWS`] answers on `backend`, which is
/// opened anew.
pub fn layer_time(
    config: &ModelConfig,
    format: WeightFormat,
    backend: &mut dyn Backend,
) -> Result<Duration, LoadError> {
    let (num_layers, vocab_size) = (NUM_LAYERS, 256);
    let windows = vec![None; num_layers as usize];
    let config = ModelConfig { num_layers, vocab_size, windows, local_rope: None, ..config.clone() };
    let limits = StateLimits {
        max_num_seqs: NUM_ROWS,
        max_num_batched_tokens: NUM_ROWS,
        max_logit_rows: NUM_ROWS,
        max_model_len: 32,
        kv_type: KvType::F16,
        block_size: 32,
        num_blocks: NUM_ROWS,
        num_host_blocks: 0,
    };
    let checkpoint = Checkpoint::Random { seed: 1, format };
    let model = Model::load(config, limits, &checkpoint, backend, &mut |_| {})?;
    let (batch, mut packed, mut recording) = (answers(), PackedBatch::default(), model.recording());
    let mut least = Duration::MAX;
    for nth in 0..=NUM_TRIES {
        record_forward(&batch, &model, &mut packed, &mut recording);
        let begun = backend.now();
        let ticket = backend.submit(&recording)?;
        backend.wait(ticket, &mut Vec::new())?;
        if nth > 0 {
            least = least.min(backend.now() - begun);
        }
    }
    backend.reopen()?;
    Ok(least / num_layers)
}

/// A first token of each sequence, whose logits nobody asks for.
fn answers() -> Batch {
    let slice = |row| Slice {
        sequence: SequenceId(u64::from(row)),
        slot: SlotId(row),
        start: 0,
        tokens: row..row + 1,
        logits: Logits::None,
        sample: false,
        logprobs: None,
        num_targets: 0,
        prompt_logprobs: 0,
        pooled: false,
    };
    Batch {
        slices: (0..NUM_ROWS).map(slice).collect(),
        input: vec![InputToken::Id(TokenId(0)); NUM_ROWS as usize],
        slot_mapping: (0..NUM_ROWS).map(|row| row * 32).collect(),
        table_updates: (0..NUM_ROWS).map(|row| (SlotId(row), 0, row)).collect(),
        ..Batch::default()
    }
}
