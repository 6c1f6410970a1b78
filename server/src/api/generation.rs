//! The choices of one HTTP request while they grow: events in, text out.
//!
//! Invariant: dropping a `Generation` ends its sequences. A choice's channel holds all its events, so the engine never
//! waits for a client: `max_tokens` tokens, and one event each for the start, the prompt and the end. Text is made
//! where a `Generation` is polled; where stop strings may end it on the engine thread too, so that nothing is computed,
//! nor charged, behind one that a slow client has yet to read.

mod delta;
mod later;
mod sink;
mod text;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use fullbore_engine::fleet::{Fleet, Handed, Place};
use fullbore_engine::grammar::Grammar;
use fullbore_engine::request::{Event, FinishReason, Request, Sink, TokenId, TokenLogprobs};
use fullbore_engine::text::Detokenizer;
use tokio::sync::mpsc::{Receiver, channel};

use super::ServedModel;
use super::constraint::Form;
use super::reply::{Reply, ReplyFormat};
use crate::http::error::ApiError;
use crate::http::metrics::{Choices, End, Observer, ToldEnd};
use crate::http::rates::Meter;
use crate::traces::Trace;
pub use delta::{Delta, Entry, Usage};
use later::Later;
use sink::{ChannelSink, Told};
use text::Text;

/// One choice to be made.
pub struct Job {
    pub request: Arc<Request>,
    /// Which of its prompt's choices it is.
    pub nth: u32,
    pub stops: Vec<String>,
    pub echo: Option<Echo>,
    /// Of the prompt's tokens, so many of the most likely ones are told.
    pub prompt_logprobs: Option<u32>,
    /// What there is in its text; `None` for text alone.
    pub reply: Option<ReplyFormat>,
    /// Whether each token is told as it comes, whatever its text.
    pub is_told_at_once: bool,
}

/// What a text begins with: its prompt.
#[derive(Clone, Debug)]
pub struct Echo {
    pub text: String,
    /// Whether its tokens have entries like those that follow, with so many alternatives.
    pub logprobs: Option<u32>,
}

/// All choices of an HTTP request, and places for them.
pub struct Jobs {
    pub jobs: Vec<Job>,
    /// As many, or so many of an `in_turn` at a time.
    pub places: Vec<Place>,
    /// Whether the others follow as the first end.
    pub in_turn: bool,
    /// What all their texts follow, once it is compiled.
    pub form: Option<Form>,
}

pub struct Generation {
    /// As its answer has it.
    id: String,
    engine: Fleet,
    choices: Vec<Choice>,
    /// Where the next look for events begins, so that no choice starves another.
    turn: usize,
    /// What is not handed in yet.
    later: Later,
}

struct Choice {
    nth: u32,
    /// `None` once the choice has ended.
    receiver: Option<Receiver<Told>>,
    /// For the log, which would know only what the engine did.
    told_end: ToldEnd,
    num_prompt_tokens: u32,
    /// Of those, what the prefix cache had.
    cached_tokens: u32,
    text: Text,
    last_id: Option<TokenId>,
    num_thought_tokens: u32,
    /// Of those that end it, what the client named.
    named_stop_ids: Vec<TokenId>,
    /// What finds the parts of a text.
    reply: Option<Reply>,
    /// Characters of the prompt, where it is repeated.
    num_echoed: usize,
    /// Of the entries that are pending, those of no text.
    num_unsaid: usize,
    is_told_at_once: bool,
    /// Taken by the first token or the end.
    start: Option<Box<Start>>,
    /// What has not been handed on; text that may belong to a stop string is in `stops`.
    pending: Delta,
}

struct Start {
    request: Arc<Request>,
    /// For the offsets of the prompt's own tokens.
    detokenizer: Detokenizer,
    echo: Option<Echo>,
    /// How many alternatives are told of each token, where that was asked for.
    prompt_logprobs: Option<u32>,
    logprobs: Vec<TokenLogprobs>,
}

impl Jobs {
    /// Of all choices together.
    pub fn num_prompt_tokens(&self) -> usize {
        self.jobs.iter().map(|job| job.request.prompt.len()).sum()
    }

