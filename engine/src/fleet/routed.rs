//! A request on its way through a fleet: handed from engine to engine until it ends, as one to its client.
//!
//! Whoever waits may be sent elsewhere, and whose device is lost, or much slower than one that has nothing to do, goes
//! on elsewhere from the tokens that it has: the sampler's state is a function of seed, position and tokens, so that
//! the client gets those that it would have got.
//! Invariant: what an engine tells of an attempt that is not the last reaches nobody.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::dispatch::Dispatch;
use super::lock;
use super::router::{Ask, Fetch, Placement};
use crate::engine::moves::{Export, Import, block_move};
use crate::memory::BlockChain;
use crate::request::{Event, FinishReason, Flow, Request, Sink, TokenId, Usage};

/// A request that was with so many devices when they were lost may be what loses them.
pub const MAX_LOSSES: u32 = 2;

pub(super) struct Routed {
    pub dispatch: Arc<Dispatch>,
    request: Arc<Request>,
    /// Of its prompt.
    chain: BlockChain,
    /// The number of the last one; changes while `now` is held.
    attempt: AtomicU32,
    /// Whether it stays where it has a slot: another device has taken it from one once, or its end is under way.
    /// Changes while `now` is held.
    stays: AtomicBool,
    /// Whether it has had a slot anywhere; changes while `now` is held.
    has_begun: AtomicBool,
    /// Held before the dispatch's board, where both are.
    pub now: Mutex<Now>,
}

/// How far it is.
pub(super) struct Now {
    /// Until its end.
    sink: Option<Box<dyn Sink>>,
    /// While it is with an engine.
    pub placement: Option<Placement>,
    /// Whether it is with one and has not begun there.
    pub is_waiting: bool,
    /// Once it has begun anywhere.
    cached_tokens: Option<u32>,
    generated: Vec<TokenId>,
    num_losses: u32,
}

impl Routed {
    pub fn new(dispatch: Arc<Dispatch>, request: Arc<Request>, chain: BlockChain, sink: Box<dyn Sink>) -> Routed {
        let now = Now {
            sink: Some(sink),
            placement: None,
            is_waiting: false,
            cached_tokens: None,
            generated: Vec::new(),
            num_losses: 0,
        };
        let (attempt, stays, has_begun) = (AtomicU32::new(0), AtomicBool::new(false), AtomicBool::new(false));
        Routed { dispatch, request, chain, attempt, stays, has_begun, now: Mutex::new(now) }
    }

    /// The keys of the blocks that its prompt fills.
    pub fn chain(&self) -> &BlockChain {
        &self.chain
    }

    pub fn tenant(&self) -> u64 {
        self.request.tenant
    }

    pub fn is_pooled(&self) -> bool {
        self.request.pooling.is_some()
    }

    /// Whether it may be taken from where it has a slot.
    pub fn may_restart(&self) -> bool {
        !self.is_pooled() && !self.stays.load(Ordering::Relaxed)
    }

    /// From now on it is taken from no slot; `now` is its own.
    pub fn stay(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    pub fn has_begun(&self) -> bool {
        self.has_begun.load(Ordering::Relaxed)
    }

    /// Lower is served first, of one tenant.
    pub fn priority(&self) -> i32 {
        self.request.priority
    }

    /// What is left of it; `now` is its own.
    pub fn ask(&self, now: &Now) -> Ask<'_> {
        let num_generated = now.num_generated();
        let prompt_tokens = self.request.prompt.len() as u32 + num_generated;
        Ask { chain: self.chain.hashes(), prompt_tokens, max_tokens: self.request.max_tokens - num_generated }
    }

    /// What the next engine is handed; `now` is its own.
    pub fn next_attempt(self: &Arc<Self>, now: &Now) -> (Arc<Request>, Box<dyn Sink>) {
        let number = self.attempt.fetch_add(1, Ordering::AcqRel) + 1;
        let request = match now.generated.is_empty() {
            true => self.request.clone(),
            false => Arc::new(Request { generated: now.generated.clone(), ..Request::clone(&self.request) }),
        };
        (request, Box::new(Attempt { routed: self.clone(), number }))
    }

