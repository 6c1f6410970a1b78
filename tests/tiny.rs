//! Tiny random models of every family in Hugging Face's layout against `transformers` in float32: log-probabilities of
//! a prompt, greedy ids, and the bits of a prompt in chunks. Then: what a config.json is refused for. Goldens:
//! `golden/tiny/`, by `golden/tiny.py`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::backend::{Backend, LoadError, RowSource, WeightSpec};
use fullbore_engine::batch::PackedBatch;
use fullbore_engine::batch::attention::AttentionPlan;
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::format::gguf::Gguf;
use fullbore_engine::format::quant::dequantize_row;
use fullbore_engine::format::safetensors::SafetensorsDir;
use fullbore_engine::model::config::{Family, RopeConfig, RopeScaling};
use fullbore_engine::model::{Checkpoint, Inputs, Model, ModelConfig, Weights};
use fullbore_engine::op::{AddNorm, NONE, Op, RopeStyle, SampleRow};
use fullbore_engine::request::{Event, MAX_LOGPROBS, Request, SamplingParams, TokenId, TokenLogprobs, token_mask};
use fullbore_engine::tensor::{Weight, WeightFormat};
use serde_json::{Value, json};

use crate::gguf_file::{GgufFile, array, f32, text, typed, u32};
use crate::golden::{add, tokens};

pub const FAMILIES: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "gemma3"];

/// How far a device may be from `transformers`.
pub struct Tolerance {
    /// `transformers` holds K and V in f32, our cache in f16; that alone makes differences near 1e-3 here.
    pub f32_cache: f64,
    /// With K and V rounded to f16; a value on the edge may still round the other way.
    pub f16_cache: f64,
    /// A reference whose two best logits are nearer than this has not decided.
    pub gap: f64,
}

/// Of what computes in f32.
pub const EXACT: Tolerance = Tolerance { f32_cache: 2e-3, f16_cache: 4e-4, gap: 0.01 };
/// Of products of f16; what a config that is a little wrong does is still a multiple of it.
pub const OF_HALVES: Tolerance = Tolerance { f32_cache: 6e-3, f16_cache: 6e-3, gap: 0.015 };
const VOCAB_SIZE: usize = 128;

#[test]
fn every_family_agrees_with_transformers() {
    assert_every_family_agrees(&EXACT, &|_| cpu());
}

/// On what `open` gives for so many layers, anew for each.
pub fn assert_every_family_agrees(tolerance: &Tolerance, open: &dyn Fn(u32) -> Box<dyn Backend>) {
    let mut num_decided = 0;
    for name in FAMILIES {
        let expected = expected(name);
        let (config, checkpoint) = read(name, |_| {});
        let backend = open(config.num_layers);
        let events = run_checkpoint(config, checkpoint, greedy(&ids(&expected["prompt"])), 64, backend);
        let (chosen, rows) = differences(&expected, &events);
        println!("{name}: log-probabilities differ by {chosen:.1e} from f32, by {rows:.1e} from K and V in f16");
        assert!(chosen < tolerance.f32_cache, "{name}: log-probabilities differ by {chosen} from those in f32");
        assert!(rows < tolerance.f16_cache, "{name}: log-probabilities differ by {rows} from those with f16 K and V");

        let gaps = numbers(&expected["gaps"]);
        let decided = gaps.iter().position(|gap| *gap < tolerance.gap).unwrap_or(gaps.len());
        assert_eq!(tokens(&events)[..decided], ids(&expected["greedy"])[..decided], "{name}");
        num_decided += decided;
    }
    assert!(num_decided > 50, "only {num_decided} tokens were decided enough to compare");
}

