//! The matmul kernels of each tier: how each divides its work, and which takes how many rows unless a device's own
//! table says otherwise.
//!
//! Invariant: all variants of a tier that compute in f32 add in the same order, and so do all in f16, so that any table
//! gives the same bits.

use crate::{Constants, MAX_GROUP_BYTES, MAX_GROUP_LANES, TILE, Tier};

/// What matmuls compute with. All but `F32` may change tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    #[default]
    F32,
    /// Products and sums of 32 of them in f16, the sums of these in f32.
    F16,
    /// Activations as bytes with a scale for 32; dot products of four bytes, exact, and sums of 32 in f32. For weights
    /// that are codes; others in f32.
    IntegerDot,
    /// From 9 rows on: operands in f16, sums in f32, in whatever order the device adds.
    MatrixUnits(MatrixUnits),
}

/// Matrices that a device multiplies at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixUnits {
    /// Rows and columns of each: 8 or 16.
    pub size: u32,
    /// Of every subgroup: a power of two from 4 to 128.
    pub subgroup_lanes: u32,
}

impl MatrixUnits {
    /// Of a workgroup: `most`, or as many as it has room for.
    const fn subgroups(self, most: u32) -> u32 {
        let room = MAX_GROUP_LANES / self.subgroup_lanes;
        if room < most { room } else { most }
    }

    /// Elements of a workgroup of `mul_add_matrix.wgsl`: four matrices a subgroup.
    pub const fn mul_add_elements(self) -> u32 {
        self.subgroups(4) * 4 * self.size * self.size
    }

    pub fn mul_add_constants(self) -> Constants {
        let subgroups = self.subgroups(4);
        vec![("SIZE", self.size), ("SUBGROUPS", subgroups), ("GROUP_LANES", subgroups * self.subgroup_lanes)]
    }
}

impl Arithmetic {
    /// By how much a product may differ from what f32 gives, relative to the largest of a tensor.
    pub const fn tolerance(self) -> f32 {
        match self {
            Arithmetic::F32 => 1e-5,
            Arithmetic::F16 => 4e-3,
            Arithmetic::IntegerDot => 2e-2,
            Arithmetic::MatrixUnits(_) => 2e-3,
        }
    }
}

/// How a matmul kernel divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatMulVariant {
    /// `mat_mul.wgsl`: rows of a workgroup, and columns of a lane; eight lanes split K.
    Split { rows: u32, columns: u32 },
    /// `mat_mul_tile.wgsl`: both operands go through workgroup memory; rows and columns of a workgroup.
    Tile { rows: u32, columns: u32 },
    /// `mat_mul_subgroup.wgsl`: rows of a subgroup of 8.
    Subgroup { rows: u32 },
    /// `mat_mul_f16.wgsl`: as `Split`, in f16; a multiple of four rows.
    F16Split { rows: u32, columns: u32 },
    /// `mat_mul_tile.wgsl` in f16.
    F16Tile,
    /// `mat_mul_integer.wgsl`: as `Split`, by dot products of bytes.
    Integer { rows: u32, columns: u32 },
    /// `mat_mul_matrix.wgsl`: 16, 32 or 64 rows by two or four subgroups, or 128 by two to eight.
    Matrix { units: MatrixUnits, rows: u32 },
}

/// A line of a table, which ascends: of the rows that are left the first line whose `max_rows` is not below them takes
/// some, and the table is asked again about the rest. The last line has no bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatMulChoice {
    pub max_rows: u32,
    pub variant: MatMulVariant,
    /// Whether each span of K has workgroups of its own.
    pub spreads: bool,
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
    MatMulChoice { max_rows, variant, spreads: false, fills: false }
}

const fn whole(variant: MatMulVariant) -> MatMulChoice {
    MatMulChoice { max_rows: u32::MAX, variant, spreads: false, fills: true }
}

const fn split(rows: u32, columns: u32) -> MatMulVariant {
    MatMulVariant::Split { rows, columns }
}

const fn tile(rows: u32, columns: u32) -> MatMulVariant {
    MatMulVariant::Tile { rows, columns }
}

const fn subgroup(rows: u32) -> MatMulVariant {
    MatMulVariant::Subgroup { rows }
}

const fn f16_split(rows: u32, columns: u32) -> MatMulVariant {
    MatMulVariant::F16Split { rows, columns }
}

const fn integer(rows: u32, columns: u32) -> MatMulVariant {
    MatMulVariant::Integer { rows, columns }
}

