//! The router at work: requests go to engines, engine threads tell what happens, and what waits goes where it is
//! served sooner ([`moves`]).
//!
//! Invariant: a request that has not ended is with one engine, or parked while no device takes any. A lock is held for
//! a few additions, a search over the replicas, or a look at those that wait; never while a sink is told of something.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::imbalance::{Idle, Imbalance};
use super::routed::{Now, Routed};
use super::router::{Placement, Router, Traits};
use super::{ReplicaId, lock};
use crate::arrival::Arrival;
use crate::cost::{CostModel, Prices};
use crate::memory::{BlockChain, BlockHasher};
use crate::queue::Ledger;
use crate::request::{FinishReason, Request, Sink};
use crate::worker::{ENDED, EngineHandle};

mod moves;
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
    /// By replica: a step of one sequence, as it was tried.
    alone: Vec<Duration>,
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
    /// What has, oldest first.
    running: Vec<Arc<Routed>>,
    /// What steps take there, once that is known.
    cost: CostModel,
    /// Its device is there.
    is_open: bool,
    has_ended: bool,
}

impl Dispatch {
    pub fn new(engines: Vec<EngineHandle>, hasher: Option<BlockHasher>) -> Dispatch {
        let costs: Vec<CostModel> = engines.iter().map(EngineHandle::cost).collect();
        let alone: Vec<Duration> = engines.iter().map(alone).collect();
        let traits = |(engine, cost): (&EngineHandle, CostModel)| {
            let config = engine.config();
            let (max_num_seqs, max_num_batched_tokens) = (config.max_num_seqs, config.max_num_batched_tokens);
            let kv_tokens = u64::from(config.num_blocks) * u64::from(config.block_size);
            Traits { cost, max_num_seqs, max_num_batched_tokens, kv_tokens }
        };
        let traits: Vec<Traits> = engines.iter().zip(guessed(&costs, &alone)).map(traits).collect();
        let mut router = Router::new(engines[0].config().block_size, &traits);
        router.set_moves(engines.iter().map(EngineHandle::move_prices).collect());
        let seat = |engine: &EngineHandle| Seat {
            waiting: VecDeque::new(),
            running: Vec::new(),
            cost: engine.cost(),
            is_open: true,
            has_ended: false,
        };
        let seats = engines.iter().map(seat).collect();
        let imbalance = Imbalance::new(engines.len());
        let (parked, priorities) = (Vec::new(), BTreeMap::new());
        let board = Mutex::new(Board { router, seats, alone, parked, priorities, imbalance, looked_at: None });
        Dispatch { engines, hasher, ledger: Arc::default(), board }
    }

    pub fn submit(self: &Arc<Self>, request: Arc<Request>, chain: BlockChain, sink: Box<dyn Sink>) {
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
        let arrival = Arrival::new(request, routed.chain().clone(), self.hasher.as_ref());
        let handed = engine.submit(arrival, sink);
        if handed.is_err() {
            routed.recall(now);
        }
        handed.is_ok()
    }

    /// It has got a slot.
    pub fn begun(&self, routed: &Arc<Routed>, now: &mut Now) {
        let mut board = lock(&self.board);
        board.unlist(routed, now);
        if let Some(placement) = &now.placement {
            board.seat(placement.replica).running.push(routed.clone());
        }
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

    /// Requests that have begun once, and wait for a slot of another device, or for a device.
    pub fn num_waiting_again(&self) -> u64 {
        let board = lock(&self.board);
        let waiting = board.seats.iter().flat_map(|seat| &seat.waiting).chain(&board.parked);
        waiting.filter(|routed| routed.has_begun()).count() as u64
    }

    /// How long a device has been idle while requests waited on others, in the order of [`Idle::ALL`].
    pub fn imbalance(&self, replica: ReplicaId) -> [Duration; Idle::ALL.len()] {
        lock(&self.board).imbalance.charged(replica, Instant::now())
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

    /// What steps of a replica take, and so of those that are not known yet.
    fn learn(&mut self, replica: ReplicaId, cost: CostModel) {
        let is_news = cost.is_known() && !self.seat(replica).cost.is_known();
        self.seat(replica).cost = cost;
        if is_news {
            let costs: Vec<CostModel> = self.seats.iter().map(|seat| seat.cost).collect();
            let all = (0..).map(ReplicaId).zip(guessed(&costs, &self.alone));
            all.for_each(|(id, cost)| self.router.set_cost(id, cost));
        } else if cost.is_known() {
            self.router.set_cost(replica, cost);
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

    /// It neither waits nor runs any more, if it did.
    fn unlist(&mut self, routed: &Routed, now: &mut Now) {
        let Some(placement) = &now.placement else { return };
        let is_it = |other: &Arc<Routed>| std::ptr::eq(Arc::as_ptr(other), routed);
        let seat = self.seat(placement.replica);
        if !std::mem::replace(&mut now.is_waiting, false) {
            let at = seat.running.iter().position(is_it);
            seat.running.remove(at.expect("who has begun is listed"));
            return;
        }
        let at = seat.waiting.iter().position(is_it);
        seat.waiting.remove(at.expect("who waits is listed"));
        if let Entry::Occupied(mut count) = self.priorities.entry(routed.priority()) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        self.imbalance.wait(self.num_waiting(), Instant::now());
    }
}

/// What steps take by replica: as is known, and where it is not, as on the known one that is the most alike by what one
/// sequence alone took when they were started, as much faster or slower. Where none is known, a line from there.
fn guessed(costs: &[CostModel], alone: &[Duration]) -> Vec<CostModel> {
    let known: Vec<usize> = (0..costs.len()).filter(|&index| costs[index].is_known()).collect();
    let guess = |index: usize| {
        let ratio = |other: usize| alone[other].as_secs_f64() / alone[index].as_secs_f64();
        let is_unlike = |other: &usize| ratio(*other).ln().abs();
        match known.iter().copied().min_by(|a, b| is_unlike(a).total_cmp(&is_unlike(b))) {
            Some(other) => costs[other].faster(ratio(other)),
            None => {
                let base_ns = alone[index].as_nanos() as f64;
                CostModel::line(base_ns, base_ns / 100.0, Prices::default())
            }
        }
    };
    (0..costs.len()).map(|index| if costs[index].is_known() { costs[index] } else { guess(index) }).collect()
}

/// What one sequence alone took when it was started.
fn alone(engine: &EngineHandle) -> Duration {
    if engine.alone().is_zero() { STAND_IN } else { engine.alone() }
}

/// For a device that was not asked to try: requests are spread by their number and size.
const STAND_IN: Duration = Duration::from_millis(10);
