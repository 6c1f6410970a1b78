//! Where a request goes: to the replica that is predicted to finish it first.
//!
//! The prediction is in each device's own time, by its cost model: the prompts that wait there and the request's own
//! without what the prefix cache has of it, a slot where all are taken, and the answer at the pace of a step with one
//! sequence more. So a prefix counts for as much as it saves, and never for more: a replica that holds it is passed by
//! when its queue is longer than that. Where blocks can be copied between devices, what another one has of a prompt
//! counts for what it saves beyond the copies. Ties go round, but to who has more of the prompt where that costs no
//! more time than it saves.
//!
//! Invariant: what is counted of a replica is the sum over its placements, each counted from [`Router::place`] until
//! it is given back; nobody is asked how busy they are. How long answers are is learnt from those that ended.

use std::cmp::Reverse;
use std::time::Duration;

use super::ReplicaId;
use super::holders::Holders;
use crate::cost::CostModel;
use crate::engine::moves::MovePrices;
use crate::memory::{BlockEvent, BlockHash};

mod fetch;
mod replica;

pub use fetch::Fetch;
use fetch::Rest;
use replica::Replica;

/// A request as the router sees it.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The keys of its prompt's full blocks.
    pub chain: &'a [BlockHash],
    pub prompt_tokens: u32,
    /// Tokens of its answer at most.
    pub max_tokens: u32,
}

/// A device and what its engine was configured to take.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Known, or a guess where those of all replicas are.
    pub cost: CostModel,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
}

/// What one request is counted for where it was placed; belongs to whoever placed it, and goes back to the router.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Placement {
    pub replica: ReplicaId,
    /// From now to its last token, when it was placed.
    pub predicted_ns: u64,
    /// Of its prompt, what was in the replica's prefix cache then.
    pub cached_tokens: u32,
    /// What is to come from another replica, before the rest is computed.
    pub fetch: Option<Fetch>,
    prompt_tokens: u32,
    /// What the rest of its prompt takes there, until it is computed.
    waiting_ns: u64,
    /// Of its answer, what is still expected.
    owed_tokens: u32,
}

#[derive(Debug)]
pub struct Router {
    replicas: Vec<Replica>,
    holders: Holders,
    /// By replica, where any has blocks copied.
    moves: Vec<Option<MovePrices>>,
    block_size: u32,
    /// By replica, of the request that is being placed: what is there of its prompt, and when it would end.
    cached_tokens: Vec<u32>,
    finish_ns: Vec<f64>,
    /// Where the next search begins.
    turn: usize,
    answers: AnswerLength,
}

/// A mean over answers that ended, the newer ones counting more.
#[derive(Clone, Copy, Debug)]
struct AnswerLength {
    mean: f64,
    num_ended: u32,
    /// Whether an answer is as long as it may be.
    is_known: bool,
}

/// The weight of one answer is 1 in this many.
const MEMORY: u32 = 256;
/// What is expected before any answer has ended.
const FIRST_GUESS: f64 = 128.0;
/// Predictions that differ by this share are a tie, for prices are known no better.
const TIE: f64 = 0.02;
/// A request that waits is moved where it is predicted to end in this share of the time, or less.
const WORTH_A_MOVE: f64 = 0.9;

impl Router {
    /// All replicas cut prompts into blocks of `block_size` tokens and name them by one key.
    pub fn new(block_size: u32, traits: &[Traits]) -> Router {
        let num_replicas = u16::try_from(traits.len()).expect("fewer than 65536 replicas");
        Router {
            replicas: traits.iter().map(|traits| Replica::new(*traits)).collect(),
            holders: Holders::new(num_replicas),
            moves: Vec::new(),
            block_size,
            cached_tokens: vec![0; traits.len()],
            finish_ns: Vec::with_capacity(traits.len()),
            turn: 0,
            answers: AnswerLength { mean: FIRST_GUESS, num_ended: 0, is_known: false },
        }
    }

    /// What a block takes to go from each replica to another one or come from there; `None` where none does.
    pub fn set_moves(&mut self, moves: Vec<Option<MovePrices>>) {
        assert_eq!(moves.len(), self.replicas.len(), "prices of each replica");
        self.moves = moves;
    }

