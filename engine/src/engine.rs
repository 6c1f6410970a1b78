//! Where plan meets compute: the scheduler's batch becomes a recording, and what comes back becomes events.
//!
//! Driven from outside: [`Engine::begin`] plans and submits a step, [`Engine::complete`] waits and publishes. This is
//! the plain loop, one step at a time. Invariant: out of blocks is the scheduler's ordinary branch; the only error is
//! the device's. The engine has no thread, and no branch on the kind of device.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, DeviceError, Ticket};
use crate::batch::{Batch, PackedBatch, SequenceId};
use crate::config::EngineConfig;
use crate::memory::{BlockCounts, KvCache};
use crate::model::{Inputs, Model};
use crate::recording::Recording;
use crate::request::{Event, FinishReason, Flow, Request, Sink, TokenLogprobs, Usage};
use crate::sampling::{self, SliceResult};
use crate::scheduler::{Choice, Outcome, Scheduler, StepTrace};
use crate::sequence::Sequence;

pub struct Engine {
    config: EngineConfig,
    scheduler: Scheduler,
    cache: KvCache,
    model: Model,
    backend: Box<dyn Backend>,
    clients: HashMap<SequenceId, Client>,
    next_id: u64,
    batch: Batch,
    packed: PackedBatch,
    recording: Recording,
    trace: StepTrace,
    in_flight: Option<(Ticket, Instant)>,
    downloads: Vec<u8>,
    stats: EngineStats,
}

/// What a sequence's events need beyond the scheduler's view of it.
struct Client {
    request: Arc<Request>,
    sink: Box<dyn Sink>,
    arrived: Instant,
    first_token: Option<Instant>,
    prompt_logprobs: Vec<TokenLogprobs>,
}

/// Plain numbers about an engine since its start, and now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    pub num_running: u32,
    pub num_waiting: u32,
    pub blocks: BlockCounts,
    pub num_steps: u64,
    /// Tokens computed for prompts, recomputation included.
    pub prefill_tokens: u64,
    pub generated_tokens: u64,
    /// Prompt tokens of finished requests, and how many of them the prefix cache had.
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub num_preemptions: u64,
    pub num_aborted: u64,
    pub num_stopped: u64,
    pub num_length: u64,
    pub num_failed: u64,
    pub last_step_ms: f64,
    pub total_step_ms: f64,
}

