//! KV blocks that go from one engine's prefix cache to another's: they keep their bits on every backend, nothing that
//! came is computed again, nobody waits for an engine that is lost or stuck for longer than was said, and blocks are
//! held while they are read. Needs Vulkan drivers: fails without one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fullbore_engine::backend::Backend;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::backend::wgpu::{WgpuBackend, WgpuOptions};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::engine::Engine;
use fullbore_engine::engine::moves::{Export, Import, Passed, block_move, relayed_move};
use fullbore_engine::fleet::{Fleet, Seat};
use fullbore_engine::memory::kv_events::{KvEvent, KvEventSender, Lineage, StoredBlock};
use fullbore_engine::memory::{BlockChain, BlockEvent, KvCache};
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Event, Flow, Request, Sink, TokenId};
use fullbore_engine::tensor::{KvType, WeightFormat};

use crate::ops::device_ids;
use crate::pipeline::{Answer, Client};

/// Six blocks, and four tokens more.
const PROMPT_LEN: u32 = 100;
const NUM_BLOCKS: u32 = 6;
/// Longer than any of this takes.
const LONG: Duration = Duration::from_secs(600);

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new(CpuOptions { num_threads: 1, ..CpuOptions::default() }).expect("threads can be started"))
}

fn gpu(id: &str) -> Box<dyn Backend> {
    let options = WgpuOptions { selector: id.to_owned(), checked: true, ..WgpuOptions::default() };
    Box::new(WgpuBackend::open(&options).expect("a listed device opens"))
}

fn sim() -> Box<dyn Backend> {
    Box::new(SimBackend::new(SimOptions { sleeps: true, ..SimOptions::default() }))
}

const CONFIG: EngineConfig = EngineConfig {
    max_num_seqs: 2,
    max_num_batched_tokens: 32,
    max_model_len: 160,
    kv_type: KvType::F16,
    block_size: 16,
    num_blocks: 12,
    num_host_blocks: 0,
    max_queued_requests: 8,
    max_queued_tokens: 4096,
    max_queue_ms: None,
    max_logit_rows: 2,
    pipeline_depth: 2,
    latency: fullbore_engine::config::LatencyTarget::None,
    max_grammar_bytes: 256 << 20,
    prefix_cache: true,
};

fn engine_on(mut backend: Box<dyn Backend>, config: EngineConfig) -> Engine {
    config.check().expect("a valid config");
    let checkpoint = Checkpoint::Random { seed: 3, format: WeightFormat::Q8_0 };
    let shape = ModelConfig { num_heads: 4, num_kv_heads: 2, ..ModelConfig::tiny(256, 2) };
    let model = Model::load(shape, config.state_limits(), &checkpoint, backend.as_mut(), &mut |_| {});
    let mut engine = Engine::new(config, model.expect("a small model"), backend, (1, 2));
    // Two blocks at a time.
    let block_bytes = 4 * engine.model().kv_layout().block_words();
    engine.enable_moves(2 * block_bytes).expect("the device is there");
    assert!(engine.move_prices().is_some());
    engine
}

fn request() -> Request {
    let prompt = (0..PROMPT_LEN).map(|i| TokenId(3 + i * 5 % 200)).collect();
    Request { prompt, max_tokens: 12, logprobs: Some(0), ..Request::default() }
}

fn ask(engine: &mut Engine, request: Request) -> Arc<Mutex<Answer>> {
    let answer = Arc::default();
    engine.add(request, Box::new(Client(Arc::clone(&answer))));
    answer
}

fn told(answer: &Mutex<Answer>) -> Answer {
    answer.lock().expect("nobody panics").clone()
}

/// Steps all, one after the other, until none has anything to do.
fn run(engines: &mut [&mut Engine]) {
    while engines.iter().any(|engine| !engine.is_idle()) {
        for engine in &mut *engines {
            engine.step().expect("the device is there");
            engine.check();
        }
    }
}

/// The answer on an engine to which nothing came.
fn alone(backend: Box<dyn Backend>, config: EngineConfig) -> Answer {
    let mut engine = engine_on(backend, config);
    let answer = ask(&mut engine, request());
    run(&mut [&mut engine]);
    assert_eq!(engine.stats().prefill_tokens, u64::from(PROMPT_LEN));
    told(&answer)
}

fn chain(engine: &Engine) -> BlockChain {
    let hasher = engine.hasher().expect("a prefix cache");
    let mut chain = hasher.chain(0);
    hasher.extend(&mut chain, &request().prompt);
    chain
}

