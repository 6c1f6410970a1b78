//! Pictures out of characters: bands that add up, and lines of eighths. Invariant: every line has as many characters as
//! columns were asked for. Knows numbers alone.

const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// `rows` lines, the top one first; each cell has the index of the band that covers its middle, `None` above them all.
/// `columns` has the bands' shares from the bottom up, or `None` where nothing is known.
pub fn bands(columns: &[Option<Vec<f64>>], rows: usize) -> Vec<Vec<Option<usize>>> {
    let cell = |column: &Option<Vec<f64>>, height: f64| {
        let mut below = 0.0;
        column.as_ref()?.iter().position(|share| {
            below += share;
            below > height
        })
    };
    let middle = |row: usize| (rows - row) as f64 / rows as f64 - 0.5 / rows as f64;
    (0..rows).map(|row| columns.iter().map(|column| cell(column, middle(row))).collect()).collect()
}

/// One line; its highest number fills a cell.
pub fn line(numbers: &[Option<f64>]) -> String {
    let most = numbers.iter().flatten().copied().fold(0.0, f64::max);
    let letter = |number: &Option<f64>| match number {
        Some(number) if most > 0.0 => {
            let eighths = (number / most * 8.0).round() as usize;
            // What is more than nothing shows.
            EIGHTHS[eighths.clamp(usize::from(*number > 0.0), 8)]
        }
        _ => ' ',
    };
    numbers.iter().map(letter).collect()
}

/// A bar of `columns` cells: how many of them each part has.
pub fn bar(parts: &[f64], columns: usize) -> Vec<usize> {
    let total: f64 = parts.iter().sum();
    let mut end = 0;
    let mut sum = 0.0;
    let width = |part: &f64| {
        sum += part;
        let begin = end;
        end = if total > 0.0 { (sum / total * columns as f64).round() as usize } else { 0 };
        end - begin
    };
    parts.iter().map(width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_fill_the_cells_whose_middle_they_cover() {
        let columns = [Some(vec![0.5, 0.25, 0.25]), None, Some(vec![1.0, 0.0, 0.0]), Some(vec![0.1, 0.0, 0.1])];
        let cells = bands(&columns, 4);
        assert_eq!(cells[0], [Some(2), None, Some(0), None]);
        assert_eq!(cells[1], [Some(1), None, Some(0), None]);
        assert_eq!(cells[2], [Some(0), None, Some(0), None]);
        assert_eq!(cells[3], [Some(0), None, Some(0), Some(2)]);
    }

    #[test]
    fn a_line_is_as_high_as_its_highest_number() {
        assert_eq!(line(&[Some(8.0), Some(4.0), Some(0.01), Some(0.0), None]), "█▄▁  ");
        assert_eq!(line(&[Some(0.0), None]), "  ");
    }

    #[test]
    fn a_bar_has_all_its_cells() {
        assert_eq!(bar(&[1.0, 1.0, 2.0], 8), [2, 2, 4]);
        assert_eq!(bar(&[1.0, 1.0, 1.0], 10).iter().sum::<usize>(), 10);
        assert_eq!(bar(&[0.0, 0.0], 10), [0, 0]);
    }
}
