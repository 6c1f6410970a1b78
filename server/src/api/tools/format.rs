//! How model families write calls of functions, and what makes them write one.
//!
//! Invariant: a format is data: what opens and closes a call, and what its fields are called. It is found by what the
//! model's own template writes; a template that knows no tools gets a text of ours and its history as plain text.

use fullbore_engine::grammar::GrammarSource;
use fullbore_engine::text::{ChatMessage, Tokenizer};
use serde_json::{Map, Value};

use super::super::constraint::quoted;
use super::{Function, ToolChoice, Tools};
use crate::start::random;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen, and many after them.
    Hermes,
    /// `[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]`, where the opening is a token of its own.
    Mistral,
    /// `{"name": ..., "parameters": ...}` instead of a text.
    Llama3,
    /// The same; the template knows nothing of it.
    Gemma,
    /// As Hermes; the template knows nothing of it.
    Generic,
}

/// In templates that write calls as no JSON, or as a list, some between the same marks.
const OTHERS: [&str; 4] = ["<function=", "<arg_key>", "<invoke ", "<tool_calls>"];

/// What is written around calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Before a call; `None` where a call is all of a text.
    pub open: Option<&'static str>,
    pub close: &'static str,
    /// The field with the arguments.
    pub arguments: &'static str,
}

impl CallFormat {
    /// By the source of a chat template.
    pub fn of_template(source: &str) -> CallFormat {
        let has = |text: &str| source.contains(text);
        match () {
            _ if has("[TOOL_CALLS]") && !has("[ARGS]") => CallFormat::Mistral,
            _ if OTHERS.iter().any(|other| has(other)) => CallFormat::Generic,
            _ if has("<tool_call>") => CallFormat::Hermes,
            _ if has("<|python_tag|>") || (has("ipython") && has("parameters")) => CallFormat::Llama3,
            _ if has("<start_of_turn>") => CallFormat::Gemma,
            _ => CallFormat::Generic,
        }
    }

    /// Whether the model's template writes tools and calls by itself.
    pub fn is_of_template(self) -> bool {
        matches!(self, CallFormat::Hermes | CallFormat::Mistral | CallFormat::Llama3)
    }

    pub fn marks(self) -> Marks {
        match self {
            CallFormat::Hermes | CallFormat::Generic => {
                Marks { open: Some("<tool_call>"), close: "</tool_call>", arguments: "arguments" }
            }
            CallFormat::Mistral => Marks { open: Some("[TOOL_CALLS]"), close: "", arguments: "arguments" },
            CallFormat::Llama3 | CallFormat::Gemma => Marks { open: None, close: "", arguments: "parameters" },
        }
    }

    /// Spellings of control tokens that tell of a call.
    pub fn control_marks(self) -> &'static [&'static str] {
        match self {
            CallFormat::Mistral => &["[TOOL_CALLS]"],
            CallFormat::Llama3 => &["<|python_tag|>"],
            CallFormat::Hermes => &["<tool_call>", "</tool_call>"],
            CallFormat::Gemma | CallFormat::Generic => &[],
        }
    }

    pub fn new_id(self) -> String {
        match self {
            // Its templates take no others.
            CallFormat::Mistral => format!("{:09x}", random() % (1 << 36)),
            _ => format!("call_{:016x}{:08x}", random(), random() as u32),
        }
    }

    /// Rules of Lark: `calls` for one call of a function, or more where that may be; nothing else of a text.
    fn rules(self, tools: &Tools, tokenizer: &Tokenizer) -> String {
        let Marks { arguments, .. } = self.marks();
        let (begin, end, between) = match self {
            CallFormat::Hermes | CallFormat::Generic => {
                let [begin, end] = ["<tool_call>", "</tool_call>"].map(|spelling| mark(spelling, tokenizer));
                (format!("{begin} \"\\n\""), format!("\"\\n\" {end}"), quoted("\n"))
            }
            CallFormat::Mistral => (String::new(), String::new(), quoted(", ")),
            CallFormat::Llama3 | CallFormat::Gemma => (String::new(), String::new(), quoted("; ")),
        };
        let more = if tools.parallel && !matches!(tools.choice, ToolChoice::Named(_)) {
            format!(" ({between} marked)*")
        } else {
            String::new()
        };
        let list = match self {
            CallFormat::Mistral => format!("{} \"[\" marked{more} \"]\"", mark("[TOOL_CALLS]", tokenizer)),
            _ => format!("marked{more}"),
        };
        let close = match self {
            // Its templates write an id at the end of a call; whether or not it does, the call has one of ours.
            CallFormat::Mistral => {
                format!("({} /[a-zA-Z0-9]{{9}}/ {})? \"}}\"", quoted(", \"id\": \""), quoted("\""))
            }
            _ => "\"}\"".to_owned(),
        };
        let functions = tools.callable();
        let names: Vec<String> = (0..functions.len()).map(|index| format!("call_{index}")).collect();
        let mut rules = format!("calls: {list}\nmarked: {begin} call {end}\ncall: {}\n", names.join(" | "));
        for (index, Function { name, parameters, .. }) in functions.iter().enumerate() {
            let open = quoted(&format!("{{\"name\": \"{name}\", \"{arguments}\": "));
            let schema = GrammarSource::JsonSchema(parameters.clone()).expression();
            rules += &format!("call_{index}: {open} arguments_{index} {close}\narguments_{index}: {schema}\n");
        }
        rules
    }
}

