//! Whole engines on the simulator: thousands of seeded workloads, every invariant after every step, and each request's
//! events equal to those it gets alone. Bugs are planted from here, through plain data, and must be caught each time.
//! A failure names its seed; `FULLBORE_SIM_SEED=<seed>` runs that one.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimClock, SimOptions};
use fullbore_engine::backend::{Backend, DeviceError, RowSource, Ticket, WeightSpec};
use fullbore_engine::batch::CopyDirection::{ToDevice, ToHost};
use fullbore_engine::batch::{BlockCopy, Slice};
use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::engine::Engine;
use fullbore_engine::memory::BlockTable;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::op::{Embed, MatMul, NON_FINITE, Op, SAMPLED_BY_SLOT, SampleRow};
use fullbore_engine::recording::Recording;
use fullbore_engine::request::{Event, FinishReason, Flow, Request, SamplingParams, Share, Sink, TokenId, token_mask};
use fullbore_engine::tensor::{KvType, Tensor, WeightFormat};

use crate::device::Device;
use crate::random::Random;

const NUM_WORKLOADS: u64 = 2500;
/// Beyond them, what once broke: a failure that came back when its request had been preempted and ran again.
const BROKE: [u64; 1] = [41_209];
pub const VOCAB_SIZE: u32 = 1024;
/// A request with this token in its prompt fails, alone.
const POISONOUS: u32 = 7;

#[test]
fn every_request_gets_what_it_gets_alone() {
    let one = std::env::var("FULLBORE_SIM_SEED").ok().map(|seed| seed.parse().expect("a seed is a number"));
    let more = if std::env::var_os("FULLBORE_TEST_FULL").is_some() { 20 } else { 1 };
    let all = (0..more * NUM_WORKLOADS).chain(BROKE).collect();
    let seeds: Vec<u64> = one.map_or(all, |seed| vec![seed]);
    let mut seen = Seen::default();
    for seed in seeds {
        let workload = Workload::random(seed);
        let result = catch_unwind(AssertUnwindSafe(|| workload.run(&mut |_, _| {}, &mut seen)));
        let difference = result.unwrap_or_else(|_| panic!("seed {seed} broke an invariant"));
        assert_eq!(difference, None, "seed {seed}");
    }
    if one.is_none() {
        seen.check();
    }
}

#[test]
fn requests_with_grammars_get_what_they_get_alone_and_disturb_nobody() {
    let grammars = [r"[a-z]{1,40}", r"([0-9]{2}:)+[a-f]", r"(.|\n)*"].map(crate::grammar::regex);
    let mut seen = Seen::default();
    for seed in 0..600 {
        let mut workload = Workload::random(seed);
        let mut random = Random::new(seed);
        for planned in &mut workload.requests {
            planned.request.grammar = random.one_in(2).then(|| grammars[random.below(3) as usize].clone());
        }
        let result = catch_unwind(AssertUnwindSafe(|| workload.run(&mut |_, _| {}, &mut seen)));
        let difference = result.unwrap_or_else(|_| panic!("seed {seed} broke an invariant"));
        assert_eq!(difference, None, "seed {seed}");
    }
    let rare = [seen.preemptions, seen.swaps, seen.cached_tokens, seen.aborts, seen.failures, seen.breaks];
    assert!(rare.iter().all(|count| *count > 10), "{seen:?}");
}

/// Between any two steps, and between the plan of one and its submission, the device may be gone: then those that it
/// worked for fail, and everybody else gets what it gets alone, on a device on which nothing is left.
#[test]
fn a_lost_device_takes_nothing_along_but_what_it_was_at() {
    let mut seen = Seen::default();
    for seed in 0..600 {
        let workload = Workload { loses: Some(seed), ..Workload::random(seed) };
        let result = catch_unwind(AssertUnwindSafe(|| workload.run(&mut |_, _| {}, &mut seen)));
        let difference = result.unwrap_or_else(|_| panic!("seed {seed} broke an invariant"));
        assert_eq!(difference, None, "seed {seed}");
    }
    assert!(seen.losses > 600 && seen.lost > 600 && seen.kept > 300 && seen.kept_swapped > 20, "{seen:?}");
}

/// As on a device that comes after one that was lost.
#[test]
fn an_answer_goes_on_from_its_tokens_as_it_would_have_gone_on() {
    let grammar = crate::grammar::regex(r"[a-z]{1,40}");
    let mut num_resumed = 0;
    for seed in 0..150 {
        let mut random = Random::new(seed);
        for planned in Workload::random(seed).requests {
            let request = Request { grammar: random.one_in(4).then(|| grammar.clone()), ..planned.request };
            let whole = alone(&request);
            let tokens: Vec<&Event> = whole.iter().filter(|event| matches!(event, Event::Token { .. })).collect();
            if tokens.len() < 2 || has_failed(&whole) {
                continue;
            }
            let num_there = random.between(1, tokens.len() as u32 - 1) as usize;
            let id = |event: &&Event| if let Event::Token { id, .. } = event { *id } else { unreachable!() };
            let generated = tokens[..num_there].iter().map(id).collect();
            let rest = alone(&Request { generated, ..request });
            let Event::Started { .. } = rest[0] else { panic!("{rest:?}") };
            let (Some(Event::Finished { reason, usage }), Some(Event::Finished { reason: other, usage: others })) =
                (rest.last(), whole.last())
            else {
                panic!("{rest:?}")
            };
            let expected: Vec<&Event> = tokens[num_there..].to_vec();
            assert_eq!(rest[1..rest.len() - 1].iter().collect::<Vec<_>>(), expected, "seed {seed}");
            assert_eq!((reason, usage.completion_tokens), (other, others.completion_tokens), "seed {seed}");
            num_resumed += 1;
        }
    }
    assert!(num_resumed > 300, "{num_resumed}");
}

