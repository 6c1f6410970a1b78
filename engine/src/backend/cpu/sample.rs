//! A token from each row of logits, and log-probabilities where they are asked.
//!
//! Both cuts that need an order (top-k by count, top-p by mass) are one selection: the key from which on the weights of
//! all larger ones reach a sum. Masses are integers, so a sum does not depend on its order; the shader selects the same
//! way. Rows go in parallel; a row's choice depends on nothing outside of it.

use std::borrow::Cow;

use rayon::prelude::*;

use super::Memory;
use crate::op::{CHOSEN_WORDS, IN_PROMPT, MAX_TOP, NON_FINITE, NONE, Sample, SampleRow};

pub(super) fn run(op: Sample, memory: &mut Memory) {
    let vocab = op.logits.cols as usize;
    let rows: Vec<SampleRow> = bytemuck::cast_slice(memory.u32(op.rows)).to_vec();
    let (extras, counts) = (memory.u32(op.extras), memory.u32(op.counts));
    let outcomes = rows.par_iter().zip(memory.f32(op.logits).par_chunks_exact(vocab)).map(|(row, logits)| {
        let counts = if row.is_penalised() { &counts[row.slot as usize * vocab..][..vocab] } else { &[] };
        (!row.is_idle()).then(|| sample(row, logits, extras, counts))
    });
    let outcomes: Vec<Option<Outcome>> = outcomes.collect();
    let done = || outcomes.iter().enumerate().filter_map(|(index, outcome)| Some((index, outcome.as_ref()?)));
    memory.write_u32(op.sampled, |_, sampled| {
        done().filter(|(index, _)| rows[*index].slot != NONE).for_each(|(index, outcome)| {
            sampled[rows[index].slot as usize] = outcome.id;
        });
    });
    memory.write_u32(op.counts, |_, counts| {
        let counted = |(index, outcome): &(usize, &Outcome)| rows[*index].is_penalised() && outcome.id != NON_FINITE;
        done().filter(counted).for_each(|(index, outcome)| {
            counts[rows[index].slot as usize * vocab + outcome.id as usize] += 1;
        });
    });
    memory.write_u32(op.chosen, |_, chosen| {
        for (index, Outcome { id, logprob, rank, .. }) in done() {
            let words = &mut chosen[index * CHOSEN_WORDS as usize..][..CHOSEN_WORDS as usize];
            words.copy_from_slice(&[*id, logprob.to_bits(), *rank, 0]);
        }
    });
    memory.write_u32(op.top, |_, top| {
        for (index, outcome) in done() {
            let words = top[index * 2 * MAX_TOP as usize..].chunks_exact_mut(2);
            words.zip(&outcome.top).for_each(|(words, (id, logprob))| {
                words.copy_from_slice(&[*id, logprob.to_bits()]);
            });
        }
    });
}

/// What is known of a row; log-probabilities are 0 where they are not asked.
pub(in crate::backend) struct Outcome {
    pub id: u32,
    pub logprob: f32,
    pub rank: u32,
    pub top: Vec<(u32, f32)>,
}

/// `counts` is the row of the slot, if penalties are asked.
fn sample(row: &SampleRow, logits: &[f32], extras: &[u32], counts: &[u32]) -> Outcome {
    let finite = logits.iter().fold(true, |finite, logit| finite & logit.is_finite());
    let id = match row.target {
        _ if !finite => NON_FINITE,
        NONE => choose(row, &adjusted(row, logits, extras, counts)),
        target => target,
    };
    match row.logprobs {
        asked if asked > 0 && id != NON_FINITE => log_probabilities(logits, id, row.num_top(logits.len() as u32)),
        _ => Outcome { id, logprob: 0.0, rank: 0, top: Vec::new() },
    }
}

