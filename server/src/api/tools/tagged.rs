//! A call whose arguments stand between tags, each without quotes, read while it comes.
//!
//! Invariant: as in [`super::calls`]; the arguments are handed on as the JSON that they stand for. Text goes out as it
//! comes, any other value once it is whole. A tag within a text of JSON is a word of it; of what does not become JSON
//! the first tag is the end.

use serde::de::IgnoredAny;
use serde_json::Value;

use super::calls::{CallEvent, NoCall};
use super::parameters::{Callee, Parameter};
use super::{MAX_NAME_BYTES, is_name_letter};
use crate::api::reply::safe_len;

/// What stands around a call's parts.
#[derive(Debug, PartialEq, Eq)]
pub struct Tags {
    /// Before the function's name, with what stands behind it; where that is nothing any white space or tag ends it.
    pub name: (&'static str, &'static str),
    pub key: (&'static str, &'static str),
    pub value: (&'static str, &'static str),
    pub end: &'static str,
    /// Whether a value has lines to itself.
    pub on_lines: bool,
}

pub const QWEN_CODER: Tags = Tags {
    name: ("<function=", ">"),
    key: ("<parameter=", ">"),
    value: ("", "</parameter>"),
    end: "</function>",
    on_lines: true,
};

pub const GLM: Tags = Tags {
    name: ("", ""),
    key: ("<arg_key>", "</arg_key>"),
    value: ("<arg_value>", "</arg_value>"),
    end: "</tool_call>",
    on_lines: false,
};

pub const SEED: Tags = Tags { on_lines: false, ..QWEN_CODER };

pub const MINIMAX: Tags = Tags {
    name: ("<invoke name=\"", "\">"),
    key: ("<parameter name=\"", "\">"),
    value: ("", "</parameter>"),
    end: "</invoke>",
    on_lines: false,
};

#[derive(Clone, Debug)]
pub struct TaggedScanner {
    tags: &'static Tags,
    /// What has come of the present part.
    held: String,
    state: State,
    function: Option<Callee>,
    key: String,
    num_arguments: usize,
    /// Whether tags are words of no text.
    is_literal: bool,
    /// Whether something that was taken as within such a text is not.
    is_astray: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Name,
    /// Before a key, or the end.
    Between,
    Key,
    /// Between a key and its value.
    Colon,
    Value {
        parameter: Parameter,
        /// Whether some of it has come.
        has_begun: bool,
    },
    Closed,
}

impl TaggedScanner {
    pub fn new(tags: &'static Tags) -> TaggedScanner {
        let state = if tags.name.0.is_empty() { State::Name } else { State::Open };
        let empty = String::new;
        TaggedScanner {
            tags,
            held: empty(),
            state,
            function: None,
            key: empty(),
            num_arguments: 0,
            is_literal: false,
            is_astray: false,
        }
    }

