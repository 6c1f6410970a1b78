//! Whole models as a person serves them: the tiny folders over HTTP, files and folders that are not models, and
//! thousands of files and folders damaged at random, each of which is refused with a sentence or served. Needs nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use fullbore::api::{self, Endpoint, Generation, ServedModel};
use fullbore::args::{EngineArgs, ModelArgs};
use fullbore::http::access::Client;
use fullbore::start::{self, StartError};
use fullbore_engine::backend::RowSource;
use fullbore_engine::format::gguf::Gguf;
use fullbore_engine::model::{Checkpoint, ModelConfig};
use fullbore_engine::request::TokenId;
use fullbore_engine::tensor::WeightFormat;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::gguf_file::{GgufFile, array, f32, text, typed, u32};
use crate::http::{Harness, ids};
use crate::random::Random;

/// A reference whose two best logits are nearer than this has not decided.
const REFERENCE_GAP: f64 = 0.01;
/// `transformers` holds K and V in f32, our cache in f16.
const LOGPROB_TOLERANCE: f64 = 2e-3;

fn args(path: &Path, device: &str) -> EngineArgs {
    let model = ModelArgs::new(&path.display().to_string(), device);
    EngineArgs {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: Some(64),
        kv_memory: Some(4 << 20),
        ..EngineArgs::new(model)
    }
}

fn load(path: &Path) -> Result<ServedModel, StartError> {
    start::plan(&args(path, "cpu"), None)?.load()
}

fn refusal(path: &Path) -> String {
    match load(path) {
        Ok(_) => panic!("{} was taken", path.display()),
        Err(error) => error.to_string(),
    }
}

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny").join(name)
}

/// A folder of its own below Cargo's, empty.
fn fresh_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serving").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("a temporary folder");
    dir
}

fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// The folder of llama, in two shards, where a test may change it.
fn copy_of_llama(name: &str) -> PathBuf {
    let dir = fresh_dir(name);
    for entry in fs::read_dir(tiny("llama")).expect("a folder").flatten() {
        fs::copy(entry.path(), dir.join(entry.file_name())).expect("a copy");
    }
    dir
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|number| number.as_f64().expect("a number")).collect()
}

mod folders {
    use super::*;

    /// One prompt by its ids: greedy ids and log-probabilities of the prompt are those of `transformers`.
    fn follows_transformers(server: &Harness, name: &str) {
        let text = fs::read_to_string(tiny(name).join("expected.json")).expect("a golden");
        let expected: Value = serde_json::from_str(&text).expect("JSON");
        let ask = json!({"model": name, "prompt": expected["prompt"], "max_tokens": 12, "temperature": 0,
            "ignore_eos": true, "return_token_ids": true, "echo": true, "logprobs": 0});
        let reply = server.complete(ask);
        let choice = &reply["choices"][0];
        assert_eq!(choice["prompt_token_ids"], expected["prompt"], "{name}");
        let gaps = numbers(&expected["gaps"]);
        let decided = gaps.iter().position(|gap| *gap < REFERENCE_GAP).unwrap_or(gaps.len());
        assert_eq!(ids(&choice["token_ids"])[..decided], ids(&expected["greedy"])[..decided], "{name}");
        let wanted = numbers(&expected["logprobs"]);
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("a list");
        assert_eq!(logprobs.len(), 1 + wanted.len() + 12);
        for (logprob, wanted) in logprobs[1..].iter().zip(&wanted) {
            assert!((logprob.as_f64().expect("a number") - wanted).abs() < LOGPROB_TOLERANCE, "{name}: {logprob}");
        }
    }

