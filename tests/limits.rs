//! Where a device's time goes, on the simulator and its clock: for each cause a workload that provokes it, and the
//! verdict that must name it. Needs nothing.

use std::time::Duration;

use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimClock, SimOptions};
use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::engine::{Engine, StepParts};
use fullbore_engine::limits::Cause;
use fullbore_engine::limits::neighbours::Membership;
use fullbore_engine::limits::verdict::Verdict;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Event, Flow, Request, Share, Sink, TokenId};
use fullbore_engine::tensor::{KvType, WeightFormat};

use crate::grammar::regex_for;

const CONFIG: EngineConfig = EngineConfig {
    max_num_seqs: 64,
    max_num_batched_tokens: 512,
    max_model_len: 1024,
    kv_type: KvType::F16,
    block_size: 16,
    num_blocks: 4096,
    num_host_blocks: 0,
    max_queued_requests: 256,
    max_queued_tokens: 1 << 24,
    max_queue_ms: None,
    max_logit_rows: 64,
    pipeline_depth: 2,
    latency: LatencyTarget::None,
    max_grammar_bytes: 256 << 20,
    prefix_cache: true,
};

/// 2 ms and 0.02 ms a row: at its best from about 450 rows.
fn wide() -> CostModel {
    CostModel::line(2e6, 2e4, Prices::default())
}

struct Run {
    engine: Engine,
    clock: SimClock,
    /// What the host takes between steps.
    host: Duration,
    num_requests: u32,
}

/// A client that takes its time with each event.
struct Reader {
    clock: SimClock,
    takes: Duration,
}

