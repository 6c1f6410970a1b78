//! Calls of any format, read while they come. Invariant: whatever the format, a call is a name and then a JSON object
//! in pieces, or is no call and comes back as it was written.

use super::calls::{CallEvent, CallScanner, NoCall};
use super::format::CallFormat;
use super::parameters::Callee;
use super::pythonic::PythonicScanner;
use super::tagged::{GLM, QWEN_CODER, TaggedScanner};

#[derive(Clone, Debug)]
pub enum Scanner {
    Json(CallScanner),
    Tagged(TaggedScanner),
    Pythonic(PythonicScanner),
}

impl Scanner {
    pub fn of(format: CallFormat) -> Scanner {
        match format {
            CallFormat::MistralNamed => Scanner::Json(CallScanner::named()),
            CallFormat::QwenCoder => Scanner::Tagged(TaggedScanner::new(&QWEN_CODER)),
            CallFormat::Glm => Scanner::Tagged(TaggedScanner::new(&GLM)),
            CallFormat::Pythonic => Scanner::Pythonic(PythonicScanner::default()),
            _ => Scanner::Json(CallScanner::default()),
        }
    }

    /// Takes one more character. After an end or an error nothing more is taken.
    pub fn push(&mut self, c: char, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let is_function = |name: &str| functions.iter().any(|known| known.name == name);
        match self {
            Scanner::Json(scanner) => scanner.push(c, is_function, events),
            Scanner::Tagged(scanner) => scanner.push(c, functions, events),
            Scanner::Pythonic(scanner) => scanner.push(c, functions, events),
        }
    }

    pub fn is_closed(&self) -> bool {
        match self {
            Scanner::Json(scanner) => scanner.is_closed(),
            Scanner::Tagged(scanner) => scanner.is_closed(),
            Scanner::Pythonic(scanner) => scanner.is_closed(),
        }
    }

    /// Whether the function's name was told.
    pub fn has_begun(&self) -> bool {
        match self {
            Scanner::Json(scanner) => scanner.has_begun(),
            Scanner::Tagged(scanner) => scanner.has_begun(),
            Scanner::Pythonic(scanner) => scanner.has_begun(),
        }
    }

    /// All that was taken.
    pub fn into_raw(self) -> String {
        match self {
            Scanner::Json(scanner) => scanner.into_raw(),
            Scanner::Tagged(scanner) => scanner.into_raw(),
            Scanner::Pythonic(scanner) => scanner.into_raw(),
        }
    }
}
