//! Both real models against numpy in float32 and against llama.cpp: greedy ids until the reference itself is undecided,
//! and the likelihood of a passage. Goldens: `golden/{smollm2,gemma3}.json`, by `llama_cpp.py` and `reference.py`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use fullbore_engine::backend::Backend;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::format::gguf::Gguf;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Event, Flow, Request, Sink, TokenId};
use fullbore_engine::tensor::KvType;
use fullbore_engine::verify::golden::Golden;
pub use fullbore_engine::verify::golden::Share;

pub const MODELS: [(&str, &str, &str); 2] = [
    ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2", include_str!("golden/smollm2.json")),
    ("gemma-3-270m-Q4_K_M.gguf", "gemma3", include_str!("golden/gemma3.json")),
];

#[test]
fn the_cpu_follows_both_references() {
    for (file, name, golden) in MODELS {
        let backend = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        follow(file, name, golden, Box::new(backend), Share::WHOLE);
    }
}

/// Alone and in company, and what is said of a golden that is another model's.
#[test]
fn what_does_not_follow_a_golden_is_told() {
    let (file, _, text) = MODELS[0];
    let backend = Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started"));
    let (mut engine, mut golden) = (engine(file, KvType::F16, backend), Golden::read(text).expect("goldens are JSON"));
    let share = Share { num_cases: 2, max_tokens: 4 };
    let apart = golden.compare_company(&mut engine, share, 16).expect("the device is there");
    assert!(apart.is_empty(), "{apart:?}");
    golden.passage_nll += 1.0;
    golden.cases[0].reference[2] += 1;
    let failures = golden.follow(&mut engine, share).expect("the device is there").failures;
    let [passage, token, few] = &failures[..] else { panic!("{failures:?}") };
    assert!(passage.starts_with("the passage has a mean NLL of ") && few.starts_with("only "), "{failures:?}");
    assert!(token.ends_with("token 2 is not that of the reference, which had decided 4"), "{failures:?}");
}

/// By how much the mean NLL of a passage may change with the cache's type, relative to f16. Rounding to codes makes
/// much of little: with the scale of scores off by -3 to 2 millionths, q8_0 was measured from -0.0001 to 0.0008
/// (SmolLM2) and from -0.0009 to -0.0002 (Gemma 3), q4_0 from 0.009 to 0.018 and from 0.025 to 0.034.
const KV_TYPE_BOUNDS: [(KvType, f64); 2] = [(KvType::Q8_0, 0.005), (KvType::Q4_0, 0.045)];

#[test]
fn a_quantised_cache_costs_little_likelihood_on_the_cpu() {
    for (file, name, golden) in MODELS {
        compare_kv_types(file, name, golden, || {
            Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started"))
        });
    }
}

/// The likelihood of a golden's passage with each type of KV cache, beside f16.
pub fn compare_kv_types(file: &str, name: &str, golden: &str, backend: impl Fn() -> Box<dyn Backend>) {
    let golden = Golden::read(golden).expect("goldens are JSON");
    let passage: Vec<TokenId> = golden.passage.iter().map(|id| TokenId(*id)).collect();
    let nll = |kv_type| {
        let mut engine = engine(file, kv_type, backend());
        let request = Request { prompt: passage.clone(), prompt_logprobs: Some(0), ..Request::default() };
        let events = add(&mut engine, request);
        while engine.step().expect("the device is there") {}
        mean_nll(&events, passage.len())
    };
    let plain = nll(KvType::F16);
    for (kv_type, most) in KV_TYPE_BOUNDS {
        let nll = nll(kv_type);
        println!("{name}: mean NLL {nll:.5} with {}, {plain:.5} with f16", kv_type.name());
        assert!((nll - plain).abs() / plain < most, "{name}: mean NLL {nll} with {}, {plain}", kv_type.name());
        assert_ne!(nll, plain, "{name}: {} is not f16", kv_type.name());
    }
}

