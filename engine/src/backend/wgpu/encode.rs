//! From ops to dispatches: which kernel, which buffers, which scalars, how many workgroups.
//!
//! Invariant: plain data; nothing here touches a device.

use std::ops::Range;

use bytemuck::Pod;
use fullbore_shaders::{ELEMENT_LANES, MUL_ADD_ELEMENTS, TILE, Tier};
use half::f16;

use super::MAX_WORKGROUPS;
use super::mat_mul_tables::MatMulTables;
use super::params::*;
use super::pipelines::{AttentionVariant, Kernel};
use crate::backend::packing::UNIT;
use crate::op::{
    ATTENTION_ITEM_WORDS, ATTENTION_ROWS, Activation, Attention, Embed, GatedAct, MUL_ADD_ROUNDS, MulAdd, Op,
    ResetCounts, RmsNorm, RopeKv, RopeStyle, SAMPLE_SLICE, SLICE_WORDS, Sample, UpdateTable,
};
use crate::recording::Recording;
use crate::tensor::{BufferId, Tensor, Weight};

mod mat_mul;

pub use mat_mul::Partials;

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
    /// About how many multiply-adds, or what takes as long.
    pub work: u64,
}

/// Where dispatches go, and what they are made of besides the op.
pub struct Encoder<'a> {
    pub tier: Tier,
    pub mat_muls: &'a MatMulTables,
    /// By weight id.
    pub weights: &'a [Vec<Shard>],
    /// What the ops are of.
    pub recording: &'a Recording,
    /// Of a dispatch at most, where it can be divided.
    pub max_work: u64,
    /// For products whose workgroups share K; none where no kernel does that.
    pub partials: Option<Partials>,
    pub out: &'a mut Vec<Dispatch>,
}

/// Of a workgroup whose kernel reads and writes a few elements a lane.
const LIGHT_WORK: u64 = 1024;
/// Columns that a workgroup of `gated_act` makes, at most: enough that it is worth its start.
const GATED_ACT_COLUMNS: u32 = 256;
/// A weight is read and decoded once for all rows, which takes as long as about so many rows: 3 to 4 on software
/// Vulkan, as measured; by bandwidth and arithmetic 3 on a GPU inside a processor, 5 on the largest. Were it too many,
/// a pace that was learnt while decoding would let prompts in for too long.
const WEIGHT_ROWS: u64 = 4;