    #[test]
    fn every_tiny_folder_is_served_with_all_that_lies_in_it() {
        for name in ["llama", "mistral", "qwen2", "qwen3", "gemma3"] {
            let model = load(&tiny(name)).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(model.stop_ids, [120, 122].map(TokenId), "{name}: what generation_config.json lists");
            let defaults = model.defaults;
            assert_eq!((defaults.temperature, defaults.top_p, defaults.top_k), (Some(0.5), Some(0.9), Some(20)));
            let server = Harness::serving(vec![model]);
            assert_eq!(server.get("/v1/models").ok()["data"][0]["id"], name);
            follows_transformers(&server, name);

            let chat = json!({"messages": [{"role": "user", "content": "the <|im_end|> cat"}], "max_tokens": 4,
                "return_token_ids": true, "ignore_eos": true});
            if name == "gemma3" {
                let error = server.post("/v1/chat/completions", &chat).error(400);
                assert!(error["message"].as_str().expect("text").contains("no chat template"), "{error}");
                continue;
            }
            // Wherever the template lies, its own markers are special tokens, and those of the message are text.
            let prompt = ids(&server.chat(chat)["prompt_token_ids"]);
            let special: Vec<u64> = prompt.into_iter().filter(|id| *id >= 120).collect();
            assert_eq!(special, [121, 122, 121], "{name}");
        }
    }

