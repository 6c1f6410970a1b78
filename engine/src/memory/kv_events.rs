//! What routers of other machines are told of findable blocks: which are stored, with their tokens, and which are gone.
//!
//! Invariant: whoever applies in order what was sent knows exactly the findable blocks, or is about to be told all of
//! them anew. Nothing here waits: what the receiver has no room for is kept, and beyond a bound dropped for a whole
//! account later.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};

use super::BlockChain;
use super::block_pool::BlockId;
use super::prefix_cache::BlockHash;
use crate::request::TokenId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    Stored(StoredBlock),
    Removed(BlockHash),
    /// Nothing is findable any more.
    Cleared,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlock {
    pub hash: BlockHash,
    pub lineage: Lineage,
    /// (block_size)
    pub tokens: Box<[TokenId]>,
}

/// What comes before a block's tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// `None` of the first block.
    pub parent: Option<BlockHash>,
    /// Of the first block: what its client divides the cache by.
    pub salt: Option<Arc<str>>,
}

/// What happened to one engine's blocks since its last batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvEventBatch {
    /// The number of the engine among those that share a receiver.
    pub source: u16,
    pub events: Vec<KvEvent>,
}

/// Where an engine's batches go, and as whose.
#[derive(Clone, Debug)]
pub struct KvEventSender {
    pub source: u16,
    pub to: SyncSender<KvEventBatch>,
}

#[derive(Debug)]
pub(super) struct KvFeed {
    sender: KvEventSender,
    /// Not sent yet, at most `max_events`.
    events: Vec<KvEvent>,
    max_events: usize,
    /// Events were dropped; `events` is empty then.
    is_behind: bool,
    /// By block, of findable ones.
    lineages: Vec<Lineage>,
}

impl KvFeed {
    pub fn new(sender: KvEventSender, num_blocks: u32) -> KvFeed {
        let num_blocks = num_blocks as usize;
        // A whole account fits, and as much again that happens before it is taken.
        let max_events = 2 * num_blocks + 1;
        KvFeed {
            sender,
            events: Vec::new(),
            max_events,
            is_behind: false,
            lineages: vec![Lineage::default(); num_blocks],
        }
    }

    pub fn stored(&mut self, block: BlockId, chain: &BlockChain, index: usize, tokens: &[TokenId]) {
        let parent = index.checked_sub(1).map(|before| chain.hashes()[before]);
        let lineage = Lineage { parent, salt: chain.salt().filter(|_| index == 0).cloned() };
        self.lineages[block.0 as usize] = lineage.clone();
        self.push(|| KvEvent::Stored(StoredBlock { hash: chain.hashes()[index], lineage, tokens: tokens.into() }));
    }

    pub fn removed(&mut self, hash: BlockHash) {
        self.push(|| KvEvent::Removed(hash));
    }

    /// Of what was not sent yet nothing is of use.
    pub fn cleared(&mut self) {
        self.events.clear();
        self.push(|| KvEvent::Cleared);
    }

    pub fn lineage(&self, block: BlockId) -> &Lineage {
        &self.lineages[block.0 as usize]
    }

    fn push(&mut self, event: impl FnOnce() -> KvEvent) {
        if self.is_behind {
            return;
        }
        self.events.push(event());
        if self.events.len() > self.max_events {
            self.events = Vec::new();
            self.is_behind = true;
        }
    }

    /// Sends what there is room for; `all` are the findable blocks, those before others first. `false` once nobody
    /// receives.
    pub fn send(&mut self, all: impl FnOnce(&KvFeed) -> Vec<KvEvent>) -> bool {
        if self.is_behind {
            match self.sender.try_send(vec![KvEvent::Cleared]) {
                Ok(()) => {
                    self.is_behind = false;
                    self.events = all(self);
                }
                Err(Unsent::Full(_)) => return true,
                Err(Unsent::Disconnected) => return false,
            }
        }
        if self.events.is_empty() {
            return true;
        }
        match self.sender.try_send(std::mem::take(&mut self.events)) {
            Ok(()) => true,
            Err(Unsent::Full(events)) => {
                self.events = events;
                true
            }
            Err(Unsent::Disconnected) => false,
        }
    }
}

enum Unsent {
    Full(Vec<KvEvent>),
    Disconnected,
}

impl KvEventSender {
    fn try_send(&self, events: Vec<KvEvent>) -> Result<(), Unsent> {
        self.to.try_send(KvEventBatch { source: self.source, events }).map_err(|error| match error {
            TrySendError::Full(batch) => Unsent::Full(batch.events),
            TrySendError::Disconnected(_) => Unsent::Disconnected,
        })
    }
}
