//! Turns at what only a few may do at once, shared between those who ask.
//!
//! A free turn goes to who has fewest of those that wait, then to who has waited longest since he came or his last turn
//! ended: fair queueing with a turn as its unit (Nagle, RFC 970, 1985). So who comes back is behind all who waited when
//! he did, and nobody is overtaken for ever by those who always come anew. Invariant: no more turns are out than
//! there are, nor more of one origin than it may have; a turn is given back by dropping it, also where its owner has
//! left before it came.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::access::Origin;

pub struct Lane {
    most: usize,
    /// Of one origin.
    most_each: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    num_out: usize,
    /// Of those who came, and of turns that ended: the time here.
    num_events: u64,
    /// An origin is known while it has a turn or waits for one.
    lines: HashMap<Origin, Line>,
}

#[derive(Default)]
struct Line {
    num_out: usize,
    last_ended: u64,
    /// Each with when it came.
    waiting: VecDeque<(u64, oneshot::Sender<Turn>)>,
}

pub struct Turn {
    lane: Arc<Lane>,
    origin: Origin,
}

impl Lane {
    pub fn new(most: usize, most_each: usize) -> Arc<Lane> {
        assert!(most > 0 && most_each > 0, "somebody has a turn");
        Arc::new(Lane { most, most_each, state: Mutex::default() })
    }

    pub async fn turn(self: &Arc<Lane>, origin: &Origin) -> Turn {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.lock();
            state.num_events += 1;
            let came = state.num_events;
            let line = state.lines.entry(origin.clone()).or_default();
            line.waiting.retain(|(_, waiting)| !waiting.is_closed());
            line.waiting.push_back((came, sender));
        }
        self.give();
        receiver.await.expect("who waits is given a turn, some time")
    }

    /// Gives turns while there are some, and somebody who may have one.
    fn give(self: &Arc<Lane>) {
        loop {
            let next = self.lock().next(self.most, self.most_each);
            let Some((origin, waiting)) = next else { return };
            // Whoever has left meanwhile gives it back by that.
            drop(waiting.send(Turn { lane: self.clone(), origin }));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole after every write, so a panic elsewhere leaves it usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes a turn for who is next.
    fn next(&mut self, most: usize, most_each: usize) -> Option<(Origin, oneshot::Sender<Turn>)> {
        self.lines.values_mut().for_each(|line| {
            while line.waiting.front().is_some_and(|(_, waiting)| waiting.is_closed()) {
                line.waiting.pop_front();
            }
        });
        self.lines.retain(|_, line| line.num_out > 0 || !line.waiting.is_empty());
        if self.num_out == most {
            return None;
        }
        let may = self.lines.iter_mut().filter(|(_, line)| !line.waiting.is_empty() && line.num_out < most_each);
        let (origin, line) = may.min_by_key(|(_, line)| (line.num_out, line.last_ended.max(line.waiting[0].0)))?;
        let (_, waiting) = line.waiting.pop_front()?;
        line.num_out += 1;
        self.num_out += 1;
        Some((origin.clone(), waiting))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        {
            let mut state = self.lane.lock();
            state.num_out -= 1;
            state.num_events += 1;
            let now = state.num_events;
            let line = state.lines.get_mut(&self.origin).expect("an origin that has a turn");
            (line.num_out, line.last_ended) = (line.num_out - 1, now);
        }
        self.lane.give();
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::net::IpAddr;
    use std::pin::Pin;
    use std::task::Poll;

    use super::*;

    type Waiting = Pin<Box<dyn Future<Output = Turn>>>;

    fn origin(number: u8) -> Origin {
        Origin::Network(IpAddr::from([10, 0, 0, number]))
    }

    fn ask(lane: &Arc<Lane>, number: u8) -> Waiting {
        let lane = lane.clone();
        Box::pin(async move { lane.turn(&origin(number)).await })
    }

    /// The turn, where it has come.
    async fn try_take(waiting: &mut Waiting) -> Option<Turn> {
        poll_fn(|context| match waiting.as_mut().poll(context) {
            Poll::Ready(turn) => Poll::Ready(Some(turn)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    #[tokio::test]
    async fn a_free_turn_goes_to_who_has_fewest() {
        let lane = Lane::new(2, 2);
        let mut greedy: Vec<Waiting> = (0..4).map(|_| ask(&lane, 1)).collect();
        let mut turns = Vec::new();
        for waiting in &mut greedy {
            turns.extend(try_take(waiting).await);
        }
        assert_eq!(turns.len(), 2);
        let (mut late, mut later) = (ask(&lane, 2), ask(&lane, 3));
        assert!(try_take(&mut late).await.is_none() && try_take(&mut later).await.is_none());
        turns.pop();
        let one = try_take(&mut late).await.expect("before the others of who has one");
        turns.pop();
        let other = try_take(&mut later).await.expect("he has none");
        assert!(try_take(&mut greedy[2]).await.is_none());
        drop((one, other));
        let rest = [try_take(&mut greedy[2]).await, try_take(&mut greedy[3]).await];
        assert!(rest.iter().all(Option::is_some));
        drop(rest);
        assert!(lane.lock().lines.is_empty() && lane.lock().num_out == 0);
    }

    /// One who has many that wait and two who come again as soon as they are done: each has every third turn.
    #[tokio::test]
    async fn who_comes_back_overtakes_nobody() {
        let lane = Lane::new(1, 1);
        let mut many: Vec<Waiting> = (0..10).map(|_| ask(&lane, 1)).collect();
        let mut turn = try_take(&mut many.remove(0)).await.expect("it is free");
        for waiting in &mut many {
            assert!(try_take(waiting).await.is_none());
        }
        let mut others = [ask(&lane, 2), ask(&lane, 3)];
        for waiting in &mut others {
            assert!(try_take(waiting).await.is_none());
        }
        for round in 0..9 {
            for (index, number) in [(0, 2), (1, 3)] {
                drop(turn);
                turn = try_take(&mut others[index]).await.unwrap_or_else(|| panic!("{number} in round {round}"));
                others[index] = ask(&lane, number);
                assert!(try_take(&mut others[index]).await.is_none());
            }
            drop(turn);
            turn = try_take(&mut many.remove(0)).await.unwrap_or_else(|| panic!("1 in round {round}"));
        }
    }

    #[tokio::test]
    async fn nobody_has_more_than_his_share_and_who_leaves_leaves_the_line() {
        let lane = Lane::new(4, 2);
        let mut mine: Vec<Waiting> = (0..3).map(|_| ask(&lane, 1)).collect();
        let first = try_take(&mut mine[0]).await.expect("a turn");
        let second = try_take(&mut mine[1]).await.expect("a turn");
        assert!(try_take(&mut mine[2]).await.is_none(), "a third of four");
        let mut theirs = ask(&lane, 2);
        let their_turn = try_take(&mut theirs).await.expect("free for others");
        // One gives up while it waits, one whose turn has come and was not seen.
        let mut patient = ask(&lane, 1);
        assert!(try_take(&mut patient).await.is_none());
        drop(mine.pop());
        drop(first);
        drop(patient);
        assert_eq!(lane.lock().num_out, 2);
        drop((second, their_turn));
        assert!(lane.lock().lines.is_empty());
    }
}