    /// From now on it is known of each answer that it will have its `max_tokens`, as it is of a trace's.
    pub fn expect_max_tokens(&mut self) {
        self.answers.is_known = true;
    }

    /// Counts a request where it is predicted to end first; `None` where no replica takes any.
    pub fn place(&mut self, ask: Ask) -> Option<Placement> {
        self.find_cached(ask);
        let owed_tokens = self.answers.expected(ask.max_tokens);
        let source = self.source();
        let mut all = std::mem::take(&mut self.finish_ns);
        all.clear();
        all.extend(self.replicas.iter().enumerate().map(|(index, replica)| {
            if !replica.is_open {
                return f64::INFINITY;
            }
            replica.finish_ns(ask.prompt_tokens, self.rest(index, ask.prompt_tokens, source).ns, owed_tokens)
        }));
        self.finish_ns = all;
        let least = self.finish_ns.iter().copied().fold(f64::INFINITY, f64::min);
        if least == f64::INFINITY {
            return None;
        }
        let num_replicas = self.replicas.len();
        let round = (self.turn..num_replicas).chain(0..self.turn);
        let tied = round.filter(|&index| self.finish_ns[index] <= least * (1.0 + TIE));
        let bonus = |&index: &usize| {
            let saved_ns = self.replicas[index].saved_ns(ask.prompt_tokens, self.cached_tokens[index]);
            let is_worth_it = self.finish_ns[index] - least <= saved_ns;
            Reverse(if is_worth_it { self.cached_tokens[index] } else { 0 })
        };
        let index = tied.min_by_key(bonus).expect("the least is among them");
        self.turn = (index + 1) % num_replicas;
        let rest = self.rest(index, ask.prompt_tokens, source);
        Some(self.put(index, ask, owed_tokens, rest))
    }

    /// Counts a request on a replica that somebody else has chosen.
    pub fn place_on(&mut self, replica: ReplicaId, ask: Ask) -> Placement {
        self.find_cached(ask);
        let index = usize::from(replica.0);
        let owed_tokens = self.answers.expected(ask.max_tokens);
        let rest = self.rest(index, ask.prompt_tokens, self.source());
        self.put(index, ask, owed_tokens, rest)
    }

    /// Whether a request that waits where `placement` has it would end so much sooner on `other` that it is to be taken
    /// there.
    pub fn is_worth_a_move(&mut self, placement: &Placement, ask: Ask, other: ReplicaId) -> bool {
        self.find_cached(ask);
        let (here, there) = (usize::from(placement.replica.0), usize::from(other.0));
        if here == there || !self.replicas[there].is_open {
            return false;
        }
        let source = self.source();
        let [rest_here, rest_there] = [here, there].map(|index| self.rest(index, ask.prompt_tokens, source).ns);
        let stays = self.replicas[here].finish_without_ns(placement, rest_here);
        let moves = self.replicas[there].finish_ns(ask.prompt_tokens, rest_there, placement.owed_tokens);
        moves < WORTH_A_MOVE * stays
    }

