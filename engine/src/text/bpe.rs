//! BPE over merges, by the `tokenizers` crate: normalise, cut into words, merge each.
//!
//! Invariant: no token that [`TokenKind::is_special`] is in the model's vocabulary, so that no text merges into one.

use std::collections::HashSet;

use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::tokenizer::{Model, Normalizer, PreTokenizer};
use tokenizers::{NormalizedString, OffsetReferential, OffsetType, PreTokenizedString};

use super::TextError;
use super::cuts::Cuts;
use super::special_tokens::TokenKind;
use crate::request::TokenId;

#[derive(Debug)]
pub struct Bpe {
    pub normalizer: Option<NormalizerWrapper>,
    /// For the text at the very start of the input, and for text elsewhere.
    pub pre_tokenizers: [Option<PreTokenizerWrapper>; 2],
    pub model: BPE,
    /// The two that each merge takes, in the order of their rank.
    pub merges: Vec<[TokenId; 2]>,
    pub cuts: Cuts,
}

impl Bpe {
    /// Appends the ids of `text`; stops soon after `max_tokens` of them.
    pub fn encode(&self, text: &str, at_start: bool, max_tokens: usize, ids: &mut Vec<TokenId>) {
        const CHECKED: &str = "a model that was checked at load tokenises any text";
        let words = self.words(text, at_start).expect(CHECKED);
        for (word, ..) in words.get_splits(OffsetReferential::Original, OffsetType::None) {
            if ids.len() > max_tokens {
                return;
            }
            ids.extend(self.model.tokenize(word).expect(CHECKED).iter().map(|token| TokenId(token.id)));
        }
    }

    fn words(&self, text: &str, at_start: bool) -> tokenizers::Result<PreTokenizedString> {
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = &self.normalizer {
            normalizer.normalize(&mut normalized)?;
        }
        let mut words = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = &self.pre_tokenizers[usize::from(!at_start)] {
            pre_tokenizer.pre_tokenize(&mut words)?;
        }
        Ok(words)
    }
}

/// A builder with every token and merge that text may yield, and those merges. Merges are (left, right), in the order
/// of their rank.
pub fn builder<'m>(
    tokens: &[String],
    kinds: &[TokenKind],
    merges: impl Iterator<Item = (&'m str, &'m str)>,
) -> Result<(BpeBuilder, Vec<[TokenId; 2]>), TextError> {
    let mut vocab = Vocab::default();
    let mut special = HashSet::new();
    for ((id, token), kind) in (0..).zip(tokens).zip(kinds) {
        if kind.is_special() {
            special.insert(token.as_str());
        } else {
            vocab.insert(token.clone(), id);
        }
    }
    let (mut kept, mut ids) = (Vec::new(), Vec::new());
    for (left, right) in merges {
        let merged = format!("{left}{right}");
        let missing = [left, right, &merged].into_iter().find(|token| !vocab.contains_key(*token));
        match missing {
            None => {
                kept.push((left.to_string(), right.to_string()));
                ids.push([left, right].map(|token| TokenId(vocab[token])));
            }
            Some(token) if special.contains(token) => {}
            Some(token) => {
                let problem =
                    format!("the merge of {left:?} and {right:?} needs the token {token:?}, which is missing");
                return Err(TextError::Vocabulary(problem));
            }
        }
    }
    Ok((BPE::builder().vocab_and_merges(vocab, kept), ids))
}
