//! Sends a run's requests: when each is due (open loop), or as soon as one of so many clients is free (closed loop).
//!
//! Invariant: in an open loop nothing waits for an answer, and what is late is timed from when it was due, so that a
//! slow server cannot slow the load that it is measured under.

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
    pub path: &'static str,
    pub body: Bytes,
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    /// Its answer has `max_tokens`, unless something is wrong.
    pub is_exact: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Requests leave when they are due.
    Open,
    /// So many clients take one after the other.
    Closed(u32),
}

/// What became of a request; those that were never sent have none.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub due: Instant,
    pub ended: Instant,
    pub result: Result<Answer, Failure>,
}

/// So many that cannot be sent, one after the other, and the target is gone.
const GONE: u32 = 10;

/// Sends `asks`, and gives what became of each, in their order.
pub async fn drive(
    endpoint: Arc<Endpoint>,
    asks: Arc<Vec<Ask>>,
    pace: Pace,
    patience: Duration,
) -> Vec<Option<Outcome>> {
    let shared = Arc::new(Shared { endpoint, asks, patience, next: AtomicUsize::new(0), missed: AtomicU32::new(0) });
    let (mut tasks, begun) = (JoinSet::new(), Instant::now());
    let num_asks = shared.asks.len();
    match pace {
        Pace::Open => {
            for index in 0..num_asks {
                let due = begun + shared.asks[index].due;
                sleep_until(due.into()).await;
                if shared.is_gone() {
                    break;
                }
                let shared = shared.clone();
                tasks.spawn(async move { vec![(index, shared.ask(index, due).await)] });
            }
        }
        Pace::Closed(clients) => {
            for _ in 0..clients.min(num_asks as u32) {
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
    patience: Duration,
    /// Of a closed loop: what its next free client takes.
    next: AtomicUsize,
    /// Requests that did not reach the target since the last that did.
    missed: AtomicU32,
}

impl Shared {
    async fn client(self: Arc<Shared>) -> Vec<(usize, Outcome)> {
        let mut outcomes = Vec::new();
        while !self.is_gone() {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.asks.len() {
                break;
            }
            outcomes.push((index, self.ask(index, Instant::now()).await));
        }
        outcomes
    }

    async fn ask(&self, index: usize, due: Instant) -> Outcome {
        let Ask { path, body, max_tokens, .. } = &self.asks[index];
        let result = self.endpoint.stream(path, body.clone(), *max_tokens, self.patience).await;
        match &result {
            Err(Failure::Unreachable(_)) => drop(self.missed.fetch_add(1, Ordering::Relaxed)),
            _ => self.missed.store(0, Ordering::Relaxed),
        }
        Outcome { due, ended: Instant::now(), result }
    }

    fn is_gone(&self) -> bool {
        self.missed.load(Ordering::Relaxed) >= GONE
    }
}
