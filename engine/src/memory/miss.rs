//! Why a prefix was not found: what can be said of the first block that is missing.
//!
//! Invariant: nothing is claimed that is not known. A key that was never seen may be that of other tokens, of another
//! salt or of a block that was evicted longer ago than is remembered. All memory is taken at start.

use std::collections::{HashSet, VecDeque};
use std::fmt;

use super::{BlockChain, KvCache};
use crate::memory::prefix_cache::BlockHash;
use crate::request::TokenId;

/// How far a prompt was found, and why no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    pub num_found: u32,
    pub num_tokens: u32,
    pub reason: MissReason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissReason {
    /// What is left fills no block, or has to be computed all the same.
    None,
    CacheOff,
    /// No block with these tokens before it and in it, of this salt, is remembered.
    Unknown,
    Evicted,
    BeingComputed,
}

/// Keys of blocks that were evicted lately.
#[derive(Debug)]
pub(super) struct Evicted {
    /// Oldest first.
    order: VecDeque<BlockHash>,
    known: HashSet<BlockHash>,
    max: usize,
}

impl Evicted {
    pub fn new(max: usize) -> Evicted {
        // Twice what is ever in it, so that removals never make it grow.
        Evicted { order: VecDeque::with_capacity(max + 1), known: HashSet::with_capacity(2 * (max + 1)), max }
    }

    pub fn remember(&mut self, hash: BlockHash) {
        if self.known.insert(hash) {
            self.order.push_back(hash);
        }
        if self.order.len() > self.max {
            let oldest = self.order.pop_front().expect("more than none are in it");
            self.known.remove(&oldest);
        }
    }

    pub fn contains(&self, hash: BlockHash) -> bool {
        self.known.contains(&hash)
    }
}

impl KvCache {
    /// Why `open` would find no more of `tokens` than it would now.
    pub fn explain(&self, chain: &BlockChain, tokens: &[TokenId], max_tokens: u32) -> Miss {
        let found = self.find(chain, tokens, max_tokens);
        let num_usable = (tokens.len() as u32).min(max_tokens);
        let num_found = found.num_blocks * self.block_size;
        let reason = match (&self.prefixes, chain.hashes().get(found.num_blocks as usize)) {
            (None, _) => MissReason::CacheOff,
            (_, None) => MissReason::None,
            _ if num_usable - num_found < self.block_size => MissReason::None,
            (Some(prefixes), Some(&hash)) if prefixes.is_promised(hash) => MissReason::BeingComputed,
            (Some(prefixes), Some(&hash)) if prefixes.was_evicted(hash) => MissReason::Evicted,
            (Some(_), Some(_)) => MissReason::Unknown,
        };
        Miss { num_found, num_tokens: tokens.len() as u32, reason }
    }
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.reason {
            MissReason::None => "the rest fills no block",
            MissReason::CacheOff => "the prefix cache is off",
            MissReason::Unknown => {
                "the next block is not known here: never computed with this beginning and salt, or long ago"
            }
            MissReason::Evicted => "the next block was evicted",
            MissReason::BeingComputed => "the next block is being computed",
        };
        write!(f, "first {} of {} tokens cached; {why}", self.num_found, self.num_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BlockTable;

    const BLOCK_SIZE: u32 = 4;

    fn tokens(first: u32, len: u32) -> Vec<TokenId> {
        (first..first + len).map(TokenId).collect()
    }

    /// Computes `tokens` in `cache` and leaves.
    fn compute(cache: &mut KvCache, tokens: &[TokenId]) {
        let chain = cache.chain(tokens, 0);
        let mut table = BlockTable::default();
        cache.grow(&mut table, tokens.len() as u32).expect("room");
        cache.publish(&mut table, &chain, tokens, tokens.len() as u32);
        cache.free(table, &chain, 0);
    }

    fn reason(cache: &KvCache, tokens: &[TokenId], salt: u64) -> (u32, MissReason) {
        let miss = cache.explain(&cache.chain(tokens, salt), tokens, tokens.len() as u32 - 1);
        (miss.num_found, miss.reason)
    }

    #[test]
    fn a_miss_has_its_reason() {
        let mut cache = KvCache::new(4, BLOCK_SIZE, Some((1, 2)));
        let prompt = tokens(0, 12);
        assert_eq!(reason(&cache, &prompt, 0), (0, MissReason::Unknown));
        compute(&mut cache, &prompt);
        // The last token is computed in any case.
        assert_eq!(reason(&cache, &prompt, 0), (8, MissReason::None));
        assert_eq!(reason(&cache, &prompt, 5), (0, MissReason::Unknown));
        let longer = tokens(0, 17);
        assert_eq!(reason(&cache, &longer, 0), (12, MissReason::Unknown));
        let chain = cache.chain(&longer, 0);
        let table = cache.open(&chain, &longer, 16);
        cache.promise(&table, &chain, 7);
        assert_eq!(reason(&cache, &longer, 0), (12, MissReason::BeingComputed));
        cache.free(table, &chain, 7);
        // Another prompt takes the tail of the first, then all of it.
        compute(&mut cache, &tokens(100, 8));
        assert_eq!(reason(&cache, &prompt, 0), (8, MissReason::None));
        compute(&mut cache, &tokens(200, 16));
        assert_eq!(reason(&cache, &prompt, 0), (0, MissReason::Evicted));
        assert_eq!(reason(&KvCache::new(4, BLOCK_SIZE, None), &prompt, 0), (0, MissReason::CacheOff));
    }

    #[test]
    fn evictions_are_forgotten_in_order() {
        let mut evicted = Evicted::new(3);
        let hash = |number| BlockHash(number);
        for number in [1, 2, 2, 3, 4] {
            evicted.remember(hash(number));
        }
        assert_eq!([1, 2, 3, 4].map(|number| evicted.contains(hash(number))), [false, true, true, true]);
    }

    #[test]
    fn a_miss_is_a_sentence() {
        let miss = Miss { num_found: 64, num_tokens: 100, reason: MissReason::Evicted };
        assert_eq!(miss.to_string(), "first 64 of 100 tokens cached; the next block was evicted");
    }
}
