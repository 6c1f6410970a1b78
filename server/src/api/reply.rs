//! What an assistant's text is made of: a thought, what it says, and calls of functions.
//!
//! Invariant: the pieces do not depend on how the text was cut, and nothing of it is lost but marks and the white space
//! around them: what begins like a mark or a call and is none is said after all. Knows no tokens.

use super::tools::calls::CallEvent;
use super::tools::format::{Body, CallFormat, Marks, Thought};
use super::tools::is_name_letter;
use super::tools::parameters::Callee;
use super::tools::scanner::Scanner;

/// What may stand before a call that is all of a text.
pub const FENCES: [&str; 6] =
    ["<|python_tag|>", "<|python_start|>", "```json", "```python", "```tool_code", "```tool_call"];

/// What to look for in a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplyFormat {
    pub thought: Thought,
    /// Where functions may be called.
    pub calls: Option<CallFormat>,
    pub functions: Vec<Callee>,
    /// Whether nothing but calls may come.
    pub calls_alone: bool,
    /// Whether calls are all of an answer or none of it: what does not begin with one is text of a form, whatever is in
    /// it. Needs calls with marks.
    pub calls_or_text: bool,
    /// Whether a text with calls ends as one without: the client chose the function itself.
    pub ends_as_text: bool,
}

/// What more of a text says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    pub reasoning: String,
    pub content: String,
    pub calls: Vec<CallPiece>,
}

/// More of one call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallPiece {
    /// Among the calls of the text.
    pub index: usize,
    /// In the first piece of a call: an id, and the function's name.
    pub begin: Option<(String, String)>,
    pub arguments: String,
}

#[derive(Clone, Debug)]
pub struct Reply {
    format: ReplyFormat,
    state: State,
    /// Not yet known to be what.
    held: String,
    num_calls: usize,
    /// Of the last call there is no end.
    is_cut_off: bool,
    has_thought: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// Nothing but white space has come.
    Start,
    Thought,
    /// Nothing but white space has come after the thought, or instead of one.
    Answer,
    Content,
    /// Before a call, or between calls.
    Calls {
        /// Marks that no call has followed yet, and what is between them: text if none does.
        before: String,
        /// Whether one may follow.
        is_open: bool,
    },
    Call(Scanner),
}

impl ReplyFormat {
    /// Spellings of control tokens that tell of a part.
    pub fn control_marks(&self) -> impl Iterator<Item = &'static str> {
        let thought = self.thought.marks().map(|marks| [marks.open, marks.close]);
        thought.into_iter().flatten().chain(self.calls.into_iter().flat_map(CallFormat::control_marks))
    }
}

impl Reply {
    pub fn new(format: ReplyFormat) -> Reply {
        let state = match format.thought {
            Thought::Never => State::Answer,
            Thought::Possible(_) => State::Start,
            Thought::Begun(_) => State::Thought,
        };
        Reply { format, state, held: String::new(), num_calls: 0, is_cut_off: false, has_thought: false }
    }

