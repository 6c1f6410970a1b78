//! The clock of the wall beside the one that measures, which is never set and stands still while the machine sleeps.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Both at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clocks {
    pub wall: SystemTime,
    pub steady: Instant,
}

/// Clocks that are kept right by a network wander by less: at most 500 in a million, and a tenth of a second at once.
const MAX_DRIFT: f64 = 0.001;
const MAX_STEP_S: f64 = 0.5;

impl Clocks {
    pub fn now() -> Clocks {
        Clocks { wall: SystemTime::now(), steady: Instant::now() }
    }

    /// That the wall's clock did not go as the steady one did, in a sentence.
    pub fn step_until(self, now: Clocks) -> Option<String> {
        let seconds = |clocks: Clocks| clocks.wall.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let steady = now.steady.saturating_duration_since(self.steady).as_secs_f64();
        let step = seconds(now) - seconds(self) - steady;
        (step.abs() > MAX_STEP_S + steady * MAX_DRIFT).then(|| {
            format!("the system's clock moved by {step:+.1} s beside the one that measures: set, or the machine slept")
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_clock_that_is_set_is_told_of_and_one_that_wanders_is_not() {
        let begun = Clocks::now();
        let after = |wall_ms: i64| {
            let steady = begun.steady + Duration::from_secs(100);
            let wall = Duration::from_millis(wall_ms.unsigned_abs());
            Clocks { steady, wall: if wall_ms < 0 { begun.wall - wall } else { begun.wall + wall } }
        };
        for wall_ms in [100_000, 100_590, 99_410] {
            assert_eq!(begun.step_until(after(wall_ms)), None, "{wall_ms}");
        }
        for (wall_ms, told) in [(3_700_000, "+3600.0 s"), (99_000, "-1.0 s"), (-20_000, "-120.0 s")] {
            let step = begun.step_until(after(wall_ms)).expect("it was set");
            assert!(step.contains(told), "{step}");
        }
    }
}
