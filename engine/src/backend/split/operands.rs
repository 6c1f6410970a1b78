//! An op's tensors, weights and cache under the names that another backend has for them.

use crate::op::{
    AddNorm, Attention, Embed, GatedAct, MatMul, MulAdd, Op, ResetCounts, RmsNorm, RopeKv, Sample, UpdateTable,
};
use crate::tensor::{BufferId, KvTensor, Tensor, Weight};

/// What an op's operands are called elsewhere.
pub(super) trait Names {
    fn buffer(&self, buffer: BufferId) -> BufferId;

    fn weight(&self, weight: Weight) -> Weight;

    fn tensor(&self, tensor: Tensor) -> Tensor {
        Tensor { buffer: self.buffer(tensor.buffer), ..tensor }
    }

    fn maybe(&self, tensor: Option<Tensor>) -> Option<Tensor> {
        tensor.map(|tensor| self.tensor(tensor))
    }

    fn cache(&self, cache: KvTensor) -> KvTensor {
        KvTensor { k: self.buffer(cache.k), v: self.buffer(cache.v), ..cache }
    }
}

pub(super) fn renamed(op: Op, names: &impl Names) -> Op {
    let name = |tensor| names.tensor(tensor);
    match op {
        Op::UpdateTable(op) => Op::UpdateTable(UpdateTable { entries: name(op.entries), table: name(op.table) }),
        Op::Embed(op) => Op::Embed(Embed {
            ids: name(op.ids),
            sampled: name(op.sampled),
            table: names.weight(op.table),
            out: name(op.out),
            ..op
        }),
        Op::RmsNorm(op) => Op::RmsNorm(RmsNorm { x: name(op.x), weight: name(op.weight), out: name(op.out), ..op }),
        Op::MatMul(op) => Op::MatMul(MatMul {
            x: name(op.x),
            weight: names.weight(op.weight),
            bias: names.maybe(op.bias),
            out: name(op.out),
            ..op
        }),
        Op::RopeKv(op) => Op::RopeKv(RopeKv {
            qkv: name(op.qkv),
            norms: names.maybe(op.norms),
            positions: name(op.positions),
            table: name(op.table),
            slots: name(op.slots),
            cache: names.cache(op.cache),
            q: name(op.q),
            ..op
        }),
        Op::Attention(op) => Op::Attention(Attention {
            q: name(op.q),
            cache: names.cache(op.cache),
            items: name(op.items),
            merges: name(op.merges),
            partials: name(op.partials),
            table: name(op.table),
            out: name(op.out),
            ..op
        }),
        Op::GatedAct(op) => Op::GatedAct(GatedAct { gate_up: name(op.gate_up), out: name(op.out), ..op }),
        Op::AddNorm(op) => Op::AddNorm(AddNorm {
            x: name(op.x),
            y: name(op.y),
            post_weight: names.maybe(op.post_weight),
            rows: names.maybe(op.rows),
            weight: name(op.weight),
            out: name(op.out),
            ..op
        }),
        Op::MulAdd(op) => Op::MulAdd(MulAdd { x: name(op.x), ..op }),
        Op::ResetCounts(op) => {
            Op::ResetCounts(ResetCounts { resets: name(op.resets), tokens: name(op.tokens), counts: name(op.counts) })
        }
        Op::Sample(op) => Op::Sample(Sample {
            logits: name(op.logits),
            rows: name(op.rows),
            extras: name(op.extras),
            counts: name(op.counts),
            slices: name(op.slices),
            sampled: name(op.sampled),
            chosen: name(op.chosen),
            top: name(op.top),
        }),
    }
}
