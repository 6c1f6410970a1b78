//! What the device can do at all: bytes and multiply-adds a second, and what a dispatch costs.

use fullbore_engine::backend::DeviceError;
use fullbore_engine::op::{MUL_ADD_ROUNDS, MulAdd, Op};
use fullbore_engine::recording::BufferCopy;
use fullbore_engine::tensor::Tensor;
use serde::Serialize;

use super::OpsError;
use super::rig::Rig;
use crate::statistics::median;

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peaks {
    /// The better of the two.
    pub bytes_per_s: f64,
    /// A buffer copied by the device's copy command, and one changed in place by a kernel; read and written bytes.
    pub copy_bytes_per_s: f64,
    pub kernel_bytes_per_s: f64,
    /// In f32; a multiply-add is two.
    pub flops_per_s: f64,
    /// Of matrix units, where products go to them: operands in f16, sums in f32.
    pub matrix_flops_per_s: Option<f64>,
}

/// What an op on 64 elements takes among others.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DispatchCost {
    /// Where no op waits for another.
    pub independent_ns: f64,
    /// Where each waits for the one before.
    pub dependent_ns: f64,
    /// On the host, to hand it over.
    pub submit_ns: f64,
}

/// Recordings that the median is taken of.
const TRIES: usize = 5;
/// What a copy should take, at most.
const SLOW_COPY_NS: f64 = 5e7;
/// Elements of a row that is copied.
const COPIED_COLS: u32 = 1 << 14;
/// Dispatches that are compared with one.
const NUM_DISPATCHES: usize = 256;

/// Copies of `copied_bytes` at most.
pub fn measure(rig: &mut Rig, copied_bytes: u64) -> Result<Peaks, OpsError> {
    let max_bytes = copied_bytes.min(rig.backend.info().max_buffer_bytes);
    let rows = (max_bytes / 4 / u64::from(COPIED_COLS)).max(1) as u32;
    let (x, y) = (rig.random(rows, COPIED_COLS)?, rig.zeros(rows, COPIED_COLS)?);
    // Less on a device that takes longer than a recording should.
    let whole_ns = rig.run(&[change(x, MUL_ADD_ROUNDS)], 1)?.device_ns;
    let rows = (f64::from(rows) * (SLOW_COPY_NS / whole_ns).min(1.0)).ceil() as u32;
    let [x, y] = [x, y].map(|tensor| tensor.first_rows(rows));
    let size_bytes = x.size_bytes();
    let copy = BufferCopy { from: x.buffer, from_bytes: 0, to: y.buffer, to_bytes: 0, size_bytes };
    let one_ns = rig.copy(copy, 1)?.device_ns;
    let repeats = ((1e7 / one_ns) as usize).clamp(1, 100);
    let copy_ns = usual(rig, |rig| Ok(rig.copy(copy, repeats)?.device_ns / repeats as f64))?;
    let kernel_ns = op_ns(rig, change(x, MUL_ADD_ROUNDS))?;
    let [copy_bytes_per_s, kernel_bytes_per_s] = [copy_ns, kernel_ns].map(|ns| (2 * size_bytes) as f64 / ns * 1e9);
    let bytes_per_s = copy_bytes_per_s.max(kernel_bytes_per_s);
    let x = x.first_rows(rows.min(MUL_ADD_ROWS));
    let flops_per_s = flops_per_s(rig, &|rounds| change(x, rounds), 1)?;
    let matrix_size = rig.backend.matrix_size();
    let matrix_flops_per_s =
        matrix_size.map(|size| self::flops_per_s(rig, &|rounds| sum(x, rounds), size)).transpose()?;
    Ok(Peaks { bytes_per_s, copy_bytes_per_s, kernel_bytes_per_s, flops_per_s, matrix_flops_per_s })
}

/// Stays finite, whatever x begins with.
fn change(x: Tensor, rounds: u32) -> Op {
    Op::MulAdd(MulAdd { x, scale: 0.5, offset: 1.0, rounds })
}

/// What matrix units can do as well.
fn sum(x: Tensor, rounds: u32) -> Op {
    Op::MulAdd(MulAdd { x, scale: 1.0, offset: 1.0 / 1024.0, rounds })
}

/// Rows that are multiplied and added: 4 million elements, for as many invocations as a large GPU has at once.
const MUL_ADD_ROWS: u32 = 256;

/// Of so many rounds that what is read and written takes no part of the time to speak of; `products` of an element are
/// what it multiplies in a round.
fn flops_per_s(rig: &mut Rig, op: &dyn Fn(u32) -> Op, products: u32) -> Result<f64, OpsError> {
    let mut rounds = 8 * MUL_ADD_ROUNDS;
    while rounds < 4096 * MUL_ADD_ROUNDS && rig.run(&[op(rounds)], 1)?.device_ns < 1e7 {
        rounds *= 2;
    }
    let Op::MulAdd(MulAdd { x, .. }) = op(rounds) else { unreachable!("no other op multiplies and adds alone") };
    let ns = op_ns(rig, op(rounds))?;
    Ok(2.0 * f64::from(products) * f64::from(x.num_elements()) * f64::from(rounds) / ns * 1e9)
}

fn op_ns(rig: &mut Rig, op: Op) -> Result<f64, OpsError> {
    let repeats = rig.repeats(&[op], 1)?;
    usual(rig, |rig| Ok(rig.run(&[op], repeats)?.device_ns / repeats as f64))
}

fn usual(rig: &mut Rig, run: impl Fn(&mut Rig) -> Result<f64, OpsError>) -> Result<f64, OpsError> {
    let mut tries = (0..TRIES).map(|_| run(rig)).collect::<Result<Vec<f64>, OpsError>>()?;
    Ok(median(&mut tries).expect("there are some"))
}

/// By the slope between one dispatch and many.
pub fn dispatch_cost(rig: &mut Rig) -> Result<DispatchCost, OpsError> {
    let mut op = || -> Result<Op, DeviceError> { Ok(change(rig.zeros(1, 64)?, MUL_ADD_ROUNDS)) };
    let independent = (0..NUM_DISPATCHES).map(|_| op()).collect::<Result<Vec<Op>, DeviceError>>()?;
    let dependent = &independent[..1];
    let slope = |many: f64, one: f64| (many - one).max(0.0) / (NUM_DISPATCHES - 1) as f64;
    rig.run(&independent, NUM_DISPATCHES)?;
    let one_ns = usual(rig, |rig| Ok(rig.run(dependent, 1)?.device_ns))?;
    let independent_ns = usual(rig, |rig| Ok(rig.run(&independent, NUM_DISPATCHES)?.device_ns))?;
    let dependent_ns = usual(rig, |rig| Ok(rig.run(dependent, NUM_DISPATCHES)?.device_ns))?;
    let one_submit_ns = usual(rig, |rig| Ok(rig.run(dependent, 1)?.submit_ns))?;
    let submit_ns = usual(rig, |rig| Ok(rig.run(&independent, NUM_DISPATCHES)?.submit_ns))?;
    Ok(DispatchCost {
        independent_ns: slope(independent_ns, one_ns),
        dependent_ns: slope(dependent_ns, one_ns),
        submit_ns: slope(submit_ns, one_submit_ns),
    })
}
