//! One step's plan as plain data: what the plan tower makes and the compute tower consumes.
//!
//! Invariant: decode slices come first; ranges of slices are consecutive and cover all tokens. A batch knows neither
//! memory manager nor device.

use std::ops::Range;

use crate::op::{ATTENTION_ROWS, SAMPLED_BY_SLOT, SampleRow};
use crate::request::TokenId;

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
    /// Every row, for prompt logprobs.
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
}

impl Slice {
    pub fn num_tokens(&self) -> u32 {
        self.tokens.end - self.tokens.start
    }

    pub fn num_logit_rows(&self) -> u32 {
        match self.logits {
            Logits::None => 0,
            Logits::Last => 1,
            Logits::All => self.num_tokens(),
        }
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
    pub resets: Vec<Reset>,
    /// The tokens of all resets.
    pub known_tokens: Vec<TokenId>,
}

impl Batch {
    pub fn clear(&mut self) {
        self.slices.clear();
        self.input.clear();
        self.slot_mapping.clear();
        self.table_updates.clear();
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
    /// (items, 4), as `op::Attention` states.
    pub items: Vec<u32>,
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
    pub fn pack(&mut self, batch: &Batch, table_cols: u32) {
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
            let mut row = slice.tokens.start;
            while row < slice.tokens.end {
                let num_rows = ATTENTION_ROWS.min(slice.tokens.end - row);
                let position = slice.start + (row - slice.tokens.start);
                self.items.extend([row, num_rows, slice.slot.0, position]);
                row += num_rows;
            }
            self.logit_rows.extend(slice.tokens.end - slice.num_logit_rows()..slice.tokens.end);
        }
        for Reset { slot, tokens, num_prompt_tokens } in &batch.resets {
            self.resets.extend([slot.0, tokens.start, tokens.start + num_prompt_tokens, tokens.end]);
        }
        self.known_tokens.extend(batch.known_tokens.iter().map(|token| token.0));
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.slots.clear();
        self.items.clear();
        self.table_updates.clear();
        self.logit_rows.clear();
        self.resets.clear();
        self.known_tokens.clear();
        self.sample_rows.clear();
        self.extras.clear();
    }
}