    /// Has all texts follow `grammar`.
    pub fn follow(&mut self, grammar: &Grammar) {
        self.jobs.iter_mut().for_each(|job| Arc::make_mut(&mut job.request).grammar = Some(grammar.clone()));
    }
}

impl Generation {
    /// Hands all jobs to the engine, or none, those first that go in turn; their times count from `arrived` on, and
    /// `trace` is told them.
    pub fn submit(
        model: &ServedModel,
        Jobs { jobs, mut places, in_turn, .. }: Jobs,
        arrived: Instant,
        meter: Option<Arc<Meter>>,
        trace: Option<Trace>,
    ) -> Result<Generation, ApiError> {
        let (mut generation, mut requests) = Generation::open(model, jobs, arrived, meter, trace)?;
        if in_turn {
            generation.later = Later::of(&model.engine, &mut places, &mut requests);
        }
        model.engine.submit(places, requests)?;
        Ok(generation)
    }

    /// Choices that grow by what their sinks are told, and the requests with those sinks, for an engine to run.
    pub fn open(
        model: &ServedModel,
        jobs: Vec<Job>,
        arrived: Instant,
        meter: Option<Arc<Meter>>,
        trace: Option<Trace>,
    ) -> Result<(Generation, Vec<Handed>), ApiError> {
        let id = jobs.first().map(|job| job.request.id.clone()).unwrap_or_default();
        let mut choices = Vec::with_capacity(jobs.len());
        let mut requests = Vec::with_capacity(jobs.len());
        // Checked before channels are made, because their size is the client's word.
        for job in &jobs {
            model.engine.config().fits(&job.request, model.engine.vocab_size())?;
        }
        let mut of_prompt = Arc::new(Choices::new(model.metrics.clone()));
        for (index, job) in jobs.into_iter().enumerate() {
            let (sender, receiver) = channel(job.request.max_tokens as usize + 3);
            if job.nth == 0 {
                of_prompt = Arc::new(Choices::new(model.metrics.clone()));
            }
            let observer = Observer::new(of_prompt.clone(), &job.request, arrived, trace.clone());
            let choice = Choice::new(model, index, &job, receiver, observer.told_end());
            let ahead = (!job.stops.is_empty()).then(|| choice.text.clone());
            let sink = ChannelSink::new(sender, observer, meter.clone(), job.request.prompt.len() as u32, ahead);
            choices.push(choice);
            requests.push((job.request, Box::new(sink) as Box<dyn Sink>));
        }
        let later = Later::default();
        Ok((Generation { id, engine: model.engine.clone(), choices, turn: 0, later }, requests))
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn num_choices(&self) -> usize {
        self.choices.len()
    }

    /// Whether the engine has all of it, so that what it was read from may go.
    pub fn is_handed_in(&self) -> bool {
        self.later.is_empty()
    }

    /// The prompt of the first choice, until that has begun.
    pub fn prompt(&self) -> &[TokenId] {
        self.choices.first().and_then(|choice| choice.start.as_ref()).map_or(&[], |start| &start.request.prompt)
    }

    /// Until now.
    pub fn usage(&self) -> Usage {
        let first_choices = || self.choices.iter().filter(|choice| choice.nth == 0);
        Usage {
            prompt_tokens: first_choices().map(|choice| choice.num_prompt_tokens).sum(),
            completion_tokens: self.choices.iter().map(|choice| choice.text.num_tokens()).sum(),
            cached_tokens: first_choices().map(|choice| choice.cached_tokens).sum(),
            reasoning_tokens: self.choices.iter().map(|choice| choice.num_thought_tokens).sum(),
        }
    }

    pub async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// The next piece of any choice; `None` when all have ended.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Delta, ApiError>>> {
        let num_choices = self.choices.len();
        let num_open = || self.choices.iter().filter(|choice| choice.receiver.is_some()).count();
        if !self.later.is_empty() {
            let handed_in = self.later.hand_in(&self.engine, num_open(), context);
            if let Err(error) = handed_in {
                self.fail();
                return Poll::Ready(Some(Err(self.error(error))));
            }
        }
        for look in 0..num_choices {
            let index = (self.turn + look) % num_choices;
            if let Poll::Ready(delta) = self.choices[index].poll_delta(context) {
                self.turn = index + 1;
                return Poll::Ready(Some(delta.map_err(|error| {
                    self.fail();
                    self.error(error)
                })));
            }
        }
        let ended = self.choices.iter().all(|choice| choice.receiver.is_none());
        if ended { Poll::Ready(None) } else { Poll::Pending }
    }

