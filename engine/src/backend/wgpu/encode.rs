//! From ops to dispatches: which kernel, which buffers, which scalars, how many workgroups.
//!
//! Invariant: plain data; nothing here touches a device. The scalars of a kernel are in the order of its `Params`.

use fullbore_shaders::{ELEMENT_LANES, MUL_ADD_ELEMENTS, MatMulVariant, TILE, Tier};

use super::packing::UNIT;
use super::pipelines::Kernel;
use crate::op::{
    ATTENTION_ROWS, Activation, Add, Attention, Embed, GatedAct, GatherRows, MUL_ADD_ROUNDS, MatMul, MulAdd, Op,
    ResetCounts, RmsNorm, Rope, RopeStyle, SAMPLE_SLICE, SLICE_WORDS, Sample, StoreKv, UpdateTable,
};
use crate::tensor::{BufferId, KvType, Weight, WeightFormat};

/// Buffers of a kernel at most, which is WebGPU's guarantee too.
pub const MAX_BUFFERS: usize = 8;
/// Scalars of a kernel at most.
pub const MAX_PARAMS: usize = 16;

/// A part of a weight: consecutive rows in a buffer of their own.
#[derive(Clone, Copy, Debug)]
pub struct Shard {
    pub buffer: BufferId,
    pub first_row: u32,
    pub num_rows: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct Dispatch {
    pub kernel: Kernel,
    /// By binding; what the kernel does not bind repeats the first.
    pub buffers: [BufferId; MAX_BUFFERS],
    pub params: [u32; MAX_PARAMS],
    pub num_params: usize,
    pub workgroups: u32,
}

/// Where dispatches go, and what they are made of besides the op.
pub struct Encoder<'a> {
    pub tier: Tier,
    /// By weight id.
    pub weights: &'a [Vec<Shard>],
    pub out: &'a mut Vec<Dispatch>,
}