/// A workload is worth little if it never takes the rare branches.
#[derive(Debug, Default)]
struct Seen {
    preemptions: u64,
    swaps: u64,
    cached_tokens: u64,
    aborts: u64,
    /// Requests whose clients said when.
    ends: u64,
    failures: u64,
    /// Requests that failed of a step that brought nothing finite.
    breaks: u64,
    /// Devices, the requests that failed with them, and those that kept their places; of these some swapped.
    losses: u64,
    lost: u64,
    kept: u64,
    kept_swapped: u64,
}

impl Seen {
    fn check(&self) {
        assert!(self.preemptions > 500, "{self:?}");
        assert!(self.swaps > 150 && self.swaps + 150 < self.preemptions, "{self:?}");
        assert!(self.cached_tokens > 1000, "{self:?}");
        assert!(self.aborts > 500 && self.ends > 100, "{self:?}");
        assert!(self.failures > 50, "{self:?}");
        assert!(self.breaks > 50, "{self:?}");
    }
}

#[test]
fn planted_bugs_are_caught_each_time() {
    let bugs: [(&str, Bug); 11] = [
        ("a block that did not leave", missing_swap),
        ("a block that comes back from elsewhere", wrong_swap),
        ("a wrong block in the device's table", wrong_table_block),
        ("a table entry that is not uploaded", missing_table_entry),
        ("a cache slot off by one", wrong_slot),
        ("a chunk boundary off by one", wrong_boundary),
        ("two sequences' rows swapped", swapped_rows),
        ("a hash that names a block with other contents", wrong_hash),
        ("a slot's token counts not begun anew", missing_reset),
        ("another slot's token counts begun anew", reset_of_another_slot),
        ("a known token not counted", uncounted_token),
    ];
    for (name, bug) in bugs {
        let mut num_planted = 0;
        for seed in 0..60 {
            let swaps = name == "a block that did not leave";
            let workload = if swaps { Workload::for_swaps(seed) } else { Workload::for_bugs(seed) };
            let mut planted = false;
            let mut plant = |engine: &mut Engine, step: u32| planted = planted || bug(engine, step, &workload);
            let result = catch_unwind(AssertUnwindSafe(|| workload.run(&mut plant, &mut Seen::default())));
            let caught = result.map_or(true, |difference| difference.is_some());
            assert_eq!(caught, planted, "{name}, seed {seed}");
            num_planted += u32::from(planted);
        }
        assert!(num_planted >= 30, "{name} was planted {num_planted} times only");
    }
}

/// Changes the planned step; returns whether it found a place to.
type Bug = fn(&mut Engine, u32, &Workload) -> bool;

fn wrong_table_block(engine: &mut Engine, _: u32, workload: &Workload) -> bool {
    let batch = engine.batch_mut();
    let sampling = |slot| batch.slices.iter().any(|slice| slice.slot == slot && slice.sample);
    let Some(index) = batch.table_updates.iter().position(|&(slot, ..)| sampling(slot)) else { return false };
    let block = &mut batch.table_updates[index].2;
    *block = (*block + 1) % workload.config.num_blocks;
    true
}

fn missing_table_entry(engine: &mut Engine, step: u32, _: &Workload) -> bool {
    let batch = engine.batch_mut();
    let sampling = |slot| batch.slices.iter().any(|slice| slice.slot == slot && slice.sample);
    // The row of a slot starts as zeros, and entry 0 of block 0 is then right by chance.
    let wanted = |&(slot, _, block): &(_, u32, u32)| block != 0 && sampling(slot);
    match batch.table_updates.iter().position(wanted) {
        Some(index) if step < 8 => {
            batch.table_updates.remove(index);
            true
        }
        _ => false,
    }
}

fn wrong_slot(engine: &mut Engine, _: u32, _: &Workload) -> bool {
    let batch = engine.batch_mut();
    let Some(slice) = batch.slices.iter().find(|slice| slice.sample) else { return false };
    let slot = &mut batch.slot_mapping[slice.tokens.start as usize];
    *slot ^= 1;
    true
}

fn wrong_boundary(engine: &mut Engine, _: u32, _: &Workload) -> bool {
    let Some(slice) = engine.batch_mut().slices.iter_mut().find(|slice| slice.sample && slice.start > 0) else {
        return false;
    };
    slice.start -= 1;
    true
}

