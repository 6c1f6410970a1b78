//! From the source of a grammar to one that can be followed, for strangers' sources.
//!
//! Invariant: whoever asks has an answer after [`DEADLINE`], twice that where there is a sandbox. A source is bounded
//! in size and nesting before it is tried; in a sandbox what takes longer is stopped, and without one it goes on for
//! as long as it takes. How many run at a time, late ones included, is the caller's to see to, by what it has them
//! hold. An error is a sentence about the source, and nothing half compiled is ever given.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::build::{Builder, STACK_BYTES};
use super::cache::Cache;
use super::sandbox::{Sandbox, Trials};
use super::vocabulary::Vocabulary;
use super::{Grammar, GrammarSource};
use crate::deadline::{Lost, with_deadline};
use crate::request::TokenId;
use crate::text::Tokenizer;

/// For a grammar from its source to its first mask.
const DEADLINE: Duration = Duration::from_secs(2);
const MAX_SCHEMA_BYTES: usize = 64 << 10;
/// Of a regex or of Lark, which may hold the schemas of many tools.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Levels of a schema's JSON.
const MAX_SCHEMA_DEPTH: usize = 32;
/// Brackets of all kinds within each other in a regex or a Lark grammar.
const MAX_NESTING: usize = 200;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum GrammarError {
    #[error("{0}")]
    Invalid(String),
    #[error("its {num_bytes} bytes are over {max_bytes}")]
    TooLarge { num_bytes: usize, max_bytes: usize },
    #[error("it is nested {depth} levels deep, and {max_depth} are taken")]
    TooDeep { depth: usize, max_depth: usize },
    #[error("its states take {num_bytes} bytes before the first token, and {max_bytes} are taken; make it simpler")]
    TooManyStates { num_bytes: usize, max_bytes: usize },
    #[error("it takes longer than {deadline:?} to compile; make it simpler")]
    TooSlow { deadline: Duration },
    #[error("it takes more memory to compile than it may have; make it simpler")]
    TooMuchMemory,
    /// No fault of the source's; the same may succeed later.
    #[error("it was not compiled: {0}")]
    NotStarted(String),
}

/// A source that is within its limits.
#[derive(Clone, Debug)]
pub struct CheckedSource {
    source: GrammarSource,
    key: Arc<str>,
}

pub type Compilation = Result<Grammar, GrammarError>;

/// Compiles grammars for one tokenizer.
pub struct GrammarCompiler {
    tokenizer: Arc<Tokenizer>,
    stop_ids: Vec<TokenId>,
    /// Of the model, which may have more than the tokenizer's.
    vocab_size: u32,
    /// Made for the first grammar.
    builder: OnceLock<Result<Arc<Builder>, GrammarError>>,
    cache: Mutex<Cache<Compilation>>,
    num_compiled: AtomicU64,
    trials: Option<Arc<Trials>>,
}

impl GrammarCompiler {
    /// Texts end with one of `stop_ids`.
    pub fn new(tokenizer: Arc<Tokenizer>, stop_ids: Vec<TokenId>, vocab_size: u32) -> GrammarCompiler {
        GrammarCompiler {
            tokenizer,
            stop_ids,
            vocab_size,
            builder: OnceLock::new(),
            cache: Mutex::default(),
            num_compiled: AtomicU64::new(0),
            trials: None,
        }
    }

    /// The same, for strangers' sources: each is tried in `sandbox` first.
    pub fn with_sandbox(self, sandbox: Sandbox) -> GrammarCompiler {
        let (tokenizer, stop_ids, vocab_size) = (self.tokenizer.clone(), self.stop_ids.clone(), self.vocab_size);
        let trials = Trials::new(sandbox, move || Vocabulary::new(&tokenizer, &stop_ids, vocab_size));
        GrammarCompiler { trials: Some(trials), ..self }
    }

    /// Blocks until the grammar is compiled, or known, or will not be in time.
    pub fn compile(&self, source: &GrammarSource) -> Compilation {
        self.compile_checked(&source.clone().check()?, ())
    }

