//! The tokenizer as Hugging Face's `tokenizer.json` holds it.
//!
//! Invariant: a setting that would change ids and is not followed here is an error that names it. Added tokens are
//! found by this crate's own search, so that [`super::Special`] means the same for every file format.

use serde_json::Value;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

use super::TextError;
use super::bpe::{self, Bpe};
use super::cuts::Cuts;
use super::pre_tokenizer::Pattern;
use super::special_tokens::{SpecialToken, SpecialTokens, TokenKind};
use super::tokenizer::{Alphabet, Merger, Tokenizer};
use crate::request::TokenId;

/// Ids at most, so that a damaged file cannot ask for a table of 4 billion.
const MAX_VOCAB: u64 = 1 << 24;

impl Tokenizer {
    pub fn from_json(bytes: &[u8]) -> Result<Tokenizer, TextError> {
        let json: Value = serde_json::from_slice(bytes).map_err(|error| problem(format!("it is no JSON: {error}")))?;
        let file = TokenizerJson { json };
        let model = file.section("model")?;
        file.refuse_unknown(model)?;
        let added = file.added_tokens()?;
        let (pieces, kinds) = file.vocabulary(model, &added)?;
        let ids = |id: &Value| id.as_str().and_then(|text| added.iter().find(|token| token.spelling == text));
        let bos = file.first_special().and_then(ids).map(|token| token.id);
        let ending = file.last_special().and_then(ids).map(|token| token.id);
        let is_byte_level = file.mentions("pre_tokenizer", "ByteLevel") || file.mentions("decoder", "ByteLevel");
        let writes_prefix = file.mentions("normalizer", "Prepend") || file.mentions("decoder", "Strip");
        let add_space_prefix = writes_prefix || file.metaspace_prepends();
        let alphabet = if is_byte_level { Alphabet::ByteLevel } else { Alphabet::SentencePiece { add_space_prefix } };
        let merger = Merger::Bpe(file.bpe(model, &pieces, &kinds)?.into());
        let special = SpecialTokens::new(added.into_iter());
        let (eos, add_bos) = (None, bos.is_some());
        let tokenizer =
            Tokenizer { pieces, kinds, special, merger, alphabet, bos, eos, add_bos, ending, max_bytes_per_token: 0 };
        Ok(tokenizer.measured())
    }
}

struct TokenizerJson {
    json: Value,
}

fn problem(text: String) -> TextError {
    TextError::Json(text)
}

impl TokenizerJson {
    fn section(&self, name: &str) -> Result<&Value, TextError> {
        self.json.get(name).filter(|value| value.is_object()).ok_or_else(|| problem(format!("it has no {name:?}")))
    }