/// Up to 8 rows a weight's bytes are what counts, and one column a lane gives most workgroups. From 9 on an activation
/// that is read from workgroup memory serves two columns, and from 17 on more, by tiles that read a weight once for all
/// rows; of narrow ones there are as many as of 16 rows. What is not there is left out, by two rows of up to 16 and by
/// four of a tile.
const GPU_CHOICES: [MatMulChoice; 7] = [
    all(1, split(1, 1)),
    all(4, split(4, 1)),
    all(8, split(8, 1)),
    all(16, split(16, 2)),
    all(32, tile(32, 64)),
    all(64, tile(64, 64)),
    whole(tile(64, 128)),
];

/// A kernel for each number of rows up to 8, so that none computes rows that are not there; more go to even parts, of
/// whatever size takes least. 8 rows and more take more registers than the machine has. No line leaves a rest, which
/// would be a dispatch of its own.
const LAVAPIPE_CHOICES: [MatMulChoice; 21] = [
    all(1, subgroup(1)),
    all(2, subgroup(2)),
    all(3, subgroup(3)),
    all(4, subgroup(4)),
    all(5, subgroup(5)),
    all(6, subgroup(6)),
    all(7, subgroup(7)),
    all(8, subgroup(8)),
    all(10, subgroup(5)),
    all(12, subgroup(6)),
    all(14, subgroup(7)),
    all(16, subgroup(8)),
    all(18, subgroup(6)),
    all(21, subgroup(7)),
    all(24, subgroup(8)),
    all(28, subgroup(7)),
    all(30, subgroup(6)),
    all(32, subgroup(8)),
    all(35, subgroup(7)),
    all(36, subgroup(6)),
    all(u32::MAX, subgroup(7)),
];

const F16_CHOICES: [MatMulChoice; 4] =
    [all(4, f16_split(4, 1)), all(8, f16_split(8, 1)), all(64, f16_split(16, 2)), whole(MatMulVariant::F16Tile)];

const INTEGER_CHOICES: [MatMulChoice; 4] =
    [all(1, integer(1, 1)), all(4, integer(4, 1)), all(8, integer(8, 1)), whole(integer(16, 2))];

/// Tiles of fewer rows or columns make more workgroups of few rows, whose weights they still read once.
const GPU_VARIANTS: [MatMulVariant; 14] = [
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
    tile(32, 64),
    tile(32, 128),
    tile(64, 64),
    tile(64, 128),
];

const LAVAPIPE_VARIANTS: [MatMulVariant; 10] = [
    subgroup(1),
    subgroup(2),
    subgroup(3),
    subgroup(4),
    subgroup(5),
    subgroup(6),
    subgroup(7),
    subgroup(8),
    subgroup(10),
    subgroup(12),
];

const F16_VARIANTS: [MatMulVariant; 7] = [
    f16_split(4, 1),
    f16_split(8, 1),
    f16_split(16, 1),
    f16_split(4, 2),
    f16_split(8, 2),
    f16_split(16, 2),
    MatMulVariant::F16Tile,
];

const INTEGER_VARIANTS: [MatMulVariant; 5] =
    [integer(1, 1), integer(4, 1), integer(8, 1), integer(4, 2), integer(16, 2)];

/// Into so many spans K is divided at most, and of so many values at least.
pub const MAX_SPANS: u32 = 4;
const LEAST_SPAN_ROUNDS: u32 = 4;
const ROUND_UNITS: u32 = 8;
/// The smallest K that is more than one.
pub const LEAST_SPREAD_K: u32 = LEAST_SPAN_ROUNDS * ROUND_UNITS * 32 + 1;

/// Units of 32 in a span of K: whole rounds of eight, and a matter of K alone, so that the order of additions is too.
pub const fn span_units(num_units: u32) -> u32 {
    let rounds = num_units.div_ceil(ROUND_UNITS).div_ceil(MAX_SPANS);
    ROUND_UNITS * if rounds < LEAST_SPAN_ROUNDS { LEAST_SPAN_ROUNDS } else { rounds }
}

pub const fn num_spans(num_units: u32) -> u32 {
    num_units.div_ceil(span_units(num_units))
}

/// The fewest rows that matrix units are worth: below, a weight's bytes are what counts.
const LEAST_MATRIX_ROWS: u32 = 9;

impl Tier {
    /// Whether a device at this tier may compute so, as far as kernels go. Software Vulkan widens every half and spells
    /// out every dot product, so that it has no such kernels; matrix units need subgroups.
    pub const fn has(self, arithmetic: Arithmetic) -> bool {
        match arithmetic {
            Arithmetic::F32 => true,
            Arithmetic::F16 | Arithmetic::IntegerDot => !matches!(self, Tier::Lavapipe),
            Arithmetic::MatrixUnits(_) => matches!(self, Tier::Subgroup),
        }
    }

