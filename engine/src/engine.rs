//! Where plan meets compute: the scheduler's batch becomes a recording, and what comes back becomes events.
//!
//! Driven from outside: [`Engine::begin`] plans and submits a step, [`Engine::complete`] waits for the oldest and
//! publishes. With a pipeline depth of 1 that is the plain loop, one step at a time; with 2 the next step is planned
//! and submitted before the last is read back, so that the device always has work. Invariant: out of blocks is the
//! scheduler's ordinary branch; the only error is the device's. The engine has no thread, and no branch on the kind of
//! device.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use crate::arrival::Arrival;
use crate::backend::{Backend, DeviceError};
use crate::batch::{Batch, PackedBatch, SequenceId};
use crate::config::EngineConfig;
use crate::cost::{CostFit, CostModel, StepShape};
use crate::forecast::Meter;
use crate::grammar::{Grammar, Matcher};
use crate::limits::neighbours::Membership;
use crate::limits::{self, Limits, Phase, StepFacts};
use crate::memory::{BlockCounts, BlockHasher, KvCache};
use crate::model::{Checkpoint, Model};
use crate::queue::Ledger;
use crate::recording::Recording;
use crate::request::{Event, FinishReason, Flow, Request, Sink, TokenId, TokenLogprobs};
use crate::sampling;
use crate::scheduler::{Choice, Outcome, Scheduler, StepTrace};
use crate::sequence::Sequence;

mod end;
mod load;
mod masks;
pub mod moves;
mod pooled;
pub mod probe;
mod recovery;
mod step;
mod sums;
mod times;
mod warm_up;

use moves::{MovePrices, Moves};
use pooled::Pooled;
use step::{InFlight, Step, Submitted, record, record_forward};
pub use times::{Part, StepParts, StepTokens};

pub struct Engine {
    config: EngineConfig,
    scheduler: Scheduler,
    cache: KvCache,
    model: Model,
    backend: Box<dyn Backend>,
    /// Where its weights come from again, if the device is lost.
    checkpoint: Option<Arc<Checkpoint>>,
    /// It was lost, and is not there again.
    is_device_lost: bool,
    /// By numbers of our own: nobody outside can make them collide.
    clients: FxHashMap<SequenceId, Client>,
    next_id: u64,
    /// The step that is planned next, or was planned last and is not submitted.
    planned: Step,
    /// Submitted and not completed, oldest first.
    in_flight: VecDeque<InFlight>,
    /// Completed ones, to be filled again; the last one completed is at the end.
    spare: Vec<Step>,
    packed: PackedBatch,
    recording: Recording,
    downloads: Vec<u8>,
    choices: Vec<Choice>,
    /// Of the chosen tokens, where they were asked for; one entry a slice, as `choices`.
    logprobs: Vec<Option<TokenLogprobs>>,
    gone: Vec<SequenceId>,
    outcomes: Vec<Outcome>,
    started_at: Instant,
    /// When the device became idle, or turned to the step that runs now.
    device_free_at: Instant,
    last_step: StepTime,
    /// Of the step that is being completed, what its parts have taken so far.
    part_ns: u64,
    cost: CostFit,
    limits: Limits,
    /// Other engines on the device.
    neighbours: Option<Arc<Membership>>,
    /// Blocks on their way to other engines or from there, and what that takes.
    moves: Moves,
    move_prices: Option<MovePrices>,
    /// What a step of one sequence takes, as far as that was tried.
    alone: Duration,
    meter: Meter,
    /// Zero of the meter's clock.
    created_at: Instant,
    stats: EngineStats,
}

/// What a step took on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTime {
    pub shape: StepShape,
    pub device_ns: u64,
}

/// What a sequence's events need beyond the scheduler's view of it.
struct Client {
    request: Arc<Request>,
    /// Where the request has a grammar: at the last token that is known.
    matcher: Option<Matcher>,
    sink: Box<dyn Sink>,
    arrived: Instant,
    /// When it first got a slot, on the meter's clock.
    started_ns: Option<u64>,
    first_token: Option<Instant>,
    prompt_logprobs: Vec<TokenLogprobs>,
    pooled: Pooled,
}

