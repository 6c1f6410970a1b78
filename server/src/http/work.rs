//! What a request takes before the engine has it: its text through templates and tokenizers, its grammar compiled.
//! Computed on threads of its own, so that no connection waits for another's.
//!
//! Invariant: long texts are read a few at a time, so that they leave cores to the engine and to everybody else, and
//! vast ones one at a time, for their memory; shorter ones never wait for them, and neither for a grammar. In each lane
//! clients have turns in fairness, and none waits without an end. One grammar is compiled once, however many ask for it
//! at the same time: on the turn of whoever has one first, so that nobody waits in another's line, and nobody's line
//! pays for more than if he had asked alone.

use std::collections::HashMap;
use std::future::Future;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use fullbore_engine::grammar::{Compilation, Grammar};
use tokio::sync::watch;
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::timeout;

use super::access::Origin;
use super::error::ApiError;
use super::lane::Lane;
use crate::api::{Form, ServedModel};

pub struct RequestWork {
    short: Arc<Lane>,
    long: Arc<Lane>,
    vast: Arc<Lane>,
    looks: Arc<Lane>,
    grammars: Arc<Lane>,
    flights: Mutex<Flights>,
    /// For a turn to read a text, at most.
    text_wait: Duration,
}

/// A grammar that is asked for, kept by those who ask.
struct Flight {
    /// Until somebody has a turn, and compiles.
    sender: Mutex<Option<watch::Sender<Option<Compilation>>>>,
    receiver: watch::Receiver<Option<Compilation>>,
}

/// Those that are asked for now, by model and source.
type Flights = HashMap<(String, Arc<str>), Weak<Flight>>;

/// Above this a body is long: about 4000 tokens, which take a tokenizer some milliseconds.
const LONG_BYTES: usize = 16 << 10;
/// Above this it is vast: its values and its tokens may take some hundreds of times what it takes itself.
const VAST_BYTES: usize = 1 << 20;
/// Above this what was read is handed in on another thread: below it takes some tens of microseconds.
const LONG_TOKENS: usize = LONG_BYTES / 4;
const MAX_SHORT: usize = 64;
const MAX_VAST: usize = 1;
/// Bodies of which one field is looked for, at a time.
const MAX_LOOKS: usize = 1;
/// Compilations at a time, and of one client.
const MAX_GRAMMARS: usize = 4;
const MAX_GRAMMARS_EACH: usize = 2;
const TEXT_WAIT: Duration = Duration::from_secs(300);
/// For a turn to compile a grammar.
const GRAMMAR_WAIT: Duration = Duration::from_secs(10);
/// For what somebody compiles on a turn of his own.
const FLIGHT_WAIT: Duration = Duration::from_secs(10);
const BUSY: &str = "grammars are being compiled";

impl Default for RequestWork {
    /// Long texts have half of the cores.
    fn default() -> RequestWork {
        let num_cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let lane = |most| Lane::new(most, most);
        RequestWork {
            short: lane(MAX_SHORT),
            long: lane((num_cores / 2).max(1)),
            vast: lane(MAX_VAST),
            looks: lane(MAX_LOOKS),
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
        let lane = match num_bytes {
            _ if num_bytes > VAST_BYTES => &self.vast,
            _ if num_bytes > LONG_BYTES => &self.long,
            _ => &self.short,
        };
        let turn = in_time(self.text_wait, "long requests are being read", lane.turn(origin)).await?;
        let done = spawn_blocking(move || {
            // Kept to the end also where nobody waits for it any more.
            let _turn = turn;
            work()
        });
        outcome(done.await)?
    }

    /// Hands in what was read, by `work`. It waits for no turn: it takes less than reading took, and so there are no
    /// more at a time than are read.
    pub async fn hand_in<T: Send + 'static>(
        &self,
        num_tokens: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        match num_tokens > LONG_TOKENS {
            true => outcome(spawn_blocking(work).await)?,
            false => work(),
        }
    }

    /// The grammar of a request's form.
    pub async fn compile(&self, origin: &Origin, model: &Arc<ServedModel>, form: &Form) -> Result<Grammar, ApiError> {
        if let Some(known) = model.grammars.known(&form.source) {
            return form.answer(known);
        }
        let flight = self.flight(&model.name, form.source.key());
        let turn = tokio::select! {
            biased;
            compiled = flight.compiled() => return form.answer(compiled?),
            turn = in_time(GRAMMAR_WAIT, BUSY, self.grammars.turn(origin)) => turn,
        };
        match turn.map(|turn| (turn, flight.begin())) {
            Ok((turn, Some(sender))) => {
                let (model, source) = (model.clone(), form.source.clone());
                let done = spawn_blocking(move || {
                    let compiled = model.grammars.compile_checked(&source, turn);
                    sender.send_replace(Some(compiled));
                });
                outcome(done.await)?;
            }
            Err(busy) if !flight.has_begun() => return Err(busy),
            // Somebody has, on a turn of his own.
            Ok((_, None)) | Err(_) => {}
        }
        form.answer(in_time(FLIGHT_WAIT, BUSY, flight.compiled()).await??)
    }

