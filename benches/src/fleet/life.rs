//! Devices of a simulated fleet that are lost, come back, or join late; and what becomes of their requests.
//!
//! As on a server: what a lost device was at goes on elsewhere from the tokens that had come, what waited there is
//! placed anew, and where no device is there requests wait for the first that comes. Invariant: a request ends, or is
//! counted as failed.

use std::sync::Arc;
use std::time::Duration;

use fullbore_engine::fleet::{MAX_LOSSES, ReplicaId};
use fullbore_engine::request::Request;

use super::{Fleet, FleetDevice};
use crate::play::lock;
use crate::simulate::SimulateError;

/// When a device is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Life {
    /// Not before.
    pub joins: Duration,
    /// When it is lost; ascending. It cannot be lost while it is not there.
    pub losses: Vec<Duration>,
    /// From a loss until it has been made anew, with nothing cached; `None` where it never is.
    pub away: Option<Duration>,
}

/// What happens to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Change {
    Comes,
    IsLost,
    /// What it waits for from another device does not come in time.
    HasWaited,
    /// For what waits on others, if it has nothing to do.
    Looks,
}

impl Life {
    pub(super) fn changes(&self) -> Vec<(Duration, Change)> {
        let mut changes = Vec::new();
        let mut there_at = Some(self.joins);
        if !self.joins.is_zero() {
            changes.push((self.joins, Change::Comes));
        }
        for &loss in &self.losses {
            if there_at.is_none_or(|at| loss < at) {
                continue;
            }
            changes.push((loss, Change::IsLost));
            there_at = self.away.map(|away| loss + away);
            changes.extend(there_at.map(|at| (at, Change::Comes)));
        }
        changes
    }
}

impl Fleet<'_> {
    pub(super) fn change(&mut self, id: usize, change: Change, specs: &[FleetDevice]) -> Result<(), SimulateError> {
        match change {
            Change::Comes => self.open(id),
            Change::IsLost => self.lose(id, &specs[id])?,
            Change::HasWaited => self.wake(id),
            Change::Looks => {
                self.devices[id].looks_again = false;
                self.wake(id);
            }
        }
        Ok(())
    }

    /// The device takes requests from now on: first those that nobody took.
    fn open(&mut self, id: usize) {
        self.router.set_open(ReplicaId(id as u16), true);
        let device = &mut self.devices[id];
        device.is_there = true;
        device.clock.advance_to(self.now);
        self.is_due(id);
        for index in std::mem::take(&mut self.parked) {
            self.place(index);
        }
    }

    fn lose(&mut self, id: usize, spec: &FleetDevice) -> Result<(), SimulateError> {
        let replica = ReplicaId(id as u16);
        self.router.set_open(replica, false);
        self.router.forget(replica);
        self.rules.forget(replica);
        self.num_losses += 1;
        let (now, waited) = (self.now, self.waited);
        let device = &mut self.devices[id];
        device.is_there = false;
        // A step that it was at is no step, and brings nothing.
        device.life_number += 1;
        device.busy -= device.clock.now().saturating_sub(now);
        lock(&device.notes).clear();
        device.idle += device.idle_since.take().map_or(Duration::ZERO, |since| waited - since);
        self.num_fetched_blocks += device.engine.stats().num_fetched_blocks;
        (device.engine, device.clock) = spec.engine()?;
        let waiting = std::mem::take(&mut device.waiting);
        self.num_waiting -= waiting.len() as u32;
        let there = std::mem::take(&mut device.there);
        self.end_moves(id);
        for index in there {
            let live = self.live[index].as_mut().expect("it is there");
            self.router.withdraw(live.placement.take().expect("it is there"));
            live.num_losses += u32::from(!waiting.contains(&index));
            if live.num_losses > MAX_LOSSES {
                self.live[index] = None;
                self.num_failed += 1;
            } else {
                self.num_replayed += u64::from(!waiting.contains(&index));
                self.place(index);
            }
        }
        Ok(())
    }

    /// What the next device is handed of a request.
    pub(super) fn next_attempt(&self, index: usize) -> Arc<Request> {
        let live = self.live[index].as_ref().expect("it goes on");
        match live.generated.as_slice() {
            [] => live.request.clone(),
            generated => Arc::new(Request { generated: generated.to_vec(), ..Request::clone(&live.request) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: &[u64]) -> Vec<Duration> {
        seconds.iter().map(|&seconds| Duration::from_secs(seconds)).collect()
    }

    #[test]
    fn a_device_is_lost_only_while_it_is_there() {
        let changes = |joins: u64, losses: &[u64], away: Option<u64>| {
            let life = Life {
                joins: Duration::from_secs(joins),
                losses: seconds(losses),
                away: away.map(Duration::from_secs),
            };
            let told = |(at, change): (Duration, Change)| (at.as_secs(), change == Change::Comes);
            life.changes().into_iter().map(told).collect::<Vec<_>>()
        };
        assert_eq!(changes(0, &[], None), []);
        assert_eq!(changes(5, &[3, 7, 8], Some(2)), [(5, true), (7, false), (9, true)]);
        assert_eq!(changes(0, &[3, 7], Some(2)), [(3, false), (5, true), (7, false), (9, true)]);
        assert_eq!(changes(0, &[3, 7], None), [(3, false)]);
    }
}
