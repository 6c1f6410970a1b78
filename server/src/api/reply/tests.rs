//! Replies however they are cut.

use super::*;
use crate::api::tools::Function;
use crate::api::tools::format::ThoughtMarks;

/// What a text says: reasoning, content, and (name, arguments) of its calls.
type Said = (String, String, Vec<(String, String)>);

fn said(reply: &mut Reply, parts: &[&str]) -> Said {
    let mut all: Vec<Pieces> = parts.iter().map(|part| reply.push(part)).collect();
    all.push(reply.finish(true));
    let mut said = Said::default();
    for Pieces { reasoning, content, calls } in all {
        said.0 += &reasoning;
        said.1 += &content;
        for CallPiece { index, begin, arguments } in calls {
            if let Some((id, name)) = begin {
                assert!(index == said.2.len() && id.len() >= 9, "{index} {id}");
                said.2.push((name, String::new()));
            }
            said.2[index].1 += &arguments;
        }
    }
    said
}

/// The same however it is cut.
fn parse(format: &ReplyFormat, text: &str) -> Said {
    let whole = said(&mut Reply::new(format.clone()), &[text]);
    let ends: Vec<usize> = text.char_indices().map(|(at, c)| at + c.len_utf8()).collect();
    for &cut in &ends {
        let (first, second) = text.split_at(cut);
        assert_eq!(said(&mut Reply::new(format.clone()), &[first, second]), whole, "{first:?} {second:?}");
    }
    let letters: Vec<String> = text.chars().map(String::from).collect();
    let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
    assert_eq!(said(&mut Reply::new(format.clone()), &letters), whole, "letter by letter: {text:?}");
    whole
}

fn format(thought: Thought, calls: Option<CallFormat>) -> ReplyFormat {
    ReplyFormat { thought, calls, functions: ["f", "g"].map(Callee::named).into(), ..ReplyFormat::default() }
}

fn expect(reasoning: &str, content: &str, calls: &[(&str, &str)]) -> Said {
    let calls = calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned()));
    (reasoning.to_owned(), content.to_owned(), calls.collect())
}

#[test]
fn thoughts_are_told_from_what_is_said() {
    let possible = format(Thought::Possible(ThoughtMarks::TAGS), None);
    assert_eq!(parse(&possible, "<think>\nHm, é.\n\nSo.\n</think>\n\nYes."), expect("Hm, é.\n\nSo.", "Yes.", &[]));
    assert_eq!(parse(&possible, "No <think>."), expect("", "No <think>.", &[]));
    assert_eq!(parse(&possible, "<thi"), expect("", "<thi", &[]));
    assert_eq!(parse(&possible, "<think>cut o"), expect("cut o", "", &[]));
    let brackets = format(Thought::Possible(ThoughtMarks::BRACKETS), None);
    assert_eq!(parse(&brackets, "[THINK] a </think>[/THINK]\nb [/THINK]"), expect("a </think>", "b [/THINK]", &[]));
    assert_eq!(parse(&brackets, "[THIN"), expect("", "[THIN", &[]));
    let begun = format(Thought::Begun(ThoughtMarks::TAGS), None);
    assert_eq!(parse(&begun, "Hm</thin</think>Yes </think>"), expect("Hm</thin", "Yes </think>", &[]));
    let calls = format(Thought::Possible(ThoughtMarks::TAGS), Some(CallFormat::Hermes));
    let text = "<think>a</think>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(parse(&calls, text), expect("a", "", &[("f", "{}")]));
}