/// What the goldens are worth: each part of a config, a little wrong, goes far beyond the tolerances.
#[test]
fn a_config_that_is_a_little_wrong_disagrees() {
    let changes: [(&str, &str, Change); 14] = [
        ("llama", "no scaling", |config| config.rope.scaling = RopeScaling::None),
        ("llama", "interleaved pairs", |config| config.rope_style = RopeStyle::Interleaved),
        ("llama", "norm epsilon", |config| config.norm_eps = 1e-2),
        ("mistral", "no window", |config| config.windows.fill(None)),
        ("mistral", "a window too long by one", |config| config.windows.fill(Some(9))),
        ("mistral", "a window in one layer", |config| config.windows[0] = None),
        ("qwen2", "no scaling", |config| config.rope.scaling = RopeScaling::None),
        ("qwen2", "scale of scores", |config| config.attention_scale *= 1.05),
        ("qwen3", "windows in the other layer", |config| config.windows.reverse()),
        ("qwen3", "rope base", |config| config.rope.base = 10_000.0),
        ("gemma3", "scale of scores", |config| config.attention_scale = 0.25),
        ("gemma3", "one base for all layers", |config| config.local_rope = None),
        ("gemma3", "no scaling of the global layer", |config| config.rope.scaling = RopeScaling::None),
        ("gemma3", "no global layer", |config| config.windows.fill(Some(8))),
    ];
    for (name, wrong, change) in changes {
        let expected = expected(name);
        let events = run(name, &ids(&expected["prompt"]), 64, change);
        let (chosen, rows) = differences(&expected, &events);
        println!("{name} with wrong {wrong}: differs by {chosen:.1e} and {rows:.1e}");
        assert!(chosen > 2.0 * OF_HALVES.f32_cache && rows > 2.0 * OF_HALVES.f16_cache, "{name}: {wrong} goes unseen");
    }
}

pub type Change = fn(&mut ModelConfig);

/// The largest difference of a prompt token's log-probability, and of the likeliest ones in the prompt's last rows.
fn differences(expected: &Value, events: &[Event]) -> (f64, f64) {
    let rows = rows(events);
    let wanted = numbers(&expected["logprobs"]);
    let chosen = wanted.iter().zip(&rows).map(|(wanted, row)| (wanted - f64::from(row.logprob)).abs());
    let mut worst_row = 0.0;
    let last_rows = expected["last_rows"].as_array().expect("rows");
    // The first token that was generated brings the row of the last prompt position.
    for (wanted_row, row) in last_rows.iter().rev().zip(rows[..=wanted.len()].iter().rev()) {
        let wanted_row = numbers(wanted_row);
        assert_eq!((wanted_row.len(), row.top.len()), (VOCAB_SIZE, MAX_LOGPROBS as usize));
        let differences = row.top.iter().map(|(id, logprob)| (wanted_row[id.0 as usize] - f64::from(*logprob)).abs());
        worst_row = differences.fold(worst_row, f64::max);
    }
    (chosen.fold(0.0, f64::max), worst_row)
}

#[test]
fn chunks_give_the_same_bits() {
    for name in FAMILIES {
        let prompt = ids(&expected(name)["prompt"]);
        let whole = run(name, &prompt, 64, |_| {});
        for chunk in [5, 1] {
            assert!(run(name, &prompt, chunk, |_| {}) == whole, "{name} in chunks of {chunk}");
        }
    }
}