/// What precedes the text proper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Thought {
    /// Nothing: the model does not think, or has done so in its prompt.
    #[default]
    Never,
    /// `<think>...</think>`, if the model wants.
    Possible,
    /// The prompt ends in an open one.
    Begun,
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
        Thought::Begun => format!("start: thought answer\n{THOUGHT}"),
        Thought::Possible => format!("start: (\"<think>\" thought)? answer\n{THOUGHT}"),
    };
    lark += &match (body, offered) {
        (Some(body), false) => format!("answer: body\nbody: {}\n", body.expression()),
        (_, true) if tools.are_forced() => "answer: calls\n".to_owned(),
        (Some(body), true) => format!("answer: body | calls\nbody: {}\n", body.expression()),
        (None, _) => free_text(format, tools),
    };
    if offered {
        lark += &format.rules(tools, tokenizer);
    }
    Some(GrammarSource::Lark(lark))
}

const THOUGHT: &str = "thought: inside SPACE?\ninside[suffix=\"</think>\"]: /(?s:.*)/\nSPACE: /[ \\n]{1,4}/\n";

/// `answer` as text, with calls in it or instead of it.
fn free_text(format: CallFormat, tools: &Tools) -> String {
    match format {
        CallFormat::Hermes | CallFormat::Generic => {
            let repeat = if tools.parallel { "*" } else { "?" };
            format!(
                "answer: (lead GAP? call GAP? \"</tool_call>\"){repeat} REST?\n\
                 lead[suffix=\"<tool_call>\"]: /(?s:.*)/\nGAP: /[ \\n]{{1,4}}/\n\
                 REST: /(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/\n"
            )
        }
        CallFormat::Mistral => "answer: TEXT? calls | TEXT?\nTEXT: /(?s:.+)/\n".to_owned(),
        CallFormat::Llama3 | CallFormat::Gemma => "answer: calls | TEXT?\nTEXT: /[^{](?s:.*)/\n".to_owned(),
    }
}