#[test]
fn marked_calls_are_told_from_what_is_said() {
    let hermes = format(Thought::Never, Some(CallFormat::Hermes));
    let two = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"<tool_call>\"}}\n</tool_call>\n\
               <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
    let both = [("f", "{\"a\": \"<tool_call>\"}"), ("g", "{}")];
    assert_eq!(parse(&hermes, two), expect("", "Let me see.", &both));
    let plain = "a <tool_cal l> b\n";
    assert_eq!(parse(&hermes, plain), expect("", plain, &[]));
    let unknown = "<tool_call>{\"name\": \"h\"}</tool_call>";
    assert_eq!(parse(&hermes, unknown), expect("", unknown, &[]));
    let not_json = "x<tool_call>yes</tool_call>";
    assert_eq!(parse(&hermes, not_json), expect("", not_json, &[]));
    let cut_off = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1";
    assert_eq!(parse(&hermes, cut_off), expect("", "", &[("f", "{\"a\": 1")]));
    let reason = |text: &str| {
        let mut reply = Reply::new(hermes.clone());
        said(&mut reply, &[text]);
        reply.finish_reason()
    };
    assert_eq!([plain, two, cut_off].map(reason), ["stop", "tool_calls", "stop"]);
    // Cut off before its name.
    for rest in ["{", "{\"na", "{\"name\": \"", "{\"arguments\": {\"a\": 1"] {
        assert_eq!(parse(&hermes, &format!("So.\n<tool_call>\n{rest}")), expect("", "So.", &[]), "{rest}");
    }
    for rest in ["</tool_ca", "</tool_call>", "</tool_call>\n<tool"] {
        let cut_off = format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {{}}}}\n{rest}");
        assert_eq!(parse(&hermes, &cut_off), expect("", "", &[("f", "{}")]), "{rest}");
    }
    let mistral = format(Thought::Never, Some(CallFormat::Mistral));
    let two = "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": [1]}}, {\"name\": \"g\", \"arguments\": {}}]";
    assert_eq!(parse(&mistral, two), expect("", "", &[("f", "{\"a\": [1]}"), ("g", "{}")]));
}

