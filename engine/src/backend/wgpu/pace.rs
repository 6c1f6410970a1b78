//! How much may go to the device in one submission: drivers reset a device that is at one for too long.
//!
//! Work is a rough count, [`Dispatch::work`]; what a unit of it takes is learnt from recordings that have run, so that
//! it is right within the spread of the kernels of a model, for which [`HEADROOM`] is kept. Invariant: dispatches stay
//! in order and each is in one submission, and one that cannot be divided goes alone, whatever it takes.

use std::ops::Range;
use std::time::Duration;

use super::encode::Dispatch;

/// A submission is predicted to take this fraction of what it may.
const HEADROOM: f64 = 4.0;
/// Of what is known, what stays known beside the next recording.
const MEMORY: f64 = 0.9;
/// What is believed of a device that has run nothing: a slow one, until it has run a billion units.
const PRIOR: (f64, f64) = (1e9, 1e9);

#[derive(Clone, Debug)]
pub(super) struct Pace {
    max: Duration,
    /// Sums over recordings, of which older ones count less.
    ns: f64,
    work: f64,
}

impl Pace {
    /// For submissions of at most `max`.
    pub fn new(max: Duration) -> Pace {
        let (ns, work) = PRIOR;
        Pace { max, ns, work }
    }

    /// Work of a submission at most.
    pub fn max_work(&self) -> u64 {
        let ns = self.max.as_nanos() as f64 / HEADROOM;
        ((ns * self.work / self.ns.max(1.0)) as u64).max(1)
    }

    /// A recording of so much work took so long.
    pub fn learn(&mut self, work: u64, took: Duration) {
        self.ns = self.ns * MEMORY + took.as_nanos() as f64;
        self.work = self.work * MEMORY + work as f64;
    }
}

/// Dispatches by submission, at most `max_dispatches` in one; one empty range where there are none, because copies and
/// downloads are submitted too.
pub(super) fn submissions(dispatches: &[Dispatch], max_work: u64, max_dispatches: usize) -> Vec<Range<usize>> {
    let (mut ranges, mut first, mut work) = (Vec::new(), 0, 0u64);
    for (index, dispatch) in dispatches.iter().enumerate() {
        let is_full = index - first == max_dispatches || work.saturating_add(dispatch.work) > max_work;
        if index > first && is_full {
            ranges.push(first..index);
            (first, work) = (index, 0);
        }
        work = work.saturating_add(dispatch.work);
    }
    ranges.push(first..dispatches.len());
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::wgpu::encode::{MAX_BUFFERS, MAX_PARAMS};
    use crate::backend::wgpu::pipelines::Kernel;
    use crate::tensor::BufferId;

    fn dispatch(work: u64) -> Dispatch {
        let buffers = [BufferId(0); MAX_BUFFERS];
        Dispatch { kernel: Kernel::RmsNorm, buffers, params: [0; MAX_PARAMS], num_params: 0, workgroups: 1, work }
    }

    #[test]
    fn a_submission_takes_what_fits_and_at_least_one() {
        let dispatches = [3, 4, 3, 20, 1, u64::MAX, u64::MAX].map(dispatch);
        let sizes = |dispatches: &[Dispatch], max_work| -> Vec<usize> {
            submissions(dispatches, max_work, 4).into_iter().map(|range| range.len()).collect()
        };
        assert_eq!(sizes(&dispatches, 10), [3, 1, 1, 1, 1]);
        assert_eq!(sizes(&dispatches[..5], u64::MAX), [4, 1]);
        assert_eq!(sizes(&[], 10), [0]);
    }

    /// Whatever the device is like, what is submitted takes about a fraction of what it may, soon after it is known.
    #[test]
    fn the_pace_of_a_device_is_learnt_from_what_it_has_done() {
        for ns_per_unit in [1e-4, 1e-2, 1.0, 100.0] {
            let mut pace = Pace::new(Duration::from_millis(1000));
            for _ in 0..100 {
                let work = pace.max_work().min(50_000_000_000);
                pace.learn(work, Duration::from_nanos((work as f64 * ns_per_unit) as u64));
            }
            let predicted_ms = pace.max_work() as f64 * ns_per_unit / 1e6;
            assert!((200.0..300.0).contains(&predicted_ms), "{ns_per_unit}: {predicted_ms} ms");
        }
    }

    #[test]
    fn recordings_of_little_work_say_little() {
        let mut pace = Pace::new(Duration::from_millis(1000));
        pace.learn(100_000_000_000, Duration::from_millis(100));
        let before = pace.max_work();
        pace.learn(1000, Duration::from_micros(200));
        assert!(pace.max_work() > before * 9 / 10, "{before}, then {}", pace.max_work());
        assert!(Pace::new(Duration::ZERO).max_work() > 0);
    }
}
