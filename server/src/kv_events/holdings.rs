//! Several devices as one worker: a block is there while any of them has it, for a router sends requests to the worker,
//! and the worker sends them to the device.

use std::collections::{HashMap, HashSet};

use fullbore_engine::memory::BlockHash;
use fullbore_engine::memory::kv_events::{KvEvent, KvEventBatch};

#[derive(Debug, Default)]
pub struct Holdings {
    by_source: HashMap<u16, HashSet<BlockHash>>,
    /// Devices that have a block, at least one.
    num_holders: HashMap<BlockHash, u16>,
}

impl Holdings {
    /// What a batch of one device changes for the worker.
    pub fn apply(&mut self, batch: KvEventBatch) -> Vec<KvEvent> {
        let held = self.by_source.entry(batch.source).or_default();
        let num_holders = &mut self.num_holders;
        let mut told = Vec::with_capacity(batch.events.len());
        for event in batch.events {
            match event {
                KvEvent::Stored(block) if held.insert(block.hash) => {
                    let holders = num_holders.entry(block.hash).or_default();
                    *holders += 1;
                    if *holders == 1 {
                        told.push(KvEvent::Stored(block));
                    }
                }
                KvEvent::Stored(_) => {}
                KvEvent::Removed(hash) => {
                    if held.remove(&hash) && is_gone(num_holders, hash) {
                        told.push(KvEvent::Removed(hash));
                    }
                }
                KvEvent::Cleared => {
                    let gone: Vec<BlockHash> = held.drain().filter(|&hash| is_gone(num_holders, hash)).collect();
                    match num_holders.is_empty() {
                        true => told.push(KvEvent::Cleared),
                        false => told.extend(gone.into_iter().map(KvEvent::Removed)),
                    }
                }
            }
        }
        told
    }
}

/// Whether the device that does not have a block any more was the last one.
fn is_gone(num_holders: &mut HashMap<BlockHash, u16>, hash: BlockHash) -> bool {
    let left = num_holders.get_mut(&hash).expect("somebody held it");
    *left -= 1;
    let is_gone = *left == 0;
    if is_gone {
        num_holders.remove(&hash);
    }
    is_gone
}

#[cfg(test)]
mod tests {
    use fullbore_engine::memory::kv_events::{Lineage, StoredBlock};
    use fullbore_engine::request::TokenId;

    use super::*;

    fn stored(hash: u128) -> KvEvent {
        let tokens = vec![TokenId(hash as u32)].into();
        KvEvent::Stored(StoredBlock { hash: BlockHash(hash), lineage: Lineage::default(), tokens })
    }

    #[test]
    fn a_block_is_there_while_any_device_has_it() {
        let mut holdings = Holdings::default();
        let mut apply = |source, events| holdings.apply(KvEventBatch { source, events });
        assert_eq!(apply(0, vec![stored(1), stored(2)]), [stored(1), stored(2)]);
        assert_eq!(apply(1, vec![stored(2), stored(3), stored(3)]), [stored(3)]);
        let removed = |hash| KvEvent::Removed(BlockHash(hash));
        assert_eq!(apply(0, vec![removed(2), removed(2)]), []);
        assert_eq!(apply(1, vec![removed(2)]), [removed(2)]);
        // One device is lost, then the other.
        assert_eq!(apply(1, vec![KvEvent::Cleared]), [removed(3)]);
        assert_eq!(apply(0, vec![KvEvent::Cleared, stored(1)]), [KvEvent::Cleared, stored(1)]);
    }
}
