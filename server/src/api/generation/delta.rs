//! What comes of a generation, piece by piece. Invariant: pieces appended are the whole.

use std::sync::Arc;

use fullbore_engine::request::{Request, TokenId, TokenLogprobs};

use super::super::reply::{CallPiece, Pieces};

/// What has come to a choice since the last.
#[derive(Clone, Debug, Default)]
pub struct Delta {
    pub index: usize,
    pub text: String,
    /// What it thought before it said that.
    pub reasoning: String,
    /// Functions that it calls.
    pub calls: Vec<CallPiece>,
    pub token_ids: Vec<TokenId>,
    pub entries: Vec<Entry>,
    /// Only in a choice's first.
    pub request: Option<Arc<Request>>,
    /// Where they were asked for, only in its first: of every token of the prompt but the first.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// The embedding of its prompt, where that was asked for.
    pub pooled: Vec<f32>,
    /// Only in its last: `stop`, `length` or `tool_calls`.
    pub finish_reason: Option<&'static str>,
    /// The stop string that ended it.
    pub stop: Option<String>,
    /// The token that ended it, where the client named it.
    pub stop_id: Option<TokenId>,
}

/// What choices have read and written; a prompt counts once however many choices it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Of those, what the prefix cache had.
    pub cached_tokens: u32,
    pub completion_tokens: u32,
    /// Of those, what was thought.
    pub reasoning_tokens: u32,
}

/// A token where log-probabilities were asked for; a prompt's first token has none.
#[derive(Clone, Debug)]
pub struct Entry {
    pub id: TokenId,
    /// Characters of the choice's text before it.
    pub offset: usize,
    /// Whether what was said came with it, not a thought or a call alone.
    pub is_said: bool,
    pub logprobs: Option<TokenLogprobs>,
}

impl Delta {
    /// This piece and the next as one.
    pub fn append(&mut self, next: Delta) {
        self.take(Pieces { reasoning: next.reasoning, content: next.text, calls: next.calls });
        self.token_ids.extend(next.token_ids);
        self.entries.extend(next.entries);
        self.request = self.request.take().or(next.request);
        self.prompt_logprobs.extend(next.prompt_logprobs);
        self.pooled.extend(next.pooled);
        self.finish_reason = next.finish_reason;
        self.stop = next.stop;
        self.stop_id = next.stop_id;
    }

    /// That of its choice, in the first piece.
    pub fn prompt(&self) -> &[TokenId] {
        self.request.as_ref().map_or(&[], |request| &request.prompt)
    }

    pub(super) fn take(&mut self, pieces: Pieces) {
        self.text += &pieces.content;
        self.reasoning += &pieces.reasoning;
        for piece in pieces.calls {
            match self.calls.last_mut().filter(|last| last.index == piece.index) {
                Some(last) => last.arguments += &piece.arguments,
                None => self.calls.push(piece),
            }
        }
    }
}