    /// As [`super::scanner::Scanner::push`].
    pub fn push(&mut self, c: char, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        match self.state {
            State::Open => {
                self.held.push(c);
                if self.leads_to(&[self.tags.name.0])?.is_some() {
                    self.state = State::Name;
                }
            }
            State::Name => self.more_name(c, functions, events)?,
            State::Between => {
                self.more_between(c);
                match self.leads_to(&[self.tags.key.0, self.tags.end])? {
                    Some(0) => self.state = State::Key,
                    Some(_) => self.close(events),
                    None => {}
                }
            }
            State::Key => {
                self.held.push(c);
                if let Some(key) = self.held.strip_suffix(self.tags.key.1) {
                    self.key = key.trim().to_owned();
                    self.held.clear();
                    self.state = State::Colon;
                    if self.tags.value.0.is_empty() {
                        self.begin_value(events);
                    }
                }
            }
            State::Colon => {
                self.more_between(c);
                if self.leads_to(&[self.tags.value.0])?.is_some() {
                    self.begin_value(events);
                }
            }
            State::Value { .. } => self.more_value(c, events),
            State::Closed => return Err(NoCall),
        }
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// How much was taken last and is no part of anything yet.
    pub fn held_len(&self) -> usize {
        self.held.len()
    }

    /// Whether all that nothing was told of is to be pushed again: a value's first tag was its end, for it has not
    /// become JSON, and at an end does not any more.
    pub fn reread(&mut self, is_end: bool) -> bool {
        let is_value = matches!(self.state, State::Value { .. });
        let again = self.is_astray || is_end && is_value && !self.is_literal && self.has_passed_end();
        if again {
            (self.is_astray, self.is_literal, self.state) = (false, true, State::Between);
            self.held.clear();
        }
        again
    }

    /// Whether a tag in the value may have been its end: another follows.
    fn has_passed_end(&self) -> bool {
        let (_, rest) = self.held.split_once(self.tags.value.1).unwrap_or_default();
        [self.tags.key.0, self.tags.end].iter().any(|tag| rest.trim_start().starts_with(tag))
    }

    /// Which of the tags is there, if it may be one.
    fn leads_to(&mut self, tags: &[&str]) -> Result<Option<usize>, NoCall> {
        let found = tags.iter().position(|tag| *tag == self.held);
        if found.is_some() {
            self.held.clear();
        }
        match found.is_some() || tags.iter().any(|tag| tag.starts_with(&self.held)) {
            true => Ok(found),
            false => Err(NoCall),
        }
    }

    fn more_between(&mut self, c: char) {
        if !(self.held.is_empty() && c.is_whitespace()) {
            self.held.push(c);
        }
    }

    fn more_name(&mut self, c: char, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        self.held.push(c);
        let name_len = self.held.find(|c| !is_name_letter(c)).unwrap_or(self.held.len());
        let (name, behind) = self.held.split_at(name_len);
        let end = self.tags.name.1;
        if end.starts_with(behind) && behind.len() < end.len().max(1) && name_len <= MAX_NAME_BYTES {
            return Ok(());
        }
        let is_end = behind == end || end.is_empty() && (c == '<' || c.is_whitespace());
        let function = functions.iter().find(|function| is_end && function.name == name).ok_or(NoCall)?;
        self.function = Some(function.clone());
        events.push(CallEvent::Begin(name.to_owned()));
        self.held.clear();
        self.state = State::Between;
        if end.is_empty() {
            self.more_between(c);
        }
        Ok(())
    }

    fn begin_value(&mut self, events: &mut Vec<CallEvent>) {
        let function = self.function.as_ref().expect("it has begun");
        let parameter = function.parameter(&self.key);
        if parameter.is_plain {
            self.begin_argument(events);
            CallEvent::hand_on("\"", events);
        }
        self.state = State::Value { parameter, has_begun: false };
    }

    fn begin_argument(&mut self, events: &mut Vec<CallEvent>) {
        let before = if self.num_arguments == 0 { "{" } else { ", " };
        self.num_arguments += 1;
        CallEvent::hand_on(&format!("{before}{}: ", Value::from(self.key.as_str())), events);
    }

    fn more_value(&mut self, c: char, events: &mut Vec<CallEvent>) {
        let on_lines = self.tags.on_lines;
        let State::Value { parameter, has_begun } = &mut self.state else { return };
        if !std::mem::replace(has_begun, true) && on_lines && c == '\n' {
            return;
        }
        let parameter = *parameter;
        self.held.push(c);
        let end = self.tags.value.1;
        if self.held.ends_with(end) && (parameter.is_plain || self.is_literal || self.ends_here()) {
            let held = std::mem::take(&mut self.held);
            let value = &held[..held.len() - end.len()];
            let value = if on_lines { value.strip_suffix('\n').unwrap_or(value) } else { value };
            self.state = State::Between;
            if parameter.is_plain {
                CallEvent::hand_on(&format!("{}\"", within_quotes(value)), events);
            } else {
                self.begin_argument(events);
                CallEvent::hand_on(&parameter.json_of(value), events);
            }
        } else if parameter.is_plain {
            let known = safe_len(&self.held, end, false);
            let line_end = usize::from(on_lines && self.held[..known].ends_with('\n'));
            let said: String = self.held.drain(..known - line_end).collect();
            CallEvent::hand_on(&within_quotes(&said), events);
        }
    }

    /// Whether the tag that is there ends a value, and is no word of a text in it.
    fn ends_here(&mut self) -> bool {
        // Outside of its texts JSON has no tags.
        let json = serde_json::from_str::<IgnoredAny>;
        if json(&self.held).is_err_and(|error| error.is_eof()) {
            return false;
        }
        let value = &self.held[..self.held.len() - self.tags.value.1.len()];
        self.is_astray = self.has_passed_end() && json(value).is_err();
        !self.is_astray
    }

    fn close(&mut self, events: &mut Vec<CallEvent>) {
        CallEvent::hand_on(if self.num_arguments == 0 { "{}" } else { "}" }, events);
        events.push(CallEvent::End);
        self.state = State::Closed;
    }
}

/// A part of a text as JSON has it.
pub fn within_quotes(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}
