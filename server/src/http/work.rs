//! What a request takes before the engine has it: its text through templates and tokenizers, its grammar compiled.
//! Computed on threads of its own, so that no connection waits for another's.
//!
//! Invariant: long texts are read a few at a time, so that they leave cores to the engine and to everybody else; short
//! ones never wait for them, and neither for a grammar. In each lane clients have turns in fairness, and none waits
//! without an end. One grammar is compiled once, however many ask for it at the same time.

use std::collections::HashMap;
use std::future::Future;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use fullbore_engine::grammar::{Compilation, Grammar};
use tokio::sync::OnceCell;
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::timeout;

use super::access::Origin;
use super::error::ApiError;
use super::lane::Lane;
use crate::api::{Form, ServedModel};

pub struct RequestWork {
    short: Arc<Lane>,
    long: Arc<Lane>,
    grammars: Arc<Lane>,
    flights: Mutex<Flights>,
    /// For a turn to read a text, at most.
    text_wait: Duration,
}

/// A grammar once it is compiled; whoever asks for it first sees to that, and the next where he leaves.
type Flight = OnceCell<Compilation>;
/// Those that are asked for now, by model and source.
type Flights = HashMap<(String, Arc<str>), Weak<Flight>>;

/// Above this a body is long: about 4000 tokens, which take a tokenizer some milliseconds.
const LONG_BYTES: usize = 16 << 10;
const MAX_SHORT: usize = 64;
/// Compilations at a time, late ones included, and of one client.
const MAX_GRAMMARS: usize = 4;
const MAX_GRAMMARS_EACH: usize = 2;
const TEXT_WAIT: Duration = Duration::from_secs(300);
/// For a turn to compile a grammar.
const GRAMMAR_WAIT: Duration = Duration::from_secs(2);
/// For all of it: a turn of one's own after somebody else's, and what the compilers take.
const FLIGHT_WAIT: Duration = Duration::from_secs(10);

impl Default for RequestWork {
    /// Long texts have half of the cores.
    fn default() -> RequestWork {
        let num_cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let lane = |most| Lane::new(most, most);
        RequestWork {
            short: lane(MAX_SHORT),
            long: lane((num_cores / 2).max(1)),
            grammars: Lane::new(MAX_GRAMMARS, MAX_GRAMMARS_EACH),
            flights: Mutex::default(),
            text_wait: TEXT_WAIT,
        }
    }
}

impl RequestWork {
    /// Reads a body of `num_bytes` by `work`, when its turn has come.
    pub async fn read<T: Send + 'static>(
        &self,
        origin: &Origin,
        num_bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let lane = if num_bytes > LONG_BYTES { &self.long } else { &self.short };
        let turn = in_time(self.text_wait, "long requests are being read", lane.turn(origin)).await?;
        let done = spawn_blocking(move || {
            // Kept to the end also where nobody waits for it any more.
            let _turn = turn;
            work()
        });
        outcome(done.await)?
    }

    /// The grammar of a request's form.
    pub async fn compile(&self, origin: &Origin, model: &Arc<ServedModel>, form: &Form) -> Result<Grammar, ApiError> {
        if let Some(known) = model.grammars.known(&form.source) {
            return form.answer(known);
        }
        let flight = self.flight(&model.name, form.source.key());
        let compiled = flight.get_or_try_init(|| async {
            let turn = in_time(GRAMMAR_WAIT, "grammars are being compiled", self.grammars.turn(origin)).await?;
            let (model, source) = (model.clone(), form.source.clone());
            let done = spawn_blocking(move || model.grammars.compile_checked(&source, turn));
            outcome(done.await)
        });
        let compiled = in_time(FLIGHT_WAIT, "grammars are being compiled", compiled).await??;
        form.answer(compiled.clone())
    }

    fn flight(&self, model: &str, source: &Arc<str>) -> Arc<Flight> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| flight.strong_count() > 0);
        let known = flights.entry((model.to_owned(), source.clone())).or_default();
        known.upgrade().unwrap_or_else(|| {
            let flight = Arc::default();
            *known = Arc::downgrade(&flight);
            flight
        })
    }
}

/// Of work on another thread: a panic there is one here, and ends the request in its one place.
fn outcome<T>(done: Result<T, JoinError>) -> Result<T, ApiError> {
    done.map_err(|error| match error.try_into_panic() {
        Ok(panic) => resume_unwind(panic),
        Err(_) => ApiError::not_yet("the server is shutting down; ask another, or come again"),
    })
}

/// What comes of `waiting`, or a refusal that says what there is too much of.
async fn in_time<T>(most: Duration, what: &str, waiting: impl Future<Output = T>) -> Result<T, ApiError> {
    let late = |_| ApiError::not_yet(&format!("too many {what}; try again shortly"));
    timeout(most, waiting).await.map_err(late)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::IpAddr;
    use std::pin::Pin;
    use std::sync::mpsc::channel;
    use std::task::Poll;

    use super::*;

    async fn is_pending<T>(future: &mut Pin<&mut impl Future<Output = T>>) -> bool {
        poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn short_texts_do_not_wait_for_long_ones_nor_clients_for_one_who_sends_many() {
        let work = RequestWork { long: Lane::new(1, 1), ..RequestWork::default() };
        let origins = [1, 2].map(|number| Origin::Network(IpAddr::from([10, 0, 0, number])));
        let (release, released) = channel::<()>();
        let running = work.read(&origins[0], LONG_BYTES + 1, move || Ok(released.recv()));
        let next = work.read(&origins[0], LONG_BYTES + 1, || Ok("next"));
        let other = work.read(&origins[1], LONG_BYTES + 1, || Ok("other"));
        let (mut running, mut next, mut other) = (std::pin::pin!(running), std::pin::pin!(next), std::pin::pin!(other));
        // The first has its turn, and the others wait for it.
        assert!(is_pending(&mut running).await && is_pending(&mut next).await && is_pending(&mut other).await);
        assert_eq!(work.read(&origins[0], LONG_BYTES, || Ok("short")).await.ok(), Some("short"));
        // Somebody else comes before the second of who has had a turn.
        release.send(()).expect("it waits");
        assert!(running.await.is_ok());
        assert!(is_pending(&mut next).await);
        assert_eq!(other.await.ok(), Some("other"));
        assert_eq!(next.await.ok(), Some("next"));
    }

    #[tokio::test]
    async fn nobody_waits_without_an_end() {
        let text_wait = Duration::from_millis(1);
        let work = RequestWork { long: Lane::new(1, 1), text_wait, ..RequestWork::default() };
        let origin = Origin::default();
        let held = work.long.turn(&origin).await;
        let refused = work.read(&origin, LONG_BYTES + 1, || Ok(())).await.expect_err("no turn came");
        assert_eq!((refused.status.as_u16(), refused.retry_after), (503, Some(1)), "{refused:?}");
        drop(held);
        assert!(work.read(&origin, LONG_BYTES + 1, || Ok(())).await.is_ok());
    }
}
