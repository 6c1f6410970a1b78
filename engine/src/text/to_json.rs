//! A tokenizer as Hugging Face's `tokenizer.json`, for who tokenizes elsewhere.
//!
//! Invariant: the file has every id of the vocabulary, and yields the ids of [`Special::Parse`](super::Special). Of
//! SentencePiece the merges follow from the scores: a piece is made of any two that spell it, better pieces first.

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::BPE;

use super::bpe::Bpe;
use super::sentence_piece::{SPACE, SentencePiece};
use super::special_tokens::{SpecialToken, TokenKind};
use super::tokenizer::{Alphabet, Merger, Tokenizer};
use crate::request::TokenId;

impl Tokenizer {
    pub fn to_json(&self) -> Value {
        let (normalizer, pre_tokenizer, model) = match &self.merger {
            Merger::Bpe(bpe) => self.byte_pairs(bpe),
            Merger::SentencePiece(pieces) => self.scored_pieces(pieces),
        };
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": self.decoder(),
            "model": model,
        })
    }

    fn added_tokens(&self) -> Vec<Value> {
        let mut tokens: Vec<_> = self.special.tokens().iter().collect();
        tokens.sort_by_key(|token| token.id);
        let entry = |token: &&SpecialToken| {
            json!({
                "id": token.id.0,
                "content": token.spelling,
                "single_word": false,
                "lstrip": token.strip_left,
                "rstrip": token.strip_right,
                "normalized": false,
                "special": token.kind.is_special(),
            })
        };
        tokens.iter().map(entry).collect()
    }

    /// Puts the tokens around a text that a whole one has.
    fn post_processor(&self) -> Value {
        let around = [self.bos().filter(|_| self.add_bos()), self.ending()];
        let [first, last] = around.map(|id| id.and_then(|id| Some((self.token(id)?, id))));
        if first.is_none() && last.is_none() {
            return Value::Null;
        }
        let special = |(piece, _): (&str, TokenId)| json!({"SpecialToken": {"id": piece, "type_id": 0}});
        let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let template = |names: &[&str]| -> Vec<Value> {
            let texts = names.iter().map(|name| sequence(name));
            first.map(special).into_iter().chain(texts).chain(last.map(special)).collect()
        };
        let known = first.into_iter().chain(last);
        let known =
            known.map(|(piece, TokenId(id))| (piece.to_owned(), json!({"id": piece, "ids": [id], "tokens": [piece]})));
        json!({
            "type": "TemplateProcessing",
            "single": template(&["A"]),
            "pair": template(&["A", "B"]),
            "special_tokens": known.collect::<Map<_, _>>(),
        })
    }

    fn decoder(&self) -> Value {
        let Alphabet::SentencePiece { add_space_prefix } = self.alphabet else {
            return json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if add_space_prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": decoders})
    }

    fn byte_pairs(&self, bpe: &Bpe) -> (Value, Value, Value) {
        let json = |value: Result<Value, serde_json::Error>| value.expect("what was read can be written");
        let [pre_tokenizer, _] = &bpe.pre_tokenizers;
        let merges = bpe.merges.iter().map(|pair| json!(pair.map(|id| self.token(id)))).collect();
        let BPE { byte_fallback, ignore_merges, fuse_unk, .. } = bpe.model;
        let model = self.model(merges, byte_fallback, ignore_merges, fuse_unk);
        (json(serde_json::to_value(&bpe.normalizer)), json(serde_json::to_value(pre_tokenizer)), model)
    }

    fn scored_pieces(&self, pieces: &SentencePiece) -> (Value, Value, Value) {
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
        if pieces.adds_space_prefix() {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        }
        let has_bytes = self.kinds.contains(&TokenKind::Byte);
        let model = self.model(json!(merges(pieces)), has_bytes, false, true);
        (json!({"type": "Sequence", "normalizers": normalizers}), Value::Null, model)
    }

    fn model(&self, merges: Value, byte_fallback: bool, ignore_merges: bool, fuse_unknown: bool) -> Value {
        let unknown = self.kinds.iter().position(|kind| *kind == TokenKind::Unknown);
        let vocabulary = self.pieces.iter().zip(0u32..).map(|(piece, id)| (piece.clone(), id.into()));
        json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown.map(|id| &self.pieces[id]),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": fuse_unknown,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary.collect::<Map<String, Value>>(),
            "merges": merges,
        })
    }
}

/// Two pieces for each, the best result first; of one result, the lowest ids first.
fn merges(pieces: &SentencePiece) -> Vec<[&str; 2]> {
    let mut merges = Vec::new();
    for (piece, (_, score)) in pieces.all() {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some((first, _)), Some((second, _))) = (pieces.get(left), pieces.get(right)) {
                merges.push((score, first, second, [left, right]));
            }
        }
    }
    merges.sort_unstable_by(|(score, first, second, _), (other, third, fourth, _)| {
        other.total_cmp(score).then((first, second).cmp(&(third, fourth)))
    });
    merges.into_iter().map(|(.., parts)| parts).collect()
}
