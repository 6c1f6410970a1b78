//! llguidance's parser of a source, at the beginning of a text.
//!
//! Invariant: the same source is as much work each time. Bounds here are on what can be counted; what a parser takes to
//! be made follows from none of them, so that whoever builds a stranger's sets a time too.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};

use super::compile::GrammarError;
use super::vocabulary::Vocabulary;
use super::{Compiled, Grammar, GrammarSource, MAX_MATCHER_BYTES};

/// Of a thread that builds, for sources nest; only pages that are used cost memory.
pub(super) const STACK_BYTES: usize = 256 << 20;
/// Of a sequence, at 1 to 2 KiB each.
const MAX_LEXER_STATES: usize = 8192;
/// White space between the tokens of JSON at most: a model that likes it does not write it for ever.
const JSON_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,32}";

/// Builds grammars for one vocabulary.
pub(super) struct Builder {
    factory: ParserFactory,
    vocab_size: u32,
}

impl Builder {
    pub fn new(vocabulary: &Vocabulary) -> Result<Builder, GrammarError> {
        let mut factory = vocabulary.factory().map_err(GrammarError::Invalid)?;
        factory.quiet();
        let limits = factory.limits_mut();
        // A mask of more work would hold up everybody's step.
        limits.step_lexer_fuel = 100_000;
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(Builder { factory, vocab_size: vocabulary.vocab_size })
    }

    /// A grammar whose first mask is computed, and the bytes that it takes.
    pub fn build(&self, source: GrammarSource) -> Result<(Grammar, usize), GrammarError> {
        let invalid = |error: &dyn ToString| GrammarError::Invalid(first_line(&error.to_string()).to_owned());
        let grammar = match source {
            GrammarSource::JsonSchema(schema) => GrammarWithLexer::from_json_schema(with_json_options(schema)),
            GrammarSource::Regex(regex) => GrammarWithLexer::from_regex(&regex),
            GrammarSource::Lark(lark) => GrammarWithLexer::from_lark(lark),
        };
        let parser = self.factory.create_parser(TopLevelGrammar::from_grammar(grammar));
        let mut parser = parser.map_err(|error| invalid(&error))?;
        parser.start_without_prompt();
        parser.compute_mask().map_err(|error| invalid(&error))?;
        let num_bytes = parser.parser.lexer_stats().num_bytes;
        if num_bytes > MAX_MATCHER_BYTES {
            return Err(GrammarError::TooManyStates { num_bytes, max_bytes: MAX_MATCHER_BYTES });
        }
        let grammar = Grammar(Arc::new(Compiled { fresh: parser, num_bytes, vocab_size: self.vocab_size }));
        let mut mask = vec![0; self.vocab_size.div_ceil(32) as usize];
        grammar.matcher().mask(&mut mask).map_err(|error| invalid(&error))?;
        Ok((grammar, num_bytes))
    }
}

/// A schema with our own options for how its JSON is written, whatever it brought.
pub(super) fn with_json_options(mut schema: Value) -> Value {
    if let Some(fields) = schema.as_object_mut() {
        fields.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_SPACE}));
    }
    schema
}

/// What llguidance says, without the state that it dumps.
pub(super) fn first_line(problem: &str) -> &str {
    let end = problem.find("\n<").unwrap_or(problem.len());
    match problem[..end].trim() {
        "NoExtensionBias" => NOTHING_FOLLOWS,
        problem => problem,
    }
}

pub(super) const NOTHING_FOLLOWS: &str = "no token of the model can follow";
