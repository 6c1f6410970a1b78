//! Single ops at the shapes of real models, beside what the device can do at all: its copy bandwidth and its peak of
//! multiply-adds, both measured first.
//!
//! Each op runs many times in one recording, one after another as in a step, on weights that take turns, so that no
//! cache holds what it would not hold in a model. All cases are gone through again and again until the time is spent,
//! so that a disturbance hits no case alone. Invariant: bytes and flops are counted from the shapes, never measured.

use std::time::{Duration, Instant};

use fullbore_engine::backend::{Backend, DeviceError, LoadError};
use fullbore_engine::tensor::WeightFormat;
use serde::Serialize;

use crate::statistics::median;

mod cases;
mod peaks;
pub(crate) mod rig;
mod shapes;
mod table;

use cases::Case;
pub use peaks::{DispatchCost, Peaks};
use rig::Rig;
pub use shapes::ModelShape;

#[derive(Clone, Debug)]
pub struct OpsOptions {
    pub shape: ModelShape,
    pub format: WeightFormat,
    /// M, ascending.
    pub rows: Vec<u32>,
    /// Cases whose names have this in them.
    pub only: String,
    /// At least one pass over all cases, however long it takes.
    pub time: Duration,
    /// Of a copy that measures the bandwidth, and of the weights that take turns: more than caches hold.
    pub cold_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum OpsError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("device {device} says that an op takes no time at all; ops are measured on devices that compute")]
    NoTime { device: String },
    #[error("nothing is left to measure: no case is called {only:?}, or none fits the device ({skipped})")]
    Nothing { only: String, skipped: String },
}

#[derive(Clone, Debug, Serialize)]
pub struct OpsReport {
    pub device: String,
    pub name: String,
    pub driver: String,
    pub tier: String,
    pub arithmetic: String,
    pub shape: ModelShape,
    pub format: &'static str,
    pub peaks: Peaks,
    pub dispatch: DispatchCost,
    pub num_passes: u32,
    pub ops: Vec<MeasuredOp>,
    /// Cases that were left out, each with its reason.
    pub skipped: Vec<String>,
    /// Where one row more costs more than it may.
    pub cliffs: Vec<Cliff>,
}

#[derive(Clone, Debug, Serialize)]
pub struct MeasuredOp {
    /// `mat_mul ffn_gate_up`.
    pub name: String,
    /// N and K of a matmul.
    pub shape: String,
    pub m: u32,
    pub bytes: u64,
    pub flops: u64,
    pub num_recordings: usize,
    pub best_ns: f64,
    pub median_ns: f64,
    /// Of the median: on software Vulkan a stamp may come late, so that the best is too good.
    pub bytes_per_s: f64,
    pub flops_per_s: f64,
    /// What the slower of all bytes at copy bandwidth and all flops at the peak would take, over the median.
    pub roofline_share: f64,
}

impl MeasuredOp {
    /// More than the device can do at all, as it was measured a moment before.
    pub fn is_too_good(&self) -> bool {
        self.roofline_share > MAX_SHARE
    }
}

/// Of the roofline, that noise explains.
const MAX_SHARE: f64 = 1.05;

/// From M to M + 1 the time may grow by 30 %, or by a tenth more than the rows do; the time of a row may grow by 5 %.
#[derive(Clone, Debug, Serialize)]
pub struct Cliff {
    pub name: String,
    pub shape: String,
    pub m: u32,
    /// Of M + 1 rows to M rows, by the median.
    pub ratio: f64,
    pub row_ratio: f64,
    /// Whether the time itself grows too much, not only that of a row.
    pub is_steep: bool,
}

/// Passes over all cases until the time is spent. Progress is told in passes and cases.
pub fn measure(
    backend: &mut dyn Backend,
    options: &OpsOptions,
    progress: &mut dyn FnMut(u32, usize),
) -> Result<OpsReport, OpsError> {
    let start = Instant::now();
    let info = backend.info().clone();
    let mut rig = Rig::new(backend)?;
    let (mut cases, skipped) = cases::load(&mut rig, options)?;
    if cases.is_empty() {
        return Err(OpsError::Nothing { only: options.only.clone(), skipped: skipped.join("; ") });
    }
    let peaks = peaks::measure(&mut rig, options.cold_bytes)?;
    let dispatch = peaks::dispatch_cost(&mut rig)?;
    let mut num_passes = 0;
    while num_passes == 0 || start.elapsed() < options.time {
        for case in &mut cases {
            case.run(&mut rig)?;
        }
        num_passes += 1;
        progress(num_passes, cases.len());
    }
    let ops: Vec<MeasuredOp> = cases.into_iter().map(|case| measured(case, &peaks)).collect();
    Ok(OpsReport {
        device: info.id,
        name: info.name,
        driver: info.driver,
        tier: info.tier,
        arithmetic: info.arithmetic,
        shape: options.shape,
        format: options.format.name(),
        cliffs: cliffs(&ops),
        peaks,
        dispatch,
        num_passes,
        ops,
        skipped,
    })
}

