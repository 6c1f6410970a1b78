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
use serde_json::Value;

/// A reference whose two best logits are nearer than this has not decided.
const REFERENCE_GAP: f64 = 0.05;
/// The same for llama.cpp, which rounds activations to eight bits.
const LLAMA_CPP_GAP: f64 = 0.5;
const NLL_TOLERANCE: f64 = 0.005;

pub const MODELS: [(&str, &str, &str); 2] = [
    ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2", include_str!("golden/smollm2.json")),
    ("gemma-3-270m-Q4_K_M.gguf", "gemma3", include_str!("golden/gemma3.json")),
];

#[test]
fn the_cpu_follows_both_references() {
    for (file, name, golden) in MODELS {
        let backend = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        follow(file, name, golden, Box::new(backend), WHOLE);
    }
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
    let golden: Value = serde_json::from_str(golden).expect("goldens are JSON");
    let passage = ids(&golden["passage"]);
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

/// How much of a golden is followed beside its passage: its first cases, and so many tokens of each.
#[derive(Clone, Copy)]
pub struct Share {
    pub num_cases: usize,
    pub max_tokens: u32,
}

pub const WHOLE: Share = Share { num_cases: usize::MAX, max_tokens: 48 };

/// Runs cases of a golden at once, and its passage, on `backend`.
pub fn follow(file: &str, name: &str, golden: &str, backend: Box<dyn Backend>, share: Share) {
    let golden: Value = serde_json::from_str(golden).expect("goldens are JSON");
    let device = backend.info().id.clone();
    let mut engine = engine(file, KvType::F16, backend);
    let passage = ids(&golden["passage"]);
    let request = Request { prompt: passage.clone(), prompt_logprobs: Some(0), ..Request::default() };
    let passage_events = add(&mut engine, request);
    let cases = golden["cases"].as_array().expect("cases");
    let cases = &cases[..cases.len().min(share.num_cases)];
    let request = |case: &Value| Request { max_tokens: share.max_tokens, ..greedy(&ids(&case["prompt"])) };
    let events: Vec<Events> = cases.iter().map(|case| add(&mut engine, request(case))).collect();
    while engine.step().expect("the device is there") {}
    engine.check();

    let nll = mean_nll(&passage_events, passage.len());
    let wanted = golden["passage_nll"].as_f64().expect("a number");
    println!("{name} on {device}: mean NLL {nll:.5}, reference {wanted:.5}");
    assert!((nll - wanted).abs() < NLL_TOLERANCE, "{name} on {device}: mean NLL {nll}, reference {wanted}");

    let mut num_compared = 0;
    for (case, events) in cases.iter().zip(&events) {
        let actual = tokens(&events.lock().expect("no sink panics"));
        for (reference, gap) in [("reference", REFERENCE_GAP), ("llama_cpp", LLAMA_CPP_GAP)] {
            let gaps = case[format!("{reference}_gaps").as_str()].as_array().expect("gaps");
            let decided = gaps.iter().position(|value| value.as_f64().expect("a number") < gap).unwrap_or(gaps.len());
            let decided = decided.min(share.max_tokens as usize);
            let wanted = &ids(&case[reference])[..decided];
            assert_eq!(&actual[..decided], wanted, "{name} on {device} against {reference}: {}", case["text"]);
            num_compared += decided;
        }
    }
    assert!(num_compared > 10 * cases.len().min(5), "only {num_compared} tokens were decided enough to compare");
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

pub fn greedy(prompt: &[TokenId]) -> Request {
    Request { prompt: prompt.to_vec(), max_tokens: 48, ..Request::default() }
}

fn ids(value: &Value) -> Vec<TokenId> {
    let id = |value: &Value| TokenId(value.as_u64().expect("an id") as u32);
    value.as_array().expect("ids").iter().map(id).collect()
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
