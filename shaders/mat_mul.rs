//! The matmul kernels of each tier: how each divides its work, and which takes how many rows unless a device's own
//! table says otherwise.
//!
//! Invariant: all variants of a tier add in the same order, so that any table gives the same bits.

use crate::{Constants, TILE, Tier};

/// How a matmul kernel divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatMulVariant {
    /// `mat_mul.wgsl`: rows of a workgroup, and columns of a lane; eight lanes split K.
    Split { rows: u32, columns: u32 },
    /// `mat_mul_tile.wgsl`: both operands go through workgroup memory.
    Tile,
    /// `mat_mul_subgroup.wgsl`: rows of a subgroup of 8.
    Subgroup { rows: u32 },
}

/// A line of a table, which ascends: of the rows that are left the first line whose `max_rows` is not below them takes
/// some, and the table is asked again about the rest. The last line has no bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatMulChoice {
    pub max_rows: u32,
    pub variant: MatMulVariant,
    /// Whether it takes only as many rows as fill its workgroups, if they fill one; else it takes all.
    pub fills: bool,
}

impl MatMulChoice {
    /// Of `left` rows, one at least.
    pub const fn takes(self, left: u32) -> u32 {
        let rows = self.variant.rows();
        if self.fills && left > rows { left / rows * rows } else { left }
    }
}

const fn all(max_rows: u32, variant: MatMulVariant) -> MatMulChoice {
    MatMulChoice { max_rows, variant, fills: false }
}

const fn whole(variant: MatMulVariant) -> MatMulChoice {
    MatMulChoice { max_rows: u32::MAX, variant, fills: true }
}

const fn split(rows: u32, columns: u32) -> MatMulVariant {
    MatMulVariant::Split { rows, columns }
}

const fn subgroup(rows: u32) -> MatMulVariant {
    MatMulVariant::Subgroup { rows }
}

/// Up to 8 rows a weight's bytes are what counts, and one column a lane gives most workgroups. From 9 on an activation
/// that is read from workgroup memory serves two columns; four rows of 16 at a time are left out where there are none.
const GPU_CHOICES: &[MatMulChoice] =
    &[all(1, split(1, 1)), all(4, split(4, 1)), all(8, split(8, 1)), all(64, split(16, 2)), whole(MatMulVariant::Tile)];

/// 16 rows run no faster than twice 8 on Mesa 25, which takes four times as long to compile them.
const LAVAPIPE_CHOICES: &[MatMulChoice] =
    &[all(1, subgroup(1)), all(4, subgroup(4)), all(8, subgroup(8)), whole(subgroup(8))];

const GPU_VARIANTS: &[MatMulVariant] = &[
    split(1, 1),
    split(2, 1),
    split(4, 1),
    split(8, 1),
    split(16, 1),
    split(1, 2),
    split(2, 2),
    split(4, 2),
    split(8, 2),
    split(16, 2),
    MatMulVariant::Tile,
];

const LAVAPIPE_VARIANTS: &[MatMulVariant] =
    &[subgroup(1), subgroup(2), subgroup(3), subgroup(4), subgroup(6), subgroup(8), subgroup(12)];

impl Tier {
    /// Which matmul kernel takes how many rows.
    pub const fn mat_mul_choices(self) -> &'static [MatMulChoice] {
        match self {
            Tier::Base | Tier::Subgroup => GPU_CHOICES,
            Tier::Lavapipe => LAVAPIPE_CHOICES,
        }
    }

    /// What a table may choose from.
    pub const fn mat_mul_variants(self) -> &'static [MatMulVariant] {
        match self {
            Tier::Base | Tier::Subgroup => GPU_VARIANTS,
            Tier::Lavapipe => LAVAPIPE_VARIANTS,
        }
    }
}

impl MatMulVariant {
    pub const fn kernel(self) -> &'static str {
        match self {
            MatMulVariant::Split { .. } => "mat_mul",
            MatMulVariant::Tile => "mat_mul_tile",
            MatMulVariant::Subgroup { .. } => "mat_mul_subgroup",
        }
    }

    /// For people and for tables on disk: how, and the rows and columns of a workgroup.
    pub fn name(self) -> String {
        let how = match self {
            MatMulVariant::Split { .. } => "split",
            MatMulVariant::Tile => "tile",
            MatMulVariant::Subgroup { .. } => "subgroup",
        };
        format!("{how} {}x{}", self.rows(), self.columns())
    }

    /// Rows of a workgroup.
    pub const fn rows(self) -> u32 {
        match self {
            MatMulVariant::Split { rows, .. } | MatMulVariant::Subgroup { rows } => rows,
            MatMulVariant::Tile => 64,
        }
    }

    /// Columns of a workgroup.
    pub const fn columns(self) -> u32 {
        match self {
            MatMulVariant::Split { columns, .. } => columns * TILE,
            MatMulVariant::Tile => 128,
            MatMulVariant::Subgroup { .. } => TILE,
        }
    }

    pub fn constants(self) -> Constants {
        match self {
            MatMulVariant::Split { rows, columns } => {
                // Rounds of 8 units that are staged together, so that few rows meet few barriers.
                let rounds = (8 / rows).max(1);
                let group_rows = rows.min(4);
                let stage_k = 256 * rounds;
                vec![
                    ("ROWS", rows),
                    ("COLUMNS", columns),
                    ("GROUP_ROWS", group_rows),
                    ("GROUPS", rows / group_rows),
                    ("ROUNDS", rounds),
                    ("STAGE_K", stage_k),
                    ("MEMORY", (rows * stage_k / 4).max(256 * rows / group_rows)),
                    // Quarters of a unit in one go: with one row, so that more loads are in flight.
                    ("PARTS", if rows == 1 { 4 } else { 1 }),
                ]
            }
            MatMulVariant::Tile => vec![],
            MatMulVariant::Subgroup { rows } => vec![("ROWS", rows)],
        }
    }
}
