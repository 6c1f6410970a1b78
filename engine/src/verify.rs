//! Whether a device computes what the plain cpu twin does: every op on seeded inputs, and how far apart the two are.
//!
//! The same cases serve `fullbore verify`, the look at a model's kernels before it is loaded, and the tests. Invariant:
//! a case depends on its own seed alone, so that any may be left out. What follows from a failure is the caller's.

use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::{Backend, DeviceError};
use crate::op::Activation::{GeluTanh, Silu};
use crate::op::RopeStyle::{Halves, Interleaved};
use crate::tensor::{KvType, WeightFormat};

pub mod attention;
pub mod device;
pub mod golden;
pub mod mat_mul;
pub mod random;
pub mod rows;
pub mod sample;
pub mod start;

use attention::{Heads, Turn};
use device::Device;

/// One op, or the few that belong together, on one shape.
pub struct Case {
    /// The name of the op's files: `mat_mul`.
    pub op: &'static str,
    /// Which of the op's variants, apart from the tier: a format, the cache's type.
    pub variant: String,
    pub shape: String,
    /// Of the weights that are in it, where the op takes any.
    pub formats: Vec<WeightFormat>,
    work: Box<Work>,
}

type Work = dyn Fn(&mut Device) -> Result<Vec<Output>, DeviceError>;

/// What an op wrote, and how near another device must come.
#[derive(Clone, Debug)]
pub struct Output {
    /// Which of several outputs; empty where there is one.
    pub name: &'static str,
    pub words: Vec<u32>,
    /// Largest difference over the largest magnitude; 0 for words that must be equal.
    pub tolerance: f32,
}

/// An output of a case beside its twin's: a line of the table.
#[derive(Clone, Debug)]
pub struct Check {
    pub op: &'static str,
    pub variant: String,
    pub shape: String,
    /// Largest difference over the largest magnitude of the twin.
    pub error: f32,
    pub tolerance: f32,
    /// Why it does not pass.
    pub failure: Option<String>,
}

impl Case {
    fn new(
        op: &'static str,
        variant: &str,
        shape: String,
        work: impl Fn(&mut Device) -> Result<Vec<Output>, DeviceError> + 'static,
    ) -> Case {
        Case { op, variant: variant.to_owned(), shape, formats: Vec::new(), work: Box::new(work) }
    }

    fn of_formats(self, formats: &[WeightFormat]) -> Case {
        Case { formats: formats.to_vec(), ..self }
    }

    pub fn run(&self, device: &mut Device) -> Result<Vec<Output>, DeviceError> {
        device.within(|device| (self.work)(device))
    }

    /// Holds what a device made of this case against what the twin did.
    pub fn check(&self, outputs: &Result<Vec<Output>, DeviceError>, twins: &[Output]) -> Vec<Check> {
        let failed = |error: &DeviceError| vec![self.line("", f32::INFINITY, 0.0, Some(error.to_string()))];
        let compare = |(output, twin): (&Output, &Output)| {
            let (error, failure) = output.compare(twin);
            self.line(twin.name, error, output.tolerance, failure)
        };
        match outputs {
            Ok(outputs) => {
                assert_eq!(outputs.len(), twins.len(), "{} {}", self.op, self.shape);
                outputs.iter().zip(twins).map(compare).collect()
            }
            Err(error) => failed(error),
        }
    }

    fn line(&self, output: &str, error: f32, tolerance: f32, failure: Option<String>) -> Check {
        let shape = if output.is_empty() { self.shape.clone() } else { format!("{}: {output}", self.shape) };
        Check { op: self.op, variant: self.variant.clone(), shape, error, tolerance, failure }
    }
}

impl Output {
    fn f32(words: Vec<u32>, tolerance: f32) -> Vec<Output> {
        vec![Output { name: "", words, tolerance }]
    }

    fn exact(words: Vec<u32>) -> Vec<Output> {
        Output::f32(words, 0.0)
    }

