//! The one thread that owns an engine, and the handle that everyone else has.
//!
//! Invariant: requests and events are the only traffic; one hop in per request, one hop out per token. Nothing blocks
//! but [`EngineHandle::shutdown`]: a request has a place in the backlog before it is handed in, so the inbox has room
//! for it, and a full backlog is an answer that says when to come again. When the device is lost, whoever it was
//! working for is told, and it is made anew; where that fails the thread ends, every client is told, and the handle
//! says why from then on.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::DeviceInfo;
use crate::backlog::{Amount, Backlog, Limit, Overflow, Refusal};
use crate::config::{EngineConfig, UnfitRequest};
use crate::cost::CostModel;
use crate::engine::{Engine, EngineStats};
use crate::forecast::{Load, TooLate};
use crate::limits::neighbours::Membership;
use crate::limits::verdict::{Setting, Verdict};
use crate::request::{Event, Flow, Request, Share, Sink};

mod recovery;

use recovery::Attempts;

/// A running engine; clones share it.
#[derive(Clone)]
pub struct EngineHandle {
    inbox: SyncSender<Message>,
    shared: Arc<Shared>,
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    #[error("{}; try again in {} s", too_many(.0), .1.as_secs())]
    Full(Overflow, Duration),
    #[error("{}", never_fits(*.limit, *.wanted, *.max))]
    NeverFits { limit: Limit, wanted: u64, max: u64 },
    #[error(
        "{} ms are predicted to the first token, and at most {max_queue_ms} are waited; try again in {} s",
        .predicted.as_millis(), .retry_after.as_secs()
    )]
    TooLate { predicted: Duration, max_queue_ms: u32, retry_after: Duration },
    #[error(
        "the first token of a prompt of {prompt_tokens} tokens takes {} ms on this device even alone, and at most \
         {max_queue_ms} are waited; shorten the prompt", .predicted.as_millis()
    )]
    NeverInTime { prompt_tokens: u64, predicted: Duration, max_queue_ms: u32 },
    #[error(transparent)]
    Unfit(#[from] UnfitRequest),
    #[error("the engine has stopped: {reason}")]
    Stopped { reason: String },
}

/// A request's place among those that wait, later among those that run; given back when dropped.
pub struct Place {
    shared: Arc<Shared>,
    tenant: u64,
    num_tokens: u64,
    begun: bool,
    /// Nothing waited and nothing ran when it was taken.
    is_first: bool,
}

enum Message {
    Submit(Box<Request>, Box<dyn Sink>),
    Stop,
}

struct Shared {
    config: EngineConfig,
    vocab_size: u32,
    device: DeviceInfo,
    setting: Setting,
    neighbours: Option<Weak<Membership>>,
    /// Held for a few additions at a time, and never together with `state`.
    backlog: Mutex<Backlog>,
    /// Written once a step by the engine thread; never held across a device wait.
    state: Mutex<State>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct State {
    stats: EngineStats,
    load: Load,
    cost: CostModel,
    /// Of steps, beyond what they took on the device.
    host: Duration,
    busy: bool,
    last_progress: Instant,
    /// While the device is made anew: why, and how far it is.
    recovering: Option<String>,
    stopped: Option<String>,
}

impl EngineHandle {
    /// Starts the thread.
    pub fn spawn(engine: Engine) -> EngineHandle {
        let config = *engine.config();
        let (inbox, receiver) = sync_channel(config.max_queued_requests as usize + 1);
        let state = State {
            stats: engine.stats().clone(),
            load: engine.load(),
            cost: *engine.cost(),
            host: Duration::ZERO,
            busy: false,
            last_progress: Instant::now(),
            recovering: None,
            stopped: None,
        };
        let backlog = Backlog::new(config.max_queued_requests, u64::from(config.max_queued_tokens));
        let shared = Arc::new(Shared {
            config,
            vocab_size: engine.model().config.vocab_size,
            device: engine.backend().info().clone(),
            setting: engine.setting(),
            neighbours: engine.neighbours().map(Arc::downgrade),
            backlog: Mutex::new(backlog),
            state: Mutex::new(state),
            thread: Mutex::new(None),
        });
        let worker = Worker {
            engine,
            inbox: receiver,
            shared: shared.clone(),
            loaded_at: Instant::now(),
            stepping: Duration::ZERO,
            attempts: Attempts::default(),
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || worker.run());
        *lock(&shared.thread) = Some(thread.expect("the system can start one more thread"));
        EngineHandle { inbox, shared }
    }

