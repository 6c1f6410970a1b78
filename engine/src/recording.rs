//! A forward pass as data: one upload, copies, ops in order, a list of downloads.
//!
//! Invariant: after start every change to device memory is in a recording. Shapes are asserted when an op is pushed, so
//! a backend may trust them. A recording runs nothing.

use crate::op::{
    ATTENTION_ITEM_WORDS, ATTENTION_MERGE_WORDS, ATTENTION_ROWS, AddNorm, Attention, CHOSEN_WORDS, MAX_TOP,
    MUL_ADD_ROUNDS, MulAdd, Op, ResetCounts, RopeKv, SAMPLE_ROW_WORDS, Sample, slice_cols,
};
use crate::tensor::{BufferId, DType, Tensor};

/// Cleared and refilled each step; its vectors keep their capacity.
#[derive(Debug)]
pub struct Recording {
    /// Where `upload` goes, from its begin, before the first op and after all earlier recordings.
    pub upload_buffer: BufferId,
    pub upload: Vec<u32>,
    /// Done in order, after the upload and before the first op: ops are one compute pass, and a device copies outside
    /// of passes.
    pub copies: Vec<BufferCopy>,
    pub ops: Vec<Op>,
    /// What is read back after the last op, concatenated in this order.
    pub downloads: Vec<Tensor>,
}

/// Bytes of one buffer into another: places and size are whole words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferCopy {
    pub from: BufferId,
    pub from_bytes: u64,
    pub to: BufferId,
    pub to_bytes: u64,
    pub size_bytes: u64,
}