    #[test]
    fn what_lies_beside_the_weights_is_named_when_it_is_wrong() {
        let dir = copy_of_llama("beside");
        let check = |file: &str, text: &str, expected: &str| {
            let path = dir.join(file);
            let sound = fs::read(&path).expect("a file of the folder");
            if text.is_empty() {
                fs::remove_file(&path).expect("it is there")
            } else {
                write(&path, text)
            }
            let sentence = refusal(&dir);
            assert!(sentence.contains(expected), "{file}: {sentence}");
            write(&path, sound);
        };
        check("tokenizer.json", "", "tokenizer.json");
        check("tokenizer.json", "{}", "tokenizer.json: it has no \"model\"");
        check("tokenizer_config.json", r#"{"chat_template": "{% if %}"}"#, "chat template cannot be used");
        check("generation_config.json", r#"{"temperature": -1}"#, "default temperature is -1; it must be from 0 to 2");
        check("generation_config.json", r#"{"top_p": 0}"#, "default top_p is 0; it must be above 0 and at most 1");
        check("generation_config.json", r#"{"min_p": 1.5}"#, "default min_p is 1.5; it must be from 0 to 1");
        check("model-00002-of-00002.safetensors", "", "model-00002-of-00002.safetensors");
        load(&dir).unwrap_or_else(|error| panic!("whole again: {error}"));
    }

    #[test]
    fn an_adapter_is_refused_by_name() {
        let dir = fresh_dir("adapter");
        write(&dir.join("adapter_config.json"), r#"{"peft_type": "LORA"}"#);
        write(&dir.join("adapter_model.safetensors"), [2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']);
        let sentence = refusal(&dir);
        assert!(sentence.contains("LoRA"), "{sentence}");
    }

    #[test]
    fn more_memory_than_there_is_is_refused_before_loading() {
        let too_much = EngineArgs { kv_memory: Some(1 << 40), ..args(&tiny("llama"), "cpu") };
        let plan = start::plan(&too_much, None).unwrap_or_else(|error| panic!("{error}"));
        let Err(error) = plan.load() else { panic!("this machine has no TiB") };
        let sentence = error.to_string();
        assert!(sentence.contains("1024.0 GiB") && sentence.contains("--kv-memory"), "{sentence}");
        let too_wide = EngineArgs { max_num_seqs: 4096, block_size: 1, ..args(&tiny("llama"), "cpu") };
        assert!(start::plan(&too_wide, None).is_err_and(|error| error.to_string().contains("max_num_batched_tokens")));
    }
}

mod damaged {
    use super::*;

    /// A request of text and one of messages; what comes of them does not matter, that they end does.
    fn serve(runtime: &Runtime, model: ServedModel) {
        let bodies = [
            (Endpoint::Completions, json!({"prompt": "ab <s> c", "max_tokens": 3, "logprobs": 1, "echo": true})),
            (Endpoint::Chat, json!({"messages": [{"role": "user", "content": "hi <s>"}], "max_tokens": 3})),
        ];
        for (endpoint, body) in bodies {
            let Ok((mut answer, jobs)) = api::prepare(endpoint, &model, &Client::default(), &body) else { continue };
            let Ok(generation) = Generation::submit(&model, jobs, Instant::now(), None, None) else { continue };
            let _ = runtime.block_on(api::collect(&mut *answer, &model, generation));
        }
        assert_eq!(model.engine.stopped(), None, "the engine met a bug of its own");
        model.engine.shutdown();
    }

    /// Plans with the default limits, then loads with small ones and serves. Whether the model was taken.
    fn try_out(runtime: &Runtime, path: &Path) -> bool {
        let model = ModelArgs::new(&path.display().to_string(), "cpu");
        let planned = start::plan(&EngineArgs::new(model), None).map(|plan| plan.memory.to_string());
        match load(path) {
            Ok(model) => {
                serve(runtime, model);
                true
            }
            Err(error) => {
                let sentence = error.to_string();
                assert!(sentence.len() > 20 && sentence.len() < 2000, "{planned:?}, then {sentence:?}");
                false
            }
        }
    }

    fn rounds(count: u32) -> u32 {
        if std::env::var_os("FULLBORE_TEST_FULL").is_some() { 20 * count } else { count }
    }

    fn runtime() -> Runtime {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
    }

    impl GgufFile {
        /// A Llama or a Gemma of one layer that knows bytes.
        fn sound(family: &str) -> GgufFile {
            let pieces: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().collect();
            let pieces: Vec<String> =
                pieces.into_iter().chain((0..=255).map(|byte| format!("<0x{byte:02X}>"))).collect();
            let types = (0..pieces.len()).map(|id| if id < 3 { 3i32 } else { 6 });
            let key = |name: &str, value: Vec<u8>| (name.to_owned(), value);
            let of_family = |name: &str, value: Vec<u8>| (format!("{family}.{name}"), value);
            let keys = vec![
                key("general.architecture", typed(8, &text(family))),
                key("general.name", typed(8, &text("damaged"))),
                key("general.sampling.temp", f32(0.5)),
                key("tokenizer.ggml.model", typed(8, &text("llama"))),
                key("tokenizer.ggml.tokens", array(8, &pieces.iter().map(|piece| text(piece)).collect::<Vec<_>>())),
                key("tokenizer.ggml.scores", array(6, &vec![0f32.to_le_bytes().to_vec(); pieces.len()])),
                key(
                    "tokenizer.ggml.token_type",
                    array(5, &types.map(|id| id.to_le_bytes().to_vec()).collect::<Vec<_>>()),
                ),
                key("tokenizer.ggml.bos_token_id", u32(1)),
                key("tokenizer.ggml.eos_token_id", u32(2)),
                key("tokenizer.chat_template", typed(8, &text("<s>{{ messages[0].content }}"))),
                of_family("block_count", u32(1)),
                of_family("embedding_length", u32(32)),
                of_family("attention.head_count", u32(2)),
                of_family("attention.head_count_kv", array(5, &[1i32.to_le_bytes().to_vec()])),
                of_family("attention.key_length", u32(16)),
                of_family("attention.sliding_window", u32(8)),
                of_family("feed_forward_length", u32(48)),
                of_family("attention.layer_norm_rms_epsilon", f32(1e-5)),
                of_family("context_length", u32(128)),
                of_family("rope.freq_base", f32(10_000.0)),
                of_family("rope.dimension_count", u32(16)),
                of_family("rope.scaling.type", typed(8, &text("linear"))),
                of_family("rope.scaling.factor", f32(2.0)),
            ];
            GgufFile { keys, tensors: tensors(family, pieces.len() as u64) }
        }

        /// One thing changed: a key's value, a key gone or there twice, a tensor's entry or its values.
        fn damage(&mut self, random: &mut Random) {
            let index = random.below(self.keys.len() as u32) as usize;
            let tensor = random.below(self.tensors.len() as u32) as usize;
            match random.below(8) {
                0 => drop(self.keys.remove(index)),
                1 => self.tensors[tensor].2 = random.below(42),
                2 => self.tensors[tensor].1 = (0..random.between(1, 4)).map(|_| extreme(random)).collect(),
                3 => drop(self.tensors.remove(tensor)),
                4 => self.tensors[tensor].3.iter_mut().for_each(|byte| *byte = random.next() as u8),
                5 => self.tensors[tensor].0 = self.tensors[random.below(4) as usize].0.clone() + "x",
                _ => self.keys[index].1 = any_value(random, 0),
            }
        }
    }

    fn tensors(family: &str, vocab_size: u64) -> Vec<(String, Vec<u64>, u32, Vec<u8>)> {
        let matrices = [
            ("token_embd", 32, vocab_size),
            ("blk.0.attn_q", 32, 32),
            ("blk.0.attn_k", 32, 16),
            ("blk.0.attn_v", 32, 16),
            ("blk.0.attn_output", 32, 32),
            ("blk.0.ffn_gate", 32, 48),
            ("blk.0.ffn_up", 32, 48),
            ("blk.0.ffn_down", 48, 32),
        ];
        let norms: &[(&str, u64)] = match family {
            "gemma3" => &[("attn_q_norm", 16), ("attn_k_norm", 16), ("post_attention_norm", 32), ("post_ffw_norm", 32)],
            _ => &[],
        };
        let norms = norms.iter().chain(&[("attn_norm", 32), ("ffn_norm", 32)]);
        let norms = norms.map(|(name, width)| (format!("blk.0.{name}"), vec![*width]));
        let norms = norms.chain([("output_norm".to_owned(), vec![32])]);
        let tensors = matrices.map(|(name, cols, rows)| (name.to_owned(), vec![cols, rows])).into_iter().chain(norms);
        let with_bytes = tensors.map(|(name, dims): (String, Vec<u64>)| {
            let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
            let (_, mut rows) = checkpoint.open(&name, 1, 1).expect("random rows never fail");
            let mut bytes = vec![0; dims.iter().product::<u64>() as usize * 4];
            RowSource::read_rows(rows.as_mut(), &mut bytes).expect("random rows never fail");
            (name + ".weight", dims, 0, bytes)
        });
        with_bytes.collect()
    }

    fn extreme(random: &mut Random) -> u64 {
        let values = [0, 1, 2, 3, 16, 31, 32, 48, 1 << 10, 1 << 20, 1 << 28, u64::from(u32::MAX), 1 << 32, 1 << 63];
        values[random.below(values.len() as u32) as usize]
    }

    /// Any type, and among its values the extreme ones.
    fn any_value(random: &mut Random, depth: u32) -> Vec<u8> {
        let number = extreme(random);
        let floats = [0.0, -1.0, 1e-30, 1e30, f32::NAN, f32::INFINITY, 0.25, 1.0, 3.0];
        let texts = ["", "linear", "yarn", "none", "gpt2", "llama", "qwen2", "gemma3", "default", "{{ 1 ", "<s>", "é"];
        match random.below(10) {
            0..=2 => u32(number as u32),
            3 => typed(10, &number.to_le_bytes()),
            4 => typed(5, &(number as i32).wrapping_neg().to_le_bytes()),
            5..=6 => f32(floats[random.below(floats.len() as u32) as usize]),
            7 => typed(7, &[random.below(2) as u8]),
            8 if depth < 3 => {
                let element = any_value(random, depth + 1);
                let (number, value) = element.split_at(4);
                let number = number.try_into().map_or(0, u32::from_le_bytes);
                array(number, &vec![value.to_vec(); [0, 1, 2, 259][random.below(4) as usize]])
            }
            _ => typed(8, &text(texts[random.below(texts.len() as u32) as usize])),
        }
    }

    #[test]
    fn gguf_files_are_refused_with_a_sentence_or_served() {
        let (runtime, mut random) = (runtime(), Random::new(21));
        let path = fresh_dir("damaged-gguf").join("damaged.gguf");
        for family in ["llama", "gemma3"] {
            let sound = GgufFile::sound(family);
            write(&path, sound.bytes());
            assert!(try_out(&runtime, &path), "{family}: {}", refusal(&path));
            let mut num_served = 0;
            let count = rounds(400);
            for _ in 0..count {
                let mut file = sound.clone();
                (0..random.between(1, 2)).for_each(|_| file.damage(&mut random));
                write(&path, file.bytes());
                num_served += u32::from(try_out(&runtime, &path));
            }
            println!("{family}: {num_served} of {count} served");
            assert!((count / 20..count - count / 20).contains(&num_served), "{num_served} of {count} served");
        }
    }

    impl GgufFile {
        /// A key of the file's own family, set to a value.
        fn with(mut self, key: &str, value: Vec<u8>) -> GgufFile {
            let family = String::from_utf8_lossy(&self.keys[0].1[12..]).into_owned();
            let key = if key.contains("general.") { key.to_owned() } else { format!("{family}.{key}") };
            self.keys.retain(|(other, _)| *other != key);
            self.keys.push((key, value));
            self
        }
    }

    #[test]
    fn gguf_files_that_are_not_run_are_refused_by_name() {
        let path = fresh_dir("other-gguf").join("other.gguf");
        let check = |file: GgufFile, words: &[&str]| {
            write(&path, file.bytes());
            let sentence = refusal(&path);
            assert!(words.iter().all(|word| sentence.contains(word)), "{words:?}: {sentence}");
        };
        let llama = || GgufFile::sound("llama");
        check(llama().with("general.type", typed(8, &text("adapter"))), &["LoRA"]);
        check(llama().with("general.type", typed(8, &text("mmproj"))), &["vision"]);
        check(llama().with("general.type", typed(8, &text("imatrix"))), &["imatrix"]);
        for (architecture, reason) in [("qwen3moe", "MoE"), ("qwen2vl", "vision"), ("clip", "vision"), ("rwkv", "rwkv")]
        {
            let mut file = llama();
            file.keys[0].1 = typed(8, &text(architecture));
            check(file, &[architecture, reason]);
        }
        check(llama().with("expert_count", u32(8)), &["MoE"]);
        check(llama().with("rope.scaling.type", typed(8, &text("yarn"))), &["yarn"]);
        check(llama().with("rope.scaling.factor", f32(-2.0)), &["rope.scaling.factor", "positive"]);
        check(llama().with("rope.scaling.factor", f32(f32::NAN)), &["rope.scaling.factor", "positive"]);
        check(llama().with("final_logit_softcapping", f32(30.0)), &["final_logit_softcapping"]);
        check(llama().with("attention.value_length", u32(8)), &["values of 8 beside keys of 16"]);
        check(llama().with("attention.sliding_window_pattern", array(7, &[])), &["sliding_window_pattern"]);
        check(llama().with("general.sampling.temp", f32(f32::NAN)), &["temperature is NaN"]);
        check(llama().with("general.sampling.top_p", f32(0.0)), &["top_p is 0"]);
        let mut other = llama();
        other.tensors.push(("blk.0.attn_q.lora_a.weight".to_owned(), vec![4], 0, vec![0; 16]));
        check(other, &["blk.0.attn_q.lora_a.weight"]);
        let mut incomplete = GgufFile::sound("gemma3");
        incomplete.tensors.retain(|(name, ..)| !name.contains("attn_k_norm"));
        check(incomplete, &["blk.0.attn_k_norm.weight", "not in the model file"]);
    }

    #[test]
    fn windows_and_their_rotation_are_the_files_own() {
        let path = fresh_dir("windows").join("windows.gguf");
        let config = |file: GgufFile| {
            write(&path, file.bytes());
            let file = Gguf::open(&path).unwrap_or_else(|error| panic!("{error}"));
            ModelConfig::from_gguf(&file).unwrap_or_else(|error| panic!("{error}"))
        };
        let windows = |file: GgufFile| config(file).windows.iter().map(Option::is_some).collect::<Vec<_>>();
        let gemma = || GgufFile::sound("gemma3").with("block_count", u32(7));
        assert_eq!(windows(gemma()), [true, true, true, true, true, false, true]);
        let three = gemma().with("attention.sliding_window_pattern", u32(3));
        assert_eq!(windows(three), [true, true, false, true, true, false, true]);
        let named = [0, 1, 0, 1, 0, 1, 1].map(|is_local| vec![is_local]);
        let named = gemma().with("attention.sliding_window_pattern", array(7, &named));
        assert_eq!(windows(named), [false, true, false, true, false, true, true]);
        assert_eq!(windows(GgufFile::sound("llama").with("block_count", u32(2))), [true, true]);
        let local_base = |file: GgufFile| config(file).local_rope.map(|rope| rope.base);
        assert_eq!(local_base(gemma()), Some(10_000.0));
        assert_eq!(local_base(gemma().with("rope.freq_base_swa", f32(5000.0))), Some(5000.0));
        assert_eq!(local_base(GgufFile::sound("llama")), None);
    }

    /// Every place in a JSON value, by the keys and indices that lead there.
    fn places(value: &Value, here: &str, found: &mut Vec<String>) {
        found.push(here.to_owned());
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(key, value)| {
                    places(value, &format!("{here}/{}", key.replace('~', "~0").replace('/', "~1")), found)
                });
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(index, value)| places(value, &format!("{here}/{index}"), found));
            }
            _ => {}
        }
    }

    fn any_json(random: &mut Random) -> Value {
        let values = [
            json!(null),
            json!(true),
            json!(false),
            json!(0),
            json!(1),
            json!(2),
            json!(-1),
            json!(64),
            json!(0.5),
            json!(1e300),
            json!(u32::MAX),
            json!(u64::MAX),
            json!(1u64 << 32),
            json!(""),
            json!("x"),
            json!("{{ x }}"),
            json!("\u{120}"),
            json!([]),
            json!({}),
            json!([1, 2]),
            json!([["a", "b"], "c"]),
            json!({"type": "Sequence", "processors": [], "pretokenizers": [], "normalizers": []}),
            json!({"type": "Lowercase"}),
            json!({"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true}),
        ];
        values[random.below(values.len() as u32) as usize].clone()
    }

    #[test]
    fn folders_are_refused_with_a_sentence_or_served() {
        let (runtime, mut random) = (runtime(), Random::new(22));
        let dir = copy_of_llama("damaged-folder");
        assert!(try_out(&runtime, &dir), "{}", refusal(&dir));
        let files = [
            ("config.json", 300),
            ("tokenizer.json", 400),
            ("tokenizer_config.json", 40),
            ("generation_config.json", 60),
            ("model.safetensors.index.json", 60),
        ];
        for (file, count) in files {
            let path = dir.join(file);
            let sound = fs::read(&path).expect("a file of the folder");
            let json: Value = serde_json::from_slice(&sound).expect("JSON");
            let mut all = Vec::new();
            places(&json, "", &mut all);
            let count = rounds(count);
            let mut num_served = 0;
            for _ in 0..count {
                let mut damaged = json.clone();
                for _ in 0..random.between(1, 2) {
                    let place = &all[random.below(all.len() as u32) as usize];
                    // The second place may have gone with the first.
                    if let Some(value) = damaged.pointer_mut(place) {
                        *value = any_json(&mut random);
                    }
                }
                write(&path, damaged.to_string());
                num_served += u32::from(try_out(&runtime, &dir));
            }
            println!("{file}: {num_served} of {count} served");
            assert!(num_served > 0 && num_served < count, "{file}: {num_served} of {count} served");
            write(&path, sound);
        }
    }

    #[test]
    fn shards_cut_short_are_refused_with_a_sentence() {
        let (runtime, mut random) = (runtime(), Random::new(23));
        let dir = copy_of_llama("cut-short");
        for file in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            let path = dir.join(file);
            let sound = fs::read(&path).expect("a file of the folder");
            for _ in 0..rounds(20) {
                write(&path, &sound[..random.below(sound.len() as u32) as usize]);
                assert!(!try_out(&runtime, &dir), "a shard cut short was served");
            }
            write(&path, sound);
        }
    }
}