    /// Of replicas where somebody `waits`, the one with the most work before the last of them, by its own time.
    pub fn most_behind(&self, waits: impl Fn(ReplicaId) -> bool) -> Option<ReplicaId> {
        let all = (0..).map(ReplicaId).zip(&self.replicas);
        let behind = all.filter(|(id, _)| waits(*id)).map(|(id, replica)| (id, replica.wait_ns()));
        behind.max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(id, _)| id)
    }

    /// Its prompt is computed and a token has come.
    pub fn token(&mut self, placement: &mut Placement) {
        let replica = &mut self.replicas[usize::from(placement.replica.0)];
        replica.waiting_ns -= std::mem::take(&mut placement.waiting_ns);
        if placement.owed_tokens > 0 {
            placement.owed_tokens -= 1;
            replica.owed_tokens -= 1;
        }
    }

    /// It ended with so many tokens.
    pub fn end(&mut self, placement: Placement, num_tokens: u32) {
        self.answers.learn(num_tokens);
        self.withdraw(placement);
    }

    /// It has left, or goes elsewhere.
    pub fn withdraw(&mut self, placement: Placement) {
        let replica = &mut self.replicas[usize::from(placement.replica.0)];
        replica.num_placed -= 1;
        replica.prompt_tokens -= u64::from(placement.prompt_tokens);
        replica.waiting_ns -= placement.waiting_ns;
        replica.owed_tokens -= u64::from(placement.owed_tokens);
    }

    /// What steps take there, as is known now.
    pub fn set_cost(&mut self, replica: ReplicaId, cost: CostModel) {
        self.replicas[usize::from(replica.0)].set_cost(cost);
    }

    /// It has completed no step for so long, though it has work: what is beyond a full step is a delay to all there.
    pub fn set_stalled(&mut self, replica: ReplicaId, stalled: Duration) {
        let replica = &mut self.replicas[usize::from(replica.0)];
        let full_ns = replica.ns_per_prompt_token * f64::from(replica.traits.max_num_batched_tokens);
        replica.late_ns = (stalled.as_nanos() as u64).saturating_sub(full_ns as u64);
    }

    /// Whether it takes requests; one that does not keeps those that it has until they are withdrawn.
    pub fn set_open(&mut self, replica: ReplicaId, is_open: bool) {
        self.replicas[usize::from(replica.0)].is_open = is_open;
    }

    pub fn is_open(&self, replica: ReplicaId) -> bool {
        self.replicas[usize::from(replica.0)].is_open
    }

    /// A block came into a replica's prefix cache, or left it.
    pub fn tell(&mut self, replica: ReplicaId, event: BlockEvent) {
        self.holders.tell(replica, event);
    }

    /// A replica's device was lost, and all its blocks with it.
    pub fn forget(&mut self, replica: ReplicaId) {
        self.holders.forget(replica);
    }

    pub fn num_placed(&self, replica: ReplicaId) -> u32 {
        self.replicas[usize::from(replica.0)].num_placed
    }

    /// Refills `cached_tokens`.
    fn find_cached(&mut self, ask: Ask) {
        self.cached_tokens.fill(0);
        // The last token of a prompt is always computed.
        let most = ask.prompt_tokens.saturating_sub(1);
        let (block_size, cached_tokens) = (self.block_size, &mut self.cached_tokens);
        self.holders.depths(ask.chain, |replica, depth| {
            cached_tokens[usize::from(replica.0)] = (depth * block_size).min(most);
        });
    }

    fn put(&mut self, index: usize, ask: Ask, owed_tokens: u32, rest: Rest) -> Placement {
        let cached_tokens = self.cached_tokens[index];
        let replica = &mut self.replicas[index];
        let predicted_ns = replica.finish_ns(ask.prompt_tokens, rest.ns, owed_tokens) as u64;
        replica.num_placed += 1;
        replica.prompt_tokens += u64::from(ask.prompt_tokens);
        let waiting_ns = rest.ns as u64;
        replica.waiting_ns += waiting_ns;
        replica.owed_tokens += u64::from(owed_tokens);
        Placement {
            replica: ReplicaId(index as u16),
            predicted_ns,
            cached_tokens,
            fetch: rest.fetch,
            prompt_tokens: ask.prompt_tokens,
            waiting_ns,
            owed_tokens,
        }
    }
}

impl AnswerLength {
    fn expected(&self, max_tokens: u32) -> u32 {
        if self.is_known {
            return max_tokens.max(1);
        }
        (self.mean.round() as u32).clamp(1, max_tokens.max(1))
    }