    fn refuse_unknown(&self, model: &Value) -> Result<(), TextError> {
        let kind = model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            return Err(problem(format!("the model's type is {kind:?}; Fullbore reads BPE")));
        }
        for setting in ["continuing_subword_prefix", "end_of_word_suffix", "dropout"] {
            let value = &model[setting];
            if !(value.is_null() || value.as_str() == Some("") || value.as_f64() == Some(0.0)) {
                return Err(problem(format!("the model has {setting} {value}, which Fullbore does not follow")));
            }
        }
        Ok(())
    }

    fn added_tokens(&self) -> Result<Vec<SpecialToken>, TextError> {
        let list = self.json["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter()
            .map(|token| {
                let (Some(id), Some(spelling)) = (token["id"].as_u64(), token["content"].as_str()) else {
                    return Err(problem(format!("the added token {token} lacks its id or content")));
                };
                if token["single_word"] == Value::Bool(true) {
                    let text = format!("the added token {spelling:?} has single_word, which Fullbore does not follow");
                    return Err(problem(text));
                }
                let is_unknown = self.json["model"]["unk_token"].as_str() == Some(spelling);
                let kind = match token["special"].as_bool() {
                    _ if is_unknown => TokenKind::Unknown,
                    Some(true) => TokenKind::Control,
                    _ => TokenKind::UserDefined,
                };
                Ok(SpecialToken {
                    id: checked_id(id, spelling)?,
                    spelling: spelling.to_string(),
                    kind,
                    strip_left: token["lstrip"] == Value::Bool(true),
                    strip_right: token["rstrip"] == Value::Bool(true),
                })
            })
            .collect()
    }

    /// Pieces and kinds by id; an id that nothing names is an unused piece without text.
    fn vocabulary(&self, model: &Value, added: &[SpecialToken]) -> Result<(Vec<String>, Vec<TokenKind>), TextError> {
        let vocab = model["vocab"].as_object().ok_or_else(|| problem("the model has no \"vocab\"".to_string()))?;
        let has_bytes = model["byte_fallback"] == Value::Bool(true);
        let mut tokens = Vec::with_capacity(vocab.len() + added.len());
        for (piece, id) in vocab {
            let is_byte = has_bytes && piece.len() == 6 && piece.starts_with("<0x") && piece.ends_with('>');
            let kind = if is_byte { TokenKind::Byte } else { TokenKind::Normal };
            let id = id.as_u64().ok_or_else(|| problem(format!("the id of {piece:?} is {id}, which is no id")))?;
            tokens.push((checked_id(id, piece)?, piece.as_str(), kind));
        }
        tokens.extend(added.iter().map(|token| (token.id, token.spelling.as_str(), token.kind)));
        let size = tokens.iter().map(|(id, ..)| id.0 as usize + 1).max().unwrap_or(0);
        let mut pieces = vec![String::new(); size];
        let mut kinds = vec![TokenKind::Unused; size];
        for (id, piece, kind) in tokens {
            pieces[id.0 as usize] = piece.to_string();
            kinds[id.0 as usize] = kind;
        }
        Ok((pieces, kinds))
    }

    fn bpe(&self, model: &Value, pieces: &[String], kinds: &[TokenKind]) -> Result<Bpe, TextError> {
        let list = model["merges"].as_array().ok_or_else(|| problem("the model has no \"merges\"".to_string()))?;
        let merges = list.iter().map(merge_of).collect::<Result<Vec<_>, _>>()?;
        let is_set = |name: &str| model[name] == Value::Bool(true);
        let (builder, merges) = bpe::builder(pieces, kinds, merges.into_iter())?;
        let builder = builder.byte_fallback(is_set("byte_fallback")).ignore_merges(is_set("ignore_merges"));
        let model = builder.build().map_err(|error| problem(error.to_string()))?;
        let normalizer: Option<NormalizerWrapper> = part(&self.json["normalizer"], "normalizer")?;
        let first: Option<PreTokenizerWrapper> = part(&self.json["pre_tokenizer"], "pre_tokenizer")?;
        let mut elsewhere = self.json["pre_tokenizer"].clone();
        prepend_only_at_start(&mut elsewhere);
        let later: Option<PreTokenizerWrapper> = part(&elsewhere, "pre_tokenizer")?;
        let cuts = if self.has_known_words() { Cuts::BOTH } else { Cuts::NONE };
        Ok(Bpe { normalizer, pre_tokenizers: [first, later], model, merges, cuts })
    }

    /// Whether text becomes words as it does in files of GGUF.
    fn has_known_words(&self) -> bool {
        let normalizer = &self.json["normalizer"];
        let keeps_letters = normalizer.is_null() || normalizer["type"] == "NFC";
        keeps_letters && finds_known_words(&self.json["pre_tokenizer"])
    }

    /// The spelling of the special token that the post-processor puts before a text.
    fn first_special(&self) -> Option<&Value> {
        self.processors().iter().find_map(|processor| processor["single"].get(0)?.get("SpecialToken")?.get("id"))
    }

    fn last_special(&self) -> Option<&Value> {
        let behind = |processor: &'_ Value| processor["single"].as_array().filter(|parts| parts.len() > 1).is_some();
        let processor = self.processors().iter().find(|processor| behind(processor))?;
        processor["single"].as_array()?.last()?.get("SpecialToken")?.get("id")
    }

    fn processors(&self) -> &[Value] {
        let processor = &self.json["post_processor"];
        let list = processor["processors"].as_array();
        list.map(Vec::as_slice).unwrap_or(std::slice::from_ref(processor))
    }

    fn mentions(&self, section: &str, kind: &str) -> bool {
        any(&self.json[section], &|value| value["type"].as_str() == Some(kind))
    }

    fn metaspace_prepends(&self) -> bool {
        any(&self.json["pre_tokenizer"], &|value| {
            let never =
                value["prepend_scheme"].as_str() == Some("never") || value["add_prefix_space"] == Value::Bool(false);
            value["type"].as_str() == Some("Metaspace") && !never
        })
    }
}

