//! The one thread that owns an engine, and the handle that everyone else has.
//!
//! Invariant: requests and events are the only traffic; one hop in per request, one hop out per token. `submit` never
//! blocks: a full queue is an answer. When the device is lost the thread ends, every client is told, and the handle
//! says why from then on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::DeviceInfo;
use crate::config::{EngineConfig, UnfitRequest};
use crate::engine::{Engine, EngineStats};
use crate::limits::neighbours::Membership;
use crate::limits::verdict::{Setting, Verdict};
use crate::request::{Request, Sink};

/// A running engine; clones share it.
#[derive(Clone)]
pub struct EngineHandle {
    inbox: SyncSender<Message>,
    shared: Arc<Shared>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("{max_waiting} requests are waiting already; try again later")]
    QueueFull { max_waiting: u32 },
    #[error(transparent)]
    Unfit(#[from] UnfitRequest),
    #[error("the engine has stopped: {reason}")]
    Stopped { reason: String },
}

enum Message {
    Submit(Request, Box<dyn Sink>),
    Stop,
}

struct Shared {
    config: EngineConfig,
    vocab_size: u32,
    device: DeviceInfo,
    setting: Setting,
    neighbours: Option<Weak<Membership>>,
    /// Requests handed in, and those that no longer wait; the difference is bounded by `max_waiting`.
    num_submitted: AtomicU64,
    num_left_queue: AtomicU64,
    /// Written once a step by the engine thread; never held across a device wait.
    state: Mutex<State>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct State {
    stats: EngineStats,
    last_progress: Instant,
    stopped: Option<String>,
}

impl EngineHandle {
    /// Starts the thread.
    pub fn spawn(engine: Engine) -> EngineHandle {
        let config = *engine.config();
        let (inbox, receiver) = sync_channel(config.max_waiting as usize + 1);
        let state = State { stats: engine.stats().clone(), last_progress: Instant::now(), stopped: None };
        let shared = Arc::new(Shared {
            config,
            vocab_size: engine.model().config.vocab_size,
            device: engine.backend().info().clone(),
            setting: engine.setting(),
            neighbours: engine.neighbours().map(Arc::downgrade),
            num_submitted: AtomicU64::new(0),
            num_left_queue: AtomicU64::new(0),
            state: Mutex::new(state),
            thread: Mutex::new(None),
        });
        let worker = Worker { engine, inbox: receiver, shared: shared.clone(), num_received: 0 };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || worker.run());
        *lock(&shared.thread) = Some(thread.expect("the system can start one more thread"));
        EngineHandle { inbox, shared }
    }

    /// Hands a request in; its events go to `sink` from the engine thread.
    pub fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<(), SubmitError> {
        self.shared.config.fits(&request, self.shared.vocab_size)?;
        if let Some(reason) = self.stopped() {
            return Err(SubmitError::Stopped { reason });
        }
        let max_waiting = u64::from(self.shared.config.max_waiting);
        let full = || SubmitError::QueueFull { max_waiting: self.shared.config.max_waiting };
        let num_left = self.shared.num_left_queue.load(Ordering::Acquire);
        let claim = |submitted: u64| (submitted.saturating_sub(num_left) < max_waiting).then_some(submitted + 1);
        self.shared.num_submitted.fetch_update(Ordering::AcqRel, Ordering::Acquire, claim).map_err(|_| full())?;
        self.inbox.try_send(Message::Submit(request, sink)).map_err(|error| match error {
            TrySendError::Full(_) => full(),
            TrySendError::Disconnected(_) => {
                SubmitError::Stopped { reason: self.stopped().unwrap_or_else(|| ENDED.to_owned()) }
            }
        })
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

    /// Requests that wait for admission, those not yet seen by the engine thread included.
    pub fn num_waiting(&self) -> u64 {
        let num_left = self.shared.num_left_queue.load(Ordering::Acquire);
        self.shared.num_submitted.load(Ordering::Acquire).saturating_sub(num_left)
    }

    /// How long work has waited without a step being completed; zero when idle.
    pub fn stalled_for(&self) -> Duration {
        let state = lock(&self.shared.state);
        let has_work = state.stats.num_running > 0 || self.num_waiting() > 0;
        if has_work { state.last_progress.elapsed() } else { Duration::ZERO }
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
}

/// How often an engine without work says so.
const IDLE_TICK: Duration = Duration::from_secs(1);
const ENDED: &str = "the server is shutting down";

struct Worker {
    engine: Engine,
    inbox: Receiver<Message>,
    shared: Arc<Shared>,
    num_received: u64,
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
            match self.engine.step() {
                Ok(_) => self.publish(),
                Err(error) => break error.to_string(),
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
                self.engine.add(request, sink);
            }
        }
        self.engine.fail_all(&reason);
        self.publish();
    }

    /// Takes in what has arrived; blocks while there is nothing to do.
    fn receive(&mut self) -> Received {
        while self.engine.is_idle() {
            match self.inbox.recv_timeout(IDLE_TICK) {
                Ok(message) => {
                    lock(&self.shared.state).last_progress = Instant::now();
                    if !self.take(message) {
                        return Received::Stop;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.engine.settle_idle();
                    self.publish();
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
        self.num_received += 1;
        self.engine.add(request, sink);
        true
    }

    fn publish(&self) {
        let stats = self.engine.stats();
        let num_left = self.num_received - u64::from(stats.num_waiting);
        self.shared.num_left_queue.store(num_left, Ordering::Release);
        let mut state = lock(&self.shared.state);
        state.stats.clone_from(stats);
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
