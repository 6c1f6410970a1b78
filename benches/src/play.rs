//! Plays a workload against an engine, in real time or on a simulated device's clock.
//!
//! One loop for both, the engine's own step for both: where prediction and reality differ, the device differs.
//! Invariant: a request that did not run is counted and named. On a simulated clock nothing depends on real time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fullbore_engine::backend::DeviceError;
use fullbore_engine::backend::sim::SimClock;
use fullbore_engine::backlog::{Backlog, Refusal};
use fullbore_engine::engine::{Engine, EngineStats};
use fullbore_engine::forecast::TooLate;
use fullbore_engine::limits::Snapshot;
use fullbore_engine::request::{Event, FinishReason, Flow, Sink};

use crate::heard::Heard;
use crate::reading::Reading;
use crate::report::{KvUse, LeftOut, LimitsReport, ServingReport};
use crate::result::TokenHash;
use crate::workload::PlannedRequest;

/// The time that a workload is played in; 0 is its first arrival.
#[derive(Clone)]
pub enum Clock {
    /// Since this instant.
    Real(Instant),
    /// Of the device since then, with what the host takes for each step.
    Simulated { clock: SimClock, since: Duration, host_per_step: Duration },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlayOptions {
    /// Turns a request away that arrives where the engine's backlog has no room for it, or where it is predicted to
    /// come too late; otherwise its client waits before the door.
    pub refuse_when_full: bool,
    /// Of token ids.
    pub seed: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum PlayError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the request of row {row} failed: {reason}")]
    Failed { row: u32, reason: String },
}

impl Clock {
    pub(crate) fn now(&self) -> Duration {
        match self {
            Clock::Real(start) => start.elapsed(),
            Clock::Simulated { clock, since, .. } => clock.now() - *since,
        }
    }

    pub(crate) fn wait_until(&self, time: Duration) {
        match self {
            Clock::Real(start) => std::thread::sleep(time.saturating_sub(start.elapsed())),
            Clock::Simulated { clock, since, .. } => clock.advance_to(*since + time),
        }
    }

    fn spend_host_time(&self) {
        if let Clock::Simulated { clock, host_per_step, .. } = self {
            clock.advance(*host_per_step);
        }
    }
}

/// Plays `requests`, which are in order of arrival, to their end; their prompts are token ids.
pub fn play(
    engine: &mut Engine,
    requests: &[PlannedRequest],
    clock: &Clock,
    options: PlayOptions,
) -> Result<ServingReport, PlayError> {
    play_read(engine, requests, clock, options, &Reading::of_ids(requests))
}

/// The same where each has to be read before it comes to the engine.
pub fn play_read(
    engine: &mut Engine,
    requests: &[PlannedRequest],
    clock: &Clock,
    options: PlayOptions,
    reading: &Reading,
) -> Result<ServingReport, PlayError> {
    let config = engine.config();
    let backlog = Backlog::new(config.max_queued_requests, u64::from(config.max_queued_tokens));
    let (told, backlog) = (Arc::default(), Arc::new(Mutex::new(backlog)));
    let before = Before::of(engine);
    let mut player = Player { engine, before, clock, options, told, backlog, steps: Steps::default() };
    let (mut too_long, mut refused, mut max_waiting) = (LeftOut::default(), LeftOut::default(), 0);
    let mut next = 0;
    loop {
        let arrived = reading.num_read(clock.now());
        while next < arrived {
            let request = &requests[next];
            if !player.fits(request) {
                too_long.add(request.row);
            } else {
                match player.admit(request) {
                    Admission::Taken => player.add(request),
                    Admission::Full if !options.refuse_when_full => break,
                    Admission::Full | Admission::Never => refused.add(request.row),
                }
            }
            next += 1;
        }
        max_waiting = max_waiting.max(player.num_waiting() + (arrived - next) as u32);
        if !player.engine.is_idle() {
            player.step()?;
        } else if arrived < requests.len() {
            reading.wait(clock);
        } else if next == requests.len() {
            break;
        }
    }
    Ok(player.report(requests.len() as u32, too_long, refused, max_waiting))
}

/// What an engine had counted before it played.
struct Before {
    limits: Snapshot,
    num_preemptions: u64,
    num_swaps: u64,
}

impl Before {
    fn of(engine: &Engine) -> Before {
        let EngineStats { num_preemptions, num_swaps, .. } = *engine.stats();
        Before { limits: engine.limits_since_start(), num_preemptions, num_swaps }
    }
}

struct Player<'a> {
    engine: &'a mut Engine,
    before: Before,
    clock: &'a Clock,
    options: PlayOptions,
    told: Arc<Mutex<Told>>,
    /// The rules by which a server lets requests in.
    backlog: Arc<Mutex<Backlog>>,
    steps: Steps,
}