fn checked_id(id: u64, piece: &str) -> Result<TokenId, TextError> {
    if id >= MAX_VOCAB {
        return Err(problem(format!("the id of {piece:?} is {id}; Fullbore reads ids below {MAX_VOCAB}")));
    }
    Ok(TokenId(id as u32))
}

/// Whether a pre-tokenizer cuts text into words by patterns that [`Cuts`] knows, of which one knows words, before it
/// writes bytes as letters.
fn finds_known_words(pre_tokenizer: &Value) -> bool {
    let steps = match pre_tokenizer["type"].as_str() {
        Some("Sequence") => pre_tokenizer["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice),
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let Some((last, splits)) = steps.split_last() else { return false };
    let pattern = |step: &Value| {
        let is_plain = step["type"] == "Split" && step["behavior"] == "Isolated" && step["invert"] == false;
        Pattern::known(step["pattern"]["Regex"].as_str().filter(|_| is_plain)?)
    };
    let is_known = |step: &Value| step["type"] == "Digits" || pattern(step).is_some();
    let has_words = splits.iter().any(|step| pattern(step) == Some(Pattern::Words)) || last["use_regex"] != false;
    splits.iter().all(is_known) && last["type"] == "ByteLevel" && last["add_prefix_space"] == false && has_words
}

/// A merge is "left right", or a list of both.
fn merge_of(merge: &Value) -> Result<(&str, &str), TextError> {
    let pair = match merge {
        Value::String(text) => text.split_once(' '),
        _ => merge.get(0).and_then(Value::as_str).zip(merge.get(1).and_then(Value::as_str)),
    };
    pair.ok_or_else(|| problem(format!("the merge {merge} is not two tokens")))
}

fn part<T: serde::de::DeserializeOwned>(value: &Value, name: &str) -> Result<Option<T>, TextError> {
    serde_json::from_value(value.clone()).map_err(|error| problem(format!("its {name} cannot be read: {error}")))
}

/// Whether `holds` for `value` or for anything in it.
fn any(value: &Value, holds: &impl Fn(&Value) -> bool) -> bool {
    let inside = match value {
        Value::Object(map) => map.values().any(|value| any(value, holds)),
        Value::Array(list) => list.iter().any(|value| any(value, holds)),
        _ => false,
    };
    inside || (value.is_object() && holds(value))
}

/// The scheme "first" means the start of the whole input, which the crate takes to be the start of what it is given.
fn prepend_only_at_start(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if key == "prepend_scheme" && value.as_str() == Some("first") {
                    *value = Value::from("never");
                }
                prepend_only_at_start(value);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(prepend_only_at_start),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words_are_known_where_a_pattern_finds_them_before_bytes_become_letters() {
        let split = |regex: &str| {
            let pattern = json!({"Regex": regex});
            json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false})
        };
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex});
        let sequence = |steps: &[&Value]| json!({"type": "Sequence", "pretokenizers": steps});
        let words = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
        let (gpt2, digits) = (split(&format!("'s|'t|'re|'ve|'m|'ll|'d|{words}")), json!({"type": "Digits"}));
        let known = [
            bytes(true),
            sequence(&[&digits, &bytes(true)]),
            sequence(&[&gpt2, &bytes(false)]),
            sequence(&[&split(r"\p{N}"), &gpt2, &bytes(false)]),
        ];
        let unknown = [
            Value::Null,
            sequence(&[]),
            bytes(false),
            sequence(&[&digits, &bytes(false)]),
            sequence(&[&split(r"\p{N}"), &bytes(false)]),
            sequence(&[&split(words), &bytes(true)]),
            // Spaces are letters by then.
            sequence(&[&bytes(false), &gpt2]),
            sequence(&[&gpt2]),
            json!({"type": "ByteLevel", "add_prefix_space": true}),
        ];
        assert_eq!(known.each_ref().map(finds_known_words), [true; 4]);
        assert_eq!(unknown.each_ref().map(finds_known_words), [false; 9]);
    }
}
