//! Full blocks findable by all tokens up to their end.
//!
//! A block's key is a keyed 128-bit SipHash (Aumasson and Bernstein 2012) of its parent's key and its tokens; the
//! first parent is a hash of the salt. The key of the hash is drawn at start, so that a client cannot aim for a
//! collision, and tokens are compared on a hit, so that a collision cannot leak or corrupt. Invariant: at most one
//! entry a key and one a block. The cache knows no reference counts.

use std::collections::HashMap;
use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use crate::memory::block_pool::BlockId;
use crate::request::TokenId;

/// All tokens up to the end of a block, as a hash; a type of its own so that it is not taken for a token or a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub u128);

#[derive(Debug)]
pub struct PrefixCache {
    key: (u64, u64),
    by_hash: HashMap<BlockHash, Entry>,
    by_block: HashMap<BlockId, BlockHash>,
}

#[derive(Debug)]
struct Entry {
    block: BlockId,
    parent: u128,
    tokens: Box<[TokenId]>,
}

impl PrefixCache {
    pub fn new(key: (u64, u64)) -> PrefixCache {
        PrefixCache { key, by_hash: HashMap::new(), by_block: HashMap::new() }
    }

    /// The parent of a first block: requests of unlike salt share nothing.
    pub fn root(&self, salt: u64) -> u128 {
        self.hash(0, &[], salt)
    }

    pub fn hash_block(&self, parent: u128, tokens: &[TokenId]) -> BlockHash {
        BlockHash(self.hash(parent, tokens, tokens.len() as u64))
    }

    /// The block that holds `tokens` after `parent`, and its key.
    pub fn find(&self, parent: u128, tokens: &[TokenId]) -> Option<(BlockId, BlockHash)> {
        let hash = self.hash_block(parent, tokens);
        let entry = self.by_hash.get(&hash)?;
        (entry.parent == parent && *entry.tokens == *tokens).then_some((entry.block, hash))
    }

    /// Makes `block` findable, unless another block with the same tokens already is. Returns the key.
    pub fn insert(&mut self, parent: u128, tokens: &[TokenId], block: BlockId) -> BlockHash {
        let hash = self.hash_block(parent, tokens);
        self.by_hash.entry(hash).or_insert_with(|| {
            let old = self.by_block.insert(block, hash);
            assert_eq!(old, None, "block {} is cached twice", block.0);
            Entry { block, parent, tokens: tokens.into() }
        });
        hash
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.by_block.contains_key(&block)
    }

    /// Forgets a block that is about to be overwritten.
    pub fn evict(&mut self, block: BlockId) -> bool {
        let hash = self.by_block.remove(&block);
        hash.is_some_and(|hash| self.by_hash.remove(&hash).is_some())
    }

    pub fn len(&self) -> u32 {
        self.by_block.len() as u32
    }

    pub fn is_empty(&self) -> bool {
        self.by_block.is_empty()
    }

    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.by_block.keys().copied()
    }

    pub fn check(&self) {
        assert_eq!(self.by_hash.len(), self.by_block.len());
        for (hash, entry) in &self.by_hash {
            assert_eq!(self.by_block.get(&entry.block), Some(hash));
            assert_eq!(self.hash_block(entry.parent, &entry.tokens), *hash, "block {} has a wrong key", entry.block.0);
        }
    }

    fn hash(&self, parent: u128, tokens: &[TokenId], extra: u64) -> u128 {
        let mut hasher = SipHasher13::new_with_keys(self.key.0, self.key.1);
        hasher.write_u128(parent);
        hasher.write_u64(extra);
        for token in tokens {
            hasher.write_u32(token.0);
        }
        hasher.finish128().as_u128()
    }
}