/// All blocks of the prompt.
fn ends(engine: &Engine, within: Duration) -> (Export, Import) {
    block_move(Arc::new(request()), &chain(engine), 0..NUM_BLOCKS, within)
}

/// What becomes of an engine that is asked for blocks.
type Fate<'a> = &'a dyn Fn(&mut Engine, Export);

/// Once by way of `middle`, which computes nothing.
fn carry(name: &str, config: EngineConfig, open: &dyn Fn() -> Box<dyn Backend>, middle: Box<dyn Backend>) {
    let mut first = engine_on(open(), config);
    let expected = ask(&mut first, request());
    run(&mut [&mut first]);
    let (mut middle, mut last) = (engine_on(middle, config), engine_on(open(), config));
    for (from, to) in [(0, 1), (1, 2)] {
        let mut engines = [&mut first, &mut middle, &mut last];
        let (export, import) = ends(engines[from], LONG);
        engines[to].import(import);
        engines[from].export(export);
        run(&mut engines);
    }
    let answer = ask(&mut last, request());
    run(&mut [&mut last]);
    let kv_type = config.kv_type.name();
    assert_eq!(told(&answer), told(&expected), "{name}, {kv_type}");
    assert_eq!((middle.stats().num_fetched_blocks, middle.stats().num_steps), (6, 0), "{name}");
    let stats = last.stats();
    assert_eq!((stats.num_fetched_blocks, stats.cached_tokens, stats.prefill_tokens), (6, 96, 4), "{name}");
}

#[test]
fn what_comes_from_another_device_is_what_was_computed() {
    for kv_type in KvType::ALL {
        carry("cpu", EngineConfig { kv_type, ..CONFIG }, &cpu, cpu());
        carry("sim", EngineConfig { kv_type, ..CONFIG }, &sim, sim());
    }
    carry("cuda on the host and the cpu", CONFIG, &cpu, crate::cuda::on_host(false));
    for (id, kv_type) in device_ids().iter().zip([KvType::F16, KvType::Q4_0].into_iter().cycle()) {
        let config = EngineConfig { kv_type, ..CONFIG };
        carry(&format!("cpu by way of {id}"), config, &cpu, gpu(id));
        carry(&format!("{id} by way of the cpu"), config, &|| gpu(id), cpu());
    }
}

#[test]
fn who_begins_with_blocks_that_come_waits_and_others_do_not() {
    let expected = alone(cpu(), CONFIG);
    let (mut from, mut to) = (engine_on(cpu(), CONFIG), engine_on(cpu(), CONFIG));
    ask(&mut from, request());
    run(&mut [&mut from]);
    let (export, import) = ends(&from, LONG);
    to.import(import);
    let answer = ask(&mut to, request());
    assert!(!to.step().expect("the device is there"), "it does not wait");
    let other = ask(&mut to, Request { prompt: vec![TokenId(9); 20], ..request() });
    while told(&other).reason.is_none() {
        assert!(to.step().expect("the device is there"));
    }
    assert!(told(&answer).tokens.is_empty());
    // What is to leave is held although nobody runs there.
    from.export(export);
    from.check();
    assert_eq!(from.cache_mut().counts().referenced, NUM_BLOCKS);
    run(&mut [&mut from, &mut to]);
    assert_eq!(told(&answer), expected);
    assert_eq!((to.stats().num_fetched_blocks, to.stats().prefill_tokens), (6, 24));
}

#[test]
fn blocks_go_while_both_engines_have_other_work() {
    let expected = alone(cpu(), CONFIG);
    let (mut from, mut to) = (engine_on(cpu(), CONFIG), engine_on(cpu(), CONFIG));
    ask(&mut from, request());
    run(&mut [&mut from]);
    let other = || Request { prompt: vec![TokenId(9); 20], max_tokens: 40, ..request() };
    let others = [ask(&mut from, other()), ask(&mut to, other())];
    for engine in [&mut from, &mut to] {
        (0..4).for_each(|_| assert!(engine.step().expect("the device is there")));
    }
    let (export, import) = ends(&from, LONG);
    to.import(import);
    let answer = ask(&mut to, request());
    from.export(export);
    run(&mut [&mut from, &mut to]);
    assert_eq!(told(&answer), expected);
    assert_eq!(told(&others[0]), told(&others[1]));
    assert_eq!((to.stats().num_fetched_blocks, to.stats().prefill_tokens), (6, 24));
}

