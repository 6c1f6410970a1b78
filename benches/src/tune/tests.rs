//! Tuning on a device that computes nothing and whose kernels have prices.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::backend::{DeviceError, Ticket};
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::WeightFormat;

use super::*;
use crate::workload::SplitMix64;

const SHAPE: MatMulShape = MatMulShape { format: WeightFormat::Q4_0, rows: 64, cols: 64 };
const OUTPUT: MatMulShape = MatMulShape { rows: 96, ..SHAPE };

/// A device that computes nothing, whose kernels take a time for each workgroup of so many rows.
struct Priced {
    inner: SimBackend,
    prices: Vec<(&'static str, u32, u64)>,
    tables: HashMap<MatMulShape, Vec<MatMulLine>>,
    now: Instant,
    took: Vec<Duration>,
    /// What products by all but the first kernel take more in a recording that has several shapes.
    beside_others_ns: u64,
    /// Kernels that have no room for so many rows.
    cramped: Option<(&'static str, u32)>,
    /// Times are off by up to so much of themselves, either way.
    noise: f64,
    random: SplitMix64,
}

impl Priced {
    fn new(prices: &[(&'static str, u32, u64)]) -> Priced {
        let inner = SimBackend::new(SimOptions::default());
        let (tables, now, took, random) = (HashMap::new(), Instant::now(), Vec::new(), SplitMix64(1));
        Priced {
            inner,
            prices: prices.to_vec(),
            tables,
            now,
            took,
            beside_others_ns: 0,
            cramped: None,
            noise: 0.0,
            random,
        }
    }

    fn ns(&self, op: &MatMul, is_alone: bool) -> u64 {
        let table = Around::mat_mul_table(self, MatMulShape::of(op.weight));
        let (mut left, mut ns) = (op.x.rows, 0);
        while left > 0 {
            let line = table.iter().find(|line| line.max_rows.is_none_or(|most| most >= left)).expect("it ends");
            let price = self.prices.iter().find(|(name, ..)| *name == line.kernel).expect("its own kernel");
            let taken = if line.fills && left > price.1 { left / price.1 * price.1 } else { left };
            ns += u64::from(taken.div_ceil(price.1)) * price.2;
            ns += if is_alone || price.0 == self.prices[0].0 { 0 } else { self.beside_others_ns };
            left -= taken;
        }
        ns
    }
}

impl Around for Priced {
    fn inner(&self) -> &dyn Backend {
        &self.inner
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut self.inner
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        let products = || recording.ops.iter().filter_map(|op| if let Op::MatMul(op) = op { Some(op) } else { None });
        let shapes: HashSet<MatMulShape> = products().map(|op| MatMulShape::of(op.weight)).collect();
        let ns: u64 = products().map(|op| self.ns(op, shapes.len() == 1)).sum();
        let off = self.noise * (f64::from(self.random.below(2001)) / 1000.0 - 1.0);
        self.took.push(Duration::from_nanos((ns as f64 * (1.0 + off)) as u64));
        Ok(Ticket(self.took.len() as u64 - 1))
    }

    fn wait(&mut self, ticket: Ticket, _out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let begun = self.now;
        self.now += self.took[ticket.0 as usize];
        Ok(begun..self.now)
    }

    fn mat_mul_kernels(&self, _format: WeightFormat) -> Vec<MatMulKernel> {
        let kernel = |&(name, rows, _): &(&str, _, _)| MatMulKernel {
            name: name.to_owned(),
            rows,
            least_cols: 1,
            tolerance: 0.0,
        };
        self.prices.iter().map(kernel).collect()
    }

    fn has_room(&self, _shape: MatMulShape, kernel: &str, rows: u32) -> bool {
        self.cramped.is_none_or(|(name, first)| kernel != name || rows < first)
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

/// Two layers of one product, and the output.
fn options(wrong: &[&str]) -> TuneOptions {
    let wrong = vec![wrong.iter().map(|name| (*name).to_owned()).collect(); 2];
    let products = StepProducts { layers: vec![SHAPE; 2], output: Some(OUTPUT) };
    TuneOptions { shapes: vec![SHAPE, OUTPUT], wrong, products, time: Duration::ZERO, cold_bytes: 1 << 12 }
}

fn line(max_rows: Option<u32>, kernel: &str, fills: bool) -> MatMulLine {
    MatMulLine { max_rows, kernel: kernel.to_owned(), fills }
}

/// A weight costs 10 us to decode and 2 for each row.
const KERNELS: [(&str, u32, u64); 3] = [("one", 1, 12_000), ("four", 4, 18_000), ("eight", 8, 26_000)];

#[test]
fn the_fastest_kernel_of_each_class_is_found_and_kept() {
    let mut device = Priced::new(&KERNELS);
    let mut text = String::new();
    let mut told = Vec::new();
    let mut tell = |part: Found| {
        text += &part.to_string();
        told.extend(if let Found::Shape(shape) = part { Some(shape.found()) } else { None });
    };
    let found = tune(&mut device, &options(&[]), &mut tell).expect("it runs");
    let wanted: Vec<_> = found.shapes.iter().map(TunedShape::found).collect();
    assert_eq!(told, wanted, "each as it is found, so that it can be kept");
    let [shape, _] = &found.shapes[..] else { panic!("two shapes: {found:?}") };
    let lines = shape.lines();
    assert_eq!(lines[..3], [line(Some(2), "one", false), line(Some(4), "four", false), line(Some(8), "eight", false)]);
    assert_eq!(lines.last(), Some(&line(None, "eight", true)));
    let eight = shape.classes.iter().find(|class| class.rows.max_rows == Some(8)).expect("a class");
    assert_eq!((eight.ns(), eight.own_ns), (26_000.0, 8.0 * 12_000.0));
    // Nine to twelve: eight, and four for the rest.
    assert_eq!(lines[3], line(Some(12), "eight", true));
    assert!(device.tables.is_empty(), "the device's own choice again");
    assert!(text.contains("M   9 to 10") && text.contains("26.0 us at 8, instead of 96.0 by one"), "{text}");
    assert!(found.steps.len() > 10 && found.steps.iter().all(|step| step.is_kept && step.num_changed == 2));
    assert!(text.contains("the products of a step of 8 with 2 tables changed: 0.271 x"), "{text}");
}

#[test]
fn the_devices_own_choice_stays_where_little_is_gained_and_a_wrong_kernel_is_never_chosen() {
    let mut device = Priced::new(&[("one", 1, 1_000), ("two", 2, 1_960), ("four", 4, 3_000)]);
    let found = tune(&mut device, &options(&["four"]), &mut |_| {}).expect("it runs");
    assert_eq!(found.shapes[0].lines(), MatMulLine::only("one"));
    assert!(found.steps.is_empty(), "there is nothing to hold");
}

#[test]
fn a_kernel_is_not_tried_where_it_has_no_room() {
    let mut device = Priced { cramped: Some(("eight", 8)), ..Priced::new(&KERNELS) };
    let found = tune(&mut device, &options(&[]), &mut |_| {}).expect("it runs");
    for class in &found.shapes[0].classes {
        let chosen = class.chosen.as_ref().map(|chosen| chosen.line.kernel.as_str());
        assert!(chosen != Some("eight") || class.rows.most < 8, "{class:?}");
    }
}

#[test]
fn what_is_faster_alone_and_slower_in_a_step_is_taken_back() {
    let mut device = Priced { beside_others_ns: 100_000, ..Priced::new(&KERNELS) };
    let mut text = String::new();
    let found = tune(&mut device, &options(&[]), &mut |part| text += &part.to_string()).expect("it runs");
    let gives_way = |step: &&TunedStep| step.ratio.median > 1.0;
    assert!(found.steps.iter().any(|step| gives_way(&step)), "{text}");
    for step in &found.steps {
        assert_eq!(step.is_kept, !gives_way(&step), "{text}");
        let of_class = |shape: &TunedShape| {
            shape.classes.iter().find(|class| class.rows.max_rows == step.max_rows).expect("a class").chosen.is_some()
        };
        assert!(found.shapes.iter().all(|shape| of_class(shape) == step.is_kept), "{text}");
    }
    assert!(text.contains("the device's own tables stay"), "{text}");
    let eight = found.shapes[0].found().times.iter().find(|(rows, _)| *rows == 8).copied();
    assert_eq!(eight, Some((8, 96_000.0)), "times are those of the table that is kept");
}

#[test]
fn noise_chooses_nothing() {
    let equal = [("one", 8, 20_000), ("two", 8, 20_000), ("three", 8, 20_000)];
    let mut device = Priced { noise: 0.1, ..Priced::new(&equal) };
    let found = tune(&mut device, &options(&[]), &mut |_| {}).expect("it runs");
    let kept = found.steps.iter().filter(|step| step.is_kept).count();
    assert_eq!(kept, 0, "{found:?}");
}

#[test]
fn there_is_nothing_to_tune_where_there_is_no_choice() {
    let mut cpu = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
    assert!(tune(&mut cpu, &options(&[]), &mut |_| {}).expect("it runs").shapes.is_empty());
}