/// Of a passage whose prompt logprobs were asked for.
fn mean_nll(events: &Events, num_tokens: usize) -> f64 {
    let events = events.lock().expect("no sink panics");
    let [Event::Started { .. }, Event::Prompt(logprobs), ..] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(logprobs.len(), num_tokens - 1);
    -logprobs.iter().map(|entry| f64::from(entry.logprob)).sum::<f64>() / logprobs.len() as f64
}

/// Runs cases of a golden at once, and its passage, on `backend`.
pub fn follow(file: &str, name: &str, golden: &str, backend: Box<dyn Backend>, share: Share) {
    let device = backend.info().id.clone();
    let golden = Golden::read(golden).expect("goldens are JSON");
    let followed = golden.follow(&mut engine(file, KvType::F16, backend), share).expect("the device is there");
    println!("{name} on {device}: mean NLL {:.5}, reference {:.5}", followed.passage_nll, followed.wanted_nll);
    assert!(followed.failures.is_empty(), "{name} on {device}: {}", followed.failures.join("; "));
}

/// By how much bytes in the place of activations may move the mean likelihood of the passage; tokens they may change.
const BYTES_NLL_TOLERANCE: f64 = 0.02;

/// What a backend that rounds activations to bytes is held to.
pub fn compare_likelihood(file: &str, name: &str, golden: &str, backend: Box<dyn Backend>, share: Share) {
    let device = backend.info().id.clone();
    let golden = Golden::read(golden).expect("goldens are JSON");
    let followed = golden.follow(&mut engine(file, KvType::F16, backend), share).expect("the device is there");
    let (nll, wanted) = (followed.passage_nll, followed.wanted_nll);
    println!("{name} on {device}: mean NLL {nll:.5}, reference {wanted:.5}");
    assert!((nll - wanted).abs() < BYTES_NLL_TOLERANCE, "{name} on {device}: {nll} beside {wanted}");
}

pub type Events = Arc<Mutex<Vec<Event>>>;

pub struct Collect(pub Events);

impl Sink for Collect {
    fn event(&mut self, event: Event) -> Flow {
        self.0.lock().expect("no sink panics").push(event);
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

pub fn add(engine: &mut Engine, request: Request) -> Events {
    let events = Events::default();
    engine.add(request, Box::new(Collect(events.clone())));
    events
}

pub fn tokens(events: &[Event]) -> Vec<TokenId> {
    let id = |event: &Event| match event {
        Event::Token { id, .. } => Some(*id),
        _ => None,
    };
    events.iter().filter_map(id).collect()
}

/// An engine for a model in the cache folder.
pub fn engine(file: &str, kv_type: KvType, mut backend: Box<dyn Backend>) -> Engine {
    let config = EngineConfig {
        max_num_seqs: 16,
        max_num_batched_tokens: 64,
        max_model_len: 512,
        kv_type,
        num_blocks: 128,
        max_logit_rows: 16,
        ..EngineConfig::default()
    };
    let gguf = Gguf::open(&model_path(file)).unwrap_or_else(|error| panic!("{error}"));
    let model_config = ModelConfig::from_gguf(&gguf).unwrap_or_else(|error| panic!("{error}"));
    let checkpoint = Checkpoint::Gguf(gguf);
    let limits = config.state_limits();
    let model = Model::load(model_config, limits, &checkpoint, backend.as_mut(), &mut |_| {});
    Engine::new(config, model.unwrap_or_else(|error| panic!("{error}")), backend, (1, 2))
}

/// A model that `scripts/models.sh` has fetched.
pub fn model_path(file: &str) -> PathBuf {
    let cache = std::env::var_os("FULLBORE_CACHE").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/fullbore");
    let path = cache.unwrap_or_else(home).join("models").join(file);
    assert!(path.exists(), "{} is missing: run `make test`, which fetches the models", path.display());
    path
}
