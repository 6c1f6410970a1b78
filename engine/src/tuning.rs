//! Which of a device's matmul kernels takes how many rows of activations: plain data, found by measuring and kept
//! between runs.
//!
//! Invariant: kernels are known by their names alone; what a name means is their backend's affair.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tensor::{Weight, WeightFormat};

/// What decides how fast a kernel multiplies by a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatMulShape {
    pub format: WeightFormat,
    /// N and K.
    pub rows: u32,
    pub cols: u32,
}

impl MatMulShape {
    pub fn of(weight: Weight) -> MatMulShape {
        MatMulShape { format: weight.format, rows: weight.rows, cols: weight.cols }
    }
}

impl fmt::Display for MatMulShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} x {}", self.format.name(), self.rows, self.cols)
    }
}

/// A kernel that could multiply by weights of some format.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMulKernel {
    pub name: String,
    /// Rows of activations that a workgroup computes.
    pub rows: u32,
    /// Of weights with fewer columns than these it is another kernel by another name.
    pub least_cols: u32,
    /// By how much its products may differ from the plain cpu's, relative to the largest.
    pub tolerance: f32,
}

/// A line of a table, which ascends and ends with a line without a bound. The first line whose `max_rows` is not below
/// the rows that are left takes some, and the table is asked again about the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatMulLine {
    pub max_rows: Option<u32>,
    pub kernel: String,
    /// Whether it takes only as many rows as fill its workgroups, if they fill one; else it takes all.
    pub fills: bool,
}

/// What was found for a shape.
#[derive(Clone, Debug, PartialEq)]
pub struct TunedMatMul {
    pub shape: MatMulShape,
    pub table: Vec<MatMulLine>,
    /// Rows, and nanoseconds of a product by this table: at least two pairs, of rising rows and finite times.
    pub times: Vec<(u32, f64)>,
}

impl MatMulLine {
    /// A table of one line.
    pub fn only(kernel: &str) -> [MatMulLine; 1] {
        [MatMulLine { max_rows: None, kernel: kernel.to_owned(), fills: false }]
    }
}
