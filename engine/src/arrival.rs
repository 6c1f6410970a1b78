//! A request as an engine takes it in.
//!
//! Invariant: what takes as long as a request has tokens is made here, by whoever hands it in, so that the engine's
//! thread makes nothing of the kind between two steps, but for one that a fleet moves to another engine.

use std::sync::Arc;

use crate::memory::{BlockChain, BlockHasher};
use crate::request::{Request, TokenId};

#[derive(Debug)]
pub struct Arrival {
    pub request: Arc<Request>,
    /// Its prompt, then what was generated of it elsewhere.
    pub tokens: Vec<TokenId>,
    /// The keys of the blocks that `tokens` fill; none where prefixes are not kept.
    pub chain: BlockChain,
}

impl Arrival {
    /// `chain` has the keys of the blocks that the prompt fills, named by `hasher`, where there is one.
    pub fn new(request: Arc<Request>, mut chain: BlockChain, hasher: Option<&BlockHasher>) -> Arrival {
        let tokens = [request.prompt.as_slice(), &request.generated].concat();
        if let Some(hasher) = hasher {
            hasher.extend(&mut chain, &tokens);
        }
        Arrival { request, tokens, chain }
    }
}
