//! Tokens that are found in text by their spelling, before any merging: control tokens and user-defined ones.
//!
//! Invariant: the matches of a text are llama.cpp's, which looks for one token after the other, longest spelling first;
//! here every token is found in one walk. Knows spellings only, no model.

use crate::request::TokenId;

/// How a token came into the vocabulary, and so when text may yield it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    Normal,
    /// Stands for what the vocabulary cannot spell.
    Unknown,
    /// Steers the model; text yields it only under `Special::Parse`.
    Control,
    /// Found in every text by its spelling.
    UserDefined,
    Unused,
    /// One byte, spelled `<0x00>`.
    Byte,
}

impl TokenKind {
    /// By GGUF's `tokenizer.ggml.token_type`.
    pub fn from_gguf(token_type: i32) -> TokenKind {
        match token_type {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        }
    }

    /// Whether content from outside must never become such a token.
    pub fn is_special(self) -> bool {
        matches!(self, TokenKind::Control | TokenKind::Unknown)
    }
}

#[derive(Clone, Debug)]
pub struct SpecialToken {
    pub id: TokenId,
    pub spelling: String,
    pub kind: TokenKind,
    /// Whether white space before or after the spelling belongs to the match.
    pub strip_left: bool,
    pub strip_right: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Fragment<'t> {
    /// Never empty.
    Text(&'t str),
    Token(TokenId),
}

/// Spellings by their bytes.
#[derive(Debug, Default)]
struct Trie {
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    children: Vec<(u8, u32)>,
    token: Option<u32>,
}

impl Trie {
    fn insert(&mut self, spelling: impl Iterator<Item = u8>, token: u32) {
        if self.nodes.is_empty() {
            self.nodes.push(Node::default());
        }
        let mut at = 0;
        for byte in spelling {
            at = match self.child(at, byte) {
                Some(next) => next,
                None => {
                    let next = self.nodes.len();
                    self.nodes.push(Node::default());
                    self.nodes[at].children.push((byte, next as u32));
                    next
                }
            };
        }
        self.nodes[at].token = Some(token);
    }

    fn child(&self, at: usize, byte: u8) -> Option<usize> {
        let children = &self.nodes.get(at)?.children;
        children.iter().find(|(edge, _)| *edge == byte).map(|&(_, next)| next as usize)
    }

    /// (length, token) of every spelling that `bytes` starts with.
    fn prefixes(&self, bytes: impl Iterator<Item = u8>) -> impl Iterator<Item = (usize, u32)> {
        let steps = bytes.scan(0, |at, byte| {
            *at = self.child(*at, byte)?;
            Some(*at)
        });
        steps.enumerate().filter_map(|(index, at)| self.nodes[at].token.map(|token| (index + 1, token)))
    }

    /// Whether all of `bytes` leads into some spelling without finishing it.
    fn leads_into(&self, bytes: impl Iterator<Item = u8>) -> bool {
        let mut at = 0;
        for byte in bytes {
            match self.child(at, byte) {
                Some(next) => at = next,
                None => return false,
            }
        }
        self.nodes.get(at).is_some_and(|node| !node.children.is_empty())
    }
}

#[derive(Debug, Default)]
pub struct SpecialTokens {
    tokens: Vec<SpecialToken>,
    /// Of all tokens; leaves are places in `tokens`.
    all: Trie,
    /// Of those that `is_special`, from the first byte on and from the last one back.
    forward: Trie,
    backward: Trie,
    max_len: usize,
}

impl SpecialTokens {
    pub fn new(tokens: impl Iterator<Item = SpecialToken>) -> SpecialTokens {
        let mut special = SpecialTokens::default();
        for token in tokens.filter(|token| !token.spelling.is_empty()) {
            let place = special.tokens.len() as u32;
            special.all.insert(token.spelling.bytes(), place);
            if token.kind.is_special() {
                special.forward.insert(token.spelling.bytes(), place);
                special.backward.insert(token.spelling.bytes().rev(), place);
            }
            special.max_len = special.max_len.max(token.spelling.len());
            special.tokens.push(token);
        }
        special
    }

    pub fn tokens(&self) -> &[SpecialToken] {
        &self.tokens
    }

    pub fn id(&self, spelling: &str) -> Option<TokenId> {
        let (length, place) = self.all.prefixes(spelling.bytes()).last()?;
        (length == spelling.len()).then(|| self.tokens[place as usize].id)
    }

    /// Whether white space around a spelling may belong to it.
    pub fn strips(&self) -> bool {
        self.tokens.iter().any(|token| token.strip_left || token.strip_right)
    }

