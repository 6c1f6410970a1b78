//! Places where a text may be cut before it becomes ids, so that a long one takes no more memory than a part of it.
//!
//! Invariant: the ids of the parts are those of the whole. Words of byte-level BPE are found from left to right by what
//! stands at their place and behind it. No pattern here has a word reach from a letter over a space, nor from the end
//! of a line to what is no white space and no slash; and where those end a word they end it whatever follows, which
//! longer white space does not. SentencePiece merges only what is a piece, so that it reaches over neither where no
//! piece does. A text without such a place is one part.

use std::iter;

/// Those that are sound for a vocabulary; none, where neither is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cuts {
    /// Between a letter of ASCII and a space that stands before another.
    pub before_words: bool,
    /// Behind the end of a line that is next to no other white space, nor to a slash, which one pattern takes with it.
    pub after_lines: bool,
    /// A part ends at its first place from here on.
    pub part_bytes: usize,
}

impl Cuts {
    pub const NONE: Cuts = Cuts { before_words: false, after_lines: false, part_bytes: 64 << 10 };
    pub const BOTH: Cuts = Cuts { before_words: true, after_lines: true, ..Cuts::NONE };

    /// For merges that make one of `pieces`, in which `space` stands for a space.
    pub fn of_pieces<'p>(pieces: impl Iterator<Item = &'p str> + Clone, space: &str) -> Cuts {
        let reaches = |is_left: fn(char) -> bool, is_right: &dyn Fn(&str) -> bool| {
            let mut places = pieces.clone().flat_map(|piece| piece.char_indices().map(move |place| (piece, place)));
            places.any(|(piece, (at, left))| {
                let right = &piece[at + left.len_utf8()..];
                is_left(left) && !right.is_empty() && is_right(right)
            })
        };
        let begins_word = |right: &str| right.starts_with(space);
        let goes_on = |right: &str| !right.starts_with(char::is_whitespace);
        Cuts {
            before_words: !reaches(|left| left.is_ascii_alphabetic(), &begins_word),
            after_lines: !reaches(|left| left == '\n', &goes_on),
            ..Cuts::NONE
        }
    }

    pub fn parts(self, text: &str) -> impl Iterator<Item = &str> {
        let mut rest = text;
        iter::from_fn(move || {
            let (part, after) = rest.split_at(self.first(rest));
            rest = after;
            (!part.is_empty()).then_some(part)
        })
    }

    /// The first place of `text` at which a part ends.
    fn first(self, text: &str) -> usize {
        let bytes = text.as_bytes();
        let is_place = |at: &usize| match (bytes[at - 1], bytes[*at]) {
            (b'\n', _) => {
                let is_near = |c: char| c.is_whitespace() || c == '/';
                self.after_lines && !text[*at..].starts_with(is_near) && !text[..at - 1].ends_with(is_near)
            }
            (before, b' ') => {
                self.before_words
                    && before.is_ascii_alphabetic()
                    && bytes.get(at + 1).is_some_and(u8::is_ascii_alphabetic)
            }
            _ => false,
        };
        let has_any = self.before_words || self.after_lines;
        let mut places = self.part_bytes..if has_any { bytes.len() } else { 0 };
        places.find(is_place).unwrap_or(bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART_BYTES: usize = Cuts::BOTH.part_bytes;

    #[test]
    fn a_text_is_cut_where_no_word_or_piece_reaches_over() {
        let line = "a line of words, and what follows them\n\n   \"more\"\n中文 é b\u{301}\n";
        let text = line.repeat(5 * PART_BYTES / line.len());
        for cuts in [Cuts::BOTH, Cuts { after_lines: false, ..Cuts::BOTH }, Cuts { before_words: false, ..Cuts::BOTH }]
        {
            let parts: Vec<&str> = cuts.parts(&text).collect();
            assert!(parts.len() > 3 && parts.iter().all(|part| part.len() < PART_BYTES + line.len()), "{cuts:?}");
            assert_eq!(parts.concat(), text, "{cuts:?}");
        }
        // Nothing of these may be cut.
        let whole =
            ["a", " ", "\n", "\n ", "1 ", "中", "a 1", "\n\na", "\r\na"].map(|unit| unit.repeat(3 * PART_BYTES));
        for text in &whole {
            assert_eq!(Cuts::BOTH.parts(text).collect::<Vec<_>>(), [text], "{:?}", &text[..4]);
        }
        assert_eq!(Cuts::NONE.parts(&text).count(), 1);
        assert_eq!(Cuts::BOTH.parts("").count(), 0);
    }

    #[test]
    fn pieces_say_which_places_are_sound() {
        let of = |pieces: &[&str]| Cuts::of_pieces(pieces.iter().copied(), "_");
        assert_eq!(of(&["_a", "ab", "__", "\n\n", ".\n", "1_"]), Cuts::BOTH);
        assert_eq!(of(&["b_a"]), Cuts { before_words: false, ..Cuts::BOTH });
        assert_eq!(of(&["a_"]), Cuts { before_words: false, ..Cuts::BOTH });
        assert_eq!(of(&["\na"]), Cuts { after_lines: false, ..Cuts::BOTH });
    }
}