    /// Whether anybody could get a place now: what is asked before a request is read.
    pub fn check_full(&self) -> Result<(), SubmitError> {
        let (full, total) = {
            let backlog = lock(&self.shared.backlog);
            (backlog.check_full(), backlog.total())
        };
        full.map_err(|overflow| self.full(overflow, total))
    }

    /// Places for `num_requests` of a tenant, all or none: what is asked before their text is read.
    pub fn reserve(&self, tenant: u64, share: Share, num_requests: u32) -> Result<Vec<Place>, SubmitError> {
        let (is_first, reserved, total) = {
            let mut backlog = lock(&self.shared.backlog);
            (backlog.is_idle(), backlog.reserve(tenant, share.weight, num_requests), backlog.total())
        };
        reserved.map_err(|refusal| self.refused(refusal, total))?;
        let place = |_| Place { shared: self.shared.clone(), tenant, num_tokens: 0, begun: false, is_first };
        let places = (0..num_requests).map(place).collect();
        // Those before it may be late enough already.
        self.check_in_time(tenant, 0, is_first)?;
        Ok(places)
    }

    /// Hands requests of one tenant in, each into a place that was taken for it, all or none; their events go to their
    /// sinks from the engine thread.
    pub fn submit(&self, places: Vec<Place>, requests: Vec<(Request, Box<dyn Sink>)>) -> Result<(), SubmitError> {
        assert_eq!(places.len(), requests.len(), "a place for each request");
        for (request, _) in &requests {
            self.shared.config.fits(request, self.shared.vocab_size)?;
        }
        if let Some(reason) = self.stopped() {
            return Err(SubmitError::Stopped { reason });
        }
        let Some(&Place { tenant, is_first, .. }) = places.first() else { return Ok(()) };
        let num_tokens = requests.iter().map(|(request, _)| request.prompt.len() as u64).sum();
        let (added, total) = {
            let mut backlog = lock(&self.shared.backlog);
            (backlog.add_tokens(tenant, num_tokens), backlog.total())
        };
        added.map_err(|refusal| self.refused(refusal, total))?;
        let placed = places.into_iter().zip(requests).map(|(mut place, (request, sink))| {
            place.num_tokens = request.prompt.len() as u64;
            (request, Box::new(Placed { sink, place: Some(place) }))
        });
        let placed: Vec<(Request, Box<Placed>)> = placed.collect();
        let longest = placed.iter().map(|(request, _)| request.prompt.len() as u64).max();
        self.check_in_time(tenant, longest.unwrap_or(0), is_first)?;
        for (request, sink) in placed {
            self.inbox.try_send(Message::Submit(Box::new(request), sink)).map_err(|error| match error {
                TrySendError::Full(_) => unreachable!("the inbox has room for all places"),
                TrySendError::Disconnected(_) => {
                    SubmitError::Stopped { reason: self.stopped().unwrap_or_else(|| ENDED.to_owned()) }
                }
            })?;
        }
        Ok(())
    }

    /// Hands one request in.
    pub fn submit_one(&self, request: Request, sink: Box<dyn Sink>) -> Result<(), SubmitError> {
        self.shared.config.fits(&request, self.shared.vocab_size)?;
        let places = self.reserve(request.tenant, request.share, 1)?;
        self.submit(places, vec![(request, sink)])
    }

    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    pub fn vocab_size(&self) -> u32 {
        self.shared.vocab_size
    }

    pub fn device(&self) -> &DeviceInfo {
        &self.shared.device
    }

    /// As of the last step.
    pub fn stats(&self) -> EngineStats {
        lock(&self.shared.state).stats.clone()
    }

    /// What holds the device back, as `stats` tell it.
    pub fn verdict(&self, stats: &EngineStats) -> Verdict {
        let neighbours = self.shared.neighbours.as_ref().and_then(Weak::upgrade);
        let names = neighbours.map(|neighbours| neighbours.others()).unwrap_or_default();
        Verdict::new(&stats.limits, &self.shared.setting, &names)
    }

    /// What runs and how fast, as of the last step or a little earlier.
    pub fn load(&self) -> Load {
        lock(&self.shared.state).load
    }

    /// What steps take on this device, as of the last one.
    pub fn cost(&self) -> CostModel {
        lock(&self.shared.state).cost
    }

