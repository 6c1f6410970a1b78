//! Where a request goes: to the replica where it adds the least time to all requests together. That is the time until
//! its own end, and what it takes from others (the marginal cost of its placement; Pigou, The Economics of Welfare,
//! 1920). Who looks at its own end alone crowds the fast devices, until they end it no sooner than slow ones.
//!
//! Its end is predicted in each device's own time, by its cost model: the prompts that wait there and the request's own
//! without what the prefix cache has of it, a slot where all are taken, and the answer at the pace of a step with one
//! sequence more. So a prefix counts for as much as it saves, and never for more: a replica that holds it is passed by
//! when its queue is longer than that. From the others there it takes the time of its prompt, and what steps are longer
//! with it; from those to come, a slot. Where blocks can be copied between devices, what another one has of a prompt
//! counts for what it saves beyond the copies. Ties go round, but to who has more of the prompt where that costs no
//! more time than it saves.
//!
//! A replica that has nothing to do takes from others: who waits there, and where nobody does, who runs on a device
//! that is so slow that beginning anew costs less.
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
#[cfg(test)]
mod tests;

pub use fetch::Fetch;
use fetch::{Rest, Source};
use replica::{Outlook, Replica};

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
    /// Tokens whose K and V it has memory for.
    pub kv_tokens: u64,
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
    /// Tokens that it is expected to add to those whose KV is there.
    kv_tokens: u32,
    /// What the rest of its prompt takes there, until it is computed.
    waiting_ns: u64,
    /// Expected of its answer.
    answer_tokens: u32,
}

