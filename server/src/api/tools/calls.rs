//! A call of a function read from the model's text while it comes: `{"name": ..., "arguments": {...}}`, in any order of
//! its fields, or Mistral's `name[ARGS]{...}`.
//!
//! Invariant: what the arguments are is handed on as it is written, however the text is cut into pieces. Knows JSON,
//! not the marks around it.

use serde_json::Value;

use super::format::{ARGS, CALL_ID};
use super::parameters::Callee;
use super::{MAX_NAME_BYTES, is_name};

/// What more of the text says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallEvent {
    /// Once, first: the function's name.
    Begin(String),
    /// More of its arguments.
    Arguments(String),
    /// The object is closed.
    End,
}

impl CallEvent {
    /// More of the arguments.
    pub fn hand_on(piece: &str, events: &mut Vec<CallEvent>) {
        match events.last_mut() {
            Some(CallEvent::Arguments(last)) => last.push_str(piece),
            _ if piece.is_empty() => {}
            _ => events.push(CallEvent::Arguments(piece.to_owned())),
        }
    }

    /// Of which more events, and more arguments, are more.
    pub fn measure(events: &[CallEvent]) -> (usize, usize) {
        let last = events.last().map_or(0, |event| if let CallEvent::Arguments(last) = event { last.len() } else { 0 });
        (events.len(), last)
    }
}

/// The text is no call of a function that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoCall;

#[derive(Clone, Debug)]
pub struct CallScanner {
    state: State,
    key: String,
    value: String,
    name: Option<String>,
    /// Arguments that came before the name.
    early: String,
    has_arguments: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the arguments of a call that is no object.
    Named,
    /// Such arguments begin.
    Bare,
    Open,
    NextKey,
    Key {
        escaped: bool,
    },
    Colon,
    ValueStart,
    Text {
        escaped: bool,
    },
    /// Where `is_last`, all of a call ends with it.
    Nested {
        depth: u32,
        in_text: bool,
        escaped: bool,
        is_last: bool,
    },
    Scalar,
    Closed,
}

impl Default for CallScanner {
    fn default() -> CallScanner {
        let empty = String::new;
        CallScanner {
            state: State::Open,
            key: empty(),
            value: empty(),
            name: None,
            early: empty(),
            has_arguments: false,
        }
    }
}

/// Of the marks and what is around a name before its arguments.
const MAX_HEAD_BYTES: usize = MAX_NAME_BYTES + 64;

impl CallScanner {
    /// Of a call whose name comes first, outside of any object.
    pub fn named() -> CallScanner {
        CallScanner { state: State::Named, ..CallScanner::default() }
    }