/// A block that is copied out and back is as it was; then an empty one comes back in its place.
fn wrong_swap(engine: &mut Engine, _: u32, workload: &Workload) -> bool {
    let (config, batch) = (workload.config, engine.batch_mut());
    let inside = |slice: &&Slice| slice.sample && !slice.start.is_multiple_of(config.block_size);
    let Some(slice) = batch.slices.iter().find(inside) else { return false };
    let device_block = batch.slot_mapping[slice.tokens.start as usize] / config.block_size;
    let copy = |direction, host_block| BlockCopy { direction, device_block, host_block };
    batch.copies.extend([copy(ToHost, 0), copy(ToDevice, 0)]);
    // Not yet, so that the harmless copies of some steps are seen to be harmless.
    let plants = slice.start.is_multiple_of(3);
    if plants {
        batch.copies.push(copy(ToDevice, 1));
    }
    plants
}

/// What the host holds in its place is nothing yet.
fn missing_swap(engine: &mut Engine, _: u32, _: &Workload) -> bool {
    let copies = &mut engine.batch_mut().copies;
    let leaves = copies.iter().position(|copy| copy.direction == ToHost);
    leaves.map(|index| copies.remove(index)).is_some()
}

fn swapped_rows(engine: &mut Engine, _: u32, _: &Workload) -> bool {
    let slices = &mut engine.batch_mut().slices;
    let [first, second, ..] = slices.as_mut_slice() else { return false };
    std::mem::swap(&mut first.slot, &mut second.slot);
    true
}

fn missing_reset(engine: &mut Engine, _: u32, _: &Workload) -> bool {
    engine.batch_mut().resets.pop().is_some()
}

fn reset_of_another_slot(engine: &mut Engine, _: u32, workload: &Workload) -> bool {
    let Some(reset) = engine.batch_mut().resets.first_mut() else { return false };
    reset.slot.0 = (reset.slot.0 + 1) % workload.config.max_num_seqs;
    true
}

fn uncounted_token(engine: &mut Engine, _: u32, _: &Workload) -> bool {
    let batch = engine.batch_mut();
    let Some(reset) = batch.resets.first_mut() else { return false };
    // One that the prompt has only once.
    let tokens = &batch.known_tokens[reset.tokens.start as usize..reset.tokens.end as usize];
    let first_is_single = tokens.iter().filter(|token| **token == tokens[0]).count() == 1;
    reset.tokens.start += u32::from(first_is_single);
    reset.num_prompt_tokens -= u32::from(first_is_single);
    first_is_single
}

/// What a hash without its salt, parent or tail would do: a request finds a block that holds something else.
fn wrong_hash(engine: &mut Engine, step: u32, workload: &Workload) -> bool {
    let block_size = workload.config.block_size;
    let later = workload.requests.iter().find(|planned| planned.arrival == step + 1);
    let Some(later) = later.filter(|later| later.request.prompt.len() as u32 > block_size) else { return false };
    let cache = engine.cache_mut();
    let prompt = &later.request.prompt;
    let chain = cache.chain(prompt, later.request.cache_salt);
    let known = cache.find(&chain, prompt, u32::MAX);
    let mut table = BlockTable::default();
    let room = cache.grow(&mut table, block_size).is_ok();
    let plants = room && known.num_blocks == 0 && !known.next_is_promised;
    if plants {
        cache.publish(&mut table, &chain, prompt, block_size);
    }
    cache.free(table, &chain, u64::MAX);
    plants
}

struct Workload {
    config: EngineConfig,
    ns_per_copied_megabyte: f64,
    /// Whether the first step in flight beside whose run somebody is preempted brings nothing that is finite.
    breaks: bool,
    /// Whether the device is lost now and then: by this seed.
    loses: Option<u64>,
    requests: Vec<PlannedRequest>,
}

struct PlannedRequest {
    request: Request,
    /// Step before which it is handed in.
    arrival: u32,
    /// Step at which its client leaves, seen by the engine when it asks.
    leaves_at: Option<u32>,
    /// Events after which its client answers `Stop`, or `End`.
    max_events: usize,
}

impl Workload {
    fn random(seed: u64) -> Workload {
        let mut random = Random::new(seed);
        let config = random_config(&mut random);
        let prefixes: Vec<Vec<TokenId>> = (0..3).map(|_| random_tokens(&mut random, 80)).collect();
        let requests = (0..random.between(1, 12)).map(|_| {
            let leaves = random.one_in(6);
            PlannedRequest {
                request: random_request(&mut random, &config, &prefixes),
                arrival: random.between(0, 12),
                leaves_at: leaves.then(|| random.between(0, 60)),
                max_events: if random.one_in(8) { random.between(0, 5) as usize } else { usize::MAX },
            }
        });
        let requests = requests.collect();
        let ns_per_copied_megabyte = if random.one_in(3) { 1e12 } else { 1.0 };
        Workload { config, ns_per_copied_megabyte, breaks: random.one_in(2), loses: None, requests }
    }

    /// As `for_bugs`, with so little memory that sequences are swapped, and no prefix cache to find them in.
    fn for_swaps(seed: u64) -> Workload {
        let workload = Workload::for_bugs(seed);
        let num_blocks = 64 / workload.config.block_size + 2;
        let config =
            EngineConfig { num_blocks, num_host_blocks: 6 * num_blocks, prefix_cache: false, ..workload.config };
        Workload { config, ..workload }
    }

