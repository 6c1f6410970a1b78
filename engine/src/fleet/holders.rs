//! Which replicas hold which KV blocks.
//!
//! Invariant: a replica is among a block's holders exactly while it has said that it stored it and not that it removed
//! it. Most blocks have few holders and some, of prefixes that all share, have all: a list, then a bit for each.

use rustc_hash::FxHashMap;

use super::ReplicaId;
use crate::memory::{BlockEvent, BlockHash};

#[derive(Debug)]
pub struct Holders {
    by_hash: FxHashMap<BlockHash, Set>,
    num_replicas: u16,
    /// Those that hold all blocks that were looked at so far, a bit each.
    alive: Vec<u64>,
}

#[derive(Debug)]
enum Set {
    /// The first `len` of them.
    Few {
        ids: [u16; MAX_FEW],
        len: u8,
    },
    Many(Box<[u64]>),
}

const MAX_FEW: usize = 6;

impl Holders {
    pub fn new(num_replicas: u16) -> Holders {
        let num_words = usize::from(num_replicas).div_ceil(64);
        Holders { by_hash: FxHashMap::default(), num_replicas, alive: vec![0; num_words] }
    }

    pub fn tell(&mut self, replica: ReplicaId, event: BlockEvent) {
        assert!(replica.0 < self.num_replicas, "replica {} of {}", replica.0, self.num_replicas);
        match event {
            BlockEvent::Stored(hash) => {
                let num_words = self.alive.len();
                self.by_hash.entry(hash).or_insert(Set::EMPTY).add(replica.0, num_words);
            }
            BlockEvent::Removed(hash) => {
                let Some(set) = self.by_hash.get_mut(&hash) else { return };
                set.remove(replica.0);
                if set.is_empty() {
                    self.by_hash.remove(&hash);
                }
            }
        }
    }

    /// All that a replica held is gone. O(blocks that are known).
    pub fn forget(&mut self, replica: ReplicaId) {
        self.by_hash.retain(|_, set| {
            set.remove(replica.0);
            !set.is_empty()
        });
    }

    /// Calls `visit` with each replica that holds the first block of `chain`, and how many it holds from there on.
    /// O(blocks of the chain * replicas / 64 + replicas).
    pub fn depths(&mut self, chain: &[BlockHash], mut visit: impl FnMut(ReplicaId, u32)) {
        self.alive.fill(u64::MAX);
        let mut depth = 0;
        for hash in chain {
            let set = self.by_hash.get(hash);
            for (index, alive) in self.alive.iter_mut().enumerate() {
                let kept = set.map_or(0, |set| set.word(index)) & *alive;
                if depth > 0 {
                    for_bits(*alive & !kept, index, |id| visit(ReplicaId(id), depth));
                }
                *alive = kept;
            }
            if set.is_none() {
                return;
            }
            depth += 1;
        }
        if depth > 0 {
            let left = self.alive.iter().enumerate();
            left.for_each(|(index, &alive)| for_bits(alive, index, |id| visit(ReplicaId(id), depth)));
        }
    }

    /// Blocks that anybody holds.
    pub fn num_blocks(&self) -> usize {
        self.by_hash.len()
    }
}

fn for_bits(mut word: u64, index: usize, mut visit: impl FnMut(u16)) {
    while word != 0 {
        visit((64 * index as u32 + word.trailing_zeros()) as u16);
        word &= word - 1;
    }
}

impl Set {
    const EMPTY: Set = Set::Few { ids: [0; MAX_FEW], len: 0 };

    fn add(&mut self, id: u16, num_words: usize) {
        match self {
            Set::Few { ids, len } if ids[..usize::from(*len)].contains(&id) => {}
            Set::Few { ids, len } if usize::from(*len) < MAX_FEW => {
                ids[usize::from(*len)] = id;
                *len += 1;
            }
            Set::Few { ids, .. } => {
                let mut words = vec![0; num_words].into_boxed_slice();
                ids.iter().chain([&id]).for_each(|id| words[usize::from(*id) / 64] |= 1 << (id % 64));
                *self = Set::Many(words);
            }
            Set::Many(words) => words[usize::from(id) / 64] |= 1 << (id % 64),
        }
    }

    fn remove(&mut self, id: u16) {
        match self {
            Set::Few { ids, len } => {
                if let Some(at) = ids[..usize::from(*len)].iter().position(|held| *held == id) {
                    *len -= 1;
                    ids[at] = ids[usize::from(*len)];
                }
            }
            Set::Many(words) => words[usize::from(id) / 64] &= !(1 << (id % 64)),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Set::Few { len, .. } => *len == 0,
            Set::Many(words) => words.iter().all(|word| *word == 0),
        }
    }

    /// Bits of replicas 64 * index to 64 * index + 63.
    fn word(&self, index: usize) -> u64 {
        match self {
            Set::Few { ids, len } => {
                let here = ids[..usize::from(*len)].iter().filter(|id| usize::from(**id) / 64 == index);
                here.fold(0, |word, id| word | 1 << (id % 64))
            }
            Set::Many(words) => words[index],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    const NUM_REPLICAS: u16 = 130;

    proptest! {
        /// Against a set for each replica.
        #[test]
        fn depths_are_what_the_events_say(
            events in prop::collection::vec((0..NUM_REPLICAS, 0u128..4, prop::bool::weighted(0.8)), 0..600),
            forgotten in prop::option::of(0..NUM_REPLICAS),
        ) {
            let mut holders = Holders::new(NUM_REPLICAS);
            let mut model: BTreeMap<u16, BTreeSet<u128>> = BTreeMap::new();
            for (replica, hash, is_stored) in events {
                let held = model.entry(replica).or_default();
                let event = if is_stored {
                    held.insert(hash);
                    BlockEvent::Stored
                } else {
                    held.remove(&hash);
                    BlockEvent::Removed
                };
                holders.tell(ReplicaId(replica), event(BlockHash(hash)));
            }
            if let Some(replica) = forgotten {
                holders.forget(ReplicaId(replica));
                model.remove(&replica);
            }
            let known: BTreeSet<u128> = model.values().flatten().copied().collect();
            prop_assert_eq!(holders.num_blocks(), known.len());
            for length in 0..=4 {
                let chain: Vec<BlockHash> = (0..length).map(BlockHash).collect();
                let mut depths = BTreeMap::new();
                holders.depths(&chain, |replica, depth| assert_eq!(depths.insert(replica.0, depth), None));
                let depth = |held: &BTreeSet<u128>| (0..length).take_while(|hash| held.contains(hash)).count() as u32;
                let wanted = model.iter().map(|(id, held)| (*id, depth(held))).filter(|(_, depth)| *depth > 0);
                prop_assert_eq!(depths, wanted.collect::<BTreeMap<u16, u32>>());
            }
        }
    }
}