    /// How many words are not the same in pairs of as many: none where both were computed in one order.
    fn differing<'a>(pairs: impl Iterator<Item = (&'a [u32], &'a [u32])>) -> Vec<Output> {
        let of_pair =
            |(one, other): (&[u32], &[u32])| one.iter().zip(other).filter(|(one, other)| one != other).count();
        let words = vec![pairs.map(of_pair).sum::<usize>() as u32];
        vec![Output { name: "elements that differ", words, tolerance: 0.0 }]
    }

    /// The largest difference over the twin's largest magnitude, and why `self` does not pass for the twin.
    fn compare(&self, twin: &Output) -> (f32, Option<String>) {
        if self.words.len() != twin.words.len() {
            let failure = format!("{} words instead of {}", self.words.len(), twin.words.len());
            return (f32::INFINITY, Some(failure));
        }
        if self.tolerance == 0.0 {
            let differs = |index: &usize| self.words[*index] != twin.words[*index];
            let different: Vec<usize> = (0..twin.words.len()).filter(differs).collect();
            let Some(&index) = different.first() else { return (0.0, None) };
            let (num, all) = (different.len(), twin.words.len());
            let (actual, wanted) = (self.words[index], twin.words[index]);
            let failure = format!("{num} of {all} words differ: word {index} is {actual:#x}, not {wanted:#x}");
            return (f32::INFINITY, Some(failure));
        }
        let value = |output: &Output, index: usize| f32::from_bits(output.words[index]);
        let largest = (0..twin.words.len()).fold(0.0f32, |largest, index| largest.max(value(twin, index).abs()));
        let mut worst = (0.0, 0);
        for index in 0..twin.words.len() {
            let difference = (value(self, index) - value(twin, index)).abs();
            let error = if difference == 0.0 { 0.0 } else { difference / largest };
            // What is no number is as far away as can be.
            let error = if error.is_nan() { f32::INFINITY } else { error };
            if error > worst.0 {
                worst = (error, index);
            }
        }
        let (error, index) = worst;
        let wrong = || format!("element {index} is {}, not {}", value(self, index), value(twin, index));
        (error, (error > self.tolerance).then(wrong))
    }
}

/// Whether a row has the same bits whatever its neighbours, by that arithmetic.
pub fn holds_in_company(arithmetic: &str) -> bool {
    !matches!(arithmetic, "integer-dot" | "matrix-units")
}

/// The reference: everything by its plain twin on the cpu.
pub fn twin() -> Result<Device, DeviceError> {
    Ok(Device::new(Box::new(CpuBackend::new(CpuOptions { plain: true, ..CpuOptions::default() })?)))
}