#[derive(Debug)]
pub struct Router {
    replicas: Vec<Replica>,
    /// Of each replica as it is now.
    outlooks: Vec<Outlook>,
    holders: Holders,
    /// By replica, where any has blocks copied.
    moves: Vec<Option<MovePrices>>,
    block_size: u32,
    /// By replica, of the request that is being placed: what is there of its prompt, and what it would cost.
    cached_tokens: Vec<u32>,
    costs_ns: Vec<f64>,
    /// Whether what a request takes from others counts.
    minds_others: bool,
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
/// A request is moved where it is predicted to cost this share of the time, or less.
const WORTH_A_MOVE: f64 = 0.9;

impl Router {
    /// All replicas cut prompts into blocks of `block_size` tokens and name them by one key.
    pub fn new(block_size: u32, traits: &[Traits]) -> Router {
        let num_replicas = u16::try_from(traits.len()).expect("fewer than 65536 replicas");
        let replicas: Vec<Replica> = traits.iter().map(|traits| Replica::new(*traits)).collect();
        Router {
            outlooks: replicas.iter().map(Replica::outlook).collect(),
            replicas,
            holders: Holders::new(num_replicas),
            moves: Vec::new(),
            block_size,
            cached_tokens: vec![0; traits.len()],
            costs_ns: Vec::with_capacity(traits.len()),
            minds_others: true,
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

    /// From now on a request goes where it is predicted to end first itself, whatever it takes from others.
    pub fn mind_own_end_alone(&mut self) {
        self.minds_others = false;
    }

    /// Counts a request where it is predicted to cost the least; `None` where no replica takes any.
    pub fn place(&mut self, ask: Ask) -> Option<Placement> {
        self.find_cached(ask);
        let answer_tokens = self.answers.expected(ask.max_tokens);
        let source = self.source();
        self.find_costs(ask, answer_tokens, source);
        let least = self.costs_ns.iter().copied().fold(f64::INFINITY, f64::min);
        if least == f64::INFINITY {
            return None;
        }
        let num_replicas = self.replicas.len();
        let round = (self.turn..num_replicas).chain(0..self.turn);
        let tied = round.filter(|&index| self.costs_ns[index] <= least * (1.0 + TIE));
        let bonus = |&index: &usize| {
            let saved_ns = self.outlooks[index].saved_ns(ask.prompt_tokens, self.cached_tokens[index]);
            let is_worth_it = self.costs_ns[index] - least <= saved_ns;
            Reverse(if is_worth_it { self.cached_tokens[index] } else { 0 })
        };
        let index = tied.min_by_key(bonus).expect("the least is among them");
        self.turn = (index + 1) % num_replicas;
        let rest = self.rest(index, ask.prompt_tokens, source);
        Some(self.put(index, ask, answer_tokens, rest))
    }

    /// Of open replicas but this one, where a request would cost the least.
    pub fn cheapest_other(&mut self, replica: ReplicaId, ask: Ask) -> Option<ReplicaId> {
        self.find_cached(ask);
        self.find_costs(ask, self.answers.expected(ask.max_tokens), self.source());
        let others = (0..).map(ReplicaId).zip(&self.costs_ns).filter(|(id, cost)| *id != replica && cost.is_finite());
        others.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(id, _)| id)
    }

    /// Replicas that have been at a step for longer than a full one takes.
    pub fn late(&self) -> impl Iterator<Item = ReplicaId> {
        let all = (0..).map(ReplicaId).zip(&self.replicas);
        all.filter(|(_, replica)| replica.is_late).map(|(id, _)| id)
    }

    /// Counts a request on a replica that somebody else has chosen.
    pub fn place_on(&mut self, replica: ReplicaId, ask: Ask) -> Placement {
        self.find_cached(ask);
        let index = usize::from(replica.0);
        let answer_tokens = self.answers.expected(ask.max_tokens);
        let rest = self.rest(index, ask.prompt_tokens, self.source());
        self.put(index, ask, answer_tokens, rest)
    }

    /// Whether a request that waits where `placement` has it would cost so much less on `other` that it is to be taken
    /// there.
    pub fn is_worth_a_move(&mut self, placement: &Placement, ask: Ask, other: ReplicaId) -> bool {
        let stays = |router: &Router, others: &Outlook, rest_ns: f64| {
            router.cost_ns(others, ask.prompt_tokens, rest_ns, placement.answer_tokens)
        };
        self.costs_less_on(other, placement, ask, placement.answer_tokens, stays)
    }

    /// The same of a request that has a slot there: elsewhere all its tokens so far, which are a prompt now, are
    /// computed anew.
    pub fn is_worth_a_restart(&mut self, placement: &Placement, ask: Ask, other: ReplicaId) -> bool {
        let answer_tokens = self.answers.expected(ask.max_tokens);
        let stays = |router: &Router, others: &Outlook, _: f64| {
            let rest_ns = placement.waiting_ns as f64;
            let own_ns = others.own_ns(ask.prompt_tokens, rest_ns, answer_tokens);
            own_ns + if router.minds_others { others.takes_ns(ask.prompt_tokens, rest_ns, answer_tokens) } else { 0.0 }
        };
        self.costs_less_on(other, placement, ask, answer_tokens, stays)
    }

    /// Whether it would cost so much less on `other` than it does where it is, which `stays` tells from what is there
    /// without it and what the rest of its prompt would take.
    fn costs_less_on(
        &mut self,
        other: ReplicaId,
        placement: &Placement,
        ask: Ask,
        answer_tokens: u32,
        stays: impl FnOnce(&Router, &Outlook, f64) -> f64,
    ) -> bool {
        let (here, there) = (usize::from(placement.replica.0), usize::from(other.0));
        if here == there || !self.replicas[there].is_open {
            return false;
        }
        self.find_cached(ask);
        let source = self.source();
        let [rest_here, rest_there] = [here, there].map(|index| self.rest(index, ask.prompt_tokens, source).ns);
        let stays_ns = stays(self, &self.replicas[here].without(placement), rest_here);
        let moves_ns = self.cost_ns(&self.outlooks[there], ask.prompt_tokens, rest_there, answer_tokens);
        moves_ns < WORTH_A_MOVE * stays_ns
    }

    /// Of replicas where somebody `waits`, the one with the most work before the last of them, by its own time.
    pub fn most_behind(&self, waits: impl Fn(ReplicaId) -> bool) -> Option<ReplicaId> {
        let all = (0..).map(ReplicaId).zip(&self.replicas);
        let behind = all.filter(|(id, _)| waits(*id)).map(|(id, replica)| (id, replica.wait_ns()));
        behind.max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(id, _)| id)
    }

    /// Of replicas where somebody `runs`, the one where an answer takes the longest from now on.
    pub fn slowest(&self, runs: impl Fn(ReplicaId) -> bool) -> Option<ReplicaId> {
        let all = (0..).map(ReplicaId).zip(&self.replicas);
        let slow = all.filter(|(id, _)| runs(*id)).map(|(id, replica)| (id, replica.answer_ns(self.answers.mean)));
        slow.max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(id, _)| id)
    }

