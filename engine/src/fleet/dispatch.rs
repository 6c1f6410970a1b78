//! The router at work: requests go to engines, engine threads tell what happens, and what waits goes where it is
//! served sooner.
//!
//! Invariant: a request that has not ended is with one engine, or parked while no device takes any. A lock is held for
//! a few additions, a search over the replicas, or a look at those that wait; never while a sink is told of something.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::imbalance::{Idle, Imbalance};
use super::routed::{Now, Routed};
use super::router::{Placement, Router, Traits};
use super::{ReplicaId, lock};
use crate::cost::{CostModel, Prices};
use crate::engine::Engine;
use crate::memory::{BlockChain, BlockHasher};
use crate::queue::Ledger;
use crate::request::{FinishReason, Request, Sink};
use crate::worker::{ENDED, EngineHandle};

#[cfg(test)]
mod tests;

pub(super) struct Dispatch {
    /// By replica.
    engines: Vec<EngineHandle>,
    /// `None` where prefixes are not kept.
    hasher: Option<BlockHasher>,
    /// What tenants have got, wherever they got it.
    pub ledger: Arc<Ledger>,
    board: Mutex<Board>,
}

struct Board {
    router: Router,
    /// By replica.
    seats: Vec<Seat>,
    /// With no engine, oldest first.
    parked: Vec<Arc<Routed>>,
    /// How many wait of each priority that any has.
    priorities: BTreeMap<i32, u32>,
    imbalance: Imbalance,
    /// When the router was last told who is late.
    looked_at: Option<Instant>,
}

/// Who is late is asked no more often: each answer takes a lock of the engine's.
const LOOK: Duration = Duration::from_millis(10);

struct Seat {
    /// What has not begun there, oldest first.
    waiting: VecDeque<Arc<Routed>>,
    /// What steps take there, once that is known.
    cost: CostModel,
    /// Its device is there.
    is_open: bool,
    has_ended: bool,
}

impl Dispatch {
    pub fn new(engines: Vec<EngineHandle>, hasher: Option<BlockHasher>) -> Dispatch {
        let are_known = engines.iter().all(|engine| engine.cost().is_known());
        let traits = |engine: &EngineHandle| {
            let config = engine.config();
            let (max_num_seqs, max_num_batched_tokens) = (config.max_num_seqs, config.max_num_batched_tokens);
            let cost = if are_known { engine.cost() } else { guess(engine) };
            Traits { cost, max_num_seqs, max_num_batched_tokens }
        };
        let traits: Vec<Traits> = engines.iter().map(traits).collect();
        let mut router = Router::new(engines[0].config().block_size, &traits);
        router.set_moves(engines.iter().map(EngineHandle::move_prices).collect());
        let seat = |engine: &EngineHandle| Seat {
            waiting: VecDeque::new(),
            cost: engine.cost(),
            is_open: true,
            has_ended: false,
        };
        let seats = engines.iter().map(seat).collect();
        let imbalance = Imbalance::new(engines.len());
        let (parked, priorities) = (Vec::new(), BTreeMap::new());
        let board = Mutex::new(Board { router, seats, parked, priorities, imbalance, looked_at: None });
        Dispatch { engines, hasher, ledger: Arc::default(), board }
    }

    pub fn submit(self: &Arc<Self>, request: Arc<Request>, sink: Box<dyn Sink>) {
        let mut chain = BlockChain::default();
        if let Some(hasher) = &self.hasher {
            chain = hasher.chain(request.cache_salt);
            chain.set_salt(request.salt_name.clone());
            hasher.extend(&mut chain, &request.prompt);
        }
        self.place(&Arc::new(Routed::new(self.clone(), request, chain, sink)));
    }

    /// Hands a request that is with no engine to the one where it costs the least, or parks it.
    pub fn place(&self, routed: &Arc<Routed>) {
        loop {
            let mut now = lock(&routed.now);
            if now.has_ended() {
                return;
            }
            let mut board = self.look();
            let Some(placement) = board.router.place(routed.ask(&now)) else {
                let is_over = board.seats.iter().all(|seat| seat.has_ended);
                if !is_over {
                    board.parked.push(routed.clone());
                    return;
                }
                drop((board, now));
                return routed.fail(ENDED);
            };
            let replica = placement.replica;
            board.list(routed, replica);
            drop(board);
            if self.hand_over(routed, &mut now, placement) {
                return;
            }
            drop(now);
            self.ended(replica);
        }
    }

