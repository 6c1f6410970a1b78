//! Products, and the norm that may end one: which kernel takes which rows, and whether K goes to one workgroup or to
//! several, whose sums another dispatch adds up, or the norm itself.
//!
//! Invariant: whatever is chosen, the same additions in the same order, but by matrix units.

use fullbore_shaders::{MatMulVariant, num_spans, span_units};

use super::{Encoder, WEIGHT_ROWS};
use crate::backend::packing::UNIT;
use crate::backend::wgpu::params::{AddNormParams, MatMulParams, MatMulSumParams};
use crate::backend::wgpu::pipelines::Kernel;
use crate::op::{AddNorm, MatMul};
use crate::tensor::BufferId;
use crate::tuning::MatMulShape;

/// Where workgroups that share a product leave their sums until they are added up.
#[derive(Clone, Copy, Debug)]
pub struct Partials {
    pub buffer: BufferId,
    /// f32 that have room.
    pub num_elements: u32,
}

/// So many rows at least stay in one dispatch.
const MIN_CUT_ROWS: u32 = 64;

/// Before a norm, which adds up sums as it reads them, workgroups share K where up to so many rows make at most so many
/// of them, which would leave a large device half empty: the fewer rows, the less sums weigh beside the weights.
const SHARING: [(u32, u32); 2] = [(4, 511), (64, 128)];

/// Some rows of a product.
struct Part {
    variant: MatMulVariant,
    spreads: bool,
    first_row: u32,
    end_row: u32,
}

/// What is to be added up: `num` matrices, `stride` elements from one to the next.
#[derive(Clone, Copy)]
struct Summands {
    buffer: BufferId,
    offset: u32,
    num: u32,
    stride: u32,
}