    /// Which matmul kernel takes how many rows.
    pub fn mat_mul_choices(self, arithmetic: Arithmetic) -> Vec<MatMulChoice> {
        match arithmetic {
            Arithmetic::F32 if self == Tier::Lavapipe => LAVAPIPE_CHOICES.to_vec(),
            Arithmetic::F32 => GPU_CHOICES.to_vec(),
            Arithmetic::F16 => F16_CHOICES.to_vec(),
            Arithmetic::IntegerDot => INTEGER_CHOICES.to_vec(),
            Arithmetic::MatrixUnits(units) => {
                let few = GPU_CHOICES.into_iter().filter(|choice| choice.max_rows < LEAST_MATRIX_ROWS);
                let matrix = |rows| MatMulVariant::Matrix { units, rows };
                // Up to 512 rows of few columns small tiles make workgroups enough for a large GPU.
                let middle = MatMulChoice { max_rows: 512, ..whole(matrix(64)) };
                few.chain([all(16, matrix(16)), all(32, matrix(32)), middle, whole(matrix(128))]).collect()
            }
        }
    }

    /// What a table may choose from.
    pub fn mat_mul_variants(self, arithmetic: Arithmetic) -> Vec<MatMulVariant> {
        match arithmetic {
            Arithmetic::F32 if self == Tier::Lavapipe => LAVAPIPE_VARIANTS.to_vec(),
            Arithmetic::F32 => GPU_VARIANTS.to_vec(),
            Arithmetic::F16 => F16_VARIANTS.to_vec(),
            Arithmetic::IntegerDot => INTEGER_VARIANTS.to_vec(),
            Arithmetic::MatrixUnits(units) => {
                let few = GPU_VARIANTS.into_iter().filter(|variant| variant.rows() < LEAST_MATRIX_ROWS);
                few.chain([16, 32, 64, 128].map(|rows| MatMulVariant::Matrix { units, rows })).collect()
            }
        }
    }
}

