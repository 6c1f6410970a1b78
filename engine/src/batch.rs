//! One step's plan as plain data: what the plan tower makes and the compute tower consumes.
//!
//! Invariant: decode slices come first; ranges of slices are consecutive and cover all tokens. A batch knows neither
//! memory manager nor device.

use std::ops::Range;

use crate::config::EngineConfig;
use crate::cost::StepShape;
use crate::op::{SAMPLED_BY_SLOT, SampleRow};
use crate::request::TokenId;

pub mod attention;

use attention::{AttentionLimits, AttentionPlan, QueryRows};

/// One growing list of tokens; unique for the life of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// A running sequence's row in the device's block table and in `sampled`; less than `max_num_seqs`, reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// Where an input token comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputToken {
    Id(TokenId),
    /// What this slot sampled last, read on the device.
    Sampled(SlotId),
}

/// Which rows of a slice go through the output layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: the slice ends inside the prompt.
    None,
    /// The last row, to choose the next token.
    Last,
    /// Every row, for prompt logprobs or the mean of hidden states.
    All,
}

/// One sequence's part in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub sequence: SequenceId,
    pub slot: SlotId,
    /// Position of its first token: the sequence's `num_computed_tokens`.
    pub start: u32,
    /// Its tokens, as a range of the batch's flat vectors.
    pub tokens: Range<u32>,
    pub logits: Logits,
    /// Whether a token is chosen from the last row, for the position after the slice.
    pub sample: bool,
    /// Log-probabilities wanted of the chosen token and of this many most likely ones.
    pub logprobs: Option<u32>,
    /// Logit rows, from the first, whose next token is the prompt's; its log-probability is wanted, and those of
    /// `prompt_logprobs` most likely ones.
    pub num_targets: u32,
    pub prompt_logprobs: u32,
    /// Whether the hidden states of its logit rows come back.
    pub pooled: bool,
}

impl Slice {
    pub fn num_tokens(&self) -> u32 {
        self.tokens.end - self.tokens.start
    }

    /// Position after its last token.
    pub fn end(&self) -> u32 {
        self.start + self.num_tokens()
    }

    pub fn num_logit_rows(&self) -> u32 {
        match self.logits {
            Logits::None => 0,
            Logits::Last => 1,
            Logits::All => self.num_tokens(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    ToHost,
    ToDevice,
}

/// A block of the KV cache on its way to the host's memory or back, K and V of all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    pub direction: CopyDirection,
    /// Less than `num_blocks`.
    pub device_block: u32,
    /// Less than what [`Model::num_host_blocks`](crate::model::Model::num_host_blocks) says.
    pub host_block: u32,
}

impl BlockCopy {
    /// Whether both blocks lie just behind those of `other`, in the same direction.
    pub fn follows(&self, other: &BlockCopy) -> bool {
        self.direction == other.direction
            && self.device_block == other.device_block + 1
            && self.host_block == other.host_block + 1
    }
}

/// A slot whose token counts begin anew, because a sequence with penalties has got it in this step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    pub slot: SlotId,
    /// What the sequence holds, prompt first, as a range of `Batch::known_tokens`.
    pub tokens: Range<u32>,
    pub num_prompt_tokens: u32,
}

/// Cleared and refilled each step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub slices: Vec<Slice>,
    pub input: Vec<InputToken>,
    /// Cache slot of every token: `block * block_size + offset`.
    pub slot_mapping: Vec<u32>,
    /// New entries of the device's block table: (slot, index in its row, block id).
    pub table_updates: Vec<(SlotId, u32, u32)>,
    /// Done one after another before anything of this step is computed, and after all that earlier steps computed: a
    /// block may leave here and be overwritten by this step, or come back and be read by it.
    pub copies: Vec<BlockCopy>,
    pub resets: Vec<Reset>,
    /// The tokens of all resets.
    pub known_tokens: Vec<TokenId>,
}

impl Batch {
    /// Room for what a step usually holds; many admissions on long cached prefixes in one step may take more.
    pub fn with_capacity(config: &EngineConfig) -> Batch {
        let EngineConfig { max_num_seqs, max_num_batched_tokens, block_size, max_model_len, .. } = *config;
        let new_blocks = max_num_seqs + max_num_batched_tokens.div_ceil(block_size);
        Batch {
            slices: Vec::with_capacity(max_num_seqs as usize),
            input: Vec::with_capacity(max_num_batched_tokens as usize),
            slot_mapping: Vec::with_capacity(max_num_batched_tokens as usize),
            table_updates: Vec::with_capacity((new_blocks + max_model_len.div_ceil(block_size)) as usize),
            copies: Vec::new(),
            resets: Vec::new(),
            known_tokens: Vec::with_capacity(max_model_len as usize),
        }
    }