    /// As [`super::scanner::Scanner::push`].
    pub fn push(&mut self, c: char, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        match self.state {
            State::Named => self.more_head(c)?,
            State::Bare => match c {
                '{' => {
                    let name = std::mem::take(&mut self.value);
                    self.begin(name, functions, events)?;
                    self.key = "arguments".to_owned();
                    self.begin_value(c, events)?;
                    self.state = State::Nested { depth: 1, in_text: false, escaped: false, is_last: true };
                }
                c if c.is_whitespace() => {}
                _ => return Err(NoCall),
            },
            State::Open => match c {
                '{' => self.state = State::NextKey,
                _ => return Err(NoCall),
            },
            State::NextKey => match c {
                '"' => {
                    self.key.clear();
                    self.state = State::Key { escaped: false };
                }
                '}' => return self.close(events),
                ',' => {}
                c if c.is_whitespace() => {}
                _ => return Err(NoCall),
            },
            State::Key { escaped: false } if c == '"' => self.state = State::Colon,
            State::Key { escaped } => {
                self.state = State::Key { escaped: c == '\\' && !escaped };
                self.key.push(c);
            }
            State::Colon => match c {
                ':' => self.state = State::ValueStart,
                c if c.is_whitespace() => {}
                _ => return Err(NoCall),
            },
            State::ValueStart => self.begin_value(c, events)?,
            State::Text { .. } | State::Nested { .. } | State::Scalar => {
                return self.more_value(c, functions, events);
            }
            State::Closed => return Err(NoCall),
        }
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// A name, perhaps an id, and what says that the arguments follow.
    fn more_head(&mut self, c: char) -> Result<(), NoCall> {
        self.value.push(c);
        if let Some(head) = self.value.strip_suffix(ARGS) {
            // The call has an id of ours.
            let name = head.split_once(CALL_ID).map_or(head, |(name, _)| name).trim_end();
            self.value = name.to_owned();
            self.state = State::Bare;
            return Ok(());
        }
        // What is neither a name nor what may follow one is told at once.
        let name = self.value.split('[').next().unwrap_or_default();
        let mark = &self.value[name.len()..];
        let is_mark = |whole: &str| mark.starts_with(whole) || whole.starts_with(mark);
        let may_be = is_name(name.trim_end()) && (is_mark(CALL_ID) || is_mark(ARGS));
        if may_be && self.value.len() <= MAX_HEAD_BYTES { Ok(()) } else { Err(NoCall) }
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    fn begin_value(&mut self, c: char, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        if c.is_whitespace() {
            return Ok(());
        }
        if self.key == "name" && (c != '"' || self.name.is_some()) || self.is_arguments() && self.has_arguments {
            return Err(NoCall);
        }
        self.value.clear();
        self.value.push(c);
        self.state = match c {
            '"' => State::Text { escaped: false },
            '{' | '[' => State::Nested { depth: 1, in_text: false, escaped: false, is_last: false },
            '}' | ']' | ',' | ':' => return Err(NoCall),
            _ => State::Scalar,
        };
        if self.is_arguments() {
            self.has_arguments = true;
            match c {
                '{' => self.hand_on("{", events),
                // Some models write the object as text.
                '"' => {}
                _ => return Err(NoCall),
            }
        }
        Ok(())
    }

    fn more_value(&mut self, c: char, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        match &mut self.state {
            State::Text { escaped } => {
                let is_end = c == '"' && !*escaped;
                *escaped = c == '\\' && !*escaped;
                self.value.push(c);
                if is_end {
                    self.state = State::NextKey;
                    self.end_text(functions, events)?;
                }
            }
            State::Nested { depth, in_text, escaped, is_last } => {
                match c {
                    '"' if !*escaped => *in_text = !*in_text,
                    '{' | '[' if !*in_text => *depth += 1,
                    '}' | ']' if !*in_text => *depth -= 1,
                    _ => {}
                }
                *escaped = *in_text && c == '\\' && !*escaped;
                let (is_end, is_last) = (*depth == 0, *is_last);
                if self.is_arguments() {
                    self.hand_on(c.encode_utf8(&mut [0; 4]), events);
                }
                if is_end && is_last {
                    return self.close(events);
                } else if is_end {
                    self.state = State::NextKey;
                }
            }
            _ => match c {
                ',' => self.state = State::NextKey,
                '}' => return self.close(events),
                _ => {}
            },
        }
        Ok(())
    }

    fn end_text(&mut self, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let text = || serde_json::from_str::<String>(&self.value).map_err(|_| NoCall);
        if self.key == "name" {
            self.begin(text()?, functions, events)?;
        } else if self.is_arguments() {
            let object = text()?;
            serde_json::from_str::<Value>(&object).ok().filter(Value::is_object).ok_or(NoCall)?;
            self.hand_on(&object, events);
        }
        Ok(())
    }

    fn begin(&mut self, name: String, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        if !functions.iter().any(|known| known.name == name) {
            return Err(NoCall);
        }
        self.name = Some(name.clone());
        events.push(CallEvent::Begin(name));
        let early = std::mem::take(&mut self.early);
        self.hand_on(&early, events);
        Ok(())
    }

    fn hand_on(&mut self, piece: &str, events: &mut Vec<CallEvent>) {
        if self.name.is_none() {
            self.early.push_str(piece);
            return;
        }
        CallEvent::hand_on(piece, events);
    }

    fn close(&mut self, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        if self.name.is_none() {
            return Err(NoCall);
        }
        if !self.has_arguments {
            self.hand_on("{}", events);
        }
        self.state = State::Closed;
        events.push(CallEvent::End);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::CallFormat;
    use super::super::scanner::scan as scan_by;
    use super::*;

    fn scan(text: &str) -> Result<(String, String), String> {
        scan_by(CallFormat::Hermes, text)
    }

    #[test]
    fn calls_are_read_in_any_order_and_spelling() {
        let cases = [
            (r#"{"name": "f", "arguments": {"a": [1, {"b": "}\"]"}]}}"#, r#"{"a": [1, {"b": "}\"]"}]}"#),
            (r#"{"arguments": {"a": 1}, "name": "f"}"#, r#"{"a": 1}"#),
            (r#"{ "id" : 7, "type":"x\"", "name":"\u0066" ,"parameters" : {} }"#, "{}"),
            (r#"{"name":"f"}"#, "{}"),
            (r#"{"name":"f","arguments":"{\"a\":\"\\n\"}"}"#, r#"{"a":"\n"}"#),
            (r#"{"name":"f","id":null}"#, "{}"),
            (r#"{"name":"f","arguments":{"é":"ü\\"}}"#, r#"{"é":"ü\\"}"#),
        ];
        for (text, arguments) in cases {
            assert_eq!(scan(text), Ok(("f".to_owned(), arguments.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_is_no_call_comes_back() {
        let cases = [r#"{"name": "g""#, r#"{"name": 1"#, r#"{"age": 3}"#, "[", r#"{x"#];
        for text in cases {
            assert_eq!(scan(text), Err(text.to_owned()));
        }
        let cases = [
            (r#"{"name":"f""#, r#","arguments":["#),
            (r#"{"name":"f""#, r#","arguments":"[1]""#),
            (r#"{"name":"f","arguments":{}"#, r#","arguments":{"#),
        ];
        for (told, untold) in cases {
            assert_eq!(scan(&format!("{told}{untold}")), Err(untold.to_owned()));
        }
    }

    #[test]
    fn a_name_may_come_before_its_arguments() {
        let scan = |text: &str| scan_by(CallFormat::MistralNamed, text);
        for head in ["f[ARGS]", "f[CALL_ID]abcdef012[ARGS]", "f [ARGS] ", "f[CALL_ID][ARGS]\n"] {
            for arguments in ["{}", r#"{"a": [{"b": "}\"]"}]}"#, r#"{"a":"[ARGS]"}"#] {
                let text = format!("{head}{arguments}");
                assert_eq!(scan(&text), Ok(("f".to_owned(), arguments.to_owned())), "{text}");
            }
        }
        let long = "f".repeat(MAX_NAME_BYTES + 1);
        assert_eq!(scan("f[ARGS]{}x"), Err("x".to_owned()));
        for text in ["g[ARGS]{", "f[ARGS][", "f[TOOL", "f\"", "f g", "[ARGS]", " ", &long] {
            let raw = scan(text).expect_err("no call");
            assert!(text.starts_with(&raw) && !raw.is_empty(), "{text}: {raw}");
        }
        let endless = format!("f[CALL_ID]{}", "0".repeat(MAX_HEAD_BYTES));
        assert!(scan(&endless).is_err(), "{endless}");
    }
}