    /// What the host has added to the time of steps, a step.
    pub fn host_per_step(&self) -> Duration {
        let state = lock(&self.shared.state);
        state.host.div_f64(state.stats.num_steps.max(1) as f64)
    }

    /// Requests that have not begun, those whose text is being read included, and sequences that were sent back to
    /// wait.
    pub fn num_waiting(&self) -> u64 {
        let num_preempted = lock(&self.shared.state).stats.num_preempted;
        u64::from(num_preempted) + u64::from(lock(&self.shared.backlog).total().num_requests)
    }

    /// How long work has waited without a step being completed; zero when idle.
    pub fn stalled_for(&self) -> Duration {
        let state = lock(&self.shared.state);
        if state.busy { state.last_progress.elapsed() } else { Duration::ZERO }
    }

    /// Why nothing is computed now, while a device that was lost is made anew.
    pub fn recovering(&self) -> Option<String> {
        lock(&self.shared.state).recovering.clone()
    }

    /// Why the engine has ended, if it has.
    pub fn stopped(&self) -> Option<String> {
        lock(&self.shared.state).stopped.clone()
    }

    /// Ends what still runs and joins the thread.
    pub fn shutdown(&self) {
        let thread = lock(&self.shared.thread).take();
        if let Some(thread) = thread {
            // The thread may have ended by itself; then there is nobody to tell.
            let _ = self.inbox.send(Message::Stop);
            let _ = thread.join();
        }
    }

    fn refused(&self, refusal: Refusal, total: Amount) -> SubmitError {
        match refusal {
            Refusal::Full(overflow) => self.full(overflow, total),
            Refusal::Never { limit, wanted, max } => SubmitError::NeverFits { limit, wanted, max },
        }
    }

    /// An overflow, with when there will be room.
    fn full(&self, overflow: Overflow, total: Amount) -> SubmitError {
        let each = (total.num_tokens / u64::from(total.num_requests.max(1))).max(1);
        let num_requests = match overflow.limit {
            Limit::Requests => overflow.num_excess,
            Limit::Tokens => overflow.num_excess.div_ceil(each),
        };
        let begun_ns = self.load().begun_ns(num_requests as u32, num_requests * each);
        SubmitError::Full(overflow, whole_seconds(Duration::from_nanos(begun_ns)))
    }

    /// Whether the last of a tenant's waiting requests, with a prompt of `own_tokens`, is predicted to have its first
    /// token within `max_queue_ms`.
    fn check_in_time(&self, tenant: u64, own_tokens: u64, is_first: bool) -> Result<(), SubmitError> {
        let Some(max_queue_ms) = self.shared.config.max_queue_ms else { return Ok(()) };
        let max = Duration::from_millis(u64::from(max_queue_ms));
        let ahead = lock(&self.shared.backlog).ahead(tenant, self.shared.config.max_num_seqs);
        self.load().check_in_time(&ahead, own_tokens, is_first, max).map_err(|late| match late {
            TooLate::Ever { predicted } => {
                SubmitError::NeverInTime { prompt_tokens: own_tokens, predicted, max_queue_ms }
            }
            TooLate::Now { predicted } => {
                SubmitError::TooLate { predicted, max_queue_ms, retry_after: whole_seconds(predicted - max) }
            }
        })
    }
}

/// How often an engine without work says so: oftener than once a second, so that each second shows some.
const IDLE_TICK: Duration = Duration::from_millis(500);
const ENDED: &str = "the server is shutting down";
/// Forecasts need no later news of an engine that is busy, and steps may be shorter.
const LOAD_INTERVAL: Duration = Duration::from_millis(2);

/// Rounded up, and at least one: what `Retry-After` can say.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs_f64().ceil().max(1.0) as u64)
}

fn too_many(overflow: &Overflow) -> String {
    let Overflow { limit, num_waiting, max_waiting, .. } = overflow;
    let what = match limit {
        Limit::Requests => "requests",
        Limit::Tokens => "tokens",
    };
    format!("{num_waiting} {what} wait of the {max_waiting} that may, of which some are kept for other tenants")
}

fn never_fits(limit: Limit, wanted: u64, max: u64) -> String {
    match limit {
        Limit::Requests => format!(
            "{wanted} answers were asked for, and no more than {max} requests may wait at a time \
             (max_queued_requests): ask for fewer at once"
        ),
        Limit::Tokens => format!(
            "the prompts have {wanted} tokens together, and no more than {max} may wait at a time \
             (max_queued_tokens): ask for less at once"
        ),
    }
}

