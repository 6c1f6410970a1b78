//! The block pool and the cache above it against trivially correct models, by random operations.

use std::collections::{HashMap, VecDeque};

use fullbore_engine::memory::{BlockChain, BlockId, BlockPool, BlockTable, KvCache};
use fullbore_engine::request::TokenId;

use crate::random::Random;

/// A free list as a queue, counts as a vector: O(n) everywhere, and obviously right.
struct ModelPool {
    references: Vec<u32>,
    free: VecDeque<BlockId>,
}

impl ModelPool {
    fn alloc(&mut self) -> Option<BlockId> {
        let block = self.free.pop_front()?;
        self.references[block.0 as usize] = 1;
        Some(block)
    }

    fn reference(&mut self, block: BlockId) {
        self.free.retain(|&free| free != block);
        self.references[block.0 as usize] += 1;
    }

    fn release(&mut self, block: BlockId, cached: bool) {
        self.references[block.0 as usize] -= 1;
        match (self.references[block.0 as usize], cached) {
            (0, true) => self.free.push_back(block),
            (0, false) => self.free.push_front(block),
            _ => {}
        }
    }
}

#[test]
fn the_pool_is_its_model() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let num_blocks = random.between(1, 24);
        let mut pool = BlockPool::new(num_blocks);
        let mut model =
            ModelPool { references: vec![0; num_blocks as usize], free: (0..num_blocks).map(BlockId).collect() };
        for _ in 0..200 {
            let block = BlockId(random.below(num_blocks));
            match random.below(3) {
                0 => assert_eq!(pool.alloc(), model.alloc(), "seed {seed}"),
                1 => {
                    pool.reference(block);
                    model.reference(block);
                }
                _ if model.references[block.0 as usize] > 0 => {
                    let cached = random.one_in(2);
                    pool.release(block, cached);
                    model.release(block, cached);
                }
                _ => {}
            }
            pool.check();
            assert!(pool.free_list().eq(model.free.iter().copied()), "seed {seed}");
            assert_eq!(pool.references(block), model.references[block.0 as usize], "seed {seed}");
        }
    }
}

#[test]
#[should_panic(expected = "released once too often")]
fn a_double_release_is_our_own_bug() {
    let mut pool = BlockPool::new(2);
    let block = pool.alloc().expect("two are free");
    pool.release(block, false);
    pool.release(block, false);
}

/// Every block that `open` finds must have been filled with exactly the tokens it is found by, and not since then
/// with others: the model is what each block holds.
#[test]
fn a_hit_always_holds_what_was_asked_for() {
    let mut num_hits = 0;
    for seed in 0..400 {
        let mut random = Random::new(seed);
        let block_size = random.between(1, 4);
        let mut cache = KvCache::new(random.between(4, 20), block_size, Some((seed, 9)));
        let mut contents: HashMap<BlockId, (u64, Vec<TokenId>)> = HashMap::new();
        let mut live: Vec<(BlockTable, BlockChain)> = Vec::new();
        for _ in 0..60 {
            if random.one_in(3) && !live.is_empty() {
                let (table, chain) = live.swap_remove(random.below(live.len() as u32) as usize);
                cache.free(table, &chain, 0);
            } else {
                let salt = u64::from(random.below(2));
                let len = random.between(1, 12);
                let tokens: Vec<TokenId> = (0..len).map(|_| TokenId(random.below(2))).collect();
                let chain = cache.chain(&tokens, salt);
                let found = cache.find(&chain, &tokens, len - 1);
                let mut table = cache.open(&chain, &tokens, len - 1);
                assert_eq!(found.num_blocks, table.num_blocks(), "seed {seed}");
                for (index, block) in table.blocks().iter().enumerate() {
                    let prefix = &tokens[..(index + 1) * block_size as usize];
                    assert_eq!(contents[block], (salt, prefix.to_vec()), "seed {seed}");
                    num_hits += 1;
                }
                let num_hit = table.num_blocks() as usize;
                if cache.grow(&mut table, len).is_err() {
                    cache.free(table, &chain, 0);
                    continue;
                }
                for (index, &block) in table.blocks().iter().enumerate().skip(num_hit) {
                    let end = ((index + 1) * block_size as usize).min(tokens.len());
                    contents.insert(block, (salt, tokens[..end].to_vec()));
                }
                cache.publish(&mut table, &chain, &tokens, len);
                live.push((table, chain));
            }
            cache.check(live.iter().map(|(table, _)| table));
        }
        live.into_iter().for_each(|(table, chain)| cache.free(table, &chain, 0));
        cache.check(std::iter::empty());
        assert_eq!(cache.counts().referenced, 0);
    }
    assert!(num_hits > 1000, "only {num_hits} hits");
}

#[test]
fn growth_is_all_or_nothing_and_eviction_takes_the_tail_first() {
    let mut cache = KvCache::new(4, 2, Some((1, 2)));
    let tokens: Vec<TokenId> = (0..6).map(TokenId).collect();
    let chain = cache.chain(&tokens, 0);
    let mut table = cache.open(&chain, &tokens, 6);
    cache.grow(&mut table, 6).expect("three of four");
    cache.publish(&mut table, &chain, &tokens, 6);
    let mut other = BlockTable::default();
    assert!(cache.grow(&mut other, 4).is_err());
    assert_eq!(other.num_blocks(), 0);
    cache.free(table, &chain, 0);
    assert_eq!((cache.counts().cached, cache.counts().free), (3, 1));
    // The free block first, then the cached tail; the head stays findable longest.
    cache.grow(&mut other, 4).expect("two of four");
    let hit = cache.open(&chain, &tokens, 6);
    assert_eq!(hit.num_blocks(), 2);
    cache.check([&hit, &other].into_iter());
}