enum Admission {
    Taken,
    /// Later there may be room.
    Full,
    Never,
}

/// Whose requests they all are.
const TENANT: u64 = 0;

/// What clients were told, and why the run cannot go on.
#[derive(Default)]
struct Told {
    heard: Heard,
    /// Of each whole answer, by its row.
    hashes: Vec<(u32, TokenHash)>,
    failed: Option<PlayError>,
}

/// Sums over steps.
#[derive(Default)]
struct Steps {
    count: u64,
    num_rows: u64,
    busy: Duration,
    /// Share of blocks held, times seconds.
    held_s: f64,
    max_held: f64,
    /// Slots held, and those of them that hold nothing, times seconds.
    slots_s: f64,
    unused_slots_s: f64,
}

impl Player<'_> {
    fn fits(&self, request: &PlannedRequest) -> bool {
        let length = u64::from(request.prompt_tokens) + u64::from(request.output_tokens);
        length <= u64::from(self.engine.config().max_model_len)
    }

    /// Those that were sent back to wait included.
    fn num_waiting(&self) -> u32 {
        self.engine.stats().num_preempted + lock(&self.backlog).total().num_requests
    }

    /// Takes a place for a request, if there is one for it now.
    fn admit(&self, request: &PlannedRequest) -> Admission {
        let (own_tokens, config) = (u64::from(request.prompt_tokens), self.engine.config());
        let mut backlog = lock(&self.backlog);
        let is_first = backlog.is_idle();
        let admission = |refusal| match refusal {
            Refusal::Full(_) => Admission::Full,
            Refusal::Never { .. } => Admission::Never,
        };
        if let Err(refusal) = backlog.reserve(TENANT, 1, 1) {
            return admission(refusal);
        }
        if let Err(refusal) = backlog.add_tokens(TENANT, own_tokens) {
            backlog.leave(TENANT, 0);
            return admission(refusal);
        }
        let Some(max_queue_ms) = config.max_queue_ms else { return Admission::Taken };
        let (ahead, max) = (backlog.ahead(TENANT, config.max_num_seqs), Duration::from_millis(max_queue_ms.into()));
        let Err(late) = self.engine.load().check_in_time(&ahead, own_tokens, is_first, max) else {
            return Admission::Taken;
        };
        backlog.leave(TENANT, own_tokens);
        match late {
            TooLate::Now { .. } => Admission::Full,
            TooLate::Ever { .. } => Admission::Never,
        }
    }

    fn add(&mut self, planned: &PlannedRequest) {
        let vocab_size = self.engine.model().config.vocab_size;
        let client = Client {
            row: planned.row,
            arrival: planned.arrival,
            own_tokens: planned.prompt_tokens.into(),
            last: None,
            clock: self.clock.clone(),
            told: self.told.clone(),
            backlog: self.backlog.clone(),
            num_tokens: 0,
            hash: TokenHash::default(),
        };
        self.engine.add(planned.request(vocab_size, self.options.seed), Box::new(client));
    }

    fn step(&mut self) -> Result<(), PlayError> {
        let begun = self.clock.now();
        self.clock.spend_host_time();
        let ran = self.engine.step()?;
        if let Some(failed) = lock(&self.told).failed.take() {
            return Err(failed);
        }
        if ran {
            let took = self.clock.now() - begun;
            let blocks = self.engine.stats().blocks;
            let held = f64::from(blocks.referenced) / f64::from(blocks.total);
            self.steps.count += 1;
            self.steps.num_rows += u64::from(self.engine.last_step().shape.num_tokens);
            self.steps.busy += took;
            self.steps.held_s += held * took.as_secs_f64();
            self.steps.max_held = self.steps.max_held.max(held);
            let slots = f64::from(blocks.referenced) * f64::from(self.engine.config().block_size);
            self.steps.slots_s += slots * took.as_secs_f64();
            self.steps.unused_slots_s += self.engine.stats().unused_kv_slots as f64 * took.as_secs_f64();
        }
        Ok(())
    }

    fn report(self, num_requests: u32, too_long: LeftOut, refused: LeftOut, max_waiting: u32) -> ServingReport {
        let mut told = lock(&self.told);
        told.hashes.sort_unstable();
        let output_hash = TokenHash::of_answers(told.hashes.iter().map(|(_, hash)| *hash)).to_string();
        let heard = &told.heard;
        let Steps { count, num_rows, busy, held_s, max_held, slots_s, unused_slots_s } = self.steps;
        let duration_s = heard.last_token.as_secs_f64();
        let a_second = |count: u64| if duration_s > 0.0 { count as f64 / duration_s } else { 0.0 };
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let config = self.engine.config();
        let kv_bytes_per_token = self.engine.model().config.kv_bytes_per_token(config.kv_type);
        ServingReport {
            num_requests,
            num_completed: heard.num_completed,
            too_long,
            refused,
            duration_s,
            num_steps: count,
            prompt_tokens: heard.prompt_tokens,
            output_tokens: heard.output_tokens,
            output_tokens_per_s: a_second(heard.output_tokens),
            scheduled_tokens_per_s: a_second(num_rows),
            mean_rows: share(num_rows as f64, count as f64),
            busy_share: share(busy.as_secs_f64(), duration_s),
            ttft_ms: (&heard.ttft).into(),
            itl_ms: (&heard.itl).into(),
            total_ms: (&heard.total).into(),
            num_preemptions: self.engine.stats().num_preemptions - self.before.num_preemptions,
            num_swaps: self.engine.stats().num_swaps - self.before.num_swaps,
            kv: KvUse {
                num_blocks: config.num_blocks,
                block_size: config.block_size,
                pool_bytes: u64::from(config.num_blocks) * u64::from(config.block_size) * kv_bytes_per_token,
                mean_share: share(held_s, duration_s),
                max_share: max_held,
                unused_share: share(unused_slots_s, slots_s),
            },
            prefix_hit_share: share(heard.cached_tokens as f64, heard.prompt_tokens as f64),
            max_waiting,
            output_hash,
            limits: LimitsReport::of(self.engine, &self.before.limits),
        }
    }
}

