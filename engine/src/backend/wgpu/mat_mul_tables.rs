//! Which matmul kernel takes how many rows of which weight: the tier's own table, or one that was set for a shape.
//!
//! Invariant: a table ends, and names kernels of its tier alone.

use std::collections::HashMap;

use fullbore_shaders::{Arithmetic, LEAST_SPREAD_K, MatMulChoice, MatMulVariant, MatrixUnits, Tier, num_spans};

use super::arithmetic::of_format;
use crate::backend::packing::{Layout, UNIT};
use crate::tensor::WeightFormat;
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

pub(super) struct MatMulTables {
    tier: Tier,
    arithmetic: Arithmetic,
    /// The tier's own, for weights that are codes and for floats.
    own: [Vec<MatMulChoice>; 2],
    set: HashMap<MatMulShape, Vec<MatMulChoice>>,
}

impl MatMulTables {
    pub fn new(tier: Tier, arithmetic: Arithmetic) -> MatMulTables {
        let own =
            [WeightFormat::Q4_0, WeightFormat::F16].map(|format| tier.mat_mul_choices(of_format(arithmetic, format)));
        MatMulTables { tier, arithmetic, own, set: HashMap::new() }
    }

    /// What products go to, if they do.
    pub fn matrix_units(&self) -> Option<MatrixUnits> {
        if let Arithmetic::MatrixUnits(units) = self.arithmetic { Some(units) } else { None }
    }

    pub fn of(&self, shape: MatMulShape) -> &[MatMulChoice] {
        self.set.get(&shape).map_or_else(|| self.own_of(shape.format), Vec::as_slice)
    }

    /// Whether no table was set for it.
    pub fn is_own(&self, shape: MatMulShape) -> bool {
        !self.set.contains_key(&shape)
    }

    /// The tier's own.
    pub fn own_of(&self, format: WeightFormat) -> &[MatMulChoice] {
        &self.own[usize::from(Layout::of(format).is_float())]
    }

    /// Each kernel, and each again with workgroups of its own for every span of K.
    fn variants(&self, format: WeightFormat) -> impl Iterator<Item = (MatMulVariant, bool)> {
        let variants = self.tier.mat_mul_variants(of_format(self.arithmetic, format));
        let spread: Vec<MatMulVariant> = variants.iter().copied().filter(|variant| variant.can_spread()).collect();
        let all = |variants: Vec<MatMulVariant>, spreads| variants.into_iter().map(move |variant| (variant, spreads));
        all(variants, false).chain(all(spread, true))
    }

    /// What a table may name.
    pub fn kernels(&self, format: WeightFormat) -> Vec<MatMulKernel> {
        let tolerance = of_format(self.arithmetic, format).tolerance();
        let kernel = |(variant, spreads): (MatMulVariant, bool)| MatMulKernel {
            name: name(variant, spreads),
            rows: variant.rows(),
            least_cols: if spreads { LEAST_SPREAD_K } else { 1 },
            tolerance,
        };
        self.variants(format).map(kernel).collect()
    }

    /// Sums that a kernel leaves to be added up, where its workgroups share the K of `shape`; else none.
    pub fn num_partials(&self, shape: MatMulShape, kernel: &str, rows: u32) -> u64 {
        let is_spread =
            self.variants(shape.format).any(|(variant, spreads)| spreads && name(variant, spreads) == kernel);
        let num_spans = num_spans(shape.cols.div_ceil(UNIT));
        if is_spread && num_spans > 1 { u64::from(num_spans) * u64::from(rows) * u64::from(shape.rows) } else { 0 }
    }

    pub fn lines(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        let line = |choice: &MatMulChoice| MatMulLine {
            max_rows: (choice.max_rows != u32::MAX).then_some(choice.max_rows),
            kernel: name(choice.variant, choice.spreads),
            fills: choice.fills,
        };
        self.of(shape).iter().map(line).collect()
    }

    /// An empty table brings back the tier's own.
    pub fn set(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        if table.is_empty() {
            self.set.remove(&shape);
            return Ok(());
        }
        let choices =
            table.iter().map(|line| self.choice(shape, line)).collect::<Result<Vec<MatMulChoice>, String>>()?;
        let ascends = choices.windows(2).all(|pair| pair[0].max_rows < pair[1].max_rows);
        if !ascends || choices[0].max_rows == 0 || choices.last().is_none_or(|last| last.max_rows != u32::MAX) {
            return Err("its lines do not ascend to one without a bound".to_owned());
        }
        self.set.insert(shape, choices);
        Ok(())
    }