#[test]
fn what_does_not_come_is_computed() {
    let expected = alone(cpu(), CONFIG);
    let short = Request { prompt: request().prompt[..60].to_vec(), ..request() };
    let lose_between = |from: &mut Engine, export: Export| {
        from.export(export);
        assert!(from.step().expect("the device is there"));
        from.lose_device("it is gone");
    };
    // What becomes of the engine that has three of the six blocks, and how many of them come.
    let cases: [(&str, Fate, u64); 4] = [
        ("it has no more", &|from, export| from.export(export), 3),
        ("it is lost", &lose_between, 2),
        ("it has ended", &|_, export| drop(export), 0),
        ("it is stuck", &|_, export| std::mem::forget(export), 0),
    ];
    for (name, fate, num_blocks) in cases {
        let (mut from, mut to) = (engine_on(cpu(), CONFIG), engine_on(cpu(), CONFIG));
        ask(&mut from, short.clone());
        run(&mut [&mut from]);
        let (export, import) = ends(&from, if name == "it is stuck" { Duration::from_millis(20) } else { LONG });
        to.import(import);
        let answer = ask(&mut to, request());
        fate(&mut from, export);
        run(&mut [&mut from, &mut to]);
        assert_eq!(told(&answer), expected, "{name}");
        let stats = to.stats();
        assert_eq!((stats.num_fetched_blocks, stats.prefill_tokens), (num_blocks, 100 - 16 * num_blocks), "{name}");
        assert_eq!(stats.num_missed_blocks, 6 - num_blocks, "{name}");
    }
}

/// What is too much at a time is counted, and what comes is not.
#[test]
fn what_is_refused_of_many_moves_is_counted() {
    let mut engine = engine_on(cpu(), EngineConfig { num_blocks: 40, ..CONFIG });
    let ends_of = |first: u32| {
        let request = Request { prompt: (0..PROMPT_LEN).map(|i| TokenId((first + i) % 256)).collect(), ..request() };
        let hasher = engine.hasher().expect("a prefix cache");
        let mut chain = hasher.chain(0);
        hasher.extend(&mut chain, &request.prompt);
        block_move(Arc::new(request), &chain, 0..NUM_BLOCKS, LONG)
    };
    let (exports, imports): (Vec<Export>, Vec<Import>) = (0..6).map(ends_of).unzip();
    for (nth, import) in (1..).zip(imports) {
        engine.import(import);
        assert_eq!(engine.stats().num_missed_blocks, u64::from(NUM_BLOCKS * u32::saturating_sub(nth, 4)));
    }
    drop(exports);
    run(&mut [&mut engine]);
    assert_eq!(engine.stats().num_missed_blocks, 36, "nor has any of the others come");
    engine.lose_device("it is gone");
    let (_export, import) = ends(&engine, LONG);
    engine.import(import);
    assert_eq!(engine.stats().num_missed_blocks, 42);
}

/// Nobody takes what it would hand over, and later it holds nothing any more.
#[test]
fn an_engine_holds_blocks_no_longer_than_the_move_may_take() {
    let (mut from, to) = (engine_on(cpu(), CONFIG), engine_on(cpu(), CONFIG));
    ask(&mut from, request());
    run(&mut [&mut from]);
    let (export, _import) = ends(&to, Duration::from_millis(20));
    let (second, _second) = ends(&to, LONG);
    let (third, gone) = ends(&to, LONG);
    from.export(export);
    from.export(third);
    drop(gone);
    run(&mut [&mut from]);
    assert_eq!(from.cache_mut().counts().referenced, 0);
    from.export(second);
    from.fail_all("it ends");
    assert_eq!(from.cache_mut().counts().referenced, 0);
}

#[test]
fn blocks_of_another_layout_or_without_room_are_refused() {
    for (name, config, num_blocks) in [
        ("another layout", EngineConfig { kv_type: KvType::Q8_0, ..CONFIG }, 0),
        ("no room", EngineConfig { num_blocks: 10, ..CONFIG }, 4),
    ] {
        let expected = alone(cpu(), config);
        let (mut from, mut to) = (engine_on(cpu(), CONFIG), engine_on(cpu(), config));
        ask(&mut from, request());
        run(&mut [&mut from]);
        // Until it has run, it leaves room for less than six blocks.
        let other = (name == "no room").then(|| {
            let other = ask(&mut to, Request { prompt: vec![TokenId(9); 79], max_tokens: 30, ..request() });
            (0..5).for_each(|_| assert!(to.step().expect("the device is there")));
            other
        });
        let (export, import) = ends(&from, LONG);
        to.import(import);
        let answer = ask(&mut to, request());
        from.export(export);
        run(&mut [&mut from, &mut to]);
        assert_eq!(told(&answer), expected, "{name}");
        assert!(other.is_none_or(|other| told(&other).tokens.len() == 30));
        assert_eq!(to.stats().num_fetched_blocks, num_blocks, "{name}");
    }
}

