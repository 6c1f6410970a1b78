//! Whether a replica has blocks of a prompt copied from another one, because it would take longer to compute them.

use std::cmp::Reverse;
use std::ops::Range;
use std::time::Duration;

use super::{ReplicaId, Router};
use crate::engine::moves::MovePrices;

/// Blocks of a prompt that are to come from another replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    pub from: ReplicaId,
    pub blocks: Range<u32>,
    /// What it takes to compute them.
    pub saves: Duration,
}

/// The replica that has the most of a prompt, of those that could hand it on now.
#[derive(Clone, Copy)]
pub(super) struct Source {
    index: usize,
    prices: MovePrices,
    num_blocks: u32,
    /// Until it is between two steps.
    turn_ns: f64,
}

/// The rest of a prompt on one replica.
pub(super) struct Rest {
    pub ns: f64,
    pub fetch: Option<Fetch>,
}

impl Router {
    /// Of the request that is being placed. O(replicas), once a request.
    pub(super) fn source(&self) -> Option<Source> {
        let all = self.moves.iter().zip(&self.cached_tokens).enumerate();
        let sources = all.filter_map(|(index, (prices, &cached_tokens))| {
            let prices = prices.filter(|_| cached_tokens >= self.block_size)?;
            let is_there = self.replicas[index].is_open && self.replicas[index].late_ns == 0;
            is_there.then_some((cached_tokens, Reverse(prices.out_ns), index))
        });
        let (cached_tokens, _, index) = sources.max()?;
        let num_blocks = cached_tokens / self.block_size;
        Some(Source { index, prices: self.moves[index]?, num_blocks, turn_ns: self.replicas[index].turn_ns() })
    }

    /// What replica `index` takes for the rest of a prompt, with what it had better fetch from `source`.
    pub(super) fn rest(&self, index: usize, prompt_tokens: u32, source: Option<Source>) -> Rest {
        let computed_ns = self.outlooks[index].prompt_ns(prompt_tokens, self.cached_tokens[index]);
        let fetched = source.and_then(|source| self.fetched(index, prompt_tokens, computed_ns, source));
        fetched.unwrap_or(Rest { ns: computed_ns, fetch: None })
    }

    /// The same with what `source` has beyond its own, where that is sooner than to compute it.
    fn fetched(&self, index: usize, prompt_tokens: u32, computed_ns: f64, source: Source) -> Option<Rest> {
        let (start, end) = (self.cached_tokens[index] / self.block_size, source.num_blocks);
        if start >= end {
            return None;
        }
        let here = self.moves[index].filter(|here| here.layout == source.prices.layout)?;
        let left_ns = self.outlooks[index].prompt_ns(prompt_tokens, end * self.block_size);
        let copies_ns = u64::from(end - start) * (source.prices.out_ns + here.in_ns);
        let ns = source.turn_ns + copies_ns as f64 + left_ns;
        let fetch = || {
            let saves = Duration::from_nanos((computed_ns - left_ns) as u64);
            Fetch { from: ReplicaId(source.index as u16), blocks: start..end, saves }
        };
        (ns < computed_ns).then(|| Rest { ns, fetch: Some(fetch()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{CostModel, Prices};
    use crate::fleet::router::{Ask, Traits};
    use crate::memory::{BlockEvent, BlockHash};
    use crate::model::KvLayout;
    use crate::tensor::KvType;

    const LAYOUT: KvLayout =
        KvLayout { kv_type: KvType::F16, block_size: 16, num_layers: 2, num_kv_heads: 2, head_dim: 64 };

    /// Two replicas on which a token of a prompt takes 0.12 ms; the first has 24 blocks of what is asked.
    fn router(first: MovePrices, second: MovePrices) -> (Router, Vec<BlockHash>) {
        let cost = CostModel::line(10e6, 0.1e6, Prices::default());
        let mut router =
            Router::new(16, &[Traits { cost, max_num_seqs: 4, max_num_batched_tokens: 512, kv_tokens: 1 << 20 }; 2]);
        router.set_moves(vec![Some(first), Some(second)]);
        let chain: Vec<BlockHash> = (0..24).map(BlockHash).collect();
        chain.iter().for_each(|&hash| router.tell(ReplicaId(0), BlockEvent::Stored(hash)));
        (router, chain)
    }

    fn fetch_of(router: &mut Router, chain: &[BlockHash]) -> Option<Fetch> {
        let placement = router.place_on(ReplicaId(1), Ask { chain, prompt_tokens: 400, max_tokens: 100 });
        let fetch = placement.fetch.clone();
        router.withdraw(placement);
        fetch
    }

    #[test]
    fn blocks_are_fetched_where_that_is_cheaper_than_to_compute_them() {
        let cheap = MovePrices { layout: LAYOUT, out_ns: 10_000, in_ns: 20_000 };
        let (mut router, chain) = router(cheap, cheap);
        let fetch = fetch_of(&mut router, &chain).expect("0.7 ms and not 46");
        assert_eq!((fetch.from, fetch.blocks), (ReplicaId(0), 0..24));
        assert!((45..48).contains(&fetch.saves.as_millis()), "{:?}", fetch.saves);
        // What is there is not fetched.
        chain[..20].iter().for_each(|&hash| router.tell(ReplicaId(1), BlockEvent::Stored(hash)));
        assert_eq!(fetch_of(&mut router, &chain).map(|fetch| fetch.blocks), Some(20..24));
        // Nor from who is late, or not there.
        router.set_stalled(ReplicaId(0), Duration::from_secs(1));
        assert_eq!(fetch_of(&mut router, &chain), None);
        router.set_stalled(ReplicaId(0), Duration::ZERO);
        router.set_open(ReplicaId(0), false);
        assert_eq!(fetch_of(&mut router, &chain), None);
    }

    #[test]
    fn blocks_are_computed_where_copies_are_dear_or_mean_something_else() {
        let cheap = MovePrices { layout: LAYOUT, out_ns: 10_000, in_ns: 20_000 };
        let dear = MovePrices { in_ns: 2_000_000, ..cheap };
        let other = MovePrices { layout: KvLayout { kv_type: KvType::Q8_0, ..LAYOUT }, ..cheap };
        for second in [dear, other] {
            let (mut router, chain) = router(cheap, second);
            assert_eq!(fetch_of(&mut router, &chain), None);
        }
    }

    /// It has a slot, and the one with the prefix has none: the prompt takes it next to nothing.
    #[test]
    fn what_is_fetched_counts_in_what_is_predicted() {
        let cheap = MovePrices { layout: LAYOUT, out_ns: 10_000, in_ns: 20_000 };
        let (mut router, chain) = router(cheap, cheap);
        let ask = Ask { chain: &chain, prompt_tokens: 400, max_tokens: 100 };
        let placement = router.place_on(ReplicaId(1), ask);
        let fetched_ns = placement.predicted_ns;
        router.withdraw(placement);
        router.set_open(ReplicaId(0), false);
        let computed = router.place_on(ReplicaId(1), Ask { chain: &[], ..ask });
        assert!(fetched_ns + 40_000_000 < computed.predicted_ns, "{fetched_ns} {computed:?}");
    }
}
