//! Cases of `sample` and of the counts that it reads: rows of every kind in one op.

use super::device::Device;
use super::random::Random;
use super::{Case, Output};
use crate::backend::DeviceError;
use crate::op::{
    CHOSEN_WORDS, IN_PROMPT, MAX_TOP, NON_FINITE, NONE, Op, ResetCounts, SAMPLE_ROW_WORDS, Sample, SampleRow,
    UpdateTable, slice_cols,
};

/// Each filter and each adjustment alone and together, ties, masks, broken rows.
pub fn sample(vocab: u32) -> Case {
    Case::new("sample", "", format!("of {vocab}"), move |device| outputs(device, vocab))
}

fn outputs(device: &mut Device, vocab: u32) -> Result<Vec<Output>, DeviceError> {
    let random = &mut Random::new(7);
    let (rows, mut logits, extras) = sample_rows(vocab, random);
    for (index, value) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY)] {
        logits[index * vocab as usize + vocab as usize - 1 - index] = value;
    }
    (3..5).for_each(|at| logits[3 * vocab as usize + at] = 50.0);
    logits[4 * vocab as usize..5 * vocab as usize].fill(-3.0);
    let op = sampling(device, &logits, vocab, &rows, &extras)?;
    let Sample { counts, sampled, chosen, top, .. } = op;
    let num_slots = counts.rows;
    let resets: Vec<u32> = (0..num_slots).flat_map(|slot| [slot, slot % 4, 4 + slot % 3, 14]).collect();
    let resets = device.u32(num_slots, 4, &resets)?;
    let tokens: Vec<u32> = (0..14).map(|i| [3, 8, 3, i, 30][i as usize % 5] % vocab).collect();
    let tokens = device.u32(14, 1, &tokens)?;
    // Counts that were there before are cleared.
    let dirt = device.u32(3, 2, &[5, 9, vocab + 3, IN_PROMPT | 7, 2 * vocab, 1])?;
    let ops = [
        Op::UpdateTable(UpdateTable { entries: dirt, table: counts }),
        Op::ResetCounts(ResetCounts { resets, tokens, counts }),
        Op::Sample(op),
    ];
    let words = device.run(&ops, &[counts, sampled, chosen, top])?;
    let (counts, words) = words.split_at((num_slots * vocab) as usize);
    let (sampled, words) = words.split_at(num_slots as usize);
    let (chosen, top) = words.split_at(chosen.num_elements() as usize);
    let ids_and_ranks = chosen.chunks_exact(4).flat_map(|row| [row[0], row[2], row[3]]).collect();
    let written = |row: &usize| rows[*row].logprobs > 0 && chosen[4 * row] != NON_FINITE;
    let logprobs = (0..rows.len()).filter(written).map(|row| chosen[4 * row + 1]).collect();
    let tops: Vec<(u32, u32)> = top.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let top_ids = tops.iter().map(|(id, _)| *id).collect();
    let top_logprobs = tops.iter().filter(|(id, logprob)| (*id, *logprob) != (99, 99)).map(|(_, bits)| *bits).collect();
    let outputs: [(&str, Vec<u32>, f32); 6] = [
        ("counts", counts.to_vec(), 0.0),
        ("sampled", sampled.to_vec(), 0.0),
        ("ids and ranks", ids_and_ranks, 0.0),
        ("logprobs", logprobs, 1e-6),
        ("top ids", top_ids, 0.0),
        ("top logprobs", top_logprobs, 1e-6),
    ];
    Ok(outputs.into_iter().map(|(name, words, tolerance)| Output { name, words, tolerance }).collect())
}

