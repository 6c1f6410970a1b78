//! Full blocks findable by all tokens up to their end, and full blocks that somebody is about to compute.
//!
//! A block's key is a keyed 128-bit SipHash (Aumasson and Bernstein 2012) of its parent's key and its tokens; the
//! first parent is a hash of the salt. The key of the hash is drawn at start, so that a client cannot aim for a
//! collision, and tokens are compared on a hit, so that a collision cannot leak or corrupt. Invariant: at most one
//! block a key and one key a block; a promise is held by one owner. All memory is taken at start. The cache knows no
//! reference counts.

use std::collections::HashMap;
use std::hash::Hasher;
use std::sync::Arc;

use siphasher::sip128::{Hasher128, SipHasher13};

use crate::memory::block_pool::BlockId;
use crate::memory::kv_events::{KvEvent, KvEventSender, KvFeed, StoredBlock};
use crate::memory::miss::Evicted;
use crate::request::{Request, TokenId};

/// All tokens up to the end of a block, as a hash; a type of its own so that it is not taken for a token or a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub u128);

/// The keys of the full blocks of a list of tokens; made once, extended as the list grows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockChain {
    root: u128,
    hashes: Vec<BlockHash>,
    /// What its client divides the cache by, where that may be told.
    salt: Option<Arc<str>>,
}

/// A block became findable or ceased to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockEvent {
    Stored(BlockHash),
    Removed(BlockHash),
}

/// Names blocks: whoever has the same key gives the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHasher {
    key: (u64, u64),
    block_size: usize,
}

#[derive(Debug)]
pub struct PrefixCache {
    hasher: BlockHasher,
    block_size: usize,
    by_hash: HashMap<BlockHash, BlockId>,
    /// By block.
    keys: Vec<Option<BlockHash>>,
    /// (blocks, block_size): what a block with a key holds.
    tokens: Vec<TokenId>,
    /// Blocks to be computed soon, by who computes them.
    promised: HashMap<BlockHash, u64>,
    /// To say why a prefix was not found.
    evicted: Evicted,
    /// Since they were last taken, where somebody takes them.
    events: Option<Vec<BlockEvent>>,
    /// Where others are told of them.
    feed: Option<KvFeed>,
}

impl BlockHasher {
    pub fn new(key: (u64, u64), block_size: u32) -> BlockHasher {
        BlockHasher { key, block_size: block_size as usize }
    }

    /// An empty chain. Requests of unlike salt share nothing.
    pub fn chain(&self, salt: u64) -> BlockChain {
        BlockChain { root: self.hash(0, &[], salt), ..BlockChain::default() }
    }

    /// The keys of the blocks that a request's prompt fills.
    pub fn of_prompt(&self, request: &Request) -> BlockChain {
        let mut chain = self.chain(request.cache_salt);
        chain.salt = request.salt_name.clone();
        self.extend(&mut chain, &request.prompt);
        chain
    }