    /// Why a text has ended that is not too long; a stop string may have ended it within a call.
    pub fn finish_reason(&self) -> &'static str {
        match self.num_calls > 0 && !self.is_cut_off && !self.format.ends_as_text {
            true => "tool_calls",
            false => "stop",
        }
    }

    /// Whether what comes now belongs to a thought.
    pub fn is_thinking(&self) -> bool {
        matches!(self.state, State::Thought)
    }

    /// Whether what has come since the last piece is none of the text: a thought, or what is around one.
    pub fn is_layout(&self) -> bool {
        match self.state {
            State::Thought => true,
            State::Start | State::Answer => self.format.thought != Thought::Never && self.held.trim().is_empty(),
            State::Content | State::Calls { .. } | State::Call(_) => false,
        }
    }

    pub fn push(&mut self, text: &str) -> Pieces {
        self.held.push_str(text);
        let mut pieces = Pieces::default();
        while self.step(&mut pieces, false) {}
        pieces
    }

    /// What was held back, once no more text comes, which `is_whole` where the model ended it.
    pub fn finish(&mut self, is_whole: bool) -> Pieces {
        let mut pieces = Pieces::default();
        if self.holds_a_mark(is_whole) {
            self.held.clear();
            self.is_cut_off = true;
        }
        while self.step(&mut pieces, true) {}
        if let State::Call(scanner) = std::mem::replace(&mut self.state, State::Content) {
            // A call that was cut off stays what it was, also before its name; where nothing says that it is one, what
            // never told a name is text.
            let is_marked = self.format.calls.is_some_and(|format| format.marks().open.is_some());
            match scanner.has_begun() || is_marked || self.format.calls_alone {
                true => self.is_cut_off = true,
                false => pieces.content += &scanner.into_untold(),
            }
        }
        pieces
    }

    /// Whether what is held is part of a mark and can be nothing else.
    fn holds_a_mark(&self, is_whole: bool) -> bool {
        let ReplyFormat { thought, calls, calls_alone, calls_or_text, .. } = self.format;
        let of_thought = thought.marks().map(|marks| marks.open).filter(|_| matches!(self.state, State::Start));
        let of_calls = calls.and_then(|format| format.marks().open);
        let is_none_of_text = calls_alone || calls_or_text && !is_whole;
        let is_before = matches!(self.state, State::Start | State::Answer | State::Content);
        let begun = self.held.trim_start();
        let mut marks = of_thought.into_iter().chain(of_calls);
        is_before && is_none_of_text && !begun.is_empty() && marks.any(|mark| mark.starts_with(begun))
    }

    /// Takes some of `held`; whether more of it may be taken.
    fn step(&mut self, pieces: &mut Pieces, is_end: bool) -> bool {
        match &mut self.state {
            State::Start => self.start(is_end),
            State::Thought => self.think(pieces, is_end),
            State::Answer => self.answer(is_end),
            State::Content => self.say(pieces, is_end),
            State::Calls { .. } => self.between_calls(pieces, is_end),
            State::Call(_) => self.call(pieces, is_end),
        }
    }

    fn start(&mut self, is_end: bool) -> bool {
        let text = self.held.trim_start();
        let open = self.format.thought.marks().map_or("", |marks| marks.open);
        if let Some(rest) = text.strip_prefix(open) {
            self.held = rest.to_owned();
            self.state = State::Thought;
            return true;
        }
        let waits = !is_end && open.starts_with(text);
        if !waits {
            self.state = State::Answer;
        }
        !waits
    }

    fn think(&mut self, pieces: &mut Pieces, is_end: bool) -> bool {
        let close = self.format.thought.marks().map_or("", |marks| marks.close);
        let end = self.held.find(close);
        // White space at the ends of a thought is layout.
        let known = end.unwrap_or_else(|| safe_len(&self.held, close, is_end));
        let thought = &self.held[..known];
        let said = thought.trim_end().len();
        let skipped = if self.has_thought { 0 } else { said - thought[..said].trim_start().len() };
        if said > skipped {
            self.has_thought = true;
            pieces.reasoning += &thought[skipped..said];
        }
        match end {
            Some(end) => {
                self.held.drain(..end + close.len());
                self.state = State::Answer;
                true
            }
            None => {
                self.held.drain(..said);
                false
            }
        }
    }

    fn answer(&mut self, is_end: bool) -> bool {
        let text = self.held.trim_start();
        if text.is_empty() {
            // After a thought it is layout; a text may begin with it.
            if self.format.thought == Thought::Never && self.format.calls.is_none() || is_end && !self.held.is_empty() {
                self.state = State::Content;
                return true;
            }
            return false;
        }
        if let Some(format) = self.format.calls.filter(|format| format.marks().open.is_none()) {
            let fence = FENCES.iter().find(|fence| text.starts_with(**fence));
            let rest = fence.map_or(text, |fence| text[fence.len()..].trim_start());
            if rest.starts_with(if format == CallFormat::Pythonic { '[' } else { '{' }) {
                // White space after a thought is layout.
                let all = if self.format.thought == Thought::Never { self.held.as_str() } else { text };
                self.state = State::Call(Scanner::of(format, &all[..all.len() - rest.len()]));
                self.held = rest.to_owned();
                return true;
            }
            let may_be_fence = rest.is_empty() || FENCES.iter().any(|fence| fence.starts_with(text));
            if may_be_fence && !is_end {
                return false;
            }
        }
        if self.format.calls_or_text
            && let Some(open) = self.format.calls.and_then(|format| format.marks().open)
        {
            if let Some(rest) = text.strip_prefix(open) {
                self.held = rest.to_owned();
                self.state = State::Calls { before: open.to_owned(), is_open: true };
                return true;
            }
            if open.starts_with(text) && !is_end {
                return false;
            }
            self.format.calls = None;
        }
        if self.format.thought != Thought::Never {
            self.held = text.to_owned();
        }
        self.state = State::Content;
        true
    }

    fn say(&mut self, pieces: &mut Pieces, is_end: bool) -> bool {
        let open = self.format.calls.and_then(|format| format.marks().open);
        let Some(open) = open else {
            pieces.content += &std::mem::take(&mut self.held);
            return false;
        };
        if let Some(at) = self.held.find(open) {
            pieces.content += self.held[..at].trim_end();
            self.held.drain(..at + open.len());
            self.state = State::Calls { before: open.to_owned(), is_open: true };
            return true;
        }
        let known = safe_len(&self.held, open, is_end);
        // White space before a mark belongs to it.
        let said = if is_end { known } else { self.held[..known].trim_end().len() };
        pieces.content.extend(self.held.drain(..said));
        false
    }

    fn between_calls(&mut self, pieces: &mut Pieces, is_end: bool) -> bool {
        let Some(format) = self.format.calls else { return false };
        let Marks { open, close, .. } = format.marks();
        let State::Calls { before, is_open } = &mut self.state else { return false };
        let body = format.body();
        let has_lists = matches!(body, Body::Object | Body::List | Body::Pythonic);
        // Marks have no fence around them: one behind them is of the text.
        let may_be_fenced = open.is_none();
        let is_layout = |c: char| {
            c.is_whitespace() || has_lists && (matches!(c, ',' | ';' | '[' | ']') || may_be_fenced && c == '`')
        };
        let text = self.held.trim_start_matches(is_layout);
        let layout_len = self.held.len() - text.len();
        let begins = match body {
            Body::Object | Body::List => text.starts_with('{'),
            Body::Tagged(tags) if !tags.name.0.is_empty() => {
                text.len() > 1 && text.starts_with('<') && !text.starts_with("</")
            }
            Body::Named | Body::Tagged(_) | Body::Pythonic => text.starts_with(is_name_letter),
        };
        let layout = &self.held[..layout_len];
        // A list that is closed has no more calls.
        *is_open &= !(before.is_empty() && layout.contains(']'));
        if begins && *is_open {
            before.extend(self.held.drain(..layout_len));
            self.state = State::Call(Scanner::of(format, before));
            return true;
        }
        let marks = [open.unwrap_or_default(), close];
        if let Some(mark) = marks.iter().find(|mark| !mark.is_empty() && text.starts_with(**mark)) {
            *is_open = open == Some(*mark);
            let passed = self.held.drain(..layout_len + mark.len());
            // What closes a call is none of the text.
            if *is_open || !before.is_empty() {
                before.extend(passed);
            }
            return true;
        }
        // At the end a mark was cut off, and is none of the text.
        if text.is_empty() || marks.iter().any(|mark| mark.starts_with(text)) {
            if is_end {
                self.held.clear();
            }
            return false;
        }
        // Text after calls, or behind a mark that none follows.
        if before.is_empty() {
            let closing_len = layout.find(['[', ',', ';']).unwrap_or(layout_len);
            self.held.drain(..closing_len);
        }
        pieces.content += before;
        self.state = State::Content;
        true
    }

    fn call(&mut self, pieces: &mut Pieces, is_end: bool) -> bool {
        let State::Call(scanner) = &mut self.state else { return false };
        let functions = &self.format.functions;
        let mut events = Vec::new();
        let mut taken = 0;
        let mut failed = false;
        let mut again = None;
        for c in self.held.chars() {
            taken += c.len_utf8();
            failed = scanner.push(c, functions, &mut events).is_err();
            again = scanner.reread(false);
            if failed || again.is_some() || scanner.is_closed() {
                break;
            }
        }
        self.held.drain(..taken);
        again = again.or_else(|| scanner.reread(is_end && !failed));
        let is_closed = scanner.is_closed();
        events.into_iter().for_each(|event| self.take(event, pieces));
        if failed {
            let State::Call(scanner) = std::mem::replace(&mut self.state, State::Content) else { return false };
            let has_begun = scanner.has_begun();
            let untold = scanner.into_untold();
            // Text again; what becomes no call at all is nothing else.
            match has_begun {
                true => self.held.insert_str(0, untold.trim_start()),
                false => pieces.content += &untold,
            }
            self.is_cut_off |= has_begun;
            return true;
        }
        if is_closed {
            let is_open = self.format.calls.is_some_and(CallFormat::shares_marks);
            self.state = State::Calls { before: String::new(), is_open };
        }
        self.held.insert_str(0, again.as_deref().unwrap_or_default());
        is_closed || again.is_some()
    }

    fn take(&mut self, event: CallEvent, pieces: &mut Pieces) {
        let format = self.format.calls.unwrap_or(CallFormat::Generic);
        match event {
            CallEvent::Begin(name) => {
                let begin = Some((format.new_id(), name));
                pieces.calls.push(CallPiece { index: self.num_calls, begin, arguments: String::new() });
                self.num_calls += 1;
            }
            CallEvent::Arguments(more) => {
                let index = self.num_calls - 1;
                match pieces.calls.last_mut().filter(|last| last.index == index) {
                    Some(last) => last.arguments += &more,
                    None => pieces.calls.push(CallPiece { index, begin: None, arguments: more }),
                }
            }
            CallEvent::End => {}
        }
    }
}

/// How much of `text` no `mark` begins in; all of it at the end.
pub fn safe_len(text: &str, mark: &str, is_end: bool) -> usize {
    if is_end {
        return text.len();
    }
    let starts = (text.len().saturating_sub(mark.len() - 1)..text.len()).filter(|at| text.is_char_boundary(*at));
    starts.into_iter().find(|at| mark.starts_with(&text[*at..])).unwrap_or(text.len())
}

#[cfg(test)]
mod tests;
