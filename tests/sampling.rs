//! Draws of `Op::Sample` against the exact distribution, by chi-squared, on the cpu and on every Vulkan driver; and
//! what a draw may depend on. Needs Vulkan drivers.
//!
//! The exact distribution is computed here in f64 from the words of `request.rs`, by sorting. All draws are seeded: a
//! test that passes once passes always.

use std::sync::Arc;

use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::wgpu::{WgpuBackend, WgpuOptions, devices};
use fullbore_engine::op::*;
use fullbore_engine::request::{TokenId, token_mask};
use fullbore_engine::tensor::Tensor;

use crate::device::Device;
use crate::random::Random;

const VOCAB: u32 = 48;
/// Rows of one op.
const NUM_ROWS: u32 = 4096;

/// A sampler whose state is the same in all rows of a test.
#[derive(Clone)]
struct Sampler {
    row: SampleRow,
    bias: Vec<(u32, f32)>,
    mask: Option<Arc<[u32]>>,
    /// Tokens of the prompt, and generated ones.
    known: (Vec<u32>, Vec<u32>),
}

impl Sampler {
    fn new(temperature: f32) -> Sampler {
        let row = SampleRow { temperature, ..SampleRow::IDLE };
        Sampler { row, bias: Vec::new(), mask: None, known: (Vec::new(), Vec::new()) }
    }

