//! What others are told of KV blocks against what is findable, by random operations and a receiver that is slow. Needs
//! nothing. Over sockets it is in `http/kv_events.rs`.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, sync_channel};

use fullbore_engine::memory::kv_events::{KvEvent, KvEventBatch, KvEventSender, StoredBlock};
use fullbore_engine::memory::{BlockChain, BlockHash, BlockTable, KvCache};
use fullbore_engine::request::TokenId;

use crate::random::Random;

const BLOCK_SIZE: u32 = 2;

/// Who knows nothing but what was sent.
struct Told {
    batches: Receiver<KvEventBatch>,
    blocks: HashMap<BlockHash, StoredBlock>,
    num_cleared: u32,
}

impl Told {
    /// Takes in what there is; how many batches that was.
    fn take(&mut self) -> usize {
        let mut num_batches = 0;
        while let Ok(batch) = self.batches.try_recv() {
            num_batches += 1;
            for event in batch.events {
                match event {
                    KvEvent::Stored(block) => {
                        assert_eq!(block.tokens.len(), BLOCK_SIZE as usize);
                        assert!(self.blocks.insert(block.hash, block).is_none(), "a block is stored twice");
                    }
                    KvEvent::Removed(hash) => assert!(self.blocks.remove(&hash).is_some(), "a block was not there"),
                    KvEvent::Cleared => {
                        self.blocks.clear();
                        self.num_cleared += 1;
                    }
                }
            }
        }
        num_batches
    }

    /// All tokens up to the end of a block, and what the first says of its salt; `None` where one before it is gone.
    fn tokens(&self, block: &StoredBlock) -> Option<(Vec<TokenId>, u64)> {
        let (mut tokens, salt) = match block.lineage.parent {
            Some(parent) => self.tokens(self.blocks.get(&parent)?)?,
            None => (Vec::new(), block.lineage.salt.as_deref().map_or(0, |salt| salt.parse().expect("a number"))),
        };
        tokens.extend_from_slice(&block.tokens);
        Some((tokens, salt))
    }
}

struct Running {
    table: BlockTable,
    chain: BlockChain,
    id: u64,
}

fn begin(cache: &mut KvCache, random: &mut Random, id: u64) -> Option<Running> {
    let tokens: Vec<TokenId> = (0..random.between(1, 13)).map(|_| TokenId(random.below(2))).collect();
    let salt = u64::from(random.below(2));
    let mut chain = cache.chain(&tokens, salt);
    chain.set_salt((salt > 0).then(|| salt.to_string().into()));
    let num_tokens = tokens.len() as u32;
    let mut table = cache.open(&chain, &tokens, num_tokens - 1);
    if cache.grow(&mut table, num_tokens).is_err() {
        cache.free(table, &chain, id);
        return None;
    }
    cache.publish(&mut table, &chain, &tokens, num_tokens);
    Some(Running { table, chain, id })
}

#[test]
fn whoever_applies_what_was_sent_knows_what_is_findable() {
    let (mut num_behind, mut num_checked) = (0, 0);
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let mut cache = KvCache::new(random.between(6, 24), BLOCK_SIZE, Some((seed, 1)));
        let (to, batches) = sync_channel(random.between(1, 4) as usize);
        cache.tell_kv_events_to(KvEventSender { source: 0, to });
        let mut told = Told { batches, blocks: HashMap::new(), num_cleared: 0 };
        let mut running: Vec<Running> = Vec::new();
        let mut num_lost = 0;
        for id in 0..300 {
            match random.below(5) {
                0..=2 => running.extend(begin(&mut cache, &mut random, id)),
                3 if !running.is_empty() => {
                    let ended = running.swap_remove(random.below(running.len() as u32) as usize);
                    if random.one_in(8) {
                        cache.withdraw(&ended.chain);
                    }
                    cache.free(ended.table, &ended.chain, ended.id);
                }
                _ if random.one_in(40) => {
                    running.drain(..).for_each(|ended| cache.free(ended.table, &ended.chain, ended.id));
                    cache.forget_all();
                    num_lost += 1;
                }
                _ => {}
            }
            cache.send_kv_events();
            if random.one_in(if seed % 2 == 0 { 2 } else { 100 }) {
                told.take();
            }
        }
        loop {
            cache.send_kv_events();
            if told.take() == 0 {
                break;
            }
        }
        let findable: HashSet<BlockHash> = cache.findable().collect();
        assert_eq!(told.blocks.keys().copied().collect::<HashSet<_>>(), findable, "seed {seed}");
        for block in told.blocks.values() {
            let Some((tokens, salt)) = told.tokens(block) else { continue };
            assert_eq!(cache.chain(&tokens, salt).hashes().last(), Some(&block.hash), "seed {seed}");
            num_checked += 1;
        }
        num_behind += u32::from(told.num_cleared > num_lost);
        cache.check(running.iter().map(|running| &running.table));
    }
    assert!(num_behind > 10 && num_checked > 500, "{num_behind} receivers were told anew, {num_checked} blocks");
}

#[test]
fn nobody_who_receives_is_no_error() {
    let mut random = Random::new(1);
    let mut cache = KvCache::new(16, BLOCK_SIZE, Some((1, 1)));
    let (to, batches) = sync_channel(1);
    cache.tell_kv_events_to(KvEventSender { source: 0, to });
    drop(batches);
    for id in 0..50 {
        if let Some(running) = begin(&mut cache, &mut random, id) {
            cache.send_kv_events();
            cache.free(running.table, &running.chain, id);
        }
    }
    assert!(cache.findable().count() > 0);
}