/// A model with real logits, in chunks and whole: the same draws, and each parameter does what it says.
#[test]
fn sampling_parameters_act_on_a_model() {
    let prompt = ids(&expected("llama")["prompt"]);
    let generate = |chunk: u32, sampling: SamplingParams| {
        let request = Request { prompt: prompt.clone(), max_tokens: 24, sampling, ..Request::default() };
        tokens(&run_request("llama", request, chunk, |_| {}))
    };
    let default = SamplingParams::default;
    let drawn = SamplingParams { temperature: 1.0, top_p: 0.9, seed: 5, presence_penalty: 0.7, ..default() };
    let whole = generate(64, drawn.clone());
    assert_eq!(generate(5, drawn.clone()), whole);
    assert_ne!(generate(64, SamplingParams { seed: 6, ..drawn }), whole);
    let forced = SamplingParams { temperature: 1.0, logit_bias: vec![(TokenId(77), 100.0)], ..default() };
    assert_eq!(generate(64, forced), [TokenId(77); 24]);
    let allowed = [3, 50, 127].map(TokenId);
    let mask = Some(token_mask(allowed, VOCAB_SIZE as u32));
    let masked = generate(64, SamplingParams { temperature: 2.0, allowed_tokens: mask.clone(), ..default() });
    assert!(masked.iter().all(|token| allowed.contains(token)) && masked.iter().any(|token| *token != masked[0]));
    // Each choice costs more than logits differ, so that the three take turns.
    let turns = SamplingParams { frequency_penalty: 100.0, allowed_tokens: mask.clone(), ..default() };
    for three in generate(64, turns).chunks_exact(3) {
        assert!(allowed.iter().all(|token| three.contains(token)), "{three:?}");
    }
    // What was generated once is never taken while something new is left; the prompt does not count.
    let once = generate(64, SamplingParams { presence_penalty: 100.0, ..default() });
    assert!((1..24).all(|at| !once[..at].contains(&once[at])), "{once:?}");
    let fresh = generate(64, SamplingParams { repetition_penalty: 100.0, ..default() });
    let known = |at: usize| prompt.iter().chain(&fresh[..at]).any(|token| *token == fresh[at]);
    let num_known = (0..24).filter(|at| known(*at)).count();
    assert_eq!(num_known, 0, "{fresh:?} after {prompt:?}");
}

/// The same weights and the same config in the words of GGUF, as converters write them. Only Gemma's scale of scores
/// has none there.
#[test]
fn the_same_models_as_gguf_give_the_same() {
    for name in FAMILIES {
        let expected = expected(name);
        let prompt = ids(&expected["prompt"]);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.gguf"));
        std::fs::write(&path, as_gguf(name).bytes()).expect("a temporary file");
        let file = Gguf::open(&path).unwrap_or_else(|error| panic!("{error}"));
        let mut config = ModelConfig::from_gguf(&file).unwrap_or_else(|error| panic!("{error}"));
        if name == "gemma3" {
            config.attention_scale = (1.0 / 24f64.sqrt()) as f32;
        }
        let events = run_checkpoint(config, Checkpoint::Gguf(file), greedy(&prompt), 64, cpu());
        let (chosen, rows) = differences(&expected, &events);
        println!(
            "{name} as GGUF: log-probabilities differ by {chosen:.1e} from f32, by {rows:.1e} from K and V in f16"
        );
        assert!(chosen < EXACT.f32_cache && rows < EXACT.f16_cache, "{name} as GGUF differs by {chosen} and {rows}");
        if !is_permuted(name) {
            assert!(events == run(name, &prompt, 64, |_| {}), "{name}: not the bits of the folder");
        }
    }
}

/// What files of mixed formats are to us: where neighbours differ, each matrix writes its own columns of the product.
#[test]
fn matrices_of_different_formats_give_the_same() {
    for name in FAMILIES {
        let prompt = ids(&expected(name)["prompt"]);
        let mut file = as_gguf(name);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-mixed.gguf"));
        std::fs::write(&path, file.bytes()).expect("a temporary file");
        let alike = run_gguf(&path, &prompt);
        for (name, _, number, bytes) in &mut file.tensors {
            if ["attn_k.weight", "ffn_up.weight"].iter().any(|part| name.ends_with(part)) {
                let format = if *number == 1 { WeightFormat::F16 } else { WeightFormat::BF16 };
                let mut values = vec![0.0; bytes.len() / 2];
                dequantize_row(format, bytes, &mut values);
                (*number, *bytes) = (0, values.iter().flat_map(|value| value.to_le_bytes()).collect());
            }
        }
        std::fs::write(&path, file.bytes()).expect("a temporary file");
        assert!(run_gguf(&path, &prompt) == alike, "{name}: k and up in f32 are not the bits of all in one format");
        // q, k and v apart, gate and up apart.
        assert_eq!(num_ops(Checkpoint::Gguf(Gguf::open(&path).expect("a file")), None), (12, 5), "{name}");
    }
}

