//! Tiny random models of every family in Hugging Face's layout against `transformers` in float32: log-probabilities of
//! a prompt, greedy ids, and the bits of a prompt in chunks. Then: what a config.json is refused for. Goldens:
//! `golden/tiny/`, by `golden/tiny.py`.

use std::path::{Path, PathBuf};

use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::format::safetensors::SafetensorsDir;
use fullbore_engine::model::config::{Family, RopeScaling};
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Event, Request, TokenId, TokenLogprobs};
use serde_json::{Value, json};

use crate::golden::{add, tokens};

const FAMILIES: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "gemma3"];
/// The cache holds K and V in f16; `transformers` holds them in f32.
const LOGPROB_TOLERANCE: f64 = 2e-3;
/// A reference whose two best logits are nearer than this has not decided.
const REFERENCE_GAP: f64 = 0.01;
const VOCAB_SIZE: usize = 128;

#[test]
fn every_family_agrees_with_transformers() {
    let mut num_decided = 0;
    for name in FAMILIES {
        let expected = json_file(&folder(name).join("expected.json"));
        let events = run(name, &ids(&expected["prompt"]), 64);
        let rows = rows(&events);
        let wanted = numbers(&expected["logprobs"]);
        let worst = wanted.iter().zip(&rows).map(|(wanted, row)| (wanted - f64::from(row.logprob)).abs());
        let mut worst = worst.fold(0.0, f64::max);
        let last_rows = expected["last_rows"].as_array().expect("rows");
        // The first token that was generated brings the row of the last prompt position.
        for (wanted, row) in last_rows.iter().rev().zip(rows[..=wanted.len()].iter().rev()) {
            let mut actual = [f64::NAN; VOCAB_SIZE];
            row.top.iter().for_each(|(id, logprob)| actual[id.0 as usize] = f64::from(*logprob));
            let wanted = numbers(wanted);
            assert_eq!((wanted.len(), row.top.len()), (VOCAB_SIZE, VOCAB_SIZE));
            worst = wanted.iter().zip(actual).map(|(wanted, actual)| (wanted - actual).abs()).fold(worst, f64::max);
        }
        println!("{name}: log-probabilities differ by {worst:.1e} at most");
        assert!(worst < LOGPROB_TOLERANCE, "{name}: log-probabilities differ by {worst}");

        let gaps = numbers(&expected["gaps"]);
        let decided = gaps.iter().position(|gap| *gap < REFERENCE_GAP).unwrap_or(gaps.len());
        assert_eq!(tokens(&events)[..decided], ids(&expected["greedy"])[..decided], "{name}");
        num_decided += decided;
    }
    assert!(num_decided > 40, "only {num_decided} tokens were decided enough to compare");
}

#[test]
fn chunks_give_the_same_bits() {
    for name in FAMILIES {
        let prompt = ids(&json_file(&folder(name).join("expected.json"))["prompt"]);
        let whole = run(name, &prompt, 64);
        assert_eq!(run(name, &prompt, 5), whole, "{name}");
        assert_eq!(run(name, &prompt, 1), whole, "{name}");
    }
}

#[test]
fn configs_are_read_as_meant() {
    let llama = ModelConfig::from_json(&config("llama")).expect("a config");
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 32.0 };
    assert_eq!((llama.family, &llama.rope.scaling), (Family::Llama, &scaling));
    assert!(folder("llama").join("model-00002-of-00002.safetensors").is_file(), "llama is to lie in two shards");
    let mistral = ModelConfig::from_json(&config("mistral")).expect("a config");
    assert_eq!((mistral.family, mistral.windows), (Family::Llama, vec![Some(8), Some(8)]));
    let qwen3 = ModelConfig::from_json(&config("qwen3")).expect("a config");
    assert_eq!((qwen3.head_dim, qwen3.windows), (32, vec![None, Some(8)]));
    let gemma = ModelConfig::from_json(&config("gemma3")).expect("a config");
    let local = Some(8);
    assert_eq!(gemma.windows, [local, local, local, local, local, None, local]);
    assert_eq!(gemma.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(gemma.local_rope.map(|rope| rope.base), Some(1000.0));
}

