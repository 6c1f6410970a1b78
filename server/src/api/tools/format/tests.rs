//! What grammars of calls let come, held against what is read as a call.

use std::sync::Arc;

use fullbore_engine::bundle::Bundle;
use fullbore_engine::grammar::GrammarCompiler;
use fullbore_engine::request::TokenId;
use fullbore_engine::text::GgufVocab;
use serde_json::json;

use super::*;
use crate::api::reply::{Reply, ReplyFormat};
use crate::api::tools::Function;
use crate::api::tools::parameters::Callee;

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
    pub compiler: GrammarCompiler,
    pub tokenizer: Arc<Tokenizer>,
    vocab_size: u32,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::of(Bundle::simulated().tokenizer)
    }

    fn of(tokenizer: Arc<Tokenizer>) -> Rig {
        let vocab_size = tokenizer.vocab_size() as u32;
        let compiler = GrammarCompiler::new(tokenizer.clone(), vec![TokenId(2)], vocab_size);
        Rig { compiler, tokenizer, vocab_size }
    }

    /// With these beside bytes.
    pub fn with_control_tokens(marks: &[&str]) -> Rig {
        let controls = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>"].map(|token| (token.to_owned(), 3));
        let bytes = (0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6));
        let marks = marks.iter().map(|mark| ((*mark).to_owned(), 3));
        let (tokens, token_types): (Vec<String>, Vec<i32>) = controls.into_iter().chain(bytes).chain(marks).unzip();
        let scores = vec![0.0; tokens.len()];
        let (model, eos, unk) = ("llama".to_owned(), Some(2), Some(0));
        let vocab = GgufVocab { model, tokens, token_types, scores, eos, unk, ..GgufVocab::default() };
        Rig::of(Arc::new(Tokenizer::from_vocab(vocab).expect("a vocabulary of bytes")))
    }

    /// Whether the grammar takes all of a text, its bytes being tokens but for control tokens.
    pub fn takes(&self, source: &GrammarSource, text: &str) -> bool {
        self.takes_tokens(source, self.tokens(text))
    }

    fn tokens(&self, text: &str) -> Vec<TokenId> {
        let mut tokens = Vec::new();
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let mut marks = MARKS.into_iter().filter(|mark| rest.starts_with(mark));
            let mark = marks.find_map(|mark| Some((mark.len(), self.tokenizer.special_id(mark)?)));
            let length = mark.map_or(next.len_utf8(), |(length, _)| length);
            match mark {
                Some((_, id)) => tokens.push(id),
                None => tokens.extend(rest[..length].bytes().map(of_byte)),
            }
            rest = &rest[length..];
        }
        tokens
    }

    /// Whether it takes a text that is nothing but bytes.
    fn takes_bytes(&self, source: &GrammarSource, text: &str) -> bool {
        self.takes_tokens(source, bytes(text))
    }

    fn takes_tokens(&self, source: &GrammarSource, tokens: Vec<TokenId>) -> bool {
        let grammar = self.compiler.compile(source).unwrap_or_else(|error| panic!("{error}\n{source:?}"));
        let mut matcher = grammar.matcher();
        let mut mask = vec![0; self.vocab_size.div_ceil(32) as usize];
        for token in tokens {
            let allowed = !matcher.is_ended() && matcher.mask(&mut mask).is_ok();
            if !allowed || mask[token.0 as usize / 32] >> (token.0 % 32) & 1 == 0 {
                return false;
            }
            matcher.advance(token).expect("a token of the mask");
        }
        matcher.is_ended() || matcher.mask(&mut mask).is_ok() && mask[0] >> 2 & 1 == 1
    }
}

pub const MARKS: [&str; 21] = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<seed:tool_call>",
    "</seed:tool_call>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<TOOLCALL>",
    "</TOOLCALL>",
    "<tool_calls>",
    "</tool_calls>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "[THINK]",
    "[/THINK]",
];

fn bytes(text: &str) -> Vec<TokenId> {
    text.bytes().map(of_byte).collect()
}

fn of_byte(byte: u8) -> TokenId {
    TokenId(4 + u32::from(byte))
}

const FORMATS: [CallFormat; 14] = [
    CallFormat::Hermes,
    CallFormat::Mistral,
    CallFormat::MistralNamed,
    CallFormat::QwenCoder,
    CallFormat::Glm,
    CallFormat::Seed,
    CallFormat::MiniMax,
    CallFormat::Nemotron,
    CallFormat::Apriel,
    CallFormat::Lfm,
    CallFormat::Pythonic,
    CallFormat::Llama3,
    CallFormat::Gemma,
    CallFormat::Generic,
];

