//! The one thread that owns an engine, and the handle that everyone else has.
//!
//! Invariant: requests and events are the only traffic; one hop in per request, one hop out per token. Nothing blocks
//! but [`EngineHandle::join`]: what is in the inbox has been let in by a [`crate::fleet::Fleet`], which bounds it.
//! When the device is lost, whoever it was working for is told, and it is made anew; where that fails the thread ends,
//! every client is told, and the handle says why from then on.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::arrival::Arrival;
use crate::backend::DeviceInfo;
use crate::config::EngineConfig;
use crate::cost::CostModel;
use crate::engine::moves::{Export, Import, MovePrices};
use crate::engine::{Engine, EngineStats};
use crate::fleet::member::Member;
use crate::forecast::Load;
use crate::limits::neighbours::Membership;
use crate::limits::verdict::{Setting, Verdict};
use crate::request::{Request, Sink};

mod recovery;

use recovery::Attempts;

/// A running engine; clones share it.
#[derive(Clone)]
pub struct EngineHandle {
    inbox: Sender<Message>,
    shared: Arc<Shared>,
}

/// What an engine is handed, and its events go to.
pub type Handed = (Arc<Request>, Box<dyn Sink>);

enum Message {
    Submit(Arrival, Box<dyn Sink>),
    Export(Export),
    Import(Import),
    Stop,
}

struct Shared {
    config: EngineConfig,
    vocab_size: u32,
    device: DeviceInfo,
    setting: Setting,
    /// What a step of one sequence took before the start.
    alone: Duration,
    move_prices: Option<MovePrices>,
    neighbours: Option<Weak<Membership>>,
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
    /// A handle, and what is to run on a thread of its own; its device is called `title`.
    pub fn new(engine: Engine, title: String) -> (EngineHandle, Worker) {
        let (inbox, receiver) = channel();
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
        let shared = Arc::new(Shared {
            config: *engine.config(),
            vocab_size: engine.model().config.vocab_size,
            device: DeviceInfo { id: title, ..engine.backend().info().clone() },
            setting: engine.setting(),
            alone: engine.alone(),
            move_prices: engine.move_prices(),
            neighbours: engine.neighbours().map(Arc::downgrade),
            state: Mutex::new(state),
            thread: Mutex::new(None),
        });
        let worker = Worker {
            engine,
            inbox: receiver,
            shared: shared.clone(),
            member: None,
            loaded_at: Instant::now(),
            stepping: Duration::ZERO,
            attempts: Attempts::default(),
        };
        (EngineHandle { inbox, shared }, worker)
    }

    /// Hands a request in, which fits; its events go to `sink` from the engine thread. Gives both back where that has
    /// ended.
    pub fn submit(&self, arrival: Arrival, sink: Box<dyn Sink>) -> Result<(), Handed> {
        self.inbox.send(Message::Submit(arrival, sink)).map_err(|SendError(message)| match message {
            Message::Submit(arrival, sink) => (arrival.request, sink),
            Message::Export(_) | Message::Import(_) | Message::Stop => unreachable!("a request was sent"),
        })
    }

    /// Hands over one end of a move. Where the thread has ended there is no such end, which the other one sees.
    pub fn export(&self, export: Export) {
        let _ = self.inbox.send(Message::Export(export));
    }

