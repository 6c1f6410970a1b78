//! What the tables promise, counted: spans of K, matrices of a workgroup, and what one row more takes.

use super::*;

#[test]
fn k_is_a_few_spans_of_whole_rounds() {
    let spans = |k: u32| (num_spans(k.div_ceil(32)), span_units(k.div_ceil(32)) * 32);
    assert_eq!([64, 576, 1024].map(spans), [(1, 1024); 3]);
    assert_eq!([1025, 1536, 2304, 4096].map(spans), [(2, 1024), (2, 1024), (3, 1024), (4, 1024)]);
    assert_eq!([8192, 14336, 28672].map(spans), [(4, 2048), (4, 3584), (4, 7168)]);
    for num_units in 1..2000 {
        let (num, units) = (num_spans(num_units), span_units(num_units));
        assert!((1..=MAX_SPANS).contains(&num) && units.is_multiple_of(8), "{num_units}");
        assert!((num - 1) * units < num_units && num_units <= num * units, "{num_units}");
    }
}

/// Of a weight, to read and decode it, beside a row: as `engine/src/backend/wgpu/encode.rs` reckons.
const WEIGHT_ROWS: u32 = 4;

/// What a product of so many rows takes: each workgroup decodes its weights, and computes the rows that it does not
/// leave out.
fn counted(choices: &[MatMulChoice], mut left: u32) -> (u32, u32) {
    let (mut time, mut num_decodes) = (0, 0);
    while left > 0 {
        let choice = choices.iter().find(|choice| choice.max_rows >= left).expect("the last has no bound");
        let (taken, rows) = (choice.takes(left), choice.variant.rows());
        let step = match choice.variant {
            MatMulVariant::Split { rows, .. } if rows > 4 => 2,
            MatMulVariant::Tile { .. } | MatMulVariant::F16Tile | MatMulVariant::F16Split { .. } => 4,
            variant => variant.rows(),
        };
        time += taken / rows * rows + (taken % rows).next_multiple_of(step) + WEIGHT_ROWS * taken.div_ceil(rows);
        num_decodes += taken.div_ceil(rows);
        left -= taken;
    }
    (time, num_decodes)
}

/// How many times as long one row more takes, and how many times as many rows they are.
fn one_more(choices: &[MatMulChoice], rows: u32) -> (f64, f64) {
    let time = |rows| f64::from(counted(choices, rows).0);
    (time(rows + 1) / time(rows), f64::from(rows + 1) / f64::from(rows))
}

/// The first rows beyond cliffs.
fn cliffs(choices: &[MatMulChoice]) -> Vec<u32> {
    let is_cliff = |rows: &u32| {
        let (ratio, of_rows) = one_more(choices, rows - 1);
        ratio > f64::max(1.3, 1.1 * of_rows)
    };
    (2..=129).filter(is_cliff).collect()
}

/// No rule is kept there, but none that is broken is unknown: halves are computed by four rows, bytes and
/// matrices by a workgroup's.
#[test]
fn by_count_the_cliffs_of_other_arithmetic_are_those_that_are_written_down() {
    assert_eq!(cliffs(&F16_CHOICES), [5, 9, 17]);
    assert_eq!(cliffs(&INTEGER_CHOICES), [5, 9]);
    let units = Arithmetic::MatrixUnits(MatrixUnits { size: 16, subgroup_lanes: 32 });
    assert_eq!(cliffs(&Tier::Subgroup.mat_mul_choices(units)), [9, 17, 33, 97]);
}

#[test]
fn by_count_no_row_is_a_cliff_on_a_gpu_and_weights_are_read_once_up_to_64() {
    assert!((1..=64).all(|rows| counted(&GPU_CHOICES, rows).1 == 1));
    assert_eq!(cliffs(&GPU_CHOICES), []);
    let mut dearer = Vec::new();
    for rows in 1..=128 {
        let (ratio, of_rows) = one_more(&GPU_CHOICES, rows);
        if ratio / of_rows > 1.05 {
            dearer.push((rows + 1, (100.0 * ratio / of_rows).round() as u32));
        }
    }
    // A tile computes four rows or none.
    let of_tiles =
        [(17, 113), (21, 111), (25, 110), (29, 109), (33, 108), (37, 107), (41, 106), (45, 106), (49, 105), (53, 105)];
    assert_eq!(dearer, [&of_tiles[..], &[(65, 106)]].concat());
}

#[test]
fn the_matrices_of_all_subgroups_are_those_of_the_workgroup_at_every_width() {
    let widths = [4, 8, 16, 32, 64, 128];
    for (size, subgroup_lanes, rows) in [8, 16]
        .into_iter()
        .flat_map(|size| widths.into_iter().flat_map(move |lanes| [16, 32, 64, 128].map(|rows| (size, lanes, rows))))
    {
        let variant = MatMulVariant::Matrix { units: MatrixUnits { size, subgroup_lanes }, rows };
        let constants = variant.constants();
        let of = |name: &str| constants.iter().find(|(found, _)| *found == name).expect("a constant").1;
        let what = format!("{size} x {size}, {subgroup_lanes} lanes, {rows} rows");
        assert_eq!(of("GROUP_LANES"), of("SUBGROUPS") * subgroup_lanes, "{what}");
        assert!(of("GROUP_LANES") <= MAX_GROUP_LANES && of("SUBGROUPS") >= 2, "{what}");
        let subgroups_m = of("SUBGROUPS") / of("SUBGROUPS_N");
        let covered = (subgroups_m * of("TILES_M") * size, of("SUBGROUPS_N") * of("TILES_N") * size);
        assert_eq!(covered, (rows, variant.columns()), "{what}");
    }
}