    pub fn clear(&mut self) {
        self.slices.clear();
        self.input.clear();
        self.slot_mapping.clear();
        self.table_updates.clear();
        self.copies.clear();
        self.resets.clear();
        self.known_tokens.clear();
    }

    /// Has the token counts of `slot` begin with these tokens.
    pub fn reset(&mut self, slot: SlotId, tokens: &[TokenId], num_prompt_tokens: u32) {
        let begin = self.known_tokens.len() as u32;
        self.known_tokens.extend_from_slice(tokens);
        self.resets.push(Reset { slot, tokens: begin..self.known_tokens.len() as u32, num_prompt_tokens });
    }

    pub fn num_tokens(&self) -> u32 {
        self.input.len() as u32
    }

    pub fn num_logit_rows(&self) -> u32 {
        self.slices.iter().map(Slice::num_logit_rows).sum()
    }

    /// What the step's time depends on.
    pub fn shape(&self) -> StepShape {
        self.slices.iter().fold(StepShape::default(), |shape, slice| {
            shape.with_slice(slice.start, slice.num_tokens(), slice.num_logit_rows())
        })
    }
}

/// A batch in the device's integers; each vector is one tensor of the upload.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// (tokens, 1)
    pub ids: Vec<u32>,
    /// (tokens, 1)
    pub positions: Vec<u32>,
    /// (tokens, 1)
    pub slots: Vec<u32>,
    /// One for each of the model's windows, in the order of [`AttentionLimits::windows`].
    pub attention: Vec<AttentionPlan>,
    /// (updates, 2), as `op::UpdateTable` states.
    pub table_updates: Vec<u32>,
    /// (logit rows, 1): rows of the batch that go through the output layer.
    pub logit_rows: Vec<u32>,
    /// (resets, 4), as `op::ResetCounts` states.
    pub resets: Vec<u32>,
    /// (known tokens, 1)
    pub known_tokens: Vec<u32>,
    /// (logit rows, words of a `SampleRow`): what is asked of each, by [`sampling::pack`](crate::sampling::pack).
    pub sample_rows: Vec<SampleRow>,
    /// (words, 1), as `op::Sample` states.
    pub extras: Vec<u32>,
}

impl PackedBatch {
    /// Refills `self` from `batch`, but for `sample_rows` and `extras`, which need the requests; `table_cols` is the
    /// width of the device's block table.
    pub fn pack(&mut self, batch: &Batch, table_cols: u32, attention: &AttentionLimits) {
        self.clear();
        self.ids.extend(batch.input.iter().map(|token| match token {
            InputToken::Id(id) => id.0,
            InputToken::Sampled(slot) => SAMPLED_BY_SLOT | slot.0,
        }));
        self.slots.extend_from_slice(&batch.slot_mapping);
        for &(slot, index, block) in &batch.table_updates {
            assert!(index < table_cols, "block {index} of slot {} is beyond the table", slot.0);
            self.table_updates.extend([slot.0 * table_cols + index, block]);
        }
        for slice in &batch.slices {
            self.positions.extend((0..slice.num_tokens()).map(|i| slice.start + i));
            self.logit_rows.extend(slice.tokens.end - slice.num_logit_rows()..slice.tokens.end);
        }
        let rows = batch.slices.iter().map(|slice| QueryRows {
            first_row: slice.tokens.start,
            num_rows: slice.num_tokens(),
            slot: slice.slot.0,
            position: slice.start,
        });
        self.attention.resize_with(attention.windows.len(), AttentionPlan::default);
        for (plan, window) in self.attention.iter_mut().zip(&attention.windows) {
            plan.fill(rows.clone(), *window, attention);
        }
        for Reset { slot, tokens, num_prompt_tokens } in &batch.resets {
            self.resets.extend([slot.0, tokens.start, tokens.start + num_prompt_tokens, tokens.end]);
        }
        self.known_tokens.extend(batch.known_tokens.iter().map(|token| token.0));
    }

    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.slots.clear();
        self.table_updates.clear();
        self.logit_rows.clear();
        self.resets.clear();
        self.known_tokens.clear();
        self.sample_rows.clear();
        self.extras.clear();
    }
}
