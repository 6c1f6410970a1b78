//! Which of a device's matmul kernels is fastest for how many rows of which weight, found by trying them.
//!
//! M is divided into classes. In each the kernels that may suit are run by turns, at the fewest and the most rows of
//! the class, on weights that no cache holds; what is not clearly faster than the device's own choice is not chosen.
//! Invariant: whatever is chosen gives the bits that the device's own table gives; nothing here says so, every backend
//! does.

use std::fmt;
use std::time::{Duration, Instant};

use fullbore_engine::backend::{Backend, WeightSpec};
use fullbore_engine::op::{MatMul, Op};
use fullbore_engine::tensor::{Tensor, Weight};
use fullbore_engine::tuning::{MatMulKernel, MatMulLine, MatMulShape, TunedMatMul};

use crate::ops::OpsError;
use crate::ops::rig::Rig;
use crate::statistics::median;

#[derive(Clone, Debug)]
pub struct TuneOptions {
    pub shapes: Vec<MatMulShape>,
    /// By the shape's place: kernels that compute wrongly, by name.
    pub wrong: Vec<Vec<String>>,
    /// For all shapes together; every kernel that may suit is tried at least once.
    pub time: Duration,
    /// Of the weights that take turns: more than caches hold.
    pub cold_bytes: u64,
}

/// A shape's table, and what was measured on the way.
#[derive(Clone, Debug)]
pub struct TunedShape {
    pub shape: MatMulShape,
    pub lines: Vec<MatMulLine>,
    pub classes: Vec<TunedClass>,
}

#[derive(Clone, Debug)]
pub struct TunedClass {
    pub first_rows: u32,
    /// None for the last class.
    pub max_rows: Option<u32>,
    pub kernel: String,
    pub own_kernel: String,
    /// At the most rows that were measured: what was chosen, and the device's own choice.
    pub rows: u32,
    pub ns: f64,
    pub own_ns: f64,
}

/// The most rows of each class but the last.
const CLASS_ENDS: [u32; 15] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64];
const LARGEST_END: u32 = CLASS_ENDS[CLASS_ENDS.len() - 1];
/// Rows that stand for the last class.
const MANY_ROWS: u32 = 256;
/// A kernel that computes so many times the rows that there are is not tried, nor one that decodes a weight so often.
const MAX_WASTE: u32 = 2;
const MAX_DECODES: u32 = 8;
/// What must be gained to leave the device's own choice.
const LEAST_GAIN: f64 = 0.03;
/// Beyond so many times the best time a kernel is not tried again.
const HOPELESS: f64 = 1.3;
const LEAST_PASSES: u32 = 3;

/// Tells `progress` each shape that is done. Shapes of which there is no choice or no room are left out.
pub fn tune(
    backend: &mut dyn Backend,
    options: &TuneOptions,
    progress: &mut dyn FnMut(&TunedShape),
) -> Result<Vec<TunedShape>, OpsError> {
    assert_eq!(options.shapes.len(), options.wrong.len());
    let classes = options.shapes.len() as u32 * (CLASS_ENDS.len() as u32 + 1);
    let mut rig = Rig::new(backend)?;
    let mut tuned = Vec::new();
    for (&shape, wrong) in options.shapes.iter().zip(&options.wrong) {
        let mut kernels = rig.backend.mat_mul_kernels(shape.format);
        kernels.retain(|kernel| !wrong.contains(&kernel.name));
        let MatMulShape { format, rows, cols } = shape;
        let spec = WeightSpec { name: "weight".to_owned(), rows, cols, format };
        if kernels.is_empty() {
            continue;
        }
        let Ok(weights) = rig.cold_weights(&spec, options.cold_bytes)? else { continue };
        let own = rig.backend.mat_mul_table(shape);
        let max_rows =
            (rig.backend.info().max_buffer_bytes / 4 / u64::from(rows.max(cols))).min(MANY_ROWS.into()) as u32;
        let (x, out) = (rig.random(max_rows, cols)?, rig.zeros(max_rows, rows)?);
        let mut tuner =
            Tuner { rig: &mut rig, shape, weights, x, out, kernels, own, max_rows, time: options.time / classes };
        let found = tuner.tune();
        rig.backend.set_mat_mul_table(shape, &[]).expect("no line is wrong");
        let found = found?;
        progress(&found);
        tuned.push(found);
    }
    Ok(tuned)
}

