//! What a text must follow, token by token: the one place that knows `llguidance`.
//!
//! Invariant: a [`Matcher`] knows every token of its sequence's text, in order, and says which may come next. It never
//! gives a mask that it is not sure of: what goes wrong is an error, and the request ends with it. Each sequence has
//! lexer states of its own, so that none can fail another. Compiled off the engine's thread, by [`GrammarCompiler`];
//! knows no request and no device.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use crate::request::TokenId;

mod cache;
mod compile;
mod vocabulary;

pub use compile::{GrammarCompiler, GrammarError};

/// A grammar as it is written.
#[derive(Clone, Debug, PartialEq)]
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
            GrammarSource::JsonSchema(schema) => format!("%json {}", compile::with_json_options(schema.clone())),
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
    fresh: llguidance::Matcher,
    vocab_size: u32,
}

/// Whether a token may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Goes,
    Ended,
}

/// A grammar at some point of one text.
pub struct Matcher {
    inner: llguidance::Matcher,
    vocab_size: u32,
    ended: bool,
}

impl Grammar {
    /// The grammar at the beginning of a text.
    pub fn matcher(&self) -> Matcher {
        Matcher { inner: self.0.fresh.deep_clone(), vocab_size: self.0.vocab_size, ended: false }
    }
}

impl Matcher {
    /// Takes the next token of the text.
    pub fn advance(&mut self, token: TokenId) -> Result<Progress, String> {
        self.inner.consume_token(token.0).map_err(|error| self.sentence(&error.to_string()))?;
        self.ended = self.inner.is_stopped();
        match self.inner.stop_reason() {
            reason if !reason.is_ok() => Err(self.sentence(&reason.to_string())),
            _ if self.ended => Ok(Progress::Ended),
            _ => Ok(Progress::Goes),
        }
    }

    /// Writes which tokens may come next, a bit each; at least one may.
    pub fn mask(&mut self, mask: &mut [u32]) -> Result<(), String> {
        assert_eq!(mask.len(), self.vocab_size.div_ceil(32) as usize, "a bit for each token");
        let allowed = self.inner.compute_mask().map_err(|error| self.sentence(&error.to_string()))?;
        mask.fill(0);
        mask.iter_mut().zip(allowed.as_slice()).for_each(|(word, bits)| *word = *bits);
        let rest = self.vocab_size % 32;
        if let Some(last) = mask.last_mut().filter(|_| rest > 0) {
            // Here an end that the vocabulary has no token for may have its bit.
            *last &= (1 << rest) - 1;
        }
        match mask.iter().any(|word| *word != 0) {
            true => Ok(()),
            false => Err(self.sentence(compile::NOTHING_FOLLOWS)),
        }
    }

    /// Whether nothing may follow any more.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    fn sentence(&self, problem: &str) -> String {
        format!("the grammar of this request cannot be followed further: {}", compile::first_line(problem))
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("vocab_size", &self.0.vocab_size).finish_non_exhaustive()
    }
}