    /// Nobody leaves, prompts differ, each samples many tokens, and memory is not so short that a row is recomputed.
    fn for_bugs(seed: u64) -> Workload {
        let mut random = Random::new(seed);
        let block_size = [2, 4, 8][random.below(3) as usize];
        let config = EngineConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 24,
            max_model_len: 64,
            block_size,
            num_blocks: 6 * 64 / block_size,
            num_host_blocks: 2,
            max_logit_rows: 4,
            prefix_cache: true,
            ..EngineConfig::default()
        };
        let requests = (0..6).map(|_| {
            let num_tokens = random.between(10, 40) as usize;
            let frequency_penalty = if random.one_in(2) { 0.5 } else { 0.0 };
            let request = Request {
                prompt: random_tokens(&mut random, num_tokens),
                max_tokens: 12,
                sampling: SamplingParams { frequency_penalty, ..SamplingParams::default() },
                ..Request::default()
            };
            PlannedRequest { request, arrival: random.between(0, 12), leaves_at: None, max_events: usize::MAX }
        });
        let requests = requests.collect();
        Workload { config, ns_per_copied_megabyte: 1.0, breaks: false, loses: None, requests }
    }

    /// Runs it all, with a chance to change each planned step, and returns the first difference to running alone.
    fn run(&self, change: &mut dyn FnMut(&mut Engine, u32), seen: &mut Seen) -> Option<String> {
        let options = SimOptions {
            poisonous_token: Some(POISONOUS),
            ns_per_copied_megabyte: self.ns_per_copied_megabyte,
            ..SimOptions::default()
        };
        let broken = Arc::new(AtomicBool::new(false));
        let mut engine = engine_on(Breakable { sim: SimBackend::new(options), broken: broken.clone() }, self.config);
        let mut may_break = self.breaks;
        let mut chance = self.loses.map(Random::new);
        let mut loses = || chance.as_mut().is_some_and(|chance| chance.one_in(24));
        engine.enable_swap().expect("the simulator is never lost");
        engine.set_cost(CostModel::line(3e6, 2e5, Prices::default()));
        let mut clients: Vec<Option<Client>> = self.requests.iter().map(|_| None).collect();
        for step in 0.. {
            assert!(step < 20_000, "no end");
            for (planned, client) in self.requests.iter().zip(&mut clients) {
                if planned.arrival == step {
                    let new = Client::new(planned.max_events);
                    engine.add(planned.request.clone(), Box::new(new.clone()));
                    *client = Some(new);
                }
                if let (Some(client), Some(true)) = (&client, planned.leaves_at.map(|leaves_at| leaves_at <= step)) {
                    client.left.store(true, Ordering::Relaxed);
                }
            }
            let had_work = !engine.is_idle();
            let mut is_lost = loses();
            while engine.has_room() && !is_lost {
                let num_preemptions = engine.stats().num_preemptions;
                let planned = engine.plan();
                if may_break && engine.num_in_flight() > 0 && engine.stats().num_preemptions > num_preemptions {
                    may_break = false;
                    broken.store(true, Ordering::Relaxed);
                }
                engine.check();
                if !planned {
                    break;
                }
                let num_tokens = engine.batch_mut().num_tokens();
                assert!(num_tokens <= self.config.max_num_batched_tokens);
                assert!(engine.batch_mut().num_logit_rows() <= self.config.max_logit_rows);
                change(&mut engine, step);
                is_lost = loses();
                if is_lost {
                    break;
                }
                engine.submit().expect("the simulator is never lost");
            }
            if is_lost || loses() {
                broken.store(false, Ordering::Relaxed);
                lose(&mut engine, seen);
                continue;
            }
            assert!(engine.num_in_flight() > 0 || engine.is_idle(), "there is work, and nothing runs");
            if engine.num_in_flight() > 0 {
                let breaks = broken.load(Ordering::Relaxed);
                let has_failed = |client: &Option<Client>| client.as_ref().is_some_and(Client::failed);
                let failed: Vec<bool> = clients.iter().map(has_failed).collect();
                engine.complete().expect("the simulator is never lost");
                engine.check();
                if breaks {
                    let news = clients.iter().zip(&failed).map(|(client, failed)| client.as_ref().filter(|_| !failed));
                    seen.breaks += self.check_withdrawn(&mut engine, news);
                }
            }
            if !had_work && clients.iter().all(Option::is_some) {
                break;
            }
        }
        let stats = engine.stats();
        seen.preemptions += stats.num_preemptions;
        seen.swaps += stats.num_swaps;
        seen.cached_tokens += stats.cached_tokens;
        seen.aborts += stats.num_aborted;
        seen.failures += stats.num_failed;
        let has_ended = |client: &&Client| client.has_ended(&client.events());
        seen.ends += clients.iter().flatten().filter(has_ended).count() as u64;
        let pairs = self.requests.iter().zip(clients.iter().flatten());
        pairs.enumerate().find_map(|(index, (planned, client))| {
            let alone = alone(&planned.request);
            // One that fails alone too may have broken before it came to that.
            let broke = self.breaks && client.failed() && client.events().len() < alone.len() || client.is_lost();
            let difference = client.difference(&alone, broke)?;
            Some(format!("request {index}: {difference}"))
        })
    }
}