struct Tuner<'a, 'b> {
    rig: &'a mut Rig<'b>,
    shape: MatMulShape,
    weights: Vec<Weight>,
    x: Tensor,
    out: Tensor,
    kernels: Vec<MatMulKernel>,
    /// The device's own table.
    own: Vec<MatMulLine>,
    /// That fit x and the output.
    max_rows: u32,
    /// For a class.
    time: Duration,
}

/// A kernel that may suit a class.
struct Candidate {
    line: MatMulLine,
    /// By the rows that are measured: ops of a recording, and nanoseconds of one op by pass.
    measured: Vec<(usize, Vec<f64>)>,
    is_own: bool,
}

impl Candidate {
    fn times(&self) -> Vec<f64> {
        self.measured.iter().map(|(_, samples)| median(&mut samples.clone()).expect("a pass")).collect()
    }
}

impl TunedShape {
    pub fn found(&self) -> TunedMatMul {
        let mut times: Vec<(u32, f64)> = self.classes.iter().map(|class| (class.rows, class.ns)).collect();
        times.dedup_by_key(|&mut (rows, _)| rows);
        TunedMatMul { shape: self.shape, table: self.lines.clone(), times }
    }
}

impl Tuner<'_, '_> {
    fn tune(&mut self) -> Result<TunedShape, OpsError> {
        let (mut lines, mut classes): (Vec<MatMulLine>, Vec<TunedClass>) = (Vec::new(), Vec::new());
        let mut first_rows = 1;
        for max_rows in CLASS_ENDS.map(Some).into_iter().chain([None]) {
            let most = max_rows.unwrap_or(MANY_ROWS).min(self.max_rows);
            let rows = if first_rows >= most { vec![most] } else { vec![first_rows, most] };
            let (line, times) = self.fastest(&lines, first_rows, &rows, max_rows)?;
            let own = self.own_line(max_rows);
            classes.push(TunedClass {
                first_rows,
                max_rows,
                kernel: line.kernel.clone(),
                own_kernel: own.kernel.clone(),
                rows: most,
                ns: times.0,
                own_ns: times.1,
            });
            match lines.last_mut().filter(|last| (&last.kernel, last.fills) == (&line.kernel, line.fills)) {
                Some(last) => last.max_rows = max_rows,
                None => lines.push(MatMulLine { max_rows, ..line }),
            }
            first_rows = most + 1;
        }
        Ok(TunedShape { shape: self.shape, lines, classes })
    }

    /// The line of the device's own table that takes `max_rows`.
    fn own_line(&self, max_rows: Option<u32>) -> &MatMulLine {
        let takes = |line: &&MatMulLine| line.max_rows.is_none() || max_rows.is_some_and(|m| line.max_rows >= Some(m));
        self.own.iter().find(takes).expect("a table ends with a line without a bound")
    }

    fn candidates(&self, first_rows: u32, rows: &[u32], max_rows: Option<u32>) -> Vec<Candidate> {
        let own = self.own_line(max_rows);
        let candidate = |kernel: &str, fills, is_own| Candidate {
            line: MatMulLine { max_rows: None, kernel: kernel.to_owned(), fills },
            measured: vec![(0, Vec::new()); rows.len()],
            is_own,
        };
        let mut found = vec![candidate(&own.kernel, own.fills, true)];
        let decoded_rows = first_rows.min(LARGEST_END);
        let suits =
            |kernel: &&MatMulKernel| kernel.rows < MAX_WASTE * first_rows && decoded_rows <= MAX_DECODES * kernel.rows;
        for kernel in self.kernels.iter().filter(suits) {
            let has_rest = rows.iter().any(|rows| rows % kernel.rows != 0 && *rows > kernel.rows);
            for fills in [false, true].into_iter().filter(|&fills| !fills || has_rest) {
                // With nothing left over it makes no difference whether the own line fills.
                let is_own = kernel.name == own.kernel && (fills == own.fills || !has_rest);
                if !is_own {
                    found.push(candidate(&kernel.name, fills, false));
                }
            }
        }
        found
    }