impl Encoder<'_> {
    pub fn ops(&mut self, mut ops: &[Op]) {
        while let Some((op, rest)) = ops.split_first() {
            ops = match (op, rest.split_first()) {
                (Op::MatMul(product), Some((Op::AddNorm(norm), after))) if self.mat_mul_add_norm(product, norm) => {
                    after
                }
                _ => {
                    self.op(op);
                    rest
                }
            };
        }
    }

    fn op(&mut self, op: &Op) {
        match op {
            Op::UpdateTable(op) => self.update_table(op),
            Op::Embed(op) => self.embed(op),
            Op::RmsNorm(op) => self.rms_norm(op),
            Op::MatMul(op) => self.mat_mul(op),
            Op::RopeKv(op) => self.rope_kv(op),
            Op::Attention(op) => self.attention(op),
            Op::GatedAct(op) => self.gated_act(op),
            Op::AddNorm(op) => self.add_norm(op),
            Op::ResetCounts(op) => self.reset_counts(op),
            Op::Sample(op) => self.sample(op),
            Op::MulAdd(op) => self.mul_add(op),
        }
    }

    /// Empty dispatches are dropped.
    fn push(&mut self, kernel: Kernel, buffers: &[BufferId], params: &impl Pod, workgroups: u32) {
        self.push_work(kernel, buffers, params, workgroups, u64::from(workgroups) * LIGHT_WORK);
    }

    fn push_work(&mut self, kernel: Kernel, buffers: &[BufferId], params: &impl Pod, workgroups: u32, work: u64) {
        if workgroups == 0 {
            return;
        }
        let params: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(params));
        let mut dispatch = Dispatch {
            kernel,
            buffers: [buffers[0]; MAX_BUFFERS],
            params: [0; MAX_PARAMS],
            num_params: params.len(),
            workgroups,
            work,
        };
        dispatch.buffers[..buffers.len()].copy_from_slice(buffers);
        dispatch.params[..params.len()].copy_from_slice(params);
        self.out.push(dispatch);
    }

    fn push_elements(&mut self, kernel: Kernel, buffers: &[BufferId], params: &impl Pod, num_elements: u32) {
        self.push(kernel, buffers, params, num_elements.div_ceil(ELEMENT_LANES));
    }

    fn shards(&self, weight: Weight) -> Vec<Shard> {
        self.weights[weight.id.0 as usize].clone()
    }

    fn update_table(&mut self, op: &UpdateTable) {
        let buffers = [op.entries.buffer, op.table.buffer];
        let (entries, table) = (op.entries.offset, op.table.offset);
        let params = UpdateTableParams { entries, table, num_entries: op.entries.rows };
        self.push_elements(Kernel::UpdateTable, &buffers, &params, op.entries.rows);
    }

    fn embed(&mut self, op: &Embed) {
        let num_units = op.out.cols.div_ceil(UNIT);
        for shard in self.shards(op.table) {
            let buffers = [op.ids.buffer, op.sampled.buffer, shard.buffer, op.out.buffer];
            let params = EmbedParams {
                ids: op.ids.offset,
                sampled: op.sampled.offset,
                out: op.out.offset,
                num_tokens: op.out.rows,
                cols: op.out.cols,
                num_units,
                first_row: shard.first_row,
                num_rows: shard.num_rows,
                scale: op.scale,
            };
            let num_eights = op.out.rows * num_units * UNIT / 8;
            self.push_elements(Kernel::Embed(op.table.format), &buffers, &params, num_eights);
        }
    }

    fn rms_norm(&mut self, op: &RmsNorm) {
        let buffers = [op.x.buffer, op.weight.buffer, op.out.buffer];
        let params = RmsNormParams {
            x: op.x.offset,
            weight: op.weight.offset,
            out: op.out.offset,
            rows: op.x.rows,
            cols: op.x.cols,
            eps: op.eps,
        };
        self.push(Kernel::RmsNorm, &buffers, &params, op.x.rows);
    }

    fn rope_kv(&mut self, op: &RopeKv) {
        let cache = op.cache;
        let norms = op.norms.unwrap_or(op.table);
        let num_heads = op.q.cols / cache.head_dim;
        let num_items = op.q.rows * (num_heads + 2 * cache.num_kv_heads);
        let buffers = [op.qkv, norms, op.table, op.positions, op.slots, op.q].map(|tensor| tensor.buffer);
        let params = RopeKvParams {
            qkv: op.qkv.offset,
            norms: norms.offset,
            table: op.table.offset,
            positions: op.positions.offset,
            slots: op.slots.offset,
            q: op.q.offset,
            has_norms: u32::from(op.norms.is_some()),
            num_items,
            num_heads,
            num_kv_heads: cache.num_kv_heads,
            half_dim: op.table.cols / 2,
            halves: u32::from(op.style == RopeStyle::Halves),
            block_size: cache.block_size,
            eps: op.eps,
        };
        let buffers = [&buffers[..], &[cache.k, cache.v]].concat();
        self.push(Kernel::RopeKv(cache.kv_type, cache.head_dim), &buffers, &params, num_items);
    }

    /// Items of one row; then the others, and beside them the merging of what was split among the former: two
    /// dispatches at most, unless they must be divided.
    fn attention(&mut self, op: &Attention) {
        self.attention_items(op, 0..op.num_single_rows, 1, 0);
        self.attention_items(op, op.num_single_rows..op.items.rows, ATTENTION_ROWS, op.merges.rows);
    }

    /// In several dispatches, where one would be too much; the last one merges.
    fn attention_items(&mut self, op: &Attention, items: Range<u32>, rows_of_item: u32, num_merges: u32) {
        let (mut first, mut work) = (items.start, 0);
        for item in items.clone() {
            let of_item = self.attention_work(op, item);
            if item > first && work + of_item > self.max_work {
                self.attention_range(op, first..item, rows_of_item, 0, work);
                (first, work) = (item, 0);
            }
            work += of_item;
        }
        self.attention_range(op, first..items.end, rows_of_item, num_merges, work);
    }

    /// Of one item: its rows and heads over the positions that it sees, K and V. A list that the recording does not
    /// have is on the device already, and is taken for the longest.
    fn attention_work(&self, op: &Attention, item: u32) -> u64 {
        let place = (op.items.offset + item * ATTENTION_ITEM_WORDS) as usize;
        let is_uploaded = op.items.buffer == self.recording.upload_buffer;
        let (num_rows, num_positions) = match self.recording.upload.get(place..).filter(|_| is_uploaded) {
            Some(&[_, num_rows, _, _, begin, end, ..]) => (num_rows, end - begin),
            _ => (ATTENTION_ROWS, op.table.cols * op.cache.block_size),
        };
        let values = u64::from(op.num_heads) * u64::from(op.cache.head_dim) * 2;
        u64::from(num_rows) * u64::from(num_positions) * values
    }

    fn attention_range(&mut self, op: &Attention, items: Range<u32>, rows_of_item: u32, num_merges: u32, work: u64) {
        let cache = op.cache;
        let group = op.num_heads / cache.num_kv_heads;
        let variant = AttentionVariant::new(self.tier, cache.kv_type, cache.head_dim, group, rows_of_item);
        let row_groups = rows_of_item.div_ceil(variant.rows);
        let [q, items_buffer, table] = [op.q, op.items, op.table].map(|tensor| tensor.buffer);
        let [out, partials, merges] = [op.out, op.partials, op.merges].map(|tensor| tensor.buffer);
        let buffers = [q, cache.k, cache.v, items_buffer, table, out, partials, merges];
        let params = AttentionParams {
            q: op.q.offset,
            items: op.items.offset + items.start * ATTENTION_ITEM_WORDS,
            table: op.table.offset,
            out: op.out.offset,
            partials: op.partials.offset,
            merges: op.merges.offset,
            num_items: items.end - items.start,
            num_merges,
            row_groups,
            num_heads: op.num_heads,
            num_kv_heads: cache.num_kv_heads,
            table_cols: op.table.cols,
            block_size: cache.block_size,
            window: op.window,
            scale: op.scale,
            soft_cap: op.soft_cap,
        };
        // The kernel writes pairs of elements.
        assert!(op.out.offset.is_multiple_of(2) && op.partials.offset.is_multiple_of(2), "{op:?}");
        let of_items = (items.end - items.start) * row_groups * (op.num_heads / variant.heads);
        let of_merges = (num_merges * op.out.cols / 2).div_ceil(self.tier.attention_lanes());
        let work = work + u64::from(of_merges) * LIGHT_WORK;
        self.push_work(Kernel::Attention(variant), &buffers, &params, of_items + of_merges, work);
    }

    fn gated_act(&mut self, op: &GatedAct) {
        let Tensor { rows, cols, .. } = op.out;
        let activation = match op.activation {
            Activation::Silu => 0,
            Activation::GeluTanh => 1,
        };
        let parts = cols.div_ceil(GATED_ACT_COLUMNS).next_power_of_two();
        let params = GatedActParams {
            gate_up: op.gate_up.offset,
            out: op.out.offset,
            rows,
            cols,
            parts_log2: parts.ilog2(),
            span: cols.div_ceil(parts),
            activation,
        };
        self.push(Kernel::GatedAct, &[op.gate_up.buffer, op.out.buffer], &params, rows * parts);
    }

    fn reset_counts(&mut self, op: &ResetCounts) {
        let buffers = [op.resets.buffer, op.tokens.buffer, op.counts.buffer];
        let params = ResetCountsParams {
            resets: op.resets.offset,
            tokens: op.tokens.offset,
            counts: op.counts.offset,
            num_resets: op.resets.rows,
            vocab: op.counts.cols,
        };
        self.push(Kernel::ResetCounts, &buffers, &params, op.resets.rows);
    }

    fn mul_add(&mut self, op: &MulAdd) {
        let num_elements = op.x.num_elements();
        let num_eights = op.rounds / MUL_ADD_ROUNDS;
        let (scale, offset) = (op.scale, op.offset);
        let params = MulAddParams { x: op.x.offset, num_elements, scale, offset, num_eights };
        // A sum alone, of what f16 has, is a product of matrices as well.
        let is_sum = scale == 1.0 && f16::from_f32(offset).to_f32() == offset;
        let units = self
            .mat_muls
            .matrix_units()
            .filter(|units| is_sum && num_elements.is_multiple_of(units.mul_add_elements()));
        let (kernel, of_group, size) = match units {
            Some(units) => (Kernel::MulAddMatrix(units), units.mul_add_elements(), units.size),
            None => (Kernel::MulAdd, MUL_ADD_ELEMENTS, 1),
        };
        let work = u64::from(num_elements) * u64::from(op.rounds) * u64::from(size);
        let workgroups = num_elements.div_ceil(of_group);
        // Workgroups beyond a row of a dispatch are rounded up, and one of matrices has no guard.
        assert!(units.is_none() || workgroups <= MAX_WORKGROUPS, "{num_elements} elements of matrices at once");
        self.push_work(kernel, &[op.x.buffer], &params, workgroups, work);
    }

    /// Slices of rows first, then rows.
    fn sample(&mut self, op: &Sample) {
        let Sample { logits, rows, extras, counts, slices, sampled, chosen, top } = *op;
        let num_slices = slices.cols / SLICE_WORDS;
        let buffers = [logits, rows, extras, counts, slices, sampled, chosen, top].map(|tensor| tensor.buffer);
        let (num_rows, vocab) = (logits.rows, logits.cols);
        let of_slices = SampleSlicesParams {
            logits: logits.offset,
            rows: rows.offset,
            extras: extras.offset,
            counts: counts.offset,
            slices: slices.offset,
            num_rows,
            vocab,
            num_slices,
            slice_len: SAMPLE_SLICE,
        };
        let of_rows = SampleParams {
            logits: logits.offset,
            rows: rows.offset,
            extras: extras.offset,
            counts: counts.offset,
            slices: slices.offset,
            sampled: sampled.offset,
            chosen: chosen.offset,
            top: top.offset,
            num_rows,
            vocab,
            num_slices,
        };
        let work = u64::from(num_rows) * u64::from(vocab);
        self.push_work(Kernel::SampleSlices, &buffers[..5], &of_slices, num_rows * num_slices, work);
        self.push_work(Kernel::Sample, &buffers, &of_rows, num_rows, work);
    }
}

/// Rows of a weight in one shard: whole tiles, at most `max_bytes`.
pub fn rows_per_shard(tile_words: u64, max_bytes: u64) -> u32 {
    let tiles = (max_bytes / (tile_words * 4)).max(1);
    u32::try_from(tiles * u64::from(TILE)).unwrap_or(u32::MAX / TILE * TILE)
}

#[cfg(test)]
mod tests;
