//! Log-probabilities as JSON, in the shapes that the API has. Invariant: a token's bytes are exact in both: chats
//! give them as numbers, completions as `bytes:\xe2\x80` where they are no text of their own.

use fullbore_engine::request::{TokenId, TokenLogprobs};
use fullbore_engine::text::Tokenizer;
use serde_json::{Map, Value, json};

use super::generation::Entry;

/// `{"content": [...]}` of a chat.
pub fn chat(tokenizer: &Tokenizer, entries: &[Entry]) -> Value {
    json!({"content": tokens(tokenizer, entries), "refusal": null})
}

/// The list of a response's text: of the tokens that said it.
pub fn response(tokenizer: &Tokenizer, mut entries: Vec<Entry>) -> Vec<Value> {
    entries.retain(|entry| entry.is_said);
    tokens(tokenizer, &entries)
}

fn tokens(tokenizer: &Tokenizer, entries: &[Entry]) -> Vec<Value> {
    let token = |id: TokenId, logprob: f32| {
        let bytes = tokenizer.token_bytes(id);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        json!({"token": text, "logprob": logprob, "bytes": bytes})
    };
    let entry = |logprobs: &TokenLogprobs| {
        let mut value = token(logprobs.id, logprobs.logprob);
        value["top_logprobs"] = logprobs.top.iter().map(|&(id, logprob)| token(id, logprob)).collect();
        value
    };
    entries.iter().filter_map(|entry| entry.logprobs.as_ref()).map(entry).collect()
}

/// The four lists of a completion.
pub fn completion(tokenizer: &Tokenizer, entries: &[Entry]) -> Value {
    let spelling = |id: TokenId| spelling(tokenizer.token_bytes(id));
    let top = |logprobs: &TokenLogprobs| {
        let alternatives = logprobs.top.iter().map(|&(id, logprob)| (spelling(id), json!(logprob)));
        let mut map: Map<String, Value> = alternatives.collect();
        // Always there, also when it is not among the most likely ones.
        map.entry(spelling(logprobs.id)).or_insert(json!(logprobs.logprob));
        map
    };
    let given = |entry: &Entry| entry.logprobs.as_ref().map(|logprobs| logprobs.logprob);
    json!({
        "tokens": entries.iter().map(|entry| spelling(entry.id)).collect::<Vec<_>>(),
        "token_logprobs": entries.iter().map(given).collect::<Vec<_>>(),
        "top_logprobs": entries.iter().map(|entry| entry.logprobs.as_ref().map(top)).collect::<Vec<_>>(),
        "text_offset": entries.iter().map(|entry| entry.offset).collect::<Vec<_>>(),
    })
}

/// vLLM's list of a prompt's tokens, of which the first has none: by id, the token itself and the most likely ones.
pub fn prompt(tokenizer: &Tokenizer, prompt: &[TokenLogprobs]) -> Value {
    let token = |id: TokenId, logprob: f32, rank: u32| {
        let text = String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned();
        (id.to_string(), json!({"logprob": logprob, "rank": rank, "decoded_token": text}))
    };
    let entry = |logprobs: &TokenLogprobs| {
        let own = token(logprobs.id, logprobs.logprob, logprobs.rank);
        let top = logprobs.top.iter().zip(1..).map(|(&(id, logprob), rank)| token(id, logprob, rank));
        Value::Object(std::iter::once(own).chain(top).collect())
    };
    std::iter::once(Value::Null).chain(prompt.iter().map(entry)).collect()
}

fn spelling(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let digits: String = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        format!("bytes:{digits}")
    })
}