#[test]
fn weights_packed_while_they_are_loaded_say_nearly_the_same() {
    for name in FAMILIES {
        let expected = expected(name);
        let error = |to| {
            let dir = SafetensorsDir::open(&folder(name)).unwrap_or_else(|error| panic!("{error}"));
            let config = ModelConfig::from_json(dir.config_json()).unwrap_or_else(|error| panic!("{error}"));
            let of = Arc::new(Checkpoint::Safetensors { dir, family: config.family });
            let checkpoint = Checkpoint::Quantized { of, to };
            let (chosen, _) = differences(
                &expected,
                &run_checkpoint(config, checkpoint, greedy(&ids(&expected["prompt"])), 64, cpu()),
            );
            chosen
        };
        let (q8_0, q4_0) = (error(WeightFormat::Q8_0), error(WeightFormat::Q4_0));
        println!("{name}: log-probabilities differ by {q8_0:.1e} with q8_0, by {q4_0:.1e} with q4_0");
        assert!(q8_0 > EXACT.f32_cache && q8_0 < 0.1 && q4_0 > q8_0 && q4_0 < 1.5, "{name}: {q8_0}, {q4_0}");
        let packed = |to| Bundle::open(&folder(name)).expect("it opens").quantized(to).expect("it has floats");
        assert!(packed(WeightFormat::Q4_0).total_bytes < packed(WeightFormat::Q8_0).total_bytes);
        let error = packed(WeightFormat::Q8_0).quantized(WeightFormat::Q8_0).err().expect("it is packed");
        assert!(error.to_string().contains("no float weights"), "{error}");
    }
}

fn run_gguf(path: &Path, prompt: &[TokenId]) -> Vec<Event> {
    let file = Gguf::open(path).unwrap_or_else(|error| panic!("{error}"));
    let config = ModelConfig::from_gguf(&file).unwrap_or_else(|error| panic!("{error}"));
    run_checkpoint(config, Checkpoint::Gguf(file), greedy(prompt), 64, cpu())
}

/// Every dispatch costs a device time of its own, whatever it computes.
#[test]
fn a_layer_is_nine_ops_in_every_family() {
    for name in FAMILIES {
        let dir = SafetensorsDir::open(&folder(name)).unwrap_or_else(|error| panic!("{error}"));
        let config = ModelConfig::from_json(dir.config_json()).expect("a config");
        let checkpoint = Checkpoint::Safetensors { dir, family: config.family };
        assert_eq!(num_ops(checkpoint, Some(config)), (9, 5), "{name}");
    }
}

/// Ops of a layer, and of a pass beside its layers. What the plan says of the weights is what they take.
fn num_ops(checkpoint: Checkpoint, config: Option<ModelConfig>) -> (usize, usize) {
    let config = config.unwrap_or_else(|| match &checkpoint {
        Checkpoint::Gguf(file) => ModelConfig::from_gguf(file).expect("a config"),
        _ => panic!("a folder comes with its config"),
    });
    let mut backend = Counting { sim: SimBackend::new(SimOptions::default()), weight_bytes: 0 };
    let planned = Weights::size_bytes(&config, &checkpoint, &backend);
    let num_layers = config.num_layers as usize;
    let num_windows = config.windows.iter().collect::<HashSet<_>>().len();
    let limits = EngineConfig::default().state_limits();
    let model = Model::load(config, limits, &checkpoint, &mut backend, &mut |_| {}).expect("it loads");
    assert_eq!(backend.weight_bytes, planned);
    let plan = AttentionPlan { items: vec![0, 3, 0, 0, 0, 3, NONE], ..AttentionPlan::default() };
    // A first chunk of three tokens, of which the last gets a row of logits.
    let batch = PackedBatch {
        ids: vec![1, 2, 3],
        positions: vec![0, 1, 2],
        slots: vec![16, 17, 18],
        attention: vec![plan; num_windows],
        table_updates: vec![0, 1],
        logit_rows: vec![2],
        sample_rows: vec![SampleRow { slot: 0, position: 3, ..SampleRow::IDLE }],
        extras: vec![0],
        ..PackedBatch::default()
    };
    let mut recording = model.recording();
    model.record(&Inputs::upload(&batch, &mut recording), &mut recording).expect("a row of logits");
    let is_first_of_layer = |op: &Op| matches!(op, Op::RmsNorm(_));
    let begin = recording.ops.iter().position(is_first_of_layer).expect("the first norm");
    let is_last_norm = |op: &Op| matches!(op, Op::AddNorm(AddNorm { rows: Some(_), .. }));
    let end = recording.ops.iter().position(is_last_norm).expect("the last norm");
    assert_eq!((end - begin) % num_layers, 0, "{:?}", recording.ops);
    ((end - begin) / num_layers, recording.ops.len() - (end - begin))
}

