//! Steps as the engine counts them, in buckets of its own, told as Prometheus has histograms. Knows nothing of what is
//! counted.

use prometheus::core::{Collector, Desc, Describer};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Opts, Registry};

use super::register;

/// What is counted under one value of a label.
#[derive(Clone)]
pub struct Counts {
    /// Label and value; `None` where there is one alone.
    pub label: Option<(&'static str, &'static str)>,
    /// Upper bounds, ascending, each with what it has more than the one before; the last has no bound.
    pub buckets: Vec<(f64, u64)>,
    pub sum: f64,
}

#[derive(Clone)]
struct Counted {
    desc: Desc,
    counts: Vec<Counts>,
}

impl Counts {
    /// Of buckets whose bounds double from `least` on.
    pub fn doubling(label: Option<(&'static str, &'static str)>, least: f64, numbers: &[u64], sum: f64) -> Counts {
        let bounds = (0..numbers.len()).map(|exponent| least * f64::from(exponent as u32).exp2());
        Counts { label, buckets: bounds.zip(numbers.iter().copied()).collect(), sum }
    }

    fn histogram(&self) -> Histogram {
        let mut total = 0;
        let mut cumulative = |&(bound, more): &(f64, u64)| {
            total += more;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(total);
            bucket
        };
        let mut buckets: Vec<Bucket> = self.buckets.iter().map(&mut cumulative).collect();
        buckets.pop();
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets);
        histogram.set_sample_count(total);
        histogram.set_sample_sum(self.sum);
        histogram
    }
}

/// Registers a histogram of this name and these constant labels.
pub fn register_histogram(registry: &Registry, options: Opts, counts: Vec<Counts>) {
    let labels = counts.iter().filter_map(|counts| counts.label).map(|(name, _)| name.to_owned());
    let options = labels.take(1).fold(options, Opts::variable_label);
    register(registry, options.describe().map(|desc| Counted { desc, counts }));
}

impl Collector for Counted {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let metric = |counts: &Counts| {
            let mut labels: Vec<LabelPair> = self.desc.const_label_pairs.clone();
            if let Some((name, value)) = counts.label {
                let mut label = LabelPair::default();
                label.set_name(name.to_owned());
                label.set_value(value.to_owned());
                labels.push(label);
            }
            labels.sort();
            let mut metric = Metric::from_label(labels);
            metric.set_histogram(counts.histogram());
            metric
        };
        let mut family = MetricFamily::default();
        family.set_name(self.desc.fq_name.clone());
        family.set_help(self.desc.help.clone());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(self.counts.iter().map(metric).collect());
        vec![family]
    }
}