impl Sink for Reader {
    fn event(&mut self, _: Event) -> Flow {
        self.clock.advance(self.takes);
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

impl Run {
    /// On a device that takes what `true_cost` says, which the engine thinks is `cost`.
    fn on(true_cost: CostModel, cost: CostModel, config: EngineConfig) -> Run {
        config.check().expect("a valid config");
        let options = SimOptions { fidelity: Fidelity::Cost, cost: true_cost, ..SimOptions::default() };
        let mut backend = Box::new(SimBackend::new(options));
        let clock = backend.clock();
        let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
        let limits = config.state_limits();
        let model = Model::load(ModelConfig::tiny(1024, 1), limits, &checkpoint, backend.as_mut(), &mut |_| {});
        let mut engine = Engine::new(config, model.expect("the simulator has memory"), backend, (1, 2));
        engine.set_cost(cost);
        Run { engine, clock, host: Duration::ZERO, num_requests: 0 }
    }

    fn new(config: EngineConfig) -> Run {
        Run::on(wide(), wide(), config)
    }

    fn add(&mut self, request: Request, read: Duration) {
        self.engine.config().fits(&request, 1024).expect("a request that fits");
        self.engine.add(request, Box::new(Reader { clock: self.clock.clone(), takes: read }));
    }

    /// A request whose prompt is nobody else's.
    fn ask(&mut self, num_prompt_tokens: u32, max_tokens: u32) {
        let request = self.request(num_prompt_tokens, max_tokens);
        self.add(request, Duration::ZERO);
    }

    fn request(&mut self, num_prompt_tokens: u32, max_tokens: u32) -> Request {
        self.num_requests += 1;
        let first = self.num_requests * 37;
        let prompt = (0..num_prompt_tokens).map(|i| TokenId((first + i * (1 + first % 7)) % 1024)).collect();
        Request { prompt, max_tokens, ..Request::default() }
    }

    fn step(&mut self) -> bool {
        self.clock.advance(self.host);
        self.engine.step().expect("the simulator is never lost")
    }

    /// Runs to the end; every nanosecond of the clock has its cause.
    fn finish(&mut self) -> Verdict {
        while self.step() {}
        self.engine.settle_idle();
        let snapshot = self.engine.stats().limits;
        assert_eq!(u128::from(snapshot.total.wall_ns()), self.clock.now().as_nanos());
        let sum: f64 = Cause::ALL.into_iter().map(|cause| snapshot.total.share(snapshot.total.ns(cause))).sum();
        assert!((sum - 1.0).abs() < 1e-9, "{sum}");
        self.engine.verdict()
    }

    fn seconds(&self, cause: Cause) -> f64 {
        self.engine.stats().limits.total.seconds(cause)
    }
}

#[track_caller]
fn check(verdict: &Verdict, cause: Cause, words: &[&str]) {
    assert_eq!(verdict.cause, cause, "{}", verdict.sentence);
    for word in words {
        assert!(verdict.sentence.contains(word), "no {word:?} in: {}", verdict.sentence);
    }
}

#[test]
fn an_engine_that_has_just_begun_says_so() {
    check(&Run::new(CONFIG).engine.verdict(), Cause::NoRequests, &["nothing has run yet"]);
}

#[test]
fn nothing_to_do_is_no_requests() {
    let mut run = Run::new(CONFIG);
    for _ in 0..10 {
        run.ask(20, 8);
        while run.step() {}
        run.clock.advance(Duration::from_millis(60));
    }
    let verdict = run.finish();
    // 8 steps of 2 ms and 60 ms of rest, ten times.
    check(&verdict, Cause::NoRequests, &["no requests: ", "nothing to do for 79 % of the time", "send more at once"]);
    assert!(run.seconds(Cause::NoRequests) > 0.6);
}

/// One stream keeps the device busy all the time, and far from what it could do.
#[test]
fn too_little_to_do_at_once_is_no_requests_too() {
    let mut run = Run::new(CONFIG);
    run.ask(20, 100);
    let verdict = run.finish();
    check(&verdict, Cause::NoRequests, &["nothing to do for 0 % of the time", "steps had 1 row where", "best from 4"]);
}

#[test]
fn too_few_blocks_are_memory_and_q8_0_admits_what_is_said() {
    let config = EngineConfig { num_blocks: 64, ..CONFIG };
    let mean_running = |config: EngineConfig| {
        let mut run = Run::new(config);
        (0..60).for_each(|_| run.ask(96, 32));
        let mut num_running = Vec::new();
        while run.step() {
            if run.engine.stats().num_waiting > 0 {
                num_running.push(f64::from(run.engine.stats().num_running));
            }
        }
        let mean = num_running.iter().sum::<f64>() / num_running.len() as f64;
        (run.finish(), mean)
    };
    let (verdict, before) = mean_running(config);
    check(
        &verdict,
        Cause::KvMemory,
        &["memory: ", "requests wait for KV blocks", "of 64 are held", "q8_0 KV would admit"],
    );
    let said = verdict.sentence.split("admit about ").nth(1).and_then(|rest| rest.split(' ').next());
    let said: f64 = said.and_then(|number| number.parse().ok()).expect("a number");
    // A token takes 64 bytes of K in f16 and 34 in q8_0.
    let (_, after) = mean_running(EngineConfig { num_blocks: 64 * 64 / 34, ..config });
    assert!((said - (after - before)).abs() <= 2.0, "{said} were said, and {before} became {after}");
    // The smallest type there is leaves nothing to choose.
    let smallest = EngineConfig { kv_type: KvType::Q4_0, ..config };
    check(&mean_running(smallest).0, Cause::KvMemory, &["--kv-memory"]);
}

#[test]
fn too_few_slots_are_slots() {
    let mut run = Run::new(EngineConfig { max_num_seqs: 4, ..CONFIG });
    (0..40).for_each(|_| run.ask(10, 30));
    let words = ["slots: ", "requests wait while 4 run", "at its best from 4", "--max-num-seqs"];
    check(&run.finish(), Cause::Slots, &words);
}

#[test]
fn chunks_cut_by_the_target_are_the_latency_target() {
    let mut run = Run::new(EngineConfig { latency: LatencyTarget::Milliseconds(3), ..CONFIG });
    (0..4).for_each(|_| run.ask(10, 400));
    (0..16).for_each(|_| run.ask(900, 4));
    check(&run.finish(), Cause::LatencyTarget, &["latency target: ", "3 ms between tokens", "--target-itl-ms"]);
    // Also where nobody waits: the one prompt that there is could have larger chunks.
    let mut run = Run::new(EngineConfig { latency: LatencyTarget::Stretch(120), ..CONFIG });
    (0..4).for_each(|_| run.ask(10, 40));
    run.ask(990, 2);
    check(&run.finish(), Cause::LatencyTarget, &["1.2 times a step without prompts", "--profile throughput"]);
}

#[test]
fn chunks_cut_by_the_budget_are_the_step_budget() {
    let mut run = Run::new(EngineConfig { max_num_batched_tokens: 64, ..CONFIG });
    (0..20).for_each(|_| run.ask(700, 1));
    let words = ["step budget: ", "a step has 64 rows", "64 tokens", "--max-num-batched-tokens"];
    check(&run.finish(), Cause::StepBudget, &words);
    // A budget above the knee takes nothing away: full chunks compute at the full rate.
    let mut run = Run::new(CONFIG);
    (0..40).for_each(|_| run.ask(1000, 1));
    check(&run.finish(), Cause::Computing, &["the device: "]);
}

#[test]
fn waiting_for_a_prefix_is_a_shared_prefix() {
    let mut run = Run::new(EngineConfig { max_num_batched_tokens: 64, ..CONFIG });
    for group in 0..4 {
        for own in 0..12 {
            let prompt = (0..800).map(|i| TokenId((i * (group + 3)) % 1000)).chain([TokenId(1000 + own)]).collect();
            run.add(Request { prompt, max_tokens: 1, ..Request::default() }, Duration::ZERO);
        }
        while run.step() {}
    }
    check(&run.finish(), Cause::SharedPrefix, &["shared prefix: 11 requests wait", "rows a step"]);
}

#[test]
fn caps_of_tenants_are_tenant_caps() {
    let mut run = Run::new(CONFIG);
    for _ in 0..30 {
        let request = run.request(10, 20);
        let share = Share { weight: 1, max_num_seqs: 2 };
        run.add(Request { tenant: 7, share, ..request }, Duration::ZERO);
    }
    check(&run.finish(), Cause::TenantCap, &["tenant caps: ", "requests wait while 2 run", "--share"]);
}

#[test]
fn a_slow_host_is_the_host_at_either_depth() {
    for (pipeline_depth, remedy) in [(1, "--pipeline-depth 2"), (2, "faster core")] {
        let mut run = Run::new(EngineConfig { pipeline_depth, ..CONFIG });
        run.host = Duration::from_millis(9);
        (0..64).for_each(|_| run.ask(7, 40));
        let verdict = run.finish();
        check(&verdict, Cause::Schedule, &["host: the device waits", "schedule ", remedy]);
        // A step of 64 rows takes 3.3 ms, which with two in flight are hidden: 9 ms go by for each step.
        let expected = if pipeline_depth == 1 { 9.0 / 12.3 } else { (9.0 - 3.3) / 9.0 };
        let limits = &run.engine.stats().limits;
        let share = limits.total.share(limits.total.host_ns());
        assert!((share - expected).abs() < 0.03, "{share} at depth {pipeline_depth}");
    }
}

#[test]
fn slow_clients_are_read_back() {
    let mut run = Run::new(EngineConfig { pipeline_depth: 1, ..CONFIG });
    for _ in 0..10 {
        let request = run.request(10, 20);
        run.add(request, Duration::from_millis(1));
    }
    check(&run.finish(), Cause::ReadBack, &["read-back 8", "schedule 0 %"]);
}

/// A host that is quick enough is nobody's limit, for all its time is hidden.
#[test]
fn a_full_device_is_the_device() {
    let cost = CostModel::line(1e6, 1e6, Prices::default());
    let mut run = Run::on(cost, cost, CONFIG);
    run.host = Duration::from_millis(3);
    (0..40).for_each(|_| run.ask(30, 20));
    let verdict = run.finish();
    check(&verdict, Cause::Computing, &["the device: it computes for ", " tokens a second"]);
    let limits = &run.engine.stats().limits;
    assert!(limits.total.share(limits.total.host_ns()) < 0.01, "{limits:?}");
    // Each row takes a millisecond, and a request 30 of its prompt and 19 that it generated.
    assert_eq!(limits.total.num_tokens, 40 * 49);
}

/// Two engines on a device that takes three times as long as it does for one alone: each names the other.
#[test]
fn engines_on_one_device_name_each_other() {
    let cost = CostModel::line(1e6, 1e6, Prices::default());
    let contended = CostModel::line(3e6, 3e6, Prices::default());
    let names = ["the first of two", "the second of two"];
    let mut runs = names.map(|name| {
        let mut run = Run::on(contended, cost, CONFIG);
        run.engine.set_neighbours(Membership::join("one device for two", name));
        (0..10).for_each(|_| run.ask(10, 30));
        run
    });
    while runs.iter_mut().any(|run| !run.engine.is_idle()) {
        for run in &mut runs {
            while run.engine.has_room() && run.engine.begin().expect("the simulator is never lost") {}
        }
        for run in &mut runs {
            if run.engine.num_in_flight() > 0 {
                run.engine.complete().expect("the simulator is never lost");
            }
        }
    }
    for (run, other) in runs.iter_mut().zip([names[1], names[0]]) {
        check(&run.finish(), Cause::Neighbour, &["neighbour: 6", other]);
    }
    // Alone on its device it is just slower than it was thought to be.
    let mut alone = Run::on(contended, cost, CONFIG);
    alone.engine.set_neighbours(Membership::join("a device for one", "alone"));
    (0..10).for_each(|_| alone.ask(10, 30));
    check(&alone.finish(), Cause::Computing, &["the device: "]);
}

/// What is known apart is counted apart, and all of it is the steps' time.
#[test]
fn parts_of_steps_are_told_as_far_as_they_are_known_apart() {
    let mut run = Run::new(EngineConfig { pipeline_depth: 1, ..CONFIG });
    let count = |run: &Run| {
        let StepParts { prefill, decode, mixed, sampling, read_back } = run.engine.stats().step_parts;
        let sum = prefill.ns + decode.ns + mixed.ns + sampling.ns;
        assert!((sum as f64 / 1e6 - run.engine.stats().total_step_ms).abs() < 1e-6, "{sum}");
        [prefill, decode, mixed, sampling, read_back].map(|part| part.num)
    };
    // A prompt whose step brings the first token, and four more tokens.
    run.ask(100, 5);
    while run.step() {}
    assert_eq!(count(&run), [1, 4, 0, 0, 5]);
    // Another prompt comes while an answer goes on.
    run.ask(100, 5);
    run.step();
    run.ask(100, 1);
    while run.step() {}
    assert_eq!(count(&run), [2, 7, 1, 0, 10]);
    // Choices that wait for masks come by themselves.
    let grammar = Some(regex_for("[a-z]{40}", 1024));
    let request = Request { grammar, ..run.request(100, 3) };
    run.add(request, Duration::ZERO);
    while run.step() {}
    assert_eq!(count(&run), [3, 9, 1, 3, 16]);
}