/// A simulator that packs weights as the cpu does, as far as their size goes.
struct Counting {
    sim: SimBackend,
    weight_bytes: u64,
}

impl Around for Counting {
    fn inner(&self) -> &dyn Backend {
        &self.sim
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut self.sim
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        self.weight_bytes += Around::weight_bytes(self, spec);
        // Across the matrices' ends, and not one byte more.
        let row_bytes = spec.format.row_bytes(spec.cols) as usize;
        let mut left = spec.rows as usize;
        while left > 0 {
            let rows = left.min(5);
            source.read_rows(&mut vec![0; rows * row_bytes]).expect("the rows of all matrices");
            left -= rows;
        }
        self.sim.load_weight(spec, source)
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        u64::from(spec.rows.div_ceil(32)) * 32 * spec.format.row_bytes(spec.cols)
    }
}

/// Whether converters reorder the rows of q and k, so that pairs that rotate together are neighbours.
fn is_permuted(name: &str) -> bool {
    matches!(name, "llama" | "mistral")
}

fn as_gguf(name: &str) -> GgufFile {
    let dir = SafetensorsDir::open(&folder(name)).unwrap_or_else(|error| panic!("{error}"));
    let config = ModelConfig::from_json(dir.config_json()).expect("a config");
    let family = if name == "mistral" { "llama" } else { name };
    let mut file = GgufFile { keys: gguf_keys(family, &config), tensors: Vec::new() };
    for info in dir.tensors() {
        let number = [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16].iter().position(|f| *f == info.format);
        let number = [0, 1, 30][number.expect("a format of safetensors")];
        let mut bytes = vec![0; info.size_bytes as usize];
        dir.rows(&info.name).expect("a tensor").read_rows(&mut bytes).expect("its rows");
        let gguf_name = gguf_name(&info.name, name == "gemma3");
        let mut entry = (gguf_name, vec![u64::from(info.cols), u64::from(info.rows)], number, bytes);
        if info.rows == 1 {
            // Vectors are f32 there, and Gemma's norms have their 1.
            let mut values = vec![0.0; info.cols as usize];
            dequantize_row(info.format, &entry.3, &mut values);
            let one = if name == "gemma3" { 1.0 } else { 0.0 };
            let bytes = values.iter().flat_map(|value| (value + one).to_le_bytes()).collect();
            entry = (entry.0, vec![u64::from(info.cols)], 0, bytes);
        } else if is_permuted(name) && ["attn_q.", "attn_k."].iter().any(|part| entry.0.contains(part)) {
            entry.3 = permuted(&entry.3, config.head_dim as usize, info.format.row_bytes(info.cols) as usize);
        }
        file.tensors.push(entry);
    }
    if matches!(config.rope.scaling, RopeScaling::Llama3 { .. }) {
        let plain = RopeConfig { scaling: RopeScaling::None, ..config.rope.clone() };
        let divisors = plain.frequencies().into_iter().zip(config.rope.frequencies());
        let bytes: Vec<u8> = divisors.flat_map(|(plain, scaled)| ((plain / scaled) as f32).to_le_bytes()).collect();
        file.tensors.push(("rope_freqs.weight".to_owned(), vec![bytes.len() as u64 / 4], 0, bytes));
    }
    file
}

