//! From ops to launches: which kernel, which parameters, how many blocks.
//!
//! Invariant: plain data; nothing here touches a device.

use bytemuck::Pod;
use fullbore_cuda_kernels::MAX_PARAMS;
use half::f16;

use super::kernel::{Arithmetic, HeadDim, Kernel, MatMulVariant, MatrixPairs, attends_on_units};
use super::mat_mul_tables::MatMulTables;
use super::params::*;
use crate::backend::packing::UNIT;
use crate::op::{
    ATTENTION_ROWS, Activation, AddNorm, Attention, Embed, GatedAct, MatMul, MulAdd, Op, ResetCounts, RmsNorm, RopeKv,
    RopeStyle, SAMPLE_SLICE, SLICE_WORDS, Sample, UpdateTable,
};
use crate::tensor::{BufferId, Tensor};
use crate::tuning::MatMulShape;

/// Pairs of a row and a query head that a block of attention takes on, as `attention.cu` has it.
const ATTENTION_PAIRS: u32 = 8;
/// Elements of a block of `mul_add.cu` and of `mul_add_matrix.cu`.
const MUL_ADD_ELEMENTS: u32 = 2048;
const MUL_ADD_MATRIX_ELEMENTS: u32 = 8192;

/// A kernel to launch, before the device has loaded it.
#[derive(Clone, Copy)]
pub struct Encoded {
    pub kernel: Kernel,
    pub blocks: u32,
    pub params: [u8; MAX_PARAMS],
}

/// How K is divided over blocks where the columns of a product are too few for all multiprocessors. The runs of K that
/// a weight has depend on its shape alone.
#[derive(Clone, Copy, Debug)]
pub struct SplitK {
    /// (splits, up to `MANY_ROWS`, columns)
    pub parts: Address,
    pub num_multiprocessors: u32,
}

impl SplitK {
    /// Rows that one block takes on.
    const FEW_ROWS: u32 = 64;
    /// Rows of a product that is split at most: more have blocks enough.
    const MANY_ROWS: u32 = 256;
    /// Units of a run at least: fewer are not worth the sum.
    const UNITS: u32 = 8;

    /// Blocks beside each other in N and K, one a multiprocessor; what is split costs a write and a read of its parts.
    /// Many rows are two tiles of them.
    fn blocks(num_multiprocessors: u32, rows: u32) -> u32 {
        match rows {
            0..=SplitK::FEW_ROWS => num_multiprocessors,
            65..=SplitK::MANY_ROWS => num_multiprocessors / 2,
            _ => 0,
        }
    }

    pub fn bytes(num_multiprocessors: u32) -> u64 {
        let of = |rows: u32, variant: MatMulVariant| {
            let (_, columns) = variant.shape();
            u64::from(SplitK::blocks(num_multiprocessors, rows)) * u64::from(rows * columns) * 4
        };
        of(SplitK::FEW_ROWS, MatMulVariant::Matrix64).max(of(SplitK::MANY_ROWS, MatMulVariant::Matrix128))
    }

    fn splits(self, variant: MatMulVariant, rows: u32, num_cols: u32, num_units: u32) -> u32 {
        if variant.arithmetic() != Arithmetic::MatrixUnits {
            return 1;
        }
        let (_, columns) = variant.shape();
        let tiles = num_cols.div_ceil(columns);
        (SplitK::blocks(self.num_multiprocessors, rows) / tiles).min(num_units / SplitK::UNITS).max(1)
    }
}

/// Bytes of as many rows of `cols` activations in f16 as a launch takes.
pub fn halves_bytes(cols: u32) -> u64 {
    u64::from(SplitK::FEW_ROWS) * u64::from(cols.next_multiple_of(UNIT)) * 2
}

/// Where launches go, and what they are made of besides the op.
pub struct Encoder<'a> {
    /// By buffer id.
    pub buffers: &'a [Address],
    /// By weight id.
    pub weights: &'a [Address],
    pub mat_muls: &'a MatMulTables,
    pub split_k: SplitK,
    /// Where activations of few rows go in f16, for tensor cores.
    pub halves: Address,
    /// Whose activations are there, of which shape: address, rows and columns.
    pub in_halves: Option<(Address, u32, u32)>,
    pub out: &'a mut Vec<Encoded>,
}