fn calls(format: CallFormat, calls: &[(&str, &str)]) -> String {
    let Marks { open, close, arguments } = format.marks();
    let open = open.unwrap_or_default();
    let one =
        |(name, city): &(&str, &str)| format!("{{\"name\": \"{name}\", \"{arguments}\": {{\"city\": \"{city}\"}}}}");
    let all: Vec<String> = calls.iter().map(one).collect();
    match format {
        CallFormat::Hermes | CallFormat::Generic => {
            all.iter().map(|call| format!("<tool_call>\n{call}\n</tool_call>")).collect::<Vec<_>>().join("\n")
        }
        CallFormat::Mistral | CallFormat::Nemotron | CallFormat::Apriel => {
            format!("{open}[{}]{close}", all.join(", "))
        }
        CallFormat::MistralNamed => {
            calls.iter().map(|(name, city)| format!("[TOOL_CALLS]{name}[ARGS]{{\"city\": \"{city}\"}}")).collect()
        }
        CallFormat::QwenCoder => {
            let one = |(name, city): &(&str, &str)| {
                let call = format!("<function={name}>\n<parameter=city>\n{city}\n</parameter>\n</function>");
                format!("<tool_call>\n{call}\n</tool_call>")
            };
            calls.iter().map(one).collect::<Vec<_>>().join("\n")
        }
        CallFormat::Seed => {
            let one = |(name, city): &(&str, &str)| {
                format!("{open}\n<function={name}>\n<parameter=city>{city}</parameter>\n</function>\n{close}")
            };
            calls.iter().map(one).collect::<Vec<_>>().join("\n")
        }
        CallFormat::MiniMax => {
            let one = |(name, city): &(&str, &str)| {
                format!("<invoke name=\"{name}\">\n<parameter name=\"city\">{city}</parameter>\n</invoke>")
            };
            format!("{open}\n{}\n{close}", calls.iter().map(one).collect::<Vec<_>>().join("\n"))
        }
        CallFormat::Glm => {
            let one = |(name, city): &(&str, &str)| {
                let argument = format!("<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>");
                format!("<tool_call>{name}\n{argument}\n</tool_call>")
            };
            calls.iter().map(one).collect::<Vec<_>>().join("\n")
        }
        CallFormat::Lfm | CallFormat::Pythonic => {
            let (quote, close) = if format == CallFormat::Lfm { ('\'', close) } else { ('"', "") };
            let one = |(name, city): &(&str, &str)| format!("{name}(city={quote}{city}{quote})");
            format!("{open}[{}]{close}", calls.iter().map(one).collect::<Vec<_>>().join(", "))
        }
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
        let single = grammar(format, &tools(false, false), None, Thought::Never, &rig.tokenizer).expect("a grammar");
        assert!(rig.takes(&single, &calls(format, &[("f", "Rome")])), "{format:?}");
        let said = format!("So: {}", calls(format, &[("f", "Rome")]));
        assert!(rig.takes(&strict, &said) && rig.takes(&single, &said), "{format:?}");
        let (wrong, two) = (calls(format, &[("f", "Paris")]), calls(format, &[("f", "Rome"), ("f", "Oslo")]));
        for before in BEFORE {
            assert_held(&rig, format, Thought::Never, &strict, &format!("{before}{wrong}"));
            assert_held(&rig, format, Thought::Never, &single, &format!("{before}{two}"));
        }
        let strict = grammar(format, &tools(true, true), None, Thought::Possible(ThoughtMarks::TAGS), &rig.tokenizer)
            .expect("a grammar");
        let right = calls(format, &[("f", "Rome")]);
        for said in [right.as_str(), "Hello, Rome."] {
            assert!(rig.takes(&strict, said) && rig.takes(&strict, &format!("<think>Hm.</think>\n\n{said}")));
        }
        for before in BEFORE {
            for thought in ["<think>Hm.</think>", " <think>{</think>\n\n\n\n\n"] {
                assert_held(
                    &rig,
                    format,
                    Thought::Possible(ThoughtMarks::TAGS),
                    &strict,
                    &format!("{thought}{before}{wrong}"),
                );
            }
        }
    }
}

/// What may stand before a call, or makes text of what follows.
const BEFORE: [&str; 13] = [
    "",
    " ",
    "\n\t",
    "\u{2003}",
    "```json\n",
    "\n```json",
    "```tool_code\n",
    "```tool_call ",
    "<|python_tag|>",
    "<|python_tag|>\n ",
    "So: ",
    "```\n",
    "<think>",
];

/// Either the text may not come, or nothing in it is read as a call.
fn assert_held(rig: &Rig, format: CallFormat, thought: Thought, source: &GrammarSource, text: &str) {
    let functions = vec![Callee::new(&function("f", true))];
    let mut reply = Reply::new(ReplyFormat { thought, calls: Some(format), functions, ..ReplyFormat::default() });
    let is_called = !reply.push(text).calls.is_empty();
    assert!(!is_called || !rig.takes(source, text), "{format:?} lets {text:?} come");
}

