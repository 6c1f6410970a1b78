//! Which matmul kernel takes how many rows of which weight: the device's own table, or one that was set for a shape.
//!
//! Invariant: a table ends, and names kernels of the device's arithmetic alone.

use std::collections::HashMap;

use super::kernel::{Arithmetic, MatMulVariant};
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

/// A line of a table, as [`MatMulLine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub max_rows: u32,
    pub variant: MatMulVariant,
    pub fills: bool,
}

impl Choice {
    /// Of `left` rows.
    pub fn takes(self, left: u32) -> u32 {
        let (rows, _) = self.variant.shape();
        if self.fills && left >= rows { left / rows * rows } else { left }
    }
}

pub struct MatMulTables {
    arithmetic: Arithmetic,
    own: Vec<Choice>,
    set: HashMap<MatMulShape, Vec<Choice>>,
}

impl MatMulTables {
    /// By the smallest kernel that takes all rows in one block. In f32 up to 48 rows go by sixteens: of these the
    /// largest block would compute a quarter or more for nothing. On tensor cores sixteen rows cost what one does,
    /// half of what one costs in f32. Counted, not measured.
    pub fn new(arithmetic: Arithmetic) -> MatMulTables {
        let own: &[(u32, MatMulVariant)] = match arithmetic {
            Arithmetic::F32 => &[
                (1, MatMulVariant::Rows1),
                (2, MatMulVariant::Rows2),
                (4, MatMulVariant::Rows4),
                (8, MatMulVariant::Rows8),
                (48, MatMulVariant::Rows16),
                (u32::MAX, MatMulVariant::Rows64),
            ],
            Arithmetic::MatrixUnits => &[
                (16, MatMulVariant::Matrix16),
                (32, MatMulVariant::Matrix32),
                (64, MatMulVariant::Matrix64),
                (u32::MAX, MatMulVariant::Matrix128),
            ],
        };
        let choice = |&(max_rows, variant): &(u32, MatMulVariant)| Choice { max_rows, variant, fills: false };
        MatMulTables { arithmetic, own: own.iter().map(choice).collect(), set: HashMap::new() }
    }

    pub fn of(&self, shape: MatMulShape) -> &[Choice] {
        self.set.get(&shape).unwrap_or(&self.own)
    }

    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// What a table may name.
    pub fn variants(&self) -> impl Iterator<Item = MatMulVariant> {
        let has_units = self.arithmetic == Arithmetic::MatrixUnits;
        MatMulVariant::ALL.into_iter().filter(move |variant| has_units || variant.arithmetic() == Arithmetic::F32)
    }

    pub fn kernels(&self) -> Vec<MatMulKernel> {
        let kernel = |variant: MatMulVariant| {
            let (rows, _) = variant.shape();
            MatMulKernel {
                name: variant.name().to_owned(),
                rows,
                least_cols: 1,
                tolerance: variant.arithmetic().tolerance(),
            }
        };
        self.variants().map(kernel).collect()
    }

    pub fn lines(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        let line = |choice: &Choice| MatMulLine {
            max_rows: (choice.max_rows != u32::MAX).then_some(choice.max_rows),
            kernel: choice.variant.name().to_owned(),
            fills: choice.fills,
        };
        self.of(shape).iter().map(line).collect()
    }

    /// An empty table brings back the device's own.
    pub fn set(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        if table.is_empty() {
            self.set.remove(&shape);
            return Ok(());
        }
        let choice = |line: &MatMulLine| {
            let variant = self.variants().find(|variant| variant.name() == line.kernel);
            let variant = variant.ok_or_else(|| format!("CUDA has no kernel {} here", line.kernel))?;
            Ok(Choice { max_rows: line.max_rows.unwrap_or(u32::MAX), variant, fills: line.fills })
        };
        let choices = table.iter().map(choice).collect::<Result<Vec<Choice>, String>>()?;
        let ascends = choices.windows(2).all(|pair| pair[0].max_rows < pair[1].max_rows);
        if !ascends || choices[0].max_rows == 0 || choices.last().is_none_or(|last| last.max_rows != u32::MAX) {
            return Err("its lines do not ascend to one without a bound".to_owned());
        }
        self.set.insert(shape, choices);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::WeightFormat;

    const SHAPE: MatMulShape = MatMulShape { format: WeightFormat::Q4_0, rows: 64, cols: 64 };

    #[test]
    fn its_own_table_can_be_written_and_set_and_takes_every_row_once() {
        for arithmetic in [Arithmetic::F32, Arithmetic::MatrixUnits] {
            let mut tables = MatMulTables::new(arithmetic);
            let (own, lines) = (tables.of(SHAPE).to_vec(), tables.lines(SHAPE));
            tables.set(SHAPE, &lines).expect("its own kernels");
            assert_eq!(tables.of(SHAPE), own);
            for kernel in tables.kernels() {
                tables.set(SHAPE, &MatMulLine::only(&kernel.name)).expect("its own kernel");
                let [choice] = tables.of(SHAPE)[..] else { panic!("one line") };
                for (left, fills) in (1..=200).flat_map(|left| [(left, false), (left, true)]) {
                    let taken = Choice { fills, ..choice }.takes(left);
                    assert!((1..=left).contains(&taken), "{choice:?} takes {taken} of {left}");
                }
            }
            tables.set(SHAPE, &[]).expect("nothing to be wrong");
            assert_eq!(tables.of(SHAPE), own);
        }
    }

    #[test]
    fn a_table_that_cannot_be_is_refused_and_changes_nothing() {
        let mut tables = MatMulTables::new(Arithmetic::F32);
        let own = tables.of(SHAPE).to_vec();
        let line = |max_rows, kernel: &str| MatMulLine { max_rows, kernel: kernel.to_owned(), fills: true };
        for (table, problem) in [
            (vec![line(None, "mat_mul_matrix_64")], "no kernel mat_mul_matrix_64"),
            (vec![line(Some(4), "mat_mul_4")], "ascend"),
            (vec![line(Some(0), "mat_mul_4"), line(None, "mat_mul_64")], "ascend"),
            (vec![line(None, "mat_mul_64"), line(None, "mat_mul_64")], "ascend"),
        ] {
            let said = tables.set(SHAPE, &table).expect_err("no table");
            assert!(said.contains(problem), "{said}");
        }
        assert_eq!(tables.of(SHAPE), own);
    }
}