/// A mark as the model writes it: its control token, where it has one.
fn mark(spelling: &str, tokenizer: &Tokenizer) -> String {
    match tokenizer.special_id(spelling).filter(|id| tokenizer.is_special(*id)) {
        Some(id) => format!("<[{id}]>"),
        None => quoted(spelling),
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
pub mod tests {
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::grammar::GrammarCompiler;
    use fullbore_engine::request::TokenId;
    use serde_json::json;

    use super::*;

    fn function(name: &str, strict: bool) -> Function {
        let parameters = json!({
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": false,
            "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
        });
        let tool = json!({"type": "function", "function": {"name": name, "parameters": parameters}});
        Function { name: name.to_owned(), parameters, strict, tool }
    }

    pub struct Rig {
        compiler: GrammarCompiler,
        pub tokenizer: std::sync::Arc<Tokenizer>,
        vocab_size: u32,
    }

    impl Rig {
        pub fn new() -> Rig {
            let tokenizer = Bundle::simulated().tokenizer;
            let vocab_size = tokenizer.vocab_size() as u32;
            let compiler = GrammarCompiler::new(tokenizer.clone(), vec![TokenId(2)], vocab_size);
            Rig { compiler, tokenizer, vocab_size }
        }

        /// Whether the grammar takes all of a text, its bytes being tokens.
        pub fn takes(&self, source: &GrammarSource, text: &str) -> bool {
            let grammar = self.compiler.compile(source).unwrap_or_else(|error| panic!("{error}\n{source:?}"));
            let mut matcher = grammar.matcher();
            let mut mask = vec![0; self.vocab_size.div_ceil(32) as usize];
            for byte in text.bytes() {
                let token = 4 + u32::from(byte);
                let allowed = !matcher.is_ended() && matcher.mask(&mut mask).is_ok();
                if !allowed || mask[token as usize / 32] >> (token % 32) & 1 == 0 {
                    return false;
                }
                matcher.advance(TokenId(token)).expect("a token of the mask");
            }
            matcher.is_ended() || matcher.mask(&mut mask).is_ok() && mask[0] >> 2 & 1 == 1
        }
    }

    const FORMATS: [CallFormat; 5] =
        [CallFormat::Hermes, CallFormat::Mistral, CallFormat::Llama3, CallFormat::Gemma, CallFormat::Generic];

    fn calls(format: CallFormat, calls: &[(&str, &str)]) -> String {
        let Marks { arguments, .. } = format.marks();
        let one = |(name, city): &(&str, &str)| {
            format!("{{\"name\": \"{name}\", \"{arguments}\": {{\"city\": \"{city}\"}}}}")
        };
        let all: Vec<String> = calls.iter().map(one).collect();
        match format {
            CallFormat::Hermes | CallFormat::Generic => {
                all.iter().map(|call| format!("<tool_call>\n{call}\n</tool_call>")).collect::<Vec<_>>().join("\n")
            }
            CallFormat::Mistral => format!("[TOOL_CALLS][{}]", all.join(", ")),
            CallFormat::Llama3 | CallFormat::Gemma => all.join("; "),
        }
    }

    #[test]
    fn forced_calls_are_calls_and_nothing_else() {
        let rig = Rig::new();
        let functions = vec![function("f", false), function("g", false)];
        let grammar = |format, choice, parallel| {
            let tools = Tools { functions: functions.clone(), choice, parallel };
            grammar(format, &tools, None, Thought::Never, &rig.tokenizer).expect("something is forced")
        };
        for format in FORMATS {
            let (one, two) = (calls(format, &[("g", "Rome")]), calls(format, &[("f", "Rome"), ("g", "Oslo")]));
            let required = grammar(format, ToolChoice::Required, true);
            assert!(rig.takes(&required, &one) && rig.takes(&required, &two), "{format:?}: {required:?}");
            assert!(!rig.takes(&required, &calls(format, &[("g", "Paris")])), "{format:?}");
            assert!(!rig.takes(&required, &calls(format, &[("h", "Rome")])), "{format:?}");
            assert!(!rig.takes(&required, "Rome") && !rig.takes(&required, ""), "{format:?}");
            let single = grammar(format, ToolChoice::Required, false);
            assert!(rig.takes(&single, &one) && !rig.takes(&single, &two), "{format:?}");
            let named = grammar(format, ToolChoice::Named(0), true);
            assert!(rig.takes(&named, &calls(format, &[("f", "Oslo")])), "{format:?}");
            assert!(!rig.takes(&named, &one) && !rig.takes(&named, &two), "{format:?}");
        }
    }

    #[test]
    fn strict_functions_are_called_by_their_schema_or_not_at_all() {
        let rig = Rig::new();
        for format in FORMATS {
            let tools =
                |strict, parallel| Tools { functions: vec![function("f", strict)], choice: ToolChoice::Auto, parallel };
            let free = grammar(format, &tools(false, true), None, Thought::Never, &rig.tokenizer);
            assert_eq!(free, None, "{format:?}: who is free is not bound");
            let strict = grammar(format, &tools(true, true), None, Thought::Never, &rig.tokenizer).expect("a grammar");
            assert!(rig.takes(&strict, "Hello, Rome."), "{format:?}: {strict:?}");
            assert!(rig.takes(&strict, &calls(format, &[("f", "Rome"), ("f", "Oslo")])), "{format:?}: {strict:?}");
            if format.marks().open.is_some() && format != CallFormat::Mistral {
                let wrong = calls(format, &[("f", "Paris")]);
                assert!(!rig.takes(&strict, &wrong) && !rig.takes(&strict, &format!("So: {wrong}")), "{format:?}");
                let said = format!("So: {}", calls(format, &[("f", "Rome")]));
                assert!(rig.takes(&strict, &said), "{format:?}");
            }
            let single =
                grammar(format, &tools(false, false), None, Thought::Never, &rig.tokenizer).expect("a grammar");
            assert!(rig.takes(&single, &calls(format, &[("f", "Rome")])), "{format:?}");
        }
    }

    #[test]
    fn a_thought_may_come_before_what_is_bound() {
        let rig = Rig::new();
        let none = Tools::default();
        let bodies = [
            GrammarSource::Regex("[0-9]+/x".to_owned()),
            GrammarSource::Lark("start: DIGITS \"/x\"\nDIGITS: /[0-9]+/".to_owned()),
            GrammarSource::JsonSchema(json!({"enum": ["12/x"]})),
        ];
        for body in bodies {
            let text = if matches!(body, GrammarSource::JsonSchema(_)) { "\"12/x\"" } else { "12/x" };
            let with =
                |thought| grammar(CallFormat::Hermes, &none, Some(&body), thought, &rig.tokenizer).expect("a body");
            assert_eq!(with(Thought::Never), body);
            let (possible, begun) = (with(Thought::Possible), with(Thought::Begun));
            let thinking = format!("Hm.\n</think>\n\n{text}");
            assert!(rig.takes(&possible, text) && rig.takes(&possible, &format!("<think>{thinking}")), "{possible:?}");
            assert!(rig.takes(&begun, &thinking) && !rig.takes(&begun, text), "{begun:?}");
            assert!(!rig.takes(&possible, "<think>Hm.</think>\n\nno") && !rig.takes(&begun, "Hm.</think>no"));
        }
    }

    #[test]
    fn templates_tell_their_format() {
        let cases = [
            ("{{ '[TOOL_CALLS][' }}", CallFormat::Mistral),
            ("<tool_call>\\n{\"name\": <function-name>", CallFormat::Hermes),
            ("<tool_call>\\n<function=example", CallFormat::Generic),
            ("Environment: ipython ... {\"name\": function name, \"parameters\": ...}", CallFormat::Llama3),
            ("{{ '<start_of_turn>' + role }}", CallFormat::Gemma),
            ("<|im_start|>", CallFormat::Generic),
        ];
        for (source, format) in cases {
            assert_eq!(CallFormat::of_template(source), format, "{source}");
        }
    }

    #[test]
    fn templates_without_tools_get_them_as_text() {
        let tools = Tools { functions: vec![function("f", false)], choice: ToolChoice::Auto, parallel: true };
        let arguments = json!({"city": "Rome"});
        let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}});
        let mut assistant = ChatMessage::new("assistant", "");
        assistant.extra.insert("tool_calls".to_owned(), json!([call]));
        let messages = vec![
            ChatMessage::new("user", "Weather?"),
            assistant,
            ChatMessage::new("tool", "sunny"),
            ChatMessage::new("tool", "warm"),
        ];
        let plain = plain_messages(CallFormat::Generic, &tools, messages);
        let roles: Vec<&str> = plain.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        assert!(plain[0].content.contains("\"name\":\"f\"") && plain[0].content.contains("<tool_call>"));
        let written = "<tool_call>\n{\"name\":\"f\",\"arguments\":{\"city\":\"Rome\"}}\n</tool_call>";
        assert_eq!(plain[2].content, written);
        assert_eq!(plain[2].extra, Map::new());
        assert!(plain[3].content.contains("sunny") && plain[3].content.contains("warm"));
    }
}