    /// The two ends of what its engine is to have of its prompt, before it is handed there.
    pub fn fetch(&self, fetch: &Fetch) -> (Export, Import) {
        block_move(self.request.clone(), &self.chain, fetch.blocks.clone(), fetch.saves)
    }

    /// Takes it from the engine that it is with, which is told nothing: it sees that nobody listens.
    pub fn recall(&self, now: &mut Now) {
        self.attempt.fetch_add(1, Ordering::AcqRel);
        self.dispatch.withdraw(self, now);
    }

    /// Ends it.
    pub fn fail(&self, sentence: &str) {
        let mut now = lock(&self.now);
        let (prompt_tokens, completion_tokens) = (self.request.prompt.len() as u32, now.num_generated());
        let usage = Usage { prompt_tokens, cached_tokens: now.cached_tokens.unwrap_or(0), completion_tokens };
        if let Some(mut sink) = now.sink.take() {
            sink.event(Event::Finished { reason: FinishReason::Error(sentence.to_owned()), usage });
        }
    }

    fn is_current(&self, attempt: u32) -> bool {
        self.attempt.load(Ordering::Acquire) == attempt
    }

    fn event(self: &Arc<Self>, attempt: u32, mut event: Event) -> Flow {
        let mut now = lock(&self.now);
        if !self.is_current(attempt) {
            return Flow::Stop;
        }
        match &mut event {
            Event::Started { cached_tokens } => {
                self.dispatch.begun(self, &mut now);
                now.cached_tokens.get_or_insert(*cached_tokens);
                if self.has_begun.swap(true, Ordering::Relaxed) {
                    return Flow::Continue;
                }
            }
            Event::Token { id, .. } => {
                now.generated.push(*id);
                self.dispatch.token(&mut now);
            }
            Event::Finished { reason: FinishReason::DeviceLost(_), .. } if now.num_losses < MAX_LOSSES => {
                now.num_losses += 1;
                self.recall(&mut now);
                drop(now);
                self.dispatch.place(self);
                return Flow::Stop;
            }
            Event::Finished { reason, usage } => {
                self.dispatch.end(self, &mut now, reason);
                usage.cached_tokens = now.cached_tokens.unwrap_or(0);
            }
            // Told once.
            Event::Prompt(_) | Event::Pooled(_) => self.stay(),
        }
        let is_last = matches!(event, Event::Finished { .. });
        let flow = now.sink.as_mut().map_or(Flow::Stop, |sink| sink.event(event));
        if flow == Flow::End {
            self.stay();
        }
        if is_last {
            now.sink = None;
        }
        flow
    }

    /// The engine has let go of it.
    fn leave(&self, attempt: u32) {
        let mut now = lock(&self.now);
        if self.is_current(attempt) {
            self.dispatch.withdraw(self, &mut now);
            now.sink = None;
        }
    }
}

impl Now {
    pub fn has_ended(&self) -> bool {
        self.sink.is_none()
    }

    pub fn num_generated(&self) -> u32 {
        self.generated.len() as u32
    }
}

/// One engine's part in it.
struct Attempt {
    routed: Arc<Routed>,
    number: u32,
}

impl Sink for Attempt {
    fn event(&mut self, event: Event) -> Flow {
        self.routed.event(self.number, event)
    }

    fn is_closed(&self) -> bool {
        let is_closed = || lock(&self.routed.now).sink.as_ref().is_none_or(|sink| sink.is_closed());
        !self.routed.is_current(self.number) || is_closed()
    }

    fn will_end(&mut self) {
        let _now = lock(&self.routed.now);
        if self.routed.is_current(self.number) {
            self.routed.stay();
        }
    }

    fn has_moved(&self) -> bool {
        !self.routed.is_current(self.number)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.routed.is_current(self.number) {
            self.routed.leave(self.number);
        }
    }
}
