//! How model families write calls of functions, and what makes them write one.
//!
//! Invariant: a format is data: what opens and closes a call, and what its fields are called. It is found by what the
//! model's own template writes; a template that knows no tools gets a text of ours and its history as plain text.

use fullbore_engine::grammar::GrammarSource;
use fullbore_engine::text::{ChatMessage, Tokenizer};
use serde_json::{Map, Value};

use super::super::constraint::quoted;
use super::super::reply::FENCES;
use super::rules::{self, control_token, escaped, mark, until};
use super::tagged::{GLM, MINIMAX, QWEN_CODER, SEED, Tags};
use super::{ToolChoice, Tools};
use crate::start::random;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen, and many after them.
    Hermes,
    /// `[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]`, where the opening is a token of its own.
    Mistral,
    /// `[TOOL_CALLS]name[ARGS]{...}`, with `[CALL_ID]` and an id before the arguments or without: Mistral's since 2025.
    MistralNamed,
    /// `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, each on lines of its own:
    /// Qwen3-Coder's, and others' after it.
    QwenCoder,
    /// `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`: GLM's since 4.5.
    Glm,
    /// Qwen3-Coder's tags between `<seed:tool_call>`, with values that have no lines of their own: Seed-OSS's.
    Seed,
    /// `<minimax:tool_call><invoke name="name"><parameter name="key">value</parameter></invoke></minimax:tool_call>`,
    /// all calls between one pair of marks: MiniMax's M2.
    MiniMax,
    /// `<TOOLCALL>[{"name": ..., "arguments": ...}, ...]</TOOLCALL>`: Nemotron Nano's.
    Nemotron,
    /// The same between `<tool_calls>`: Apriel's.
    Apriel,
    /// `<|tool_call_start|>[name(key=value), ...]<|tool_call_end|>`: LFM's since 2.5.
    Lfm,
    /// `[name(key=value), ...]` instead of a text, as Python has it: Llama 3.2's and 4's, where they are asked for it.
    Pythonic,
    /// `{"name": ..., "parameters": ...}` instead of a text.
    Llama3,
    /// The same; the template knows nothing of it.
    Gemma,
    /// As Hermes; the template knows nothing of it.
    Generic,
}

/// What a template has in it that writes calls so; the first that fits is taken.
const KNOWN: [(&[&str], CallFormat); 18] = [
    (&[TOOL_CALLS, ARGS], CallFormat::MistralNamed),
    (&[TOOL_CALLS], CallFormat::Mistral),
    (&["<tool_call>", "<function=", "<parameter="], CallFormat::QwenCoder),
    (&["<tool_call>", "<arg_key>"], CallFormat::Glm),
    (&["<seed:tool_call>", "<function=", "<parameter="], CallFormat::Seed),
    (&["<minimax:tool_call>", "<invoke name="], CallFormat::MiniMax),
    (&["<TOOLCALL>["], CallFormat::Nemotron),
    (&["<tool_calls>["], CallFormat::Apriel),
    (&["<|tool_call_start|>["], CallFormat::Lfm),
    // Others' own, some of them between the same marks.
    (&["<function="], CallFormat::Generic),
    (&["<arg_key>"], CallFormat::Generic),
    (&["<invoke "], CallFormat::Generic),
    (&["<tool_calls>"], CallFormat::Generic),
    (&["<tool_call>"], CallFormat::Hermes),
    (&["[func_name1("], CallFormat::Pythonic),
    (&["<|python_tag|>"], CallFormat::Llama3),
    (&["ipython", "parameters"], CallFormat::Llama3),
    (&["<start_of_turn>"], CallFormat::Gemma),
];

/// Mistral's tokens.
const TOOL_CALLS: &str = "[TOOL_CALLS]";
pub const CALL_ID: &str = "[CALL_ID]";
pub const ARGS: &str = "[ARGS]";