/// Every op on inputs that reach its branches, in every variant.
pub fn every_case() -> Vec<Case> {
    let mut cases = vec![rows::update_table(), rows::mul_add(16, 1024, true)];
    cases.extend(WeightFormat::ALL.map(rows::embed));
    for (rows, cols) in [(1, 64), (3, 100), (3, 1300), (17, 576), (70, 640)] {
        cases.push(rows::rms_norm(rows, cols));
        cases.push(rows::mul_add(rows, cols, false));
        cases.push(rows::gated_act(Silu, rows, cols));
        cases.push(rows::gated_act(GeluTanh, rows, cols));
        for has_post in [false, true] {
            cases.push(rows::add_norm(rows, rows, cols, has_post));
            cases.push(rows::add_norm(rows.div_ceil(2), rows, cols, has_post));
        }
    }
    for format in WeightFormat::ALL {
        for (m, n, k) in [(1, 64, 256), (1, 40, mat_mul::LONG_K), (37, 161, 768), (67, 130, 256)] {
            cases.push(mat_mul::mat_mul(format, m, n, k));
        }
    }
    // Every variant beside its neighbours, widths that fill no tile, last units that are short or missing.
    for (format, m, n, k) in [
        (WeightFormat::F32, 3, 40, 68),
        (WeightFormat::BF16, 65, 200, 6),
        (WeightFormat::F16, 5, 40, 68),
        (WeightFormat::Q5K, 8, 100, 512),
        (WeightFormat::Q4_0, 9, 48, 576),
        (WeightFormat::Q4_0, 17, 70, 2080),
        (WeightFormat::F16, 63, 40, 68),
        (WeightFormat::Q4_0, 64, 128, 96),
        (WeightFormat::F16, 65, 200, 6),
        (WeightFormat::Q4_0, 130, 260, 288),
    ] {
        cases.push(mat_mul::mat_mul(format, m, n, k));
    }
    cases.extend([false, true].map(|has_post| mat_mul::before_norm(WeightFormat::Q4_0, &[1, 3], has_post)));
    cases.push(mat_mul::into_columns(WeightFormat::Q4_0, WeightFormat::Q5K));
    let turns = [(Interleaved, 64, 64), (Halves, 256, 256), (Halves, 16, 8), (Interleaved, 96, 10), (Halves, 32, 32)];
    for kv_type in KvType::ALL {
        for (style, head_dim, rotary_dim) in turns.into_iter().filter(|(_, head_dim, _)| kv_type.takes(*head_dim)) {
            let turn = |has_norms| Turn { style, head_dim, rotary_dim, has_norms };
            cases.extend([false, true].map(|has_norms| attention::rope_kv(kv_type, turn(has_norms))));
        }
        let heads = Heads::of(kv_type).into_iter();
        cases.extend(heads.map(|heads| attention::attention(kv_type, heads)));
        let heads = Heads { num_positions: 700, ..Heads::new(64, 2, 3, 16) };
        cases.push(attention::in_company(kv_type, heads));
    }
    for (kv_type, head_dim) in [
        (KvType::F16, 20),
        (KvType::F16, 64),
        (KvType::Q8_0, 64),
        (KvType::Q8_0, 96),
        (KvType::Q4_0, 64),
        (KvType::Q4_0, 96),
    ] {
        cases.push(attention::stores(kv_type, head_dim));
    }
    cases.extend(KvType::ALL.map(|kv_type| attention::stores_nans(kv_type, 64)));
    cases.extend([37, 1000, 9001].map(sample::sample));
    cases
}

/// Two that are decoded in two ways, for tests: how a format is decoded is the same text in all kernels.
pub const TWO_FORMATS: [WeightFormat; 2] = [WeightFormat::Q4_0, WeightFormat::Q5K];

/// Every matmul kernel that a table of `backend` may name, on weights of `formats`, and whether all give the same bits.
pub fn every_mat_mul_kernel(backend: &dyn Backend, formats: &[WeightFormat]) -> Vec<Case> {
    let of_format = |&format: &WeightFormat| {
        let kernels = backend.mat_mul_kernels(format).into_iter();
        let has_any = kernels.len() > 0;
        let each = kernels.map(move |kernel| mat_mul::by_kernel(format, &kernel));
        each.chain(has_any.then(|| mat_mul::same_bits(format)))
    };
    formats.iter().flat_map(of_format).collect()
}

/// Runs `cases` on the device that `open` gives, which is opened anew where one was lost, and tells `seen` each check.
/// An error is the twin's.
pub fn verify(
    cases: &[Case],
    open: &mut dyn FnMut() -> Result<Box<dyn Backend>, DeviceError>,
    seen: &mut dyn FnMut(Check),
) -> Result<(), DeviceError> {
    let mut twin = twin()?;
    let mut device = None;
    for case in cases {
        let twins = case.run(&mut twin)?;
        let opened = match device.take() {
            Some(device) => Ok(device),
            None => open().map(Device::new),
        };
        let outputs = match opened {
            Ok(mut opened) => {
                let outputs = case.run(&mut opened);
                if !matches!(outputs, Err(DeviceError::Lost { .. })) {
                    device = Some(opened);
                }
                outputs
            }
            Err(error) => Err(error),
        };
        case.check(&outputs, &twins).into_iter().for_each(&mut *seen);
    }
    Ok(())
}
