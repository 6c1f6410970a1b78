//! Which requests change their replica. Because another one has room: where somebody waits, who waits; where nobody
//! does and a replica has nothing to do, who runs on a device that is so much slower. Because their own is late with a
//! step: whoever is there, as far as it costs less elsewhere, though others wait there too.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Board, Dispatch};
use crate::engine::Engine;
use crate::fleet::imbalance::Idle;
use crate::fleet::routed::Routed;
use crate::fleet::{ReplicaId, lock};

/// Why a request is to change its replica.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// It comes before others by its priority.
    Preferred,
    /// It waits, and would cost less there.
    Waits,
    /// It has a slot, and would cost less there.
    Runs,
}

impl Dispatch {
    /// An engine has done a step, or has nothing to do.
    pub fn stepped(&self, replica: ReplicaId, engine: &mut Engine) {
        let (cost, max_num_seqs) = (*engine.cost(), engine.config().max_num_seqs);
        let (why, late) = {
            let mut board = self.look();
            board.router.set_stalled(replica, Duration::ZERO);
            board.learn(replica, cost);
            let Board { router, seats, imbalance, .. } = &mut *board;
            engine.cache_mut().block_events().for_each(|event| router.tell(replica, event));
            let seat = &seats[usize::from(replica.0)];
            let is_idle = engine.is_idle() && seat.waiting.is_empty() && seat.is_open;
            if seat.is_open {
                imbalance.turn(replica, is_idle.then_some(Idle::PlacedElsewhere), Instant::now());
            }
            let has_room = seat.is_open && seat.waiting.is_empty();
            let why = match seats.iter().any(|seat| !seat.waiting.is_empty()) {
                true if has_room => Why::Waits,
                false if is_idle => Why::Runs,
                _ => Why::Preferred,
            };
            (why, router.late().collect())
        };
        match why {
            Why::Preferred => self.prefer(replica),
            _ => self.relieve(replica, max_num_seqs, why),
        }
        self.relieve_late(late);
    }

    /// Who is with one of these, which are late with a step, goes to where it costs the least, the oldest first.
    pub(super) fn relieve_late(&self, late: Vec<ReplicaId>) {
        for (id, why) in late.into_iter().flat_map(|id| [(id, Why::Waits), (id, Why::Runs)]) {
            loop {
                let first = lock(&self.board).first_at(id, why);
                let Some(routed) = first else { break };
                let other = {
                    let now = lock(&routed.now);
                    let ask = routed.ask(&now);
                    lock(&self.board).router.cheapest_other(id, ask)
                };
                if !other.is_some_and(|other| self.take_over(&routed, other, why)) {
                    break;
                }
            }
        }
    }

    /// Where `replica` has a slot for somebody who waits there, whoever of the same tenant comes before them by
    /// priority and waits for a slot elsewhere gets it: as many as there are slots.
    pub(super) fn prefer(&self, replica: ReplicaId) {
        loop {
            let routed = {
                let board = lock(&self.board);
                if board.priorities.len() < 2 || !board.seats[usize::from(replica.0)].is_open {
                    return;
                }
                let has_slot = |other: ReplicaId| board.num_begun(other) < self.max_num_seqs(other);
                if !has_slot(replica) {
                    return;
                }
                let preferred = board.preferred_to_those_at(replica, |other| !has_slot(other)).cloned();
                preferred.filter(|routed| board.num_before(routed, replica) < self.max_num_seqs(replica))
            };
            if !routed.is_some_and(|routed| self.take_over(&routed, replica, Why::Preferred)) {
                return;
            }
        }
    }

    fn max_num_seqs(&self, replica: ReplicaId) -> u32 {
        self.engines[usize::from(replica.0)].config().max_num_seqs
    }

    /// `replica`, where nothing waits, takes what waits on the one that is most behind, or what has a slot on the
    /// slowest, while it has a slot and what it takes costs so much less there.
    pub(super) fn relieve(&self, replica: ReplicaId, max_num_seqs: u32, why: Why) {
        loop {
            let routed = {
                let board = self.look();
                if board.router.num_placed(replica) >= max_num_seqs {
                    return;
                }
                match why {
                    Why::Runs => board.last_that_runs(replica),
                    Why::Preferred | Why::Waits => board.last_that_waits(replica),
                }
            };
            if !routed.is_some_and(|routed| self.take_over(&routed, replica, why)) {
                return;
            }
        }
    }