impl Recording {
    pub fn new(upload_buffer: BufferId) -> Recording {
        let (upload, copies, ops, downloads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Recording { upload_buffer, upload, copies, ops, downloads }
    }

    /// Becomes equal to `other`, in the memory that it has.
    pub fn copy_from(&mut self, other: &Recording) {
        self.upload_buffer = other.upload_buffer;
        self.upload.clone_from(&other.upload);
        self.copies.clone_from(&other.copies);
        self.ops.clone_from(&other.ops);
        self.downloads.clone_from(&other.downloads);
    }

    pub fn clear(&mut self) {
        self.upload.clear();
        self.copies.clear();
        self.ops.clear();
        self.downloads.clear();
    }

    /// Appends `words` to the upload and returns where they will lie, as rows of `cols`.
    pub fn upload(&mut self, words: &[u32], cols: u32) -> Tensor {
        let offset = self.upload.len() as u32;
        assert!((words.len() as u32).is_multiple_of(cols), "{} words in rows of {cols}", words.len());
        self.upload.extend_from_slice(words);
        let rows = words.len() as u32 / cols;
        Tensor { buffer: self.upload_buffer, offset, rows, cols, dtype: DType::U32 }
    }

    pub fn copy(&mut self, copy: BufferCopy) {
        let in_words = [copy.from_bytes, copy.to_bytes, copy.size_bytes].map(|bytes| bytes.is_multiple_of(4));
        assert!(in_words == [true; 3] && copy.size_bytes > 0 && copy.from != copy.to, "{copy:?}");
        self.copies.push(copy);
    }

    pub fn push(&mut self, op: Op) {
        check(&op);
        self.ops.push(op);
    }

    /// Bytes that [`Backend::wait`](crate::backend::Backend::wait) will deliver.
    pub fn download_bytes(&self) -> u64 {
        self.downloads.iter().map(|tensor| tensor.size_bytes()).sum()
    }
}

/// Asserts the shapes that `op.rs` states.
fn check(op: &Op) {
    match *op {
        Op::UpdateTable(op) => {
            u32(op.entries, op.entries.rows, 2);
            u32(op.table, op.table.rows, op.table.cols);
        }
        Op::Embed(op) => {
            u32(op.ids, op.out.rows, 1);
            u32(op.sampled, op.sampled.rows, 1);
            f32(op.out, op.ids.rows, op.table.cols);
        }
        Op::RmsNorm(op) => {
            f32(op.x, op.out.rows, op.out.cols);
            f32(op.weight, 1, op.x.cols);
            f32(op.out, op.x.rows, op.x.cols);
            assert_ne!(op.x.buffer, op.out.buffer);
        }
        Op::MatMul(op) => {
            f32(op.x, op.out.rows, op.weight.cols);
            f32(op.out, op.x.rows, op.out.cols);
            assert!(op.first_col + op.weight.rows <= op.out.cols, "{op:?}");
            if let Some(bias) = op.bias {
                f32(bias, 1, op.weight.rows);
            }
            assert_ne!(op.x.buffer, op.out.buffer);
        }
        Op::RopeKv(op) => check_rope_kv(op),
        Op::Attention(op) => check_attention(op),
        Op::GatedAct(op) => {
            f32(op.gate_up, op.out.rows, 2 * op.out.cols);
            f32(op.out, op.gate_up.rows, op.out.cols);
            assert_ne!(op.gate_up.buffer, op.out.buffer);
        }
        Op::AddNorm(op) => check_add_norm(op),
        Op::ResetCounts(op) => check_reset_counts(op),
        Op::Sample(op) => check_sample(op),
        Op::MulAdd(op) => check_mul_add(op),
    }
}

fn check_rope_kv(op: RopeKv) {
    let (tokens, head_dim) = (op.q.rows, op.cache.head_dim);
    f32(op.qkv, tokens, op.q.cols + 2 * op.cache.num_kv_heads * head_dim);
    if let Some(norms) = op.norms {
        f32(norms, 2, head_dim);
    }
    u32(op.positions, tokens, 1);
    f32(op.table, op.table.rows, op.table.cols);
    assert!(op.table.cols.is_multiple_of(2) && op.table.cols <= head_dim, "{op:?}");
    u32(op.slots, tokens, 1);
    f32(op.q, op.qkv.rows, op.q.cols);
    assert!(op.q.cols.is_multiple_of(head_dim) && op.q.buffer != op.qkv.buffer, "{op:?}");
}

fn check_add_norm(op: AddNorm) {
    f32(op.x, op.y.rows, op.y.cols);
    f32(op.y, op.x.rows, op.x.cols);
    [Some(op.weight), op.post_weight].into_iter().flatten().for_each(|weight| f32(weight, 1, op.x.cols));
    f32(op.out, op.rows.map_or(op.x.rows, |rows| rows.rows), op.x.cols);
    if let Some(rows) = op.rows {
        u32(rows, op.out.rows, 1);
    }
    assert!(op.x.buffer != op.y.buffer && op.x.buffer != op.out.buffer && op.y.buffer != op.out.buffer, "{op:?}");
}

fn check_attention(op: Attention) {
    f32(op.q, op.out.rows, op.num_heads * op.cache.head_dim);
    f32(op.out, op.q.rows, op.num_heads * op.cache.head_dim);
    u32(op.items, op.items.rows, ATTENTION_ITEM_WORDS);
    u32(op.merges, op.merges.rows, ATTENTION_MERGE_WORDS);
    f32(op.partials, op.partials.rows, Attention::partial_cols(op.num_heads, op.cache.head_dim));
    u32(op.table, op.table.rows, op.table.cols);
    assert!(op.num_heads.is_multiple_of(op.cache.num_kv_heads), "{op:?}");
    assert!(op.q.rows <= op.items.rows * ATTENTION_ROWS && op.num_single_rows <= op.items.rows, "{op:?}");
    assert!(op.merges.rows <= op.q.rows && op.merges.rows <= op.partials.rows, "{op:?}");
    assert!(op.soft_cap >= 0.0 && op.q.buffer != op.out.buffer && op.partials.buffer != op.out.buffer, "{op:?}");
}

fn check_reset_counts(op: ResetCounts) {
    u32(op.resets, op.resets.rows, 4);
    u32(op.tokens, op.tokens.rows, 1);
    u32(op.counts, op.counts.rows, op.counts.cols);
}

fn check_sample(op: Sample) {
    let (num_rows, vocab) = (op.logits.rows, op.logits.cols);
    f32(op.logits, num_rows, vocab);
    u32(op.rows, num_rows, SAMPLE_ROW_WORDS);
    u32(op.extras, op.extras.rows, 1);
    u32(op.counts, op.sampled.rows, vocab);
    u32(op.slices, num_rows, slice_cols(vocab));
    u32(op.sampled, op.counts.rows, 1);
    u32(op.chosen, num_rows, CHOSEN_WORDS);
    u32(op.top, num_rows, 2 * MAX_TOP);
}

fn check_mul_add(op: MulAdd) {
    f32(op.x, op.x.rows, op.x.cols);
    assert!(op.rounds.is_multiple_of(MUL_ADD_ROUNDS), "{op:?}");
}

#[track_caller]
fn f32(tensor: Tensor, rows: u32, cols: u32) {
    assert_eq!((tensor.rows, tensor.cols, tensor.dtype), (rows, cols, DType::F32));
}

#[track_caller]
fn u32(tensor: Tensor, rows: u32, cols: u32) {
    assert_eq!((tensor.rows, tensor.cols, tensor.dtype), (rows, cols, DType::U32));
}
