//! Watches sequences for the metrics, the log and traces. Invariant: a sequence is counted and logged once, as its
//! client was told that it ended, and in the histograms where it ended well; times are taken where the engine hands its
//! events over, so that a client that reads slowly lengthens nothing.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fullbore_engine::request::{Event, FinishReason, Request};
use prometheus::Histogram;

use super::Choices;
use crate::traces::{EndedSequence, Trace};

/// Set by who reads a sequence's events: how it ended for its client, and after how many tokens. The engine may have
/// gone on.
pub type ToldEnd = Arc<OnceLock<(End, u32)>>;

/// Watches one sequence's events. Dropped by who is last of the engine and the reader, it counts how it ended and
/// leaves a line in the log: before the engine's end a client has left, unless somebody has told why.
pub struct Observer {
    /// It is one of these.
    choices: Arc<Choices>,
    /// As clients know it; choices of one request share it.
    request: String,
    num_prompt_tokens: usize,
    max_tokens: u32,
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    cached_tokens: u32,
    num_tokens: u32,
    told_end: ToldEnd,
    /// By the engine.
    ended: Option<(End, Instant)>,
    /// Where somebody collects traces.
    trace: Option<Trace>,
}

impl Observer {
    pub fn new(choices: Arc<Choices>, request: &Request, arrived: Instant, trace: Option<Trace>) -> Observer {
        choices.count();
        choices.metrics().count_begin();
        Observer {
            choices,
            request: request.id.clone(),
            num_prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens,
            arrived,
            started: None,
            first_token: None,
            last_token: None,
            cached_tokens: 0,
            num_tokens: 0,
            told_end: ToldEnd::default(),
            ended: None,
            trace,
        }
    }

    /// To be set by who tells the client: of an error there the engine sees only that the sequence is left.
    pub fn told_end(&self) -> ToldEnd {
        self.told_end.clone()
    }

    pub fn event(&mut self, event: &Event) {
        let now = Instant::now();
        match event {
            Event::Started { cached_tokens } => {
                self.started = Some(now);
                self.cached_tokens = *cached_tokens;
                self.choices.metrics().count_start(self.num_prompt_tokens, *cached_tokens);
            }
            Event::Prompt(_) | Event::Pooled(_) => {}
            Event::Token { .. } => {
                self.num_tokens += 1;
                match self.last_token.replace(now) {
                    Some(last) => observe(&self.choices.metrics().next_token, now - last),
                    None => self.first_token(now),
                }
            }
            Event::Finished { reason, .. } => {
                self.ended = Some((reason.into(), now));
                self.choices.metrics().count_left();
            }
        }
    }

    fn first_token(&mut self, now: Instant) {
        self.first_token = Some(now);
        let metrics = self.choices.metrics();
        observe(&metrics.first_token, now - self.arrived);
        metrics.count_prompt(self.num_prompt_tokens, self.cached_tokens);
    }

    fn ended_well(&self, num_tokens: u32, now: Instant) {
        let (started, first_token) = (self.started.unwrap_or(now), self.first_token.unwrap_or(now));
        let metrics = self.choices.metrics();
        let decode = now - first_token;
        observe(&metrics.queue, started - self.arrived);
        observe(&metrics.prefill, first_token - started);
        observe(&metrics.decode, decode);
        observe(&metrics.inference, now - started);
        observe(&metrics.whole, now - self.arrived);
        let num_later_tokens = self.num_tokens.saturating_sub(1);
        observe(&metrics.each_token, if num_later_tokens == 0 { Duration::ZERO } else { decode / num_later_tokens });
        metrics.prompt_tokens.observe(self.num_prompt_tokens as f64);
        metrics.computed_tokens.observe(self.num_prompt_tokens as f64 - f64::from(self.cached_tokens));
        metrics.generated_tokens.observe(f64::from(num_tokens));
        metrics.max_tokens.observe(f64::from(self.max_tokens));
        self.choices.ended_well(num_tokens);
        if self.first_token.is_none() {
            // Nothing was to be said to it.
            metrics.count_prompt(self.num_prompt_tokens, self.cached_tokens);
        }
    }

    fn end(&mut self, end: End, num_tokens: u32, now: Instant) {
        if matches!(end, End::Stop | End::Length) {
            self.ended_well(num_tokens, now);
        }
        let metrics = self.choices.metrics();
        metrics.count_end(end.finished_reason(), end.phase());
        let since_arrival = |then: Instant| (then - self.arrived).as_millis() as u64;
        tracing::info!(
            target: "fullbore::request",
            model = metrics.model,
            request = self.request,
            reason = end.name(),
            phase = end.phase(),
            prompt_tokens = self.num_prompt_tokens,
            cached_tokens = self.cached_tokens,
            generated_tokens = num_tokens,
            queue_ms = self.started.map(since_arrival),
            first_token_ms = self.first_token.map(since_arrival),
            total_ms = since_arrival(now),
            "finished"
        );
        if let Some(trace) = self.trace.take() {
            trace.end(self.ended(end, num_tokens, now));
        }
    }

    fn ended(&self, end: End, num_tokens: u32, ended: Instant) -> EndedSequence {
        EndedSequence {
            request: self.request.clone(),
            arrived: self.arrived,
            started: self.started,
            first_token: self.first_token,
            ended,
            reason: end.name(),
            has_failed: matches!(end, End::Error | End::DeviceLost),
            prompt_tokens: self.num_prompt_tokens as u64,
            cached_tokens: u64::from(self.cached_tokens),
            generated_tokens: u64::from(num_tokens),
        }
    }

    /// What the sequence is at.
    fn phase(&self) -> &'static str {
        match (self.started, self.first_token) {
            (None, _) => "queue",
            (Some(_), None) => "prefill",
            (Some(_), Some(_)) => "decode",
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        let (end, ended) = self.ended.unwrap_or_else(|| {
            self.choices.metrics().count_left();
            (End::Aborted(self.phase()), Instant::now())
        });
        let (end, num_tokens) = self.told_end.get().copied().unwrap_or((end, self.num_tokens));
        self.end(end, num_tokens, ended);
    }
}

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Stop,
    Length,
    /// Its client left while it was at this.
    Aborted(&'static str),
    Error,
    DeviceLost,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            End::Stop => "stop",
            End::Length => "length",
            End::Aborted(_) => "aborted",
            End::Error => "error",
            End::DeviceLost => "device_lost",
        }
    }

    /// As vLLM has it.
    fn finished_reason(self) -> &'static str {
        match self {
            End::Aborted(_) => "abort",
            End::DeviceLost => "error",
            end => end.name(),
        }
    }

    fn phase(self) -> Option<&'static str> {
        if let End::Aborted(phase) = self { Some(phase) } else { None }
    }
}

impl From<&FinishReason> for End {
    fn from(reason: &FinishReason) -> End {
        match reason {
            FinishReason::Stop => End::Stop,
            FinishReason::Length => End::Length,
            FinishReason::Error(_) | FinishReason::Contradiction(_) => End::Error,
            FinishReason::DeviceLost(_) => End::DeviceLost,
        }
    }
}

fn observe(histogram: &Histogram, time: Duration) {
    histogram.observe(time.as_secs_f64());
}