    /// An error ends all choices, and no client has left them.
    pub fn fail(&mut self) {
        for choice in &self.choices {
            // One that has ended well stays so.
            let _ = choice.told_end.set((End::Error, choice.text.num_tokens()));
        }
    }

    fn error(&self, error: ApiError) -> ApiError {
        match self.engine.stopped() {
            Some(reason) => ApiError::unavailable(&format!("the engine has stopped: {reason}")),
            None => error,
        }
    }
}

impl Choice {
    fn new(model: &ServedModel, index: usize, job: &Job, receiver: Receiver<Told>, told_end: ToldEnd) -> Choice {
        let reply = job.reply.clone().map(Reply::new);
        let text = Text::new(model, job);
        let named_stop_ids = job.request.stop_ids.iter().filter(|id| !model.stop_ids.contains(id));
        Choice {
            nth: job.nth,
            receiver: Some(receiver),
            told_end,
            num_prompt_tokens: job.request.prompt.len() as u32,
            cached_tokens: 0,
            text,
            last_id: None,
            num_thought_tokens: 0,
            named_stop_ids: named_stop_ids.copied().collect(),
            reply,
            num_echoed: 0,
            num_unsaid: 0,
            is_told_at_once: job.is_told_at_once,
            start: Some(Box::new(Start {
                request: job.request.clone(),
                detokenizer: Detokenizer::new(model.tokenizer.clone()).with_special(true),
                echo: job.echo.clone(),
                prompt_logprobs: job.prompt_logprobs,
                logprobs: Vec::new(),
            })),
            pending: Delta { index, ..Delta::default() },
        }
    }

    /// Ready with the next piece; pending while there is none, and for good once the choice has ended.
    fn poll_delta(&mut self, context: &mut Context<'_>) -> Poll<Result<Delta, ApiError>> {
        while let Some(receiver) = &mut self.receiver {
            let Poll::Ready(told) = receiver.poll_recv(context) else { break };
            // With the last event comes who watched, and is dropped once the client's end of it is known.
            let Some(Told { event, observer: _observer }) = told else {
                return Poll::Ready(Err(ApiError::internal("the engine ended")));
            };
            if let Some(delta) = self.take(event).transpose() {
                return Poll::Ready(delta);
            }
        }
        Poll::Pending
    }

    fn take(&mut self, event: Event) -> Result<Option<Delta>, ApiError> {
        match event {
            Event::Started { cached_tokens } => {
                self.cached_tokens = cached_tokens;
                Ok(None)
            }
            Event::Prompt(logprobs) => {
                if let Some(start) = &mut self.start {
                    start.logprobs = logprobs;
                }
                Ok(None)
            }
            Event::Pooled(vector) => {
                self.pending.pooled = vector;
                Ok(None)
            }
            Event::Token { id, logprobs } => {
                self.begin();
                Ok(self.take_token(id, logprobs))
            }
            Event::Finished { reason: FinishReason::Error(sentence), .. } => Err(ApiError::internal(sentence)),
            Event::Finished { reason: FinishReason::Contradiction(sentence), .. } => {
                Err(ApiError::invalid("allowed_token_ids", sentence))
            }
            Event::Finished { reason: FinishReason::DeviceLost(sentence), .. } => Err(ApiError::not_yet(&sentence)),
            Event::Finished { reason, .. } => {
                self.begin();
                let scan = self.text.finish();
                self.say(&scan.text);
                let stopped = scan.stopped || reason == FinishReason::Stop;
                Ok(Some(self.end(if stopped { "stop" } else { "length" })))
            }
        }
    }