    /// The same of the other end, before the request that waits for it.
    pub fn import(&self, import: Import) {
        let _ = self.inbox.send(Message::Import(import));
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

    /// What a step of one sequence took before the start; nothing where that was not tried.
    pub fn alone(&self) -> Duration {
        self.shared.alone
    }

    /// What a block takes to go to another engine or come from there; `None` where none does.
    pub fn move_prices(&self) -> Option<MovePrices> {
        self.shared.move_prices
    }

    /// What the host has added to the time of steps, a step.
    pub fn host_per_step(&self) -> Duration {
        let state = lock(&self.shared.state);
        state.host.div_f64(state.stats.num_steps.max(1) as f64)
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

    /// Has the thread end what still runs, and itself.
    pub fn stop(&self) {
        // The thread may have ended by itself; then there is nobody to tell.
        let _ = self.inbox.send(Message::Stop);
    }

    /// Waits for the end of the thread.
    pub fn join(&self) {
        let thread = lock(&self.shared.thread).take();
        // A panic there has been told.
        let _ = thread.map(JoinHandle::join);
    }
}

/// How often an engine without work says so: oftener than once a second, so that each second shows some.
const IDLE_TICK: Duration = Duration::from_millis(500);
/// How often an engine looks whether others have ended what kept it from its work.
const HELD_TICK: Duration = Duration::from_millis(1);
pub(crate) const ENDED: &str = "the server is shutting down";
/// Forecasts need no later news of an engine that is busy, and steps may be shorter.
const LOAD_INTERVAL: Duration = Duration::from_millis(2);

/// An engine before its thread is started, and then that thread.
pub struct Worker {
    engine: Engine,
    inbox: Receiver<Message>,
    shared: Arc<Shared>,
    /// Where several engines serve one model.
    member: Option<Member>,
    /// When `load` was published last.
    loaded_at: Instant,
    /// Spent in steps, waits for the device included.
    stepping: Duration,
    attempts: Attempts,
}

/// Says that the engine has stopped even when its thread unwinds: a panic is our bug, and nobody may wait for it.
struct StoppedOnUnwind(Arc<Shared>, Option<Member>);

impl Drop for StoppedOnUnwind {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.0.state).stopped = Some("it met a bug of its own; restart the server, and report it".to_owned());
            self.1.iter().for_each(Member::stopped);
        }
    }
}

impl Worker {
    /// Starts the thread, which does `first` before anything else.
    pub(crate) fn start(mut self, member: Option<Member>, first: impl FnOnce() + Send + 'static) {
        if let Some(member) = &member {
            member.join(&mut self.engine);
        }
        self.member = member;
        let shared = self.shared.clone();
        let run = move || {
            first();
            self.run();
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(run);
        *lock(&shared.thread) = Some(thread.expect("the system can start one more thread"));
    }

    fn run(mut self) {
        let _guard = StoppedOnUnwind(self.shared.clone(), self.member.clone());
        let reason = loop {
            match self.receive() {
                Received::Work => {}
                Received::Stop => break ENDED.to_owned(),
            }
            let begun = Instant::now();
            match self.engine.step() {
                Ok(has_stepped) => {
                    self.publish(begun);
                    if !has_stepped && matches!(self.wait_for_others(), Received::Stop) {
                        break ENDED.to_owned();
                    }
                }
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
        if reason != ENDED {
            self.member.iter().for_each(Member::stopped);
        }
        self.engine.fail_all(&reason);
        // Requests that were handed in before `stopped` was set.
        while let Ok(message) = self.inbox.try_recv() {
            if let Message::Submit(arrival, sink) = message {
                self.engine.take_in(arrival, sink);
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

    /// There is work, and none of it may run before something has ended on another engine.
    fn wait_for_others(&mut self) -> Received {
        match self.inbox.recv_timeout(HELD_TICK) {
            Ok(message) => match self.take(message) {
                true => Received::Work,
                false => Received::Stop,
            },
            Err(RecvTimeoutError::Disconnected) => Received::Stop,
            Err(RecvTimeoutError::Timeout) => Received::Work,
        }
    }

    fn take(&mut self, message: Message) -> bool {
        match message {
            Message::Submit(arrival, sink) => drop(self.engine.take_in(arrival, sink)),
            Message::Export(export) => self.engine.export(export),
            Message::Import(import) => self.engine.import(import),
            Message::Stop => return false,
        }
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
        self.engine.cache_mut().send_kv_events();
        let stats = self.engine.stats();
        let on_device = Duration::from_secs_f64(stats.total_step_ms / 1e3);
        let mut state = lock(&self.shared.state);
        state.stats.clone_from(stats);
        state.load = load.unwrap_or(state.load);
        state.cost = *self.engine.cost();
        state.host = self.stepping.saturating_sub(on_device);
        state.busy = !is_idle;
        state.last_progress = Instant::now();
        drop(state);
        if let Some(member) = &self.member {
            member.stepped(&mut self.engine);
        }
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
