//! A tokenizer's vocabulary as llguidance walks it: a trie over the bytes of all tokens, made once.
//!
//! Invariant: a control token is none of its spelling's bytes, so no grammar of text allows one, and the tokens that
//! end a text are allowed where the grammar may end.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use serde::{Deserialize, Serialize};

use crate::request::TokenId;
use crate::text::Tokenizer;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Vocabulary {
    /// The bytes of each token in a grammar.
    words: Vec<Vec<u8>>,
    /// Of which one ends a text; the first is always there.
    ends: Vec<u32>,
    /// Of the model.
    pub vocab_size: u32,
}

impl Vocabulary {
    /// Of `tokenizer`, whose texts end with one of `stop_ids`.
    pub fn new(tokenizer: &Tokenizer, stop_ids: &[TokenId], vocab_size: u32) -> Vocabulary {
        let mut words: Vec<Vec<u8>> =
            (0..tokenizer.vocab_size() as u32).map(|id| word(tokenizer, TokenId(id))).collect();
        let mut ends: Vec<u32> = stop_ids.iter().map(|id| id.0).filter(|id| (*id as usize) < words.len()).collect();
        if ends.is_empty() {
            // A model without one: a token beyond the vocabulary, which it cannot choose.
            ends.push(words.len() as u32);
            words.push(Vec::new());
        }
        Vocabulary { words, ends, vocab_size }
    }

    /// What makes parsers.
    pub fn factory(&self) -> Result<ParserFactory, String> {
        let info = TokRxInfo::new(self.words.len() as u32, self.ends[0]);
        let trie = TokTrie::from(&info, &self.words).with_eos_tokens(&self.ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        factory.map_err(|error| error.to_string())
    }
}

/// The bytes of a token in a grammar; none for one that no text needs.
fn word(tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    match tokenizer.is_special(id) {
        true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat(),
        false => bytes,
    }
}