    /// Its prompt is computed and a token has come.
    pub fn token(&mut self, placement: &mut Placement) {
        let waiting_ns = std::mem::take(&mut placement.waiting_ns);
        if waiting_ns > 0 {
            self.change(placement.replica, |replica| replica.waiting_ns -= waiting_ns);
        }
    }

    /// It ended with so many tokens.
    pub fn end(&mut self, placement: Placement, num_tokens: u32) {
        self.answers.learn(num_tokens);
        self.withdraw(placement);
    }

    /// It has left, or goes elsewhere.
    pub fn withdraw(&mut self, placement: Placement) {
        self.change(placement.replica, |replica| {
            replica.num_placed -= 1;
            replica.prompt_tokens -= u64::from(placement.prompt_tokens);
            replica.waiting_ns -= placement.waiting_ns;
            replica.answer_tokens -= u64::from(placement.answer_tokens);
            replica.kv_tokens -= u64::from(placement.kv_tokens);
        });
    }

    /// What steps take there, as is known now.
    pub fn set_cost(&mut self, replica: ReplicaId, cost: CostModel) {
        self.change(replica, |replica| replica.set_cost(cost));
    }

    /// It has completed no step for so long, though it has work: what is beyond a full step is a delay to all there.
    pub fn set_stalled(&mut self, replica: ReplicaId, stalled: Duration) {
        let index = usize::from(replica.0);
        self.replicas[index].is_late = self.replicas[index].is_late_after(stalled);
        let late_ns = self.replicas[index].late_ns(stalled);
        if late_ns != self.replicas[index].late_ns {
            self.change(replica, |replica| replica.late_ns = late_ns);
        }
    }

    /// Whether it takes requests; one that does not keeps those that it has until they are withdrawn.
    pub fn set_open(&mut self, replica: ReplicaId, is_open: bool) {
        self.change(replica, |replica| replica.is_open = is_open);
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

    /// Of a request the rest of whose prompt takes `rest_ns`.
    fn cost_ns(&self, outlook: &Outlook, prompt_tokens: u32, rest_ns: f64, answer_tokens: u32) -> f64 {
        let own_ns = outlook.finish_ns(prompt_tokens, rest_ns, answer_tokens);
        let others_ns = if self.minds_others { outlook.delay_ns(prompt_tokens, rest_ns, answer_tokens) } else { 0.0 };
        own_ns + others_ns
    }

    fn change(&mut self, replica: ReplicaId, change: impl FnOnce(&mut Replica)) {
        let index = usize::from(replica.0);
        change(&mut self.replicas[index]);
        self.outlooks[index] = self.replicas[index].outlook();
    }

    /// Refills `costs_ns`, once `cached_tokens` are there.
    fn find_costs(&mut self, ask: Ask, answer_tokens: u32, source: Option<Source>) {
        let mut all = std::mem::take(&mut self.costs_ns);
        all.clear();
        all.extend(self.outlooks.iter().enumerate().map(|(index, outlook)| {
            let rest_ns = self.rest(index, ask.prompt_tokens, source).ns;
            self.cost_ns(outlook, ask.prompt_tokens, rest_ns, answer_tokens)
        }));
        self.costs_ns = all;
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

    fn put(&mut self, index: usize, ask: Ask, answer_tokens: u32, rest: Rest) -> Placement {
        let cached_tokens = self.cached_tokens[index];
        let predicted_ns = self.outlooks[index].finish_ns(ask.prompt_tokens, rest.ns, answer_tokens) as u64;
        let (id, waiting_ns) = (ReplicaId(index as u16), rest.ns as u64);
        let kv_tokens = ask.prompt_tokens - cached_tokens + answer_tokens;
        self.change(id, |replica| {
            replica.num_placed += 1;
            replica.prompt_tokens += u64::from(ask.prompt_tokens);
            replica.waiting_ns += waiting_ns;
            replica.answer_tokens += u64::from(answer_tokens);
            replica.kv_tokens += u64::from(kv_tokens);
        });
        Placement {
            replica: id,
            predicted_ns,
            cached_tokens,
            fetch: rest.fetch,
            prompt_tokens: ask.prompt_tokens,
            kv_tokens,
            waiting_ns,
            answer_tokens,
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