/// What is written around calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Before a call; `None` where a call is all of a text.
    pub open: Option<&'static str>,
    pub close: &'static str,
    /// The field with the arguments.
    pub arguments: &'static str,
}

/// How a call is written between marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// As an object of JSON.
    Object,
    /// As one of a list.
    List,
    /// As a name and an object of arguments.
    Named,
    Tagged(&'static Tags),
    /// As one of a list in Python.
    Pythonic,
}

impl CallFormat {
    /// By the source of a chat template.
    pub fn of_template(source: &str) -> CallFormat {
        let fits = |marks: &[&str]| marks.iter().all(|mark| source.contains(mark));
        KNOWN.iter().find(|(marks, _)| fits(marks)).map_or(CallFormat::Generic, |(_, format)| *format)
    }

    /// As which calls come where a text of a form may come instead: with marks, for JSON may look like a call without.
    pub fn beside_a_form(self) -> CallFormat {
        if self.marks().open.is_some() { self } else { CallFormat::Generic }
    }

    /// Whether the model's template writes tools and calls by itself.
    pub fn is_of_template(self) -> bool {
        !matches!(self, CallFormat::Gemma | CallFormat::Generic)
    }

    pub fn marks(self) -> Marks {
        let (open, close) = match self {
            CallFormat::Hermes | CallFormat::Generic | CallFormat::QwenCoder | CallFormat::Glm => {
                (Some("<tool_call>"), "</tool_call>")
            }
            CallFormat::Mistral | CallFormat::MistralNamed => (Some(TOOL_CALLS), ""),
            CallFormat::Seed => (Some("<seed:tool_call>"), "</seed:tool_call>"),
            CallFormat::MiniMax => (Some("<minimax:tool_call>"), "</minimax:tool_call>"),
            CallFormat::Nemotron => (Some("<TOOLCALL>"), "</TOOLCALL>"),
            CallFormat::Apriel => (Some("<tool_calls>"), "</tool_calls>"),
            CallFormat::Lfm => (Some("<|tool_call_start|>"), "<|tool_call_end|>"),
            CallFormat::Pythonic => (None, "<|python_end|>"),
            CallFormat::Llama3 | CallFormat::Gemma => (None, ""),
        };
        let has_parameters = matches!(self, CallFormat::Llama3 | CallFormat::Gemma);
        Marks { open, close, arguments: if has_parameters { "parameters" } else { "arguments" } }
    }

    pub fn body(self) -> Body {
        match self {
            CallFormat::Hermes | CallFormat::Generic | CallFormat::Llama3 | CallFormat::Gemma => Body::Object,
            CallFormat::Mistral | CallFormat::Nemotron | CallFormat::Apriel => Body::List,
            CallFormat::MistralNamed => Body::Named,
            CallFormat::QwenCoder => Body::Tagged(&QWEN_CODER),
            CallFormat::Glm => Body::Tagged(&GLM),
            CallFormat::Seed => Body::Tagged(&SEED),
            CallFormat::MiniMax => Body::Tagged(&MINIMAX),
            CallFormat::Lfm | CallFormat::Pythonic => Body::Pythonic,
        }
    }

    /// Whether one pair of marks is around all calls.
    pub fn shares_marks(self) -> bool {
        self.marks().open.is_none() || matches!(self.body(), Body::List | Body::Pythonic) || self == CallFormat::MiniMax
    }

    /// Spellings of control tokens that tell of a call.
    pub fn control_marks(self) -> impl Iterator<Item = &'static str> {
        let Marks { open, close, .. } = self.marks();
        let more: &[&str] = match self {
            CallFormat::MistralNamed => &[CALL_ID, ARGS],
            CallFormat::Llama3 => &["<|python_tag|>"],
            CallFormat::Pythonic => &["<|python_tag|>", "<|python_start|>"],
            CallFormat::Glm => &["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
            _ => &[],
        };
        open.into_iter().chain([close]).filter(|mark| !mark.is_empty()).chain(more.iter().copied())
    }

