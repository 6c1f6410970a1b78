//! What rows under a grammar cost the rows beside them: the rate of the same free answers in a batch where all are
//! free, and in one where some follow a schema, turn and turn about in one engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use fullbore_engine::backend::DeviceError;
use fullbore_engine::config::UnfitRequest;
use fullbore_engine::engine::Engine;
use fullbore_engine::grammar::Grammar;
use fullbore_engine::request::{Event, Flow, Request, Sink};

use crate::statistics::median;
use crate::workload::{Arrivals, Lengths, generate};

/// A schema as clients have them, long enough that no answer ends in a round.
pub const SCHEMA: &str = r#"{"type": "array", "minItems": 60, "items": {"type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["fruit", "herb", "nut"]},
        "weight": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["name", "kind", "weight"], "additionalProperties": false}}"#;

#[derive(Clone, Copy, Debug)]
pub struct GrammarOptions {
    pub num_seqs: u32,
    /// Of those, how many follow the grammar.
    pub num_constrained: u32,
    pub prompt_tokens: u32,
    pub num_steps: u32,
    pub num_rounds: u32,
}

/// What the rounds measured.
#[derive(Clone, Debug, serde::Serialize)]
pub struct GrammarReport {
    pub num_seqs: u32,
    pub num_constrained: u32,
    pub num_steps: u32,
    pub num_rounds: u32,
    /// Tokens a second of the rows that are free in both, in the median of the rounds.
    pub tokens_per_s_beside_free: f64,
    pub tokens_per_s_beside_constrained: f64,
    /// The second to the first, round by round: the median, and the ends.
    pub ratio: f64,
    pub ratio_least: f64,
    pub ratio_most: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum GrammarBenchError {
    #[error("--constrained {num_constrained} leaves none of {num_seqs} sequences free; take fewer")]
    NoneFree { num_seqs: u32, num_constrained: u32 },
    #[error(transparent)]
    Unfit(#[from] UnfitRequest),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("an answer ended before its round had; take fewer --steps")]
    Ended,
}

/// Steps before a rate is taken, once all prompts are in.
const WARM_UP_TOKENS: u64 = 4;

pub fn measure(
    engine: &mut Engine,
    grammar: &Grammar,
    options: &GrammarOptions,
) -> Result<GrammarReport, GrammarBenchError> {
    let GrammarOptions { num_seqs, num_constrained, num_steps, num_rounds, .. } = *options;
    if num_constrained >= num_seqs {
        return Err(GrammarBenchError::NoneFree { num_seqs, num_constrained });
    }
    // Once before: what is compiled or cached at the first use is no part of a round.
    rate(engine, Some(grammar), options, 0)?;
    let (mut beside_free, mut beside_constrained, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..num_rounds {
        // What drifts meanwhile favours neither.
        let order = if round % 2 == 0 { [None, Some(grammar)] } else { [Some(grammar), None] };
        let mut pair = [0.0; 2];
        for (nth, grammar) in order.into_iter().enumerate() {
            let seed = u64::from(1 + 2 * round) + nth as u64;
            pair[usize::from(grammar.is_some())] = rate(engine, grammar, options, seed)?;
        }
        beside_free.push(pair[0]);
        beside_constrained.push(pair[1]);
        ratios.push(pair[1] / pair[0]);
    }
    Ok(GrammarReport {
        num_seqs,
        num_constrained,
        num_steps,
        num_rounds,
        tokens_per_s_beside_free: median(&mut beside_free).unwrap_or(0.0),
        tokens_per_s_beside_constrained: median(&mut beside_constrained).unwrap_or(0.0),
        ratio: median(&mut ratios).unwrap_or(0.0),
        ratio_least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        ratio_most: ratios.iter().copied().fold(0.0, f64::max),
    })
}

/// Tokens a second of the free rows while all sequences generate.
fn rate(
    engine: &mut Engine,
    grammar: Option<&Grammar>,
    options: &GrammarOptions,
    seed: u64,
) -> Result<f64, GrammarBenchError> {
    let GrammarOptions { num_seqs, num_constrained, prompt_tokens, num_steps, .. } = *options;
    let max_tokens = engine.config().max_model_len.saturating_sub(prompt_tokens);
    let lengths = Lengths::Fixed { prompt: prompt_tokens, output: max_tokens };
    let planned = generate(Arrivals::AtOnce, lengths, num_seqs, seed);
    let vocab_size = engine.model().config.vocab_size;
    let round = Arc::new(Round::default());
    let mut counts = Vec::new();
    for (index, request) in (0..).zip(planned.iter().map(|of| of.request(vocab_size, seed))) {
        let grammar = grammar.filter(|_| index < num_constrained).cloned();
        let request = Request { grammar, ..request };
        engine.config().fits(&request, vocab_size)?;
        let count = Arc::new(AtomicU64::new(0));
        counts.push(count.clone());
        engine.add(request, Box::new(Counter { round: round.clone(), count }));
    }
    let told = |count: &Arc<AtomicU64>| count.load(Ordering::Relaxed);
    while counts.iter().map(told).min().unwrap_or(0) < WARM_UP_TOKENS && !round.has_ended() {
        engine.step()?;
    }
    let free = || counts[num_constrained as usize..].iter().map(told).sum::<u64>();
    let (before, start) = (free(), Instant::now());
    for _ in 0..num_steps {
        engine.step()?;
    }
    let rate = (free() - before) as f64 / start.elapsed().as_secs_f64();
    let has_ended = round.has_ended();
    round.closed.store(true, Ordering::Relaxed);
    while engine.step()? {}
    if has_ended { Err(GrammarBenchError::Ended) } else { Ok(rate) }
}

#[derive(Default)]
struct Round {
    closed: AtomicBool,
    ended: AtomicBool,
}

impl Round {
    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

struct Counter {
    round: Arc<Round>,
    count: Arc<AtomicU64>,
}

impl Sink for Counter {
    fn event(&mut self, event: Event) -> Flow {
        match event {
            Event::Token { .. } => drop(self.count.fetch_add(1, Ordering::Relaxed)),
            Event::Finished { .. } => self.round.ended.store(true, Ordering::Relaxed),
            Event::Started { .. } | Event::Prompt(_) | Event::Pooled(_) => {}
        }
        if self.is_closed() { Flow::Stop } else { Flow::Continue }
    }

    fn is_closed(&self) -> bool {
        self.round.closed.load(Ordering::Relaxed)
    }
}