/// Stamps what it is told.
struct Client {
    row: u32,
    arrival: Duration,
    own_tokens: u64,
    /// When the token before came.
    last: Option<Duration>,
    clock: Clock,
    told: Arc<Mutex<Told>>,
    backlog: Arc<Mutex<Backlog>>,
    num_tokens: u32,
    hash: TokenHash,
}

impl Sink for Client {
    fn event(&mut self, event: Event) -> Flow {
        let now = self.clock.now();
        let mut told = lock(&self.told);
        match event {
            Event::Started { .. } => lock(&self.backlog).begin(TENANT, self.own_tokens),
            Event::Prompt(_) | Event::Pooled(_) => {}
            Event::Token { id, .. } => {
                self.hash.add(id.0);
                told.heard.token(now, self.arrival, &mut self.last);
                self.num_tokens += 1;
            }
            Event::Finished { reason: FinishReason::Error(reason) | FinishReason::DeviceLost(reason), .. } => {
                told.failed = Some(PlayError::Failed { row: self.row, reason });
            }
            Event::Finished { usage, .. } => {
                lock(&self.backlog).end(TENANT);
                told.hashes.push((self.row, self.hash));
                told.heard.finished(now, self.arrival, usage, self.num_tokens);
            }
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// What is behind it is whole after every event.
pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
