//! Too much to do, on the simulator in virtual time: what was predicted against what then happened, and what a flood of
//! one tenant does to another. Needs nothing. Times are exact and the same everywhere; nothing sleeps.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimClock, SimOptions};
use fullbore_engine::backlog::Backlog;
use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::engine::Engine;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Event, Flow, Request, Sink, TokenId};
use fullbore_engine::tensor::WeightFormat;

use crate::random::Random;

const VOCAB_SIZE: u32 = 1024;

#[derive(Clone, Copy, Debug)]
struct Arrival {
    at: Duration,
    tenant: u64,
    prompt_tokens: u32,
    max_tokens: u32,
}

/// What became of an arrival, since it came.
#[derive(Clone, Copy, Debug, Default)]
struct Answer {
    tenant: u64,
    /// As forecasts had it when it came: to its first token, and until it begins.
    predicted: Duration,
    predicted_begun: Duration,
    begun: Duration,
    first_token: Duration,
    ended: Duration,
}

struct Lab {
    engine: Engine,
    clock: SimClock,
    backlog: Arc<Mutex<Backlog>>,
    answers: Vec<Arc<Mutex<Answer>>>,
}

impl Lab {
    /// A device of these prices, which the engine knows.
    fn new(config: EngineConfig, cost: CostModel) -> Lab {
        config.check().expect("a valid config");
        let backend = SimBackend::new(SimOptions { fidelity: Fidelity::Cost, cost, ..SimOptions::default() });
        let clock = backend.clock();
        let mut backend = Box::new(backend);
        let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
        let model = ModelConfig { max_positions: config.max_model_len, ..ModelConfig::tiny(VOCAB_SIZE, 1) };
        let model = Model::load(model, config.state_limits(), &checkpoint, backend.as_mut(), &mut |_| {});
        let mut engine = Engine::new(config, model.expect("the simulator has memory"), backend, (1, 2));
        engine.set_cost(cost);
        let backlog = Backlog::new(config.max_queued_requests, u64::from(config.max_queued_tokens));
        Lab { engine, clock, backlog: Arc::new(Mutex::new(backlog)), answers: Vec::new() }
    }

    fn add(&mut self, arrival: Arrival) {
        let Arrival { at, tenant, prompt_tokens, max_tokens } = arrival;
        let own_tokens = u64::from(prompt_tokens);
        let (ahead, total) = {
            let mut backlog = self.backlog.lock().expect("nobody panics");
            backlog.reserve(tenant, 1, 1).expect("there is room for all that come");
            backlog.add_tokens(tenant, own_tokens).expect("there is room for all that come");
            (backlog.ahead(tenant, self.engine.config().max_num_seqs), backlog.total())
        };
        let load = self.engine.load();
        let predicted = Duration::from_nanos(load.first_token_ns(&ahead, own_tokens));
        let predicted_begun = Duration::from_nanos(load.begun_ns(total.num_requests, total.num_tokens));
        let answer = Arc::new(Mutex::new(Answer { tenant, predicted, predicted_begun, ..Answer::default() }));
        // No two prompts have a block in common.
        let mut random = Random::new(self.answers.len() as u64);
        let prompt = (0..prompt_tokens).map(|_| TokenId(random.below(VOCAB_SIZE))).collect();
        let request = Request { prompt, max_tokens, tenant, ..Request::default() };
        self.answers.push(answer.clone());
        let (clock, backlog) = (self.clock.clone(), self.backlog.clone());
        self.engine.add(request, Box::new(Witness { at, own_tokens, tenant, clock, backlog, answer }));
    }

    /// Hands in what has come whenever a step has ended, until all have their answers.
    fn run(mut self, mut arrivals: Vec<Arrival>) -> Vec<Answer> {
        arrivals.sort_by_key(|arrival| arrival.at);
        let mut arrivals = arrivals.into_iter().peekable();
        loop {
            while let Some(arrival) = arrivals.next_if(|arrival| arrival.at <= self.clock.now()) {
                self.add(arrival);
            }
            if !self.engine.step().expect("the simulator is never lost") {
                let Some(next) = arrivals.peek() else { break };
                self.clock.advance_to(next.at);
            }
        }
        self.engine.check();
        self.backlog.lock().expect("nobody panics").check();
        self.answers.iter().map(|answer| *answer.lock().expect("nobody panics")).collect()
    }
}

