//! The tokenizer of a model: text to ids and ids to bytes.
//!
//! Invariant: without [`Special::Parse`], no text yields a control token, neither by its spelling nor by merging. Never
//! adds a BOS token: that is the caller's to do, who knows whether the text starts a sequence.

use std::borrow::Cow;
use std::sync::LazyLock;

use super::bpe::Bpe;
use super::cuts::Cuts;
use super::sentence_piece::{SPACE, SentencePiece};
use super::special_tokens::{Fragment, SpecialTokens, TokenKind};
use crate::request::TokenId;

/// What becomes of the spelling of a control token in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// It is that token: for text that the model's owner wrote.
    Parse,
    /// It is text like any other: for what comes from outside.
    AsText,
}

impl Special {
    fn wants(self, kind: TokenKind) -> bool {
        self == Special::Parse || !kind.is_special()
    }
}

#[derive(Debug)]
pub struct Tokenizer {
    pub(super) pieces: Vec<String>,
    pub(super) kinds: Vec<TokenKind>,
    pub(super) special: SpecialTokens,
    pub(super) merger: Merger,
    pub(super) alphabet: Alphabet,
    pub(super) bos: Option<TokenId>,
    pub(super) eos: Option<TokenId>,
    pub(super) add_bos: bool,
    /// What a whole text ends with.
    pub(super) ending: Option<TokenId>,
    /// Of a text, that one token can stand for.
    pub(super) max_bytes_per_token: usize,
}

#[derive(Debug)]
pub enum Merger {
    Bpe(Box<Bpe>),
    SentencePiece(SentencePiece),
}

/// How a piece spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alphabet {
    /// GPT-2's: a printable character a byte.
    ByteLevel,
    /// UTF-8 with `▁` for a space; a sequence may start with one that nobody wrote.
    SentencePiece { add_space_prefix: bool },
}

impl Tokenizer {
    pub fn encode(&self, text: &str, special: Special) -> Vec<TokenId> {
        self.encode_at_most(text, special, usize::MAX)
    }

    /// Like `encode`, but stops soon after `max_tokens`: ids beyond that are not all there are.
    pub fn encode_at_most(&self, text: &str, special: Special, max_tokens: usize) -> Vec<TokenId> {
        self.encode_restoring(text, special, max_tokens, Cow::Borrowed)
    }