    /// The line to choose behind `lines` for a class, and what it and the device's own choice take at its most rows.
    fn fastest(
        &mut self,
        lines: &[MatMulLine],
        first_rows: u32,
        rows: &[u32],
        max_rows: Option<u32>,
    ) -> Result<(MatMulLine, (f64, f64)), OpsError> {
        let begun = Instant::now();
        let mut candidates = self.candidates(first_rows, rows, max_rows);
        let mut num_passes = 0;
        while num_passes < LEAST_PASSES || begun.elapsed() < self.time {
            for candidate in &mut candidates {
                self.run(lines, candidate, rows)?;
            }
            num_passes += 1;
            let scores = scores(&candidates);
            let mut scores = scores.iter();
            candidates.retain(|candidate| *scores.next().expect("one each") < HOPELESS || candidate.is_own);
            if candidates.len() == 1 {
                break;
            }
        }
        let scores = scores(&candidates);
        let best = (0..candidates.len()).min_by(|&a, &b| scores[a].total_cmp(&scores[b])).expect("the own one");
        let own = candidates.iter().position(|candidate| candidate.is_own).expect("it is kept");
        let chosen = if scores[best] < scores[own] * (1.0 - LEAST_GAIN) { best } else { own };
        let [ns, own_ns] = [chosen, own].map(|index| *candidates[index].times().last().expect("some rows"));
        Ok((candidates.swap_remove(chosen).line, (ns, own_ns)))
    }

    fn run(&mut self, lines: &[MatMulLine], candidate: &mut Candidate, rows: &[u32]) -> Result<(), OpsError> {
        let table = [lines, std::slice::from_ref(&candidate.line)].concat();
        self.rig.backend.set_mat_mul_table(self.shape, &table).expect("kernels that the device has named");
        for (&m, (repeats, samples)) in rows.iter().zip(&mut candidate.measured) {
            let (x, out) = (self.x.first_rows(m), self.out.first_rows(m));
            let op = |&weight: &Weight| Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out });
            let ops: Vec<Op> = self.weights.iter().map(op).collect();
            if *repeats == 0 {
                *repeats = self.rig.repeats(&ops)?;
            }
            samples.push(self.rig.run(&ops, *repeats)?.device_ns / *repeats as f64);
        }
        Ok(())
    }
}

/// Of each candidate how many times the best time it takes, at its rows on average: 1 at best.
fn scores(candidates: &[Candidate]) -> Vec<f64> {
    let times: Vec<Vec<f64>> = candidates.iter().map(Candidate::times).collect();
    let best = |place: usize| times.iter().map(|times| times[place]).fold(f64::INFINITY, f64::min);
    let num_rows = times[0].len();
    let score = |times: &Vec<f64>| (0..num_rows).map(|place| times[place] / best(place)).sum::<f64>();
    times.iter().map(|times| score(times) / num_rows as f64).collect()
}

