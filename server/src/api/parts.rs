//! An answer as parts that follow one another: thoughts, texts and calls. The dialects that stream such parts share how
//! one begins, grows and ends. Invariant: at most one part is open, and the parts of a stream are those of its whole.

use super::generation::Delta;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Thought(String),
    Text(String),
    Call { id: String, name: String, arguments: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    Thought,
    Text,
    Call,
}

/// What happens to the part of this index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It begins; nothing is in it yet.
    Begin(usize, Part),
    More(usize, PartKind, String),
    End(usize, Part),
}

#[derive(Clone, Debug, Default)]
pub struct Parts {
    pub ended: Vec<Part>,
    open: Option<Part>,
}

impl Part {
    fn text(&mut self) -> &mut String {
        match self {
            Part::Thought(text) | Part::Text(text) | Part::Call { arguments: text, .. } => text,
        }
    }

    pub fn kind(&self) -> PartKind {
        match self {
            Part::Thought(_) => PartKind::Thought,
            Part::Text(_) => PartKind::Text,
            Part::Call { .. } => PartKind::Call,
        }
    }

    fn is_like(&self, other: &Part) -> bool {
        match (self, other) {
            (Part::Call { id, .. }, Part::Call { id: other, .. }) => id == other,
            _ => self.kind() == other.kind(),
        }
    }
}

impl Parts {
    /// What a piece of the answer changes.
    pub fn take(&mut self, delta: Delta) -> Vec<Change> {
        let mut changes = Vec::new();
        if !delta.reasoning.is_empty() {
            self.begin(Part::Thought(String::new()), &mut changes);
            self.more(delta.reasoning, &mut changes);
        }
        if !delta.text.is_empty() {
            self.begin(Part::Text(String::new()), &mut changes);
            self.more(delta.text, &mut changes);
        }
        for piece in delta.calls {
            if let Some((id, name)) = piece.begin {
                self.begin(Part::Call { id, name, arguments: String::new() }, &mut changes);
            }
            if !piece.arguments.is_empty() {
                self.more(piece.arguments, &mut changes);
            }
        }
        changes
    }

    /// Ends what is open; an answer that says nothing is an empty text.
    pub fn finish(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.open.is_none() && self.ended.is_empty() {
            self.begin(Part::Text(String::new()), &mut changes);
        }
        self.end(&mut changes);
        changes
    }

    /// Opens `part`, unless one like it is open.
    fn begin(&mut self, part: Part, changes: &mut Vec<Change>) {
        if self.open.as_ref().is_some_and(|open| open.is_like(&part)) {
            return;
        }
        self.end(changes);
        changes.push(Change::Begin(self.ended.len(), part.clone()));
        self.open = Some(part);
    }

    fn more(&mut self, text: String, changes: &mut Vec<Change>) {
        if let Some(open) = &mut self.open {
            open.text().push_str(&text);
            changes.push(Change::More(self.ended.len(), open.kind(), text));
        }
    }

    fn end(&mut self, changes: &mut Vec<Change>) {
        if let Some(part) = self.open.take() {
            changes.push(Change::End(self.ended.len(), part.clone()));
            self.ended.push(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reply::CallPiece;
    use super::*;

    fn delta(reasoning: &str, text: &str, calls: &[(usize, Option<&str>, &str)]) -> Delta {
        let call = |&(index, name, arguments): &(usize, Option<&str>, &str)| CallPiece {
            index,
            begin: name.map(|name| (format!("id-{index}"), name.to_owned())),
            arguments: arguments.to_owned(),
        };
        let calls = calls.iter().map(call).collect();
        Delta { reasoning: reasoning.to_owned(), text: text.to_owned(), calls, ..Delta::default() }
    }

    fn parts_of(whole: Delta) -> Vec<Part> {
        let mut parts = Parts::default();
        parts.take(whole);
        parts.finish();
        parts.ended
    }

    #[test]
    fn pieces_make_the_parts_of_the_whole() {
        let pieces = [
            delta("Hm", "", &[]),
            delta(".", "So ", &[]),
            delta("", "be it", &[(0, Some("f"), "{")]),
            delta("", "", &[(0, None, "}"), (1, Some("g"), "")]),
            delta("", "", &[(1, None, "{}")]),
        ];
        let mut parts = Parts::default();
        let mut changes: Vec<Change> = pieces.clone().into_iter().flat_map(|piece| parts.take(piece)).collect();
        changes.extend(parts.finish());
        let mut whole = Delta::default();
        pieces.into_iter().for_each(|piece| whole.append(piece));
        assert_eq!(parts.ended, parts_of(whole));
        // Each part begins, grows to what it is, and ends before the next begins.
        let mut seen: Vec<Part> = Vec::new();
        let mut open = None;
        for change in changes {
            match change {
                Change::Begin(index, part) => {
                    assert_eq!((open, index), (None, seen.len()));
                    open = Some(index);
                    seen.push(part);
                }
                Change::More(index, kind, text) => {
                    assert_eq!((open, kind), (Some(index), seen[index].kind()));
                    seen[index].text().push_str(&text);
                }
                Change::End(index, part) => {
                    assert_eq!((open.take(), &seen[index]), (Some(index), &part));
                }
            }
        }
        assert_eq!((open, &seen), (None, &parts.ended));
        assert_eq!(seen.len(), 4);
        assert_eq!(parts_of(Delta::default()), [Part::Text(String::new())]);
    }
}