impl Engine {
    /// `config` has been checked; `model` was loaded with the same limits, on `backend`. `hash_key` is a fresh random
    /// number: the key of the prefix cache's hash.
    pub fn new(config: EngineConfig, model: Model, backend: Box<dyn Backend>, hash_key: (u64, u64)) -> Engine {
        assert_eq!(model.limits, config.state_limits(), "the model was loaded for other limits");
        let recording = model.recording();
        Engine {
            config,
            scheduler: Scheduler::new(config),
            cache: KvCache::new(config.num_blocks, config.block_size, config.prefix_cache.then_some(hash_key)),
            model,
            backend,
            clients: HashMap::new(),
            next_id: 0,
            batch: Batch::default(),
            packed: PackedBatch::default(),
            recording,
            trace: StepTrace::default(),
            in_flight: None,
            downloads: Vec::new(),
            stats: EngineStats::default(),
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

    /// The step that was planned last.
    pub fn trace(&self) -> &StepTrace {
        &self.trace
    }

    /// The batch that was planned last. A test that plants a bug changes it between [`Engine::plan`] and
    /// [`Engine::submit`].
    pub fn batch_mut(&mut self) -> &mut Batch {
        &mut self.batch
    }

    /// The memory manager, for a test that plants a bug there.
    pub fn cache_mut(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    /// Queues a request. That it fits is the caller's to have checked with [`EngineConfig::fits`].
    pub fn add(&mut self, request: Request, sink: Box<dyn Sink>) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let request = Arc::new(request);
        self.scheduler.add(Sequence::new(id, request.clone()));
        let client = Client { request, sink, arrived: Instant::now(), first_token: None, prompt_logprobs: Vec::new() };
        self.clients.insert(id, client);
        id
    }

    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// One step from plan to events. `false` if nothing could run.
    pub fn step(&mut self) -> Result<bool, DeviceError> {
        let submitted = self.begin()?;
        if submitted {
            self.complete()?;
        }
        Ok(submitted)
    }

    /// Plans and submits a step. `false` if nothing can run.
    pub fn begin(&mut self) -> Result<bool, DeviceError> {
        let planned = self.plan();
        if planned {
            self.submit()?;
        }
        Ok(planned)
    }

    /// Ends sequences whose clients have left, and plans the next step.
    pub fn plan(&mut self) -> bool {
        assert!(self.in_flight.is_none(), "one step at a time");
        let gone = self.clients.iter().filter(|(_, client)| client.sink.is_closed());
        let gone: Vec<SequenceId> = gone.map(|(&id, _)| id).collect();
        for id in gone {
            self.abort(id);
        }
        self.trace = self.scheduler.schedule(&mut self.cache, &mut self.batch);
        self.stats.num_preemptions = self.scheduler.num_preemptions();
        self.update_counts();
        !self.batch.slices.is_empty()
    }

    /// Records the planned batch and hands it to the device.
    pub fn submit(&mut self) -> Result<(), DeviceError> {
        let begun = Instant::now();
        self.packed.pack(&self.batch, self.model.limits.max_blocks_per_seq());
        self.recording.clear();
        let request = |id: SequenceId| -> &Request { &self.clients[&id].request };
        sampling::pack(&self.batch, request, &mut self.packed);
        let inputs = Inputs::upload(&self.packed, &mut self.recording);
        if let Some(choices) = self.model.record(&inputs, &mut self.recording) {
            sampling::downloads(&self.batch, choices, &mut self.recording.downloads);
        }
        let ticket = self.backend.submit(&self.recording)?;
        self.in_flight = Some((ticket, begun));
        Ok(())
    }

    /// Waits for the submitted step and tells the clients what it brought.
    pub fn complete(&mut self) -> Result<(), DeviceError> {
        let (ticket, begun) = self.in_flight.take().expect("a step was submitted");
        self.downloads.clear();
        self.backend.wait(ticket, &mut self.downloads)?;
        self.stats.last_step_ms = begun.elapsed().as_secs_f64() * 1e3;
        self.stats.total_step_ms += self.stats.last_step_ms;
        self.stats.num_steps += 1;
        self.stats.prefill_tokens += u64::from(self.trace.num_prefill_tokens());

        let results = sampling::read(&self.batch, &self.downloads, self.model.config.vocab_size);
        let (choices, mut logprobs) = self.take(results);
        let mut outcomes = Vec::with_capacity(choices.len());
        self.scheduler.complete(&mut self.cache, &self.batch, &choices, &mut self.trace, &mut outcomes);
        tracing::trace!("{}", self.trace);
        for outcome in outcomes {
            let logprobs = logprobs.remove(&outcome.sequence);
            self.tell(outcome, logprobs);
        }
        self.update_counts();
        Ok(())
    }

    /// Ends a sequence in any phase; its blocks are free at once.
    pub fn abort(&mut self, id: SequenceId) {
        let Some(client) = self.clients.remove(&id) else { return };
        let usage = self.scheduler.abort(&mut self.cache, id).unwrap_or_default();
        self.stats.num_aborted += 1;
        log_end(&client, "aborted", usage);
    }

    /// Tells every client that the engine has ended, and why.
    pub fn fail_all(&mut self, sentence: &str) {
        let ids: Vec<SequenceId> = self.clients.keys().copied().collect();
        for id in ids {
            let usage = self.scheduler.abort(&mut self.cache, id).unwrap_or_default();
            self.finish(id, FinishReason::Error(sentence.to_owned()), usage);
        }
        self.update_counts();
    }

    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }

    /// Asserts every invariant of scheduler and memory; between steps.
    pub fn check(&self) {
        self.scheduler.check(&self.cache);
        let num_sequences = self.scheduler.waiting().count() + self.scheduler.running().len();
        assert_eq!(self.clients.len(), num_sequences, "a sequence without a client, or the other way round");
        if self.is_idle() {
            assert_eq!(self.cache.counts().referenced, 0, "blocks leaked");
        }
    }

    /// The choice for each slice of the batch, and log-probabilities of chosen tokens; those of prompts go to their
    /// clients.
    fn take(&mut self, results: Vec<SliceResult>) -> (Vec<Choice>, HashMap<SequenceId, TokenLogprobs>) {
        let mut choices = Vec::with_capacity(results.len());
        let mut logprobs = HashMap::new();
        for (slice, result) in self.batch.slices.iter().zip(results) {
            choices.push(result.choice);
            logprobs.extend(result.logprobs.map(|logprobs| (slice.sequence, logprobs)));
            if let Some(client) = self.clients.get_mut(&slice.sequence).filter(|_| slice.num_targets > 0) {
                // A recomputed prefix brings its rows again.
                client.prompt_logprobs.truncate(slice.start as usize);
                client.prompt_logprobs.extend(result.prompt_logprobs);
            }
        }
        (choices, logprobs)
    }

    fn tell(&mut self, outcome: Outcome, logprobs: Option<TokenLogprobs>) {
        let Some(client) = self.clients.get_mut(&outcome.sequence) else { return };
        let mut flow = Flow::Continue;
        let failed = matches!(outcome.finished, Some((FinishReason::Error(_), _)));
        let prompt_done = !failed && (outcome.token.is_some() || outcome.finished.is_some());
        if prompt_done && !client.prompt_logprobs.is_empty() {
            flow = client.sink.event(Event::Prompt(std::mem::take(&mut client.prompt_logprobs)));
        }
        if let (Some(id), Flow::Continue) = (outcome.token, flow) {
            self.stats.generated_tokens += 1;
            client.first_token.get_or_insert_with(Instant::now);
            flow = client.sink.event(Event::Token { id, logprobs });
        }
        match (outcome.finished, flow) {
            // A client that has left is told nothing more.
            (_, Flow::Stop) => self.abort(outcome.sequence),
            (Some((reason, usage)), Flow::Continue) => self.finish(outcome.sequence, reason, usage),
            (None, Flow::Continue) => {}
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason, usage: Usage) {
        let Some(mut client) = self.clients.remove(&id) else { return };
        let (count, word) = match &reason {
            FinishReason::Stop => (&mut self.stats.num_stopped, "stop"),
            FinishReason::Length => (&mut self.stats.num_length, "length"),
            FinishReason::Error(sentence) => (&mut self.stats.num_failed, sentence.as_str()),
        };
        *count += 1;
        self.stats.prompt_tokens += u64::from(usage.prompt_tokens);
        self.stats.cached_tokens += u64::from(usage.cached_tokens);
        log_end(&client, word, usage);
        client.sink.event(Event::Finished { reason, usage });
    }

    fn update_counts(&mut self) {
        self.stats.num_running = self.scheduler.running().len() as u32;
        self.stats.num_waiting = self.scheduler.waiting().count() as u32;
        self.stats.blocks = self.cache.counts();
    }
}

fn log_end(client: &Client, reason: &str, usage: Usage) {
    let since = |at: Instant| (at - client.arrived).as_secs_f64() * 1e3;
    tracing::info!(
        id = client.request.id,
        reason,
        prompt_tokens = usage.prompt_tokens,
        cached_tokens = usage.cached_tokens,
        completion_tokens = usage.completion_tokens,
        ttft_ms = client.first_token.map(since),
        total_ms = since(Instant::now()),
        "request ended"
    );
}
