//! Everything that comes with a model: shape, weights, tokenizer, chat template, stop ids, sampling defaults.
//!
//! One call for a GGUF file and for a safetensors directory. Invariant: every id that text or a request can yield is in
//! the model's vocabulary. Nothing here touches a device; weights stay in their file until `Model::load`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::format::FormatError;
use crate::format::gguf::Gguf;
use crate::format::safetensors::SafetensorsDir;
use crate::model::{Checkpoint, ModelConfig, ModelConfigError, Weights};
use crate::request::{Pooling, TokenId};
use crate::tensor::WeightFormat;
use crate::text::{ChatTemplate, GgufVocab, TextError, Tokenizer};

mod pooling;

#[derive(Clone)]
pub struct Bundle {
    /// What the model calls itself, else the name of its file or folder.
    pub name: String,
    pub config: ModelConfig,
    /// Its files are open once, however many devices load from them.
    pub checkpoint: Arc<Checkpoint>,
    pub tokenizer: Arc<Tokenizer>,
    /// `None` for a base model.
    pub chat_template: Option<Arc<ChatTemplate>>,
    pub defaults: SamplingDefaults,
    /// Ids that end a generation.
    pub stop_ids: Vec<TokenId>,
    /// How its makers have it embed; `None` where they do not, or in a way that is not ours.
    pub pooling: Option<Pooling>,
    /// Of all weights, in the file's formats.
    pub total_bytes: u64,
    /// What it took to read the tokenizer.
    pub tokenizer_took: Duration,
}

/// What the model's makers recommend, where they say so.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