fn measured(case: Case, peaks: &Peaks) -> MeasuredOp {
    let Case { name, shape, m, bytes, flops, mut samples, .. } = case;
    let best_ns = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let median_ns = median(&mut samples).expect("a case runs in every pass");
    let per_s = |count: u64| count as f64 / median_ns * 1e9;
    let of_matrices = peaks.matrix_flops_per_s.filter(|_| name.starts_with("mat_mul"));
    let peak = of_matrices.map_or(peaks.flops_per_s, |of_matrices| of_matrices.max(peaks.flops_per_s));
    let bound_ns = (bytes as f64 / peaks.bytes_per_s).max(flops as f64 / peak) * 1e9;
    MeasuredOp {
        name,
        shape,
        m,
        bytes,
        flops,
        num_recordings: samples.len(),
        best_ns,
        median_ns,
        bytes_per_s: per_s(bytes),
        flops_per_s: per_s(flops),
        roofline_share: bound_ns / median_ns,
    }
}

/// Between neighbours of one case whose rows differ by one.
fn cliffs(ops: &[MeasuredOp]) -> Vec<Cliff> {
    let neighbours = ops.windows(2).filter(|pair| pair[0].name == pair[1].name && pair[0].m + 1 == pair[1].m);
    let cliff = |pair: &[MeasuredOp]| {
        let (m, ratio) = (pair[0].m, pair[1].median_ns / pair[0].median_ns);
        let rows_ratio = f64::from(m + 1) / f64::from(m);
        let (row_ratio, is_steep) = (ratio / rows_ratio, ratio > f64::max(1.3, 1.1 * rows_ratio));
        let (name, shape) = (pair[0].name.clone(), pair[0].shape.clone());
        (is_steep || row_ratio > 1.05).then_some(Cliff { name, shape, m, ratio, row_ratio, is_steep })
    };
    neighbours.filter_map(cliff).collect()
}

#[cfg(test)]
mod tests {
    use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::tensor::KvType;

    use super::*;

    fn options() -> OpsOptions {
        OpsOptions {
            shape: ModelShape::TINY,
            format: WeightFormat::Q4_0,
            rows: vec![1, 2, 70],
            only: String::new(),
            time: Duration::ZERO,
            cold_bytes: 1 << 16,
        }
    }