    /// The board, where the router knows who has been at a step for how long.
    fn look(&self) -> MutexGuard<'_, Board> {
        let mut board = lock(&self.board);
        let now = Instant::now();
        if board.looked_at.is_none_or(|at| now.duration_since(at) >= LOOK) {
            board.looked_at = Some(now);
            for (id, engine) in (0..).map(ReplicaId).zip(&self.engines) {
                board.router.set_stalled(id, engine.stalled_for());
            }
        }
        board
    }

    /// Whether the engine of `placement`, where the request is listed, has taken it.
    fn hand_over(&self, routed: &Arc<Routed>, now: &mut Now, placement: Placement) -> bool {
        let engine = &self.engines[usize::from(placement.replica.0)];
        if let Some(fetch) = &placement.fetch {
            let (export, import) = routed.fetch(fetch);
            engine.import(import);
            self.engines[usize::from(fetch.from.0)].export(export);
        }
        (now.placement, now.is_waiting) = (Some(placement), true);
        let (request, sink) = routed.next_attempt(now);
        let handed = engine.submit(request, sink);
        if handed.is_err() {
            routed.recall(now);
        }
        handed.is_ok()
    }

    /// It has got a slot.
    pub fn begun(&self, routed: &Routed, now: &mut Now) {
        lock(&self.board).unlist(routed, now);
    }

    pub fn token(&self, now: &mut Now) {
        if let Some(placement) = &mut now.placement {
            lock(&self.board).router.token(placement);
        }
    }

    /// It has ended. How long answers are is learnt from those that are whole: not from what failed or was pooled.
    pub fn end(&self, routed: &Routed, now: &mut Now, reason: &FinishReason) {
        let mut board = lock(&self.board);
        board.unlist(routed, now);
        let Some(placement) = now.placement.take() else { return };
        match reason {
            FinishReason::Stop | FinishReason::Length if !routed.is_pooled() => {
                board.router.end(placement, now.num_generated());
            }
            _ => board.router.withdraw(placement),
        }
    }

    pub fn withdraw(&self, routed: &Routed, now: &mut Now) {
        let mut board = lock(&self.board);
        board.unlist(routed, now);
        if let Some(placement) = now.placement.take() {
            board.router.withdraw(placement);
        }
    }

    pub fn num_waiting_at(&self, replica: ReplicaId) -> u64 {
        lock(&self.board).seat(replica).waiting.len() as u64
    }

    /// How long a device has been idle while requests waited on others, in the order of [`Idle::ALL`].
    pub fn imbalance(&self, replica: ReplicaId) -> [Duration; Idle::ALL.len()] {
        lock(&self.board).imbalance.charged(replica, Instant::now())
    }

    /// An engine has done a step, or has nothing to do.
    pub fn stepped(&self, replica: ReplicaId, engine: &mut Engine) {
        let (cost, max_num_seqs) = (*engine.cost(), engine.config().max_num_seqs);
        let has_room = {
            let mut board = lock(&self.board);
            board.learn(replica, cost);
            let Board { router, seats, imbalance, .. } = &mut *board;
            engine.cache_mut().block_events().for_each(|event| router.tell(replica, event));
            let seat = &seats[usize::from(replica.0)];
            let is_idle = engine.is_idle() && seat.waiting.is_empty() && seat.is_open;
            if seat.is_open {
                imbalance.turn(replica, is_idle.then_some(Idle::PlacedElsewhere), Instant::now());
            }
            seat.is_open && seat.waiting.is_empty() && seats.iter().any(|seat| !seat.waiting.is_empty())
        };
        match has_room {
            true => self.relieve(replica, max_num_seqs),
            false => self.prefer(replica),
        }
    }

    /// Where `replica` has a slot for somebody who waits there, whoever of the same tenant comes before them by
    /// priority and waits for a slot elsewhere gets it: as many as there are slots.
    fn prefer(&self, replica: ReplicaId) {
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
            if !routed.is_some_and(|routed| self.take_over(&routed, replica, true)) {
                return;
            }
        }
    }

    fn max_num_seqs(&self, replica: ReplicaId) -> u32 {
        self.engines[usize::from(replica.0)].config().max_num_seqs
    }

    /// `replica`, where nothing waits, takes what waits on the one that is most behind, while it has a slot and what it
    /// takes costs so much less there.
    fn relieve(&self, replica: ReplicaId, max_num_seqs: u32) {
        loop {
            let routed = {
                let board = self.look();
                if board.router.num_placed(replica) >= max_num_seqs {
                    return;
                }
                let waiting = |other: ReplicaId| &board.seats[usize::from(other.0)].waiting;
                let waits = |other: ReplicaId| other != replica && !waiting(other).is_empty();
                let behind = board.router.most_behind(waits);
                behind.and_then(|behind| waiting(behind).back().cloned())
            };
            if !routed.is_some_and(|routed| self.take_over(&routed, replica, false)) {
                return;
            }
        }
    }

    /// Whether a request that waited elsewhere is with `replica` now; it goes if it would cost so much less there, or
    /// because it is `preferred`.
    fn take_over(&self, routed: &Arc<Routed>, replica: ReplicaId, preferred: bool) -> bool {
        let mut now = lock(&routed.now);
        let Some(placement) = now.placement.as_ref().filter(|_| now.is_waiting) else { return false };
        let is_worth_it = || lock(&self.board).router.is_worth_a_move(placement, routed.ask(&now), replica);
        if !preferred && !is_worth_it() {
            return false;
        }
        routed.recall(&mut now);
        let placement = {
            let mut board = lock(&self.board);
            board.list(routed, replica);
            board.router.place_on(replica, routed.ask(&now))
        };
        let taken = self.hand_over(routed, &mut now, placement);
        drop(now);
        if !taken {
            self.place(routed);
        }
        taken
    }

    /// Its device is gone: what waits there goes elsewhere, and what it was at is told by its engine.
    pub fn lost(&self, replica: ReplicaId) {
        let waiting = {
            let mut board = lock(&self.board);
            board.router.set_open(replica, false);
            board.router.forget(replica);
            board.imbalance.turn(replica, Some(Idle::DeviceLost), Instant::now());
            let seat = board.seat(replica);
            seat.is_open = false;
            Vec::from_iter(seat.waiting.iter().cloned())
        };
        for routed in waiting {
            let mut now = lock(&routed.now);
            let is_there = now.placement.as_ref().is_some_and(|placement| placement.replica == replica);
            if now.is_waiting && is_there {
                routed.recall(&mut now);
                drop(now);
                self.place(&routed);
            }
        }
    }

    /// Its device is there again.
    pub fn recovered(&self, replica: ReplicaId) {
        let parked = {
            let mut board = lock(&self.board);
            board.router.set_open(replica, true);
            board.seat(replica).is_open = true;
            board.imbalance.turn(replica, Some(Idle::PlacedElsewhere), Instant::now());
            std::mem::take(&mut board.parked)
        };
        parked.iter().for_each(|routed| self.place(routed));
    }

    /// Its thread takes no request any more.
    pub fn ended(&self, replica: ReplicaId) {
        let mut board = lock(&self.board);
        board.router.set_open(replica, false);
        let seat = board.seat(replica);
        (seat.is_open, seat.has_ended) = (false, true);
        if board.seats.iter().all(|seat| seat.has_ended) {
            let parked = std::mem::take(&mut board.parked);
            drop(board);
            parked.iter().for_each(|routed| routed.fail(ENDED));
        }
    }

    /// No engine is there to take them.
    pub fn fail_parked(&self) {
        let parked = std::mem::take(&mut lock(&self.board).parked);
        parked.iter().for_each(|routed| routed.fail(ENDED));
    }
}