    pub fn new_id(self) -> String {
        match self {
            // Its templates take no others.
            CallFormat::Mistral | CallFormat::MistralNamed => format!("{:09x}", random() % (1 << 36)),
            _ => format!("call_{:016x}{:08x}", random(), random() as u32),
        }
    }

    /// Rules of Lark: `calls` for one call of a function, or more where that may be; nothing else of a text.
    fn rules(self, tools: &Tools, tokenizer: &Tokenizer) -> String {
        let Marks { open, close, .. } = self.marks();
        let mark = |spelling: &str| if spelling.is_empty() { String::new() } else { mark(spelling, tokenizer) };
        // Without one before calls there is none behind them.
        let [open, close] = [open.unwrap_or_default(), open.map_or("", |_| close)].map(mark);
        let (before, behind, between) = match self.body() {
            Body::Object if open.is_empty() => ("", "", quoted("; ")),
            Body::Tagged(tags) if tags.name.0.is_empty() => ("", "", "GAP?".to_owned()),
            Body::Object | Body::Tagged(_) => ("\"\\n\"", "\"\\n\"", quoted("\n")),
            Body::List | Body::Pythonic if !open.is_empty() => ("\"[\"", "\"]\"", quoted(", ")),
            Body::List | Body::Pythonic => ("", "\"]\"", quoted(", ")),
            Body::Named => ("", "", String::new()),
        };
        let several = tools.parallel && !matches!(tools.choice, ToolChoice::Named(_));
        let first = if self == CallFormat::Pythonic { "first" } else { "marked" };
        let more = if several { format!(" ({between} marked)*") } else { String::new() };
        let list = format!("list: {before} {first}{more} {behind}\n");
        let calls = match self.shares_marks() {
            true => format!("calls: {open} list {close}\n{list}marked: call\n"),
            false => format!("calls: marked{more}\nmarked: {open} {before} call {behind} {close}\n"),
        };
        let functions = tools.callable();
        let names: Vec<String> = (0..functions.len()).map(|index| format!("call_{index}")).collect();
        let mut rules = format!("{calls}call: {}\nGAP: /[ \\n]{{1,4}}/\n", names.join(" | "));
        if self == CallFormat::Pythonic {
            let first: Vec<String> = (0..functions.len()).map(|index| format!("first_{index}")).collect();
            rules += &format!("first: {}\n", first.join(" | "));
        }
        rules.extend(functions.iter().enumerate().map(|(nth, function)| rules::call(self, nth, function, tokenizer)));
        rules
    }
}

/// What precedes the text proper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Thought {
    /// Nothing: the model does not think, or has done so in its prompt.
    #[default]
    Never,
    /// One between its marks, if the model wants.
    Possible(ThoughtMarks),
    /// The prompt ends in an open one.
    Begun(ThoughtMarks),
}

/// What stands around a thought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThoughtMarks {
    pub open: &'static str,
    pub close: &'static str,
}

impl ThoughtMarks {
    pub const TAGS: ThoughtMarks = ThoughtMarks { open: "<think>", close: "</think>" };
    /// Magistral's and Ministral's, which are tokens of their own.
    pub const BRACKETS: ThoughtMarks = ThoughtMarks { open: "[THINK]", close: "[/THINK]" };
    pub const SEED: ThoughtMarks = ThoughtMarks { open: "<seed:think>", close: "</seed:think>" };

    /// By the source of a chat template; `None` where it knows of no thoughts.
    pub fn of_template(source: &str) -> Option<ThoughtMarks> {
        [Self::TAGS, Self::BRACKETS, Self::SEED].into_iter().find(|marks| source.contains(marks.close))
    }
}

impl Thought {
    pub fn marks(self) -> Option<ThoughtMarks> {
        match self {
            Thought::Never => None,
            Thought::Possible(marks) | Thought::Begun(marks) => Some(marks),
        }
    }
}

