//! SentencePiece's BPE as GGUF stores it: pieces with scores, no list of merges.
//!
//! Invariant: ids are llama.cpp's: the best-scored pair of neighbours merges first, the leftmost of equals; what no
//! piece spells becomes byte tokens. Time is O(n log n) in the text.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::{FxBuildHasher, FxHashMap};

use super::TextError;
use super::cuts::Cuts;
use super::special_tokens::TokenKind;
use crate::request::TokenId;

/// What SentencePiece writes for a space.
pub const SPACE: &str = "\u{2581}";

#[derive(Debug)]
pub struct SentencePiece {
    /// Pieces that merging may produce: no control token, no byte token.
    pieces: FxHashMap<String, (u32, f32)>,
    /// The tokens of the 256 bytes, or the unknown token.
    bytes: Vec<TokenId>,
    add_space_prefix: bool,
    pub cuts: Cuts,
}

/// A run of the text; `len` 0 once it has been merged into its left neighbour.
struct Symbol {
    start: usize,
    len: usize,
    prev: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

struct Bigram {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both when found: an older find of symbols that have grown since differs.
    len: usize,
}

impl Ord for Bigram {
    fn cmp(&self, other: &Bigram) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Bigram) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Bigram {
    fn eq(&self, other: &Bigram) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Bigram {}

impl SentencePiece {
    pub fn new(
        tokens: &[String],
        kinds: &[TokenKind],
        scores: &[f32],
        unknown: Option<u32>,
        add_space_prefix: bool,
    ) -> Result<SentencePiece, TextError> {
        let mut pieces = FxHashMap::with_capacity_and_hasher(tokens.len(), FxBuildHasher);
        let mut all = HashMap::with_capacity(256);
        for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
            match kind {
                TokenKind::Byte => {
                    all.insert(token.as_str(), id as u32);
                }
                kind if kind.is_special() => {}
                _ => {
                    let score = scores.get(id).copied().unwrap_or_default();
                    pieces.insert(token.clone(), (id as u32, score));
                }
            }
        }
        let byte = |byte: u8| {
            let found = all.get(format!("<0x{byte:02X}>").as_str()).copied();
            found.or(unknown).map(TokenId).ok_or_else(|| {
                TextError::Vocabulary(format!("it has neither a token for the byte 0x{byte:02X} nor an unknown token"))
            })
        };
        let bytes = (0..=255).map(byte).collect::<Result<_, _>>()?;
        let cuts = Cuts::of_pieces(pieces.keys().map(String::as_str), SPACE);
        Ok(SentencePiece { pieces, bytes, add_space_prefix, cuts })
    }

    /// What merging may produce, each with its id and score, in no order.
    pub fn all(&self) -> impl Iterator<Item = (&str, (u32, f32))> {
        self.pieces.iter().map(|(piece, place)| (piece.as_str(), *place))
    }

    pub fn get(&self, piece: &str) -> Option<(u32, f32)> {
        self.pieces.get(piece).copied()
    }

    pub fn adds_space_prefix(&self) -> bool {
        self.add_space_prefix
    }

    /// Appends the ids of `text`, which follows a special token or nothing, unless it `goes_on`.
    pub fn encode(&self, text: &str, goes_on: bool, ids: &mut Vec<TokenId>) {
        let mut escaped = String::with_capacity(text.len() + 8);
        if self.add_space_prefix && !goes_on {
            escaped.push_str(SPACE);
        }
        escaped.push_str(&text.replace(' ', SPACE));
        for symbol in self.merge(&escaped) {
            match self.pieces.get(symbol) {
                Some(&(id, _)) => ids.push(TokenId(id)),
                None => ids.extend(symbol.bytes().map(|byte| self.bytes[byte as usize])),
            }
        }
    }

    fn merge<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(index, (start, c))| Symbol {
                start,
                len: c.len_utf8(),
                prev: index.wrapping_sub(1),
                next: if start + c.len_utf8() == text.len() { NONE } else { index + 1 },
            })
            .collect();
        let mut queue = BinaryHeap::new();
        for left in 0..symbols.len() {
            self.find(text, &symbols, left, symbols[left].next, &mut queue);
        }
        while let Some(Bigram { left, right, len, .. }) = queue.pop() {
            if symbols[left].len == 0 || symbols[right].len == 0 || symbols[left].len + symbols[right].len != len {
                continue;
            }
            symbols[left].len = len;
            symbols[right].len = 0;
            let next = symbols[right].next;
            symbols[left].next = next;
            if next != NONE {
                symbols[next].prev = left;
            }
            self.find(text, &symbols, symbols[left].prev, left, &mut queue);
            self.find(text, &symbols, left, next, &mut queue);
        }
        symbols.into_iter().filter(|symbol| symbol.len > 0).map(|symbol| &text[symbol.start..symbol.start + symbol.len])
    }

    fn find(&self, text: &str, symbols: &[Symbol], left: usize, right: usize, queue: &mut BinaryHeap<Bigram>) {
        if left == NONE || right == NONE {
            return;
        }
        let start = symbols[left].start;
        let len = symbols[left].len + symbols[right].len;
        if let Some(&(_, score)) = self.pieces.get(&text[start..start + len]) {
            queue.push(Bigram { score, left, right, len });
        }
    }
}
