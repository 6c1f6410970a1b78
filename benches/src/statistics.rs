//! Order statistics of a sample. Refuses to guess: an empty sample has none.

/// The `quantile`-th value of `sample` (0 to 1), linear between neighbours; `None` for an empty sample.
pub fn quantile(sample: &mut [f64], quantile: f64) -> Option<f64> {
    assert!((0.0..=1.0).contains(&quantile));
    sample.sort_by(f64::total_cmp);
    let position = quantile * sample.len().checked_sub(1)? as f64;
    let below = sample[position.floor() as usize];
    let above = sample[position.ceil() as usize];
    Some(below + (above - below) * position.fract())
}

pub fn median(sample: &mut [f64]) -> Option<f64> {
    quantile(sample, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(quantile(&mut [], 0.5), None);
        assert_eq!(quantile(&mut [3.0], 0.99), Some(3.0));
        assert_eq!(median(&mut [4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(quantile(&mut [0.0, 10.0], 0.9), Some(9.0));
    }
}
