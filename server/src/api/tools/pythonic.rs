//! A call as Python has it, `f(a=1, b="x")`, perhaps the first of a list, read while it comes.
//!
//! Invariant: as in [`super::calls`]; the arguments are handed on as the JSON that Python's literals stand for, text as
//! it comes, numbers and names once they are whole. What is no literal is no call.

use serde_json::{Number, Value};

use super::calls::{CallEvent, NoCall};
use super::is_name_letter;
use super::parameters::{Callee, is_key_letter};
use super::tagged::within_quotes;

#[derive(Clone, Debug, Default)]
pub struct PythonicScanner {
    /// What has come of a name, a number, an escape or quotes in a row.
    held: String,
    last: Option<char>,
    state: State,
    /// Until it is told.
    name: String,
    has_begun: bool,
    /// What is open, the call first.
    brackets: Vec<Bracket>,
    /// The first half of a character that JSON writes as two.
    high: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    Head,
    /// Where an item or a closing bracket may come.
    Item,
    /// Of an argument.
    Key,
    /// Behind a dictionary's key.
    Colon,
    Value,
    /// The quotes before a text, of which there may be three.
    Quotes(Quotes),
    Text(Quotes),
    Escape(Quotes),
    /// Behind a text, which goes on with another.
    TextEnd,
    /// A number, a name of a constant, or what says how a text is written.
    Word,
    After,
    Closed,
}

/// What is around a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quotes {
    mark: char,
    is_triple: bool,
    /// Whether nothing in it is escaped.
    is_raw: bool,
}

#[derive(Clone, Copy, Debug)]
struct Bracket {
    close: char,
    has_items: bool,
    /// Whether the value that comes is a dictionary's key.
    is_key: bool,
}