impl fmt::Display for TunedShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MatMulShape { format, rows, cols } = self.shape;
        writeln!(f, "{} {rows} x {cols}", format.name())?;
        for class in &self.classes {
            let TunedClass { first_rows, kernel, own_kernel, rows, ns, own_ns, .. } = class;
            let most = match class.max_rows {
                Some(most) if most == *first_rows => String::new(),
                Some(most) => format!("to {most}"),
                None => "up".to_owned(),
            };
            write!(f, "  M {first_rows:>3} {most:<6}  {kernel:<16}{:>10.1} us at {rows}", ns / 1e3)?;
            if kernel != own_kernel || ns != own_ns {
                write!(f, ", instead of {:.1} by {own_kernel}", own_ns / 1e3)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::ops::Range;

    use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::backend::{DeviceError, DeviceInfo, LoadError, LoadTimes, RowSource, Ticket};
    use fullbore_engine::recording::Recording;
    use fullbore_engine::tensor::{BufferId, WeightFormat};

    use super::*;

    const SHAPE: MatMulShape = MatMulShape { format: WeightFormat::Q4_0, rows: 64, cols: 64 };

    /// A device that computes nothing, whose kernels take a time for each workgroup of so many rows.
    struct Priced {
        inner: SimBackend,
        prices: Vec<(&'static str, u32, u64)>,
        tables: HashMap<MatMulShape, Vec<MatMulLine>>,
        now: Instant,
        took: Vec<Duration>,
    }

    impl Priced {
        fn new(prices: &[(&'static str, u32, u64)]) -> Priced {
            let inner = SimBackend::new(SimOptions::default());
            Priced { inner, prices: prices.to_vec(), tables: HashMap::new(), now: Instant::now(), took: Vec::new() }
        }

        fn ns(&self, op: &MatMul) -> u64 {
            let table = self.mat_mul_table(MatMulShape::of(op.weight));
            let (mut left, mut ns) = (op.x.rows, 0);
            while left > 0 {
                let line = table.iter().find(|line| line.max_rows.is_none_or(|most| most >= left)).expect("it ends");
                let price = self.prices.iter().find(|(name, ..)| *name == line.kernel).expect("its own kernel");
                let taken = if line.fills && left > price.1 { left / price.1 * price.1 } else { left };
                ns += u64::from(taken.div_ceil(price.1)) * price.2;
                left -= taken;
            }
            ns
        }
    }

    impl Backend for Priced {
        fn info(&self) -> &DeviceInfo {
            self.inner.info()
        }

        fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
            self.inner.alloc(label, size_bytes)
        }

        fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
            self.inner.alloc_host(label, size_bytes)
        }

        fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
            self.inner.write(buffer, offset_bytes, data)
        }

        fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
            self.inner.load_weight(spec, source)
        }

        fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
            self.inner.weight_bytes(spec)
        }

        fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
            let ns = |op: &Op| if let Op::MatMul(op) = op { self.ns(op) } else { 0 };
            let took = Duration::from_nanos(recording.ops.iter().map(ns).sum());
            self.took.push(took);
            Ok(Ticket(self.took.len() as u64 - 1))
        }

        fn wait(&mut self, ticket: Ticket, _out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
            let begun = self.now;
            self.now += self.took[ticket.0 as usize];
            Ok(begun..self.now)
        }

        fn settle(&mut self) -> LoadTimes {
            self.inner.settle()
        }

        fn reopen(&mut self) -> Result<(), DeviceError> {
            self.inner.reopen()
        }

        fn mat_mul_kernels(&self, _format: WeightFormat) -> Vec<MatMulKernel> {
            let kernel = |&(name, rows, _): &(&str, _, _)| MatMulKernel { name: name.to_owned(), rows, tolerance: 0.0 };
            self.prices.iter().map(kernel).collect()
        }

        /// Its own choice is its first kernel for whatever there is.
        fn mat_mul_table(&self, shape: MatMulShape) -> Vec<MatMulLine> {
            self.tables.get(&shape).cloned().unwrap_or_else(|| MatMulLine::only(self.prices[0].0).to_vec())
        }

        fn set_mat_mul_table(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
            self.tables.insert(shape, table.to_vec());
            self.tables.retain(|_, table| !table.is_empty());
            Ok(())
        }

        fn now(&self) -> Instant {
            self.now
        }
    }

    fn options(wrong: &[&str]) -> TuneOptions {
        let wrong = vec![wrong.iter().map(|name| (*name).to_owned()).collect()];
        TuneOptions { shapes: vec![SHAPE], wrong, time: Duration::ZERO, cold_bytes: 1 << 12 }
    }

    fn line(max_rows: Option<u32>, kernel: &str, fills: bool) -> MatMulLine {
        MatMulLine { max_rows, kernel: kernel.to_owned(), fills }
    }

    #[test]
    fn the_fastest_kernel_of_each_class_is_found() {
        // A weight costs 10 to decode and 2 for each row.
        let mut device = Priced::new(&[("one", 1, 12_000), ("four", 4, 18_000), ("eight", 8, 26_000)]);
        let [found] = &tune(&mut device, &options(&[]), &mut |_| {}).expect("it runs")[..] else { panic!("one shape") };
        let first: Vec<_> = found.lines[..3].to_vec();
        assert_eq!(first, [line(Some(2), "one", false), line(Some(4), "four", false), line(Some(8), "eight", false)]);
        assert_eq!(found.lines.last(), Some(&line(None, "eight", true)));
        let eight = found.classes.iter().find(|class| class.max_rows == Some(8)).expect("a class");
        assert_eq!((eight.ns, eight.own_ns), (26_000.0, 8.0 * 12_000.0));
        // Nine to twelve: eight, and four for the rest.
        assert_eq!(found.lines[3], line(Some(12), "eight", true));
        assert!(device.tables.is_empty(), "the device's own choice again");
        let text = found.to_string();
        assert!(text.contains("M   9 to 10") && text.contains("26.0 us at 8, instead of 96.0 by one"), "{text}");
    }

    #[test]
    fn the_devices_own_choice_stays_where_little_is_gained_and_a_wrong_kernel_is_never_chosen() {
        let mut device = Priced::new(&[("one", 1, 1_000), ("two", 2, 1_960), ("four", 4, 3_000)]);
        let found = tune(&mut device, &options(&["four"]), &mut |_| {}).expect("it runs");
        assert_eq!(found[0].lines, MatMulLine::only("one"));
    }

    #[test]
    fn there_is_nothing_to_tune_where_there_is_no_choice() {
        let mut cpu = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        assert!(tune(&mut cpu, &options(&[]), &mut |_| {}).expect("it runs").is_empty());
    }
}
