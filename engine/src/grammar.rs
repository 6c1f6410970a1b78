//! What a text must follow, token by token: the one place that knows `llguidance`.
//!
//! Invariant: a [`Matcher`] knows every token of its sequence's text, in order, and says which may come next. It never
//! gives a mask that it is not sure of: what goes wrong is an error, and the request ends with it. Each sequence has
//! lexer states of its own, so that none can fail another; they are copied with its first mask, so that who waits has
//! none, and are [`MAX_MATCHER_BYTES`] at most. Compiled off the engine's thread, by [`GrammarCompiler`], strangers'
//! after a trial in a process that can be stopped, a [`sandbox`]; knows no request and no device.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::TokenParser;
use llguidance::api::StopReason;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::request::TokenId;

mod build;
mod cache;
mod compile;
pub mod sandbox;
mod vocabulary;

pub use compile::{CheckedSource, Compilation, GrammarCompiler, GrammarError};

/// A grammar as it is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum GrammarSource {
    /// A schema of JSON, an object.
    JsonSchema(Value),
    Regex(String),
    /// In llguidance's Lark.
    Lark(String),
}

impl GrammarSource {
    /// All of it as one part of a rule of Lark.
    pub fn expression(&self) -> String {
        match self {
            GrammarSource::JsonSchema(schema) => format!("%json {}", build::with_json_options(schema.clone())),
            GrammarSource::Regex(regex) => format!("/{}/", llguidance::regex_to_lark(regex, "")),
            GrammarSource::Lark(lark) => format!("%lark {{\n{lark}\n}}"),
        }
    }
}

/// A compiled grammar; clones share it.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    /// At the beginning of a text, its first mask computed.
    fresh: TokenParser,
    /// What a copy of it takes.
    num_bytes: usize,
    vocab_size: u32,
}

/// Lexer states of one sequence at most; they grow as its text goes where none has gone.
pub const MAX_MATCHER_BYTES: usize = 10 << 20;

/// Whether a token may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Goes,
    Ended,
}

/// A grammar at some point of one text.
pub struct Matcher {
    grammar: Grammar,
    state: State,
    num_bytes: usize,
}

enum State {
    /// No mask was asked for.
    Fresh,
    At(Box<TokenParser>),
    Ended,
    /// Why no mask is sure to be right any more.
    Failed(String),
}

impl Grammar {
    /// The grammar at the beginning of a text.
    pub fn matcher(&self) -> Matcher {
        Matcher { grammar: self.clone(), state: State::Fresh, num_bytes: self.num_bytes() }
    }

    /// What a matcher takes from its first mask on, before it grows.
    pub fn num_bytes(&self) -> usize {
        self.0.num_bytes
    }
}

impl Matcher {
    /// Takes the next token of the text.
    pub fn advance(&mut self, token: TokenId) -> Result<Progress, String> {
        let reason = self.run(|parser| {
            let num_taken_back = parser.consume_token(token.0).map_err(problem)?;
            assert_eq!(num_taken_back, 0, "nothing is taken back");
            parser.check_stop().map_err(problem)?;
            Ok(parser.stop_reason())
        })?;
        match reason {
            StopReason::NotStopped => Ok(Progress::Goes),
            reason if reason.is_ok() => {
                self.state = State::Ended;
                Ok(Progress::Ended)
            }
            reason => Err(self.fail(&reason.to_string())),
        }
    }

    /// Writes which tokens may come next, a bit each; at least one may.
    pub fn mask(&mut self, mask: &mut [u32]) -> Result<(), String> {
        let vocab_size = self.grammar.0.vocab_size;
        assert_eq!(mask.len(), vocab_size.div_ceil(32) as usize, "a bit for each token");
        let (allowed, num_bytes) = self.run(|parser| {
            let allowed = parser.compute_mask().map_err(problem)?;
            Ok((allowed, parser.parser.lexer_stats().num_bytes))
        })?;
        self.num_bytes = num_bytes;
        if num_bytes > MAX_MATCHER_BYTES {
            return Err(self.fail(&format!("its states take more than {MAX_MATCHER_BYTES} bytes; make it simpler")));
        }
        mask.fill(0);
        mask.iter_mut().zip(allowed.as_slice()).for_each(|(word, bits)| *word = *bits);
        let rest = vocab_size % 32;
        if let Some(last) = mask.last_mut().filter(|_| rest > 0) {
            // Here an end that the vocabulary has no token for may have its bit.
            *last &= (1 << rest) - 1;
        }
        match mask.iter().any(|word| *word != 0) {
            true => Ok(()),
            false => Err(self.fail(build::NOTHING_FOLLOWS)),
        }
    }

    /// Whether nothing may follow any more.
    pub fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// What it takes, or will with its first mask.
    pub fn num_bytes(&self) -> usize {
        match self.state {
            State::Fresh | State::At(_) => self.num_bytes,
            State::Ended | State::Failed(_) => 0,
        }
    }

    /// Does `work`; what goes wrong once is wrong for good.
    fn run<T>(&mut self, work: impl FnOnce(&mut TokenParser) -> Result<T, String>) -> Result<T, String> {
        let Matcher { grammar, state, .. } = self;
        let worked = catch_unwind(AssertUnwindSafe(|| {
            if let State::Fresh = state {
                *state = State::At(Box::new(grammar.0.fresh.deep_clone()));
            }
            match state {
                State::At(parser) => work(parser),
                State::Failed(sentence) => Err(sentence.clone()),
                State::Fresh | State::Ended => Err("nothing may follow its end".to_owned()),
            }
        }));
        // The panic's message is in the log already.
        let worked = worked.unwrap_or_else(|_| Err("what follows it met a bug of its own".to_owned()));
        worked.map_err(|problem| self.fail(&problem))
    }

    fn fail(&mut self, problem: &str) -> String {
        if !matches!(self.state, State::Failed(_)) {
            self.state = State::Failed(problem.to_owned());
        }
        format!("the grammar of this request cannot be followed further: {problem}")
    }
}

fn problem(error: impl ToString) -> String {
    build::first_line(&error.to_string()).to_owned()
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("vocab_size", &self.0.vocab_size).finish_non_exhaustive()
    }
}