impl Board {
    fn seat(&mut self, replica: ReplicaId) -> &mut Seat {
        &mut self.seats[usize::from(replica.0)]
    }

    /// A price is worth something beside others that are known too.
    fn learn(&mut self, replica: ReplicaId, cost: CostModel) {
        let are_known = |seats: &[Seat]| seats.iter().all(|seat| seat.cost.is_known());
        let were_known = are_known(&self.seats);
        self.seat(replica).cost = cost;
        if were_known {
            self.router.set_cost(replica, cost);
        } else if are_known(&self.seats) {
            let ids = (0..).map(ReplicaId).zip(&self.seats);
            ids.for_each(|(id, seat)| self.router.set_cost(id, seat.cost));
        }
    }

    /// It waits there from now on.
    fn list(&mut self, routed: &Arc<Routed>, replica: ReplicaId) {
        self.seat(replica).waiting.push_back(routed.clone());
        *self.priorities.entry(routed.priority()).or_default() += 1;
        let now = Instant::now();
        self.imbalance.turn(replica, None, now);
        self.imbalance.wait(self.num_waiting(), now);
    }

    fn num_waiting(&self) -> usize {
        self.seats.iter().map(|seat| seat.waiting.len()).sum()
    }

    /// Requests that a replica has given a slot.
    fn num_begun(&self, replica: ReplicaId) -> u32 {
        let num_waiting = self.seats[usize::from(replica.0)].waiting.len() as u32;
        self.router.num_placed(replica).saturating_sub(num_waiting)
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

    /// It does not wait any more, if it did.
    fn unlist(&mut self, routed: &Routed, now: &mut Now) {
        let Some(placement) = now.placement.as_ref().filter(|_| now.is_waiting) else { return };
        let waiting = &mut self.seat(placement.replica).waiting;
        let at = waiting.iter().position(|other| std::ptr::eq(Arc::as_ptr(other), routed));
        waiting.remove(at.expect("who waits is listed"));
        if let Entry::Occupied(mut count) = self.priorities.entry(routed.priority()) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        now.is_waiting = false;
        self.imbalance.wait(self.num_waiting(), Instant::now());
    }
}

/// Before its steps have been measured: by what one sequence alone took when it was started.
fn guess(engine: &EngineHandle) -> CostModel {
    let base = if engine.alone().is_zero() { STAND_IN } else { engine.alone() };
    let base_ns = base.as_nanos() as f64;
    CostModel::line(base_ns, base_ns / 100.0, Prices::default())
}

/// For a device that was not asked to try: requests are spread by their number and size.
const STAND_IN: Duration = Duration::from_millis(10);