    /// The same; `held` is dropped when nothing works on it any more, which may be later.
    pub fn compile_checked<T: Send + 'static>(&self, source: &CheckedSource, held: T) -> Compilation {
        let slot = lock(&self.cache).slot(&source.key);
        let made = slot.get_or_init(|| self.make(source, held)).clone();
        if let Err(GrammarError::TooSlow { .. } | GrammarError::NotStarted(_)) = &made {
            lock(&self.cache).forget(&source.key);
        }
        made
    }

    /// What came of this source, where it was compiled lately.
    pub fn known(&self, source: &CheckedSource) -> Option<Compilation> {
        lock(&self.cache).known(&source.key)
    }

    /// Compilations that were begun.
    pub fn num_compiled(&self) -> u64 {
        self.num_compiled.load(Ordering::Relaxed)
    }

    fn make<T: Send + 'static>(&self, source: &CheckedSource, held: T) -> Compilation {
        // Once for the tokenizer, whatever it takes: no fault of this grammar.
        let builder = self.builder()?;
        self.num_compiled.fetch_add(1, Ordering::Relaxed);
        if let Some(trials) = &self.trials {
            trials.try_source(&source.source, DEADLINE)?;
        }
        let grammar = source.source.clone();
        let work = move || {
            let _held = held;
            builder.build(grammar)
        };
        match with_deadline("grammar", STACK_BYTES, DEADLINE, work) {
            Ok(Ok((grammar, num_bytes))) => {
                lock(&self.cache).measured(&source.key, num_bytes);
                Ok(grammar)
            }
            Ok(Err(error)) => Err(error),
            Err(Lost::Late(_)) => Err(GrammarError::TooSlow { deadline: DEADLINE }),
            // It would meet it again.
            Err(Lost::Failed(problem)) => Err(GrammarError::Invalid(problem)),
            Err(Lost::NotStarted(problem)) => Err(GrammarError::NotStarted(problem)),
        }
    }

    fn builder(&self) -> Result<Arc<Builder>, GrammarError> {
        let vocabulary = || Vocabulary::new(&self.tokenizer, &self.stop_ids, self.vocab_size);
        self.builder.get_or_init(|| Builder::new(&vocabulary()).map(Arc::new)).clone()
    }
}

impl GrammarSource {
    /// Refuses what is too large or too deep to be tried.
    pub fn check(self) -> Result<CheckedSource, GrammarError> {
        let (depth, max_depth) = match &self {
            GrammarSource::JsonSchema(schema) => (depth(schema), MAX_SCHEMA_DEPTH),
            GrammarSource::Regex(text) | GrammarSource::Lark(text) => (nesting(text), MAX_NESTING),
        };
        if depth > max_depth {
            return Err(GrammarError::TooDeep { depth, max_depth });
        }
        // Written after that, for writing nests too.
        let (kind, text, max_bytes) = match &self {
            GrammarSource::JsonSchema(schema) => ("json", &schema.to_string(), MAX_SCHEMA_BYTES),
            GrammarSource::Regex(regex) => ("regex", regex, MAX_SOURCE_BYTES),
            GrammarSource::Lark(lark) => ("lark", lark, MAX_SOURCE_BYTES),
        };
        if text.len() > max_bytes {
            return Err(GrammarError::TooLarge { num_bytes: text.len(), max_bytes });
        }
        let key = format!("{kind} {text}").into();
        Ok(CheckedSource { source: self, key })
    }
}

impl CheckedSource {
    /// Equal for equal sources alone.
    pub fn key(&self) -> &Arc<str> {
        &self.key
    }
}

/// Levels of lists and objects.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// The most brackets that are open at once, those in strings and behind a backslash left out, and the longest run of
/// signs that bind what follows.
fn nesting(text: &str) -> usize {
    let (mut open, mut most, mut run) = (0usize, 0, 0);
    let mut in_string = false;
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        run = if matches!(byte, b'~' | b'!' | b'?' | b'*' | b'+') { run + 1 } else { 0 };
        match byte {
            b'\\' => drop(bytes.next()),
            b'"' => in_string = !in_string,
            b'\n' => in_string = false,
            b'(' | b'[' | b'{' if !in_string => open += 1,
            b')' | b']' | b'}' if !in_string => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open).max(run);
    }
    most
}

/// What is locked is whole after every write, so a panic elsewhere leaves it usable.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