/// Families whose marks are control tokens write those, and no text is read as one.
#[test]
fn a_call_may_come_by_the_tokens_that_the_model_has_for_it() {
    let rig = Rig::with_control_tokens(&MARKS);
    let tools = Tools { functions: vec![function("f", true)], choice: ToolChoice::Auto, parallel: true };
    for format in FORMATS.into_iter().filter(|format| format.marks().open.is_some()) {
        let strict = grammar(format, &tools, None, Thought::Never, &rig.tokenizer).expect("a grammar");
        let call = |city: &str| calls(format, &[("f", city)]);
        for before in ["", "So: ", "So: \n\n"] {
            assert!(rig.takes(&strict, &format!("{before}{}", call("Rome"))), "{format:?}: {strict:?}");
            assert!(!rig.takes(&strict, &format!("{before}{}", call("Paris"))), "{format:?}");
        }
        // Spelled out it is read as a call too.
        assert!(!rig.takes_bytes(&strict, &call("Paris")), "{format:?}");
        assert!(rig.takes(&strict, "Hello, Rome."), "{format:?}");
    }
}

/// A control token is no text, but for those that a reply is told of.
#[test]
fn control_tokens_that_a_grammar_makes_come_are_read() {
    let rig = Rig::with_control_tokens(&MARKS);
    for format in FORMATS {
        let known: Vec<_> = format.control_marks().filter_map(|mark| rig.tokenizer.special_id(mark)).collect();
        for choice in [ToolChoice::Auto, ToolChoice::Required] {
            let tools = Tools { functions: vec![function("f", true)], choice, parallel: true };
            let made = grammar(format, &tools, None, Thought::Never, &rig.tokenizer);
            let Some(GrammarSource::Lark(lark)) = made else { panic!("no grammar of {format:?}") };
            let ids = lark.split("<[").skip(1).filter_map(|rest| rest.split_once("]>")?.0.parse().ok());
            let unread: Vec<TokenId> = ids.map(TokenId).filter(|id| !known.contains(id)).collect();
            assert!(unread.is_empty(), "{format:?}: {unread:?} in {lark}");
            assert_eq!(lark.contains("<["), format.marks().open.is_some(), "{format:?}: {lark}");
        }
    }
}

/// With them or without the model says the same.
#[test]
fn mistrals_ids_may_come_before_arguments() {
    for rig in [Rig::new(), Rig::with_control_tokens(&MARKS)] {
        let tools = Tools { functions: vec![function("f", true)], choice: ToolChoice::Required, parallel: true };
        let forced =
            grammar(CallFormat::MistralNamed, &tools, None, Thought::Never, &rig.tokenizer).expect("a grammar");
        let call = |id: &str, city: &str| format!("[TOOL_CALLS]f{id}[ARGS]{{\"city\": \"{city}\"}}");
        let with_id = call("[CALL_ID]abcdef012", "Rome");
        assert!(rig.takes(&forced, &with_id) && rig.takes(&forced, &format!("{with_id}{}", call("", "Oslo"))));
        for wrong in [call("[CALL_ID]abc", "Rome"), call("[CALL_ID]abcdef012", "Paris"), call("abcdef012", "Rome")] {
            assert!(!rig.takes(&forced, &wrong), "{wrong}");
        }
    }
}

/// A thought between tokens of its own, as Magistral has it.
#[test]
fn thoughts_in_brackets_come_before_what_is_bound() {
    let tools = Tools { functions: vec![function("f", true)], choice: ToolChoice::Required, parallel: true };
    let call = |city| calls(CallFormat::MistralNamed, &[("f", city)]);
    for rig in [Rig::new(), Rig::with_control_tokens(&MARKS)] {
        let marks = ThoughtMarks::BRACKETS;
        let with =
            |thought| grammar(CallFormat::MistralNamed, &tools, None, thought, &rig.tokenizer).expect("a grammar");
        let (possible, begun) = (with(Thought::Possible(marks)), with(Thought::Begun(marks)));
        for inside in ["Hm. </think> {", ""] {
            let thought = |city| format!("{inside}[/THINK]{}", call(city));
            let opened = |city| format!("[THINK]{}", thought(city));
            assert!(rig.takes(&possible, &opened("Rome")) && !rig.takes(&possible, &opened("Paris")), "{possible:?}");
            assert!(rig.takes(&begun, &thought("Rome")) && !rig.takes(&begun, &thought("Paris")), "{begun:?}");
        }
        assert!(rig.takes(&possible, &call("Rome")) && !rig.takes(&possible, "[THINK]Hm."), "{possible:?}");
    }
}