    /// What the request's words say of `logits`, in f64.
    fn exact(&self, logits: &[f32]) -> Vec<f64> {
        let row = &self.row;
        let mut adjusted: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
        self.bias.iter().for_each(|(token, bias)| adjusted[*token as usize] += f64::from(*bias));
        for (id, logit) in (0..).zip(&mut adjusted) {
            let generated = self.known.1.iter().filter(|token| **token == id).count() as f64;
            if generated > 0.0 || self.known.0.contains(&id) {
                let repetition = f64::from(row.repetition);
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
            *logit -= generated * f64::from(row.frequency) + generated.min(1.0) * f64::from(row.presence);
            if self.mask.as_ref().is_some_and(|mask| mask[id as usize / 32] >> (id % 32) & 1 == 0) {
                *logit = f64::NEG_INFINITY;
            }
        }
        let largest = adjusted.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut order: Vec<(usize, f64)> =
            adjusted.iter().map(|logit| ((logit - largest) / f64::from(row.temperature)).exp()).enumerate().collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        if row.top_k > 0 {
            order.truncate(row.top_k as usize);
        }
        let total: f64 = order.iter().map(|(_, weight)| weight).sum();
        let mut left = f64::from(row.top_p) * total;
        let passes = |(_, weight): &(usize, f64)| {
            let passes = left > 0.0 || row.top_p == 1.0;
            left -= weight;
            passes
        };
        let kept: Vec<(usize, f64)> = order.into_iter().filter(passes).collect();
        let mut exact = vec![0.0; logits.len()];
        for (id, weight) in kept.into_iter().filter(|(_, weight)| *weight >= f64::from(row.min_p)) {
            exact[id] = weight;
        }
        let total: f64 = exact.iter().sum();
        exact.into_iter().map(|weight| weight / total).collect()
    }

    /// Draws for positions `first ..`, one a row, all from the same logits and the same known tokens.
    fn draws(&self, device: &mut Device, logits: &[f32], seed: u64, first: u32, num_rows: u32) -> Vec<u32> {
        let rows = (0..num_rows).map(|row| (seed, first + row)).collect::<Vec<_>>();
        self.draws_at(device, logits, &rows)
    }

    /// Draws for pairs of seed and position.
    fn draws_at(&self, device: &mut Device, logits: &[f32], at: &[(u64, u32)]) -> Vec<u32> {
        let mut row = SampleRow { num_biases: self.bias.len() as u32, ..self.row };
        let mut extras: Vec<u32> = self.bias.iter().flat_map(|(token, bias)| [*token, bias.to_bits()]).collect();
        if let Some(mask) = &self.mask {
            row.mask_at = extras.len() as u32;
            extras.extend(mask.iter());
        }
        let slot = (0u32..).zip(at);
        let rows: Vec<SampleRow> = slot
            .map(|(slot, (seed, position))| SampleRow {
                slot,
                position: *position,
                seed: [*seed as u32, (*seed >> 32) as u32],
                ..row
            })
            .collect();
        let logits: Vec<f32> = rows.iter().flat_map(|_| logits.iter().copied()).collect();
        let vocab = (logits.len() / rows.len()) as u32;
        let op = device.sampling(&logits, vocab, &rows, &extras);
        let (prompt, generated) = &self.known;
        let tokens = [prompt.as_slice(), generated.as_slice(), &[0]].concat();
        let (begin, end) = (prompt.len() as u32, (prompt.len() + generated.len()) as u32);
        let resets: Vec<u32> = rows.iter().flat_map(|row| [row.slot, 0, begin, end]).collect();
        let resets = device.u32(rows.len() as u32, 4, &resets);
        let tokens = device.u32(tokens.len() as u32, 1, &tokens);
        let reset = Op::ResetCounts(ResetCounts { resets, tokens, counts: op.counts });
        ids(device, &[reset, Op::Sample(op)], op.chosen)
    }
}

fn ids(device: &mut Device, ops: &[Op], chosen: Tensor) -> Vec<u32> {
    device.run(ops, &[chosen]).chunks_exact(CHOSEN_WORDS as usize).map(|words| words[0]).collect()
}

/// Asserts that `counts` are draws from `exact`: nothing where that is 0, and elsewhere a chi-squared statistic that
/// one in 10,000 right samplers would go beyond. Cells of fewer than 8 expected draws are taken together.
fn assert_drawn_from(name: &str, counts: &[u32], exact: &[f64]) {
    let num_draws = f64::from(counts.iter().sum::<u32>());
    let mut cells: Vec<(f64, f64)> = Vec::new();
    let mut rest = (0.0, 0.0);
    for (id, (&count, probability)) in counts.iter().zip(exact).enumerate() {
        assert!(count == 0 || *probability > 0.0, "{name}: {id} was drawn {count} times and cannot be");
        match probability * num_draws {
            expected if expected >= 8.0 => cells.push((f64::from(count), expected)),
            expected => rest = (rest.0 + f64::from(count), rest.1 + expected),
        }
    }
    if rest.1 > 1.0 {
        cells.push(rest);
    }
    assert!(!cells.is_empty(), "{name}: nothing to compare");
    let statistic: f64 = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
    let freedom = cells.len() as f64 - 1.0;
    if freedom == 0.0 {
        return;
    }
    // Wilson and Hilferty 1931; 3.719 is the normal quantile.
    let ninth = 2.0 / (9.0 * freedom);
    let bound = freedom * (1.0 - ninth + 3.719 * ninth.sqrt()).powi(3);
    assert!(statistic < bound, "{name}: {statistic:.1} of {freedom} degrees of freedom; at most {bound:.1}");
}

fn counts_of(draws: &[u32], num_cells: u32) -> Vec<u32> {
    let mut counts = vec![0; num_cells as usize];
    draws.iter().for_each(|draw| counts[*draw as usize] += 1);
    counts
}

fn cpu() -> Device {
    Device::new(Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started")))
}

/// The cpu, and every Vulkan driver there is on its own tier.
fn all_devices() -> Vec<(String, Device)> {
    let found = devices();
    assert!(!found.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    let open = |selector: &String| {
        let options = WgpuOptions { selector: selector.clone(), ..WgpuOptions::default() };
        Device::new(Box::new(WgpuBackend::open(&options).unwrap_or_else(|error| panic!("{error}"))))
    };
    let vulkan = found.iter().map(|device| (device.id.clone(), open(&device.id)));
    std::iter::once(("cpu".to_owned(), cpu())).chain(vulkan).collect()
}

/// Each parameter alone, pairs, and everything together; no value of theirs falls on an edge of the distribution.
fn samplers() -> Vec<(&'static str, Sampler)> {
    let at = |temperature: f32, change: Change| {
        let mut sampler = Sampler::new(temperature);
        change(&mut sampler);
        sampler
    };
    let all: [(&str, Sampler); 16] = [
        ("temperature 0.4", at(0.4, |_| {})),
        ("temperature 1", at(1.0, |_| {})),
        ("temperature 2", at(2.0, |_| {})),
        ("top-k", at(1.0, |sampler| sampler.row.top_k = 7)),
        ("top-k of one", at(1.0, |sampler| sampler.row.top_k = 1)),
        ("top-k of more than there are", at(1.0, |sampler| sampler.row.top_k = 1000)),
        ("top-p", at(1.0, |sampler| sampler.row.top_p = 0.83)),
        ("top-p of nearly nothing", at(1.0, |sampler| sampler.row.top_p = 1e-6)),
        ("min-p", at(1.3, |sampler| sampler.row.min_p = 0.07)),
        ("top-k and top-p", at(1.5, |sampler| (sampler.row.top_k, sampler.row.top_p) = (20, 0.71))),
        ("top-p and min-p", at(0.7, |sampler| (sampler.row.top_p, sampler.row.min_p) = (0.97, 0.031))),
        (
            "presence and frequency",
            at(1.0, |sampler| {
                (sampler.row.presence, sampler.row.frequency) = (0.6, 0.35);
                sampler.known = (vec![8, 2, 3], vec![32, 27, 27, 27, 37, 40]);
            }),
        ),
        (
            "repetition",
            at(1.0, |sampler| {
                sampler.row.repetition = 1.4;
                sampler.known = ((0..20).collect(), vec![30, 30, 37]);
            }),
        ),
        ("bias", at(1.0, |sampler| sampler.bias = vec![(0, 2.5), (17, -100.0), (30, 4.0), (47, 3.0)])),
        (
            "mask",
            at(1.0, |sampler| {
                sampler.mask = Some(token_mask((0..VOCAB).filter(|id| id % 3 != 1).map(TokenId), VOCAB));
            }),
        ),
        (
            "everything",
            at(1.2, |sampler| {
                (sampler.row.top_k, sampler.row.top_p, sampler.row.min_p) = (17, 0.9, 0.045);
                (sampler.row.presence, sampler.row.frequency, sampler.row.repetition) = (-0.4, 0.3, 1.2);
                sampler.known = (vec![4, 4, 8, 33], vec![7, 7, 12, 8, 46]);
                sampler.bias = vec![(3, 1.5), (12, -1.5), (46, 4.0)];
                sampler.mask = Some(token_mask((0..VOCAB).filter(|id| id % 5 != 0).map(TokenId), VOCAB));
            }),
        ),
    ];
    all.into()
}

#[test]
fn draws_follow_the_exact_distribution() {
    let logits: Vec<f32> = Random::new(21).floats(VOCAB as usize).iter().map(|value| value * 3.0).collect();
    for (name, mut device) in all_devices() {
        for (index, (what, sampler)) in (0u64..).zip(samplers()) {
            let parts = 0..if name == "cpu" { 8 } else { 1 };
            let draws: Vec<u32> = parts
                .flat_map(|part| sampler.draws(&mut device, &logits, 1000 + index, part * NUM_ROWS, NUM_ROWS))
                .collect();
            assert_drawn_from(&format!("{what} on {name}"), &counts_of(&draws, VOCAB), &sampler.exact(&logits));
        }
    }
}

/// Makes a sampler another one.
type Change = fn(&mut Sampler);

/// What the test above is worth: distributions that are a little wrong are told apart.
#[test]
fn a_sampler_that_is_a_little_wrong_is_seen() {
    let logits: Vec<f32> = Random::new(21).floats(VOCAB as usize).iter().map(|value| value * 3.0).collect();
    let mut device = cpu();
    let draws = |sampler: &Sampler, device: &mut Device| {
        let parts = (0..4).flat_map(|part| sampler.draws(device, &logits, 7, part * NUM_ROWS, NUM_ROWS));
        counts_of(&parts.collect::<Vec<_>>(), VOCAB)
    };
    type Change = fn(&mut Sampler);
    let changes: [(&str, Change); 10] = [
        ("temperature 1", |sampler| sampler.row.temperature = 1.15),
        ("top-k", |sampler| sampler.row.top_k = 8),
        ("top-p", |sampler| sampler.row.top_p = 0.87),
        ("min-p", |sampler| sampler.row.min_p = 0.09),
        ("presence and frequency", |sampler| sampler.row.frequency = 0.5),
        ("presence and frequency", |sampler| sampler.known.0.push(28)),
        ("presence and frequency", |sampler| sampler.known.1.push(28)),
        ("repetition", |sampler| sampler.known.0.push(28)),
        ("bias", |sampler| sampler.bias[2].0 = 31),
        ("everything", |sampler| sampler.row.temperature = 1.0),
    ];
    for (what, change) in changes {
        let (_, sampler) = samplers().into_iter().find(|(name, _)| *name == what).expect("one of the names");
        let counts = draws(&sampler, &mut device);
        assert_drawn_from(what, &counts, &sampler.exact(&logits));
        let mut other = sampler.clone();
        change(&mut other);
        // That a token is in the prompt matters to repetition alone.
        let same = other.exact(&logits) == sampler.exact(&logits);
        let seen = std::panic::catch_unwind(|| assert_drawn_from(what, &counts, &other.exact(&logits))).is_err();
        assert_eq!(seen, !same, "{what}");
    }
}

#[test]
fn neighbouring_positions_seeds_and_tokens_draw_independently() {
    // Six tokens of unlike weight.
    let logits = [0.0, 0.5, -0.5, 1.0, -1.0, 0.2];
    let sampler = Sampler::new(1.0);
    let exact = sampler.exact(&logits);
    let pairs: Vec<f64> = exact.iter().flat_map(|a| exact.iter().map(move |b| a * b)).collect();
    let mut device = cpu();
    let mut joint = |name: &str, second: fn(u64, u32) -> (u64, u32)| {
        let first: Vec<(u64, u32)> = (0..20_000).map(|i| (3 + u64::from(i % 100) * 2, i / 100 * 2)).collect();
        let other: Vec<(u64, u32)> = first.iter().map(|&(seed, position)| second(seed, position)).collect();
        let firsts = sampler.draws_at(&mut device, &logits, &first);
        let seconds = sampler.draws_at(&mut device, &logits, &other);
        let cells: Vec<u32> = firsts.iter().zip(seconds).map(|(a, b)| a * 6 + b).collect();
        assert_drawn_from(name, &counts_of(&cells, 36), &pairs);
    };
    joint("two positions", |seed, position| (seed, position + 1));
    joint("two seeds", |seed, position| (seed + 1, position));
    joint("seeds that differ in their high word", |seed, position| (seed + (1 << 32), position));
    joint("seed and position exchanged", |seed, position| (u64::from(position), seed as u32 + 1000));
}

/// Flat logits over a large vocabulary: every token is as likely, wherever it lies.
#[test]
fn a_flat_large_vocabulary_is_drawn_evenly() {
    const LARGE: u32 = 8192;
    for (name, mut device) in all_devices() {
        for sampler in [Sampler::new(1.0), {
            let mut s = Sampler::new(0.8);
            s.row.min_p = 0.5;
            s
        }] {
            let draws: Vec<u32> = (0..4)
                .flat_map(|part| sampler.draws(&mut device, &[1.5; LARGE as usize], 5, part * 256, 256))
                .collect();
            let even = [1.0 / 64.0; 64];
            let low: Vec<u32> = draws.iter().map(|id| id % 64).collect();
            let high: Vec<u32> = draws.iter().map(|id| id / (LARGE / 64)).collect();
            assert_drawn_from(&format!("low bits on {name}"), &counts_of(&low, 64), &even);
            assert_drawn_from(&format!("high bits on {name}"), &counts_of(&high, 64), &even);
        }
    }
}

/// Thousands of unlikely tokens together are as likely as their sum.
#[test]
fn unlikely_tokens_are_drawn_as_often_as_they_should() {
    const LARGE: u32 = 16_385;
    // Token 0 has half of the mass, the others share the rest: 3e-5 each.
    let mut logits = vec![0.0; LARGE as usize];
    logits[0] = 16_384f32.ln();
    for (name, mut device) in all_devices() {
        let draws: Vec<u32> =
            (0..4).flat_map(|part| Sampler::new(1.0).draws(&mut device, &logits, 11, part * 256, 256)).collect();
        let others = draws.iter().map(|id| (*id).min(1)).collect::<Vec<_>>();
        assert_drawn_from(&name, &counts_of(&others, 2), &[0.5, 0.5]);
    }
}

#[test]
fn tokens_equal_to_the_last_kept_are_kept_too() {
    let logits = [0.5, 1.0, 2.0, 1.0, 0.0, 1.0];
    let weights = [0.0, 1f64.exp(), 2f64.exp(), 1f64.exp(), 0.0, 1f64.exp()];
    let exact = weights.map(|weight| weight / weights.iter().sum::<f64>());
    // The largest has .41 of the mass, each of the three behind it .15.
    let changes: [Change; 3] = [
        |sampler| sampler.row.top_k = 2,
        |sampler| sampler.row.top_p = 0.5,
        |sampler| (sampler.row.top_k, sampler.row.top_p, sampler.row.min_p) = (3, 0.6, 0.3),
    ];
    for (name, mut device) in all_devices() {
        for change in changes {
            let mut sampler = Sampler::new(1.0);
            change(&mut sampler);
            let draws = sampler.draws(&mut device, &logits, 31, 0, 2048);
            assert_drawn_from(&name, &counts_of(&draws, 6), &exact);
        }
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let logits: Vec<f32> = Random::new(22).floats(VOCAB as usize).iter().map(|value| value * 3.0).collect();
    for (name, mut device) in all_devices() {
        let mut sampler = Sampler::new(1.0);
        let straight = sampler.draws(&mut device, &logits, 9, 100, 64);
        // Another slot, other neighbours.
        let backwards: Vec<(u64, u32)> = (0..64).rev().map(|row| (9, 100 + row)).collect();
        let mut again = sampler.draws_at(&mut device, &logits, &backwards);
        again.reverse();
        assert_eq!(again, straight, "{name}");
        assert_ne!(sampler.draws(&mut device, &logits, 10, 100, 64), straight, "{name}");
        assert_ne!(sampler.draws(&mut device, &logits, 9 + (1 << 32), 100, 64), straight, "{name}");
        assert_eq!(sampler.draws(&mut device, &logits, 9, 101, 63), straight[1..], "{name}");
        // A filter that keeps all changes nothing, nor does one that cuts only what did not win.
        sampler.row.top_k = VOCAB - 1;
        let cut = sampler.draws(&mut device, &logits, 9, 100, 64);
        let least = (0..VOCAB).min_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize]));
        assert!(cut.iter().zip(&straight).all(|(cut, whole)| cut == whole || Some(*whole) == least), "{name}");
    }
}

/// The op counts what it chooses: penalties grow from step to step without help from the host.
#[test]
fn choices_are_counted_on_the_device() {
    for (name, mut device) in all_devices() {
        // Token 2 leads by 1, and each choice costs 0.4: the tokens take turns in a known order.
        let logits = [0.0, 0.75, 1.0, -3.0];
        let row = SampleRow { slot: 1, frequency: 0.4, ..SampleRow::IDLE };
        let op = device.sampling(&logits, 4, &[row], &[]);
        let tokens = device.u32(2, 1, &[2, 1]);
        let resets = device.u32(1, 4, &[1, 0, 1, 2]);
        let reset = Op::ResetCounts(ResetCounts { resets, tokens, counts: op.counts });
        // Token 1 was generated once before; that token 2 is in the prompt does not count.
        let mut ops = vec![reset];
        let mut expected = Vec::new();
        let mut counts = [0, 1, 0, 0];
        for _ in 0..7 {
            ops.push(Op::Sample(op));
            let penalised = |id: usize| logits[id] - 0.4 * counts[id] as f32;
            let best = (0..4).rev().max_by(|a, b| penalised(*a).total_cmp(&penalised(*b))).expect("four");
            counts[best] += 1;
            expected.push(best as u32);
            assert_eq!(ids(&mut device, &ops, op.chosen), [best as u32], "{name} after {expected:?}");
        }
        assert_eq!(counts, [1, 3, 4, 0], "{expected:?}");
        let words = device.run(&[], &[op.counts]);
        assert_eq!(words[4..], [counts[0], counts[1], counts[2] | IN_PROMPT, counts[3]], "{name}");
        // Nothing is counted for a row that is broken.
        let broken = device.sampling(&[0.0, f32::NAN, 1.0, -3.0], 4, &[row], &[]);
        assert_eq!(ids(&mut device, &[Op::Sample(broken)], broken.chosen), [NON_FINITE], "{name}");
        assert_eq!(device.run(&[], &[broken.counts, broken.sampled])[4..], [0, 0, 0, 0, 77, NON_FINITE], "{name}");
    }
}