    #[test]
    fn every_case_is_measured_on_the_cpu() {
        let mut cpu = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        let report = measure(&mut cpu, &options(), &mut |_, _| {}).expect("it computes");
        let names: Vec<(&str, u32)> = report.ops.iter().map(|op| (op.name.as_str(), op.m)).collect();
        let many = [
            "mat_mul attn_qkv",
            "mat_mul attn_output",
            "mat_mul ffn_gate_up",
            "mat_mul ffn_down",
            "embed",
            "rms_norm",
            "add_norm",
            "rope_kv f16",
            "rope_kv q4_0",
            "prefill f16",
            "prefill q8_0",
            "gated_act",
        ];
        for (name, m) in many.into_iter().flat_map(|name| [(name, 1), (name, 2), (name, 70)]) {
            assert!(names.contains(&(name, m)), "{name} at {m} among {names:?}");
        }
        let csv = report.csv();
        assert_eq!(csv.lines().count(), 1 + report.ops.len());
        let num_fields =
            |line: &str| line.split('"').step_by(2).map(|part| part.matches(',').count()).sum::<usize>() + 1;
        assert!(csv.lines().all(|line| num_fields(line) == 8), "{csv}");
        // One row a sequence, and 64 at most.
        let few = [
            "mat_mul output",
            "mat_mul ffn_down + add_norm",
            "attention f16",
            "attention q8_0",
            "attention q4_0",
            "sample",
        ];
        for (name, m) in few.into_iter().flat_map(|name| [(name, 1), (name, 2)]) {
            assert!(names.contains(&(name, m)) && !names.contains(&(name, 70)), "{name} at {m} among {names:?}");
        }
        for op in &report.ops {
            assert!(op.best_ns > 0.0 && op.best_ns <= op.median_ns && op.roofline_share > 0.0, "{op:?}");
        }
        let counted = |name: &str, m| {
            let found = report.ops.iter().find(|op| op.name == name && op.m == m).expect("it is there");
            (found.bytes, found.flops)
        };
        // 64 x 64 weights in blocks of 18 bytes, x and the output.
        assert_eq!(counted("mat_mul attn_output", 2), (64 * 64 / 32 * 18 + 2 * 64 * 4 * 2, 2 * 2 * 64 * 64));
        // Two rows of 64 are read, added to, written, and written again as they are normed.
        assert_eq!(counted("add_norm", 2), (4 * 2 * 64 * 4 + 64 * 4, 5 * 2 * 64));
        // Both, of 96 columns each.
        let both = (64 * 96 / 32 * 18 + 2 * (96 + 64) * 4 + 4 * 2 * 64 * 4 + 64 * 4, 2 * 2 * 64 * 96 + 5 * 2 * 64);
        assert_eq!(counted("mat_mul ffn_down + add_norm", 2), both);
        // One KV head of 32 elements, K and V of 40 positions each; q and the output.
        let of_head = u64::from(KvType::Q4_0.head_words(32)) * 4;
        assert_eq!(counted("attention q4_0", 2), (2 * 40 * 2 * of_head + 2 * 2 * 64 * 4, 4 * 2 * 40 * 64));
        // The 70 rows of a prompt of 70 see 1 to 70 of it, and load it once.
        assert_eq!(counted("prefill f16", 70), (70 * 2 * 64 + 2 * 70 * 64 * 4, 4 * 70 * 71 / 2 * 64));
        assert!(report.to_string().contains("mat_mul ffn_down"), "{report}");
    }

    #[test]
    fn a_case_that_cannot_be_is_named() {
        let mut cpu = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        let options = OpsOptions { format: WeightFormat::Q4K, only: "mat_mul".to_owned(), ..options() };
        match measure(&mut cpu, &options, &mut |_, _| {}) {
            Err(error @ OpsError::Nothing { .. }) => assert!(error.to_string().contains("attn_qkv"), "{error}"),
            other => panic!("rows of 64 in blocks of 256: {other:?}"),
        }
    }

    #[test]
    fn a_device_that_does_not_compute_is_refused() {
        let mut sim = SimBackend::new(SimOptions::default());
        let error = measure(&mut sim, &options(), &mut |_, _| {}).expect_err("no arithmetic, no time");
        assert!(matches!(error, OpsError::NoTime { .. }), "{error}");
    }

    fn op(m: u32, best_ns: f64) -> MeasuredOp {
        MeasuredOp {
            name: "mat_mul".to_owned(),
            shape: String::new(),
            m,
            bytes: 1,
            flops: 1,
            num_recordings: 1,
            best_ns,
            median_ns: best_ns,
            bytes_per_s: 1.0,
            flops_per_s: 1.0,
            roofline_share: 1.0,
        }
    }

    #[test]
    fn more_than_the_device_can_do_is_too_good() {
        assert!(!MeasuredOp { roofline_share: 1.04, ..op(1, 1.0) }.is_too_good());
        assert!(MeasuredOp { roofline_share: 1.06, ..op(1, 1.0) }.is_too_good());
    }

    #[test]
    fn a_step_in_the_time_is_a_cliff() {
        // Twice for twice the rows; half as much again for a fifth more; a fifth more for a seventh more; then nothing.
        let ops = [op(1, 10.0), op(2, 20.0), op(5, 20.0), op(6, 30.0), op(7, 36.0), op(8, 36.0)];
        let found: Vec<(u32, bool)> = cliffs(&ops).iter().map(|cliff| (cliff.m, cliff.is_steep)).collect();
        assert_eq!(found, [(5, true)]);
        let found: Vec<(u32, bool)> = cliffs(&[op(8, 10.0), op(9, 12.0)]).iter().map(|c| (c.m, c.is_steep)).collect();
        assert_eq!(found, [(8, false)]);
    }
}
