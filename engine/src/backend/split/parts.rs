//! A recording in parts, each some rows of the pass: while one stage is at a part, the stage before it is at the next.
//!
//! Invariant: the parts, one behind the other, compute what the whole does, for every op but attention and those that
//! move whole tables goes row by row. No item of attention is cut, so that parts begin where items do. Tensors stay
//! where they are; only the work lists of attention are put into the order of the parts.

use std::ops::Range;

use crate::op::{
    ATTENTION_ITEM_WORDS, ATTENTION_MERGE_WORDS, AddNorm, Attention, Embed, GatedAct, MatMul, Op, RmsNorm, RopeKv,
    Sample,
};
use crate::recording::Recording;
use crate::tensor::Tensor;

/// How a recording is divided.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// As the recording's, with work lists in the order of the parts.
    pub upload: Vec<u32>,
    /// Token rows and logit rows of each; one entry without rows where the recording stays whole.
    rows: Vec<[Range<u32>; 2]>,
    /// Work lists, each once.
    plans: Vec<Plan>,
}

/// A work list of attention.
#[derive(Debug)]
struct Plan {
    /// Where it lies in the upload.
    offset: u32,
    parts: Vec<PlanPart>,
}

#[derive(Clone, Copy, Debug)]
struct PlanPart {
    items: Tensor,
    num_single_rows: u32,
    merges: Tensor,
}