impl MatMulVariant {
    pub const fn kernel(self) -> &'static str {
        match self {
            MatMulVariant::Split { .. } => "mat_mul",
            MatMulVariant::Tile { .. } | MatMulVariant::F16Tile => "mat_mul_tile",
            MatMulVariant::Subgroup { .. } => "mat_mul_subgroup",
            MatMulVariant::F16Split { .. } => "mat_mul_f16",
            MatMulVariant::Integer { .. } => "mat_mul_integer",
            MatMulVariant::Matrix { .. } => "mat_mul_matrix",
        }
    }

    /// For people and for tables on disk: how, and the rows and columns of a workgroup.
    pub fn name(self) -> String {
        let how = match self {
            MatMulVariant::Split { .. } => "split",
            MatMulVariant::Tile { .. } => "tile",
            MatMulVariant::Subgroup { .. } => "subgroup",
            MatMulVariant::F16Split { .. } => "f16 split",
            MatMulVariant::F16Tile => "f16 tile",
            MatMulVariant::Integer { .. } => "integer",
            MatMulVariant::Matrix { .. } => "matrix",
        };
        format!("{how} {}x{}", self.rows(), self.columns())
    }

    /// Rows of a workgroup.
    pub const fn rows(self) -> u32 {
        match self {
            MatMulVariant::Split { rows, .. }
            | MatMulVariant::Tile { rows, .. }
            | MatMulVariant::Subgroup { rows }
            | MatMulVariant::F16Split { rows, .. }
            | MatMulVariant::Integer { rows, .. }
            | MatMulVariant::Matrix { rows, .. } => rows,
            MatMulVariant::F16Tile => 64,
        }
    }

    /// Columns of a workgroup.
    pub const fn columns(self) -> u32 {
        match self {
            MatMulVariant::Split { columns, .. }
            | MatMulVariant::F16Split { columns, .. }
            | MatMulVariant::Integer { columns, .. } => columns * TILE,
            MatMulVariant::Tile { columns, .. } => columns,
            MatMulVariant::F16Tile => 128,
            MatMulVariant::Subgroup { .. } => TILE,
            MatMulVariant::Matrix { rows: 32 | 64, .. } => 64,
            MatMulVariant::Matrix { .. } => 128,
        }
    }

    /// Whether its workgroups can have a span of K each.
    pub const fn can_spread(self) -> bool {
        !matches!(self, MatMulVariant::Subgroup { .. } | MatMulVariant::Integer { .. })
    }

    /// Whether it needs arithmetic on halves.
    pub const fn is_f16(self) -> bool {
        matches!(self, MatMulVariant::F16Split { .. } | MatMulVariant::F16Tile | MatMulVariant::Matrix { .. })
    }

    /// Whether it needs matrix units.
    pub const fn is_matrix(self) -> bool {
        matches!(self, MatMulVariant::Matrix { .. })
    }

    pub fn constants(self) -> Constants {
        let mut constants = match self {
            MatMulVariant::Split { rows, columns } => split_constants(rows, columns),
            MatMulVariant::Tile { .. } | MatMulVariant::F16Tile => {
                // 256 invocations of four rows each.
                let (rows, columns) = (self.rows(), self.columns());
                let stride = MAX_GROUP_LANES * 4 / rows;
                let unit_bytes = (rows + columns) * 32 * if self.is_f16() { 2 } else { 4 };
                let fours = if unit_bytes <= MAX_GROUP_BYTES { 8 } else { 4 };
                vec![
                    ("ROWS", rows),
                    ("COLUMNS", columns),
                    ("INVOCATION_COLUMNS", columns / stride),
                    ("COLUMN_STRIDE", stride),
                    // Fours of K that are staged at once: a whole unit where workgroup memory has room.
                    ("FOURS", fours),
                    ("X_FOURS", (rows * fours).div_ceil(MAX_GROUP_LANES)),
                    ("W_EIGHTS", columns * fours / 2 / MAX_GROUP_LANES),
                ]
            }
            MatMulVariant::Subgroup { rows } => vec![("ROWS", rows)],
            MatMulVariant::F16Split { rows, columns } => {
                vec![("ROWS", rows), ("COLUMNS", columns), ("GROUPS", rows / 4)]
            }
            MatMulVariant::Integer { rows, columns } => {
                // Of a stage: as many units as 256 lanes make bytes of at once, or more.
                let rounds = (4 / rows).max(1);
                let group_rows = rows.min(4);
                vec![
                    ("ROWS", rows),
                    ("COLUMNS", columns),
                    ("GROUP_ROWS", group_rows),
                    ("GROUPS", rows / group_rows),
                    ("ROUNDS", rounds),
                    ("CHUNKS", rows * rounds / 4),
                ]
            }
            MatMulVariant::Matrix { units, rows } => {
                // Few rows have all subgroups side by side.
                let (size, subgroups) = (units.size, units.subgroups(if rows == 128 { 8 } else { 4 }));
                let subgroups_n = if rows == 16 { subgroups } else { 2 };
                vec![
                    ("MATRIX", 1),
                    ("SIZE", size),
                    ("ROWS", rows),
                    ("COLUMNS", self.columns()),
                    ("SUBGROUP_LANES", units.subgroup_lanes),
                    ("GROUP_LANES", subgroups * units.subgroup_lanes),
                    ("SUBGROUPS", subgroups),
                    ("SUBGROUPS_N", subgroups_n),
                    ("TILES_M", rows / (subgroups / subgroups_n) / size),
                    ("TILES_N", self.columns() / subgroups_n / size),
                    ("STEPS", 32 / size),
                    // What a lane stages of a unit: activations, and eighths of a block of weights.
                    ("X_LOADS", rows * 32 / (subgroups * units.subgroup_lanes)),
                    ("W_LOADS", self.columns() * 4 / (subgroups * units.subgroup_lanes)),
                ]
            }
        };
        constants.push(("BITS", if self.is_f16() { 16 } else { 32 }));
        constants
    }
}

fn split_constants(rows: u32, columns: u32) -> Constants {
    // Rounds of 8 units that are staged together, so that few rows meet few barriers.
    let rounds = (8 / rows).max(1);
    let group_rows = rows.min(4);
    let stage_k = 256 * rounds;
    vec![
        ("ROWS", rows),
        ("COLUMNS", columns),
        ("GROUP_ROWS", group_rows),
        ("GROUPS", rows / group_rows),
        ("PAIRS", group_rows.div_ceil(2)),
        ("PAIR_ROWS", group_rows.min(2)),
        ("ROUNDS", rounds),
        ("STAGE_K", stage_k),
        ("MEMORY", (rows * stage_k / 4).max(256 * rows / group_rows)),
        // Of a lane.
        ("STAGE_FOURS", rows * stage_k / 4 / MAX_GROUP_LANES),
        // Quarters of a unit that the text spells out.
        ("PARTS", if rows <= 4 { 4 } else { 1 }),
    ]
}

#[cfg(test)]
mod tests;