impl Encoder<'_> {
    pub(super) fn mat_mul(&mut self, op: &MatMul) {
        let mut first_row = 0;
        while first_row < op.x.rows {
            let part = self.part(op, first_row);
            first_row = part.end_row;
            let partials = self.partials_of(op, &part);
            self.product(op, &part, partials);
            if let Some(partials) = partials {
                self.sum(op, &part, partials);
            }
        }
    }

    pub(super) fn add_norm(&mut self, op: &AddNorm) {
        self.add_norm_of(op, Summands { buffer: op.y.buffer, offset: op.y.offset, num: 1, stride: 0 });
    }

    /// Both at once, where workgroups share the product and the norm can add up their sums. Whether it has. A table
    /// that was set for the weight knows best whether they are to.
    pub(super) fn mat_mul_add_norm(&mut self, product: &MatMul, norm: &AddNorm) -> bool {
        let is_all = product.out.cols == product.weight.rows && product.bias.is_none();
        if norm.y != product.out || !is_all {
            return false;
        }
        let mut part = self.part(product, 0);
        let (rows, columns) = (part.variant.rows(), part.variant.columns());
        let num_workgroups = product.weight.rows.div_ceil(columns) * product.x.rows.div_ceil(rows);
        let is_few = |&(max_rows, max): &(u32, u32)| product.x.rows <= max_rows && num_workgroups <= max;
        part.spreads |= part.variant.can_spread()
            && SHARING.iter().any(is_few)
            && self.mat_muls.is_own(MatMulShape::of(product.weight));
        match self.partials_of(product, &part) {
            Some(partials) if part.end_row == product.x.rows => {
                self.product(product, &part, Some(partials));
                self.add_norm_of(norm, partials);
                true
            }
            _ => false,
        }
    }

    /// From `first_row` on, by the table of the weight's shape; many rows in several dispatches, where one would be too
    /// much.
    fn part(&self, op: &MatMul, first_row: u32) -> Part {
        let row_work = u64::from(op.weight.rows) * u64::from(op.weight.cols);
        let max_rows = u32::try_from(self.max_work / row_work.max(1)).unwrap_or(u32::MAX).max(MIN_CUT_ROWS);
        let left = op.x.rows - first_row;
        let mut choices = self.mat_muls.of(MatMulShape::of(op.weight)).iter();
        let choice = choices.find(|choice| choice.max_rows >= left).expect("the last line takes any number");
        let rows = choice.variant.rows();
        let taken = match choice.takes(left) {
            all if all <= max_rows => all,
            // One tile at the least, of which there may be fewer rows left.
            _ => (max_rows / rows * rows).max(rows).min(left),
        };
        Part { variant: choice.variant, spreads: choice.spreads, first_row, end_row: first_row + taken }
    }

    /// Where the sums of the spans go, if workgroups are to share K and there is room.
    fn partials_of(&self, op: &MatMul, part: &Part) -> Option<Summands> {
        let Partials { buffer, num_elements } = self.partials.filter(|_| part.spreads && part.first_row == 0)?;
        let (num, stride) = (num_spans(op.x.cols.div_ceil(UNIT)), part.end_row.checked_mul(op.weight.rows)?);
        let fits = num.checked_mul(stride).is_some_and(|needed| needed <= num_elements);
        (num > 1 && fits).then_some(Summands { buffer, offset: 0, num, stride })
    }

    fn product(&mut self, op: &MatMul, part: &Part, partials: Option<Summands>) {
        let &Part { variant, first_row, end_row, .. } = part;
        let row_tiles = (end_row - first_row).div_ceil(variant.rows());
        let num_units = op.x.cols.div_ceil(UNIT);
        let bias = op.bias.filter(|_| partials.is_none());
        let (out, out_offset, cols) = match partials {
            Some(partials) => (partials.buffer, partials.offset, op.weight.rows),
            None => (op.out.buffer, op.out.offset + op.first_col, op.out.cols),
        };
        let span_groups = partials.map_or(1, |partials| partials.num);
        for shard in self.shards(op.weight) {
            let read = bias.unwrap_or(op.x);
            let params = MatMulParams {
                x: op.x.offset,
                bias: read.offset,
                out: out_offset,
                has_bias: u32::from(bias.is_some()),
                first_row,
                num_rows: end_row,
                inner: op.x.cols,
                num_units,
                cols,
                first_col: shard.first_row,
                shard_cols: shard.num_rows,
                row_tiles,
                span_units: span_units(num_units),
                group_spans: if partials.is_some() { 1 } else { num_spans(num_units) },
                span_groups,
                partial_stride: partials.map_or(0, |partials| partials.stride),
            };
            let column_tiles = shard.num_rows.div_ceil(variant.columns());
            let read_rows = u64::from(end_row - first_row) + WEIGHT_ROWS;
            let work = read_rows * u64::from(op.x.cols) * u64::from(shard.num_rows);
            let kernel = Kernel::MatMul(op.weight.format, variant);
            let buffers = [op.x.buffer, shard.buffer, read.buffer, out];
            self.push_work(kernel, &buffers, &params, column_tiles * row_tiles * span_groups, work);
        }
    }

    fn sum(&mut self, op: &MatMul, part: &Part, partials: Summands) {
        let params = MatMulSumParams {
            partials: partials.offset,
            bias: op.bias.map_or(0, |bias| bias.offset),
            out: op.out.offset + op.first_col,
            has_bias: u32::from(op.bias.is_some()),
            num_rows: part.end_row,
            num_cols: op.weight.rows,
            cols: op.out.cols,
            num_partials: partials.num,
            partial_stride: partials.stride,
        };
        let bias = op.bias.map_or(partials.buffer, |bias| bias.buffer);
        self.push_elements(Kernel::MatMulSum, &[partials.buffer, bias, op.out.buffer], &params, partials.stride);
    }

    fn add_norm_of(&mut self, op: &AddNorm, y: Summands) {
        let post_weight = op.post_weight.unwrap_or(op.weight);
        let rows = op.rows.unwrap_or(op.weight);
        let [x, post, asked, weight, out] = [op.x, post_weight, rows, op.weight, op.out].map(|tensor| tensor.buffer);
        let params = AddNormParams {
            x: op.x.offset,
            y: y.offset,
            post_weight: post_weight.offset,
            rows: rows.offset,
            weight: op.weight.offset,
            out: op.out.offset,
            has_post: u32::from(op.post_weight.is_some()),
            has_rows: u32::from(op.rows.is_some()),
            num_rows: op.out.rows,
            cols: op.out.cols,
            eps: op.eps,
            num_partials: y.num,
            partial_stride: y.stride,
        };
        self.push(Kernel::AddNorm, &[x, y.buffer, post, asked, weight, out], &params, op.out.rows);
    }
}
