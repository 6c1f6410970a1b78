//! Quantiles out of a histogram's buckets, interpolated as Prometheus' `histogram_quantile` does. Invariant: what is
//! shown live is what a dashboard computes from `/metrics` over the same time.

use prometheus::Histogram;
use prometheus::core::Metric;
use serde::{Deserialize, Serialize};

/// A histogram as it stood at some time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BucketCounts {
    /// Upper bounds in seconds, ascending, each with how many were at most that.
    buckets: Vec<(f64, u64)>,
    /// Those above the last bound too.
    count: u64,
}

/// In milliseconds.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl BucketCounts {
    pub fn of(histogram: &Histogram) -> BucketCounts {
        let metric = histogram.metric();
        let histogram = metric.get_histogram();
        let buckets = histogram.get_bucket();
        BucketCounts {
            buckets: buckets.iter().map(|bucket| (bucket.upper_bound(), bucket.cumulative_count())).collect(),
            count: histogram.get_sample_count(),
        }
    }

    /// Of what was observed since `earlier`; `None` if nothing was.
    pub fn quantiles_since(&self, earlier: &BucketCounts) -> Option<Quantiles> {
        let of = |q| Some(self.quantile_since(earlier, q)? * 1e3);
        Some(Quantiles { p50: of(0.5)?, p95: of(0.95)?, p99: of(0.99)? })
    }

    /// In seconds. What lies above the last bound counts as that bound.
    fn quantile_since(&self, earlier: &BucketCounts, q: f64) -> Option<f64> {
        let count = self.count.saturating_sub(earlier.count);
        if count == 0 {
            return None;
        }
        let rank = q * count as f64;
        let (mut lower, mut below) = (0.0, 0.0);
        for (index, &(upper, counted)) in self.buckets.iter().enumerate() {
            let before = earlier.buckets.get(index).map_or(0, |bucket| bucket.1);
            let at_most = counted.saturating_sub(before) as f64;
            if at_most >= rank && at_most > below {
                return Some(lower + (upper - lower) * (rank - below) / (at_most - below));
            }
            (lower, below) = (upper, at_most);
        }
        Some(lower)
    }
}

#[cfg(test)]
mod tests {
    use prometheus::HistogramOpts;

    use super::*;

    fn histogram() -> Histogram {
        let options = HistogramOpts::new("times", "of a test").buckets(vec![0.1, 0.2, 0.4]);
        Histogram::with_opts(options).expect("valid")
    }

    #[test]
    fn quantiles_are_interpolated_within_a_bucket() {
        let times = histogram();
        (0..10).for_each(|_| times.observe(0.15));
        let quantiles = BucketCounts::of(&times).quantiles_since(&BucketCounts::default()).expect("ten of them");
        let Quantiles { p50, p95, p99 } = quantiles;
        // All in the bucket from 100 to 200 ms: half of the ten are halfway.
        for (found, expected) in [(p50, 150.0), (p95, 195.0), (p99, 199.0)] {
            assert!((found - expected).abs() < 1e-9, "{quantiles:?}");
        }
    }

    #[test]
    fn only_what_came_since_counts() {
        let times = histogram();
        (0..1000).for_each(|_| times.observe(0.05));
        let earlier = BucketCounts::of(&times);
        assert_eq!(BucketCounts::of(&times).quantiles_since(&earlier), None);
        times.observe(0.3);
        let quantiles = BucketCounts::of(&times).quantiles_since(&earlier).expect("one");
        assert!((quantiles.p50 - 300.0).abs() < 1e-9, "{quantiles:?}");
    }

    #[test]
    fn what_is_beyond_all_buckets_counts_as_the_last_bound() {
        let times = histogram();
        times.observe(70.0);
        let quantiles = BucketCounts::of(&times).quantiles_since(&BucketCounts::default()).expect("one");
        assert_eq!((quantiles.p50, quantiles.p99), (400.0, 400.0));
    }
}