/// Loses the device of an engine and makes it anew.
fn lose(engine: &mut Engine, seen: &mut Seen) {
    let before = engine.stats().clone();
    engine.lose_device("unplugged");
    engine.check();
    let after = engine.stats().clone();
    assert_eq!(after.blocks.free, after.blocks.total, "blocks of what is gone");
    assert_eq!((after.num_running, after.num_swapped_blocks, engine.num_in_flight()), (0, 0, 0));
    engine.recover().expect("the simulator can be opened again");
    engine.check();
    seen.losses += 1;
    seen.lost += after.num_failed - before.num_failed;
    seen.kept += u64::from(after.num_waiting);
    seen.kept_swapped += u64::from(before.num_swapped_blocks > 0 && after.num_preempted > 0);
}

impl Workload {
    /// Of requests that have just failed nothing can be found, whether they ran or had been sent back to wait. How many
    /// those are; `clients` are those that had not failed before.
    fn check_withdrawn<'a>(&self, engine: &mut Engine, clients: impl Iterator<Item = Option<&'a Client>>) -> u64 {
        let mut num_failed = 0;
        for (planned, client) in self.requests.iter().zip(clients) {
            let Some(client) = client.filter(|client| client.failed()) else { continue };
            num_failed += 1;
            let generated = client.events();
            let generated = generated.iter().filter_map(|event| match event {
                Event::Token { id, .. } => Some(*id),
                _ => None,
            });
            let tokens: Vec<TokenId> = planned.request.prompt.iter().copied().chain(generated).collect();
            let cache = engine.cache_mut();
            let chain = cache.chain(&tokens, planned.request.cache_salt);
            assert_eq!(cache.find(&chain, &tokens, u32::MAX).num_blocks, 0, "blocks of a failed request are shared");
        }
        num_failed
    }
}

/// The simulator, of which one step may bring rows that are not finite while what is in memory is sound.
struct Breakable {
    sim: SimBackend,
    /// The step that is waited for next.
    broken: Arc<AtomicBool>,
}

impl Around for Breakable {
    fn inner(&self) -> &dyn Backend {
        &self.sim
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut self.sim
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let ran = self.sim.wait(ticket, out)?;
        // A pass whose choices come in a recording of their own brings nothing.
        if !out.is_empty() && self.broken.swap(false, Ordering::Relaxed) {
            out.fill(0xff);
        }
        Ok(ran)
    }
}

fn random_config(random: &mut Random) -> EngineConfig {
    let max_num_seqs = random.between(1, 8);
    let block_size = [1, 2, 3, 4, 8, 16, 32][random.below(7) as usize];
    let max_model_len = random.between(16, 160);
    let least_blocks = max_model_len.div_ceil(block_size);
    EngineConfig {
        max_num_seqs,
        max_num_batched_tokens: max_num_seqs + random.between(0, 60),
        max_model_len,
        kv_type: KvType::ALL[random.below(3) as usize],
        block_size,
        num_blocks: least_blocks + random.below(least_blocks),
        num_host_blocks: random.below(least_blocks),
        max_queued_requests: 64,
        max_queued_tokens: 1 << 14,
        max_queue_ms: None,
        max_logit_rows: max_num_seqs + random.between(0, 8),
        pipeline_depth: random.between(1, 2),
        latency: match random.below(3) {
            0 => LatencyTarget::None,
            1 => LatencyTarget::Milliseconds(random.between(1, 40)),
            _ => LatencyTarget::Stretch(random.between(100, 400)),
        },
        prefix_cache: !random.one_in(4),
        max_grammar_bytes: 1 << random.between(12, 28),
    }
}

fn random_request(random: &mut Random, config: &EngineConfig, prefixes: &[Vec<TokenId>]) -> Request {
    let prompt_len = match random.one_in(10) {
        true => config.max_model_len,
        false => random.between(1, config.max_model_len),
    };
    let max_tokens = random.between(0, (config.max_model_len - prompt_len).min(30));
    let shared = &prefixes[random.below(3) as usize][..random.below(81) as usize];
    let own = random_tokens(random, 160);
    let mut prompt: Vec<TokenId> = shared.iter().copied().chain(own).take(prompt_len as usize).collect();
    if random.one_in(24) {
        let index = random.below(prompt_len) as usize;
        prompt[index] = TokenId(POISONOUS);
    }
    let stop_ids = if random.one_in(3) { (8..8 + random.between(1, 100)).map(TokenId).collect() } else { Vec::new() };
    Request {
        id: String::new(),
        prompt,
        generated: Vec::new(),
        max_tokens,
        stop_ids,
        sampling: SamplingParams {
            temperature: if random.one_in(4) { 0.8 } else { 0.0 },
            top_k: random.below(50),
            seed: u64::from(random.below(4)),
            presence_penalty: if random.one_in(5) { 0.5 } else { 0.0 },
            repetition_penalty: if random.one_in(5) { 1.25 } else { 1.0 },
            logit_bias: random_bias(random),
            allowed_tokens: random.one_in(8).then(|| token_mask(random_tokens(random, 40), VOCAB_SIZE)),
            ..SamplingParams::default()
        },
        grammar: None,
        pooling: None,
        logprobs: random.one_in(8).then(|| random.below(4)),
        prompt_logprobs: (max_tokens == 0 || random.one_in(8)).then(|| random.below(3)),
        cache_salt: u64::from(random.below(2)),
        salt_name: None,
        tenant: u64::from(random.below(3)),
        share: Share {
            weight: random.between(1, 3),
            max_num_seqs: if random.one_in(4) { random.between(1, 3) } else { u32::MAX },
        },
        priority: random.below(3) as i32 - 1,
    }
}

