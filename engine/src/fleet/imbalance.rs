//! How long devices had nothing to do while requests waited on others.
//!
//! A clock runs while anybody waits; a device is charged for what it shows more at the end of its idle time than at the
//! begin. Invariant: O(1) for each event, however many devices there are.

use std::time::{Duration, Instant};

use super::ReplicaId;

/// Why a device has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// What waits is predicted to end no sooner there.
    PlacedElsewhere,
    /// It was lost, and is made anew.
    DeviceLost,
}

impl Idle {
    pub const ALL: [Idle; 2] = [Idle::PlacedElsewhere, Idle::DeviceLost];

    /// As metrics label it.
    pub const fn name(self) -> &'static str {
        match self {
            Idle::PlacedElsewhere => "placed_elsewhere",
            Idle::DeviceLost => "device_lost",
        }
    }
}

#[derive(Debug)]
pub(super) struct Imbalance {
    num_waiting: usize,
    /// How long anybody waited before `waits_since`.
    waited: Duration,
    waits_since: Option<Instant>,
    /// By replica.
    devices: Vec<Device>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Device {
    /// While it is idle: why, and what the clock showed at the begin.
    since: Option<(Idle, Duration)>,
    charged: [Duration; Idle::ALL.len()],
}

impl Imbalance {
    /// Of so many devices, all idle.
    pub fn new(num_replicas: usize) -> Imbalance {
        let idle = Device { since: Some((Idle::PlacedElsewhere, Duration::ZERO)), ..Device::default() };
        Imbalance { num_waiting: 0, waited: Duration::ZERO, waits_since: None, devices: vec![idle; num_replicas] }
    }

    /// So many requests wait from now on.
    pub fn wait(&mut self, num_waiting: usize, now: Instant) {
        match (self.num_waiting, num_waiting) {
            (0, 1..) => self.waits_since = Some(now),
            (1.., 0) => {
                self.waited = self.clock(now);
                self.waits_since = None;
            }
            _ => {}
        }
        self.num_waiting = num_waiting;
    }

    /// A device is idle from now on, and why; `None` where it has work.
    pub fn turn(&mut self, replica: ReplicaId, idle: Option<Idle>, now: Instant) {
        let clock = self.clock(now);
        let device = &mut self.devices[usize::from(replica.0)];
        if device.since.map(|(why, _)| why) != idle {
            device.charged = device.charged_at(clock);
            device.since = idle.map(|why| (why, clock));
        }
    }

    /// Until now, in the order of [`Idle::ALL`].
    pub fn charged(&self, replica: ReplicaId, now: Instant) -> [Duration; Idle::ALL.len()] {
        self.devices[usize::from(replica.0)].charged_at(self.clock(now))
    }

    fn clock(&self, now: Instant) -> Duration {
        self.waited + self.waits_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

impl Device {
    fn charged_at(&self, clock: Duration) -> [Duration; Idle::ALL.len()] {
        let mut charged = self.charged;
        if let Some((why, since)) = self.since {
            charged[why as usize] += clock - since;
        }
        charged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_counts_while_somebody_waits_elsewhere() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let [a, b] = [ReplicaId(0), ReplicaId(1)];
        let mut imbalance = Imbalance::new(2);
        let seconds =
            |imbalance: &Imbalance, replica, now| imbalance.charged(replica, at(now)).map(|charged| charged.as_secs());
        imbalance.turn(a, None, at(1));
        assert_eq!(seconds(&imbalance, b, 2), [0, 0]);
        imbalance.wait(1, at(3));
        imbalance.wait(2, at(4));
        assert_eq!((seconds(&imbalance, a, 5), seconds(&imbalance, b, 5)), ([0, 0], [2, 0]));
        imbalance.turn(b, None, at(6));
        imbalance.turn(b, Some(Idle::DeviceLost), at(7));
        imbalance.wait(0, at(9));
        assert_eq!(seconds(&imbalance, b, 20), [3, 2]);
        imbalance.wait(1, at(20));
        assert_eq!((seconds(&imbalance, a, 21), seconds(&imbalance, b, 21)), ([0, 0], [3, 3]));
    }
}
