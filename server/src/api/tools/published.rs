//! Templates as they were published, of some seventy models: where one is said to write calls by itself, what it writes
//! is read as that call, and is what a grammar lets come. Needs llama.cpp's collection (`make models`).

use std::fs;

use fullbore_engine::bundle::Bundle;
use fullbore_engine::text::{ChatInput, ChatMessage, ChatTemplate, TextError};
use serde_json::{Value, json};

use super::format::tests::Rig;
use super::format::{CallFormat, Thought, ThoughtMarks, grammar, plain_messages};
use super::parameters::Callee;
use super::{Function, ToolChoice, Tools};
use crate::api::reply::{Reply, ReplyFormat};
use crate::fetch::cache_folder;

fn templates() -> Vec<(String, ChatTemplate)> {
    let folder = cache_folder().expect("a cache folder").join("vocab/templates");
    let files = fs::read_dir(&folder);
    let files = files.unwrap_or_else(|error| panic!("{}: {error}: run scripts/vocab.sh", folder.display()));
    let mut templates: Vec<_> = files
        .map(|file| {
            let path = file.expect("a file").path();
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let source = fs::read_to_string(&path).expect("text");
            let template = ChatTemplate::new(&source, "<s>", "</s>");
            (name.clone(), template.unwrap_or_else(|error| panic!("{name}: {error}")))
        })
        .collect();
    templates.sort_by(|one, other| one.0.cmp(&other.0));
    templates
}

fn offered() -> Tools {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": false});
    let function = json!({"name": "weather", "description": "Says what it is like outside.", "parameters": parameters});
    let tool = json!({"type": "function", "function": function});
    let function = Function { name: "weather".to_owned(), parameters, strict: true, tool };
    Tools { functions: vec![function], choice: ToolChoice::Required, parallel: true }
}

/// A question, a call, its answer, and thanks.
fn turns() -> Vec<ChatMessage> {
    let mut call = ChatMessage::new("assistant", "");
    let function = json!({"name": "weather", "arguments": {"city": "Oslo"}});
    let calls = json!([{"id": "abcdef012", "type": "function", "function": function}]);
    call.extra.insert("tool_calls".to_owned(), calls);
    let mut result = ChatMessage::new("tool", "Snow by noon.");
    result.extra.insert("tool_call_id".to_owned(), json!("abcdef012"));
    result.extra.insert("name".to_owned(), json!("weather"));
    vec![
        ChatMessage::new("user", "How is it in Oslo?"),
        call,
        result,
        ChatMessage::new("assistant", "Cold."),
        ChatMessage::new("user", "Thanks."),
    ]
}

/// What a template makes of the first `num_turns`, as a chat has it do so.
fn rendered(template: &ChatTemplate, num_turns: usize, is_asked: bool) -> Result<String, TextError> {
    let format = CallFormat::of_template(template.source());
    let tools: Vec<Value> = offered().functions.iter().map(|function| function.tool.clone()).collect();
    let turns = turns().into_iter().take(num_turns).collect();
    let messages = if format.is_of_template() { turns } else { plain_messages(format, &offered(), turns) };
    let input = ChatInput {
        messages: &messages,
        add_generation_prompt: is_asked,
        tools: format.is_of_template().then_some(tools.as_slice()),
        variables: None,
    };
    template.encode_at_most(&Bundle::simulated().tokenizer, &input, usize::MAX).map(|prompt| prompt.text)
}

/// What an answer says beside thoughts, and its calls.
fn read(format: CallFormat, text: &str) -> (String, Vec<(String, Value)>) {
    let functions = offered().functions.iter().map(Callee::new).collect();
    let mut reply =
        Reply::new(ReplyFormat { thought: thought(text), calls: Some(format), functions, ..ReplyFormat::default() });
    let (mut said, mut calls) = (String::new(), Vec::new());
    for pieces in [reply.push(text), reply.finish(true)] {
        said += &pieces.content;
        for piece in pieces.calls {
            calls.extend(piece.begin.map(|(_, name)| (name, String::new())));
            calls.last_mut().expect("it has begun").1 += &piece.arguments;
        }
    }
    let parsed = |(name, arguments): (String, String)| (name, serde_json::from_str(&arguments).expect("JSON"));
    (said, calls.into_iter().map(parsed).collect())
}

/// What ends a turn.
const ENDS: [&str; 13] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "</s>",
    "<|end_of_text|>",
    "<sep>",
    "<|role_end|>",
    "<｜end▁of▁sentence｜>",
    "</assistant>",
    "<seed:eos>",
    "[e~[",
    "<SPECIAL_12>",
    "<|end|>",
];

/// What precedes a call as a template writes it: the question may end in a thought that is open.
fn thought(text: &str) -> Thought {
    match () {
        _ if text.starts_with("</think>") => Thought::Begun(ThoughtMarks::TAGS),
        _ if text.starts_with("<think>") => Thought::Possible(ThoughtMarks::TAGS),
        _ => Thought::Never,
    }
}

