//! From arguments to a running engine: device chosen, model opened, memory planned, weights loaded.
//!
//! Invariant: a plan allocates nothing on the device; what it prints is what loading takes.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use fullbore_engine::backend::{Backend, LoadError};
use fullbore_engine::bundle::{Bundle, BundleError};
use fullbore_engine::config::{ConfigError, EngineConfig};
use fullbore_engine::engine::Engine;
use fullbore_engine::memory::capacity::{self, BudgetTooSmall, MemoryTable, human_bytes};
use fullbore_engine::model::{Footprint, Model, ModelConfig, Weights};
use fullbore_engine::worker::EngineHandle;
use indicatif::{ProgressBar, ProgressStyle};

use crate::api::{ServedModel, unix_seconds};
use crate::args::EngineArgs;
use crate::devices::{self, DeviceChoiceError};
use crate::fetch::{self, FetchError};

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Device(#[from] DeviceChoiceError),
    #[error(transparent)]
    Budget(#[from] BudgetTooSmall),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("--max-model-len is {asked}, but {model} was made for {max_positions} tokens")]
    BeyondModel { asked: u32, model: String, max_positions: u32 },
    #[error(
        "{needed} of memory are needed, and {device} has {available}: lower --kv-memory (or --kv-blocks), \
         --max-num-seqs or --max-num-batched-tokens, or choose a smaller model"
    )]
    BeyondMemory { needed: String, device: String, available: String },
    #[error("{rows} rows of {width} numbers are too many for one buffer: lower {flag}")]
    TooWide { rows: u32, width: u32, flag: &'static str },
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Everything decided, nothing loaded.
pub struct Plan {
    pub name: String,
    pub bundle: Bundle,
    pub backend: Box<dyn Backend>,
    pub config: EngineConfig,
    pub memory: MemoryTable,
}

/// Opens model and device and fits the engine into memory.
pub fn plan(args: &EngineArgs, served_name: Option<&str>) -> Result<Plan, StartError> {
    let backend = devices::open(&args.model.device)?;
    let device = backend.info();
    tracing::info!(device = device.id, name = device.name, driver = device.driver, tier = device.tier, "device chosen");
    let bundle = match device.id.as_str() {
        "sim" => Bundle::simulated(),
        _ => Bundle::open(&fetch::fetch(&args.model.model)?)?,
    };
    let weights = Weights::size_bytes(&bundle.config, &bundle.checkpoint, backend.as_ref());
    let free_bytes = device.memory_bytes.unwrap_or(UNKNOWN_MEMORY).saturating_sub(weights);
    let config = engine_config(args, &bundle, free_bytes)?;
    check_widths(&bundle.config, &config)?;
    let memory = memory_table(&bundle.config, &config, weights);
    let default_name = if Path::new(&args.model.model).exists() { &bundle.name } else { &args.model.model };
    Ok(Plan { name: served_name.unwrap_or(default_name).to_owned(), bundle, backend, config, memory })
}

/// Where memory will go, with `weights` bytes of it for weights.
pub fn memory_table(model: &ModelConfig, config: &EngineConfig, weights: u64) -> MemoryTable {
    let Footprint { kv, scratch, tables } = Model::footprint(model, &config.state_limits());
    let EngineConfig { num_blocks, block_size, .. } = *config;
    MemoryTable { weights, kv, scratch, tables, num_blocks, block_size, kv_bytes_per_token: model.kv_bytes_per_token() }
}

/// Elements of a tensor are counted in 32 bits.
fn check_widths(model: &ModelConfig, config: &EngineConfig) -> Result<(), StartError> {
    let widest = model.dim.max(model.num_heads * model.head_dim).max(model.ffn_dim);
    let tensors = [
        (config.max_num_batched_tokens, widest, "--max-num-batched-tokens"),
        (config.max_logit_rows, model.vocab_size, "--max-num-seqs"),
        (config.max_model_len, model.head_dim, "--max-model-len"),
    ];
    match tensors.into_iter().find(|(rows, width, _)| rows.checked_mul(*width).is_none()) {
        Some((rows, width, flag)) => Err(StartError::TooWide { rows, width, flag }),
        None => Ok(()),
    }
}

impl Plan {
    /// Refuses what the device's memory, where that is known, cannot hold.
    pub fn check_memory(&self) -> Result<(), StartError> {
        let device = self.backend.info();
        match device.memory_bytes.filter(|&available| available < self.memory.total()) {
            Some(available) => Err(StartError::BeyondMemory {
                needed: human_bytes(self.memory.total()),
                device: device.id.clone(),
                available: human_bytes(available),
            }),
            None => Ok(()),
        }
    }

    /// Loads the weights, with a progress bar where there is a terminal, and starts the engine's thread.
    pub fn load(mut self) -> Result<ServedModel, StartError> {
        self.check_memory()?;
        let bar = ProgressBar::new(self.bundle.total_bytes).with_style(bar_style()).with_message("loading");
        let limits = self.config.state_limits();
        let Bundle { config, mut checkpoint, tokenizer, chat_template, defaults, stop_ids, .. } = self.bundle;
        let mut progress = |read_bytes: u64| bar.set_position(read_bytes);
        let model = Model::load(config, limits, &mut checkpoint, self.backend.as_mut(), &mut progress)?;
        bar.finish_and_clear();
        let engine = Engine::new(self.config, model, self.backend, (random(), random()));
        Ok(ServedModel {
            name: self.name,
            tokenizer,
            chat_template,
            defaults,
            stop_ids,
            memory: self.memory,
            loaded_at: unix_seconds(),
            engine: EngineHandle::spawn(engine),
        })
    }
}

/// Bytes done, bytes in all, and what is left, in one line.
pub fn bar_style() -> ProgressStyle {
    let template = "{msg} {bar:32} {bytes}/{total_bytes} {eta}";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A number that no client can foresee: the standard library keys each hasher from the system's randomness.
pub fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Unless asked otherwise a sequence may be this long, so that a model made for 128k tokens does not claim all memory.
const DEFAULT_MODEL_LEN: u32 = 8192;
/// Of a request, prompt and answer, as far as memory is concerned.
const USUAL_LEN: u32 = 2048;
/// What counts as free where a device does not say.
const UNKNOWN_MEMORY: u64 = 2 << 30;

fn engine_config(args: &EngineArgs, bundle: &Bundle, free_bytes: u64) -> Result<EngineConfig, StartError> {
    let max_positions = bundle.config.max_positions;
    if let Some(asked) = args.max_model_len.filter(|&asked| asked > max_positions) {
        return Err(StartError::BeyondModel { asked, model: bundle.name.clone(), max_positions });
    }
    let longest = args.max_model_len.unwrap_or(max_positions.min(DEFAULT_MODEL_LEN));
    // Anything else is refused by `check` below.
    let block_size = args.block_size.clamp(1, EngineConfig::MAX_BLOCK_SIZE);
    let num_blocks = match args.kv_blocks {
        Some(num_blocks) => num_blocks,
        None => {
            let budget = args.kv_memory.unwrap_or_else(|| default_budget(args, &bundle.config, longest, free_bytes));
            capacity::num_blocks(
                bundle.config.kv_bytes_per_token(),
                budget,
                block_size,
                args.max_model_len.unwrap_or(1),
            )?
        }
    };
    let max_model_len = args.max_model_len.unwrap_or(longest.min(num_blocks.saturating_mul(block_size)));
    let config = EngineConfig {
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_model_len,
        block_size: args.block_size,
        num_blocks,
        max_waiting: args.max_waiting,
        max_logit_rows: args.max_num_seqs.max(EngineConfig::default().max_logit_rows),
        prefix_cache: !args.no_prefix_cache,
    };
    config.check()?;
    Ok(config)
}

/// Enough for every sequence at a usual length, and for one at its longest, but at most half of what is free.
fn default_budget(args: &EngineArgs, config: &ModelConfig, longest: u32, free_bytes: u64) -> u64 {
    let block_size = u64::from(args.block_size.clamp(1, EngineConfig::MAX_BLOCK_SIZE));
    let usual = u64::from(args.max_num_seqs) * u64::from(longest.min(USUAL_LEN));
    let tokens = usual.max(u64::from(longest)).next_multiple_of(block_size);
    tokens.saturating_mul(config.kv_bytes_per_token()).min(free_bytes / 2)
}
