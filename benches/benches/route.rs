//! What the router takes to say where a request goes, by how many replicas there are: each has requests already, and
//! the prompt's beginning is cached on some of them. Alone; where blocks can come from other replicas; as a server asks
//! it, told before each decision who has been at a step for how long; and alone by how long prompts are.
//!
//! `cargo bench -p fullbore-bench --bench route` prints one line of JSON a size; `cargo test` runs it small.

use std::time::{Duration, Instant};

use fullbore_bench::statistics::median;
use fullbore_bench::workload::SplitMix64;
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::engine::moves::MovePrices;
use fullbore_engine::fleet::ReplicaId;
use fullbore_engine::fleet::router::{Ask, Placement, Router, Traits};
use fullbore_engine::memory::{BlockEvent, BlockHash};
use fullbore_engine::model::KvLayout;
use fullbore_engine::tensor::KvType;

const BLOCK_SIZE: u32 = 32;
/// Full blocks of a prompt, at least.
const CHAIN_LEN: u32 = 32;
const LONG_CHAIN_LENS: [u32; 2] = [512, 4096];
/// Prefixes that are around: one of the whole fleet, and others of a few replicas each.
const NUM_PREFIXES: u128 = 64;
/// A block takes less to come from another replica than to be computed on any of them.
const MOVES: MovePrices = MovePrices {
    layout: KvLayout { kv_type: KvType::F16, block_size: BLOCK_SIZE, num_layers: 32, num_kv_heads: 8, head_dim: 128 },
    out_ns: 50_000,
    in_ns: 50_000,
};
/// Of so many replicas one has been at a step for a second.
const STALLED: u16 = 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Alone,
    Moves,
    /// With moves too.
    Told,
}

fn main() {
    let large = std::env::args().any(|argument| argument == "--bench");
    let (sizes, num_decisions): (&[u16], usize) = if large { (&[8, 100, 1000], 20_000) } else { (&[8, 100], 50) };
    for &num_replicas in sizes {
        let [alone, moves, told] =
            [Form::Alone, Form::Moves, Form::Told].map(|form| measure(form, num_replicas, CHAIN_LEN, num_decisions));
        let [long, longer] = LONG_CHAIN_LENS.map(|len| measure(Form::Alone, num_replicas, len, num_decisions / 10));
        let us = serde_json::json!({
            "alone": alone, "with_moves": moves, "with_moves_and_stalls": told,
            "alone_at_512_blocks": long, "alone_at_4096_blocks": longer,
        });
        println!("{}", serde_json::json!({ "num_replicas": num_replicas, "us_per_decision": us }));
    }
}

fn chain(prefix: u128, len: u32) -> Vec<BlockHash> {
    (0..u128::from(len)).map(|block| BlockHash(prefix << 32 | block)).collect()
}

/// The median of decisions, each with what follows from it: a first token, and the end of an earlier request.
fn measure(form: Form, num_replicas: u16, chain_len: u32, num_decisions: usize) -> f64 {
    let mut random = SplitMix64(7);
    let traits = |speed: f64| Traits {
        cost: CostModel::line(10e6 / speed, 0.1e6 / speed, Prices { ns_per_attended_token: 1.0, ..Prices::default() }),
        max_num_seqs: 64,
        max_num_batched_tokens: 2048,
        kv_tokens: 1 << 20,
    };
    let speeds: Vec<Traits> = (0..num_replicas).map(|index| traits(f64::from(1 << (index % 4)))).collect();
    let mut router = Router::new(BLOCK_SIZE, &speeds);
    if form != Form::Alone {
        router.set_moves(vec![Some(MOVES); speeds.len()]);
    }
    for prefix in 0..NUM_PREFIXES {
        let is_held = |replica: u16| prefix == 0 || u128::from(replica) % NUM_PREFIXES == prefix;
        for replica in (0..num_replicas).filter(|&replica| is_held(replica)).map(ReplicaId) {
            chain(prefix, chain_len).into_iter().for_each(|hash| router.tell(replica, BlockEvent::Stored(hash)));
        }
    }
    let chains: Vec<Vec<BlockHash>> = (0..NUM_PREFIXES).map(|prefix| chain(prefix, chain_len)).collect();
    let mut place = |router: &mut Router| {
        let chain = &chains[random.below(NUM_PREFIXES as u32) as usize];
        let prompt_tokens = chain_len * BLOCK_SIZE + 1 + random.below(2000);
        router.place(Ask { chain, prompt_tokens, max_tokens: u32::MAX }).expect("all are open")
    };
    let mut placed: Vec<Placement> = (0..16 * usize::from(num_replicas)).map(|_| place(&mut router)).collect();
    let mut times = Vec::with_capacity(num_decisions);
    let mut num_fetches = 0;
    for index in 0..num_decisions {
        let begun = Instant::now();
        if form == Form::Told {
            let stalled = |id: u16| if id.is_multiple_of(STALLED) { Duration::from_secs(1) } else { Duration::ZERO };
            (0..num_replicas).for_each(|id| router.set_stalled(ReplicaId(id), stalled(id)));
        }
        let mut placement = place(&mut router);
        num_fetches += usize::from(placement.fetch.is_some());
        router.token(&mut placement);
        let len = placed.len();
        router.end(std::mem::replace(&mut placed[index % len], placement), 200);
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    // A few decisions have none, for a replica that has the prefix itself costs less where it has the time.
    let is_right = if form == Form::Alone { num_fetches == 0 } else { num_fetches > 0 || num_decisions < 10_000 };
    assert!(is_right, "{num_fetches} of {num_decisions}");
    median(&mut times).expect("some decisions")
}