/// Two blocks at a time: what was handed over is not there before it is passed on, and all of it comes.
#[test]
fn what_is_relayed_comes_when_it_is_passed_on() {
    let expected = alone(sim(), CONFIG);
    let (mut from, mut to) = (engine_on(sim(), CONFIG), engine_on(sim(), CONFIG));
    ask(&mut from, request());
    run(&mut [&mut from]);
    let relayed = |engine: &Engine| relayed_move(Arc::new(request()), &chain(engine), 0..NUM_BLOCKS, LONG);
    let (export, mut relay, import) = relayed(&from);
    to.import(import);
    let answer = ask(&mut to, request());
    from.export(export);
    assert!(from.step().expect("the device is there"));
    assert_eq!(relay.pass(false), Passed::Nothing);
    assert!(!to.step().expect("the device is there"), "it does not wait");
    let passed: Vec<Passed> = (0..3)
        .map(|_| {
            let passed = relay.pass(true);
            for engine in [&mut to, &mut from] {
                engine.step().expect("the device is there");
            }
            passed
        })
        .collect();
    assert_eq!(passed, [Passed::Some, Passed::Some, Passed::All]);
    run(&mut [&mut from, &mut to]);
    assert_eq!(told(&answer), expected);
    assert_eq!((to.stats().num_fetched_blocks, to.stats().prefill_tokens), (6, 4));
    let (_export, mut relay, import) = relayed(&from);
    drop(import);
    assert_eq!(relay.pass(false), Passed::All);
}

/// A prompt that runs has two blocks of the seven that it was admitted for: with what comes they are not there.
#[test]
fn what_comes_takes_no_block_that_a_running_prompt_was_admitted_for() {
    let config = EngineConfig { num_blocks: 8, max_model_len: 112, pipeline_depth: 1, ..CONFIG };
    let expected = alone(sim(), config);
    let (mut from, mut to) = (engine_on(sim(), CONFIG), engine_on(sim(), config));
    ask(&mut from, request());
    run(&mut [&mut from]);
    let other = ask(&mut to, Request { prompt: vec![TokenId(9); 100], ..request() });
    assert!(to.step().expect("the device is there"));
    let (export, import) = ends(&from, LONG);
    to.import(import);
    let answer = ask(&mut to, request());
    from.export(export);
    run(&mut [&mut from, &mut to]);
    assert_eq!(told(&answer), expected);
    assert_eq!(told(&other).tokens.len(), 12);
    assert_eq!((to.stats().num_preemptions, to.stats().num_fetched_blocks), (0, 0));
}

/// The memory manager's part in it, without an engine.
#[test]
fn promised_blocks_are_findable_once_they_are_there_and_told_as_any() {
    let mut cache = KvCache::new(8, 4, Some((1, 2)));
    cache.keep_block_events();
    let tokens: Vec<TokenId> = (0..16).map(TokenId).collect();
    let chain = cache.chain(&tokens, 0).head(3);
    let mut table = cache.open(&chain, &tokens, 12);
    cache.promise(&table, &chain, 7);
    let found = |cache: &KvCache| {
        let prefix = cache.find(&chain, &tokens, 15);
        (prefix.num_blocks, prefix.next_is_promised)
    };
    assert_eq!(found(&cache), (0, true));
    cache.grow(&mut table, 8).expect("eight blocks");
    cache.publish(&mut table, &chain, &tokens, 8);
    cache.check([&table].into_iter());
    assert_eq!(found(&cache), (2, true));
    let stored = |index: usize| BlockEvent::Stored(chain.hashes()[index]);
    assert_eq!(cache.block_events().collect::<Vec<_>>(), [stored(0), stored(1)]);
    // They are held: whoever needs all blocks does not get these.
    let mut all = cache.open(&cache.chain(&[], 0), &[], 0);
    assert!(cache.grow(&mut all, 28).is_err() && cache.grow(&mut all, 24).is_ok());
    cache.free(all, &cache.chain(&[], 0), 8);
    cache.free(table, &chain, 7);
    cache.check([].into_iter());
    assert_eq!(found(&cache), (2, false));
}

