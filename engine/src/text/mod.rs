//! Text in, token ids in the middle, text out: tokenizer, detokenizer, stop strings, chat template.
//!
//! Invariant: text from outside yields a control token only where the caller asked for it ([`Special::Parse`]), and no
//! piece of half a character leaves a [`Detokenizer`]. Knows no model, no batch and no JSON API; the engine thread
//! never calls it, but for stop strings.

use std::path::PathBuf;
use std::time::Duration;

use crate::format::FormatError;

mod bpe;
mod chat_template;
mod cuts;
mod detokenizer;
mod gguf_vocab;
mod hf_json;
mod pre_tokenizer;
mod python;
mod sentence_piece;
mod special_tokens;
mod stop_strings;
mod to_json;
mod tokenizer;

pub use chat_template::{ChatInput, ChatMessage, ChatTemplate, Prompt};
pub use cuts::Cuts;
pub use detokenizer::Detokenizer;
pub use gguf_vocab::GgufVocab;
pub use stop_strings::{Scan, StopStrings};
pub use tokenizer::{Special, Tokenizer};

#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("{0} has no tokenizer: its metadata lacks tokenizer.ggml.{1}")]
    Missing(PathBuf, &'static str),
    #[error("tokenizer.ggml.model is {0:?}; Fullbore reads gpt2 (byte-level BPE) and llama (SentencePiece)")]
    UnknownModel(String),
    #[error("tokenizer.ggml.pre is {name:?}, which Fullbore does not know; it knows {known}")]
    UnknownPreTokenizer { name: String, known: String },
    #[error("the vocabulary is damaged: {0}; fetch the model again, or convert it anew")]
    Vocabulary(String),
    #[error("tokenizer.json: {0}")]
    Json(String),
    #[error("the model's chat template cannot be used: {0}")]
    Template(String),
    /// What the template itself says to its user, by `raise_exception`.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    #[error("the model's chat template does more work than {fuel} steps allow for these messages")]
    TemplateFuel { fuel: u64 },
    #[error("the model's chat template writes more than {max_bytes} bytes for these messages")]
    TemplateOutput { max_bytes: usize },
    #[error("these messages are {least_tokens} tokens or more")]
    TooLong { least_tokens: usize },
    #[error("the model's chat template works for longer than {deadline:?} on messages; it is not used until that ends")]
    TemplateTime { deadline: Duration },
}