fn random_bias(random: &mut Random) -> Vec<(TokenId, f32)> {
    let num_tokens = if random.one_in(6) { random.between(1, 5) as usize } else { 0 };
    let mut tokens = random_tokens(random, num_tokens);
    tokens.sort_unstable();
    tokens.dedup();
    tokens.into_iter().map(|token| (token, random.unit())).collect()
}

/// Never the poisonous one.
fn random_tokens(random: &mut Random, num_tokens: usize) -> Vec<TokenId> {
    (0..num_tokens).map(|_| TokenId(8 + random.below(VOCAB_SIZE - 8))).collect()
}

fn engine(config: EngineConfig) -> Engine {
    let options = SimOptions { poisonous_token: Some(POISONOUS), ..SimOptions::default() };
    engine_on(SimBackend::new(options), config)
}

pub fn engine_on(backend: impl Backend + 'static, config: EngineConfig) -> Engine {
    config.check().expect("the workload is valid");
    let mut backend = Box::new(backend);
    let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
    let model_config = ModelConfig { windows: vec![None, Some(24)], ..ModelConfig::tiny(VOCAB_SIZE, 2) };
    let limits = config.state_limits();
    let model = Model::load(model_config, limits, &checkpoint, backend.as_mut(), &mut |_| {});
    let mut engine = Engine::new(config, model.expect("the simulator has memory"), backend, (1, 2));
    engine.set_checkpoint(checkpoint);
    engine
}

/// All events of a request that has an engine for itself, with room to spare and one chunk for its prompt.
fn alone(request: &Request) -> Vec<Event> {
    let config = EngineConfig {
        max_num_seqs: 1,
        max_num_batched_tokens: 256,
        max_model_len: 256,
        kv_type: KvType::F16,
        block_size: 16,
        num_blocks: 16,
        num_host_blocks: 0,
        max_queued_requests: 1,
        max_queued_tokens: 256,
        max_queue_ms: None,
        max_logit_rows: 256,
        pipeline_depth: 1,
        latency: LatencyTarget::None,
        max_grammar_bytes: 1,
        prefix_cache: false,
    };
    let mut engine = engine(config);
    let client = Client::new(usize::MAX);
    engine.add(request.clone(), Box::new(client.clone()));
    while engine.step().expect("the simulator is never lost") {}
    client.events()
}

/// A client that notes what it is told and may leave.
#[derive(Clone)]
struct Client {
    events: Arc<Mutex<Vec<Event>>>,
    left: Arc<AtomicBool>,
    max_events: usize,
}

impl Client {
    fn new(max_events: usize) -> Client {
        Client { events: Arc::default(), left: Arc::default(), max_events }
    }

    fn events(&self) -> Vec<Event> {
        self.events.lock().expect("no client panics").clone()
    }

    fn failed(&self) -> bool {
        has_failed(&self.events())
    }

    /// Whether it has heard that it had all that it wanted.
    fn has_ended(&self, events: &[Event]) -> bool {
        let Some([.., Event::Token { .. }, Event::Finished { reason: FinishReason::Stop, usage }]) =
            (events.len() == self.max_events.saturating_add(2)).then_some(events)
        else {
            return false;
        };
        let num_tokens = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
        usage.completion_tokens == num_tokens as u32
    }

    fn is_lost(&self) -> bool {
        self.events().last().is_some_and(is_loss)
    }

    /// What differs from `expected`; a client that left early has a beginning of it, and so has one that `broke`, with
    /// an end of its own.
    fn difference(&self, expected: &[Event], broke: bool) -> Option<String> {
        let mut events = self.events();
        if broke || self.has_ended(&events) {
            events.pop();
        }
        let left = broke || self.left.load(Ordering::Relaxed) || events.len() > self.max_events;
        if events.len() < expected.len() && !left {
            return Some(format!("{} events of {}", events.len(), expected.len()));
        }
        let pairs = events.iter().zip(expected);
        let differs = |(event, expected): &(&Event, &Event)| without_cached(event) != without_cached(expected);
        let (event, expected) = pairs.into_iter().find(differs)?;
        Some(format!("{event:.200?}, and alone {expected:.200?}"))
    }
}

fn is_loss(event: &Event) -> bool {
    matches!(event, Event::Finished { reason: FinishReason::DeviceLost(_), .. })
}

fn has_failed(events: &[Event]) -> bool {
    matches!(events.last(), Some(Event::Finished { reason: FinishReason::Error(_), .. }))
}

/// How much a cache helped is the one thing that company may change.
fn without_cached(event: &Event) -> Event {
    let mut event = event.clone();
    match &mut event {
        Event::Started { cached_tokens } => *cached_tokens = 0,
        Event::Finished { usage, .. } => usage.cached_tokens = 0,
        _ => {}
    }
    event
}

