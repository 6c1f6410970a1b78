//! Two steps in flight against the plain loop, on the backends that compute: the same tokens with the same
//! log-probabilities, greedy, seeded and under a grammar, while memory runs out and sequences come back; and nobody's
//! bits change with a neighbour's grammar. `simulation` holds this on the simulator over thousands of workloads. Needs
//! Vulkan drivers: fails without one.

use std::sync::{Arc, Mutex};

use fullbore_engine::backend::Backend;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::wgpu::{WgpuBackend, WgpuOptions, devices};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Event, FinishReason, Flow, Request, SamplingParams, Sink, TokenId};
use fullbore_engine::tensor::WeightFormat;

use crate::random::Random;

const VOCAB_SIZE: u32 = 256;

/// What a client was told of its answer: ids, log-probabilities to the bit, and why it ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub tokens: Vec<(TokenId, u32)>,
    pub reason: Option<FinishReason>,
}

pub struct Client(pub Arc<Mutex<Answer>>);

impl Sink for Client {
    fn event(&mut self, event: Event) -> Flow {
        let mut answer = self.0.lock().expect("nobody panics");
        match event {
            Event::Token { id, logprobs } => {
                let logprob = logprobs.expect("they were asked for").logprob;
                answer.tokens.push((id, logprob.to_bits()));
            }
            Event::Finished { reason, .. } => answer.reason = Some(reason),
            Event::Started { .. } | Event::Prompt(_) | Event::Pooled(_) => {}
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// Greedy ones, seeded ones, and those with penalties; some end at a stop id that nobody foresees.
pub fn requests() -> Vec<Request> {
    let mut random = Random::new(11);
    let request = |index: u32| {
        let num_tokens = random.between(3, 40);
        let prompt = (0..num_tokens).map(|_| TokenId(random.below(VOCAB_SIZE))).collect();
        let seeded =
            SamplingParams { temperature: 0.9, top_k: 40, top_p: 0.95, seed: u64::from(index), ..Default::default() };
        let sampling = match index % 4 {
            0 | 1 => SamplingParams::default(),
            2 => seeded,
            _ => SamplingParams { presence_penalty: 0.7, repetition_penalty: 1.2, ..seeded },
        };
        let stop_ids = if index.is_multiple_of(3) { (0..16).map(TokenId).collect() } else { Vec::new() };
        Request { prompt, max_tokens: 24, sampling, stop_ids, logprobs: Some(0), ..Request::default() }
    };
    (0..10).map(request).collect()
}

/// Every other one follows a grammar.
pub fn with_grammars() -> Vec<Request> {
    let grammar = crate::grammar::regex_for("[a-z]{4,30}[.!]", VOCAB_SIZE);
    let follows = |(index, request): (usize, Request)| {
        let grammar = (index % 2 == 1).then(|| grammar.clone());
        Request { grammar, ..request }
    };
    requests().into_iter().enumerate().map(follows).collect()
}

fn run(backend: Box<dyn Backend>, pipeline_depth: u32) -> (Vec<Answer>, u64) {
    run_all(backend, pipeline_depth, requests())
}

pub fn run_all(mut backend: Box<dyn Backend>, pipeline_depth: u32, requests: Vec<Request>) -> (Vec<Answer>, u64) {
    let config = EngineConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 24,
        max_model_len: 80,
        block_size: 16,
        num_blocks: 8,
        num_host_blocks: 4,
        max_logit_rows: 4,
        pipeline_depth,
        ..EngineConfig::default()
    };
    config.check().expect("a valid config");
    let checkpoint = Checkpoint::Random { seed: 3, format: WeightFormat::Q8_0 };
    let limits = config.state_limits();
    let model = Model::load(ModelConfig::tiny(VOCAB_SIZE, 2), limits, &checkpoint, backend.as_mut(), &mut |_| {});
    let mut engine = Engine::new(config, model.expect("a small model"), backend, (1, 2));
    engine.enable_swap().expect("the device is there");
    let answers: Vec<Arc<Mutex<Answer>>> = requests.iter().map(|_| Arc::default()).collect();
    for (request, answer) in requests.into_iter().zip(&answers) {
        engine.add(request, Box::new(Client(answer.clone())));
    }
    let mut most_in_flight = 0;
    while !engine.is_idle() {
        while engine.has_room() && engine.begin().expect("the device is there") {}
        most_in_flight = most_in_flight.max(engine.num_in_flight());
        engine.complete().expect("the device is there");
        engine.check();
    }
    assert_eq!(most_in_flight, pipeline_depth as usize);
    (
        answers.iter().map(|answer| answer.lock().expect("nobody panics").clone()).collect(),
        engine.stats().num_preemptions,
    )
}

fn check(name: &str, open: impl Fn() -> Box<dyn Backend>) {
    let ((plain, _), (piped, num_preemptions)) = (run(open(), 1), run(open(), 2));
    assert!(num_preemptions > 0, "{name}: memory did not run out");
    for (index, (plain, piped)) in plain.iter().zip(&piped).enumerate() {
        assert!(!plain.tokens.is_empty() && plain.reason.is_some(), "{name}: request {index} has no answer");
        assert_eq!(piped, plain, "{name}: request {index}");
    }
    // What was compared is no constant.
    let stopped = |answer: &Answer| answer.reason == Some(FinishReason::Stop);
    assert!(plain.iter().any(stopped) && !plain.iter().all(stopped), "{name}: {plain:?}");
    let mut firsts: Vec<TokenId> = plain.iter().map(|answer| answer.tokens[0].0).collect();
    firsts.sort_unstable_by_key(|token| token.0);
    firsts.dedup();
    assert!(firsts.len() > 4, "{name}: {firsts:?}");
}

fn check_grammars(name: &str, open: impl Fn() -> Box<dyn Backend>) {
    let (plain, _) = run_all(open(), 1, with_grammars());
    let (piped, num_preemptions) = run_all(open(), 2, with_grammars());
    assert_eq!(piped, plain, "{name}");
    assert!(num_preemptions > 0, "{name}: memory did not run out");
    let (free, _) = run(open(), 2);
    for (index, (answer, free)) in piped.iter().zip(&free).enumerate() {
        if index % 2 == 0 {
            assert_eq!(answer, free, "{name}: request {index} beside grammars");
            continue;
        }
        // Tokens 4 to 259 are the bytes.
        let bytes: Vec<u8> = answer.tokens.iter().map(|(token, _)| (token.0 - 4) as u8).collect();
        let (last, letters) = bytes.split_last().expect("a text");
        let ended = matches!(last, b'.' | b'!');
        assert!(letters.iter().all(u8::is_ascii_lowercase), "{name}: {bytes:?}");
        assert_eq!(answer.reason == Some(FinishReason::Stop), ended, "{name}: {answer:?}");
    }
}

#[test]
fn two_steps_in_flight_give_what_one_gives_on_the_cpu() {
    check("cpu", || Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started")));
}

#[test]
fn grammars_change_nobody_elses_bits_on_the_cpu() {
    check_grammars("cpu", || Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started")));
}

/// A minute and more.
#[test]
fn two_steps_in_flight_give_what_one_gives_on_cuda() {
    if std::env::var_os("FULLBORE_TEST_FULL").is_none() {
        return;
    }
    check("cuda on the host", || crate::cuda::on_host(false));
}

#[test]
fn grammars_change_nobody_elses_bits_on_wgpu() {
    let found = devices();
    assert!(!found.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    for device in &found {
        let options = WgpuOptions { selector: device.id.clone(), checked: true, ..WgpuOptions::default() };
        check_grammars(&device.driver, || Box::new(WgpuBackend::open(&options).expect("a listed device opens")));
    }
}

#[test]
fn two_steps_in_flight_give_what_one_gives_on_wgpu() {
    let found = devices();
    assert!(!found.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    for device in &found {
        let options = WgpuOptions { selector: device.id.clone(), checked: true, ..WgpuOptions::default() };
        check(&device.driver, || Box::new(WgpuBackend::open(&options).expect("a listed device opens")));
    }
}