impl SamplingDefaults {
    /// Holds them to the ranges that requests are held to.
    fn check(&self, path: &Path) -> Result<(), BundleError> {
        let from_0_to = |most: f32| move |value: f32| (0.0..=most).contains(&value);
        let check = |name, value: Option<f32>, is_right: &dyn Fn(f32) -> bool, expected| match value {
            Some(value) if !is_right(value) => {
                Err(BundleError::BadDefault { path: path.to_owned(), name, value, expected })
            }
            _ => Ok(()),
        };
        check("temperature", self.temperature, &from_0_to(2.0), "from 0 to 2")?;
        check("top_p", self.top_p, &|top_p| top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", self.min_p, &from_0_to(1.0), "from 0 to 1")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("there is no {}; give a GGUF file, or a folder with config.json and safetensors files", .0.display())]
    NotFound(PathBuf),
    #[error("{} is neither a GGUF file nor a folder with config.json in it", .0.display())]
    UnknownKind(PathBuf),
    #[error("{}: its tokenizer has {tokens} tokens and its weights only {vocab_size}", path.display())]
    VocabularyTooLarge { path: PathBuf, tokens: usize, vocab_size: u32 },
    #[error("{}: the model's default {name} is {value}; it must be {expected}", path.display())]
    BadDefault { path: PathBuf, name: &'static str, value: f32, expected: &'static str },
    #[error("{}: config.json does not tie the output to the embedding, and lm_head.weight is missing", .0.display())]
    NoOutput(PathBuf),
    #[error("--quantize {to}: {name} has no float weights to pack, so leave it out")]
    NothingToQuantize { name: String, to: &'static str },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    #[error(transparent)]
    Text(#[from] TextError),
}

impl Bundle {
    pub fn open(path: &Path) -> Result<Bundle, BundleError> {
        let bundle = match path {
            path if path.join("config.json").is_file() => Self::from_safetensors(SafetensorsDir::open(path)?)?,
            path if path.join("adapter_config.json").is_file() => {
                let what = "an adapter (LoRA) instead of a model; merge it into its model".to_owned();
                return Err(ModelConfigError::Unsupported { what }.into());
            }
            path if path.is_file() => Self::from_gguf(Gguf::open(path)?)?,
            path if path.exists() => return Err(BundleError::UnknownKind(path.to_owned())),
            path => return Err(BundleError::NotFound(path.to_owned())),
        };
        bundle.check(path)
    }

    /// A tiny model of seeded weights that knows bytes: what the simulated device serves.
    pub fn simulated() -> Bundle {
        let controls = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>"].map(|token| (token.to_owned(), 3));
        let bytes = (0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6));
        let letters = ('!'..='~').map(|letter| (letter.to_string(), 1));
        let (tokens, token_types): (Vec<String>, Vec<i32>) = controls.into_iter().chain(bytes).chain(letters).unzip();
        let vocab = GgufVocab {
            model: "llama".to_owned(),
            scores: vec![0.0; tokens.len()],
            bos: Some(1),
            eos: Some(2),
            unk: Some(0),
            add_bos: Some(true),
            add_space_prefix: Some(false),
            token_types,
            tokens,
            ..GgufVocab::default()
        };
        let tokenizer = Tokenizer::from_vocab(vocab).expect("a vocabulary of bytes is whole");
        let template = ChatTemplate::new(SIMULATED_TEMPLATE, "<s>", "<|im_end|>").expect("our template is right");
        Bundle {
            name: "simulated".to_owned(),
            config: ModelConfig::tiny(tokenizer.vocab_size() as u32, 2),
            checkpoint: Arc::new(Checkpoint::Random { seed: 1, format: WeightFormat::F32 }),
            tokenizer: Arc::new(tokenizer),
            chat_template: Some(Arc::new(template)),
            defaults: SamplingDefaults::default(),
            stop_ids: vec![TokenId(2)],
            pooling: None,
            total_bytes: 0,
            tokenizer_took: Duration::ZERO,
        }
    }

    /// Seeded weights of `format` in the dimensions of a known model, with the simulated one's tokenizer: what it says
    /// is noise, and what it takes is what that model takes. `None` if no model is known by this name.
    pub fn random(shape: &str, format: WeightFormat) -> Option<Bundle> {
        let config = ModelConfig::of_shape(shape)?;
        let checkpoint = Arc::new(Checkpoint::Random { seed: 1, format });
        let name = format!("{shape}-random-{}", format.name());
        // Nothing ends an answer before its length.
        Some(Bundle { name, config, checkpoint, stop_ids: Vec::new(), ..Bundle::simulated() })
    }

    /// Whether some of its matrices could be packed while they are loaded.
    pub fn has_floats(&self) -> bool {
        let formats = Weights::formats(&self.config, &self.checkpoint);
        formats.iter().any(|format| [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16].contains(format))
    }

    /// The same with float weights packed to `to`, one of [`quantize::TARGETS`], while they are loaded.
    pub fn quantized(self, to: WeightFormat) -> Result<Bundle, BundleError> {
        let before = Weights::file_bytes(&self.config, &self.checkpoint);
        let checkpoint = Arc::new(Checkpoint::Quantized { of: self.checkpoint, to });
        let total_bytes = Weights::file_bytes(&self.config, &checkpoint);
        match total_bytes < before {
            true => Ok(Bundle { checkpoint, total_bytes, ..self }),
            false => Err(BundleError::NothingToQuantize { name: self.name, to: to.name() }),
        }
    }

    fn from_gguf(file: Gguf) -> Result<Bundle, BundleError> {
        let config = ModelConfig::from_gguf(&file)?;
        let begun = Instant::now();
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let tokenizer_took = begun.elapsed();
        let special = |id: Option<TokenId>| id.and_then(|id| tokenizer.token(id)).unwrap_or("").to_owned();
        let (bos, eos) = (special(tokenizer.bos()), special(tokenizer.eos()));
        let template = file.str("tokenizer.chat_template")?;
        let chat_template = template.map(|source| ChatTemplate::new(source, &bos, &eos)).transpose()?.map(Arc::new);
        let mut stop_ids = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            stop_ids.extend(file.u32(&format!("tokenizer.ggml.{key}"))?.map(TokenId));
        }
        stop_ids.extend(END_OF_GENERATION.iter().filter_map(|spelling| tokenizer.special_id(spelling)));
        let defaults = SamplingDefaults {
            temperature: file.f32("general.sampling.temp")?,
            top_p: file.f32("general.sampling.top_p")?,
            top_k: file.u32("general.sampling.top_k")?,
            min_p: file.f32("general.sampling.min_p")?,
            repetition_penalty: above_0(file.f32("general.sampling.penalty_repeat")?),
        };
        let pooling = pooling::of_gguf(&file)?;
        let name = file.str("general.name")?.map_or_else(|| stem(file.path()), str::to_owned);
        Ok(Bundle {
            name,
            config,
            total_bytes: file.total_tensor_bytes(),
            checkpoint: Arc::new(Checkpoint::Gguf(file)),
            tokenizer: Arc::new(tokenizer),
            chat_template,
            defaults,
            stop_ids,
            pooling,
            tokenizer_took,
        })
    }

    fn from_safetensors(dir: SafetensorsDir) -> Result<Bundle, BundleError> {
        let config = ModelConfig::from_json(dir.config_json())?;
        if dir.config_json()["tie_word_embeddings"] == false && dir.tensor("lm_head.weight").is_none() {
            return Err(BundleError::NoOutput(dir.path().to_owned()));
        }
        let begun = Instant::now();
        let tokenizer = Tokenizer::from_json(&dir.tokenizer_json()?)?;
        let tokenizer_took = begun.elapsed();
        let null = Value::Null;
        let tokenizer_config = dir.tokenizer_config_json().unwrap_or(&null);
        let generation = dir.generation_config_json().unwrap_or(&null);
        let (bos, eos) = (spelling(&tokenizer_config["bos_token"]), spelling(&tokenizer_config["eos_token"]));
        let template = dir.chat_template().or_else(|| older_chat_template(tokenizer_config));
        let chat_template = template.map(|source| ChatTemplate::new(source, &bos, &eos)).transpose()?.map(Arc::new);
        let mut stop_ids = ids(&generation["eos_token_id"]);
        stop_ids.extend(ids(&dir.config_json()["eos_token_id"]));
        stop_ids.extend(tokenizer.special_id(&eos));
        let number = |key: &str| generation[key].as_f64().map(|value| value as f32);
        let defaults = SamplingDefaults {
            temperature: number("temperature"),
            top_p: number("top_p"),
            top_k: generation["top_k"].as_u64().and_then(|top_k| u32::try_from(top_k).ok()),
            min_p: number("min_p"),
            repetition_penalty: above_0(number("repetition_penalty")),
        };
        Ok(Bundle {
            name: stem(dir.path()),
            total_bytes: dir.total_tensor_bytes(),
            pooling: pooling::of_safetensors(&dir),
            checkpoint: Arc::new(Checkpoint::Safetensors { dir, family: config.family }),
            config,
            tokenizer: Arc::new(tokenizer),
            chat_template,
            defaults,
            stop_ids,
            tokenizer_took,
        })
    }

    fn check(mut self, path: &Path) -> Result<Bundle, BundleError> {
        let (tokens, vocab_size) = (self.tokenizer.vocab_size(), self.config.vocab_size);
        if tokens > vocab_size as usize {
            return Err(BundleError::VocabularyTooLarge { path: path.to_owned(), tokens, vocab_size });
        }
        self.defaults.check(path)?;
        self.stop_ids.retain(|id| id.0 < vocab_size);
        self.stop_ids.sort_unstable();
        self.stop_ids.dedup();
        Ok(self)
    }
}

/// How model makers spell the ends of answers and turns; a file often names only one of them as its eos.
const END_OF_GENERATION: [&str; 8] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "<|end_of_text|>"];

const SIMULATED_TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'forbidden' %}\
    {{ raise_exception('no such role') }}{% endif %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}";

/// A penalty that may be applied; no other is a recommendation.
fn above_0(penalty: Option<f32>) -> Option<f32> {
    penalty.filter(|penalty| *penalty >= 0.01 && *penalty <= 100.0)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The template in tokenizer_config.json, where older folders have it: a text, or a list of texts with names.
fn older_chat_template(tokenizer_config: &Value) -> Option<&str> {
    let template = &tokenizer_config["chat_template"];
    let mut named = template.as_array().into_iter().flatten();
    let default = named.find(|template| template["name"] == "default");
    template.as_str().or_else(|| default?["template"].as_str())
}

/// A token of tokenizer_config.json: a string, or an object around one.
fn spelling(token: &Value) -> String {
    token.as_str().or(token["content"].as_str()).unwrap_or("").to_owned()
}

/// One id or a list of them.
fn ids(value: &Value) -> Vec<TokenId> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).map(TokenId);
    match value.as_array() {
        Some(values) => values.iter().filter_map(id).collect(),
        None => id(value).into_iter().collect(),
    }
}