/// What a template adds for the call: what the model would have written.
fn written(template: &ChatTemplate) -> Result<String, TextError> {
    let (asked, called) = (rendered(template, 1, true)?, rendered(template, 2, false)?);
    let differs = asked.char_indices().zip(called.chars()).find(|((_, one), other)| one != other);
    let mut common = differs.map_or(asked.len().min(called.len()), |((at, _), _)| at);
    // Two marks may begin alike.
    if let Some(mark) = called[..common].rfind('<').filter(|mark| !called[*mark..common].contains('>')) {
        common = mark;
    }
    let mut text = called[common..].trim();
    while let Some(rest) = ENDS.iter().find_map(|end| text.strip_suffix(end)) {
        text = rest.trim_end();
    }
    Ok(text.to_owned())
}

fn check(rig: &Rig, template: &ChatTemplate) -> Result<(), String> {
    let format = CallFormat::of_template(template.source());
    let say = |error: TextError| error.to_string();
    if format.is_of_template() {
        let text = written(template).map_err(say)?;
        let read = read(format, &text);
        if read != (String::new(), vec![("weather".to_owned(), json!({"city": "Oslo"}))]) {
            return Err(format!("{text:?} is read as {read:?}"));
        }
        let forced = grammar(format, &offered(), None, thought(&text), &rig.tokenizer).expect("something is forced");
        if !rig.takes(&forced, &text) {
            return Err(format!("{text:?} may not come"));
        }
    }
    let whole = rendered(template, 5, true).map_err(say)?;
    let parts =
        ["How is it in Oslo?", "weather", "Says what it is like outside.", "city", "Oslo", "Snow by noon.", "Thanks."];
    match parts.iter().find(|part| !whole.contains(**part)) {
        Some(part) => Err(format!("{part:?} is not in {whole:?}")),
        None => Ok(()),
    }
}

/// What is said of those that take no system message, need what nobody gives, or ask more of Python.
const REFUSED: [(&str, &str); 3] = [
    ("google-gemma-2-2b-it", "System role not supported"),
    ("fireworks-ai-llama-3-firefunction-v2", "`functions` is undefined"),
    ("tencent-Hy3", "string has no method named format"),
];

#[test]
fn what_a_template_writes_of_a_call_is_read_and_let_come() {
    let rig = Rig::new();
    let (mut failures, mut num_of_template) = (Vec::new(), 0);
    for (name, template) in templates() {
        let format = CallFormat::of_template(template.source());
        num_of_template += u32::from(format.is_of_template());
        let refused = REFUSED.iter().find(|(refused, _)| *refused == name);
        match (check(&rig, &template), refused) {
            (Ok(()), None) => {}
            (Err(error), Some((_, sentence))) if error.contains(sentence) => {}
            (result, _) => failures.push(format!("{format:?} {name}: {result:?}")),
        }
    }
    assert!(num_of_template >= 34, "{num_of_template} of templates say how they write calls");
    assert!(failures.is_empty(), "{} of templates:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn families_are_known_by_their_templates() {
    let known = [
        ("Qwen-Qwen2.5-7B-Instruct", CallFormat::Hermes),
        ("Qwen-Qwen3-0.6B", CallFormat::Hermes),
        ("Qwen-QwQ-32B", CallFormat::Hermes),
        ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", CallFormat::Hermes),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", CallFormat::Hermes),
        ("meta-llama-Llama-3.1-8B-Instruct", CallFormat::Llama3),
        ("meta-llama-Llama-3.2-3B-Instruct", CallFormat::Llama3),
        ("meta-llama-Llama-3.3-70B-Instruct", CallFormat::Llama3),
        ("mistralai-Mistral-Nemo-Instruct-2407", CallFormat::Mistral),
        ("Mistral-Small-3.2-24B-Instruct-2506", CallFormat::MistralNamed),
        ("mistralai-Ministral-3-14B-Reasoning-2512", CallFormat::MistralNamed),
        ("unsloth-mistral-Devstral-Small-2507", CallFormat::MistralNamed),
        ("google-gemma-2-2b-it", CallFormat::Gemma),
        ("Qwen3-Coder", CallFormat::QwenCoder),
        ("Qwen3.5-4B", CallFormat::QwenCoder),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", CallFormat::QwenCoder),
        ("GLM-4.6", CallFormat::Glm),
        ("GLM-4.7-Flash", CallFormat::Glm),
        ("ByteDance-Seed-OSS", CallFormat::Seed),
        ("MiniMax-M2", CallFormat::MiniMax),
        ("NVIDIA-Nemotron-Nano-v2", CallFormat::Nemotron),
        ("unsloth-Apriel-1.5", CallFormat::Apriel),
        ("Apriel-1.6-15b-Thinker-fixed", CallFormat::Apriel),
        ("LFM2.5-8B-A1B", CallFormat::Lfm),
        // What they write has tags of other names, or no list.
        ("MiniMax-M3", CallFormat::Generic),
        ("MiniMax-M1", CallFormat::Generic),
    ];
    let templates = templates();
    for (name, format) in known {
        let (_, template) = templates.iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(CallFormat::of_template(template.source()), format, "{name}");
    }
}
