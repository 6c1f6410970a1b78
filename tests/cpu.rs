//! The cpu backend: its fast paths against its plain twins bit for bit, and its twins against the formats' reference.

use fullbore_engine::backend::Backend;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::batch::attention::QueryRows;
use fullbore_engine::op::{Attention, MatMul, Op};
use fullbore_engine::tensor::{KvType, Tensor, WeightFormat};
use fullbore_engine::verify::attention::Planned;
use fullbore_engine::verify::every_case;

use crate::device::{Device, assert_rows_do_not_depend_on_m, planned, weight_values};
use crate::random::Random;

fn cpu(plain: bool, num_threads: usize) -> Device {
    Device::new(Box::new(CpuBackend::new(CpuOptions { num_threads, plain }).expect("threads can be started")))
}

#[test]
fn fast_paths_equal_their_twins_bit_for_bit() {
    let cases = every_case();
    let twins = cpu(true, 1).outputs(&cases);
    for num_threads in [1, 3] {
        let mut fast = cpu(false, num_threads);
        let tier = fast.tier();
        for (case, (fast, twins)) in cases.iter().zip(fast.outputs(&cases).iter().zip(&twins)) {
            for (fast, twin) in fast.iter().zip(twins) {
                let name = [case.op, &case.variant, &case.shape, fast.name].join(" ");
                assert_eq!(fast.words, twin.words, "{name} on {tier}, {num_threads} threads");
            }
        }
    }
}

