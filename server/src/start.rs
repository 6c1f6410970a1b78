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
use fullbore_engine::memory::capacity::{self, BudgetTooSmall, MemoryTable};
use fullbore_engine::model::{Checkpoint, Footprint, Model, ModelConfig, Weights};
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

impl Plan {
    /// Loads the weights and starts the engine's thread.
    pub fn load(self) -> Result<ServedModel, StartError> {
        let Bundle { config, checkpoint, tokenizer, chat_template, defaults, stop_ids, total_bytes, .. } = self.bundle;
        let engine = load_engine(config, checkpoint, total_bytes, self.backend, self.config)?;
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

    /// Loads the weights, for a command that drives the engine itself.
    pub fn load_engine(self) -> Result<Engine, StartError> {
        let Bundle { config, checkpoint, total_bytes, .. } = self.bundle;
        load_engine(config, checkpoint, total_bytes, self.backend, self.config)
    }
}

/// With a progress bar where there is a terminal.
fn load_engine(
    model: ModelConfig,
    mut checkpoint: Checkpoint,
    total_bytes: u64,
    mut backend: Box<dyn Backend>,
    config: EngineConfig,
) -> Result<Engine, StartError> {
    let bar = ProgressBar::new(total_bytes).with_style(bar_style()).with_message("loading");
    let mut progress = |read_bytes: u64| bar.set_position(read_bytes);
    let model = Model::load(model, config.state_limits(), &mut checkpoint, backend.as_mut(), &mut progress)?;
    bar.finish_and_clear();
    Ok(Engine::new(config, model, backend, (random(), random())))
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
    let block_size = args.block_size.max(1);
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
    let block_size = u64::from(args.block_size.max(1));
    let usual = u64::from(args.max_num_seqs) * u64::from(longest.min(USUAL_LEN));
    let tokens = usual.max(u64::from(longest)).next_multiple_of(block_size);
    (tokens * config.kv_bytes_per_token()).min(free_bytes / 2)
}