/// The grammar of an answer: a thought, then `body`, calls, or what the model likes; `None` where that is anything.
pub fn grammar(
    format: CallFormat,
    tools: &Tools,
    body: Option<&GrammarSource>,
    thought: Thought,
    tokenizer: &Tokenizer,
) -> Option<GrammarSource> {
    let offered = tools.are_offered();
    let is_free = !tools.are_forced() && body.is_none();
    let is_strict = tools.callable().iter().any(|function| function.strict) || !tools.parallel;
    if is_free && !(offered && is_strict) {
        return None;
    }
    if !offered && thought == Thought::Never {
        return body.cloned();
    }
    let mut lark = match thought {
        Thought::Never => "start: answer\n".to_owned(),
        Thought::Begun(marks) => format!("start: thought answer\n{}", thought_rules(marks, tokenizer)),
        Thought::Possible(marks) => {
            let spelled = || format!("/[ \\n]{{0,4}}{}/", escaped(marks.open));
            let open = control_token(marks.open, tokenizer).unwrap_or_else(spelled);
            format!("start: (open thought)? answer\nopen: {open}\n{}", thought_rules(marks, tokenizer))
        }
    };
    lark += &match (body, offered) {
        (Some(body), false) => format!("answer: body\n{}", body_rule(body, &no_thought(thought))),
        (_, true) if tools.are_forced() => "answer: calls\n".to_owned(),
        (Some(body), true) => {
            let open = format.marks().open.expect("calls beside a form have marks");
            let not = format!(r" & ~/\s*{}(?s:.*)/", escaped(open)) + &no_thought(thought);
            format!("answer: body | calls\n{}", body_rule(body, &not))
        }
        (None, _) => free_text(format, tools, thought, tokenizer),
    };
    if offered {
        lark += &format.rules(tools, tokenizer);
    }
    Some(GrammarSource::Lark(lark))
}

fn thought_rules(marks: ThoughtMarks, tokenizer: &Tokenizer) -> String {
    format!("thought: inside SPACE?\n{}SPACE: /[ \\n]{{1,4}}/\n", until("inside", marks.close, "", tokenizer))
}

/// What begins like a thought is read as one and is no text, whatever marks of calls it mentions: a part of a terminal.
fn no_thought(thought: Thought) -> String {
    match thought {
        Thought::Possible(marks) => format!(r" & ~/\s*{}(?s:.*)/", escaped(marks.open)),
        Thought::Never | Thought::Begun(_) => String::new(),
    }
}

/// A text of a form; a regular expression's begins with nothing that would be read as something else.
fn body_rule(body: &GrammarSource, not: &str) -> String {
    match body {
        GrammarSource::Regex(_) => format!("body: BODY\nBODY: {}{not}\n", body.expression()),
        _ => format!("body: {}\n", body.expression()),
    }
}

/// `answer` as text, with calls in it or instead of it. Nothing that would be read as a call is text.
fn free_text(format: CallFormat, tools: &Tools, thought: Thought, tokenizer: &Tokenizer) -> String {
    let not = no_thought(thought);
    let marked = |open: &str| {
        let text = format!("TEXT: /(?s:.+)/ & ~/(?s:.*){}(?s:.*)/{not}\n", escaped(open));
        match control_token(open, tokenizer) {
            Some(token) => format!("lead: TEXT? {token}\n{text}"),
            None => format!("lead[suffix={}]: /(?s:.*)/{not}\n{text}", quoted(open)),
        }
    };
    let Marks { open, close, .. } = format.marks();
    let repeat = if tools.parallel { "*" } else { "?" };
    let close = if close.is_empty() { String::new() } else { mark(close, tokenizer) };
    match (open, format.body()) {
        (Some(open), _) if format.shares_marks() => {
            format!("answer: lead GAP? list GAP? {close} | TEXT?\n{}", marked(open))
        }
        (Some(open), Body::Named) => format!("answer: (lead call){repeat} TEXT?\n{}", marked(open)),
        (Some(open), _) => format!("answer: (lead GAP? call GAP? {close}){repeat} TEXT?\n{}", marked(open)),
        (None, body) => {
            let fences = FENCES.map(escaped).join("|");
            let names: Vec<String> = tools.callable().iter().map(|function| escaped(&function.name)).collect();
            let begin = match body {
                Body::Pythonic => format!(r"\[\s*({})\s*\(", names.join("|")),
                _ => r"\{".to_owned(),
            };
            let call = format!(r"\s*(({fences})\s*)?{begin}(?s:.*)");
            format!("answer: calls | TEXT?\nTEXT: /(?s:.+)/ & ~/{call}/{not}\n")
        }
    }
}

