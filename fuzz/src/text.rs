//! Chat templates, which are programs that come with a model, and grammars, which come with a request.

use std::sync::{Arc, LazyLock};

use fullbore_engine::bundle::Bundle;
use fullbore_engine::grammar::{GrammarCompiler, GrammarError, GrammarSource, Progress};
use fullbore_engine::request::TokenId;
use fullbore_engine::text::{ChatInput, ChatMessage, ChatTemplate, Tokenizer};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::{check_sentence, parts};

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Bundle::simulated().tokenizer);

static GRAMMARS: LazyLock<GrammarCompiler> = LazyLock::new(|| {
    let Bundle { tokenizer, stop_ids, config, .. } = Bundle::simulated();
    GrammarCompiler::new(tokenizer, stop_ids, config.vocab_size)
});

const MAX_TOKENS: usize = 4096;

/// A template, and what it is given: an object with `messages`, and perhaps `tools` and `variables`.
pub fn chat_template(data: &[u8]) {
    let [source, input] = parts(data);
    let input: Value = serde_json::from_slice(input).unwrap_or_default();
    let template = match ChatTemplate::new(&String::from_utf8_lossy(source), "<s>", "<|im_end|>") {
        Ok(template) => template,
        Err(error) => return check_sentence(&error.to_string()),
    };
    let message = |message: &Value| {
        let text = |name: &str| message[name].as_str().unwrap_or_default().to_owned();
        let mut extra = message.as_object().cloned().unwrap_or_default();
        extra.retain(|name, _| name != "role" && name != "content");
        ChatMessage { role: text("role"), content: text("content"), extra }
    };
    let messages: Vec<ChatMessage> = match input["messages"].as_array() {
        Some(messages) => messages.iter().map(message).collect(),
        None => vec![ChatMessage::new("user", "Hi <|im_end|>")],
    };
    let variables: Map<String, Value> = input["variables"].as_object().cloned().unwrap_or_default();
    let input = ChatInput {
        messages: &messages,
        add_generation_prompt: true,
        tools: input["tools"].as_array().map(Vec::as_slice),
        variables: Some(&variables),
    };
    match template.encode_at_most(&TOKENIZER, &input, MAX_TOKENS) {
        Ok(prompt) => assert!(prompt.ids.iter().all(|id| (id.0 as usize) < TOKENIZER.vocab_size())),
        Err(error) => check_sentence(&error.to_string()),
    }
}

/// Tokens that are followed at most.
const MAX_STEPS: usize = 48;

/// A JSON schema if it begins with a brace, a regular expression behind a slash, else a grammar in Lark; followed by
/// tokens that its own bytes choose.
pub fn grammar(data: &[u8]) {
    let text = String::from_utf8_lossy(data).into_owned();
    let source = match text.strip_prefix('/') {
        Some(regex) => GrammarSource::Regex(regex.to_owned()),
        None if text.starts_with('{') => match serde_json::from_str(&text) {
            Ok(schema) => GrammarSource::JsonSchema(schema),
            Err(_) => return,
        },
        None => GrammarSource::Lark(text),
    };
    let grammar = match GRAMMARS.compile(&source) {
        Ok(grammar) => grammar,
        // Here a panic of llguidance is a sentence.
        Err(GrammarError::Invalid(sentence)) => return assert!(!sentence.is_empty()),
        Err(error) => return check_sentence(&error.to_string()),
    };
    let mut matcher = grammar.matcher();
    let mut mask = vec![0; TOKENIZER.vocab_size().div_ceil(32)];
    let mut ids = Vec::new();
    for step in 0..MAX_STEPS {
        if let Err(sentence) = matcher.mask(&mut mask) {
            return check_sentence(&sentence);
        }
        let allowed: Vec<u32> =
            (0..mask.len() as u32 * 32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        assert!(!allowed.is_empty(), "a mask without a token");
        let turn = data[step * 7 % data.len()] as usize + step;
        // Ends are taken early, else hardly one would be.
        let id =
            allowed.iter().find(|id| **id == END && turn.is_multiple_of(4)).unwrap_or(&allowed[turn % allowed.len()]);
        ids.push(TokenId(*id));
        match matcher.advance(TokenId(*id)) {
            Ok(Progress::Goes) => {}
            Ok(Progress::Ended) => return check_text(&source, &ids),
            Err(sentence) => return check_sentence(&sentence),
        }
    }
}

/// The simulated model's end of a text.
const END: u32 = 2;

/// What followed a schema to its end is JSON.
fn check_text(source: &GrammarSource, ids: &[TokenId]) {
    let text = TOKENIZER.decode(ids);
    if let GrammarSource::JsonSchema(schema) = source {
        assert!(serde_json::from_str::<IgnoredAny>(&text).is_ok(), "{text:?} follows {schema}");
    }
}