/// Logits after bias and penalties; minus infinity for what the mask forbids.
fn adjusted<'a>(row: &SampleRow, logits: &'a [f32], extras: &[u32], counts: &[u32]) -> Cow<'a, [f32]> {
    if row.num_biases == 0 && !row.is_penalised() && row.mask_at == NONE {
        return Cow::Borrowed(logits);
    }
    let mut adjusted = logits.to_vec();
    for pair in extras[row.bias_at as usize..].chunks_exact(2).take(row.num_biases as usize) {
        adjusted[pair[0] as usize] += f32::from_bits(pair[1]);
    }
    for (logit, &count) in adjusted.iter_mut().zip(counts).filter(|(_, count)| **count != 0) {
        let generated = count & !IN_PROMPT;
        let presence = if generated > 0 { row.presence } else { 0.0 };
        *logit *= if *logit > 0.0 { 1.0 / row.repetition } else { row.repetition };
        *logit = (*logit - (row.frequency * generated as f32 + presence)).clamp(f32::MIN, f32::MAX);
    }
    if row.mask_at != NONE {
        let mask = &extras[row.mask_at as usize..];
        for (id, logit) in adjusted.iter_mut().enumerate() {
            if mask[id / 32] >> (id % 32) & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    Cow::Owned(adjusted)
}

/// A token by adjusted logits.
fn choose(row: &SampleRow, logits: &[f32]) -> u32 {
    let largest = largest(logits);
    let best = logits.iter().position(|logit| *logit == largest).map_or(0, |index| index as u32);
    match row.temperature {
        _ if largest == f32::NEG_INFINITY => NON_FINITE,
        0.0 => best,
        _ => race(row, logits, best, least_kept(row, logits, largest)),
    }
}

fn largest(logits: &[f32]) -> f32 {
    // Sixteen at a time, for the vector unit.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let parts = logits.chunks_exact(16);
    let rest = parts.remainder();
    for part in parts {
        lanes.iter_mut().zip(part).for_each(|(lane, logit)| *lane = if *logit > *lane { *logit } else { *lane });
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The least logit that passes top-k, top-p and min-p.
fn least_kept(row: &SampleRow, logits: &[f32], largest: f32) -> f32 {
    let mut least = f32::NEG_INFINITY;
    if row.top_k > 0 && (row.top_k as usize) < logits.len() {
        let ones = logits.iter().map(|logit| (key(*logit), 1));
        least = value(select(ones, row.top_k));
    }
    if row.top_p < 1.0 {
        let weight = |logit: &f32| (*logit, weight((*logit - largest) / row.temperature));
        let mut weights: Vec<(f32, f32)> = logits.iter().map(weight).filter(|(_, weight)| *weight > 0.0).collect();
        let unit = (MASS_ONE / weights.iter().map(|(_, weight)| f64::from(*weight)).sum::<f64>()) as f32;
        weights.retain(|(logit, _)| *logit >= least);
        let masses = weights.iter().map(|(logit, weight)| (key(*logit), (weight * unit + 0.5) as u32));
        let total: u32 = masses.clone().map(|(_, mass)| mass).sum();
        let wanted = (row.top_p * total as f32).ceil() as u32;
        least = least.max(value(select(masses, wanted.clamp(1, total))));
    }
    if row.min_p > 0.0 {
        least = least.max(largest + row.temperature * row.min_p.ln());
    }
    least
}

/// The mass of a whole row.
const MASS_ONE: f64 = (1u64 << 31) as f64;

/// `exp(x)`, but 0 where that would be no mass.
fn weight(x: f32) -> f32 {
    if x < -23.0 { 0.0 } else { x.exp() }
}

/// The largest key such that the weights of it and all larger ones sum to at least `wanted`; 0 if no sum does. A radix
/// search from the top bits down.
fn select(items: impl Iterator<Item = (u32, u32)> + Clone, wanted: u32) -> u32 {
    let (mut found, mut left) = (0, wanted);
    for (shift, bits) in [(21, 11), (10, 11), (0, 10)] {
        let mut sums = vec![0u32; 1 << bits];
        for (key, weight) in items.clone().filter(|(key, _)| u64::from(*key) >> (shift + bits) == found) {
            sums[(key >> shift) as usize % (1 << bits)] += weight;
        }
        let mut bucket = sums.len() - 1;
        while bucket > 0 && sums[bucket] < left {
            left -= sums[bucket];
            bucket -= 1;
        }
        found = found << bits | bucket as u64;
    }
    found as u32
}

/// Larger floats have larger keys; both zeros have the same.
fn key(value: f32) -> u32 {
    let magnitude = value.to_bits() & 0x7fff_ffff;
    if value.to_bits() > 0x8000_0000 { 0x8000_0000 - magnitude } else { 0x8000_0000 + magnitude }
}

/// The float of a key.
fn value(key: u32) -> f32 {
    match key.checked_sub(0x8000_0000) {
        Some(magnitude) => f32::from_bits(magnitude),
        None => -f32::from_bits(0x8000_0000 - key),
    }
}

/// Among tokens from `least` on: the largest weight over its exponential draw, compared as logarithms.
fn race(row: &SampleRow, logits: &[f32], best: u32, least: f32) -> u32 {
    use std::f32::consts::LN_2;
    let largest = logits[best as usize];
    let hash = |id| hash([row.seed[0], row.seed[1], row.position, id]);
    // The likeliest first, so that most others are seen to lose before anything of theirs is computed.
    let (mut winner, mut score) = (best, -exponential(hash(best)).ln());
    for (id, &logit) in logits.iter().enumerate() {
        let scaled = (logit - largest) / row.temperature;
        // A draw is at least 2^-33, and at least half the hash's leading power of two.
        if logit < least || scaled + 34.0 * LN_2 < score {
            continue;
        }
        let bits = hash(id as u32);
        if scaled + (bits.leading_zeros() + 2) as f32 * LN_2 < score {
            continue;
        }
        let own = scaled - exponential(bits).ln();
        if own > score || (own == score && (id as u32) < winner) {
            (winner, score) = (id as u32, own);
        }
    }
    winner
}

/// pcg4d's last word (Jarzynski and Olano 2020).
fn hash(words: [u32; 4]) -> u32 {
    let [mut x, mut y, mut z, mut w] = words.map(|word| word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    for round in 0..2 {
        x = x.wrapping_add(y.wrapping_mul(w));
        y = y.wrapping_add(z.wrapping_mul(x));
        z = z.wrapping_add(x.wrapping_mul(y));
        w = w.wrapping_add(y.wrapping_mul(z));
        if round == 0 {
            [x, y, z, w] = [x, y, z, w].map(|word| word ^ (word >> 16));
        }
    }
    w
}

/// `-ln(1 - x)` for the x in (0, 1) that 32 random bits stand for, without losing those of a small x.
fn exponential(bits: u32) -> f32 {
    const UNIT: f32 = 1.0 / 4_294_967_296.0;
    let x = (bits as f32 + 0.5) * UNIT;
    if x < 0.125 {
        return x * (1.0 + x * (1.0 / 2.0 + x * (1.0 / 3.0 + x * (1.0 / 4.0 + x * (1.0 / 5.0 + x * (1.0 / 6.0))))));
    }
    -((!bits as f32 + 0.5) * UNIT).ln()
}

/// Of the logits as they came: the log-probability and rank of `id`, and the `num_top` most likely tokens.
pub(in crate::backend) fn log_probabilities(logits: &[f32], id: u32, num_top: u32) -> Outcome {
    let largest = largest(logits);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    let log_sum = f64::from(largest) + sum.ln();
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let own = logits[id as usize];
    let rank = 1 + logits.iter().filter(|logit| **logit > own).count() as u32;
    let mut top: Vec<(u32, f32)> = Vec::new();
    if num_top > 0 {
        let least = value(select(logits.iter().map(|logit| (key(*logit), 1)), num_top));
        top.extend((0u32..).zip(logits.iter().copied()).filter(|(_, logit)| *logit >= least));
        // A stable sort: the lowest token stays first among equals.
        top.sort_by_key(|candidate| std::cmp::Reverse(key(candidate.1)));
        top.truncate(num_top as usize);
        top.iter_mut().for_each(|(_, logit)| *logit = logprob(*logit));
    }
    Outcome { id, logprob: logprob(own), rank, top }
}