    /// Adds the blocks that `tokens` fill and the chain does not have yet. O(new blocks).
    pub fn extend(&self, chain: &mut BlockChain, tokens: &[TokenId]) {
        for block in tokens.chunks_exact(self.block_size).skip(chain.hashes.len()) {
            let parent = chain.parent(chain.hashes.len());
            chain.hashes.push(BlockHash(self.hash(parent, block, block.len() as u64)));
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

impl PrefixCache {
    pub fn new(num_blocks: u32, block_size: u32, key: (u64, u64)) -> PrefixCache {
        // Twice what is ever in it, so that removals never make a map grow.
        let capacity = 2 * num_blocks as usize;
        PrefixCache {
            hasher: BlockHasher::new(key, block_size),
            block_size: block_size as usize,
            by_hash: HashMap::with_capacity(capacity),
            keys: vec![None; num_blocks as usize],
            tokens: vec![TokenId(0); num_blocks as usize * block_size as usize],
            promised: HashMap::with_capacity(capacity),
            evicted: Evicted::new(num_blocks as usize),
            events: None,
            feed: None,
        }
    }

    pub fn hasher(&self) -> &BlockHasher {
        &self.hasher
    }

    /// From now on keeps what happens, for [`PrefixCache::events`].
    pub fn keep_events(&mut self) {
        self.events.get_or_insert_default();
    }

    /// What happened since the last call; whoever keeps them takes them after each step, so that they stay few.
    pub fn events(&mut self) -> impl Iterator<Item = BlockEvent> + '_ {
        self.events.iter_mut().flat_map(|events| events.drain(..))
    }

    /// From now on others are told what is findable, from what there is now on.
    pub fn tell_kv_events_to(&mut self, sender: KvEventSender) {
        assert!(self.by_hash.is_empty(), "blocks that nobody was told of");
        self.feed = Some(KvFeed::new(sender, self.keys.len() as u32));
    }

    /// Sends what happened, as far as there is room.
    pub fn send_kv_events(&mut self) {
        let Some(mut feed) = self.feed.take() else { return };
        if feed.send(|feed| self.all_blocks(feed)) {
            self.feed = Some(feed);
        }
    }

    /// Findable blocks, each after the one that it follows where that is findable.
    fn all_blocks(&self, feed: &KvFeed) -> Vec<KvEvent> {
        let mut followers: HashMap<BlockHash, Vec<BlockId>> = HashMap::new();
        let mut next = Vec::new();
        for &block in self.by_hash.values() {
            match feed.lineage(block).parent.filter(|parent| self.by_hash.contains_key(parent)) {
                Some(parent) => followers.entry(parent).or_default().push(block),
                None => next.push(block),
            }
        }
        let mut told = Vec::with_capacity(self.by_hash.len());
        while let Some(block) = next.pop() {
            let hash = self.keys[block.0 as usize].expect("it is findable");
            let (lineage, tokens) = (feed.lineage(block).clone(), self.held(block).into());
            told.push(KvEvent::Stored(StoredBlock { hash, lineage, tokens }));
            next.extend(followers.remove(&hash).unwrap_or_default());
        }
        told
    }

    /// The block called `hash`, if it holds `tokens`.
    pub fn find(&self, hash: BlockHash, tokens: &[TokenId]) -> Option<BlockId> {
        let block = *self.by_hash.get(&hash)?;
        (self.held(block) == tokens).then_some(block)
    }

    /// The block called `hash`, whatever it holds.
    pub fn named(&self, hash: BlockHash) -> Option<BlockId> {
        self.by_hash.get(&hash).copied()
    }

    /// Makes `block`, which holds `tokens`, findable as block `index` of `chain`, unless another one already is.
    pub fn insert(&mut self, chain: &BlockChain, index: usize, tokens: &[TokenId], block: BlockId) {
        let hash = chain.hashes[index];
        self.promised.remove(&hash);
        if self.by_hash.contains_key(&hash) {
            return;
        }
        let old = self.keys[block.0 as usize].replace(hash);
        assert_eq!(old, None, "block {} is cached twice", block.0);
        let at = block.0 as usize * self.block_size;
        self.tokens[at..at + self.block_size].copy_from_slice(tokens);
        self.by_hash.insert(hash, block);
        self.events.iter_mut().for_each(|events| events.push(BlockEvent::Stored(hash)));
        self.feed.iter_mut().for_each(|feed| feed.stored(block, chain, index, tokens));
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.keys[block.0 as usize].is_some()
    }

    /// Forgets a block, which is about to be overwritten; says whether it was known.
    pub fn evict(&mut self, block: BlockId) -> bool {
        let hash = self.forget(block);
        hash.into_iter().for_each(|hash| self.evicted.remember(hash));
        hash.is_some()
    }

    /// Makes a block unfindable.
    pub fn forget(&mut self, block: BlockId) -> Option<BlockHash> {
        let hash = self.keys[block.0 as usize].take()?;
        self.by_hash.remove(&hash)?;
        self.events.iter_mut().for_each(|events| events.push(BlockEvent::Removed(hash)));
        self.feed.iter_mut().for_each(|feed| feed.removed(hash));
        Some(hash)
    }

    /// Makes all blocks unfindable.
    pub fn forget_all(&mut self) {
        let blocks: Vec<BlockId> = self.blocks().collect();
        for block in blocks {
            self.forget(block);
        }
        self.feed.iter_mut().for_each(KvFeed::cleared);
    }

    /// Whether a block called `hash` was evicted lately.
    pub fn was_evicted(&self, hash: BlockHash) -> bool {
        self.evicted.contains(hash)
    }

    /// `owner` is going to compute the block called `hash`.
    pub fn promise(&mut self, hash: BlockHash, owner: u64) {
        if !self.by_hash.contains_key(&hash) {
            self.promised.entry(hash).or_insert(owner);
        }
    }

    pub fn break_promise(&mut self, hash: BlockHash, owner: u64) {
        if self.promised.get(&hash) == Some(&owner) {
            self.promised.remove(&hash);
        }
    }

    pub fn is_promised(&self, hash: BlockHash) -> bool {
        self.promised.contains_key(&hash)
    }

    pub fn num_promised(&self) -> usize {
        self.promised.len()
    }

    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.by_hash.values().copied()
    }

    pub fn names(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.by_hash.keys().copied()
    }

    pub fn check(&self) {
        assert_eq!(self.by_hash.len(), self.keys.iter().flatten().count());
        for (hash, block) in &self.by_hash {
            assert_eq!(self.keys[block.0 as usize], Some(*hash), "block {} has two keys", block.0);
            assert!(!self.promised.contains_key(hash), "block {} is there and promised", block.0);
        }
    }

    fn held(&self, block: BlockId) -> &[TokenId] {
        &self.tokens[block.0 as usize * self.block_size..][..self.block_size]
    }
}

impl BlockChain {
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// Its first `num_blocks` blocks.
    pub fn head(&self, num_blocks: usize) -> BlockChain {
        BlockChain { root: self.root, hashes: self.hashes[..num_blocks].to_vec(), salt: self.salt.clone() }
    }

    pub fn salt(&self) -> Option<&Arc<str>> {
        self.salt.as_ref()
    }

    /// Says by what its client divides the cache.
    pub fn set_salt(&mut self, salt: Option<Arc<str>>) {
        self.salt = salt;
    }

    /// What the key of block `index` is chained to.
    fn parent(&self, index: usize) -> u128 {
        index.checked_sub(1).map_or(self.root, |last| self.hashes[last].0)
    }
}