impl Sink for Client {
    fn event(&mut self, event: Event) -> Flow {
        let mut events = self.events.lock().expect("no client panics");
        let ended = matches!(events.last(), Some(Event::Finished { .. }));
        let starts = matches!(event, Event::Started { .. });
        // Unless the device is lost before its first step has been handed over.
        let is_lost = is_loss(&event);
        assert!(starts == events.is_empty() || is_lost, "it starts once, before all else");
        assert!(!ended, "an event after the last");
        let is_token = matches!(event, Event::Token { .. });
        let num_before = events.len();
        events.push(event);
        if num_before > self.max_events {
            assert!(self.has_ended(&events), "{:?} after Stop or End", events.last());
        }
        match events.len() > self.max_events {
            // Some that have enough stay to hear so.
            true if is_token && self.max_events % 2 == 1 => Flow::End,
            true => Flow::Stop,
            false => Flow::Continue,
        }
    }

    fn is_closed(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }
}

#[test]
fn a_poisoned_request_fails_alone_and_says_so() {
    let request = Request { prompt: vec![TokenId(8), TokenId(POISONOUS)], max_tokens: 4, ..Request::default() };
    let events = alone(&request);
    let [Event::Started { .. }, Event::Finished { reason: FinishReason::Error(sentence), .. }] = events.as_slice()
    else {
        panic!("{events:?}")
    };
    assert!(sentence.contains("not finite"), "{sentence}");
}

/// A step may have been handed in before it was known that the one before it had sampled nothing.
#[test]
fn what_a_broken_row_sampled_breaks_the_row_that_reads_it() {
    let mut device = Device::new(Box::new(SimBackend::new(SimOptions::default())));
    let sampled = device.u32(2, 1, &[NON_FINITE, 9]);
    let ids = device.u32(2, 1, &[SAMPLED_BY_SLOT, SAMPLED_BY_SLOT | 1]);
    let table = device.weight(WeightFormat::F32, 64, 8, 1);
    let rows = [0, 1].map(|slot| SampleRow { slot, ..SampleRow::IDLE });
    let op = device.sampling(&[0.0; 2 * 64], 64, &rows, &[]);
    let hidden = device.unwritten(2, 8);
    let ops = [
        Op::Embed(Embed { ids, sampled, table, scale: 1.0, out: hidden }),
        Op::MatMul(MatMul { x: hidden, weight: table, bias: None, first_col: 0, out: op.logits }),
        Op::Sample(op),
    ];
    let words = device.run(&ops, &[op.sampled]);
    assert!(words[0] == NON_FINITE && words[1] < 64, "{words:?}");
}

/// Curved over rows, with every price its own order of magnitude, so that none can stand for another.
fn costly() -> CostModel {
    let prices = Prices {
        ns_for_logits: 70_000_000.0,
        ns_per_logit_row: 1_000_000.0,
        ns_per_attended_token: 1000.0,
        ns_per_loaded_token: 1.0,
    };
    CostModel::new(std::array::from_fn(|k| 1e9 * (k * k + 1) as f64), prices)
}

/// The cost fidelity takes the same steps as the exact one, and its clock is the sum of what its profile predicts.
#[test]
fn the_clock_of_the_cost_fidelity_is_the_sum_of_its_steps() {
    let config =
        EngineConfig { max_num_seqs: 2, max_logit_rows: 2, max_num_batched_tokens: 8, ..EngineConfig::default() };
    let run = |fidelity| {
        let backend = SimBackend::new(SimOptions { fidelity, cost: costly(), ..SimOptions::default() });
        let clock = backend.clock();
        let mut engine = engine_on(backend, config);
        for first in [10, 60] {
            let prompt = (first..first + 11).map(TokenId).collect();
            let request = Request { prompt, max_tokens: 5, ..Request::default() };
            engine.add(request, Box::new(Client::new(usize::MAX)));
        }
        let mut steps = Vec::new();
        while engine.step().expect("the simulator is never lost") {
            steps.push((engine.trace().to_string(), engine.last_step().shape));
        }
        (steps, clock.now())
    };
    let (steps, elapsed) = run(Fidelity::Cost);
    assert_eq!((steps.clone(), elapsed), run(Fidelity::Exact));
    // a[0..8]; a[8..11] and b[0..5]; a's 12th and b[5..11]; both decode; a has ended and b decodes.
    let num_rows: Vec<u32> = steps.iter().map(|(_, shape)| shape.num_tokens).collect();
    assert_eq!(num_rows, [8, 8, 7, 2, 2, 2, 1]);
    // 2^k rows take k^2 + 1 seconds; 7 lie between 4 and 8.
    let rows_ns = [10, 10, 5, 2, 2, 2, 1].iter().sum::<u64>() * 1_000_000_000 + 3_750_000_000;
    // Each samples 5 tokens, in 6 steps together; each row sees itself and all before it: 1, 2, .. 15 positions.
    let (num_sampling_steps, num_sampled, attended) = (6, 2 * 5, 2 * (15 * 16 / 2));
    // Chunks of up to 8 rows read as far as their last row sees: a 8 and 11, b 5 and 11; then 12, .. 15 for both.
    let loaded = 8 + 11 + 5 + 11 + 2 * (12 + 13 + 14 + 15);
    let wanted = rows_ns + num_sampling_steps * 70_000_000 + num_sampled * 1_000_000 + attended * 1000 + loaded;
    assert_eq!(elapsed, Duration::from_nanos(wanted));
    let predicted: u64 = steps.iter().map(|(_, shape)| costly().predict_ns(shape)).sum();
    assert_eq!(predicted, wanted);
}