/// The same models as `transformers` wrote them before its version 5.
#[test]
fn older_configs_say_the_same() {
    let changes: [(&str, &[&str], Value); 5] = [
        (
            "llama",
            &["rope_parameters"],
            json!({"rope_theta": 10000.0, "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }}),
        ),
        ("mistral", &["rope_parameters", "layer_types"], json!({"rope_theta": 5000.0})),
        (
            "qwen2",
            &["rope_parameters", "layer_types"],
            json!({"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 8}),
        ),
        ("qwen3", &["rope_parameters", "layer_types"], json!({"rope_theta": 50000.0})),
        (
            "gemma3",
            &["rope_parameters", "layer_types"],
            json!({"rope_theta": 100000.0, "rope_local_base_freq": 1000.0, "sliding_window_pattern": 6,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ),
    ];
    for (name, removed, added) in changes {
        let newer = config(name);
        let mut older = newer.clone();
        let fields = older.as_object_mut().expect("an object");
        removed.iter().for_each(|key| drop(fields.shift_remove(*key)));
        fields.extend(added.as_object().expect("an object").clone());
        let [older, newer] = [older, newer].map(|config| ModelConfig::from_json(&config).expect("a config"));
        assert_eq!(older, newer, "{name}");
    }
}

#[test]
fn what_would_change_the_numbers_is_refused_by_name() {
    let cases: &[(&str, Value, &[&str])] = &[
        ("mistral", json!({"architectures": ["MixtralForCausalLM"]}), &["MixtralForCausalLM", "MoE"]),
        ("qwen3", json!({"architectures": ["Qwen3MoeForCausalLM"]}), &["Qwen3MoeForCausalLM", "MoE"]),
        (
            "gemma3",
            json!({"architectures": ["Gemma3ForConditionalGeneration"]}),
            &["Gemma3ForConditionalGeneration", "vision"],
        ),
        ("llama", json!({"architectures": ["MambaForCausalLM"]}), &["MambaForCausalLM"]),
        ("llama", json!({"architectures": []}), &["architectures"]),
        ("llama", json!({"quantization_config": {"quant_method": "fp8"}}), &["FP8", "quantization_config"]),
        ("llama", json!({"quantization_config": {"quant_method": "awq", "bits": 4}}), &["AWQ", "quantization_config"]),
        ("llama", json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), &["GPTQ"]),
        ("qwen2", json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}), &["yarn"]),
        ("qwen2", json!({"rope_parameters": null, "rope_scaling": {"type": "yarn", "factor": 4.0}}), &["yarn"]),
        ("llama", json!({"rope_parameters": {"rope_type": "linear"}}), &["factor"]),
        ("llama", json!({"rope_parameters": {"rope_type": "linear", "factor": 0}}), &["factor"]),
        (
            "gemma3",
            json!({"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1000.0}}}),
            &["yarn"],
        ),
        ("llama", json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor"]),
        ("llama", json!({"mlp_bias": true}), &["mlp_bias"]),
        ("llama", json!({"attention_bias": true}), &["attention_bias"]),
        ("qwen3", json!({"attention_bias": true}), &["attention_bias"]),
        ("gemma3", json!({"attention_bias": true}), &["attention_bias"]),
        ("gemma3", json!({"final_logit_softcapping": 30.0}), &["final_logit_softcapping"]),
        ("gemma3", json!({"use_bidirectional_attention": true}), &["use_bidirectional_attention"]),
        ("llama", json!({"hidden_act": "relu"}), &["activation relu"]),
        ("qwen3", json!({"layer_types": ["full_attention"]}), &["layer_types"]),
        ("qwen3", json!({"layer_types": ["full_attention", "linear_attention"]}), &["layer_types"]),
    ];
    refused(cases);
}

#[test]
fn numbers_out_of_range_are_refused_by_name() {
    let cases: &[(&str, Value, &[&str])] = &[
        ("llama", json!({"num_attention_heads": 0}), &["number of heads", "is 0"]),
        ("llama", json!({"num_attention_heads": 0, "head_dim": null}), &["number of heads", "is 0"]),
        ("llama", json!({"num_key_value_heads": 0}), &["number of KV heads", "is 0"]),
        ("llama", json!({"num_key_value_heads": 3}), &["number of KV heads", "is 3 for 4 heads"]),
        ("llama", json!({"num_key_value_heads": 8}), &["number of KV heads", "is 8"]),
        ("llama", json!({"num_hidden_layers": 0}), &["number of layers", "is 0"]),
        ("llama", json!({"num_hidden_layers": 4_000_000_000_u32}), &["number of layers", "4000000000"]),
        ("llama", json!({"num_hidden_layers": 5_000_000_000_u64}), &["num_hidden_layers"]),
        ("qwen3", json!({"num_hidden_layers": 4_000_000_000_u32, "layer_types": null}), &["number of layers"]),
        ("llama", json!({"num_hidden_layers": -1}), &["num_hidden_layers"]),
        ("llama", json!({"num_hidden_layers": null}), &["num_hidden_layers"]),
        ("llama", json!({"hidden_size": 4_000_000_000_u32}), &["width", "4000000000"]),
        ("llama", json!({"hidden_size": "64"}), &["hidden_size"]),
        ("llama", json!({"intermediate_size": 0}), &["feed-forward width"]),
        ("llama", json!({"vocab_size": 0}), &["vocabulary size"]),
        ("llama", json!({"head_dim": 0}), &["head size"]),
        ("llama", json!({"head_dim": 15}), &["head size", "odd"]),
        ("llama", json!({"rms_norm_eps": null}), &["rms_norm_eps"]),
        ("llama", json!({"rms_norm_eps": -1.0}), &["norm epsilon"]),
        ("llama", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}), &["rope base"]),
        ("gemma3", json!({"query_pre_attn_scalar": 0}), &["scale"]),
        ("mistral", json!({"sliding_window": 1.5}), &["sliding_window"]),
        ("llama", json!({"max_position_embeddings": 0}), &["context length"]),
    ];
    refused(cases);
}

/// Each family's config with some fields changed; the sentence must have every one of the words.
fn refused(cases: &[(&str, Value, &[&str])]) {
    for (name, changes, words) in cases {
        let mut config = config(name);
        config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        let Err(error) = ModelConfig::from_json(&config) else { panic!("{name} with {changes} was taken") };
        let sentence = error.to_string();
        assert!(words.iter().all(|word| sentence.contains(word)), "{name} with {changes}: {sentence}");
    }
}

#[test]
fn weights_of_another_shape_are_refused_by_name() {
    let dir = SafetensorsDir::open(&folder("llama")).expect("a folder");
    let config = ModelConfig::from_json(dir.config_json()).expect("a config");
    let mut checkpoint = Checkpoint::Safetensors { dir, family: config.family };
    let cases = [
        (ModelConfig { ffn_dim: 64, ..config.clone() }, "blk.0.ffn_gate.weight"),
        (ModelConfig { num_layers: 3, windows: vec![None; 3], ..config.clone() }, "blk.2.attn_norm.weight"),
        (ModelConfig { vocab_size: 256, ..config }, "token_embd.weight"),
    ];
    for (config, tensor) in cases {
        let mut backend = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        let limits = EngineConfig::default().state_limits();
        let Err(error) = Model::load(config, limits, &mut checkpoint, &mut backend, &mut |_| {}) else {
            panic!("weights without a right {tensor} were taken")
        };
        assert!(error.to_string().contains(tensor), "{error}");
    }
}

/// All events of a greedy request with whole rows of log-probabilities, its prompt in chunks of
/// `max_num_batched_tokens`.
fn run(name: &str, prompt: &[TokenId], max_num_batched_tokens: u32) -> Vec<Event> {
    let config = EngineConfig {
        max_num_seqs: 1,
        max_num_batched_tokens,
        max_model_len: 64,
        block_size: 4,
        num_blocks: 16,
        max_logit_rows: max_num_batched_tokens,
        prefix_cache: false,
        ..EngineConfig::default()
    };
    config.check().expect("a valid config");
    let dir = SafetensorsDir::open(&folder(name)).unwrap_or_else(|error| panic!("{error}"));
    let model_config = ModelConfig::from_json(dir.config_json()).unwrap_or_else(|error| panic!("{error}"));
    let mut checkpoint = Checkpoint::Safetensors { dir, family: model_config.family };
    let mut backend = Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started"));
    let limits = config.state_limits();
    let model = Model::load(model_config, limits, &mut checkpoint, backend.as_mut(), &mut |_| {});
    let mut engine = Engine::new(config, model.unwrap_or_else(|error| panic!("{error}")), backend, (1, 2));
    let num_top = Some(VOCAB_SIZE as u32);
    let prompt = prompt.to_vec();
    let request = Request { prompt, max_tokens: 12, logprobs: num_top, prompt_logprobs: num_top, ..Request::default() };
    let events = add(&mut engine, request);
    while engine.step().expect("the cpu is never lost") {}
    engine.check();
    let events = events.lock().expect("no sink panics").clone();
    assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
    events
}

/// One entry for each token after the first, prompt or generated.
fn rows(events: &[Event]) -> Vec<TokenLogprobs> {
    let rows = |event: &Event| match event {
        Event::Prompt(rows) => rows.clone(),
        Event::Token { logprobs, .. } => logprobs.iter().cloned().collect(),
        Event::Finished { .. } => Vec::new(),
    };
    events.iter().flat_map(rows).collect()
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny").join(name)
}

fn config(name: &str) -> Value {
    json_file(&folder(name).join("config.json"))
}

fn json_file(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("goldens are JSON")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|number| number.as_f64().expect("a number")).collect()
}

fn ids(value: &Value) -> Vec<TokenId> {
    let id = |value: &Value| TokenId(value.as_u64().expect("an id") as u32);
    value.as_array().expect("ids").iter().map(id).collect()
}