/// What a model whose template knows no tools is told.
fn preamble(format: CallFormat, tools: &Tools) -> String {
    let functions: Vec<String> =
        tools.callable().iter().map(|function| function.tool["function"].to_string()).collect();
    let example = match format {
        CallFormat::Gemma => {
            "If you decide to call one, you MUST answer with {\"name\": function name, \"parameters\": dictionary of \
             argument names and their values} and no other text."
        }
        _ => {
            "To call one, write\n<tool_call>\n{\"name\": <function name>, \"arguments\": <object of arguments>}\n\
             </tool_call>"
        }
    };
    let must = if tools.are_forced() { "\nCall one now." } else { "" };
    format!("You have access to functions:\n{}\n{example}{must}", functions.join("\n"))
}

/// The messages of a chat for a template that knows no tools: they are told in the system message, calls are text, and
/// their results are the user's, in one turn with each other and with what the user says next, for there are templates
/// that want roles to alternate.
pub fn plain_messages(format: CallFormat, tools: &Tools, messages: Vec<ChatMessage>) -> Vec<ChatMessage> {
    let mut plain: Vec<ChatMessage> = Vec::with_capacity(messages.len() + 1);
    let mut is_after_result = false;
    for ChatMessage { role, content, mut extra } in messages {
        let calls = extra.shift_remove("tool_calls");
        match role.as_str() {
            "tool" | "function" => {
                let result = format!("<tool_response>\n{content}\n</tool_response>");
                match plain.last_mut().filter(|_| is_after_result) {
                    Some(last) => last.content += &format!("\n{result}"),
                    None => plain.push(ChatMessage::new("user", result)),
                }
                is_after_result = true;
                continue;
            }
            "user" if is_after_result => {
                let results = plain.last_mut().expect("the results");
                results.content += &format!("\n\n{content}");
            }
            _ => {
                let calls = calls.as_ref().and_then(Value::as_array).into_iter().flatten();
                let parts: Vec<String> = (!content.is_empty())
                    .then_some(content)
                    .into_iter()
                    .chain(calls.map(|call| written(format, call)))
                    .collect();
                plain.push(ChatMessage { role, content: parts.join("\n"), extra });
            }
        }
        is_after_result = false;
    }
    if tools.are_offered() {
        let told = preamble(format, tools);
        match plain.first_mut().filter(|first| matches!(first.role.as_str(), "system" | "developer")) {
            Some(system) => system.content = format!("{}\n\n{told}", system.content),
            None => plain.insert(0, ChatMessage::new("system", told)),
        }
    }
    plain
}

/// A call of the history as the model would have written it.
fn written(format: CallFormat, call: &Value) -> String {
    let Marks { open, close, arguments } = format.marks();
    let function = &call["function"];
    let mut fields = Map::new();
    fields.insert("name".to_owned(), function["name"].clone());
    fields.insert(arguments.to_owned(), function["arguments"].clone());
    let fields = Value::Object(fields);
    match open {
        Some(open) => format!("{open}\n{fields}\n{close}"),
        None => fields.to_string(),
    }
}

#[cfg(test)]
pub mod tests;
