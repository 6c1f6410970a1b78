//! Calls of any format, read while they come. Invariant: whatever the format, a call is a name and then a JSON object
//! in pieces; what nothing was told of can be had back as it was written.

use super::calls::{CallEvent, CallScanner, NoCall};
use super::format::{Body, CallFormat};
use super::parameters::Callee;
use super::pythonic::PythonicScanner;
use super::tagged::TaggedScanner;

#[derive(Clone, Debug)]
pub struct Scanner {
    syntax: Syntax,
    /// What stood before the call, and all that was taken of it.
    raw: String,
    /// How much of that something was told of.
    told_len: usize,
}

#[derive(Clone, Debug)]
enum Syntax {
    Json(CallScanner),
    Tagged(TaggedScanner),
    Pythonic(PythonicScanner),
}

impl Scanner {
    /// What stands before the call is text with it if it is none.
    pub fn of(format: CallFormat, before: &str) -> Scanner {
        let syntax = match format.body() {
            Body::Object | Body::List => Syntax::Json(CallScanner::default()),
            Body::Named => Syntax::Json(CallScanner::named()),
            Body::Tagged(tags) => Syntax::Tagged(TaggedScanner::new(tags)),
            Body::Pythonic => Syntax::Pythonic(PythonicScanner::default()),
        };
        Scanner { syntax, raw: before.to_owned(), told_len: 0 }
    }

    /// Takes one more character. After an end or an error nothing more is taken.
    pub fn push(&mut self, c: char, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let told_before = CallEvent::measure(events);
        let result = match &mut self.syntax {
            Syntax::Json(scanner) => scanner.push(c, functions, events),
            Syntax::Tagged(scanner) => scanner.push(c, functions, events),
            Syntax::Pythonic(scanner) => scanner.push(c, functions, events),
        };
        let before = self.raw.len();
        self.raw.push(c);
        if CallEvent::measure(events) != told_before {
            let held_len = if let Syntax::Tagged(scanner) = &self.syntax { scanner.held_len() } else { 0 };
            self.told_len = if result.is_ok() { self.raw.len() - held_len } else { before };
        }
        result
    }

    /// What is to be pushed again before anything else, which was taken as what it is not; at an end for the last time.
    pub fn reread(&mut self, is_end: bool) -> Option<String> {
        let again = if let Syntax::Tagged(scanner) = &mut self.syntax { scanner.reread(is_end) } else { false };
        again.then(|| self.raw.split_off(self.told_len))
    }

    pub fn is_closed(&self) -> bool {
        match &self.syntax {
            Syntax::Json(scanner) => scanner.is_closed(),
            Syntax::Tagged(scanner) => scanner.is_closed(),
            Syntax::Pythonic(scanner) => scanner.is_closed(),
        }
    }

    /// Whether the function's name was told.
    pub fn has_begun(&self) -> bool {
        self.told_len > 0
    }

    /// What was taken since something was told; before the name is, all of it.
    pub fn into_untold(mut self) -> String {
        self.raw.split_off(self.told_len)
    }
}

/// Name and arguments of `text` as a call of `f`, whole or as far as it goes; else what of it nothing was told of.
#[cfg(test)]
pub fn scan(format: CallFormat, text: &str) -> Result<(String, String), String> {
    let functions = [Callee::named("f")];
    let mut scanner = Scanner::of(format, "");
    let mut events = Vec::new();
    for c in text.chars() {
        if scanner.push(c, &functions, &mut events).is_err() {
            return Err(scanner.into_untold());
        }
    }
    assert!(scanner.is_closed() || !events.contains(&CallEvent::End));
    let mut call = (String::new(), String::new());
    for event in events {
        match event {
            CallEvent::Begin(name) => call.0 = name,
            CallEvent::Arguments(piece) => call.1 += &piece,
            CallEvent::End => {}
        }
    }
    Ok(call)
}