impl Encoder<'_> {
    pub fn op(&mut self, op: &Op) {
        match op {
            Op::UpdateTable(op) => self.update_table(op),
            Op::Embed(op) => self.embed(op),
            Op::RmsNorm(op) => self.rms_norm(op),
            Op::MatMul(op) => self.mat_mul(op),
            Op::Rope(op) => self.rope(op),
            Op::StoreKv(op) => self.store_kv(op),
            Op::Attention(op) => self.attention(op),
            Op::GatedAct(op) => self.gated_act(op),
            Op::Add(op) => self.add(op),
            Op::GatherRows(op) => self.gather_rows(op),
            Op::ResetCounts(op) => self.reset_counts(op),
            Op::Sample(op) => self.sample(op),
            Op::MulAdd(op) => self.mul_add(op),
        }
    }

    /// Empty dispatches are dropped.
    fn push(&mut self, kernel: Kernel, buffers: &[BufferId], params: &[u32], workgroups: u32) {
        if workgroups == 0 {
            return;
        }
        let mut dispatch = Dispatch {
            kernel,
            buffers: [buffers[0]; MAX_BUFFERS],
            params: [0; MAX_PARAMS],
            num_params: params.len(),
            workgroups,
        };
        dispatch.buffers[..buffers.len()].copy_from_slice(buffers);
        dispatch.params[..params.len()].copy_from_slice(params);
        self.out.push(dispatch);
    }

    fn push_elements(&mut self, kernel: Kernel, buffers: &[BufferId], params: &[u32], num_elements: u32) {
        self.push(kernel, buffers, params, num_elements.div_ceil(ELEMENT_LANES));
    }

    fn shards(&self, weight: Weight) -> Vec<Shard> {
        self.weights[weight.id.0 as usize].clone()
    }

    fn update_table(&mut self, op: &UpdateTable) {
        let buffers = [op.entries.buffer, op.table.buffer];
        let params = [op.entries.offset, op.table.offset, op.entries.rows];
        self.push_elements(Kernel::UpdateTable, &buffers, &params, op.entries.rows);
    }

    fn embed(&mut self, op: &Embed) {
        let num_units = op.out.cols.div_ceil(UNIT);
        for shard in self.shards(op.table) {
            let buffers = [op.ids.buffer, op.sampled.buffer, shard.buffer, op.out.buffer];
            let params = [
                op.ids.offset,
                op.sampled.offset,
                op.out.offset,
                op.out.rows,
                op.out.cols,
                num_units,
                shard.first_row,
                shard.num_rows,
                op.scale.to_bits(),
            ];
            let num_eights = op.out.rows * num_units * UNIT / 8;
            self.push_elements(Kernel::Embed(op.table.format), &buffers, &params, num_eights);
        }
    }

    fn rms_norm(&mut self, op: &RmsNorm) {
        let buffers = [op.x.buffer, op.weight.buffer, op.out.buffer];
        let params = [op.x.offset, op.weight.offset, op.out.offset, op.x.rows, op.x.cols, op.eps.to_bits()];
        self.push(Kernel::RmsNorm, &buffers, &params, op.x.rows);
    }

    /// By the tier's table.
    fn mat_mul(&mut self, op: &MatMul) {
        let choices = self.tier.mat_mul_choices();
        let mut first_row = 0;
        while first_row < op.x.rows {
            let left = op.x.rows - first_row;
            let choice = choices.iter().find(|choice| choice.max_rows >= left);
            let choice = choice.expect("the last line takes any number");
            let rows = choice.variant.rows();
            let taken = if choice.max_rows == u32::MAX { left / rows * rows } else { left };
            assert!(taken > 0, "{choice:?} takes nothing of {left} rows");
            self.mat_mul_rows(op, choice.variant, first_row, first_row + taken);
            first_row += taken;
        }
    }

    fn mat_mul_rows(&mut self, op: &MatMul, variant: MatMulVariant, first_row: u32, end_row: u32) {
        let row_tiles = (end_row - first_row).div_ceil(variant.rows());
        for shard in self.shards(op.weight) {
            let bias = op.bias.unwrap_or(op.x);
            let buffers = [op.x.buffer, shard.buffer, bias.buffer, op.out.buffer];
            let params = [
                op.x.offset,
                bias.offset,
                op.out.offset,
                u32::from(op.bias.is_some()),
                first_row,
                end_row,
                op.x.cols,
                op.x.cols.div_ceil(UNIT),
                op.weight.rows,
                shard.first_row,
                shard.num_rows,
                row_tiles,
            ];
            let column_tiles = shard.num_rows.div_ceil(variant.columns());
            self.push(Kernel::MatMul(op.weight.format, variant), &buffers, &params, column_tiles * row_tiles);
        }
    }

    fn rope(&mut self, op: &Rope) {
        let half_dim = op.table.cols / 2;
        let num_pairs = op.x.rows * (op.x.cols / op.head_dim) * half_dim;
        let buffers = [op.x.buffer, op.positions.buffer, op.table.buffer];
        let params = [
            op.x.offset,
            op.positions.offset,
            op.table.offset,
            num_pairs,
            op.x.cols,
            op.head_dim,
            half_dim,
            u32::from(op.style == RopeStyle::Halves),
        ];
        self.push_elements(Kernel::Rope, &buffers, &params, num_pairs);
    }

    fn store_kv(&mut self, op: &StoreKv) {
        let cache = op.cache;
        // An invocation writes a word of f16, or a word of scales and the codes of its two groups.
        let parts = match cache.kv_type {
            KvType::F16 => cache.head_words(),
            kv_type => cache.head_words() - kv_type.code_words(cache.head_dim),
        };
        let num_parts = op.k.rows * cache.num_kv_heads * parts;
        let buffers = [op.k.buffer, op.v.buffer, op.slots.buffer, cache.k, cache.v];
        let params =
            [op.k.offset, op.v.offset, op.slots.offset, num_parts, cache.num_kv_heads, parts, cache.block_size];
        self.push_elements(Kernel::StoreKv(cache.kv_type, cache.head_dim), &buffers, &params, num_parts);
    }

    fn attention(&mut self, op: &Attention) {
        let cache = op.cache;
        // Every row is in one item: with as many items as rows, each has one.
        let rows_per_item = if op.items.rows == op.q.rows { 1 } else { ATTENTION_ROWS };
        let buffers = [op.q.buffer, cache.k, cache.v, op.items.buffer, op.table.buffer, op.out.buffer];
        let params = [
            op.q.offset,
            op.items.offset,
            op.table.offset,
            op.out.offset,
            op.items.rows,
            rows_per_item,
            op.num_heads,
            cache.num_kv_heads,
            op.table.cols,
            cache.block_size,
            op.window,
            op.scale.to_bits(),
        ];
        let workgroups = op.items.rows * rows_per_item * op.num_heads;
        self.push(Kernel::Attention(cache.kv_type, cache.head_dim), &buffers, &params, workgroups);
    }

    fn gated_act(&mut self, op: &GatedAct) {
        let num_elements = op.out.num_elements();
        let activation = match op.activation {
            Activation::Silu => 0,
            Activation::GeluTanh => 1,
        };
        let buffers = [op.gate.buffer, op.up.buffer, op.out.buffer];
        let params = [op.gate.offset, op.up.offset, op.out.offset, num_elements, activation];
        self.push_elements(Kernel::GatedAct, &buffers, &params, num_elements);
    }

    fn add(&mut self, op: &Add) {
        let num_elements = op.x.num_elements();
        let params = [op.x.offset, op.y.offset, num_elements];
        self.push_elements(Kernel::Add, &[op.x.buffer, op.y.buffer], &params, num_elements);
    }

    fn gather_rows(&mut self, op: &GatherRows) {
        let num_elements = op.out.num_elements();
        let buffers = [op.x.buffer, op.rows.buffer, op.out.buffer];
        let params = [op.x.offset, op.rows.offset, op.out.offset, op.x.cols, num_elements];
        self.push_elements(Kernel::GatherRows, &buffers, &params, num_elements);
    }

    fn reset_counts(&mut self, op: &ResetCounts) {
        let buffers = [op.resets.buffer, op.tokens.buffer, op.counts.buffer];
        let params = [op.resets.offset, op.tokens.offset, op.counts.offset, op.resets.rows, op.counts.cols];
        self.push(Kernel::ResetCounts, &buffers, &params, op.resets.rows);
    }

    fn mul_add(&mut self, op: &MulAdd) {
        let num_elements = op.x.num_elements();
        let num_eights = op.rounds / MUL_ADD_ROUNDS;
        let params = [op.x.offset, num_elements, op.scale.to_bits(), op.offset.to_bits(), num_eights];
        self.push(Kernel::MulAdd, &[op.x.buffer], &params, num_elements.div_ceil(MUL_ADD_ELEMENTS));
    }

    /// Slices of rows first, then rows.
    fn sample(&mut self, op: &Sample) {
        let Sample { logits, rows, extras, counts, slices, sampled, chosen, top } = *op;
        let num_slices = slices.cols / SLICE_WORDS;
        let buffers = [logits, rows, extras, counts, slices, sampled, chosen, top].map(|tensor| tensor.buffer);
        let offsets = [logits, rows, extras, counts, slices, sampled, chosen, top].map(|tensor| tensor.offset);
        let shape = [logits.rows, logits.cols, num_slices];
        let params = [&offsets[..5], &shape, &[SAMPLE_SLICE]].concat();
        self.push(Kernel::SampleSlices, &buffers[..5], &params, logits.rows * num_slices);
        self.push(Kernel::Sample, &buffers, &[&offsets[..], &shape].concat(), logits.rows);
    }
}

/// Rows of a weight in one shard: whole tiles, at most `max_bytes`.
pub fn rows_per_shard(tile_words: u64, max_bytes: u64) -> u32 {
    let tiles = (max_bytes / (tile_words * 4)).max(1);
    u32::try_from(tiles * u64::from(TILE)).unwrap_or(u32::MAX / TILE * TILE)
}

/// Whether `cols` values of `format` fill whole blocks.
pub fn fills_blocks(format: WeightFormat, cols: u32) -> bool {
    cols.is_multiple_of(format.block_len())
}
