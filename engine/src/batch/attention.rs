//! A step's attention as a work list: one for each window that layers have, made once for all of them.
//!
//! Invariant: every row is in the items of one list exactly once at each position that it sees, a row that is alone in
//! its slice before all others, and a list is at most `MAX_SPLIT_ITEMS` longer than there are rows. Which rows are
//! spread over several items changes no bit of them (see [`ATTENTION_CUT`]); it is decided here by shape alone. This
//! file knows no device.

use std::ops::Range;

use crate::op::{ATTENTION_CUT, ATTENTION_ITEM_WORDS, ATTENTION_ROWS, ATTENTION_TILE, NONE};

/// Workgroups, one an item and KV head, that keep a large device busy: with fewer, long contexts are split.
const MIN_WORKGROUPS: u32 = 512;
/// Items that splitting adds at most.
pub const MAX_SPLIT_ITEMS: u32 = MIN_WORKGROUPS;
/// Partial results that there is room for, if a few sequences can be long enough to have so many.
const MAX_PARTIALS: u32 = 512;

/// What plans depend on beside the batch; fixed when a model is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionLimits {
    /// The distinct windows of a model's layers, 0 for none. A plan each.
    pub windows: Vec<u32>,
    pub num_kv_heads: u32,
    /// QueryRows of `op::Attention::partials`.
    pub num_partials: u32,
}

impl AttentionLimits {
    /// Partial results that a step can have: those of every sequence at its longest, or what is worth having.
    pub fn num_partials(max_model_len: u32, max_num_seqs: u32) -> u32 {
        let of_one = max_model_len.div_ceil(ATTENTION_CUT);
        of_one.saturating_mul(max_num_seqs).min(MAX_PARTIALS.max(of_one))
    }
}

/// Consecutive positions of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryRows {
    pub first_row: u32,
    pub num_rows: u32,
    /// Row of the block table.
    pub slot: u32,
    /// Of the first row.
    pub position: u32,
}

/// Cleared and refilled each step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttentionPlan {
    /// (items, `ATTENTION_ITEM_WORDS`), as `op::Attention` states.
    pub items: Vec<u32>,
    /// Items, from the first, that have one row.
    pub num_single_rows: u32,
    /// (split rows, `ATTENTION_MERGE_WORDS`), as `op::Attention` states.
    pub merges: Vec<u32>,
}

impl AttentionPlan {
    pub fn fill(&mut self, slices: impl Iterator<Item = QueryRows> + Clone, window: u32, limits: &AttentionLimits) {
        self.items.clear();
        self.merges.clear();
        let cuts_per_item = cuts_per_item(slices.clone(), window, limits.num_kv_heads);
        let mut num_partials = 0;
        for row in slices.clone().filter(|slice| slice.num_rows == 1) {
            let seen = seen(&row, window);
            let cuts = cuts(&seen);
            let num_cuts = cuts.end - cuts.start;
            if num_cuts > cuts_per_item && num_partials + num_cuts <= limits.num_partials {
                self.split(row, &seen, cuts_per_item, num_partials);
                num_partials += num_cuts;
            } else {
                self.push(row, seen, NONE);
            }
        }
        self.num_single_rows = self.items.len() as u32 / ATTENTION_ITEM_WORDS;
        for slice in slices.filter(|slice| slice.num_rows > 1) {
            for first in (0..slice.num_rows).step_by(ATTENTION_ROWS as usize) {
                let (first_row, position) = (slice.first_row + first, slice.position + first);
                let num_rows = ATTENTION_ROWS.min(slice.num_rows - first);
                let item = QueryRows { first_row, num_rows, position, ..slice };
                self.push(item, seen(&item, window), NONE);
            }
        }
    }

    fn split(&mut self, item: QueryRows, seen: &Range<u32>, cuts_per_item: u32, first_partial: u32) {
        let cuts = cuts(seen);
        for first in cuts.clone().step_by(cuts_per_item as usize) {
            let begin = seen.start.max(first * ATTENTION_CUT);
            let end = seen.end.min((first + cuts_per_item) * ATTENTION_CUT);
            self.push(item, begin..end, first_partial + first - cuts.start);
        }
        self.merges.extend([item.first_row, first_partial, cuts.end - cuts.start]);
    }

    fn push(&mut self, item: QueryRows, seen: Range<u32>, partial: u32) {
        let QueryRows { first_row, num_rows, slot, position } = item;
        self.items.extend([first_row, num_rows, slot, position, seen.start, seen.end, partial]);
    }
}

/// How many cuts an item takes at most where rows are split; the largest number where none is.
fn cuts_per_item(slices: impl Iterator<Item = QueryRows>, window: u32, num_kv_heads: u32) -> u32 {
    let (mut num_items, mut num_cuts) = (0, 0);
    for slice in slices {
        num_items += slice.num_rows.div_ceil(ATTENTION_ROWS);
        if slice.num_rows == 1 {
            let cuts = cuts(&seen(&slice, window));
            num_cuts += cuts.end - cuts.start;
        }
    }
    match MIN_WORKGROUPS.div_ceil(num_kv_heads).saturating_sub(num_items) {
        0 => u32::MAX,
        spare => num_cuts.div_ceil(spare).max(1),
    }
}

/// From the first tile that the first row sees to the last position that the last one does.
fn seen(rows: &QueryRows, window: u32) -> Range<u32> {
    let first = if window == 0 { 0 } else { (rows.position + 1).saturating_sub(window) };
    first / ATTENTION_TILE * ATTENTION_TILE..rows.position + rows.num_rows
}