/// A client of another thread, until it leaves.
struct Listener {
    to: Sender<Event>,
    has_left: Arc<AtomicBool>,
}

impl Sink for Listener {
    fn event(&mut self, event: Event) -> Flow {
        if self.to.send(event).is_ok() { Flow::Continue } else { Flow::Stop }
    }

    fn is_closed(&self) -> bool {
        self.has_left.load(Ordering::Acquire)
    }
}

fn listen(fleet: &Fleet, request: Request) -> (Receiver<Event>, Arc<AtomicBool>) {
    let (to, events) = channel();
    let has_left = Arc::new(AtomicBool::new(false));
    fleet.submit_one(request, Box::new(Listener { to, has_left: has_left.clone() })).expect("there is room");
    (events, has_left)
}

fn tokens_of(events: &Receiver<Event>) -> impl Iterator<Item = TokenId> + '_ {
    let next = || events.recv_timeout(Duration::from_secs(60)).expect("an event");
    let until_end = std::iter::from_fn(move || Some(next()).filter(|event| !matches!(event, Event::Finished { .. })));
    until_end.filter_map(|event| match event {
        Event::Token { id, .. } => Some(id),
        _ => None,
    })
}

/// The first of two devices has the prompt's beginning and no slot: what is there of it is not computed on the second,
/// and what the second says of it to others has the name that its client divides the cache by.
#[test]
fn a_fleet_moves_a_prefix_to_where_there_is_a_slot() {
    // A step of 6 ms and more; a prompt of 80 tokens takes a quarter of a second.
    let cost = CostModel::line(6e6, 3e6, Prices::default());
    let engine = |max_num_seqs: u32| {
        let backend = SimBackend::new(SimOptions { cost, sleeps: true, ..SimOptions::default() });
        let config = EngineConfig { max_num_seqs, num_blocks: 400, max_model_len: 4096, ..CONFIG };
        let config = EngineConfig { max_logit_rows: max_num_seqs, ..config };
        let mut engine = engine_on(Box::new(backend), config);
        engine.set_cost(cost);
        engine
    };
    let seat = |(index, max_num_seqs): (usize, u32)| Seat {
        engine: engine(max_num_seqs),
        title: format!("sim@{index}"),
        first: Box::new(|| {}),
    };
    let mut seats = [(0, 1), (1, 2)].map(seat);
    let (to, batches) = sync_channel(1000);
    seats[1].engine.cache_mut().tell_kv_events_to(KvEventSender { source: 1, to });
    let fleet = Fleet::spawn(seats.into());
    let salt_name: Option<Arc<str>> = Some("a client".into());
    let request = || Request { cache_salt: 7, salt_name: salt_name.clone(), ..request() };
    let (first, first_has_left) = listen(&fleet, Request { max_tokens: 3000, ..request() });
    assert_eq!(tokens_of(&first).take(3).count(), 3);
    let (second, _) = listen(&fleet, request());
    let tokens: Vec<TokenId> = tokens_of(&second).collect();
    let expected = alone(sim(), CONFIG).tokens.into_iter().map(|(id, _)| id);
    assert_eq!(tokens, expected.collect::<Vec<_>>());
    first_has_left.store(true, Ordering::Release);
    let begun = Instant::now();
    let stats = loop {
        let stats = fleet.engines()[1].stats();
        if stats.num_length == 1 {
            break stats;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "its end is not counted");
        std::thread::yield_now();
    };
    assert_eq!((stats.num_fetched_blocks, stats.cached_tokens, stats.prefill_tokens), (6, 96, 4));
    fleet.shutdown();
    let lineage = |event| match event {
        KvEvent::Stored(StoredBlock { hash, lineage, .. }) => Some((hash, lineage)),
        KvEvent::Removed(_) | KvEvent::Cleared => None,
    };
    let stored: Vec<_> = batches.try_iter().flat_map(|batch| batch.events).filter_map(lineage).collect();
    assert!(stored.len() >= NUM_BLOCKS as usize, "{stored:?}");
    assert_eq!(stored[0].1, Lineage { parent: None, salt: salt_name });
    for pair in stored.windows(2) {
        assert_eq!(pair[1].1, Lineage { parent: Some(pair[0].0), salt: None });
    }
}
