//! A choice's tokens as text, up to a stop string. Invariant: of the same tokens it makes the same, wherever it does.

use fullbore_engine::request::TokenId;
use fullbore_engine::text::{Detokenizer, Scan, StopStrings};

use super::super::ServedModel;
use super::Job;
use crate::api::reply::ReplyFormat;

#[derive(Clone)]
pub struct Text {
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// What ends a text is no part of it, even where it is an ordinary token.
    stop_ids: Vec<TokenId>,
    /// Control tokens that a reply's parts are found by.
    marks: Vec<TokenId>,
    /// Up to so many tokens no stop string ends it.
    min_tokens: u32,
    num_tokens: u32,
    num_chars: usize,
}

impl Text {
    pub fn new(model: &ServedModel, job: &Job) -> Text {
        let spellings = job.reply.iter().flat_map(ReplyFormat::control_marks);
        let marks = spellings.filter_map(|spelling| model.tokenizer.special_id(spelling));
        Text {
            detokenizer: Detokenizer::new(model.tokenizer.clone()),
            stops: StopStrings::new(job.stops.clone()),
            stop_ids: job.request.stop_ids.clone(),
            marks: marks.filter(|id| model.tokenizer.is_special(*id)).collect(),
            min_tokens: job.request.sampling.min_tokens,
            num_tokens: 0,
            num_chars: 0,
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, id: TokenId) -> Scan {
        self.num_tokens += 1;
        #[cfg(test)]
        assert_ne!(id, BUG, "a bug that a test planted");
        let text = match id {
            id if self.is_end(id) => String::new(),
            id if self.marks.contains(&id) => self.detokenizer.finish() + &self.detokenizer.spelling(id),
            id => self.detokenizer.push(id),
        };
        self.num_chars += text.chars().count();
        self.scan(&text)
    }

    /// What was held back, once no more tokens come.
    pub fn finish(&mut self) -> Scan {
        let rest = self.detokenizer.finish();
        let mut scan = self.scan(&rest);
        if !scan.stopped {
            scan.text += &self.stops.finish();
        }
        scan
    }

    /// Looks for stop strings, from the first token on that may end the text.
    fn scan(&mut self, text: &str) -> Scan {
        match self.num_tokens > self.min_tokens {
            true => self.stops.push(text),
            false => Scan { text: self.stops.pass(text), stopped: false },
        }
    }

    /// Whether the token ends it, and says nothing.
    pub fn is_end(&self, id: TokenId) -> bool {
        self.stop_ids.contains(&id)
    }

    pub fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    /// So far, said or not.
    pub fn num_chars(&self) -> usize {
        self.num_chars
    }

    /// The stop string that has ended it.
    pub fn stop(&self) -> Option<&str> {
        self.stops.found()
    }
}

/// A token that no vocabulary has, and no text survives.
#[cfg(test)]
pub const BUG: TokenId = TokenId(u32::MAX);