impl PythonicScanner {
    /// As [`super::scanner::Scanner::push`].
    pub fn push(&mut self, c: char, functions: &[Callee], events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let is_space = c.is_whitespace();
        match self.state {
            State::Start if c == '[' => self.state = State::Head,
            State::Start | State::Head => {
                self.state = State::Head;
                self.more_head(c, functions)?;
            }
            State::Key => match c {
                '=' => self.begin_argument(events)?,
                c if is_space || self.joins(c, is_key_letter) => {}
                _ => return Err(NoCall),
            },
            State::Quotes(quotes) if c == quotes.mark => {
                self.held.push(c);
                if self.held.len() == 3 {
                    self.held.clear();
                    self.state = State::Text(Quotes { is_triple: true, ..quotes });
                }
            }
            State::Quotes(quotes) => match std::mem::take(&mut self.held).len() {
                // A text with nothing in it.
                2 => self.more_after_text(c, events)?,
                _ => self.more_text(c, quotes, events),
            },
            State::Text(quotes) => self.more_text(c, quotes, events),
            State::Escape(quotes) => self.more_escape(c, quotes, events)?,
            State::TextEnd => self.more_after_text(c, events)?,
            State::Word if is_word_letter(c) => self.held.push(c),
            State::Word if matches!(c, '"' | '\'') => match std::mem::take(&mut self.held).as_str() {
                "r" | "R" => self.begin_text(c, true, events),
                "u" | "U" => self.begin_text(c, false, events),
                _ => return Err(NoCall),
            },
            State::Word => {
                self.end_word(events)?;
                if !is_space {
                    self.after(c, events)?;
                }
            }
            State::Closed => return Err(NoCall),
            State::Item | State::Colon | State::Value | State::After if is_space => {}
            State::Item => self.begin_item(c, events)?,
            State::Value => self.begin_value(c, events)?,
            State::Colon | State::After => self.after(c, events)?,
        }
        self.last = Some(c);
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    fn more_head(&mut self, c: char, functions: &[Callee]) -> Result<(), NoCall> {
        match c {
            '(' if functions.iter().any(|function| function.name == self.held) => {
                self.name = std::mem::take(&mut self.held);
                self.open(')');
            }
            c if c.is_whitespace() => {}
            // What becomes no name is told at once.
            c if self.joins(c, is_name_letter)
                && functions.iter().any(|function| function.name.starts_with(&self.held)) => {}
            _ => return Err(NoCall),
        }
        Ok(())
    }

    /// Takes a letter of a name that has no space in it.
    fn joins(&mut self, c: char, is_letter: fn(char) -> bool) -> bool {
        let joins = is_letter(c) && (self.held.is_empty() || self.last.is_some_and(is_letter));
        if joins {
            self.held.push(c);
        }
        joins
    }

    fn open(&mut self, close: char) {
        self.brackets.push(Bracket { close, has_items: false, is_key: close == '}' });
        self.state = State::Item;
    }

    fn begin(&mut self, events: &mut Vec<CallEvent>) {
        if !self.has_begun {
            self.has_begun = true;
            events.push(CallEvent::Begin(std::mem::take(&mut self.name)));
            CallEvent::hand_on("{", events);
        }
    }

    fn begin_item(&mut self, c: char, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let is_in_call = self.brackets.len() == 1;
        let bracket = self.brackets.last_mut().ok_or(NoCall)?;
        if c == bracket.close {
            return self.close(events);
        }
        if is_in_call {
            self.held = c.to_string();
            self.state = State::Key;
            return if is_key_letter(c) { Ok(()) } else { Err(NoCall) };
        }
        if std::mem::replace(&mut bracket.has_items, true) {
            CallEvent::hand_on(", ", events);
        }
        self.begin_value(c, events)
    }

    fn begin_argument(&mut self, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        self.begin(events);
        let bracket = self.brackets.last_mut().ok_or(NoCall)?;
        let before = if std::mem::replace(&mut bracket.has_items, true) { ", " } else { "" };
        CallEvent::hand_on(&format!("{before}{}: ", Value::from(std::mem::take(&mut self.held))), events);
        self.state = State::Value;
        Ok(())
    }

    fn begin_value(&mut self, c: char, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let is_key = self.brackets.last().is_some_and(|bracket| bracket.is_key);
        match c {
            '"' | '\'' => self.begin_text(c, false, events),
            '[' | '(' if !is_key => {
                CallEvent::hand_on("[", events);
                self.open(if c == '[' { ']' } else { ')' });
            }
            '{' if !is_key => {
                CallEvent::hand_on("{", events);
                self.open('}');
            }
            c if is_word_letter(c) => {
                self.held = c.to_string();
                self.state = State::Word;
            }
            _ => return Err(NoCall),
        }
        Ok(())
    }

    /// Behind a value.
    fn after(&mut self, c: char, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let bracket = self.brackets.last_mut().ok_or(NoCall)?;
        match (self.state, c) {
            (State::Colon, ':') => {
                bracket.is_key = false;
                CallEvent::hand_on(": ", events);
                self.state = State::Value;
            }
            (State::After, ',') => {
                bracket.is_key = bracket.close == '}';
                self.state = State::Item;
            }
            (State::After, c) if c == bracket.close => return self.close(events),
            _ => return Err(NoCall),
        }
        Ok(())
    }

    fn close(&mut self, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        self.begin(events);
        let bracket = self.brackets.pop().ok_or(NoCall)?;
        self.state = State::After;
        match self.brackets.is_empty() {
            true => {
                CallEvent::hand_on("}", events);
                events.push(CallEvent::End);
                self.state = State::Closed;
            }
            false => CallEvent::hand_on(if bracket.close == '}' { "}" } else { "]" }, events),
        }
        Ok(())
    }

    fn end_value(&mut self) {
        let is_key = self.brackets.last().is_some_and(|bracket| bracket.is_key);
        self.state = if is_key { State::Colon } else { State::After };
    }

    fn begin_text(&mut self, mark: char, is_raw: bool, events: &mut Vec<CallEvent>) {
        CallEvent::hand_on("\"", events);
        self.held = mark.to_string();
        self.state = State::Quotes(Quotes { mark, is_triple: false, is_raw });
    }

    fn more_text(&mut self, c: char, quotes: Quotes, events: &mut Vec<CallEvent>) {
        self.state = State::Text(quotes);
        if c == quotes.mark {
            self.held.push(c);
            if !quotes.is_triple || self.held.len() == 3 {
                self.held.clear();
                self.state = State::TextEnd;
            }
            return;
        }
        // They were words of it.
        let held = std::mem::take(&mut self.held);
        held.chars().for_each(|mark| self.put(u32::from(mark), events));
        match c {
            '\\' => self.state = State::Escape(quotes),
            c => self.put(u32::from(c), events),
        }
    }

    fn more_after_text(&mut self, c: char, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        self.state = State::TextEnd;
        match c {
            '"' | '\'' => {
                self.held = c.to_string();
                self.state = State::Quotes(Quotes { mark: c, is_triple: false, is_raw: false });
            }
            c if c.is_whitespace() => {}
            c => {
                if self.high.take().is_some() {
                    CallEvent::hand_on("\u{fffd}", events);
                }
                CallEvent::hand_on("\"", events);
                self.end_value();
                self.after(c, events)?;
            }
        }
        Ok(())
    }

    fn end_word(&mut self, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let word = json_of_word(&std::mem::take(&mut self.held)).ok_or(NoCall)?;
        let is_key = self.brackets.last().is_some_and(|bracket| bracket.is_key);
        match is_key {
            // JSON's keys are text.
            true => CallEvent::hand_on(&format!("\"{word}\""), events),
            false => CallEvent::hand_on(&word, events),
        }
        self.end_value();
        Ok(())
    }

    /// A character of a text, or half of one.
    fn put(&mut self, code: u32, events: &mut Vec<CallEvent>) {
        let lost = char::REPLACEMENT_CHARACTER;
        let mut put = |c: char| CallEvent::hand_on(&within_quotes(c.encode_utf8(&mut [0; 4])), events);
        match (self.high.take(), code) {
            (Some(high), 0xdc00..=0xdfff) => {
                put(char::from_u32(0x10000 + ((high - 0xd800) << 10) + (code - 0xdc00)).unwrap_or(lost));
                return;
            }
            (Some(_), _) => put(lost),
            (None, _) => {}
        }
        match code {
            0xd800..=0xdbff => self.high = Some(code),
            code => put(char::from_u32(code).unwrap_or(lost)),
        }
    }

    fn more_escape(&mut self, c: char, quotes: Quotes, events: &mut Vec<CallEvent>) -> Result<(), NoCall> {
        let num_digits = match self.held.chars().next() {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            _ => 0,
        };
        if num_digits > 0 {
            self.held.push(c);
            let digits = &self.held[1..];
            let code = u32::from_str_radix(digits, 16).ok().filter(|_| c.is_ascii_hexdigit()).ok_or(NoCall)?;
            if digits.len() == num_digits {
                self.held.clear();
                self.put(code, events);
                self.state = State::Text(quotes);
            }
            return Ok(());
        }
        let meant = match c {
            c if quotes.is_raw => {
                self.put(u32::from('\\'), events);
                Some(c)
            }
            'x' | 'u' | 'U' => {
                self.held.push(c);
                return Ok(());
            }
            'n' => Some('\n'),
            't' => Some('\t'),
            'r' => Some('\r'),
            'a' => Some('\u{7}'),
            'b' => Some('\u{8}'),
            'f' => Some('\u{c}'),
            'v' => Some('\u{b}'),
            '0' => Some('\0'),
            '\\' | '\'' | '"' => Some(c),
            // The line goes on.
            '\n' => None,
            c => {
                self.put(u32::from('\\'), events);
                Some(c)
            }
        };
        if let Some(meant) = meant {
            self.put(u32::from(meant), events);
        }
        self.state = State::Text(quotes);
        Ok(())
    }
}

fn is_word_letter(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_')
}

/// A constant or a number as JSON.
fn json_of_word(word: &str) -> Option<String> {
    match word {
        "True" | "true" => return Some("true".to_owned()),
        "False" | "false" => return Some("false".to_owned()),
        "None" | "null" => return Some("null".to_owned()),
        word if serde_json::from_str::<Number>(word).is_ok() => return Some(word.to_owned()),
        _ => {}
    }
    let digits = word.replace('_', "");
    let unsigned = digits.trim_start_matches(['+', '-']);
    for (prefixes, radix) in [(["0x", "0X"], 16), (["0o", "0O"], 8), (["0b", "0B"], 2)] {
        if let Some(rest) = prefixes.iter().find_map(|prefix| unsigned.strip_prefix(prefix)) {
            let signed = digits.replace(unsigned, rest);
            let number = i64::from_str_radix(&signed, radix).ok().filter(|_| !rest.starts_with(['+', '-']));
            return number.map(|number| number.to_string());
        }
    }
    let whole = digits.parse::<i64>().map(Value::from).ok();
    let fraction = || digits.parse::<f64>().ok().filter(|number| number.is_finite()).map(Value::from);
    whole.or_else(fraction).map(|number| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::format::CallFormat;
    use super::super::scanner::scan as scan_by;
    use super::*;

    fn scan(text: &str) -> Result<(String, String), String> {
        scan_by(CallFormat::Pythonic, text)
    }

    #[test]
    fn literals_are_handed_on_as_json() {
        let cases = [
            ("[f()", "{}"),
            ("[ f ( )", "{}"),
            ("f(a=1)", r#"{"a": 1}"#),
            ("f(a = 1 , b='x',)", r#"{"a": 1, "b": "x"}"#),
            ("f(a=True, b=None, c=false)", r#"{"a": true, "b": null, "c": false}"#),
            (
                "f(a=[1, [2,], ()], b={'k': {\"n\": -1.5e3}, 2: []})",
                r#"{"a": [1, [2], []], "b": {"k": {"n": -1.5e3}, "2": []}}"#,
            ),
            (r#"f(a='it\'s "so"\n\d', b="\x41\u00e9\U0001F642")"#, r#"{"a": "it's \"so\"\n\\d", "b": "Aé🙂"}"#),
            (r#"f(a="\ud83d\ude42\ud83d", b="\ude42!")"#, r#"{"a": "🙂�", "b": "�!"}"#),
            ("f(a=1_000, b=+2, c=.5, d=5.)", r#"{"a": 1000, "b": 2, "c": 0.5, "d": 5.0}"#),
            ("f(a=')', b=\"[f(\")", r#"{"a": ")", "b": "[f("}"#),
            ("f(a='two\nlines')", r#"{"a": "two\nlines"}"#),
            (r#"f(a="""x "" 'y'\n""", b='''''', c="")"#, r#"{"a": "x \"\" 'y'\n", "b": "", "c": ""}"#),
            (r#"f(a='x' "y" '' """z""", b={'k' 'l': ''})"#, r#"{"a": "xyz", "b": {"kl": ""}}"#),
            (r#"f(a=r'\d\'', b=[R"\u00e9", u'\x41'])"#, r#"{"a": "\\d\\'", "b": ["\\u00e9", "A"]}"#),
            ("f(a=0x1F, b=-0b1_0, c=+0o17, d=0XfF)", r#"{"a": 31, "b": -2, "c": 15, "d": 255}"#),
        ];
        for (text, arguments) in cases {
            assert_eq!(scan(text), Ok(("f".to_owned(), arguments.to_owned())), "{text}");
            let parsed: Result<Value, _> = serde_json::from_str(arguments);
            assert!(parsed.is_ok_and(|parsed| parsed.is_object()), "{arguments}");
        }
    }

    #[test]
    fn what_is_no_call_comes_back() {
        for text in ["[1", "g", "[[", "f f", "f(1)", "f('x", "f(a,", "[f]", "{", "f(*)", "f(a b"] {
            let raw = scan(text).expect_err("no call");
            assert!(text.starts_with(&raw) && !raw.is_empty(), "{text}: {raw}");
        }
        for text in ["f(a=b)", "f(a=1 2)", "f(a={1, 2})", "f(a=[1)", "f(a=inf)", "f(a='x' y)", "f(a=\"\\xg", "f())"] {
            assert!(scan(text).is_err(), "{text}");
        }
        for text in ["f(a=b'x')", "f(a=f'x')", "f(a=r)", "f(a=0x)", "f(a=--0x1)", "f(a=0b12)", "f(a=1'x')", "f(a=''1)"]
        {
            assert!(scan(text).is_err(), "{text}");
        }
    }
}