struct Witness {
    at: Duration,
    own_tokens: u64,
    tenant: u64,
    clock: SimClock,
    backlog: Arc<Mutex<Backlog>>,
    answer: Arc<Mutex<Answer>>,
}

impl Sink for Witness {
    fn event(&mut self, event: Event) -> Flow {
        let since = self.clock.now() - self.at;
        let mut answer = self.answer.lock().expect("nobody panics");
        let mut backlog = self.backlog.lock().expect("nobody panics");
        match event {
            Event::Started { .. } => {
                answer.begun = since;
                backlog.begin(self.tenant, self.own_tokens);
            }
            Event::Token { .. } if answer.first_token.is_zero() => answer.first_token = since,
            Event::Finished { .. } => {
                answer.ended = since;
                backlog.end(self.tenant);
            }
            _ => {}
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}

/// Gaps with which things come that know nothing of each other, `per_second` of them.
fn gap(random: &mut Random, per_second: f64) -> Duration {
    let uniform = (f64::from(random.below(1 << 24)) + 0.5) / f64::from(1 << 24);
    Duration::from_secs_f64(-uniform.ln() / per_second)
}

/// Weights are read in 10 ms whatever the rows, up to 256 of them; then each row takes its time.
fn like_a_gpu() -> CostModel {
    let curve = std::array::from_fn(|k| 10e6 * (f64::from(1u32 << k) / 256.0).max(1.0));
    CostModel::new(curve, Prices { ns_per_logit_row: 2e3, ns_per_attended_token: 1.0, ..Prices::default() })
}

/// Every row takes its time.
fn like_a_cpu() -> CostModel {
    CostModel::line(20e6, 1.5e6, Prices { ns_per_attended_token: 200.0, ..Prices::default() })
}

/// How far a prediction was off, as a factor; below 1 it came later than predicted.
struct Ratios(Vec<f64>);

impl Ratios {
    fn quantiles(&self) -> [f64; 5] {
        [0.01, 0.05, 0.5, 0.95, 0.99].map(|share| quantile(self.0.clone(), share))
    }

    /// Nine of ten within a factor of 2, and half of them sooner, half later, to within a quarter.
    fn check(&self, what: &str) {
        let quantiles = self.quantiles();
        let [_, low, median, high, _] = quantiles;
        println!("{what}: {} predictions, predicted / actual at p1, p5, p50, p95, p99: {quantiles:.2?}", self.0.len());
        assert!(self.0.len() > 300, "{what}: too few to say anything");
        assert!(low > 0.5 && high < 2.0 && (0.8..1.25).contains(&median), "{what}: {quantiles:?}");
    }
}

fn random_load(seed: u64) -> (EngineConfig, Vec<Arrival>) {
    let mut random = Random::new(seed);
    let max_num_seqs = random.between(2, 24);
    let config = EngineConfig {
        max_num_seqs,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: random.between(64, 40 * max_num_seqs.max(4)),
        max_queued_requests: 4096,
        max_queued_tokens: 1 << 24,
        latency: [LatencyTarget::None, LatencyTarget::Stretch(150), LatencyTarget::Stretch(300)]
            [random.below(3) as usize],
        ..EngineConfig::default()
    };
    let per_second = [1.0, 3.0, 10.0, 30.0][random.below(4) as usize];
    let (longest_prompt, longest_answer) = (random.between(20, 600), random.between(4, 200));
    let mut at = Duration::ZERO;
    let arrivals = (0..150).map(|_| {
        at += gap(&mut random, per_second);
        let prompt_tokens = random.between(4, longest_prompt);
        Arrival { at, tenant: QUIET, prompt_tokens, max_tokens: random.between(1, longest_answer) }
    });
    let arrivals = arrivals.collect();
    (config, arrivals)
}

/// Of seeded workloads, from idle to many times what the device can do, on two kinds of device.
#[test]
fn predictions_come_true() {
    for (device, cost) in [("like a GPU", like_a_gpu()), ("like a CPU", like_a_cpu())] {
        let (mut first_tokens, mut begins) = (Vec::new(), Vec::new());
        for seed in 0..24 {
            let (config, arrivals) = random_load(seed);
            let answers = Lab::new(config, cost).run(arrivals);
            // How long sequences run is not known to begin with.
            for answer in &answers[10..] {
                first_tokens.push(answer.predicted.as_secs_f64() / answer.first_token.as_secs_f64());
                // What Retry-After is made of, where there was anything to wait for.
                if answer.begun > Duration::from_millis(500) {
                    begins.push(answer.predicted_begun.as_secs_f64() / answer.begun.as_secs_f64());
                }
            }
        }
        Ratios(first_tokens).check(&format!("{device}, first token"));
        Ratios(begins).check(&format!("{device}, begin"));
    }
}

const QUIET: u64 = 1;
const LOUD: u64 = 2;

/// A tenant with a few requests at once for a minute, and one that hands in several times what the device can do.
fn tenants(seed: u64, flooded: bool) -> Vec<Arrival> {
    let mut random = Random::new(seed);
    let mut arrivals = Vec::new();
    let mut come = |tenant, per_second, longest_prompt, longest_answer| {
        let mut at = Duration::ZERO;
        while at < Duration::from_secs(60) {
            at += gap(&mut random, per_second);
            let (prompt_tokens, max_tokens) = (random.between(20, longest_prompt), random.between(20, longest_answer));
            arrivals.push(Arrival { at, tenant, prompt_tokens, max_tokens });
        }
    };
    come(QUIET, 4.0, 120, 100);
    if flooded {
        come(LOUD, 60.0, 600, 200);
    }
    arrivals
}

/// The quiet tenant's 99th percentiles beside the flood over those without it: to the first token, and in all.
fn flood_ratios(config: EngineConfig) -> [f64; 2] {
    let p99 = |flooded: bool| {
        let answers = (0..4).flat_map(|seed| Lab::new(config, like_a_gpu()).run(tenants(seed, flooded)));
        let quiet: Vec<Answer> = answers.filter(|answer| answer.tenant == QUIET).collect();
        let p99 = |time: fn(&Answer) -> Duration| quantile(quiet.iter().map(|a| time(a).as_secs_f64()).collect(), 0.99);
        [p99(|answer| answer.first_token), p99(|answer| answer.ended)]
    };
    let (alone, flooded) = (p99(false), p99(true));
    println!("p99 of first token and of all, in seconds: alone {alone:.4?}, beside a flood {flooded:.4?}");
    [flooded[0] / alone[0], flooded[1] / alone[1]]
}

/// A request waits for the two steps in flight and for its own, so its first token comes within as many steps as
/// without the flood; how long a step with other prompts in it may take is the latency target's to say.
#[test]
fn a_flood_leaves_another_tenant_as_it_was() {
    let config = EngineConfig {
        max_num_seqs: 32,
        max_num_batched_tokens: 512,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: 2048,
        max_queued_requests: 1 << 16,
        max_queued_tokens: 1 << 26,
        latency: LatencyTarget::Milliseconds(11),
        ..EngineConfig::default()
    };
    let short_of_memory = EngineConfig { num_blocks: 512, ..config };
    for (name, config) in [("with memory to spare", config), ("short of memory", short_of_memory)] {
        let [first, total] = flood_ratios(config);
        println!("{name}, target 11 ms: {first:.3} to the first token, {total:.3} in all");
        assert!(first <= 1.2 && total <= 1.2, "{name}: {first}, {total}");
        let [first, total] = flood_ratios(EngineConfig { latency: LatencyTarget::Stretch(300), ..config });
        println!("{name}, profile balanced: {first:.3} to the first token, {total:.3} in all");
        assert!(total <= 1.2, "{name}: {total}");
    }
}