#[test]
fn a_matmul_is_the_product_with_the_dequantised_weight() {
    for format in WeightFormat::ALL {
        let (m, n, k) = (3, 40, 512);
        let mut device = cpu(false, 0);
        let weight = device.weight(format, n, k, 4);
        let x = Random::new(3).floats((m * k) as usize);
        let rows = weight_values(format, n, k, 4);
        let (x_tensor, out) = (device.f32(m, k, &x), device.unwritten(m, n));
        let words = device.run_f32(&[Op::MatMul(MatMul { x: x_tensor, weight, bias: None, first_col: 0, out })], out);
        for (row, out) in x.chunks_exact(k as usize).zip(words.chunks_exact(n as usize)) {
            for (values, actual) in rows.iter().zip(out) {
                let sum = row.iter().zip(values).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum));
                assert_eq!(*actual, sum, "{}", format.name());
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_how_many_there_are() {
    for format in WeightFormat::ALL {
        assert_rows_do_not_depend_on_m(&mut cpu(false, 2), format, 72, 256, 65, "cpu");
    }
}

/// One sequence of `num_positions` in a cache whose blocks lie the other way round, and queries for all of them.
struct Sequence {
    device: Device,
    store: Op,
    attention: Attention,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

const NUM_POSITIONS: u32 = 600;
const HEAD_DIM: u32 = 32;
const KV_HEADS: u32 = 2;
const HEADS: u32 = 6;

impl Sequence {
    /// `spoil` has the last word on K and V.
    fn new(mut device: Device, kv_type: KvType, spoil: impl Fn(&mut [f32], &mut [f32])) -> Sequence {
        let random = &mut Random::new(12);
        let num_blocks = NUM_POSITIONS.div_ceil(8);
        let cache = device.kv_cache(kv_type, num_blocks, 8, KV_HEADS, HEAD_DIM);
        let cols = KV_HEADS * HEAD_DIM;
        let mut values = |cols: u32| random.floats((NUM_POSITIONS * cols) as usize);
        let (mut k, mut v, q) = (values(cols), values(cols), values(HEADS * HEAD_DIM));
        spoil(&mut k, &mut v);
        let slots: Vec<u32> = (0..NUM_POSITIONS).map(|p| (num_blocks - 1 - p / 8) * 8 + p % 8).collect();
        let slots = device.u32(NUM_POSITIONS, 1, &slots);
        let table = device.u32(1, num_blocks, &(0..num_blocks).rev().collect::<Vec<u32>>());
        let store = device.stored(&k, &v, slots, cache);
        let qt = device.f32(NUM_POSITIONS, HEADS * HEAD_DIM, &q);
        let out = device.unwritten(NUM_POSITIONS, HEADS * HEAD_DIM);
        let attention = Attention {
            q: qt,
            cache,
            items: table,
            num_single_rows: 0,
            merges: table,
            partials: out,
            table,
            num_heads: HEADS,
            scale: 0.25,
            soft_cap: 0.0,
            window: 0,
            out,
        };
        Sequence { device, store, attention, k, v, q }
    }

    /// All rows, in slices that begin at multiples of `step`, with room for so many partials.
    fn attend(&mut self, step: u32, num_partials: u32, window: u32, soft_cap: f32) -> Vec<f32> {
        let rows = (0..NUM_POSITIONS).step_by(step as usize);
        let rows =
            rows.map(|p| QueryRows { first_row: p, num_rows: step.min(NUM_POSITIONS - p), slot: 0, position: p });
        let rows: Vec<QueryRows> = rows.collect();
        let planned = planned(&rows, window, self.attention.cache, HEADS, num_partials, |words, cols| {
            self.device.u32(words.len() as u32 / cols, cols, words)
        });
        let Planned { items, num_single_rows, merges, partials } = planned;
        let out = self.device.unwritten(NUM_POSITIONS, HEADS * HEAD_DIM);
        let op = Attention { items, num_single_rows, merges, partials, window, soft_cap, out, ..self.attention };
        self.device.run_f32(&[self.store, Op::Attention(op)], out)
    }
}

/// Softmax over what a row sees, in f64, without tiles.
#[test]
fn attention_is_softmax_over_what_a_row_sees() {
    let mut sequence = Sequence::new(cpu(true, 1), KvType::F16, |_, _| {});
    let half = |value: &f32| f64::from(half::f16::from_f32(*value).to_f32());
    let (k, v): (Vec<f64>, Vec<f64>) = (sequence.k.iter().map(half).collect(), sequence.v.iter().map(half).collect());
    for (window, cap) in [(0, 0.0), (40, 0.0), (300, 0.0), (0, 0.7)] {
        let actual = sequence.attend(8, 0, window, cap);
        for p in (0..NUM_POSITIONS as usize).step_by(7) {
            let first = if window == 0 { 0 } else { (p + 1).saturating_sub(window as usize) };
            for head in 0..HEADS as usize {
                let dim = HEAD_DIM as usize;
                let q = &sequence.q[(p * HEADS as usize + head) * dim..][..dim];
                let cell = |s: usize| (s * 2 + head / 3) * dim..(s * 2 + head / 3 + 1) * dim;
                let score = |s: usize| {
                    let score = 0.25 * k[cell(s)].iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>();
                    if cap == 0.0 { score } else { f64::from(cap) * (score / f64::from(cap)).tanh() }
                };
                let weights: Vec<f64> = (first..=p).map(|s| score(s).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let wanted: f64 = (first..=p).zip(&weights).map(|(s, w)| w / total * v[cell(s)][d]).sum();
                    let near = (f64::from(actual[(p * HEADS as usize + head) * dim + d]) - wanted).abs() < 1e-5;
                    assert!(near, "position {p}, head {head}, element {d}, window {window}, cap {cap}");
                }
            }
        }
    }
}

#[test]
fn attention_does_not_depend_on_chunks_or_on_splitting() {
    for kv_type in KvType::ALL {
        let (mut fast, mut plain) =
            (Sequence::new(cpu(false, 2), kv_type, |_, _| {}), Sequence::new(cpu(true, 2), kv_type, |_, _| {}));
        for (window, cap) in [(0, 0.0), (50, 0.0), (333, 1.5)] {
            let alone = bits(&plain.attend(1, 0, window, cap));
            for step in [1, 2, 3, 5, 8, 600] {
                for num_partials in [0, 5000] {
                    let name = format!("{}, chunks of {step}, {num_partials} partials", kv_type.name());
                    assert!(bits(&fast.attend(step, num_partials, window, cap)) == alone, "{name}");
                }
            }
            assert!(bits(&plain.attend(1, 5000, window, cap)) == alone, "{} split", kv_type.name());
        }
    }
}

#[test]
fn what_a_row_does_not_see_is_nothing_to_it() {
    for plain in [true, false] {
        let mut whole = Sequence::new(cpu(plain, 1), KvType::F16, |_, _| {});
        let mut spoilt = Sequence::new(cpu(plain, 1), KvType::F16, |k, v| {
            let cols = (KV_HEADS * HEAD_DIM) as usize;
            (k[300 * cols], v[301 * cols + 2]) = (f32::NAN, f32::INFINITY);
        });
        for window in [0, 40] {
            let (whole, spoilt) = (whole.attend(8, 0, window, 0.0), spoilt.attend(8, 0, window, 0.0));
            for (row, (whole, spoilt)) in whole.chunks_exact(192).zip(spoilt.chunks_exact(192)).enumerate() {
                let sees = row >= 300 && (window == 0 || row < 341);
                assert_eq!(bits(whole) == bits(spoilt), !sees, "row {row}, window {window}, plain {plain}");
                assert_eq!(spoilt.iter().any(|value| !value.is_finite()), sees, "row {row}, window {window}");
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn what_does_not_fit_is_said_so() {
    let mut backend = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
    let error = backend.alloc("K cache", 1 << 60).expect_err("nobody has this much");
    assert!(error.to_string().contains("K cache"), "{error}");
    let tensor = Tensor::f32(backend.alloc("small", 64).expect("64 bytes"), 4, 4);
    assert_eq!(tensor.size_bytes(), 64);
}