/// An `Op::Sample` over `rows`, with fresh state: a slot for each that is named.
pub fn sampling(
    device: &mut Device,
    logits: &[f32],
    vocab: u32,
    rows: &[SampleRow],
    extras: &[u32],
) -> Result<Sample, DeviceError> {
    let num_rows = rows.len() as u32;
    let num_slots = rows.iter().map(|row| row.slot.wrapping_add(1)).max().unwrap_or(0).max(1);
    let mut filled = |rows, cols, with| device.u32(rows, cols, &vec![with; (rows * cols) as usize]);
    let (counts, slices) = (filled(num_slots, vocab, 0)?, filled(num_rows, slice_cols(vocab), 66)?);
    let (sampled, chosen) = (filled(num_slots, 1, 77)?, filled(num_rows, CHOSEN_WORDS, 88)?);
    let top = filled(num_rows, 2 * MAX_TOP, 99)?;
    let logits = device.f32(num_rows, vocab, logits)?;
    let rows = device.u32(num_rows, SAMPLE_ROW_WORDS, bytemuck::cast_slice(rows))?;
    // A buffer has at least one word.
    let extras = [extras, &[0]].concat();
    let extras = device.u32(extras.len() as u32, 1, &extras)?;
    Ok(Sample { logits, rows, extras, counts, slices, sampled, chosen, top })
}

/// Five rows that the caller spoils, an idle one, and rows with one, two or all parameters drawn at random.
fn sample_rows(vocab: u32, random: &mut Random) -> (Vec<SampleRow>, Vec<f32>, Vec<u32>) {
    let mut rows = Vec::new();
    let mut extras = vec![u32::MAX; 3];
    let greedy = SampleRow { logprobs: 1, ..SampleRow::IDLE };
    rows.extend([greedy; 5]);
    rows.extend((0..40).map(|index| drawn_row(index, vocab, random, &mut extras)));
    rows.push(SampleRow::IDLE);
    // A mask that allows nothing.
    rows.push(SampleRow { mask_at: extras.len() as u32, temperature: 1.0, top_p: 0.5, logprobs: 3, ..SampleRow::IDLE });
    extras.extend(vec![0; vocab.div_ceil(32) as usize]);
    // Slots from the last down; the first is nobody's.
    let choosing: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].target == NONE && *row != 45).collect();
    for (nth, row) in choosing.iter().enumerate() {
        rows[*row].slot = (choosing.len() - nth) as u32;
    }
    let logits = random.floats(rows.len() * vocab as usize).iter().map(|value| value * 8.0).collect();
    (rows, logits, extras)
}

fn drawn_row(index: u32, vocab: u32, random: &mut Random, extras: &mut Vec<u32>) -> SampleRow {
    let mut row = SampleRow { position: random.below(5000), logprobs: random.below(22), ..SampleRow::IDLE };
    row.seed = [random.next() as u32, random.below(3)];
    // Each bit switches one parameter on.
    let on = if index < 10 { 1 << index } else { random.next() as u32 & 1023 };
    let is_on = |bit: u32| on >> bit & 1 == 1;
    let draws = (0..4).any(is_on) || random.one_in(2);
    row.temperature = if draws { [0.3, 1.0, 1.7][random.below(3) as usize] } else { 0.0 };
    row.top_k = if is_on(1) { 1 + random.below(40) } else { 0 };
    row.top_p = if is_on(2) { 0.3 + 0.65 * random.unit().abs() } else { 1.0 };
    row.min_p = if is_on(3) { 0.02 + 0.3 * random.unit().abs() } else { 0.0 };
    row.presence = if is_on(4) { 1.5 * random.unit() } else { 0.0 };
    row.frequency = if is_on(5) { random.unit() } else { 0.0 };
    row.repetition = if is_on(6) { 1.0 + 0.6 * random.unit() } else { 1.0 };
    if is_on(7) {
        let mut tokens: Vec<u32> = (0..1 + random.below(30)).map(|_| random.below(vocab)).collect();
        tokens.sort_unstable();
        tokens.dedup();
        (row.bias_at, row.num_biases) = (extras.len() as u32, tokens.len() as u32);
        extras.extend(tokens.iter().flat_map(|token| [*token, (6.0 * random.unit()).to_bits()]));
    }
    if is_on(8) {
        row.mask_at = extras.len() as u32;
        extras.extend((0..vocab.div_ceil(32)).map(|_| random.next() as u32 & random.next() as u32));
    }
    if is_on(9) && index.is_multiple_of(3) {
        row = SampleRow { target: random.below(vocab), logprobs: 1 + random.below(21), ..SampleRow::IDLE };
    }
    row
}