/// What the host takes is on the clock too, and a step begins when both have come to it.
#[test]
fn the_device_works_its_queue_off_in_order() {
    let mut backend =
        SimBackend::new(SimOptions { cost: CostModel::line(10e9, 0.0, Prices::default()), ..SimOptions::default() });
    let clock = backend.clock();
    let upload = backend.alloc("upload", 4).expect("the simulator has memory");
    let hidden = backend.alloc("hidden", 64).expect("the simulator has memory");
    let spec = WeightSpec { name: "embed".to_owned(), rows: 4, cols: 16, format: WeightFormat::F32 };
    let table = backend.load_weight(&spec, &mut NoRows).expect("the simulator reads no rows");
    let mut recording = Recording::new(upload);
    let ids = recording.upload(&[1], 1);
    let out = Tensor::f32(hidden, 1, 16);
    recording.push(Op::Embed(Embed { ids, sampled: ids, table, scale: 1.0, out }));
    let seconds = |clock: &SimClock| clock.now().as_secs_f64();
    let submit = |backend: &mut SimBackend| backend.submit(&recording).expect("the simulator is never lost");
    let wait = |backend: &mut SimBackend, ticket: Ticket| {
        backend.wait(ticket, &mut Vec::new()).expect("the simulator is never lost");
    };
    let first = submit(&mut backend);
    clock.advance(Duration::from_secs(3));
    let second = submit(&mut backend);
    assert_eq!(seconds(&clock), 3.0);
    wait(&mut backend, first);
    assert_eq!(seconds(&clock), 10.0);
    clock.advance(Duration::from_secs(2));
    let third = submit(&mut backend);
    wait(&mut backend, second);
    // The second was queued behind the first: the host's time is hidden.
    assert_eq!(seconds(&clock), 20.0);
    wait(&mut backend, third);
    assert_eq!(seconds(&clock), 30.0);
    // An idle device begins when it is asked to, and the clock does not go back.
    clock.advance_to(Duration::from_secs(50));
    clock.advance_to(Duration::from_secs(40));
    let fourth = submit(&mut backend);
    wait(&mut backend, fourth);
    assert_eq!(seconds(&clock), 60.0);
}

struct NoRows;

impl RowSource for NoRows {
    fn read_rows(&mut self, _: &mut [u8]) -> std::io::Result<()> {
        panic!("the simulator reads no rows")
    }
}

/// In the queue, in its prompt and in its answer.
#[test]
fn who_leaves_has_freed_its_blocks_by_the_end_of_the_step() {
    for pipeline_depth in [1, 2] {
        let config = EngineConfig {
            max_num_seqs: 2,
            max_num_batched_tokens: 16,
            max_model_len: 512,
            block_size: 16,
            num_blocks: 64,
            pipeline_depth,
            ..EngineConfig::default()
        };
        let mut engine = engine_on(SimBackend::new(SimOptions::default()), config);
        let add = |engine: &mut Engine, first: u32, num_prompt_tokens: u32| {
            let client = Client::new(usize::MAX);
            let prompt = (0..num_prompt_tokens).map(|i| TokenId(8 + (97 * first + i) % (VOCAB_SIZE - 8))).collect();
            engine.add(Request { prompt, max_tokens: 200, ..Request::default() }, Box::new(client.clone()));
            client
        };
        let step = |engine: &mut Engine| {
            engine.step().expect("the simulator is never lost");
            engine.check();
            (engine.stats().num_running, engine.stats().num_waiting, engine.stats().blocks.referenced)
        };
        let num_tokens = |client: &Client| {
            client.events().iter().filter(|event| matches!(event, Event::Token { .. })).count() as u32
        };
        let answering = add(&mut engine, 1, 20);
        while num_tokens(&answering) < 5 {
            step(&mut engine);
        }
        let (prefilling, queued) = (add(&mut engine, 7, 300), add(&mut engine, 11, 40));
        step(&mut engine);
        step(&mut engine);
        let (running, waiting, held) = step(&mut engine);
        assert_eq!((running, waiting, num_tokens(&prefilling)), (2, 1, 0));
        let of_answer = |answering: &Client| (20 + num_tokens(answering) + pipeline_depth).div_ceil(16);
        assert!(held > of_answer(&answering), "{held} blocks");

        queued.left.store(true, Ordering::Relaxed);
        let (running, waiting, _) = step(&mut engine);
        assert_eq!((running, waiting), (2, 0));
        prefilling.left.store(true, Ordering::Relaxed);
        let (running, _, held) = step(&mut engine);
        assert_eq!(running, 1);
        assert!((1..=of_answer(&answering)).contains(&held), "{held} blocks of {} tokens", num_tokens(&answering));
        answering.left.store(true, Ordering::Relaxed);
        assert_eq!(step(&mut engine), (0, 0, 0));
        let blocks = engine.stats().blocks;
        assert_eq!((blocks.free + blocks.cached, engine.stats().num_aborted), (blocks.total, 3));
    }
}
