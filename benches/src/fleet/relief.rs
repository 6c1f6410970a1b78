//! What a device takes from others because it has room, as a server's does: the router says from whom, and whether it
//! is worth it.

use fullbore_engine::fleet::ReplicaId;

use super::Fleet;
use crate::play::lock;

/// Who is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Waits,
    /// It has a slot.
    Runs,
}

impl Fleet<'_> {
    /// Device `id` is between two steps. Where nothing waits there, it takes what waits on the one that is most behind;
    /// where nothing waits anywhere and it has nothing to do, what has a slot on the slowest.
    pub(super) fn relieve(&mut self, id: usize) {
        let device = &self.devices[id];
        if !self.rules.moves() || !device.waiting.is_empty() {
            return;
        }
        match self.num_waiting {
            1.. => self.take(id, Who::Waits),
            0 if device.engine.is_idle() => self.take(id, Who::Runs),
            0 => {}
        }
    }

    fn take(&mut self, id: usize, who: Who) {
        let replica = ReplicaId(id as u16);
        while self.router.num_placed(replica) < self.devices[id].engine.config().max_num_seqs {
            let last = |other: ReplicaId| if other == replica { None } else { self.last(usize::from(other.0), who) };
            let from = match who {
                Who::Waits => self.router.most_behind(|other| last(other).is_some()),
                Who::Runs => self.router.slowest(|other| last(other).is_some()),
            };
            let Some((from, index)) = from.and_then(|from| Some((usize::from(from.0), last(from)?))) else { return };
            let live = self.live[index].as_mut().expect("it is there");
            let ask = self.rules.ask(&self.requests[index], &live.chain, live.generated.len() as u32);
            let here = live.placement.as_ref().expect("it is there");
            let is_worth_it = match who {
                Who::Waits => self.router.is_worth_a_move(here, ask, replica),
                Who::Runs => self.router.is_worth_a_restart(here, ask, replica),
            };
            if !is_worth_it {
                return;
            }
            let there = self.router.place_on(replica, ask);
            self.router.withdraw(live.placement.replace(there).expect("it is there"));
            live.was_restarted |= who != Who::Waits;
            let device = &mut self.devices[from];
            device.engine.abort(live.sequence);
            device.there.remove(&index);
            if who == Who::Waits {
                device.waiting.retain(|waiting| *waiting != index);
                self.num_waiting -= 1;
            } else {
                // Of a step that it is at, nobody hears what that brings for this one.
                lock(&device.notes).retain(|(other, _)| *other != index);
            }
            self.num_moved += 1;
            self.hand_in(index);
        }
    }

    /// The newest of those on device `id` who may be taken.
    fn last(&self, id: usize, who: Who) -> Option<usize> {
        let device = &self.devices[id];
        if who == Who::Waits {
            return device.waiting.back().copied();
        }
        let may_restart = |index: &&usize| self.live[**index].as_ref().is_some_and(|live| !live.was_restarted);
        device.there.iter().rev().filter(|index| !device.waiting.contains(index)).find(may_restart).copied()
    }
}