    /// Whether a request that was elsewhere is with `replica` now.
    fn take_over(&self, routed: &Arc<Routed>, replica: ReplicaId, why: Why) -> bool {
        let mut now = lock(&routed.now);
        let runs = why == Why::Runs;
        let Some(placement) = now.placement.as_ref().filter(|_| now.is_waiting != runs) else { return false };
        if runs && !routed.may_restart() {
            return false;
        }
        let ask = routed.ask(&now);
        let is_worth_it = match why {
            Why::Preferred => true,
            Why::Waits => lock(&self.board).router.is_worth_a_move(placement, ask, replica),
            Why::Runs => lock(&self.board).router.is_worth_a_restart(placement, ask, replica),
        };
        if !is_worth_it {
            return false;
        }
        routed.recall(&mut now);
        if runs {
            routed.stay();
        }
        let placement = {
            let mut board = lock(&self.board);
            board.list(routed, replica);
            board.router.place_on(replica, ask)
        };
        let taken = self.hand_over(routed, &mut now, placement);
        drop(now);
        if !taken {
            self.place(routed);
        }
        taken
    }
}

impl Board {
    /// The oldest of what waits at `replica`, or of what has a slot there and may be taken from it.
    fn first_at(&self, replica: ReplicaId, why: Why) -> Option<Arc<Routed>> {
        let seat = &self.seats[usize::from(replica.0)];
        let first = match why {
            Why::Runs => seat.running.iter().find(|routed| routed.may_restart()),
            Why::Preferred | Why::Waits => seat.waiting.front(),
        };
        first.cloned()
    }

    /// Of what waits elsewhere, the newest on the replica that is most behind.
    fn last_that_waits(&self, replica: ReplicaId) -> Option<Arc<Routed>> {
        let waiting = |other: ReplicaId| &self.seats[usize::from(other.0)].waiting;
        let behind = self.router.most_behind(|other| other != replica && !waiting(other).is_empty())?;
        waiting(behind).back().cloned()
    }

    /// Of what has a slot elsewhere, the newest on the slowest replica that does not stay there.
    fn last_that_runs(&self, replica: ReplicaId) -> Option<Arc<Routed>> {
        let last = |other: ReplicaId| {
            let mut running = self.seats[usize::from(other.0)].running.iter().rev();
            running.find(|routed| routed.may_restart())
        };
        let slowest = self.router.slowest(|other| other != replica && last(other).is_some())?;
        last(slowest).cloned()
    }

    /// Requests that a replica has given a slot.
    fn num_begun(&self, replica: ReplicaId) -> u32 {
        self.seats[usize::from(replica.0)].running.len() as u32
    }

    /// Those that have a slot of `replica`, or come before a request that waits elsewhere when one becomes free.
    fn num_before(&self, routed: &Routed, replica: ReplicaId) -> u32 {
        let waiting = &self.seats[usize::from(replica.0)].waiting;
        let before = waiting.iter().filter(|own| own.priority() <= routed.priority());
        self.num_begun(replica) + before.count() as u32
    }

    /// Of those that wait on replicas that are `full`, the first by priority that comes before somebody of the same
    /// tenant at `replica`.
    fn preferred_to_those_at(&self, replica: ReplicaId, full: impl Fn(ReplicaId) -> bool) -> Option<&Arc<Routed>> {
        let mut last_at = HashMap::new();
        for own in &self.seats[usize::from(replica.0)].waiting {
            let last = last_at.entry(own.tenant()).or_insert(own.priority());
            *last = own.priority().max(*last);
        }
        let others = (0..).map(ReplicaId).zip(&self.seats).filter(|(other, _)| *other != replica && full(*other));
        let waiting = others.flat_map(|(_, seat)| &seat.waiting);
        let comes_before =
            |routed: &&Arc<Routed>| last_at.get(&routed.tenant()).is_some_and(|last| routed.priority() < *last);
        waiting.filter(comes_before).min_by_key(|routed| routed.priority())
    }
}