    /// Looks a body through for one thing, however busy those are who read bodies.
    pub async fn look(&self, look: impl FnOnce() -> bool + Send + 'static) -> Result<bool, ApiError> {
        let turn = self.looks.turn(&Origin::default()).await;
        let done = spawn_blocking(move || {
            let _turn = turn;
            look()
        });
        outcome(done.await)
    }

    fn flight(&self, model: &str, source: &Arc<str>) -> Arc<Flight> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| flight.strong_count() > 0);
        let known = flights.entry((model.to_owned(), source.clone())).or_default();
        known.upgrade().unwrap_or_else(|| {
            let flight = Arc::new(Flight::new());
            *known = Arc::downgrade(&flight);
            flight
        })
    }
}

impl Flight {
    fn new() -> Flight {
        let (sender, receiver) = watch::channel(None);
        Flight { sender: Mutex::new(Some(sender)), receiver }
    }

    /// For one of those who ask: what tells all of them.
    fn begin(&self) -> Option<watch::Sender<Option<Compilation>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn has_begun(&self) -> bool {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    async fn compiled(&self) -> Result<Compilation, ApiError> {
        let mut receiver = self.receiver.clone();
        let told = receiver.wait_for(Option::is_some).await.map(|compiled| compiled.clone());
        told.ok().flatten().ok_or_else(ApiError::bug)
    }
}

/// Of work on another thread: a panic there is one here, and ends the request in its one place.
fn outcome<T>(done: Result<T, JoinError>) -> Result<T, ApiError> {
    done.map_err(|error| match error.try_into_panic() {
        Ok(panic) => resume_unwind(panic),
        Err(_) => ApiError::leaving(),
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

    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::config::EngineConfig;
    use fullbore_engine::grammar::GrammarSource;

    use super::*;
    use crate::api::Constraint;
    use crate::start::Plan;

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
    async fn a_form_is_compiled_on_the_turn_of_whoever_has_one_first() {
        let backend = Box::new(SimBackend::new(SimOptions::default()));
        let plan = Plan::of("sim", Bundle::simulated(), backend, EngineConfig::default(), 0);
        let model = Arc::new(plan.load().expect("the simulator loads"));
        let work = RequestWork::default();
        let [busy, other] = [1, 2].map(|number| Origin::Network(IpAddr::from([10, 0, 0, number])));
        let form = || {
            let source = GrammarSource::Regex("[a-c]+".to_owned());
            Constraint { param: "guided_regex".to_owned(), source }.check().expect("a form")
        };
        // The first to ask has as many turns as he may have; the other does not wait in his line.
        let held = [work.grammars.turn(&busy).await, work.grammars.turn(&busy).await];
        let forms = [form(), form()];
        let first = work.compile(&busy, &model, &forms[0]);
        let mut first = std::pin::pin!(first);
        assert!(is_pending(&mut first).await);
        assert!(work.compile(&other, &model, &forms[1]).await.is_ok());
        assert!(first.await.is_ok(), "what one has compiled both have");
        assert_eq!(model.grammars.num_compiled(), 1);
        drop(held);
        model.end();
    }

    #[tokio::test]
    async fn what_is_long_is_handed_in_beside_the_threads_of_connections() {
        let work = RequestWork::default();
        let thread = || Ok(std::thread::current().id());
        let own = std::thread::current().id();
        assert_eq!(work.hand_in(LONG_TOKENS, thread).await.ok(), Some(own));
        assert_ne!(work.hand_in(LONG_TOKENS + 1, thread).await.ok(), Some(own));
    }

    #[tokio::test]
    async fn a_look_waits_for_no_text() {
        let work = RequestWork { long: Lane::new(1, 1), short: Lane::new(1, 1), ..RequestWork::default() };
        let origin = Origin::default();
        let held = [work.long.turn(&origin).await, work.short.turn(&origin).await];
        let own = std::thread::current().id();
        assert!(work.look(move || std::thread::current().id() != own).await.is_ok_and(|is_elsewhere| is_elsewhere));
        drop(held);
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