    /// Like `encode_at_most`; between the special tokens, `restore` is applied first, and what it brings in is content.
    pub(super) fn encode_restoring<'t>(
        &self,
        text: &'t str,
        special: Special,
        max_tokens: usize,
        restore: impl Fn(&'t str) -> Cow<'t, str>,
    ) -> Vec<TokenId> {
        let mut ids = Vec::new();
        for (index, fragment) in self.special.split(text, |kind| special.wants(kind)).into_iter().enumerate() {
            if ids.len() > max_tokens {
                break;
            }
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) => match restore(text) {
                    Cow::Borrowed(text) => self.merge(text, index == 0, max_tokens, &mut ids),
                    Cow::Owned(content) => self.encode_content(&content, index == 0, max_tokens, &mut ids),
                },
            }
        }
        ids
    }

    fn encode_content(&self, text: &str, at_start: bool, max_tokens: usize, ids: &mut Vec<TokenId>) {
        for (index, fragment) in self.special.split(text, |kind| Special::AsText.wants(kind)).into_iter().enumerate() {
            if ids.len() > max_tokens {
                break;
            }
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) => self.merge(text, at_start && index == 0, max_tokens, ids),
            }
        }
    }

    fn merge(&self, text: &str, at_start: bool, max_tokens: usize, ids: &mut Vec<TokenId>) {
        for (index, part) in self.cuts().parts(text).enumerate() {
            if ids.len() > max_tokens {
                return;
            }
            match &self.merger {
                Merger::Bpe(bpe) => bpe.encode(part, at_start && index == 0, max_tokens, ids),
                Merger::SentencePiece(pieces) => pieces.encode(part, index > 0, ids),
            }
        }
    }

    /// The same, whose parts end at the first place from `num_bytes` on, of which there is at least one.
    pub fn with_parts_of(mut self, num_bytes: usize) -> Tokenizer {
        let cuts = match &mut self.merger {
            Merger::Bpe(bpe) => &mut bpe.cuts,
            Merger::SentencePiece(pieces) => &mut pieces.cuts,
        };
        cuts.part_bytes = num_bytes.max(1);
        self
    }

    /// Where long texts are cut, so that each part's memory is given back before the next.
    pub fn cuts(&self) -> Cuts {
        match &self.merger {
            Merger::Bpe(bpe) => bpe.cuts,
            Merger::SentencePiece(pieces) => pieces.cuts,
        }
    }

    /// How many tokens a text of `num_bytes` is at least. Costs nothing, where tokenizing a long text takes seconds.
    pub fn least_tokens(&self, num_bytes: usize) -> usize {
        num_bytes.div_ceil(self.max_bytes_per_token)
    }

    /// Sets what a token can stand for at most: the bytes of the longest, four times of them after a normalizer, which
    /// may have shortened the text, and any number where white space goes with a token.
    pub(super) fn measured(self) -> Tokenizer {
        let longest = (0..self.pieces.len() as u32).map(|id| self.token_bytes(TokenId(id)).len()).max().unwrap_or(1);
        let shortens = match &self.merger {
            Merger::Bpe(bpe) => bpe.normalizer.is_some(),
            Merger::SentencePiece(_) => false,
        };
        let max_bytes_per_token = match self.special.strips() {
            true => usize::MAX,
            false => longest.max(1) * if shortens { 4 } else { 1 },
        };
        Tokenizer { max_bytes_per_token, ..self }
    }

    /// The text of `ids` as a whole, control tokens left out.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let bytes: Vec<u8> =
            ids.iter().filter(|id| !self.is_special(**id)).flat_map(|id| self.token_bytes(*id)).collect();
        let text = String::from_utf8_lossy(&bytes);
        text.strip_prefix(self.written_prefix()).unwrap_or(&text).to_string()
    }

    /// What the tokenizer writes before a sequence that nobody wrote.
    pub(super) fn written_prefix(&self) -> &'static str {
        match self.alphabet {
            Alphabet::SentencePiece { add_space_prefix: true } => " ",
            _ => "",
        }
    }

    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The piece as the vocabulary spells it.
    pub fn token(&self, id: TokenId) -> Option<&str> {
        self.pieces.get(id.0 as usize).map(String::as_str)
    }

    /// The token that `Special::Parse` finds by this spelling.
    pub fn special_id(&self, spelling: &str) -> Option<TokenId> {
        self.special.id(spelling)
    }

    /// Whether the token is for the model and not for people.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.kinds.get(id.0 as usize).is_some_and(|kind| kind.is_special())
    }

    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    pub fn eos(&self) -> Option<TokenId> {
        self.eos
    }

    /// Whether a sequence starts with the BOS token.
    pub fn add_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// The token that a whole text ends with, where its makers say that it has one: that of models that embed.
    pub fn ending(&self) -> Option<TokenId> {
        self.ending
    }

    /// The bytes that a token stands for; none for an id outside the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        let (Some(piece), Some(kind)) = (self.token(id), self.kinds.get(id.0 as usize)) else { return Vec::new() };
        match (kind, self.alphabet) {
            (TokenKind::Byte, _) => byte_of(piece).map_or_else(|| piece.as_bytes().to_vec(), |byte| vec![byte]),
            (TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined, _) => piece.as_bytes().to_vec(),
            (_, Alphabet::ByteLevel) => unspell(piece),
            (_, Alphabet::SentencePiece { .. }) => piece.replace(SPACE, " ").into_bytes(),
        }
    }
}

/// The byte of a piece `<0x00>`.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok()
}

fn unspell(piece: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(piece.len());
    for c in piece.chars() {
        match BYTES.get(c as usize).copied().flatten() {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(c.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    bytes
}

/// GPT-2's alphabet, by character: printable Latin-1 stands for itself, the other bytes follow from U+0100 on.
static BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let stands_for_itself = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let character = if stands_for_itself { byte as usize } else { next };
        next += usize::from(!stands_for_itself);
        table[character] = Some(byte);
    }
    table
});
