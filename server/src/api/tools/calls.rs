//! A call of a function read from the model's text while it comes: `{"name": ..., "arguments": {...}}`, in any order of
//! its fields.
//!
//! Invariant: what the arguments are is handed on as it is written, however the text is cut into pieces, and what turns
//! out to be no call is handed back whole. Knows JSON, not the marks around it.

use serde_json::Value;

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

/// The text is no call of a function that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoCall;

#[derive(Clone, Debug)]
pub struct CallScanner {
    /// All of it, to be handed back.
    raw: String,
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
    Open,
    NextKey,
    Key { escaped: bool },
    Colon,
    ValueStart,
    Text { escaped: bool },
    Nested { depth: u32, in_text: bool, escaped: bool },
    Scalar,
    Closed,
}

impl Default for CallScanner {
    fn default() -> CallScanner {
        let empty = String::new;
        CallScanner {
            raw: empty(),
            state: State::Open,
            key: empty(),
            value: empty(),
            name: None,
            early: empty(),
            has_arguments: false,
        }
    }
}

impl CallScanner {
    /// Takes one more character; `is_function` says whether there is a function of a name. After an end or an error
    /// nothing more is taken.
    pub fn push(
        &mut self,
        c: char,
        is_function: impl Fn(&str) -> bool,
        events: &mut Vec<CallEvent>,
    ) -> Result<(), NoCall> {
        self.raw.push(c);
        match self.state {
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
                return self.more_value(c, is_function, events);
            }
            State::Closed => return Err(NoCall),
        }
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether its name was told.
    pub fn has_begun(&self) -> bool {
        self.name.is_some()
    }

    /// All that was taken.
    pub fn into_raw(self) -> String {
        self.raw
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
            '{' | '[' => State::Nested { depth: 1, in_text: false, escaped: false },
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

    fn more_value(
        &mut self,
        c: char,
        is_function: impl Fn(&str) -> bool,
        events: &mut Vec<CallEvent>,
    ) -> Result<(), NoCall> {
        match &mut self.state {
            State::Text { escaped } => {
                let is_end = c == '"' && !*escaped;
                *escaped = c == '\\' && !*escaped;
                self.value.push(c);
                if is_end {
                    self.state = State::NextKey;
                    self.end_text(is_function, events)?;
                }
            }
            State::Nested { depth, in_text, escaped } => {
                match c {
                    '"' if !*escaped => *in_text = !*in_text,
                    '{' | '[' if !*in_text => *depth += 1,
                    '}' | ']' if !*in_text => *depth -= 1,
                    _ => {}
                }
                *escaped = *in_text && c == '\\' && !*escaped;
                if *depth == 0 {
                    self.state = State::NextKey;
                }
                if self.is_arguments() {
                    self.hand_on(c.encode_utf8(&mut [0; 4]), events);
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

    fn end_text(&mut self, is_function: impl Fn(&str) -> bool, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let text = || serde_json::from_str::<String>(&self.value).map_err(|_| NoCall);
        if self.key == "name" {
            let name = text()?;
            if !is_function(&name) {
                return Err(NoCall);
            }
            self.name = Some(name.clone());
            events.push(CallEvent::Begin(name));
            let early = std::mem::take(&mut self.early);
            self.hand_on(&early, events);
        } else if self.is_arguments() {
            let object = text()?;
            serde_json::from_str::<Value>(&object).ok().filter(Value::is_object).ok_or(NoCall)?;
            self.hand_on(&object, events);
        }
        Ok(())
    }

    fn hand_on(&mut self, piece: &str, events: &mut Vec<CallEvent>) {
        if self.name.is_none() {
            self.early.push_str(piece);
            return;
        }
        match events.last_mut() {
            Some(CallEvent::Arguments(last)) => last.push_str(piece),
            _ if piece.is_empty() => {}
            _ => events.push(CallEvent::Arguments(piece.to_owned())),
        }
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
    use super::*;

    /// Name and arguments, or what is handed back.
    fn scan(text: &str) -> Result<(String, String), String> {
        let mut scanner = CallScanner::default();
        let mut events = Vec::new();
        for c in text.chars() {
            if scanner.push(c, |name| name == "f", &mut events).is_err() {
                return Err(scanner.into_raw());
            }
        }
        let mut call = (String::new(), String::new());
        for event in events {
            match event {
                CallEvent::Begin(name) => call.0 = name,
                CallEvent::Arguments(piece) => call.1 += &piece,
                CallEvent::End => assert!(scanner.is_closed()),
            }
        }
        Ok(call)
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
    fn what_is_no_call_comes_back_whole() {
        let cases = [
            r#"{"name": "g""#,
            r#"{"name": 1"#,
            r#"{"age": 3}"#,
            "[",
            r#"{"name":"f","arguments":["#,
            r#"{"name":"f","arguments":"[1]""#,
            r#"{"name":"f","arguments":{},"arguments":{"#,
            r#"{x"#,
        ];
        for text in cases {
            assert_eq!(scan(text), Err(text.to_owned()));
        }
    }
}