/// Nothing in a thought begins a call or is bound; what comes behind it is bound as ever.
#[test]
fn a_thought_may_mention_calls() {
    for rig in [Rig::new(), Rig::with_control_tokens(&MARKS)] {
        for (format, open) in FORMATS.into_iter().flat_map(|format| [(format, "<think>"), (format, "")]) {
            let thought = if open.is_empty() {
                Thought::Begun(ThoughtMarks::TAGS)
            } else {
                Thought::Possible(ThoughtMarks::TAGS)
            };
            let (right, wrong) = (calls(format, &[("f", "Rome")]), calls(format, &[("f", "Paris")]));
            let mentions = ["<tool_call>", "<tool_call>\n{\"name\": \"f\", ", "[TOOL_CALLS]f", "{", &right, &wrong];
            let after = |mention: &str, text: &str| {
                [bytes(&format!("{open}It takes {mention} here.\n</think>\n\n")), rig.tokens(text)].concat()
            };
            for choice in [ToolChoice::Auto, ToolChoice::Required] {
                let tools = Tools { functions: vec![function("f", true)], choice, parallel: true };
                let source = grammar(format, &tools, None, thought, &rig.tokenizer).expect("a grammar");
                for mention in mentions {
                    assert!(rig.takes_tokens(&source, after(mention, &right)), "{format:?} {mention:?}: {source:?}");
                    assert!(!rig.takes_tokens(&source, after(mention, &wrong)), "{format:?} {mention:?}: {source:?}");
                    let may_say = rig.takes_tokens(&source, after(mention, "Hello, Rome."));
                    assert_eq!(may_say, choice == ToolChoice::Auto, "{format:?} {mention:?}: {source:?}");
                }
            }
        }
    }
}

/// Or a call, all of it: whatever else begins like one may not come.
#[test]
fn a_text_of_a_form_may_come_instead_of_calls() {
    let tools = Tools { functions: vec![function("f", false)], choice: ToolChoice::Auto, parallel: true };
    let bodies = [GrammarSource::JsonSchema(json!({"type": "object"})), GrammarSource::Regex("(?s:.+)".to_owned())];
    for rig in [Rig::new(), Rig::with_control_tokens(&MARKS)] {
        for (family, body) in FORMATS.into_iter().flat_map(|format| bodies.each_ref().map(|body| (format, body))) {
            let format = family.beside_a_form();
            let source = grammar(format, &tools, Some(body), Thought::Possible(ThoughtMarks::TAGS), &rig.tokenizer)
                .expect("a grammar");
            let like_a_call = "{\"name\": \"f\", \"parameters\": {\"city\": \"Paris\"}}";
            let quoted = "{\"a\": \"<tool_call>[TOOL_CALLS]f[ARGS]{}\"}";
            for text in [like_a_call, quoted] {
                assert!(rig.takes_bytes(&source, text), "{format:?} {text}: {source:?}");
            }
            assert!(rig.takes(&source, &calls(format, &[("f", "Rome"), ("f", "Oslo")])), "{format:?}: {source:?}");
            let wrong = calls(format, &[("f", "Paris")]);
            for before in ["", " ", "<think>Hm.</think>\n\n", "\u{2003}"] {
                let text = format!("{before}{wrong}");
                assert!(!rig.takes(&source, &text) && !rig.takes_bytes(&source, &text), "{format:?} {text:?}");
            }
            assert!(!rig.takes_bytes(&source, "<think>Hm."), "{format:?}: a thought is no text");
        }
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
        let with = |thought| grammar(CallFormat::Hermes, &none, Some(&body), thought, &rig.tokenizer).expect("a body");
        assert_eq!(with(Thought::Never), body);
        let (possible, begun) = (with(Thought::Possible(ThoughtMarks::TAGS)), with(Thought::Begun(ThoughtMarks::TAGS)));
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
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", CallFormat::MistralNamed),
        ("<tool_call>\\n{\"name\": <function-name>", CallFormat::Hermes),
        ("<tool_call>\\n<function=example>\\n<parameter=a>", CallFormat::QwenCoder),
        ("<tool_call>{name}<arg_key>", CallFormat::Glm),
        ("<seed:tool_call>\\n<function=example>\\n<parameter=a>", CallFormat::Seed),
        ("<minimax:tool_call>\\n<invoke name=\"a\">", CallFormat::MiniMax),
        ("<TOOLCALL>[{{\"name\": \"a\"}}]</TOOLCALL>", CallFormat::Nemotron),
        ("within <tool_call></tool_call>: <tool_calls>[{\"name\": <function-name>}]</tool_calls>", CallFormat::Apriel),
        ("<tool_calls>\\n{\"name\": <tool-name>}\\n</tool_calls>", CallFormat::Generic),
        ("<|tool_call_start|>[a(b='c')]<|tool_call_end|>", CallFormat::Lfm),
        ("<other:tool_call>\\n<function=example>\\n<parameter=a>", CallFormat::Generic),
        ("<|python_tag|> in the format of [func_name1(a=b), func_name2()]", CallFormat::Pythonic),
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