    fn choice(&self, shape: MatMulShape, line: &MatMulLine) -> Result<MatMulChoice, String> {
        let found = self.variants(shape.format).find(|&(variant, spreads)| name(variant, spreads) == line.kernel);
        let (variant, spreads) =
            found.ok_or_else(|| format!("the {} tier has no kernel {}", self.tier.name(), line.kernel))?;
        Ok(MatMulChoice { max_rows: line.max_rows.unwrap_or(u32::MAX), variant, spreads, fills: line.fills })
    }
}

fn name(variant: MatMulVariant, spreads: bool) -> String {
    format!("{}{}", variant.name(), if spreads { " spread" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: MatMulShape = MatMulShape { format: WeightFormat::Q4_0, rows: 64, cols: 64 };

    fn every_kind() -> impl Iterator<Item = (Tier, Arithmetic)> {
        let units = MatrixUnits { size: 16, subgroup_lanes: 32 };
        let all = [Arithmetic::F32, Arithmetic::F16, Arithmetic::IntegerDot, Arithmetic::MatrixUnits(units)];
        let of_tier = move |tier: Tier| all.into_iter().map(move |arithmetic| (tier, arithmetic));
        Tier::ALL.into_iter().flat_map(of_tier).filter(|(tier, arithmetic)| tier.has(*arithmetic))
    }

    #[test]
    fn floats_have_no_bytes_to_multiply() {
        let tables = MatMulTables::new(Tier::Base, Arithmetic::IntegerDot);
        let shape = MatMulShape { format: WeightFormat::BF16, ..SHAPE };
        assert_eq!(tables.of(shape), Tier::Base.mat_mul_choices(Arithmetic::F32));
        assert_eq!(tables.of(SHAPE), Tier::Base.mat_mul_choices(Arithmetic::IntegerDot));
    }

    #[test]
    fn a_tiers_own_table_can_be_written_and_set() {
        for (tier, arithmetic) in every_kind() {
            let mut tables = MatMulTables::new(tier, arithmetic);
            let lines = tables.lines(SHAPE);
            tables.set(SHAPE, &lines).expect("its own kernels");
            assert_eq!(tables.of(SHAPE), tier.mat_mul_choices(arithmetic));
            for kernel in tables.kernels(SHAPE.format) {
                tables.set(SHAPE, &MatMulLine::only(&kernel.name)).expect("its own kernel");
                assert_eq!(tables.of(SHAPE)[0].variant.rows(), kernel.rows);
            }
            tables.set(SHAPE, &[]).expect("nothing to be wrong");
            assert_eq!(tables.of(SHAPE), tier.mat_mul_choices(arithmetic));
        }
    }

    #[test]
    fn what_shares_k_leaves_as_much_as_its_rows_and_spans_are() {
        let tables = MatMulTables::new(Tier::Subgroup, Arithmetic::F32);
        let wide = MatMulShape { rows: 28672, cols: 4096, ..SHAPE };
        assert_eq!(tables.num_partials(wide, "split 16x64 spread", 64), 4 * 64 * 28672);
        assert_eq!(tables.num_partials(wide, "split 16x64", 64), 0);
        assert_eq!(tables.num_partials(MatMulShape { cols: 1024, ..wide }, "split 16x64 spread", 64), 0, "one span");
    }

    #[test]
    fn a_table_that_cannot_be_is_refused_and_changes_nothing() {
        let mut tables = MatMulTables::new(Tier::Base, Arithmetic::F32);
        let line = |max_rows, kernel: &str| MatMulLine { max_rows, kernel: kernel.to_owned(), fills: true };
        let problem = |tables: &mut MatMulTables, table: &[MatMulLine]| tables.set(SHAPE, table).expect_err("no table");
        let unknown = problem(&mut tables, &[line(None, "split 5x32")]);
        assert_eq!(unknown, "the base tier has no kernel split 5x32");
        let tile = || line(None, "tile 64x128");
        for table in [
            vec![line(Some(4), "split 4x32")],
            vec![line(Some(0), "split 4x32"), tile()],
            vec![line(Some(4), "split 4x32"), line(Some(4), "split 8x32"), tile()],
            vec![tile(), tile()],
        ] {
            assert!(problem(&mut tables, &table).contains("ascend"), "{table:?}");
        }
        assert_eq!(tables.of(SHAPE), Tier::Base.mat_mul_choices(Arithmetic::F32));
    }

    #[test]
    fn any_table_takes_every_row_once() {
        for (tier, arithmetic) in every_kind() {
            for variant in tier.mat_mul_variants(arithmetic) {
                for (left, fills) in (1..=200).flat_map(|left| [(left, false), (left, true)]) {
                    let taken = MatMulChoice { max_rows: u32::MAX, variant, spreads: false, fills }.takes(left);
                    assert!((1..=left).contains(&taken), "{variant:?} takes {taken} of {left}");
                }
            }
        }
    }
}
