//! A device under test, where an error of the device ends the test; the ops and their inputs are `verify`'s.

use std::convert::Infallible;

use fullbore_engine::backend::{Backend, RowSource};
use fullbore_engine::batch::attention::QueryRows;
use fullbore_engine::model::Checkpoint;
use fullbore_engine::op::{MatMul, Op, Sample, SampleRow};
use fullbore_engine::tensor::{KvTensor, KvType, Tensor, Weight, WeightFormat};
use fullbore_engine::verify::attention::Planned;
use fullbore_engine::verify::{self, Case, Check, Output};

use crate::random::Random;

pub struct Device(verify::device::Device);

impl Device {
    pub fn new(backend: Box<dyn Backend>) -> Device {
        Device(verify::device::Device::new(backend))
    }

    /// What every other device is held against.
    pub fn twin() -> Device {
        Device(verify::twin().expect("threads can be started"))
    }

    pub fn backend(&mut self) -> &mut dyn Backend {
        self.0.backend()
    }

    pub fn tier(&mut self) -> String {
        self.0.backend().info().tier.clone()
    }

    pub fn f32(&mut self, rows: u32, cols: u32, values: &[f32]) -> Tensor {
        self.0.f32(rows, cols, values).expect("a small buffer")
    }

    pub fn u32(&mut self, rows: u32, cols: u32, values: &[u32]) -> Tensor {
        self.0.u32(rows, cols, values).expect("a small buffer")
    }

    pub fn unwritten(&mut self, rows: u32, cols: u32) -> Tensor {
        self.0.unwritten(rows, cols).expect("a small buffer")
    }

    pub fn weight(&mut self, format: WeightFormat, rows: u32, cols: u32, seed: u64) -> Weight {
        self.0.weight(format, rows, cols, seed).expect("the weight fits")
    }

    pub fn kv_cache(
        &mut self,
        kv_type: KvType,
        num_blocks: u32,
        block_size: u32,
        num_kv_heads: u32,
        head_dim: u32,
    ) -> KvTensor {
        self.0.kv_cache(kv_type, num_blocks, block_size, num_kv_heads, head_dim).expect("a small cache")
    }

    /// Puts k and v into their slots as they are.
    pub fn stored(&mut self, k: &[f32], v: &[f32], slots: Tensor, cache: KvTensor) -> Op {
        verify::attention::stored(&mut self.0, k, v, slots, cache).expect("small buffers")
    }

    pub fn sampling(&mut self, logits: &[f32], vocab: u32, rows: &[SampleRow], extras: &[u32]) -> Sample {
        verify::sample::sampling(&mut self.0, logits, vocab, rows, extras).expect("small buffers")
    }

    /// Runs `ops` and reads tensors back as words.
    pub fn run(&mut self, ops: &[Op], downloads: &[Tensor]) -> Vec<u32> {
        self.0.run(ops, downloads).expect("the device is there")
    }

    pub fn run_f32(&mut self, ops: &[Op], out: Tensor) -> Vec<f32> {
        self.run(ops, &[out]).into_iter().map(f32::from_bits).collect()
    }

    pub fn outputs(&mut self, cases: &[Case]) -> Vec<Vec<Output>> {
        cases.iter().map(|case| case.run(&mut self.0).expect("the device is there")).collect()
    }

    /// Asserts that this device, called `name`, makes of `cases` what the twin did.
    pub fn assert_near(&mut self, cases: &[Case], twins: &[Vec<Output>], name: &str) {
        let checks = cases.iter().zip(twins).flat_map(|(case, twins)| case.check(&case.run(&mut self.0), twins));
        let failed: Vec<Check> = checks.filter(|check| check.failure.is_some()).collect();
        assert!(failed.is_empty(), "{name}: {failed:#?}");
    }
}

/// The rows of a seeded weight as numbers, through the file format's own reference.
pub fn weight_values(format: WeightFormat, rows: u32, cols: u32, seed: u64) -> Vec<Vec<f32>> {
    let (_, mut source) = Checkpoint::Random { seed, format }.open("weight", rows, cols).expect("never fails");
    let mut row = || {
        let mut bytes = vec![0; format.row_bytes(cols) as usize];
        RowSource::read_rows(source.as_mut(), &mut bytes).expect("never fails");
        let mut values = vec![0.0; cols as usize];
        fullbore_engine::format::quant::dequantize_row(format, &bytes, &mut values);
        values
    };
    (0..rows).map(|_| row()).collect()
}

/// The rows of a matmul for every M up to `most`: each must be the row that M = 1 gives, bit for bit.
pub fn assert_rows_do_not_depend_on_m(
    device: &mut Device,
    format: WeightFormat,
    n: u32,
    k: u32,
    most: u32,
    name: &str,
) {
    let random = &mut Random::new(8);
    let weight = device.weight(format, n, k, 9);
    let values = random.floats((most * k) as usize);
    let x = device.f32(most, k, &values);
    let out = device.unwritten(1, n);
    let mut alone = Vec::new();
    for row in 0..most {
        let x = Tensor { offset: x.offset + row * k, rows: 1, ..x };
        alone.extend(device.run(&[Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out })], &[out]));
    }
    for m in 1..=most {
        // Anew, so that a row that is not written is seen.
        let (x, out) = (x.first_rows(m), device.unwritten(m, n));
        let words = device.run(&[Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out })], &[out]);
        assert!(words[..] == alone[..words.len()], "{name}: {} N {n} K {k} at M {m}", format.name());
    }
}

/// What an attention op reads of a plan over `rows`.
pub fn planned(
    rows: &[QueryRows],
    window: u32,
    cache: KvTensor,
    num_heads: u32,
    num_partials: u32,
    mut tensor: impl FnMut(&[u32], u32) -> Tensor,
) -> Planned {
    let tensor = |words: &[u32], cols: u32| Ok::<Tensor, Infallible>(tensor(words, cols));
    let Ok(planned) = Planned::new(rows, window, cache, num_heads, num_partials, tensor);
    planned
}