    /// Puts what belongs before the first token.
    fn begin(&mut self) {
        let Some(mut start) = self.start.take() else { return };
        if let Some(num_top) = start.prompt_logprobs {
            self.pending.prompt_logprobs = start.logprobs.iter().map(|logprobs| with_top(logprobs, num_top)).collect();
        }
        if let Some(num_top) = start.echo.as_ref().and_then(|echo| echo.logprobs) {
            let mut logprobs = start.logprobs.iter().map(|logprobs| with_top(logprobs, num_top));
            for (index, &id) in start.request.prompt.iter().enumerate() {
                let logprobs = if index == 0 { None } else { logprobs.next() };
                self.pending.entries.push(Entry { id, offset: self.num_echoed, is_said: false, logprobs });
                self.num_echoed += start.detokenizer.push(id).chars().count();
            }
        }
        if let Some(echo) = start.echo {
            self.num_echoed = echo.text.chars().count();
            self.pending.text = echo.text;
        }
        self.pending.request = Some(start.request);
    }

    fn take_token(&mut self, id: TokenId, logprobs: Option<TokenLogprobs>) -> Option<Delta> {
        self.last_id = Some(id);
        self.pending.token_ids.push(id);
        if logprobs.is_some() {
            let offset = self.num_echoed + self.text.num_chars();
            self.pending.entries.push(Entry { id, offset, is_said: false, logprobs });
        }
        let scan = self.text.push(id);
        let has_thought = self.is_thinking();
        self.say(&scan.text);
        self.num_thought_tokens += u32::from(has_thought || self.is_thinking());
        if self.pending.text.is_empty() && self.reply.as_ref().is_some_and(Reply::is_layout) {
            self.num_unsaid = self.pending.entries.len();
        }
        if scan.stopped {
            return Some(self.end("stop"));
        }
        let Delta { text, reasoning, calls, .. } = &self.pending;
        let has_text = !text.is_empty() || !reasoning.is_empty() || !calls.is_empty();
        (has_text || self.is_told_at_once).then(|| self.flush())
    }

    fn is_thinking(&self) -> bool {
        self.reply.as_ref().is_some_and(Reply::is_thinking)
    }

    /// Takes text that is safe to send.
    fn say(&mut self, text: &str) {
        match &mut self.reply {
            Some(reply) => {
                let pieces = reply.push(text);
                self.pending.take(pieces);
            }
            None => self.pending.text += text,
        }
    }

    /// The last piece; the engine hears of it by the closed channel, if it does not know.
    fn end(&mut self, mut finish_reason: &'static str) -> Delta {
        let told = if finish_reason == "length" { End::Length } else { End::Stop };
        let _ = self.told_end.set((told, self.text.num_tokens()));
        self.receiver = None;
        if let Some(reply) = &mut self.reply {
            let is_whole = finish_reason == "stop" && self.text.stop().is_none();
            let pieces = reply.finish(is_whole);
            self.pending.take(pieces);
            if finish_reason == "stop" {
                finish_reason = reply.finish_reason();
            }
        }
        let stop = self.text.stop().map(str::to_owned);
        let stop_id = self.last_id.filter(|id| stop.is_none() && self.named_stop_ids.contains(id));
        Delta { finish_reason: Some(finish_reason), stop, stop_id, ..self.flush() }
    }

    fn flush(&mut self) -> Delta {
        let has_text = !self.pending.text.is_empty();
        let num_unsaid = std::mem::take(&mut self.num_unsaid);
        for entry in self.pending.entries.iter_mut().skip(num_unsaid) {
            // With what ends a text may come what was held back, which it did not say.
            entry.is_said = has_text && !self.text.is_end(entry.id);
        }
        let empty = Delta { index: self.pending.index, ..Delta::default() };
        std::mem::replace(&mut self.pending, empty)
    }
}

/// The same with fewer alternatives.
fn with_top(logprobs: &TokenLogprobs, num_top: u32) -> TokenLogprobs {
    let top = logprobs.top.iter().take(num_top as usize).copied().collect();
    TokenLogprobs { top, ..*logprobs }
}
