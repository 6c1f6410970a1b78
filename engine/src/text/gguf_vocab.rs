//! The vocabulary as GGUF's `tokenizer.ggml.*` keys hold it, and the tokenizer made of it.
//!
//! Invariant: every id in a `Tokenizer` made here is below the number of tokens; lists of unlike length are refused.

use super::TextError;
use super::bpe::{self, Bpe};
use super::cuts::Cuts;
use super::pre_tokenizer::PreTokenizer;
use super::sentence_piece::SentencePiece;
use super::special_tokens::{SpecialToken, SpecialTokens, TokenKind};
use super::tokenizer::{Alphabet, Merger, Tokenizer};
use crate::format::gguf::Gguf;
use crate::request::TokenId;

#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `gpt2` or `llama`.
    pub model: String,
    /// The pre-tokenizer's name; empty where the file has none.
    pub pre: String,
    pub tokens: Vec<String>,
    /// As many as tokens, or none.
    pub scores: Vec<f32>,
    pub token_types: Vec<i32>,
    /// "left right", in the order of their rank.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
}

/// Ends of a turn that some files mark as ordinary tokens; they are control tokens all the same.
const ALWAYS_CONTROL: [&str; 8] =
    ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"];

impl Tokenizer {
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, TextError> {
        Tokenizer::from_vocab(GgufVocab::read(gguf)?)
    }

    pub fn from_vocab(vocab: GgufVocab) -> Result<Tokenizer, TextError> {
        vocab.check()?;
        let kinds = vocab.kinds();
        let (merger, alphabet, add_bos) = match vocab.model.as_str() {
            "gpt2" => vocab.byte_level(&kinds)?,
            "llama" => vocab.sentence_piece(&kinds)?,
            _ => return Err(TextError::UnknownModel(vocab.model)),
        };
        let is_found = |kind: TokenKind| kind.is_special() || kind == TokenKind::UserDefined;
        let special = (0..).zip(&vocab.tokens).zip(&kinds).filter(|(_, kind)| is_found(**kind));
        let special = SpecialTokens::new(special.map(|((id, token), &kind)| SpecialToken {
            id: TokenId(id),
            spelling: token.clone(),
            kind,
            strip_left: false,
            strip_right: false,
        }));
        let tokenizer = Tokenizer {
            pieces: vocab.tokens,
            kinds,
            special,
            merger,
            alphabet,
            bos: vocab.bos.map(TokenId),
            eos: vocab.eos.map(TokenId),
            add_bos: vocab.add_bos.unwrap_or(add_bos),
            ending: vocab.eos.map(TokenId).filter(|_| vocab.add_eos == Some(true)),
            max_bytes_per_token: 0,
        };
        Ok(tokenizer.measured())
    }
}

impl GgufVocab {
    fn read(gguf: &Gguf) -> Result<GgufVocab, TextError> {
        let missing = |key| TextError::Missing(gguf.path().to_path_buf(), key);
        Ok(GgufVocab {
            model: gguf.str("tokenizer.ggml.model")?.ok_or_else(|| missing("model"))?.to_string(),
            pre: gguf.str("tokenizer.ggml.pre")?.unwrap_or_default().to_string(),
            tokens: gguf.strings("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokens"))?.to_vec(),
            scores: gguf.f32s("tokenizer.ggml.scores")?.unwrap_or_default().to_vec(),
            token_types: gguf.i32s("tokenizer.ggml.token_type")?.unwrap_or_default().to_vec(),
            merges: gguf.strings("tokenizer.ggml.merges")?.unwrap_or_default().to_vec(),
            bos: gguf.u32("tokenizer.ggml.bos_token_id")?,
            eos: gguf.u32("tokenizer.ggml.eos_token_id")?,
            unk: gguf.u32("tokenizer.ggml.unknown_token_id")?,
            add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
        })
    }

    fn check(&self) -> Result<(), TextError> {
        let problem = |text: String| Err(TextError::Vocabulary(text));
        let num_tokens = self.tokens.len();
        if num_tokens == 0 {
            return problem("tokenizer.ggml.tokens is empty".to_string());
        }
        for (name, length) in [("scores", self.scores.len()), ("token_type", self.token_types.len())] {
            if length != 0 && length != num_tokens {
                return problem(format!("there are {num_tokens} tokens, but tokenizer.ggml.{name} has {length}"));
            }
        }
        for (name, id) in [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk)] {
            if let Some(id) = id.filter(|&id| id as usize >= num_tokens) {
                return problem(format!("tokenizer.ggml.{name}_token_id is {id}, but there are {num_tokens} tokens"));
            }
        }
        Ok(())
    }

    fn kinds(&self) -> Vec<TokenKind> {
        let kind = |(index, token): (usize, &String)| match self.token_types.get(index) {
            _ if ALWAYS_CONTROL.contains(&token.as_str()) => TokenKind::Control,
            Some(&token_type) => TokenKind::from_gguf(token_type),
            None => TokenKind::Normal,
        };
        self.tokens.iter().enumerate().map(kind).collect()
    }

    fn byte_level(&self, kinds: &[TokenKind]) -> Result<(Merger, Alphabet, bool), TextError> {
        let pre = PreTokenizer::by_name(&self.pre)?;
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in &self.merges {
            // A piece may itself start with a space, so the first byte separates nothing.
            let space = merge.bytes().skip(1).position(|byte| byte == b' ').map(|at| at + 1);
            let Some(space) = space else {
                return Err(TextError::Vocabulary(format!("the merge {merge:?} is not two tokens")));
            };
            merges.push((&merge[..space], &merge[space + 1..]));
        }
        let (builder, merges) = bpe::builder(&self.tokens, kinds, merges.into_iter())?;
        let model = builder
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(|error| TextError::Vocabulary(error.to_string()))?;
        let pre_tokenizers = [Some(pre.build()), Some(pre.build())];
        let bpe = Bpe { normalizer: None, pre_tokenizers, model, merges, cuts: Cuts::BOTH };
        Ok((Merger::Bpe(bpe.into()), Alphabet::ByteLevel, pre.add_bos))
    }

    fn sentence_piece(&self, kinds: &[TokenKind]) -> Result<(Merger, Alphabet, bool), TextError> {
        let add_space_prefix = self.add_space_prefix.unwrap_or(true);
        let pieces = SentencePiece::new(&self.tokens, kinds, &self.scores, self.unk, add_space_prefix)?;
        Ok((Merger::SentencePiece(pieces), Alphabet::SentencePiece { add_space_prefix }, true))
    }
}
