//! What a client asks and what it is told: `Request` in, `Event`s out through a `Sink`.
//!
//! Invariant: a `Request` that exists is valid in itself; whether it fits is `EngineConfig`'s and the scheduler's to
//! say. Token ids only: text does not enter the engine thread, but for stop strings, which a sink may look for.

use std::fmt;
use std::sync::Arc;

use crate::grammar::Grammar;

/// An integer of the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u32);

/// What a client asked; immutable.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// For logs only.
    pub id: String,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// What was generated elsewhere, fewer than `max_tokens`: the answer goes on from there.
    pub generated: Vec<TokenId>,
    /// Tokens to generate at most, those of `generated` among them; 0 asks for prompt logprobs alone.
    pub max_tokens: u32,
    /// A sampled id among these ends the sequence with `FinishReason::Stop`; it is delivered as an event all the same.
    pub stop_ids: Vec<TokenId>,
    pub sampling: SamplingParams,
    /// What the generated text must follow; where it lets nothing more follow, the sequence ends with
    /// `FinishReason::Stop`.
    pub grammar: Option<Grammar>,
    /// Log-probabilities of each sampled token and of this many most likely ones, at most `MAX_LOGPROBS`; `None` for
    /// none.
    pub logprobs: Option<u32>,
    /// The same for every prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// One vector for the prompt; `max_tokens` is 0 then.
    pub pooling: Option<Pooling>,
    /// Requests share cached prefixes only within one salt.
    pub cache_salt: u64,
    /// What of the salt is the client's own word, for routers that look for its prefixes.
    pub salt_name: Option<Arc<str>>,
    /// Whom it is served for: service is shared fairly between tenants.
    pub tenant: u64,
    pub share: Share,
    /// Among the requests of one tenant, lower ones come first (as in vLLM).
    pub priority: i32,
}

/// How a prompt's hidden states, as the output layer gets them, become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token.
    Last,
    /// The mean of all.
    Mean,
}

/// What a tenant may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Service relative to other tenants; at least 1.
    pub weight: u32,
    /// Sequences that run at once, at most; at least 1.
    pub max_num_seqs: u32,
}

impl Default for Share {
    fn default() -> Share {
        Share { weight: 1, max_num_seqs: u32::MAX }
    }
}

/// Most likely tokens whose log-probabilities come with one token, at most.
pub const MAX_LOGPROBS: u32 = crate::op::MAX_TOP;
/// Tokens of a request with a bias, at most.
pub const MAX_LOGIT_BIASES: u32 = crate::op::MAX_BIASES;

/// How tokens are chosen; `op::Sample` says in which order what applies.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// In (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// In [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// A draw depends on (seed, position) alone.
    pub seed: u64,
    /// Taken off the logit of each token that was generated; 0 for none.
    pub presence_penalty: f32,
    /// The same, once for each time that it was generated.
    pub frequency_penalty: f32,
    /// Above 0: makes tokens of the prompt and generated ones less likely if above 1; 1 for none.
    pub repetition_penalty: f32,
    /// Added to logits; by ascending token, each once, at most `MAX_LOGIT_BIASES`.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// One bit a token, by [`token_mask`]; `None` allows all.
    pub allowed_tokens: Option<Arc<[u32]>>,
    /// Before so many tokens were generated `early_tokens` counts instead of `allowed_tokens`.
    pub min_tokens: u32,
    /// `allowed_tokens` but for those that would end the text.
    pub early_tokens: Option<Arc<[u32]>>,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            allowed_tokens: None,
            min_tokens: 0,
            early_tokens: None,
        }
    }
}

impl SamplingParams {
    /// Whether the choice of a token depends on those before it.
    pub fn is_penalised(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }

    /// The mask of the token that comes after `num_generated`; `None` allows all.
    pub fn mask(&self, num_generated: u32) -> Option<&[u32]> {
        let mask = if num_generated < self.min_tokens { &self.early_tokens } else { &self.allowed_tokens };
        mask.as_deref()
    }
}

/// The mask that allows `tokens`, each within the vocabulary: bit `t % 32` of word `t / 32` for token t.
pub fn token_mask(tokens: impl IntoIterator<Item = TokenId>, vocab_size: u32) -> Arc<[u32]> {
    let mut mask = vec![0; vocab_size.div_ceil(32) as usize];
    for TokenId(token) in tokens {
        assert!(token < vocab_size, "token {token} of a vocabulary of {vocab_size}");
        mask[token as usize / 32] |= 1 << (token % 32);
    }
    mask.into()
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Once, first, unless the sequence ends before: it waits no longer, and the prefix cache had so many tokens of its
    /// prompt.
    Started {
        cached_tokens: u32,
    },
    /// Once, before the first token, where `prompt_logprobs` asked for it: one entry for each prompt token but the
    /// first.
    Prompt(Vec<TokenLogprobs>),
    /// Where `pooling` asked for it, before the end.
    Pooled(Vec<f32>),
    Token {
        id: TokenId,
        logprobs: Option<TokenLogprobs>,
    },
    /// The last event of a sequence.
    Finished {
        reason: FinishReason,
        usage: Usage,
    },
}

/// Natural logarithms of probabilities under the model's own distribution (temperature 1, nothing cut off).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub id: TokenId,
    pub logprob: f32,
    /// How many tokens are more likely, plus one.
    pub rank: u32,
    /// The most likely tokens, most likely first.
    pub top: Vec<(TokenId, f32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was sampled.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
    /// This request alone failed, or the engine has ended; the sentence says how.
    Error(String),
    /// Two things that the request asks for exclude each other where its text has come to; the sentence names both.
    Contradiction(String),
    /// The device was lost while it worked for this request; the same may succeed on the one that comes after it.
    DeviceLost(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Prompt tokens found in the prefix cache at first admission.
    pub cached_tokens: u32,
    pub completion_tokens: u32,
}

/// Whether a client wants more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Continue,
    /// The client left: the sequence is aborted and its blocks are free by the end of the running step.
    Stop,
    /// Said to a token alone: the client has all that it wanted. The sequence ends as by a stop id, with
    /// [`Event::Finished`] and counted so.
    End,
}

/// Where a request's events go. Called on the engine thread: it must not block.
pub trait Sink: Send {
    fn event(&mut self, event: Event) -> Flow;

    /// Whether the client is gone; asked of waiting sequences, and of running ones before each step.
    fn is_closed(&self) -> bool;

    /// The events that come next are its last, whatever they are: no other engine is to go on from here.
    fn will_end(&mut self) {}

    /// Whether it is closed because another engine serves the client from now on.
    fn has_moved(&self) -> bool {
        false
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
