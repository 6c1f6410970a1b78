//! Ids to text while they come in.
//!
//! Invariant: only whole characters leave; all that `push` and `finish` give, put together, is the text of all ids at
//! once, U+FFFD standing for bytes that are no UTF-8. Knows one sequence.

use std::sync::Arc;

use super::tokenizer::Tokenizer;
use crate::request::TokenId;

/// By default its ids continue a prompt, so that a leading space is the model's and stays.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The start of a character whose other bytes are to come: 3 bytes at most.
    pending: Vec<u8>,
    /// Still to be dropped from the front of the text.
    written_prefix: &'static str,
    with_special: bool,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Detokenizer {
        Detokenizer { tokenizer, pending: Vec::new(), written_prefix: "", with_special: false }
    }

    /// Whether control tokens give their spelling instead of nothing.
    pub fn with_special(self, with_special: bool) -> Detokenizer {
        Detokenizer { with_special, ..self }
    }

    /// For ids that start a sequence: drops the space that the tokenizer itself wrote before the text.
    pub fn from_start(self) -> Detokenizer {
        Detokenizer { written_prefix: self.tokenizer.written_prefix(), ..self }
    }

    pub fn push(&mut self, id: TokenId) -> String {
        if !self.with_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        self.pending.extend(self.tokenizer.token_bytes(id));
        let mut text = String::new();
        let mut pending = self.pending.as_slice();
        loop {
            match std::str::from_utf8(pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    pending = &[];
                    break;
                }
                Err(error) => {
                    let (valid, rest) = pending.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    pending = rest;
                    let Some(length) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    pending = &pending[length..];
                }
            }
        }
        self.pending = pending.to_vec();
        self.drop_written_prefix(text)
    }

    /// A token as the vocabulary spells it, a control token too.
    pub fn spelling(&self, id: TokenId) -> String {
        self.tokenizer.token(id).unwrap_or_default().to_owned()
    }

    /// What is left: U+FFFD for a character that never came whole.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        self.drop_written_prefix(String::from_utf8_lossy(&rest).into_owned())
    }

    fn drop_written_prefix(&mut self, text: String) -> String {
        if text.is_empty() {
            return text;
        }
        let prefix = std::mem::take(&mut self.written_prefix);
        text.strip_prefix(prefix).map(str::to_string).unwrap_or(text)
    }
}
