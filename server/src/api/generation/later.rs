//! Choices that are handed in as others of their request end. Invariant: no more of a request wait or run than it took
//! places for at first; the next takes a place like anybody's, and where there is none for now it waits for one.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use fullbore_engine::fleet::{Fleet, Handed, Place, SubmitError};
use fullbore_engine::request::Request;
use tokio::time::{Sleep, sleep};

use crate::http::error::ApiError;

#[derive(Default)]
pub struct Later {
    /// Never locked: a stream has to be `Sync`, and is polled by one alone.
    waiting: Mutex<VecDeque<Handed>>,
    num_waiting: usize,
    /// That may be with the engine at a time.
    most: usize,
    /// Before a place is asked for again, where no end of its own will be told.
    pause: Option<Pin<Box<Sleep>>>,
}

/// Of the tokens that may wait of all requests, a request's first take at most this part.
const PART_OF_TOKENS: u64 = 4;
const PAUSE: Duration = Duration::from_millis(100);

impl Later {
    /// Takes what has no place, or more tokens than may wait at once, off the end of `requests`.
    pub fn of(engine: &Fleet, places: &mut Vec<Place>, requests: &mut Vec<Handed>) -> Later {
        let max_tokens = u64::from(engine.config().max_queued_tokens) / PART_OF_TOKENS;
        let mut num_tokens = 0;
        let fit = |(request, _): &&Handed| {
            num_tokens += request.prompt.len() as u64;
            num_tokens <= max_tokens
        };
        let num_first = requests.iter().take(places.len()).take_while(fit).count().max(1).min(requests.len());
        let most = places.len();
        places.truncate(num_first);
        let waiting: VecDeque<Handed> = requests.drain(num_first..).collect();
        Later { num_waiting: waiting.len(), waiting: Mutex::new(waiting), most, pause: None }
    }

    pub fn is_empty(&self) -> bool {
        self.num_waiting == 0
    }

    /// Hands in what may be now; `num_open` choices have not ended, those that wait here included.
    pub fn hand_in(&mut self, engine: &Fleet, num_open: usize, context: &mut Context<'_>) -> Result<(), ApiError> {
        let Later { waiting, num_waiting, most, pause } = self;
        let waiting = waiting.get_mut().unwrap_or_else(PoisonError::into_inner);
        while let Some((request, _)) = waiting.front() {
            let num_running = num_open - waiting.len();
            if num_running >= *most {
                break;
            }
            match place(engine, request) {
                Ok(places) => {
                    engine.submit(places, waiting.pop_front().into_iter().collect())?;
                    (*num_waiting, *pause) = (waiting.len(), None);
                }
                Err(SubmitError::Full(..) | SubmitError::TooLate { .. }) => {
                    if num_running > 0 {
                        break;
                    }
                    let pause = pause.get_or_insert_with(|| Box::pin(sleep(PAUSE)));
                    match pause.as_mut().poll(context) {
                        Poll::Ready(()) => pause.set(sleep(PAUSE)),
                        Poll::Pending => break,
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A place for it, with its tokens.
fn place(engine: &Fleet, request: &Request) -> Result<Vec<Place>, SubmitError> {
    let mut places = engine.reserve(request.tenant, request.share, 1)?;
    engine.hold_tokens(&mut places, |_| request.prompt.len() as u64)?;
    Ok(places)
}
