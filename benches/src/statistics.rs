//! Order statistics of a sample, kept whole or as a histogram. Refuses to guess: an empty sample has none.

use std::time::Duration;

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

/// Whether a quantile of so many values is more than the largest of them by another name.
pub fn is_told(quantile: f64, num_values: usize) -> bool {
    quantile <= 0.5 || num_values as f64 * (1.0 - quantile) >= 1.0 - 1e-9
}

/// Bins of a histogram to each power of two; a value is known to half of one part in so many.
const BINS: u64 = 128;

/// Durations counted in bins of under 1 % width, so that a million requests take no more memory than ten.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    /// Below `BINS` nanoseconds one bin a nanosecond, then `BINS` to each power of two.
    counts: Vec<u64>,
    num_recorded: u64,
    sum_ns: u128,
}

impl Histogram {
    pub fn record(&mut self, duration: Duration) {
        let ns = duration.as_nanos() as u64;
        let shift = u64::from(ns.max(BINS).ilog2() - BINS.ilog2());
        let bin = (shift * BINS + (ns >> shift)) as usize;
        if bin >= self.counts.len() {
            self.counts.resize(bin + 1, 0);
        }
        self.counts[bin] += 1;
        self.num_recorded += 1;
        self.sum_ns += u128::from(ns);
    }

    pub fn num_recorded(&self) -> u64 {
        self.num_recorded
    }

    pub fn mean_ms(&self) -> Option<f64> {
        (self.num_recorded > 0).then(|| self.sum_ns as f64 / self.num_recorded as f64 / 1e6)
    }

    /// The middle of the bin that holds the `quantile`-th value (0 to 1).
    pub fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        assert!((0.0..=1.0).contains(&quantile));
        let mut left = (quantile * self.num_recorded as f64).ceil().max(1.0) as u64;
        for (bin, &count) in self.counts.iter().enumerate() {
            if left <= count {
                let shift = (bin as u64 / BINS).saturating_sub(1);
                let first = (bin as u64 - shift * BINS) << shift;
                return Some((first as f64 + ((1u64 << shift) - 1) as f64 / 2.0) / 1e6);
            }
            left -= count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_knows_its_quantiles_to_half_a_percent() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.quantile_ms(0.5), histogram.mean_ms()), (None, None));
        for value in 1..=100_000u64 {
            histogram.record(Duration::from_nanos(value * 977));
        }
        for share in [0.0001, 0.01, 0.5, 0.9, 0.99, 1.0] {
            let (found, wanted) = (histogram.quantile_ms(share).expect("not empty"), share * 100_000.0 * 977.0 / 1e6);
            assert!((found - wanted).abs() <= 0.005 * wanted, "{found} for {wanted} at {share}");
        }
        assert_eq!(histogram.num_recorded(), 100_000);
        assert_eq!(histogram.mean_ms(), Some(977.0 * 50_000.5 / 1e6));
        for ns in [0, 1, 127, 128, 129, 255, 256, 257, 1 << 40, u64::MAX] {
            let mut one = Histogram::default();
            one.record(Duration::from_nanos(ns));
            let found = one.quantile_ms(0.5).expect("not empty") * 1e6;
            assert!((found - ns as f64).abs() <= 0.005 * ns as f64, "{found} for {ns}");
        }
    }

    #[test]
    fn a_quantile_is_told_of_enough() {
        let told = [(0.5, 1), (0.9, 9), (0.9, 10), (0.99, 99), (0.99, 100)].map(|(share, num)| is_told(share, num));
        assert_eq!(told, [true, false, true, false, true]);
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(quantile(&mut [], 0.5), None);
        assert_eq!(quantile(&mut [3.0], 0.99), Some(3.0));
        assert_eq!(median(&mut [4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(quantile(&mut [0.0, 10.0], 0.9), Some(9.0));
    }
}