impl Encoder<'_> {
    pub fn ops(&mut self, ops: &[Op]) {
        for (index, op) in ops.iter().enumerate() {
            if !matches!(op, Op::MatMul(_)) {
                // It may write what was.
                self.in_halves = None;
            }
            self.op(op, ops.get(index + 1));
        }
    }

    fn op(&mut self, op: &Op, next: Option<&Op>) {
        match op {
            Op::UpdateTable(op) => self.update_table(op),
            Op::Embed(op) => self.embed(op),
            Op::RmsNorm(op) => self.rms_norm(op, next),
            Op::MatMul(op) => self.mat_mul(op),
            Op::RopeKv(op) => self.rope_kv(op),
            Op::Attention(op) => self.attention(op),
            Op::GatedAct(op) => self.gated_act(op, next),
            Op::AddNorm(op) => self.add_norm(op, next),
            Op::ResetCounts(op) => self.reset_counts(op),
            Op::Sample(op) => self.sample(op),
            Op::MulAdd(op) => self.mul_add(op),
        }
    }

    /// Empty launches are dropped.
    fn push(&mut self, kernel: Kernel, blocks: u32, params: &impl Pod) {
        if blocks == 0 {
            return;
        }
        let mut bytes = [0; MAX_PARAMS];
        let params = bytemuck::bytes_of(params);
        bytes[..params.len()].copy_from_slice(params);
        self.out.push(Encoded { kernel, blocks, params: bytes });
    }

    fn buffer(&self, buffer: BufferId) -> Address {
        self.buffers[buffer.0 as usize]
    }

    fn at(&self, tensor: Tensor) -> Address {
        self.buffer(tensor.buffer) + tensor.offset_bytes()
    }

    /// Null for none.
    fn at_some(&self, tensor: Option<Tensor>) -> Address {
        tensor.map_or(0, |tensor| self.at(tensor))
    }

    fn update_table(&mut self, op: &UpdateTable) {
        let (entries, table, num_entries) = (self.at(op.entries), self.at(op.table), op.entries.rows);
        let params = UpdateTableParams { entries, table, num_entries, pad: 0 };
        self.push(Kernel::UpdateTable, num_entries.div_ceil(256), &params);
    }

    fn embed(&mut self, op: &Embed) {
        let num_units = op.out.cols.div_ceil(UNIT);
        let params = EmbedParams {
            ids: self.at(op.ids),
            sampled: self.at(op.sampled),
            weight: self.weights[op.table.id.0 as usize],
            out: self.at(op.out),
            num_tokens: op.out.rows,
            cols: op.out.cols,
            num_units,
            scale: op.scale,
        };
        let num_eights = op.out.rows * num_units * (UNIT / 8);
        self.push(Kernel::Embed(op.table.format), num_eights.div_ceil(256), &params);
    }

    fn rms_norm(&mut self, op: &RmsNorm, next: Option<&Op>) {
        let (x, weight, out) = (self.at(op.x), self.at(op.weight), self.at(op.out));
        let params =
            RmsNormParams { x, weight, out, halves: self.for_next(op.out, next), cols: op.x.cols, eps: op.eps };
        self.push(Kernel::RmsNorm, op.x.rows, &params);
    }

    /// By the table of the weight's shape.
    fn mat_mul(&mut self, op: &MatMul) {
        let choices = self.mat_muls.of(MatMulShape::of(op.weight));
        let mut first_row = 0;
        while first_row < op.x.rows {
            let left = op.x.rows - first_row;
            let choice = choices.iter().find(|choice| choice.max_rows >= left);
            let choice = choice.expect("the last line takes any number");
            let taken = choice.takes(left).min(choice.variant.max_rows().unwrap_or(u32::MAX));
            let (rows, columns) = choice.variant.shape();
            let row_bytes = |tensor: Tensor| u64::from(first_row) * u64::from(tensor.cols) * 4;
            let (num_cols, num_units) = (op.weight.rows, op.x.cols.div_ceil(UNIT));
            let splits = self.split_k.splits(choice.variant, taken, num_cols, num_units);
            let bias = self.at_some(op.bias);
            let out = self.at(op.out) + row_bytes(op.out) + u64::from(op.first_col) * 4;
            let mut x = self.at(op.x) + row_bytes(op.x);
            if choice.variant.max_rows().is_some() {
                x = self.make_f16(x, taken, op.x.cols);
            }
            let whole = MatMulParams {
                x,
                weight: self.weights[op.weight.id.0 as usize],
                bias,
                out,
                num_rows: taken,
                inner: op.x.cols,
                num_units,
                num_cols,
                stride: op.out.cols,
                splits,
            };
            let parts = self.split_k.parts;
            let params = match splits {
                1 => whole,
                _ => MatMulParams { bias: 0, out: parts, stride: num_cols, ..whole },
            };
            let blocks = taken.div_ceil(rows) * num_cols.div_ceil(columns) * splits;
            self.push(Kernel::MatMul(op.weight.format, choice.variant), blocks, &params);
            if splits > 1 {
                let sum = MatMulSumParams { parts, bias, out, num_rows: taken, num_cols, stride: op.out.cols, splits };
                self.push(Kernel::MatMulSum, (taken * num_cols).div_ceil(256), &sum);
            }
            first_row += taken;
        }
    }

    /// Where an op that writes `out` leaves it in f16 too, for a product on tensor cores that comes next; else null.
    fn for_next(&mut self, out: Tensor, next: Option<&Op>) -> Address {
        let Some(Op::MatMul(MatMul { x, weight, .. })) = next else { return 0 };
        let mut choices = self.mat_muls.of(MatMulShape::of(*weight)).iter();
        let choice = choices.find(|choice| choice.max_rows >= x.rows).expect("the last line takes any number");
        let is_whole = choice.variant.max_rows().is_some_and(|most| choice.takes(x.rows).min(most) == x.rows);
        if *x != out || !is_whole || !x.cols.is_multiple_of(UNIT) {
            return 0;
        }
        self.in_halves = Some((self.at(out), out.rows, out.cols));
        self.halves
    }

    /// Where these activations are in f16, from the launches so far on.
    fn make_f16(&mut self, x: Address, num_rows: u32, inner: u32) -> Address {
        let num_units = inner.div_ceil(UNIT);
        if self.in_halves != Some((x, num_rows, inner)) {
            let params = ToF16Params { x, out: self.halves, num_rows, inner, num_units, pad: 0 };
            self.push(Kernel::ToF16, (num_rows * num_units * (UNIT / 8)).div_ceil(256), &params);
            self.in_halves = Some((x, num_rows, inner));
        }
        self.halves
    }

    fn rope_kv(&mut self, op: &RopeKv) {
        let cache = op.cache;
        let num_heads = op.q.cols / cache.head_dim;
        let num_items = op.q.rows * (num_heads + 2 * cache.num_kv_heads);
        let params = RopeKvParams {
            qkv: self.at(op.qkv),
            norms: self.at_some(op.norms),
            table: self.at(op.table),
            positions: self.at(op.positions),
            slots: self.at(op.slots),
            q: self.at(op.q),
            k_cache: self.buffer(cache.k),
            v_cache: self.buffer(cache.v),
            num_items,
            num_heads,
            num_kv_heads: cache.num_kv_heads,
            head_dim: cache.head_dim,
            half_dim: op.table.cols / 2,
            halves: u32::from(op.style == RopeStyle::Halves),
            block_size: cache.block_size,
            eps: op.eps,
        };
        self.push(Kernel::RopeKv(cache.kv_type), num_items.div_ceil(4), &params);
    }

    /// Items of one row, the others, and the merging of what was split among the former.
    fn attention(&mut self, op: &Attention) {
        let cache = op.cache;
        let (group, head_dim) = (op.num_heads / cache.num_kv_heads, HeadDim::of(cache.head_dim));
        let on_units = self.mat_muls.arithmetic() == Arithmetic::MatrixUnits && attends_on_units(cache.head_dim);
        let singles = Tensor { rows: op.num_single_rows, ..op.items };
        let others = Tensor {
            rows: op.items.rows - op.num_single_rows,
            offset: op.items.offset + op.num_single_rows * op.items.cols,
            ..op.items
        };
        for (items, rows_of_item) in [(singles, 1), (others, ATTENTION_ROWS)] {
            let pairs = rows_of_item * group;
            let (kernel, pairs_of_block) = if on_units {
                let of_block = MatrixPairs::of(pairs);
                (Kernel::AttentionMatrix(cache.kv_type, head_dim, of_block), of_block.count())
            } else {
                (Kernel::Attention(cache.kv_type, head_dim), ATTENTION_PAIRS)
            };
            let pair_blocks = pairs.div_ceil(pairs_of_block);
            let params = AttentionParams {
                q: self.at(op.q),
                k_cache: self.buffer(cache.k),
                v_cache: self.buffer(cache.v),
                items: self.at(items),
                table: self.at(op.table),
                out: self.at(op.out),
                partials: self.at(op.partials),
                pair_blocks,
                num_heads: op.num_heads,
                num_kv_heads: cache.num_kv_heads,
                head_dim: cache.head_dim,
                table_cols: op.table.cols,
                block_size: cache.block_size,
                window: op.window,
                scale: op.scale,
                soft_cap: op.soft_cap,
                pad: 0,
            };
            let blocks = items.rows * cache.num_kv_heads * pair_blocks;
            self.push(kernel, blocks, &params);
        }
        let params = AttentionMergeParams {
            merges: self.at(op.merges),
            partials: self.at(op.partials),
            out: self.at(op.out),
            num_merges: op.merges.rows,
            num_heads: op.num_heads,
            head_dim: cache.head_dim,
            pad: 0,
        };
        let blocks = (op.merges.rows * op.out.cols).div_ceil(128);
        self.push(Kernel::AttentionMerge(cache.kv_type), blocks, &params);
    }

    fn gated_act(&mut self, op: &GatedAct, next: Option<&Op>) {
        let Tensor { rows, cols, .. } = op.out;
        let activation = match op.activation {
            Activation::Silu => 0,
            Activation::GeluTanh => 1,
        };
        let (gate_up, out, halves) = (self.at(op.gate_up), self.at(op.out), self.for_next(op.out, next));
        let params = GatedActParams { gate_up, out, halves, rows, cols, activation, pad: 0 };
        self.push(Kernel::GatedAct, rows * cols.div_ceil(256), &params);
    }

    fn add_norm(&mut self, op: &AddNorm, next: Option<&Op>) {
        let params = AddNormParams {
            x: self.at(op.x),
            y: self.at(op.y),
            post_weight: self.at_some(op.post_weight),
            rows: self.at_some(op.rows),
            weight: self.at(op.weight),
            out: self.at(op.out),
            halves: self.for_next(op.out, next),
            cols: op.x.cols,
            eps: op.eps,
        };
        self.push(Kernel::AddNorm, op.out.rows, &params);
    }

    fn reset_counts(&mut self, op: &ResetCounts) {
        let (resets, tokens, counts) = (self.at(op.resets), self.at(op.tokens), self.at(op.counts));
        let params = ResetCountsParams { resets, tokens, counts, vocab: op.counts.cols, pad: 0 };
        self.push(Kernel::ResetCounts, op.resets.rows, &params);
    }

    /// Slices of rows first, then rows.
    fn sample(&mut self, op: &Sample) {
        let num_slices = op.slices.cols / SLICE_WORDS;
        let params = SampleParams {
            logits: self.at(op.logits),
            rows: self.at(op.rows),
            extras: self.at(op.extras),
            counts: self.at(op.counts),
            slices: self.at(op.slices),
            sampled: self.at(op.sampled),
            chosen: self.at(op.chosen),
            top: self.at(op.top),
            vocab: op.logits.cols,
            num_slices,
            slice_len: SAMPLE_SLICE,
            pad: 0,
        };
        self.push(Kernel::SampleSlices, op.logits.rows * num_slices, &params);
        self.push(Kernel::Sample, op.logits.rows, &params);
    }

    fn mul_add(&mut self, op: &MulAdd) {
        let num_elements = op.x.num_elements();
        let params =
            MulAddParams { x: self.at(op.x), num_elements, scale: op.scale, offset: op.offset, rounds: op.rounds };
        // A sum alone, of what f16 has, is a product of matrices as well.
        let is_sum = op.scale == 1.0 && f16::from_f32(op.offset).to_f32() == op.offset;
        let on_units = self.mat_muls.arithmetic() == Arithmetic::MatrixUnits && is_sum;
        let (kernel, of_block) = match on_units && num_elements.is_multiple_of(MUL_ADD_MATRIX_ELEMENTS) {
            true => (Kernel::MulAddMatrix, MUL_ADD_MATRIX_ELEMENTS),
            false => (Kernel::MulAdd, MUL_ADD_ELEMENTS),
        };
        self.push(kernel, num_elements.div_ceil(of_block), &params);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Weight, WeightFormat, WeightId};

    /// 8B's shapes on a GPU of 132 multiprocessors.
    #[test]
    fn k_is_split_where_columns_leave_multiprocessors_idle_and_its_parts_have_room() {
        let split_k = SplitK { parts: 0, num_multiprocessors: 132 };
        let splits = |rows, num_cols| {
            let variant = if rows > 64 { MatMulVariant::Matrix128 } else { MatMulVariant::Matrix64 };
            let splits = split_k.splits(variant, rows, num_cols, 128);
            let parts = u64::from(splits) * u64::from(rows * num_cols) * 4;
            assert!(splits == 1 || parts <= SplitK::bytes(132), "{rows} x {num_cols}");
            splits
        };
        assert_eq!([splits(16, 4096), splits(64, 4096), splits(64, 6144), splits(64, 28672)], [8, 8, 5, 1]);
        assert_eq!([splits(65, 4096), splits(256, 4096), splits(256, 6144), splits(257, 4096)], [2, 2, 1, 1]);
    }

    /// A product of 32 rows takes what the op before it left, else what one launch makes, else what is still there.
    #[test]
    fn activations_are_made_f16_once() {
        let tensor = |buffer, cols| Tensor { buffer: BufferId(buffer), ..Tensor::f32(BufferId(0), 32, cols) };
        let (x, normed, out) = (tensor(0, 64), tensor(1, 64), tensor(2, 128));
        let weight = Weight { id: WeightId(0), rows: 64, cols: 64, format: WeightFormat::Q4_0 };
        let norm = Op::RmsNorm(RmsNorm { x, weight: Tensor { rows: 1, ..x }, eps: 1e-5, out: normed });
        let product = |x, first_col| Op::MatMul(MatMul { x, weight, bias: None, first_col, out });
        let act = Op::GatedAct(GatedAct { gate_up: out, activation: Activation::Silu, out: tensor(3, 64) });
        for (arithmetic, ops, made) in [
            (Arithmetic::MatrixUnits, vec![norm, product(normed, 0), product(normed, 64)], 0),
            (Arithmetic::MatrixUnits, vec![product(x, 0), product(x, 64), product(normed, 0), product(x, 0)], 3),
            (Arithmetic::MatrixUnits, vec![norm, product(x, 0), act, product(normed, 0)], 2),
            (Arithmetic::F32, vec![norm, product(normed, 0)], 0),
        ] {
            let (mat_muls, out) = (&MatMulTables::new(arithmetic), &mut Vec::new());
            let split_k = SplitK { parts: 0, num_multiprocessors: 4 };
            let (buffers, weights, halves) = (&[1 << 20, 2 << 20, 3 << 20, 4 << 20], &[5 << 20], 6 << 20);
            Encoder { buffers, weights, mat_muls, split_k, halves, in_halves: None, out }.ops(&ops);
            let num_made = out.iter().filter(|encoded| encoded.kernel == Kernel::ToF16).count();
            assert_eq!(num_made, made, "{ops:?}");
        }
    }
}
