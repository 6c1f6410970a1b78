//! The cpu backend: its fast paths against its plain twins bit for bit, and its twins against the formats' reference.

use fullbore_engine::backend::Backend;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::op::{Attention, MatMul, Op};
use fullbore_engine::tensor::{KvType, Tensor, WeightFormat};
use fullbore_engine::verify::every_case;

use crate::device::{Device, assert_rows_do_not_depend_on_m, weight_values};
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

/// Softmax over what a row sees, in f64, without tiles.
#[test]
fn attention_is_softmax_over_what_a_row_sees() {
    let mut device = cpu(true, 1);
    let random = &mut Random::new(11);
    let (head_dim, num_positions, window) = (16usize, 75u32, 40u32);
    let cache = device.kv_cache(KvType::F16, 10, 8, 1, head_dim as u32);
    let values = |random: &mut Random| random.floats(num_positions as usize * head_dim);
    let (k, v, q) = (values(random), values(random), values(random));
    let shape = (num_positions, head_dim as u32);
    let qt = device.f32(shape.0, shape.1, &q);
    let slots: Vec<u32> = (0..num_positions).collect();
    let slots = device.u32(num_positions, 1, &slots);
    let table = device.u32(1, 10, &(0..10).collect::<Vec<u32>>());
    let items: Vec<u32> = (0..num_positions).step_by(8).flat_map(|p| [p, 8.min(num_positions - p), 0, p]).collect();
    let items = device.u32(items.len() as u32 / 4, 4, &items);
    let out = device.unwritten(shape.0, shape.1);
    let attention = Attention { q: qt, cache, items, table, num_heads: 1, scale: 0.25, window, out };
    let ops = [device.stored(&k, &v, slots, cache), Op::Attention(attention)];
    let actual = device.run_f32(&ops, out);
    let half = |value: f32| f64::from(half::f16::from_f32(value).to_f32());
    let row =
        |values: &[f32], p: usize| values[p * head_dim..][..head_dim].iter().map(|&v| half(v)).collect::<Vec<f64>>();
    for p in 0..num_positions as usize {
        let first = (p + 1).saturating_sub(window as usize);
        let q = &q[p * head_dim..][..head_dim];
        let score = |s: usize| 0.25 * row(&k, s).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>();
        let weights: Vec<f64> = (first..=p).map(|s| score(s).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..head_dim {
            let wanted: f64 = (first..=p).zip(&weights).map(|(s, weight)| weight / total * row(&v, s)[d]).sum();
            let near = (f64::from(actual[p * head_dim + d]) - wanted).abs() < 1e-5;
            assert!(near, "position {p}, element {d}");
        }
    }
}

#[test]
fn attention_does_not_depend_on_chunks() {
    for kv_type in KvType::ALL {
        let mut device = cpu(false, 2);
        let random = &mut Random::new(12);
        let num_positions = 70;
        let cache = device.kv_cache(kv_type, 9, 8, 2, 32);
        let (k, v) = (random.floats(num_positions as usize * 64), random.floats(num_positions as usize * 64));
        let slots = device.u32(num_positions, 1, &(0..num_positions).rev().collect::<Vec<u32>>());
        let table = device.u32(1, 9, &(0..9).collect::<Vec<u32>>());
        let q = device.random(num_positions, 128, random);
        let mut run = |items: &[u32]| {
            let items = device.u32(items.len() as u32 / 4, 4, items);
            let out = device.unwritten(num_positions, 128);
            let op = Attention { q, cache, items, table, num_heads: 4, scale: 0.2, window: 0, out };
            let store = device.stored(&k, &v, slots, cache);
            device.run(&[store, Op::Attention(op)], &[out])
        };
        let alone: Vec<u32> = (0..num_positions).flat_map(|p| [p, 1, 0, p]).collect();
        let alone = run(&alone);
        for step in [2, 3, 5, 8] {
            let chunks = (0..num_positions).step_by(step as usize);
            let items: Vec<u32> = chunks.flat_map(|p| [p, step.min(num_positions - p), 0, p]).collect();
            assert_eq!(run(&items), alone, "{} in chunks of {step}", kv_type.name());
        }
    }
}

#[test]
fn what_does_not_fit_is_said_so() {
    let mut backend = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
    let error = backend.alloc("K cache", 1 << 60).expect_err("nobody has this much");
    assert!(error.to_string().contains("K cache"), "{error}");
    let tensor = Tensor::f32(backend.alloc("small", 64).expect("64 bytes"), 4, 4);
    assert_eq!(tensor.size_bytes(), 64);
}