/// Row r of a head's first half, then row r of its second, and so on.
fn permuted(bytes: &[u8], head_dim: usize, row_bytes: usize) -> Vec<u8> {
    let heads = bytes.chunks_exact(head_dim * row_bytes);
    let pairs = |head: &[u8]| {
        let (first, second) = head.split_at(head.len() / 2);
        let rows = first.chunks_exact(row_bytes).zip(second.chunks_exact(row_bytes));
        rows.flat_map(|(first, second)| [first, second].concat()).collect::<Vec<u8>>()
    };
    heads.flat_map(pairs).collect()
}

fn gguf_keys(family: &str, config: &ModelConfig) -> Vec<(String, Vec<u8>)> {
    let is_local: Vec<Vec<u8>> = config.windows.iter().map(|window| vec![u8::from(window.is_some())]).collect();
    let keys = [
        ("block_count", u32(config.num_layers)),
        ("embedding_length", u32(config.dim)),
        ("attention.head_count", u32(config.num_heads)),
        ("attention.head_count_kv", u32(config.num_kv_heads)),
        ("attention.key_length", u32(config.head_dim)),
        ("attention.value_length", u32(config.head_dim)),
        ("feed_forward_length", u32(config.ffn_dim)),
        ("attention.layer_norm_rms_epsilon", f32(config.norm_eps)),
        ("context_length", u32(config.max_positions)),
        ("rope.freq_base", f32(config.rope.base as f32)),
        ("attention.sliding_window", u32(config.windows.iter().flatten().copied().max().unwrap_or(0))),
    ];
    let mut keys: Vec<_> = keys.into_iter().map(|(key, value)| (format!("{family}.{key}"), value)).collect();
    keys.push(("general.architecture".to_owned(), typed(8, &text(family))));
    if let RopeScaling::Linear { factor } = config.rope.scaling {
        keys.push((format!("{family}.rope.scaling.type"), typed(8, &text("linear"))));
        keys.push((format!("{family}.rope.scaling.factor"), f32(factor as f32)));
    }
    if let Some(local) = &config.local_rope {
        keys.push((format!("{family}.rope.freq_base_swa"), f32(local.base as f32)));
    }
    // Gemma's pattern is what a file without a word on it has.
    if family == "qwen3" {
        keys.push((format!("{family}.attention.sliding_window_pattern"), array(7, &is_local)));
    }
    keys
}

fn gguf_name(name: &str, gemma: bool) -> String {
    let name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd");
    let name = name.replace("model.norm", "output_norm").replace("lm_head", "output");
    let parts = [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("post_attention_layernorm", if gemma { "post_attention_norm" } else { "ffn_norm" }),
    ];
    parts.iter().fold(name, |name, (theirs, ours)| name.replace(theirs, ours))
}

#[test]
fn configs_are_read_as_meant() {
    let llama = ModelConfig::from_json(&config("llama")).expect("a config");
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 32.0 };
    assert_eq!((llama.family, &llama.rope.scaling), (Family::Llama, &scaling));
    let with_window = json!({"sliding_window": 8});
    assert_eq!(ModelConfig::from_json(&changed("llama", &with_window)).expect("a config"), llama);
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
        let mut older = changed(name, &added);
        let fields = older.as_object_mut().expect("an object");
        removed.iter().for_each(|key| drop(fields.shift_remove(*key)));
        let [older, newer] = [older, config(name)].map(|config| ModelConfig::from_json(&config).expect("a config"));
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
            json!({"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}}),
            &["yarn"],
        ),
        ("gemma3", json!({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}), &["full_attention"]),
        ("gemma3", json!({"sliding_window": null}), &["sliding_window"]),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
            &["high_freq_factor"],
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
        let Err(error) = ModelConfig::from_json(&changed(name, changes)) else {
            panic!("{name} with {changes} was taken")
        };
        let sentence = error.to_string();
        assert!(words.iter().all(|word| sentence.contains(word)), "{name} with {changes}: {sentence}");
    }
}

