//! How byte-level BPE cuts text into words, by the name in `tokenizer.ggml.pre`: a table.
//!
//! Invariant: a name that is not in the table is an error, never a guess. Words then go through GPT-2's byte alphabet.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::TextError;

const DIGIT: &str = r"\p{N}";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN35: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Mistral's, by the letter's case.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// llama.cpp's for files that name none.
const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

pub struct PreTokenizer {
    names: &'static [&'static str],
    /// Each cuts what the one before left.
    patterns: &'static [&'static str],
    /// Whether a word that is a token as a whole needs no merges.
    pub ignore_merges: bool,
    /// Whether a sequence starts with the BOS token where the file does not say.
    pub add_bos: bool,
}

const fn plain(names: &'static [&'static str], patterns: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, patterns, ignore_merges: false, add_bos: false }
}

const fn whole_words(names: &'static [&'static str], patterns: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, patterns, ignore_merges: true, add_bos: true }
}

static TABLE: [PreTokenizer; 9] = [
    plain(&["default"], &DEFAULT),
    plain(&["gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "granite-docling"], &[GPT2]),
    plain(&["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"], &[DIGIT, GPT2]),
    whole_words(&["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"], &[LLAMA3]),
    plain(&["dbrx", "smaug-bpe"], &[LLAMA3]),
    plain(&["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"], &[QWEN2]),
    plain(&["qwen35"], &[QWEN35]),
    whole_words(&["tekken"], &[TEKKEN]),
    PreTokenizer { names: &["glm4"], patterns: &[LLAMA3], ignore_merges: true, add_bos: false },
];

/// As Hugging Face's files write the contractions.
const ANY_CASE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const BY_LETTER: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]";

/// What a pattern of the table finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Words, white space between them, and all else.
    Words,
    /// Digits or signs alone.
    Some,
}

impl Pattern {
    pub fn known(pattern: &str) -> Option<Pattern> {
        let pattern = pattern.replace(ANY_CASE, BY_LETTER);
        if [GPT2, LLAMA3, QWEN2, QWEN35, TEKKEN].contains(&pattern.as_str()) {
            return Some(Pattern::Words);
        }
        TABLE.iter().flat_map(|entry| entry.patterns).any(|known| *known == pattern).then_some(Pattern::Some)
    }
}

impl PreTokenizer {
    /// An empty name is a file that names none.
    pub fn by_name(name: &str) -> Result<&'static PreTokenizer, TextError> {
        let wanted = if name.is_empty() { "default" } else { name };
        TABLE.iter().find(|entry| entry.names.contains(&wanted)).ok_or_else(|| TextError::UnknownPreTokenizer {
            name: name.to_string(),
            known: TABLE.iter().flat_map(|entry| entry.names).copied().collect::<Vec<_>>().join(", "),
        })
    }

    pub fn build(&self) -> PreTokenizerWrapper {
        let split = |pattern: &&str| {
            let pattern = SplitPattern::Regex(pattern.to_string());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            PreTokenizerWrapper::Split(split.expect("the patterns of the table compile"))
        };
        let alphabet = PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false));
        let steps = self.patterns.iter().map(split).chain([alphabet]).collect();
        PreTokenizerWrapper::Sequence(Sequence::new(steps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_builds_and_is_found_by_its_names() {
        for entry in &TABLE {
            entry.build();
            for name in entry.names {
                assert!(std::ptr::eq(PreTokenizer::by_name(name).expect("a name of the table"), entry), "{name}");
            }
        }
    }

    /// What [`super::super::cuts`] says of all patterns here.
    #[test]
    fn no_word_reaches_over_a_place_where_texts_are_cut() {
        use tokenizers::tokenizer::PreTokenizer as _;
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString};

        use super::super::cuts::Cuts;

        const UNITS: [&str; 20] = [
            "a", "B", "é", "中", "\u{301}", "'s", "'RE", "'", " ", "  ", "\t", "\n", "\r\n", "1", "234", "!", "=>",
            "/", "\u{a0}", "🙂",
        ];
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        let texts: Vec<String> =
            (0..2000).map(|_| (0..3 + random(12)).map(|_| UNITS[random(UNITS.len())]).collect()).collect();
        let cuts = Cuts { part_bytes: 1, ..Cuts::BOTH };
        assert!(texts.iter().filter(|text| cuts.parts(text).count() > 1).count() > 200);
        for entry in &TABLE {
            let built = entry.build();
            let words = |text: &str| -> Vec<String> {
                let mut words = PreTokenizedString::from(text);
                built.pre_tokenize(&mut words).expect("words");
                let words = words.get_splits(OffsetReferential::Original, OffsetType::None);
                words.iter().map(|(word, ..)| (*word).to_owned()).collect()
            };
            for text in &texts {
                let parts: Vec<String> = cuts.parts(text).flat_map(words).collect();
                assert_eq!(parts, words(text), "{:?}: {text:?}", entry.names);
            }
        }
    }

    #[test]
    fn an_unknown_name_is_named() {
        let error = PreTokenizer::by_name("klingon").err().expect("unknown").to_string();
        assert!(error.contains("\"klingon\"") && error.contains("llama-bpe"), "{error}");
    }
}