/// What a form lets come is handed on to the letter.
#[test]
fn a_form_s_text_has_no_calls_in_it() {
    for (calls, call, arguments) in [
        (CallFormat::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>", "{}"),
        (CallFormat::MistralNamed, "[TOOL_CALLS]f[ARGS]{}", "{}"),
        (CallFormat::Mistral, "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]", "{}"),
    ] {
        let with = |thought| ReplyFormat { calls_or_text: true, ..format(thought, Some(calls)) };
        let text = format!(" {{\"a\": \" {call}\"}}");
        assert_eq!(parse(&with(Thought::Never), &text), expect("", &text, &[]));
        let array = "[1]";
        assert_eq!(parse(&with(Thought::Never), array), expect("", array, &[]));
        assert_eq!(parse(&with(Thought::Never), call), expect("", "", &[("f", arguments)]));
        let thought = format!("<think>{call}</think>\n{call}");
        assert_eq!(
            parse(&with(Thought::Possible(ThoughtMarks::TAGS)), &thought),
            expect(call, "", &[("f", arguments)])
        );
        let said = format!("<think>{call}</think>\n\"{call}\"");
        assert_eq!(
            parse(&with(Thought::Possible(ThoughtMarks::TAGS)), &said),
            expect(call, &format!("\"{call}\""), &[])
        );
    }
}

#[test]
fn calls_whose_names_come_first_are_told_from_what_is_said() {
    let mistral = format(Thought::Never, Some(CallFormat::MistralNamed));
    let two = "[TOOL_CALLS]f[ARGS]{\"a\": \"[TOOL_CALLS]g[ARGS]{}\"}[TOOL_CALLS]g[CALL_ID]abcdef012[ARGS]{}";
    let both = [("f", "{\"a\": \"[TOOL_CALLS]g[ARGS]{}\"}"), ("g", "{}")];
    assert_eq!(parse(&mistral, two), expect("", "", &both));
    assert_eq!(parse(&mistral, &format!("So.\n{two} Done.")), expect("", "So.Done.", &both));
    for text in ["f[ARGS]{}", "[TOOL_CALLS]h[ARGS]{}", "[TOOL_CALLS]f is", "[TOOL_CALLS][{\"name\": \"f\"}]", "[1] b"] {
        assert_eq!(parse(&mistral, text), expect("", text, &[]), "{text}");
    }
    for cut_off in ["[TOOL_CA", "[TOOL_CALLS]", "[TOOL_CALLS]f[AR", "[TOOL_CALLS]f[CALL_ID]ab", "[TOOL_CALLS]f[ARGS]"] {
        let said = if cut_off == "[TOOL_CA" { cut_off } else { "" };
        assert_eq!(parse(&mistral, cut_off), expect("", said, &[]), "{cut_off}");
    }
    assert_eq!(parse(&mistral, "[TOOL_CALLS]f[ARGS]{\"a\": \"["), expect("", "", &[("f", "{\"a\": \"[")]));
}

#[test]
fn calls_between_tags_are_told_from_what_is_said() {
    let qwen = format(Thought::Never, Some(CallFormat::QwenCoder));
    let f = "<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n<b>\n\"\n\n</parameter>\n</function>";
    let two = format!("So.\n<tool_call>\n{f}\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>");
    let both = [("f", "{\"a\": 1, \"b\": \"<b>\\n\\\"\\n\"}"), ("g", "{}")];
    assert_eq!(parse(&qwen, &two), expect("", "So.", &both));
    assert_eq!(parse(&qwen, &format!("{two}\nDone.")), expect("", "So.Done.", &both));
    let short = "<tool_call><function=f><parameter=a>x</parameter></function></tool_call>";
    assert_eq!(parse(&qwen, short), expect("", "", &[("f", "{\"a\": \"x\"}")]));
    for text in ["<tool_call><function=h></function>", "<tool_call>f", "<tool_call><func>", "<function=f>", "<tool_cal"]
    {
        assert_eq!(parse(&qwen, text), expect("", text, &[]), "{text}");
    }
    let cut_off = "<tool_call>\n<function=f>\n<parameter=a>\n[1, 2";
    assert_eq!(parse(&qwen, cut_off), expect("", "", &[("f", "")]));
    let broken = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\nno";
    assert_eq!(parse(&qwen, broken), expect("", "no", &[("f", "{\"a\": 1")]));
    let glm = format(Thought::Never, Some(CallFormat::Glm));
    let a = "<arg_key>a</arg_key>\n<arg_value> x\n</arg_value>\n\
             <arg_key>b</arg_key><arg_value>[\"</arg_value>\"]</arg_value>";
    let two = format!("So.\n<tool_call>f\n{a}\n</tool_call>\n<tool_call>g</tool_call>");
    let both = [("f", "{\"a\": \" x\\n\", \"b\": [\"</arg_value>\"]}"), ("g", "{}")];
    assert_eq!(parse(&glm, &two), expect("", "So.", &both));
    for text in ["<tool_call>h</tool_call>", "<tool_call>f!", "<tool_call>{\"name\": \"f\"}", "f <arg_key>"] {
        assert_eq!(parse(&glm, text), expect("", text, &[]), "{text}");
    }
    let reason = |format: &ReplyFormat, text: &str| {
        let mut reply = Reply::new(format.clone());
        said(&mut reply, &[text]);
        reply.finish_reason()
    };
    assert_eq!([&two, "<tool_call>f<arg_key>a"].map(|text| reason(&glm, text)), ["tool_calls", "stop"]);
    assert_eq!([short, cut_off, broken].map(|text| reason(&qwen, text)), ["tool_calls", "stop", "stop"]);
}

/// A text of a function that says so stays text, and goes out as it comes.
#[test]
fn text_between_tags_streams() {
    let parameters = serde_json::json!({"type": "object", "properties": {"a": {"type": "string"}}});
    let function = Function { name: "f".to_owned(), parameters, strict: false, tool: serde_json::Value::Null };
    for (calls, open, close) in [
        (
            CallFormat::QwenCoder,
            "<tool_call>\n<function=f>\n<parameter=a>\n",
            "\n</parameter>\n</function>\n</tool_call>",
        ),
        (CallFormat::Glm, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>", "</arg_value>\n</tool_call>"),
    ] {
        let functions = vec![Callee::new(&function)];
        let format = ReplyFormat { functions, ..format(Thought::Never, Some(calls)) };
        for (text, json) in [("12", "12"), ("\na\n", "\\na\\n"), ("</p \"", "</p \\\""), ("", ""), ("\n", "\\n")] {
            let said = parse(&format, &format!("{open}{text}{close}"));
            assert_eq!(said, expect("", "", &[("f", &format!("{{\"a\": \"{json}\"}}"))]), "{calls:?} {text:?}");
        }
        let mut reply = Reply::new(format);
        reply.push(open);
        let pieces =
            ["on", "e\n", "two </par", "k>"].map(|text| reply.push(text).calls.pop().map(|call| call.arguments));
        assert_eq!(pieces.map(Option::unwrap_or_default).concat(), "one\\ntwo </park>", "{calls:?}");
    }
}

/// Whatever quotes are in it: of no text of a few letters a reader of JSON is kept from seeing the end.
#[test]
fn a_value_that_is_no_json_ends_at_its_tag() {
    let schema = serde_json::json!({"type": ["string", "array", "object", "null"]});
    let parameters = serde_json::json!({"type": "object", "properties": {"a": schema}});
    let function = Function { name: "f".to_owned(), parameters, strict: false, tool: serde_json::Value::Null };
    let callee = Callee::new(&function);
    let mut texts = vec![String::new()];
    for length in 1..=3 {
        let longer = texts.iter().filter(|text| text.len() == length - 1);
        texts.extend(
            longer.flat_map(|text| "\"\\[{:,a\n".chars().map(move |c| format!("{text}{c}"))).collect::<Vec<_>>(),
        );
    }
    texts.extend(["\"a\" b \"c", "[a] \"b", "{\"a\": b \"c\"\"}", "[\"a\", b \"c]", "5\" by 3\""].map(str::to_owned));
    for (calls, open, between, close) in [
        (
            CallFormat::QwenCoder,
            "<tool_call>\n<function=f>\n<parameter=a>\n",
            "\n</parameter>\n<parameter=b>\n",
            "\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            CallFormat::Glm,
            "<tool_call>f<arg_key>a</arg_key><arg_value>",
            "</arg_value><arg_key>b</arg_key><arg_value>",
            "</arg_value></tool_call>",
        ),
    ] {
        let functions = vec![callee.clone()];
        let format = ReplyFormat { functions, ..format(Thought::Never, Some(calls)) };
        for text in &texts {
            let written = format!("{open}{text}{between}[1]{close}");
            let arguments = format!("{{\"a\": {}, \"b\": [1]}}", callee.parameter("a").json_of(text));
            let whole = expect("", "", &[("f", &arguments)]);
            // Anywhere in the value, and behind it.
            for cut in open.len()..=open.len() + text.len() + between.len() {
                let (first, second) = written.split_at(cut);
                let mut reply = Reply::new(format.clone());
                assert_eq!(said(&mut reply, &[first, second]), whole, "{calls:?} {first:?} {second:?}");
                assert_eq!(reply.finish_reason(), "tool_calls", "{calls:?} {text:?}");
            }
        }
    }
    // Tags in what is JSON are words of it, also where more of them follow.
    let format = format(Thought::Never, Some(CallFormat::Glm));
    let words = r#"["</arg_value></tool_call>\"", "</arg_value><arg_key>"]"#;
    let text = format!("<tool_call>f<arg_key>a</arg_key><arg_value>{words}</arg_value></tool_call>");
    assert_eq!(parse(&format, &text), expect("", "", &[("f", &format!("{{\"a\": {words}}}"))]));
    let two = "<tool_call>f<arg_key>a</arg_key><arg_value>\"x</arg_value></tool_call>\n<tool_call>g</tool_call>";
    assert_eq!(parse(&format, two), expect("", "", &[("f", "{\"a\": \"\\\"x\"}"), ("g", "{}")]));
}

#[test]
fn calls_in_python_are_told_from_text() {
    let python = format(Thought::Never, Some(CallFormat::Pythonic));
    let both = [("f", "{\"a\": 1, \"b\": [\"x\", null]}"), ("g", "{}")];
    let two = "[f(a=1, b=['x', None]), g()]";
    assert_eq!(parse(&python, two), expect("", "", &both));
    for around in ["<|python_start|>{}<|python_end|>", "```python\n{}\n```", "\n {} \n"] {
        assert_eq!(parse(&python, &around.replace("{}", two)), expect("", "", &both), "{around}");
    }
    assert_eq!(parse(&python, &format!("{two} done")), expect("", "done", &both));
    for text in ["[1, 2]", "[f]", "[h(a=1)]", "[f(1)]", "f(a=1)", "[]", "[", "See [f(a=1)]", "[f (", "[é"] {
        assert_eq!(parse(&python, text), expect("", text, &[]), "{text}");
    }
    assert_eq!(parse(&python, "```json\n[1]\n```"), expect("", "```json\n[1]\n```", &[]));
    assert_eq!(parse(&python, "[f(a='cut o"), expect("", "", &[("f", "{\"a\": \"cut o")]));
}

#[test]
fn calls_that_are_all_of_a_text_are_told_from_text() {
    let llama = format(Thought::Never, Some(CallFormat::Llama3));
    let call = "{\"name\": \"f\", \"parameters\": {\"a\": 1}}";
    assert_eq!(parse(&llama, call), expect("", "", &[("f", "{\"a\": 1}")]));
    assert_eq!(parse(&llama, &format!("<|python_tag|>{call}")), expect("", "", &[("f", "{\"a\": 1}")]));
    let both = [("f", "{\"a\": 1}"), ("f", "{\"a\": 1}")];
    assert_eq!(parse(&llama, &format!("{call}; {call}")), expect("", "", &both));
    let gemma = format(Thought::Never, Some(CallFormat::Gemma));
    assert_eq!(parse(&gemma, &format!("```json\n{call}\n```")), expect("", "", &[("f", "{\"a\": 1}")]));
    for text in ["{\"age\": 3}", "{\"name\": \"Ada\"}", "It is {\"name\": \"f\"}", "```rust\nfn", "``", " "] {
        assert_eq!(parse(&gemma, text), expect("", text, &[]), "{text}");
    }
}

/// Two calls of each format, whose arguments are alike.
const CALLS: [(CallFormat, &str); 13] = [
    (
        CallFormat::Seed,
        "<seed:tool_call>\n<function=f>\n<parameter=a>[1, \"x\"]</parameter>\n</function>\n</seed:tool_call>\n\
         <seed:tool_call>\n<function=g>\n</function>\n</seed:tool_call>",
    ),
    (
        CallFormat::MiniMax,
        "<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"a\">[1, \"x\"]</parameter>\n</invoke>\n\
         <invoke name=\"g\">\n</invoke>\n</minimax:tool_call>",
    ),
    (
        CallFormat::Nemotron,
        "<TOOLCALL>[{\"name\": \"f\", \"arguments\": {\"a\": [1, \"x\"]}}, {\"name\": \"g\"}]</TOOLCALL>",
    ),
    (
        CallFormat::Apriel,
        "<tool_calls>[{\"name\": \"f\", \"arguments\": {\"a\": [1, \"x\"]}}, {\"name\": \"g\"}]</tool_calls>",
    ),
    (CallFormat::Lfm, "<|tool_call_start|>[f(a=[1, 'x']), g(b={'c': None})]<|tool_call_end|>"),
    (
        CallFormat::Hermes,
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, \"x\"]}}\n</tool_call>\n\
         <tool_call>\n{\"name\": \"g\"}\n</tool_call>",
    ),
    (
        CallFormat::Mistral,
        "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": [1, \"x\"]}}, {\"name\": \"g\", \"id\": 7}]",
    ),
    (CallFormat::MistralNamed, "[TOOL_CALLS]f[ARGS]{\"a\": [1, \"x\"]}[TOOL_CALLS]g[CALL_ID]abcdef012[ARGS] {}"),
    (
        CallFormat::QwenCoder,
        "<tool_call>\n<function=f>\n<parameter=a>\n[1, \"x\"]\n</parameter>\n</function>\n</tool_call>\n\
         <tool_call>\n<function=g>\n</function>\n</tool_call>",
    ),
    (
        CallFormat::Glm,
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>[1, \"x\"]</arg_value>\n</tool_call>\n<tool_call>g</tool_call>",
    ),
    (CallFormat::Pythonic, "```python\n[f(a=[1, 'x']), g(b={'c': None})]\n```"),
    (CallFormat::Llama3, "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": [1, \"x\"]}}; {\"name\": \"g\"}"),
    (CallFormat::Gemma, "```json\n{\"name\": \"f\", \"parameters\": {\"a\": [1, \"x\"]}}; {\"name\": \"g\"}\n```"),
];

/// What follows them is text, whatever it looks like.
#[test]
fn a_list_of_calls_has_an_end() {
    for (calls, text) in CALLS.into_iter().filter(|(calls, _)| calls.marks().open.is_some() && calls.shares_marks()) {
        let format = format(Thought::Never, Some(calls));
        let (_, _, both) = parse(&format, text);
        for after in ["done", "{\"name\": \"f\"}", "f(a=1)", "<invoke name=\"f\">", "[f()]", "[{\"name\": \"f\"}]"] {
            assert_eq!(parse(&format, &format!("{text} {after}")), (String::new(), after.to_owned(), both.clone()));
        }
        let (_, _, again) = parse(&format, &format!("{text}\n{text}"));
        assert_eq!(again, [both.clone(), both].concat(), "{calls:?}");
    }
}

/// Text comes out as it went in, but for what was told of a call and what closes one.
#[test]
fn of_a_call_that_breaks_off_nothing_is_lost() {
    for (calls, text) in CALLS {
        let format = format(Thought::Never, Some(calls));
        let read = |text: &str| said(&mut Reply::new(format.clone()), &[text]);
        assert_eq!((read(text).1, read(text).2.len()), (String::new(), 2), "{calls:?}");
        let (mut num_broken, ends) = (0, text.char_indices().map(|(at, c)| at + c.len_utf8()));
        for (cut, fault) in ends.flat_map(|cut| ["é no", "\"", "<f ", "[no", "9!", ", \\"].map(|fault| (cut, fault))) {
            let broken = format!("{}{fault}", &text[..cut]);
            let mut reply = Reply::new(format.clone());
            reply.push(&broken);
            // It may still be a call.
            if matches!(reply.state, State::Call(_) | State::Calls { .. }) {
                continue;
            }
            let letters: Vec<String> = broken.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            let mut reply = Reply::new(format.clone());
            let (_, content, told) = said(&mut reply, &letters);
            assert_eq!(read(&broken), (String::new(), content.clone(), told.clone()), "{calls:?} {broken:?}");
            let before = broken.strip_suffix(&content).unwrap_or_else(|| panic!("{calls:?} {broken:?}: {content:?}"));
            let ends = before.char_indices().map(|(at, c)| at + c.len_utf8());
            let told_len = std::iter::once(0).chain(ends).find(|end| read(&before[..*end]).2 == told);
            let between = told_len.map_or("", |told_len| &before[told_len..]);
            let is_within = reply.finish_reason() == "stop";
            let closes = between.replace(if is_within { "\0" } else { calls.marks().close }, "");
            let is_lost = |c: char| !(c.is_whitespace() || !is_within && matches!(c, '}' | ']' | '`'));
            assert!(!content.is_empty() && !closes.contains(is_lost), "{calls:?} {broken:?}: {between:?} {content:?}");
            num_broken += 1;
        }
        assert!(num_broken > text.len(), "{calls:?}: {num_broken}");
    }
}

/// Of a call that was begun and is all that may come, or all that there is, no letter of its mark is an answer.
#[test]
fn a_mark_that_was_cut_off_is_no_text_where_a_call_has_to_follow() {
    for calls in [CallFormat::Hermes, CallFormat::Mistral, CallFormat::MiniMax, CallFormat::Lfm] {
        let open = calls.marks().open.expect("a mark");
        let content = |format: &ReplyFormat, text: &str, is_whole: bool| {
            let mut reply = Reply::new(format.clone());
            let pushed = reply.push(text).content;
            pushed + &reply.finish(is_whole).content
        };
        let free = format(Thought::Never, Some(calls));
        let either = ReplyFormat { calls_or_text: true, ..free.clone() };
        let alone = ReplyFormat { calls_alone: true, ..free.clone() };
        let thinks = ReplyFormat { thought: Thought::Possible(ThoughtMarks::TAGS), ..alone.clone() };
        for begun in ["<", "<thi", "\n<think"] {
            assert_eq!(content(&thinks, begun, false), "", "{calls:?}");
        }
        for begun in (1..open.len()).filter(|at| open.is_char_boundary(*at)).map(|at| &open[..at]) {
            for is_whole in [true, false] {
                assert_eq!(content(&free, begun, is_whole), begun, "{calls:?}");
                for format in [&alone, &thinks] {
                    assert_eq!(content(format, begun, is_whole), "", "{calls:?}");
                }
            }
            // A form may have a text of these letters alone.
            assert_eq!(content(&either, begun, true), begun, "{calls:?}");
            assert_eq!(content(&either, begun, false), "", "{calls:?}");
        }
    }
}

#[test]
fn a_fence_behind_a_call_is_text() {
    let calls = format(Thought::Never, Some(CallFormat::Hermes));
    let call = r#"<tool_call>{"name": "f", "arguments": {}}</tool_call>"#;
    for text in ["```python\nprint(1)\n```", "`x` is it"] {
        let said = parse(&calls, &format!("{call}\n\n{text}"));
        assert_eq!((said.1.trim_start(), said.2.len()), (text, 1));
    }
}