    /// Cuts `text` at every spelling for which `wanted` holds.
    pub fn split<'t>(&self, text: &'t str, wanted: impl Fn(TokenKind) -> bool) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        let mut start = 0;
        for (at, place) in self.matches(text, wanted) {
            let token = &self.tokens[place as usize];
            let mut before = &text[start.min(at)..at];
            if token.strip_left {
                before = before.trim_end();
            }
            if !before.is_empty() {
                fragments.push(Fragment::Text(before));
            }
            fragments.push(Fragment::Token(token.id));
            start = at + token.spelling.len();
            if token.strip_right {
                start = text.len() - text[start..].trim_start().len();
            }
        }
        if start < text.len() {
            fragments.push(Fragment::Text(&text[start..]));
        }
        fragments
    }

    /// (position, place in `tokens`) of the matches, in the order of the text, none overlapping.
    fn matches(&self, text: &str, wanted: impl Fn(TokenKind) -> bool) -> Vec<(usize, u32)> {
        let bytes = text.as_bytes();
        let mut by_length: Vec<Vec<(usize, u32)>> = vec![Vec::new(); self.max_len + 1];
        for at in 0..bytes.len() {
            for (length, place) in self.all.prefixes(bytes[at..].iter().copied()) {
                if wanted(self.tokens[place as usize].kind) {
                    by_length[length].push((at, place));
                }
            }
        }
        let mut taken = vec![false; bytes.len()];
        let mut matches = Vec::new();
        for (length, found) in by_length.into_iter().enumerate().rev() {
            for (at, place) in found {
                // What is taken already is at least as long, so that an overlap shows at one of the ends.
                let range = at..at + length;
                if !taken[range.start] && !taken[range.end - 1] {
                    taken[range].fill(true);
                    matches.push((at, place));
                }
            }
        }
        matches.sort_unstable();
        matches
    }

    /// The byte ranges of `text` that are, or could become by what is written around `text`, the spelling of a special
    /// token: every whole spelling, the longest start of one at the end, and the longest end of one at the beginning.
    pub fn hazards(&self, text: &str) -> Vec<std::ops::Range<usize>> {
        let mut ranges: Vec<_> = self
            .matches(text, TokenKind::is_special)
            .into_iter()
            .map(|(at, place)| at..at + self.tokens[place as usize].spelling.len())
            .collect();
        let first = ranges.first().map_or(text.len(), |range| range.start);
        let last = ranges.last().map_or(0, |range| range.end);
        let is_cut = |at: &usize| text.is_char_boundary(*at);
        let opening = (1..=first.min(self.max_len))
            .rev()
            .filter(is_cut)
            .find(|&end| self.backward.leads_into(text.bytes().take(end).rev()));
        let closing = (last.max(text.len().saturating_sub(self.max_len))..text.len())
            .filter(is_cut)
            .find(|&start| self.forward.leads_into(text[start..].bytes()));
        match (opening, closing) {
            (Some(end), Some(start)) if start < end => ranges.push(0..text.len()),
            _ => {
                ranges.extend(opening.map(|end| 0..end));
                ranges.extend(closing.map(|start| start..text.len()));
            }
        }
        ranges.sort_by_key(|range| range.start);
        ranges
    }

    /// Whether `text` stands in the middle of some special token's spelling, or is one.
    pub fn is_within_special(&self, text: &str) -> bool {
        self.tokens.iter().any(|token| token.kind.is_special() && token.spelling.contains(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn special(spellings: &[(&str, TokenKind)]) -> SpecialTokens {
        SpecialTokens::new((0..).zip(spellings).map(|(id, &(spelling, kind))| SpecialToken {
            id: TokenId(id),
            spelling: spelling.to_string(),
            kind,
            strip_left: false,
            strip_right: false,
        }))
    }

    #[test]
    fn longer_spellings_go_first_and_then_the_left_ones() {
        let tokens = special(&[("ab", TokenKind::Control), ("bcd", TokenKind::Control), ("c", TokenKind::UserDefined)]);
        let split = |text| tokens.split(text, |_| true);
        let token = |id| Fragment::Token(TokenId(id));
        assert_eq!(split("abcd"), [Fragment::Text("a"), token(1)]);
        assert_eq!(split("ababc"), [token(0), token(0), token(2)]);
        assert_eq!(tokens.split("abc", |kind| !kind.is_special()), [Fragment::Text("ab"), token(2)]);
        assert_eq!(split(""), []);
    }

    #[test]
    fn hazards_are_spellings_and_the_parts_of_one_at_the_ends() {
        let tokens =
            special(&[("<ab>", TokenKind::Control), ("xéx", TokenKind::Control), ("uv", TokenKind::UserDefined)]);
        let hazards =
            |text: &'static str| tokens.hazards(text).into_iter().map(|range| &text[range]).collect::<Vec<_>>();
        assert_eq!(hazards("ab> - <ab> - <ab"), ["ab>", "<ab>", "<ab"]);
        assert_eq!(hazards("- <ab - ab> uv -"), [""; 0]);
        assert_eq!(hazards("<ab><ab>"), ["<ab>", "<ab>"]);
        assert_eq!(hazards("éx - xé"), ["éx", "xé"]);
        // Here the end of one and the start of another are the same character.
        assert_eq!(hazards("x"), ["x"]);
        assert_eq!(hazards("éxé"), ["éxé"]);
        assert_eq!(hazards(""), [""; 0]);
    }
}