#[test]
fn weights_of_another_shape_are_refused_by_name() {
    let dir = SafetensorsDir::open(&folder("llama")).expect("a folder");
    let config = ModelConfig::from_json(dir.config_json()).expect("a config");
    let checkpoint = Checkpoint::Safetensors { dir, family: config.family };
    let cases = [
        (ModelConfig { ffn_dim: 64, ..config.clone() }, "blk.0.ffn_gate.weight"),
        (ModelConfig { num_layers: 3, windows: vec![None; 3], ..config.clone() }, "blk.2.attn_norm.weight"),
        (ModelConfig { num_layers: 1, windows: vec![None; 1], ..config.clone() }, "model.layers.1."),
        (ModelConfig { vocab_size: 256, ..config.clone() }, "token_embd.weight"),
        // Parts that these families have and Llama has not.
        (ModelConfig { family: Family::Qwen2, ..config.clone() }, "blk.0.attn_q.bias"),
        (ModelConfig { family: Family::Qwen3, ..config.clone() }, "blk.0.attn_q_norm.weight"),
        (ModelConfig { family: Family::Gemma3, ..config }, "blk.0.attn_q_norm.weight"),
    ];
    for (config, tensor) in cases {
        let mut backend = CpuBackend::new(CpuOptions::default()).expect("threads can be started");
        let limits = EngineConfig::default().state_limits();
        let Err(error) = Model::load(config, limits, &checkpoint, &mut backend, &mut |_| {}) else {
            panic!("weights without a right {tensor} were taken")
        };
        assert!(error.to_string().contains(tensor), "{error}");
    }
}

/// All events of a greedy request with as many log-probabilities as there are; its prompt goes in chunks of
/// `max_num_batched_tokens`.
fn run(name: &str, prompt: &[TokenId], max_num_batched_tokens: u32, change: Change) -> Vec<Event> {
    run_request(name, greedy(prompt), max_num_batched_tokens, change)
}

fn greedy(prompt: &[TokenId]) -> Request {
    let (prompt, num_top) = (prompt.to_vec(), Some(MAX_LOGPROBS));
    Request { prompt, max_tokens: 12, logprobs: num_top, prompt_logprobs: num_top, ..Request::default() }
}

pub fn run_request(name: &str, request: Request, max_num_batched_tokens: u32, change: Change) -> Vec<Event> {
    let (config, checkpoint) = read(name, change);
    run_checkpoint(config, checkpoint, request, max_num_batched_tokens, cpu())
}

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started"))
}

fn read(name: &str, change: Change) -> (ModelConfig, Checkpoint) {
    let dir = SafetensorsDir::open(&folder(name)).unwrap_or_else(|error| panic!("{error}"));
    let mut config = ModelConfig::from_json(dir.config_json()).unwrap_or_else(|error| panic!("{error}"));
    change(&mut config);
    let checkpoint = Checkpoint::Safetensors { dir, family: config.family };
    (config, checkpoint)
}

fn run_checkpoint(
    model_config: ModelConfig,
    checkpoint: Checkpoint,
    request: Request,
    max_num_batched_tokens: u32,
    mut backend: Box<dyn Backend>,
) -> Vec<Event> {
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
    let limits = config.state_limits();
    let model = Model::load(model_config, limits, &checkpoint, backend.as_mut(), &mut |_| {});
    let mut engine = Engine::new(config, model.unwrap_or_else(|error| panic!("{error}")), backend, (1, 2));
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
        Event::Started { .. } | Event::Pooled(_) | Event::Finished { .. } => Vec::new(),
    };
    events.iter().flat_map(rows).collect()
}

pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny").join(name)
}

pub fn expected(name: &str) -> Value {
    json_file(&folder(name).join("expected.json"))
}

fn config(name: &str) -> Value {
    json_file(&folder(name).join("config.json"))
}

/// Its fields, with those of `changes` in place of its own.
fn changed(name: &str, changes: &Value) -> Value {
    let mut config = config(name);
    config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
    config
}

fn json_file(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("goldens are JSON")
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|number| number.as_f64().expect("a number")).collect()
}

pub fn ids(value: &Value) -> Vec<TokenId> {
    let id = |value: &Value| TokenId(value.as_u64().expect("an id") as u32);
    value.as_array().expect("ids").iter().map(id).collect()
}
