//! Sends a run's requests: when each is due (open loop), or as soon as one of so many clients is free (closed loop).
//!
//! Invariant: in an open loop nothing waits for an answer but the next turn of its own conversation, and what is late
//! is timed from when it was due, so that a slow server cannot slow the load that it is measured under.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use super::endpoint::{Answer, Endpoint, Failure};

/// A request, ready to be sent.
#[derive(Clone, Debug)]
pub struct Ask {
    /// After the first.
    pub due: Duration,
    /// The turn before it, by its place in the run: it is due no sooner than when that has ended and was thought about.
    pub follows: Option<usize>,
    pub path: &'static str,
    pub body: Bytes,
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    /// Its answer is JSON of a schema; any other has `max_tokens`, unless something is wrong.
    pub is_constrained: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Requests leave when they are due.
    Open,
    /// So many clients take one conversation after the other, turn by turn; most have one turn.
    Closed(u32),
}

/// How clients behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manners {
    /// Between an answer and the next turn.
    pub think: Duration,
    /// For the next event of an answer.
    pub patience: Duration,
}

/// What became of a request; those that were never sent have none.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub due: Instant,
    pub ended: Instant,
    pub result: Result<Answer, Failure>,
}

/// So many that nobody answers, one after the other, and the target is gone.
const GONE: u32 = 10;

/// Sends `asks`, and gives what became of each, in their order.
pub async fn drive(endpoint: Arc<Endpoint>, asks: Arc<Vec<Ask>>, pace: Pace, manners: Manners) -> Vec<Option<Outcome>> {
    let num_asks = asks.len();
    let mut next_turns = vec![None; num_asks];
    for (index, ask) in asks.iter().enumerate() {
        if let Some(before) = ask.follows {
            next_turns[before] = Some(index);
        }
    }
    let openings: Vec<usize> = (0..num_asks).filter(|&index| asks[index].follows.is_none()).collect();
    let num_openings = openings.len();
    let (next, missed) = (AtomicUsize::new(0), AtomicU32::new(0));
    let shared = Arc::new(Shared { endpoint, asks, next_turns, openings, manners, next, missed });
    let (mut tasks, begun) = (JoinSet::new(), Instant::now());
    match pace {
        Pace::Open => {
            for &index in &shared.openings {
                let due = begun + shared.asks[index].due;
                sleep_until(due.into()).await;
                if shared.is_gone() {
                    break;
                }
                let shared = shared.clone();
                tasks.spawn(async move { shared.conversation(index, due, Some(begun)).await });
            }
        }
        Pace::Closed(clients) => {
            for _ in 0..clients.min(num_openings as u32) {
                tasks.spawn(shared.clone().client());
            }
        }
    }
    let mut outcomes: Vec<Option<Outcome>> = vec![None; num_asks];
    while let Some(ended) = tasks.join_next().await {
        for (index, outcome) in ended.expect("a request is not cancelled, and does not panic") {
            outcomes[index] = Some(outcome);
        }
    }
    outcomes
}

struct Shared {
    endpoint: Arc<Endpoint>,
    asks: Arc<Vec<Ask>>,
    /// Of each ask the one that follows it.
    next_turns: Vec<Option<usize>>,
    /// Asks that follow none, in their order.
    openings: Vec<usize>,
    manners: Manners,
    /// Of a closed loop: which opening its next free client takes.
    next: AtomicUsize,
    /// Requests that the target did not answer since the last that it did.
    missed: AtomicU32,
}

impl Shared {
    async fn client(self: Arc<Shared>) -> Vec<(usize, Outcome)> {
        let mut outcomes = Vec::new();
        while !self.is_gone() {
            let Some(&index) = self.openings.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            outcomes.extend(self.conversation(index, Instant::now(), None).await);
        }
        outcomes
    }

    /// From its first turn, which is due, to its last; in an open loop, that began then, no turn comes before its time.
    async fn conversation(&self, first: usize, due: Instant, begun: Option<Instant>) -> Vec<(usize, Outcome)> {
        let outcome = self.ask(first, due).await;
        let mut outcomes = vec![(first, outcome)];
        while let Some((last, next)) = outcomes.last().and_then(|(index, last)| Some((last, self.next_turns[*index]?)))
        {
            let thought = last.ended + self.manners.think;
            let due = begun.map_or(thought, |begun| thought.max(begun + self.asks[next].due));
            sleep_until(due.into()).await;
            if self.is_gone() {
                break;
            }
            outcomes.push((next, self.ask(next, due).await));
        }
        outcomes
    }

    async fn ask(&self, index: usize, due: Instant) -> Outcome {
        let Ask { path, body, max_tokens, .. } = &self.asks[index];
        let result = self.endpoint.stream(path, body.clone(), *max_tokens, self.manners.patience).await;
        match &result {
            Err(Failure::Unreachable(_) | Failure::Unanswered(_)) => drop(self.missed.fetch_add(1, Ordering::Relaxed)),
            _ => self.missed.store(0, Ordering::Relaxed),
        }
        Outcome { due, ended: Instant::now(), result }
    }

    fn is_gone(&self) -> bool {
        self.missed.load(Ordering::Relaxed) >= GONE
    }
}