/// Plain numbers about an engine since its start, and now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    pub num_running: u32,
    pub num_waiting: u32,
    /// Of those, the ones that have run before.
    pub num_preempted: u32,
    pub blocks: BlockCounts,
    /// Slots of blocks that running sequences hold and have computed nothing for.
    pub unused_kv_slots: u64,
    pub num_steps: u64,
    /// Tokens computed for prompts, recomputation included.
    pub prefill_tokens: u64,
    pub generated_tokens: u64,
    /// Prompt tokens of finished requests, and how many of them the prefix cache had.
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub num_preemptions: u64,
    /// Preemptions in which what was computed went to the host's memory, and blocks that are there now.
    pub num_swaps: u64,
    pub num_swapped_blocks: u32,
    /// What the grammars of sequences that have begun take.
    pub grammar_bytes: u64,
    pub num_aborted: u64,
    pub num_stopped: u64,
    pub num_length: u64,
    pub num_failed: u64,
    /// Of those, the ones that a row of the model's output failed which was not finite.
    pub num_not_finite: u64,
    /// Sequences that went on to another engine.
    pub num_moved: u64,
    /// KV blocks that came from another engine.
    pub num_fetched_blocks: u64,
    /// KV blocks that were to come from another engine, and did not.
    pub num_missed_blocks: u64,
    /// Times that the device was lost.
    pub num_device_losses: u64,
    pub last_step_ms: f64,
    pub total_step_ms: f64,
    pub step_tokens: StepTokens,
    /// Steps, part by part.
    pub step_parts: StepParts,
    /// Where the device's time went.
    pub limits: limits::Snapshot,
}

impl Engine {
    /// `config` has been checked; `model` was loaded with the same limits, on `backend`. `hash_key` is a fresh random
    /// number: the key of the prefix cache's hash.
    pub fn new(config: EngineConfig, model: Model, backend: Box<dyn Backend>, hash_key: (u64, u64)) -> Engine {
        assert_eq!(model.limits, config.state_limits(), "the model was loaded for other limits");
        let recording = model.recording();
        let now = backend.now();
        let mut cache = KvCache::new(config.num_blocks, config.block_size, config.prefix_cache.then_some(hash_key));
        cache.reserve_tables(config.max_num_seqs, model.limits.max_blocks_per_seq());
        let stats = EngineStats { blocks: cache.counts(), ..EngineStats::default() };
        Engine {
            config,
            scheduler: Scheduler::new(config),
            cache,
            model,
            backend,
            checkpoint: None,
            is_device_lost: false,
            clients: FxHashMap::default(),
            next_id: 0,
            planned: Step::new(&config),
            in_flight: VecDeque::new(),
            spare: (0..config.pipeline_depth).map(|_| Step::new(&config)).collect(),
            packed: PackedBatch::default(),
            recording,
            downloads: Vec::new(),
            choices: Vec::new(),
            logprobs: Vec::new(),
            gone: Vec::new(),
            outcomes: Vec::new(),
            started_at: now,
            device_free_at: now,
            last_step: StepTime::default(),
            part_ns: 0,
            cost: CostFit::new(CostModel::UNKNOWN),
            limits: Limits::default(),
            neighbours: None,
            moves: Moves::default(),
            move_prices: None,
            alone: Duration::ZERO,
            meter: Meter::default(),
            created_at: now,
            stats,
        }
    }

    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// What steps take on this device, as far as it has been seen.
    pub fn cost(&self) -> &CostModel {
        self.cost.model()
    }

    /// The step that was completed last.
    pub fn trace(&self) -> &StepTrace {
        &self.spare.last().expect("a step is spare between calls").trace
    }

    /// The batch that was planned last. A test that plants a bug changes it between [`Engine::plan`] and
    /// [`Engine::submit`].
    pub fn batch_mut(&mut self) -> &mut Batch {
        &mut self.planned.batch
    }

    /// The memory manager, for who keeps its events, and for a test that plants a bug there.
    pub fn cache_mut(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    /// Before its first request: counts what tenants get together with other engines.
    pub fn share_ledger(&mut self, ledger: Arc<Ledger>) {
        self.scheduler.share_ledger(ledger);
    }

    /// What names the blocks of its prefix cache, if it has one.
    pub fn hasher(&self) -> Option<BlockHasher> {
        self.cache.hasher()
    }

    /// Queues a request. That it fits is the caller's to have checked with [`EngineConfig::fits`].
    pub fn add(&mut self, request: impl Into<Arc<Request>>, sink: Box<dyn Sink>) -> SequenceId {
        let (request, hasher) = (request.into(), self.hasher());
        let chain = hasher.map(|hasher| hasher.of_prompt(&request)).unwrap_or_default();
        self.take_in(Arrival::new(request, chain, hasher.as_ref()), sink)
    }

    /// The same of what was made ready on another thread, with the names of this engine's [`Engine::hasher`].
    pub fn take_in(&mut self, arrival: Arrival, sink: Box<dyn Sink>) -> SequenceId {
        self.turn_to(Phase::Schedule);
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let request = arrival.request.clone();
        self.scheduler.add(Sequence::new(id, arrival));
        let client = Client {
            matcher: request.grammar.as_ref().map(|grammar| matcher(grammar, &request.generated)),
            request,
            sink,
            arrived: self.backend.now(),
            started_ns: None,
            first_token: None,
            prompt_logprobs: Vec::new(),
            pooled: Pooled::default(),
        };
        self.clients.insert(id, client);
        id
    }

    /// Whether there is nothing to plan and nothing to wait for.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.in_flight.is_empty() && self.moves.is_empty()
    }