    fn learn(&mut self, num_tokens: u32) {
        self.num_ended = (self.num_ended + 1).min(MEMORY);
        self.mean += (f64::from(num_tokens) - self.mean) / f64::from(self.num_ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::Prices;

    /// `speed` times as fast as 10 ms a step and 0.1 ms for each row more.
    fn traits(speed: f64) -> Traits {
        let cost = CostModel::line(10e6 / speed, 0.1e6 / speed, Prices::default());
        Traits { cost, max_num_seqs: 4, max_num_batched_tokens: 512 }
    }

    fn router(speeds: &[f64]) -> Router {
        Router::new(16, &speeds.iter().map(|&speed| traits(speed)).collect::<Vec<_>>())
    }

    fn chain(root: u128, len: u128) -> Vec<BlockHash> {
        (0..len).map(|block| BlockHash(root << 32 | block)).collect()
    }

    fn ask(chain: &[BlockHash]) -> Ask<'_> {
        Ask { chain, prompt_tokens: 400, max_tokens: 100 }
    }

    fn place(router: &mut Router) -> Placement {
        router.place(ask(&[])).expect("an open replica")
    }

    #[test]
    fn equal_replicas_take_turns() {
        let mut router = router(&[1.0; 4]);
        let places: Vec<Placement> = (0..8).map(|_| place(&mut router)).collect();
        let ids: Vec<u16> = places.iter().map(|placement| placement.replica.0).collect();
        assert_eq!(ids, [0, 1, 2, 3, 0, 1, 2, 3]);
    }

    /// Prices that were measured are never the same, and one client alone leaves all queues empty.
    #[test]
    fn nearly_equal_replicas_take_turns_but_for_a_prefix() {
        let mut router = router(&[1.0, 1.01, 0.995, 0.9]);
        let alone = |router: &mut Router, ask: Ask| {
            let placement = router.place(ask).expect("open");
            let replica = placement.replica.0;
            router.withdraw(placement);
            replica
        };
        let turns: Vec<u16> = (0..6).map(|_| alone(&mut router, ask(&[]))).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
        // It would end 16 ms later on the third than on the second, of 1.05 s. A block that is there saves 2 ms.
        let shared = chain(7, 24);
        let mut with = |num_blocks: usize| -> Vec<u16> {
            shared[..num_blocks].iter().for_each(|&hash| router.tell(ReplicaId(2), BlockEvent::Stored(hash)));
            (0..6).map(|_| alone(&mut router, ask(&shared))).collect()
        };
        assert_eq!(with(1), [0, 1, 2, 0, 1, 2]);
        assert_eq!(with(5), [2; 6]);
    }

    #[test]
    fn work_goes_by_speed() {
        let mut router = router(&[1.0, 1.0, 2.0, 4.0]);
        let mut counts = [0u32; 4];
        let places: Vec<Placement> = (0..800).map(|_| place(&mut router)).collect();
        places.iter().for_each(|placement| counts[usize::from(placement.replica.0)] += 1);
        for (count, wanted) in counts.into_iter().zip([100u32, 100, 200, 400]) {
            assert!(count.abs_diff(wanted) <= wanted / 20, "{counts:?}");
        }
    }

    /// A prefix of 384 tokens saves 384 times what a token of a prompt costs there, and no more.
    #[test]
    fn a_prefix_counts_for_what_it_saves() {
        let mut router = router(&[1.0, 1.0]);
        let shared = chain(7, 24);
        shared.iter().for_each(|&hash| router.tell(ReplicaId(1), BlockEvent::Stored(hash)));
        let first = router.place(ask(&shared)).expect("open");
        assert_eq!((first.replica, first.cached_tokens), (ReplicaId(1), 384));
        // With four more there the saving is less than the wait for their prompts and a slot.
        let others: Vec<Placement> = (0..4).map(|_| router.place_on(ReplicaId(1), ask(&[]))).collect();
        let second = router.place(ask(&shared)).expect("open");
        assert_eq!((second.replica, second.cached_tokens), (ReplicaId(0), 0));
        // What has left its cache counts for nothing, wherever in the chain it was.
        others.into_iter().chain([first, second]).for_each(|placement| router.withdraw(placement));
        router.tell(ReplicaId(1), BlockEvent::Removed(shared[0]));
        assert_eq!(router.place(ask(&shared)).expect("open").cached_tokens, 0);
    }

    #[test]
    fn counts_go_back_to_nothing() {
        let mut router = router(&[1.0, 3.0]);
        let mut places: Vec<Placement> = (0..20).map(|_| place(&mut router)).collect();
        for (nth, placement) in places.iter_mut().enumerate() {
            (0..7 * nth).for_each(|_| router.token(placement));
        }
        for (nth, placement) in places.into_iter().enumerate() {
            match nth % 2 {
                0 => router.end(placement, 7 * nth as u32),
                _ => router.withdraw(placement),
            }
        }
        for replica in &router.replicas {
            let counts = (replica.num_placed, replica.prompt_tokens, replica.waiting_ns, replica.owed_tokens);
            assert_eq!(counts, (0, 0, 0, 0));
        }
    }

    #[test]
    fn answers_are_expected_as_long_as_they_were() {
        let mut router = router(&[1.0]);
        for _ in 0..50 {
            let placement = router.place(Ask { max_tokens: 10_000, ..ask(&[]) }).expect("open");
            router.end(placement, 300);
        }
        assert_eq!(router.place(Ask { max_tokens: 10_000, ..ask(&[]) }).expect("open").owed_tokens, 300);
        assert_eq!(router.place(Ask { max_tokens: 20, ..ask(&[]) }).expect("open").owed_tokens, 20);
    }

    /// The fast one has a prompt before them that takes 0.24 s: who has little to say goes to the slow one.
    #[test]
    fn where_answers_are_known_the_long_and_the_short_part() {
        let mut router = router(&[1.0, 4.0]);
        let before = router.place_on(ReplicaId(1), Ask { prompt_tokens: 8000, max_tokens: 1, ..ask(&[]) });
        let with = |router: &mut Router, max_tokens: u32| {
            let placement = router.place(Ask { max_tokens, ..ask(&[]) }).expect("open");
            let found = (placement.replica.0, placement.owed_tokens);
            router.withdraw(placement);
            found
        };
        assert_eq!([1000, 10_000].map(|most| with(&mut router, most)), [(1, 128); 2], "the mean, whatever it may be");
        router.expect_max_tokens();
        assert_eq!([5, 1000].map(|length| with(&mut router, length)), [(0, 5), (1, 1000)]);
        router.withdraw(before);
    }

    #[test]
    fn who_is_closed_gets_nothing_and_what_waits_moves() {
        let mut router = router(&[1.0, 1.0]);
        router.set_open(ReplicaId(1), false);
        let places: Vec<Placement> = (0..12).map(|_| place(&mut router)).collect();
        assert!(places.iter().all(|placement| placement.replica == ReplicaId(0)));
        assert_eq!(router.most_behind(|_| true), Some(ReplicaId(0)));
        assert_eq!(router.most_behind(|_| false), None);
        let last = places.last().expect("twelve");
        assert!(!router.is_worth_a_move(last, ask(&[]), ReplicaId(1)));
        router.set_open(ReplicaId(1), true);
        assert!(router.is_worth_a_move(last, ask(&[]), ReplicaId(1)));
        assert!(!router.is_worth_a_move(last, ask(&[]), ReplicaId(0)));
        router.set_open(ReplicaId(0), false);
        router.set_open(ReplicaId(1), false);
        assert_eq!(router.place(ask(&[])), None);
    }

    #[test]
    fn who_is_stalled_is_passed_by_and_what_waits_there_moves() {
        let mut router = router(&[1.0, 1.0]);
        let waiting = place(&mut router);
        assert!(!router.is_worth_a_move(&waiting, ask(&[]), ReplicaId(1)));
        // A full step takes 61 ms.
        router.set_stalled(ReplicaId(0), Duration::from_millis(61));
        assert!(!router.is_worth_a_move(&waiting, ask(&[]), ReplicaId(1)));
        router.set_stalled(ReplicaId(0), Duration::from_secs(1));
        assert!(router.is_worth_a_move(&waiting, ask(&[]), ReplicaId(1)));
        router.withdraw(waiting);
        assert!((0..5).all(|_| place(&mut router).replica == ReplicaId(1)));
        router.set_stalled(ReplicaId(0), Duration::ZERO);
        assert_eq!(place(&mut router).replica, ReplicaId(0));
    }

    #[test]
    fn a_device_that_gets_slower_gets_less() {
        let mut router = router(&[1.0, 1.0]);
        router.set_cost(ReplicaId(0), traits(0.25).cost);
        let places: Vec<Placement> = (0..100).map(|_| place(&mut router)).collect();
        let slow = places.iter().filter(|placement| placement.replica == ReplicaId(0)).count();
        assert!((15..=25).contains(&slow), "{slow}");
    }
}