impl Parts {
    /// `recording` in `most` parts, or as many as its rows make.
    pub fn of(recording: &Recording, most: u32) -> Parts {
        let upload = recording.upload.clone();
        let mut parts = Parts { upload, rows: vec![[0..0, 0..0]], plans: Vec::new() };
        let attentions = recording.ops.iter().filter_map(|op| match op {
            Op::Attention(op) => Some(op),
            _ => None,
        });
        let Some(first) = attentions.clone().next() else { return parts };
        let starts = starts(parts.words(first.items), first.q.rows, most);
        if starts.len() == 1 {
            return parts;
        }
        let logit_rows = recording.ops.iter().find_map(|op| match op {
            Op::AddNorm(AddNorm { rows: Some(rows), .. }) => Some(*rows),
            _ => None,
        });
        let logits: &[u32] = logit_rows.map_or(&[], |rows| parts.words(rows));
        let num_logits_before = |row: u32| logits.partition_point(|&logit_row| logit_row < row) as u32;
        let ends = starts[1..].iter().copied().chain([first.q.rows]);
        let tokens = starts.iter().zip(ends).map(|(&start, end)| start..end);
        let rows = tokens.map(|rows| [rows.clone(), num_logits_before(rows.start)..num_logits_before(rows.end)]);
        parts.rows = rows.collect();
        for op in attentions {
            if parts.plan(op).is_none() {
                let plan = parts.divide(op);
                parts.plans.push(plan);
            }
        }
        parts
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The ops of a part, in order; those that are for no row go with the first.
    pub fn ops(&self, recording: &Recording, part: usize, mut push: impl FnMut(Op)) {
        if self.len() == 1 {
            return recording.ops.iter().copied().for_each(push);
        }
        let [tokens, logits] = &self.rows[part];
        let mut rows = tokens;
        for op in &recording.ops {
            if matches!(op, Op::AddNorm(AddNorm { rows: Some(_), .. }) | Op::Sample(_)) {
                rows = logits;
            }
            match op {
                Op::UpdateTable(_) | Op::ResetCounts(_) if part == 0 => push(*op),
                Op::UpdateTable(_) | Op::ResetCounts(_) => {}
                _ if rows.is_empty() => {}
                Op::Attention(op) => push(Op::Attention(self.attention(op, rows, part))),
                op => push(of_rows(*op, rows)),
            }
        }
    }

    fn attention(&self, op: &Attention, rows: &Range<u32>, part: usize) -> Attention {
        let plan = self.plan(op).expect("every work list is divided");
        let PlanPart { items, num_single_rows, merges } = plan.parts[part];
        Attention { q: slice(op.q, rows), out: slice(op.out, rows), items, num_single_rows, merges, ..*op }
    }

    fn plan(&self, op: &Attention) -> Option<&Plan> {
        self.plans.iter().find(|plan| plan.offset == op.items.offset)
    }

    fn words(&self, tensor: Tensor) -> &[u32] {
        &self.upload[tensor.offset as usize..][..tensor.num_elements() as usize]
    }

    /// Puts a work list into the order of the parts, with rows counted from each part's first.
    fn divide(&mut self, op: &Attention) -> Plan {
        let (item_words, merge_words) = (ATTENTION_ITEM_WORDS as usize, ATTENTION_MERGE_WORDS as usize);
        let (old_items, old_merges) = (self.words(op.items).to_vec(), self.words(op.merges).to_vec());
        let (mut items, mut merges, mut plan_parts) = (Vec::new(), Vec::new(), Vec::new());
        for [rows, _] in &self.rows {
            let (first_item, first_merge) = (items.len() / item_words, merges.len() / merge_words);
            let mut num_single_rows = 0;
            for (index, item) in old_items.chunks_exact(item_words).enumerate() {
                if rows.contains(&item[0]) {
                    items.push(item[0] - rows.start);
                    items.extend_from_slice(&item[1..]);
                    num_single_rows += u32::from((index as u32) < op.num_single_rows);
                }
            }
            for merge in old_merges.chunks_exact(merge_words).filter(|merge| rows.contains(&merge[0])) {
                merges.push(merge[0] - rows.start);
                merges.extend_from_slice(&merge[1..]);
            }
            let items = first_item as u32..(items.len() / item_words) as u32;
            let merges = first_merge as u32..(merges.len() / merge_words) as u32;
            let (items, merges) = (slice(op.items, &items), slice(op.merges, &merges));
            plan_parts.push(PlanPart { items, num_single_rows, merges });
        }
        assert_eq!((items.len(), merges.len()), (old_items.len(), old_merges.len()), "an item of two parts");
        self.upload[op.items.offset as usize..][..items.len()].copy_from_slice(&items);
        self.upload[op.merges.offset as usize..][..merges.len()].copy_from_slice(&merges);
        Plan { offset: op.items.offset, parts: plan_parts }
    }
}

/// Where parts of about as many rows begin, each at an item.
fn starts(items: &[u32], num_rows: u32, most: u32) -> Vec<u32> {
    let mut starts = vec![0];
    for part in 1..most {
        let aim = (u64::from(num_rows) * u64::from(part)).div_ceil(u64::from(most)) as u32;
        let first_rows = items.chunks_exact(ATTENTION_ITEM_WORDS as usize).map(|item| item[0]);
        let nearest = first_rows.min_by_key(|row| row.abs_diff(aim)).expect("rows have items");
        if nearest > *starts.last().expect("the first is there") {
            starts.push(nearest);
        }
    }
    starts
}

fn slice(tensor: Tensor, rows: &Range<u32>) -> Tensor {
    assert!(rows.start <= rows.end && rows.end <= tensor.rows, "{rows:?} of {tensor:?}");
    Tensor { offset: tensor.offset + rows.start * tensor.cols, rows: rows.end - rows.start, ..tensor }
}

/// `op` for some of its rows.
fn of_rows(op: Op, rows: &Range<u32>) -> Op {
    let of = |tensor| slice(tensor, rows);
    match op {
        Op::Embed(op) => Op::Embed(Embed { ids: of(op.ids), out: of(op.out), ..op }),
        Op::RmsNorm(op) => Op::RmsNorm(RmsNorm { x: of(op.x), out: of(op.out), ..op }),
        Op::MatMul(op) => Op::MatMul(MatMul { x: of(op.x), out: of(op.out), ..op }),
        Op::RopeKv(op) => {
            Op::RopeKv(RopeKv { qkv: of(op.qkv), positions: of(op.positions), slots: of(op.slots), q: of(op.q), ..op })
        }
        Op::GatedAct(op) => Op::GatedAct(GatedAct { gate_up: of(op.gate_up), out: of(op.out), ..op }),
        // It says by itself which rows of the stream it takes.
        Op::AddNorm(op @ AddNorm { rows: Some(all), .. }) => {
            Op::AddNorm(AddNorm { rows: Some(of(all)), out: of(op.out), ..op })
        }
        Op::AddNorm(op) => Op::AddNorm(AddNorm { x: of(op.x), y: of(op.y), out: of(op.out), ..op }),
        Op::Sample(op) => Op::Sample(Sample {
            logits: of(op.logits),
            rows: of(op.rows),
            slices: of(op.slices),
            chosen: of(op.chosen),
            top: of(op.top),
            ..op
        }),
        Op::UpdateTable(_) | Op::ResetCounts(_) | Op::Attention(_) => unreachable!("not row by row"),
        Op::MulAdd(_) => unreachable!("no model has it"),
    }
}