    /// Copies what is due between engines, fills the pipeline and completes its oldest step. `false` if there was
    /// nothing to do.
    pub fn step(&mut self) -> Result<bool, DeviceError> {
        let has_moved = self.move_blocks()?;
        while self.has_room() && self.begin()? {}
        let submitted = !self.in_flight.is_empty();
        if submitted {
            self.complete()?;
        }
        Ok(submitted || has_moved)
    }

    /// Whether one more step may be submitted before the oldest is completed.
    pub fn has_room(&self) -> bool {
        let is_kept_free = !self.in_flight.is_empty() && self.moves.are_due();
        self.in_flight.len() < self.config.pipeline_depth as usize && !is_kept_free
    }

    pub fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Plans and submits a step. `false` if nothing can run before a step in flight is completed.
    pub fn begin(&mut self) -> Result<bool, DeviceError> {
        let planned = self.plan();
        if planned {
            self.submit()?;
        }
        Ok(planned)
    }

    /// Ends sequences whose clients have left, and plans the next step.
    pub fn plan(&mut self) -> bool {
        assert!(self.has_room(), "{} steps are in flight", self.in_flight.len());
        self.turn_to(Phase::Schedule);
        let gone = self.clients.iter().filter(|(_, client)| client.sink.is_closed());
        self.gone.extend(gone.map(|(&id, _)| id));
        while let Some(id) = self.gone.pop() {
            self.abort(id);
        }
        self.scheduler.set_grammar_bytes(self.stats.grammar_bytes);
        self.scheduler.schedule(&mut self.cache, &mut self.planned.batch, &mut self.planned.trace);
        self.stats.num_preemptions = self.scheduler.num_preemptions();
        self.stats.num_swaps = self.scheduler.num_swaps();
        self.update_counts();
        self.planned.facts = StepFacts {
            held: self.planned.trace.held,
            num_waiting: self.stats.num_waiting,
            waiting_tokens: self.scheduler.queue().waiting_tokens(),
            num_running: self.stats.num_running,
            referenced_blocks: self.stats.blocks.referenced,
        };
        let planned = !self.planned.batch.slices.is_empty();
        if !planned {
            self.turn_from_step();
            self.update_sums();
        }
        planned
    }

    /// Records the planned batch and hands it to the device; what waits for masks follows as soon as they are known.
    pub fn submit(&mut self) -> Result<(), DeviceError> {
        self.turn_to(Phase::Record);
        self.planned.masks.find(&self.planned.batch, &self.clients);
        let is_masked = !self.planned.masks.is_empty();
        let (packed, recording) = (&mut self.packed, &mut self.recording);
        if is_masked {
            record_forward(&self.planned.batch, &self.model, packed, recording);
        } else {
            let request = |id: SequenceId| self.clients.get(&id).map(|client| &*client.request);
            record(&self.planned.batch, request, &self.model, packed, recording);
        }
        self.turn_to(Phase::Upload);
        let ticket = self.backend.submit(&self.recording)?;
        let submitted = Some(Submitted { ticket, at: self.backend.now() });
        self.limits.submitted();
        self.planned.company = self.neighbours.as_ref().map(|others| others.submitted()).unwrap_or_default();
        self.turn_to(Phase::Schedule);
        let next = self.spare.pop().expect("as many steps as may be in flight, and one that is planned");
        let step = std::mem::replace(&mut self.planned, next);
        let (forward, choices) = if is_masked { (submitted, None) } else { (None, submitted) };
        self.in_flight.push_back(InFlight { step, forward, choices });
        if self.in_flight.len() == 1 {
            self.submit_choices()?;
            self.turn_to(Phase::Schedule);
        }
        self.tell_started();
        Ok(())
    }

    /// Waits for the oldest step in flight and tells the clients what it brought.
    pub fn complete(&mut self) -> Result<(), DeviceError> {
        let InFlight { mut step, forward, choices } = self.in_flight.pop_front().expect("a step was submitted");
        self.turn_to(Phase::ReadBack);
        self.downloads.clear();
        if let Err(error) = self.read_back(&step, forward, choices) {
            self.drop_step(step);
            return Err(error);
        }
        self.count(&step);
        self.choose(&step);
        // Before anything else, for the device may be waiting for it.
        let submitted = self.submit_choices();
        self.turn_to(Phase::ReadBack);
        self.publish(&mut step);
        self.spare.push(step);
        self.turn_from_step();
        self.update_counts();
        self.update_sums();
        submitted
    }