/// A request's sink, which gives up its place in the backlog as the request goes on: whoever is told of the end finds
/// it free.
struct Placed {
    sink: Box<dyn Sink>,
    /// Until the end.
    place: Option<Place>,
}

impl Sink for Placed {
    fn event(&mut self, event: Event) -> Flow {
        match (&event, &mut self.place) {
            (Event::Started { .. }, Some(Place { shared, tenant, num_tokens, begun, .. })) => {
                lock(&shared.backlog).begin(*tenant, *num_tokens);
                *begun = true;
            }
            (Event::Finished { .. }, place) => *place = None,
            _ => {}
        }
        self.sink.event(event)
    }

    fn is_closed(&self) -> bool {
        self.sink.is_closed()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut backlog = lock(&self.shared.backlog);
        match self.begun {
            true => backlog.end(self.tenant),
            false => backlog.leave(self.tenant, self.num_tokens),
        }
    }
}

struct Worker {
    engine: Engine,
    inbox: Receiver<Message>,
    shared: Arc<Shared>,
    /// When `load` was published last.
    loaded_at: Instant,
    /// Spent in steps, waits for the device included.
    stepping: Duration,
    attempts: Attempts,
}

/// Says that the engine has stopped even when its thread unwinds: a panic is our bug, and nobody may wait for it.
struct StoppedOnUnwind(Arc<Shared>);

impl Drop for StoppedOnUnwind {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.0.state).stopped = Some("it met a bug of its own; restart the server, and report it".to_owned());
        }
    }
}

impl Worker {
    fn run(mut self) {
        let _guard = StoppedOnUnwind(self.shared.clone());
        let reason = loop {
            match self.receive() {
                Received::Work => {}
                Received::Stop => break ENDED.to_owned(),
            }
            let begun = Instant::now();
            match self.engine.step() {
                Ok(_) => self.publish(begun),
                Err(error) => {
                    if let Err(reason) = self.recover(&error) {
                        break reason;
                    }
                }
            }
        };
        if reason != ENDED {
            tracing::error!(reason, "the engine has stopped");
        }
        lock(&self.shared.state).stopped = Some(reason.clone());
        self.engine.fail_all(&reason);
        // Requests that were handed in before `stopped` was set.
        while let Ok(message) = self.inbox.try_recv() {
            if let Message::Submit(request, sink) = message {
                self.engine.add(*request, sink);
            }
        }
        self.engine.fail_all(&reason);
        self.publish(Instant::now());
    }

    /// Takes in what has arrived; blocks while there is nothing to do.
    fn receive(&mut self) -> Received {
        while self.engine.is_idle() {
            match self.inbox.recv_timeout(IDLE_TICK) {
                Ok(message) => {
                    let mut state = lock(&self.shared.state);
                    (state.busy, state.last_progress) = (true, Instant::now());
                    drop(state);
                    if !self.take(message) {
                        return Received::Stop;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.engine.settle_idle();
                    self.publish(Instant::now());
                }
                Err(RecvTimeoutError::Disconnected) => return Received::Stop,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(message) => {
                    if !self.take(message) {
                        return Received::Stop;
                    }
                }
                Err(TryRecvError::Empty) => return Received::Work,
                Err(TryRecvError::Disconnected) => return Received::Stop,
            }
        }
    }

    fn take(&mut self, message: Message) -> bool {
        let Message::Submit(request, sink) = message else { return false };
        self.engine.add(*request, sink);
        true
    }

    /// Tells of the engine after what began at `begun`.
    fn publish(&mut self, begun: Instant) {
        self.stepping += begun.elapsed();
        let is_idle = self.engine.is_idle();
        let load = (is_idle || self.loaded_at.elapsed() >= LOAD_INTERVAL).then(|| {
            self.loaded_at = Instant::now();
            self.engine.load()
        });
        let stats = self.engine.stats();
        let on_device = Duration::from_secs_f64(stats.total_step_ms / 1e3);
        let mut state = lock(&self.shared.state);
        state.stats.clone_from(stats);
        state.load = load.unwrap_or(state.load);
        state.cost = *self.engine.cost();
        state.host = self.stepping.saturating_sub(on_device);
        state.busy = !is_idle;
        state.last_progress = Instant::now();
    }
}

enum Received {
    Work,
    Stop,
}

/// State is plain numbers, whole after every write, so a panic elsewhere leaves it usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