fn cuts(seen: &Range<u32>) -> Range<u32> {
    seen.start / ATTENTION_CUT..seen.end.div_ceil(ATTENTION_CUT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::ATTENTION_MERGE_WORDS;

    /// Seeded; below `limit`.
    fn draws(seed: u32) -> impl FnMut(u32) -> u32 {
        let mut state = seed;
        move |limit| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((u64::from(state >> 4) * u64::from(limit)) >> 28) as u32
        }
    }

    /// Decodes, then chunks, some of them of one row, of random lengths and positions.
    fn batch(draw: &mut impl FnMut(u32) -> u32) -> Vec<QueryRows> {
        let mut first_row = 0;
        let num_decodes = draw(20);
        let max_position = [40, 300, 5000, 100_000][draw(4) as usize];
        (0..1 + num_decodes + draw(4))
            .map(|slot| {
                let num_rows = if slot < num_decodes || draw(3) == 0 { 1 } else { 1 + draw(40) };
                let rows = QueryRows { first_row, num_rows, slot, position: draw(max_position) };
                first_row += num_rows;
                rows
            })
            .collect()
    }

    #[test]
    fn every_row_is_planned_once_at_each_position_that_it_sees() {
        let mut draw = draws(3);
        let mut plan = AttentionPlan::default();
        let mut num_split = 0;
        for _ in 0..400 {
            let slices = batch(&mut draw);
            let window = [0, 0, 20, 700][draw(4) as usize];
            let limits = AttentionLimits { windows: vec![window], num_kv_heads: 1 + draw(8), num_partials: draw(600) };
            plan.fill(slices.iter().copied(), window, &limits);
            let items: Vec<&[u32]> = plan.items.chunks_exact(ATTENTION_ITEM_WORDS as usize).collect();
            let mut items = items.iter();
            let mut merges = plan.merges.chunks_exact(ATTENTION_MERGE_WORDS as usize);
            let mut next_partial = 0;
            let (singles, others): (Vec<&QueryRows>, Vec<&QueryRows>) =
                slices.iter().partition(|slice| slice.num_rows == 1);
            for slice in singles.into_iter().chain(others) {
                let mut row = 0;
                while row < slice.num_rows {
                    let item = items.next().expect("an item for each row");
                    let num_rows = item[1];
                    let position = slice.position + row;
                    assert_eq!(item[..4], [slice.first_row + row, num_rows, slice.slot, position]);
                    let first = if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
                    assert_eq!(item[4], first / ATTENTION_TILE * ATTENTION_TILE, "the first tile that is seen");
                    let (mut end, mut partial) = (item[5], item[6]);
                    if partial != NONE {
                        num_split += 1;
                        let begin = item[4] / ATTENTION_CUT;
                        let merge = merges.next().expect("a merge for each split row");
                        let num_cuts = (position / ATTENTION_CUT) + 1 - begin;
                        assert_eq!((num_rows, merge), (1, &[slice.first_row, next_partial, num_cuts][..]));
                        assert_eq!(partial, next_partial);
                        while end <= position {
                            let item = items.next().expect("the rest of the row");
                            assert_eq!((item[0], item[1], item[4]), (slice.first_row, 1, end), "where the last ended");
                            assert!(end % ATTENTION_CUT == 0 && item[5] > end, "whole cuts");
                            (end, partial) = (item[5], item[6]);
                            assert_eq!(partial, next_partial + item[4] / ATTENTION_CUT - begin);
                        }
                        next_partial += num_cuts;
                    }
                    assert_eq!(end, position + num_rows, "as far as the last row sees");
                    assert!((1..=ATTENTION_ROWS).contains(&num_rows));
                    row += num_rows;
                }
                assert_eq!(row, slice.num_rows);
            }
            assert!(items.next().is_none() && merges.next().is_none() && next_partial <= limits.num_partials);
            let num_whole: u32 = slices.iter().map(|slice| slice.num_rows.div_ceil(ATTENTION_ROWS)).sum();
            assert!(plan.items.len() as u32 / ATTENTION_ITEM_WORDS <= num_whole + MAX_SPLIT_ITEMS);
            let leading = plan.items.chunks_exact(ATTENTION_ITEM_WORDS as usize).take_while(|item| item[1] == 1);
            assert_eq!(plan.num_single_rows as usize, leading.count());
        }
        assert!(num_split > 1000, "{num_split} split rows are too few to say anything");
    }

    #[test]
    fn long_contexts_are_split_while_the_batch_is_small() {
        let mut plan = AttentionPlan::default();
        let limits = AttentionLimits { windows: vec![0], num_kv_heads: 8, num_partials: 512 };
        let mut num_items = |num_seqs: u32, position: u32| {
            let row = |slot| QueryRows { first_row: slot, num_rows: 1, slot, position };
            plan.fill((0..num_seqs).map(row), 0, &limits);
            (plan.items.len() as u32 / ATTENTION_ITEM_WORDS, plan.merges.len() as u32 / ATTENTION_MERGE_WORDS)
        };
        assert_eq!(num_items(1, ATTENTION_CUT - 1), (1, 0));
        assert_eq!(num_items(1, ATTENTION_CUT), (2, 1));
        // 512 workgroups, 8 an item, less the item that was there.
        assert_eq!(num_items(1, 100 * ATTENTION_CUT), (51, 1));
        assert_eq!(num_items(64, 100 * ATTENTION_CUT), (64, 0));
    }
}