    /// Takes in what was chosen, and tells the clients.
    fn publish(&mut self, step: &mut Step) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        self.scheduler.complete(&mut self.cache, &step.batch, &self.choices, &mut step.trace, &mut outcomes);
        tracing::trace!("{}", step.trace);
        let mut logprobs = std::mem::take(&mut self.logprobs);
        // In the order of the batch; a sequence that ended meanwhile has none.
        let mut told = outcomes.drain(..).peekable();
        for (slice, logprobs) in step.batch.slices.iter().zip(logprobs.drain(..)) {
            if let Some(outcome) = told.next_if(|outcome| outcome.sequence == slice.sequence) {
                self.tell(outcome, logprobs);
            }
        }
        drop(told);
        (self.outcomes, self.logprobs) = (outcomes, logprobs);
    }

    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }

    /// The step that was completed last.
    pub fn last_step(&self) -> StepTime {
        self.last_step
    }

    /// Asserts every invariant of scheduler and memory; between steps.
    pub fn check(&self) {
        self.scheduler.check(&self.cache, self.moves.tables());
        let num_sequences = self.scheduler.queue().len() + self.scheduler.running().count();
        assert_eq!(self.clients.len(), num_sequences, "a sequence without a client, or the other way round");
        let grammar_bytes: u64 = self.clients.values().map(Client::grammar_bytes).sum();
        assert_eq!(self.stats.grammar_bytes, grammar_bytes, "what forms take");
        if self.is_idle() {
            assert_eq!(self.cache.counts().referenced, 0, "blocks leaked");
        }
    }

    /// Refills `choices` and `logprobs` with what the step brought for each slice; the log-probabilities of prompts go
    /// to their clients.
    fn choose(&mut self, Step { batch, masks, .. }: &Step) {
        self.choices.clear();
        self.logprobs.clear();
        let results = sampling::read(batch, &self.downloads, self.model.config.vocab_size);
        for (slice, result) in batch.slices.iter().zip(results) {
            self.choices.push(result.choice);
            self.logprobs.push(result.logprobs);
            if slice.num_targets == 0 {
                continue;
            }
            if let Some(client) = self.clients.get_mut(&slice.sequence) {
                // A recomputed prefix brings its rows again.
                client.prompt_logprobs.truncate(slice.start as usize);
                client.prompt_logprobs.extend(result.prompt_logprobs);
            }
        }
        self.pool(batch);
        masks.follow(&mut self.clients, &mut self.choices, &mut self.stats.grammar_bytes);
    }

    fn tell(&mut self, outcome: Outcome, logprobs: Option<TokenLogprobs>) {
        let Some(client) = self.clients.get_mut(&outcome.sequence) else { return };
        if outcome.finished.is_some() {
            client.sink.will_end();
        }
        let mut flow = Flow::Continue;
        let failed = matches!(outcome.finished, Some((FinishReason::Error(_) | FinishReason::Contradiction(_), _)));
        let prompt_done = !failed && (outcome.token.is_some() || outcome.finished.is_some());
        if prompt_done && !client.prompt_logprobs.is_empty() {
            flow = client.sink.event(Event::Prompt(std::mem::take(&mut client.prompt_logprobs)));
        }
        let is_whole = outcome.finished.is_some() && !failed;
        if let Some(pooled) = is_whole.then(|| client.pooled.vector()).flatten() {
            flow = client.sink.event(Event::Pooled(pooled));
        }
        if let (Some(id), Flow::Continue) = (outcome.token, flow) {
            self.stats.generated_tokens += 1;
            client.first_token.get_or_insert(self.device_free_at);
            flow = client.sink.event(Event::Token { id, logprobs });
        }
        match (outcome.finished, flow) {
            // A client that has left is told nothing more.
            (_, Flow::Stop) => self.abort(outcome.sequence),
            (Some((reason, usage)), Flow::Continue) => self.finish(outcome.sequence, reason, usage),
            // Where its length ends it too.
            (Some((_, usage)), Flow::End) => self.finish(outcome.sequence, FinishReason::Stop, usage),
            (None, Flow::End) => self.stop(outcome.sequence),
            (None, Flow::Continue) => {}
        }
    }
}

/// At the last of `generated`. What goes wrong with it is told with the first mask.
fn matcher(grammar: &Grammar, generated: &[TokenId]) -> Matcher {
    let mut matcher = grammar.matcher();
    let _ = generated.iter().try_for_each(|&token| matcher.advance(token).map(drop));
    matcher
}
