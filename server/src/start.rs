//! From arguments to a running engine: device chosen, model opened, memory planned, weights loaded.
//!
//! Invariant: a plan keeps nothing on the device but the small tensors that its kernels were tried on; what it prints
//! is what loading takes.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use fullbore_engine::backend::{Backend, DeviceError, LoadError};
use fullbore_engine::bundle::{Bundle, BundleError};
use fullbore_engine::config::{ConfigError, EngineConfig, LatencyTarget};
use fullbore_engine::engine::Engine;
use fullbore_engine::grammar::GrammarCompiler;
use fullbore_engine::memory::capacity::{self, BudgetTooSmall, MemoryTable, human_bytes};
use fullbore_engine::model::{Checkpoint, Footprint, Model, ModelConfig, UnfitKvType, Weights};
use fullbore_engine::verify::start::{StartCheckError, cases_of_model, first_right};
use fullbore_engine::worker::EngineHandle;
use indicatif::{ProgressBar, ProgressStyle};

use crate::api::{ServedModel, unix_seconds};
use crate::args::{EngineArgs, ModelArgs};
use crate::costs::SavedCosts;
use crate::devices::{self, DeviceChoiceError};
use crate::fetch::{self, FetchError};
use crate::http::metrics::RequestMetrics;
use crate::live::History;
use crate::tuning;

mod remedy;
mod times;

use times::Parts;
pub use times::StartTimes;

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
    #[error(transparent)]
    KvType(#[from] UnfitKvType),
    #[error("this device does not say how much memory it has: give --kv-memory instead of --memory-fraction")]
    UnknownMemory,
    #[error("--max-model-len is {asked}, but {model} was made for {max_positions} tokens")]
    BeyondModel { asked: u32, model: String, max_positions: u32 },
    #[error("--swap-memory of {} holds no block of the KV cache, which takes {}: give more, or 0 to swap nothing",
        human_bytes(*.asked), human_bytes(*.block))]
    SwapTooSmall { asked: u64, block: u64 },
    #[error("{} of memory are needed, and {device} has {}: {} are missing; {remedy}",
        human_bytes(*.needed), human_bytes(*.available), human_bytes(.needed - .available))]
    BeyondMemory { needed: u64, device: String, available: u64, remedy: String },
    #[error("{device} has no memory for {what}, which needs {}, beside the {} that are taken: at least {} of the {} \
        planned are missing; {remedy}",
        human_bytes(*.needed), human_bytes(*.taken), human_bytes(*.missing), human_bytes(*.planned))]
    OutOfMemory { device: String, what: String, needed: u64, taken: u64, missing: u64, planned: u64, remedy: String },
    #[error("{rows} rows of {width} numbers are too many for one buffer: lower {flag}")]
    TooWide { rows: u32, width: u32, flag: &'static str },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Lost(#[from] DeviceError),
    #[error(transparent)]
    Verify(#[from] StartCheckError<DeviceChoiceError>),
}

/// Everything decided, nothing loaded.
pub struct Plan {
    pub name: String,
    pub bundle: Bundle,
    pub backend: Box<dyn Backend>,
    pub config: EngineConfig,
    pub memory: MemoryTable,
    /// Where prices of steps are kept, if they are.
    pub costs: Option<SavedCosts>,
    pub times: StartTimes,
}

/// Opens model and device and fits the engine into memory.
pub fn plan(args: &EngineArgs, served_name: Option<&str>) -> Result<Plan, StartError> {
    let mut times = StartTimes::default();
    let mut backend = devices::open(&args.model.device)?;
    times.end("device", &Parts::of(backend.settle()));
    let device = backend.info();
    tracing::info!(device = device.id, name = device.name, driver = device.driver, tier = device.tier, "device chosen");
    let bundle = open_bundle(&args.model, &device.id)?;
    times.end("model", &Parts::tokenizer(bundle.tokenizer_took));
    let backend = if args.no_verify { backend } else { verified(backend, &bundle, &args.model)? };
    let shapes = Weights::mat_mul_shapes(&bundle.config, &bundle.checkpoint);
    let mut backend = match tuning::folder() {
        Ok(folder) if !args.no_tuning => tuning::tuned(backend, &args.model.device, &folder, &shapes, !args.no_verify)?,
        _ => backend,
    };
    times.end("verify", &Parts::of(backend.settle()));
    let device = backend.info();
    let weights = Weights::size_bytes(&bundle.config, &bundle.checkpoint, backend.as_ref());
    let measured = args.kv_blocks.is_none() && args.kv_memory.is_none();
    let memory_bytes = measured.then(|| devices::memory_bytes(device)).flatten();
    let config = engine_config(args, &bundle, weights, memory_bytes, device.max_buffer_bytes)?;
    check_widths(&bundle.config, &config)?;
    let memory = memory_table(&bundle.config, &config, weights);
    let names_itself = args.model.shape.is_some() || Path::new(&args.model.model).exists();
    let default_name = if names_itself { &bundle.name } else { &args.model.model };
    // What steps take on the simulator is made up.
    let keeps = !args.no_saved_costs && device.id != "sim";
    let folder = keeps.then(fetch::cache_folder).and_then(Result::ok).map(|folder| folder.join("costs"));
    let costs = folder.map(|folder| SavedCosts::new(&folder, device, &bundle.name, &config, &memory));
    Ok(Plan { name: served_name.unwrap_or(default_name).to_owned(), bundle, backend, config, memory, costs, times })
}

/// The model that `args` ask for, for a device of this id.
pub fn open_bundle(args: &ModelArgs, device: &str) -> Result<Bundle, StartError> {
    let bundle = match &args.shape {
        Some(shape) => Bundle::random(&shape.model, shape.format).expect("the command line knows the same shapes"),
        None if device == "sim" => Bundle::simulated(),
        None => Bundle::open(&fetch::fetch(&args.model)?)?,
    };
    Ok(match args.quantize {
        Some(to) => bundle.quantized(to)?,
        None => bundle,
    })
}

/// `backend`, or a plainer one of the same device, on which the model's kernels have been tried. A simulator has none.
fn verified(backend: Box<dyn Backend>, bundle: &Bundle, args: &ModelArgs) -> Result<Box<dyn Backend>, StartError> {
    bundle.config.check_kv_type(args.kv_type)?;
    if backend.info().id == "sim" {
        return Ok(backend);
    }
    let begun = Instant::now();
    let formats = Weights::formats(&bundle.config, &bundle.checkpoint);
    let cases = cases_of_model(&bundle.config, &formats, args.kv_type);
    let backend = first_right(&cases, backend, &mut |info| devices::plainer(info, &args.device))?;
    let tier = &backend.info().tier;
    tracing::info!(tier, num_cases = cases.len(), took_ms = begun.elapsed().as_secs_f64() * 1e3, "kernels tried");
    Ok(backend)
}

/// Where memory will go, with `weights` bytes of it for weights.
pub fn memory_table(model: &ModelConfig, config: &EngineConfig, weights: u64) -> MemoryTable {
    let Footprint { kv, scratch, tables, swap } = Model::footprint(model, &config.state_limits());
    let EngineConfig { kv_type, num_blocks, num_host_blocks, block_size, .. } = *config;
    let kv_bytes_per_token = model.kv_bytes_per_token(kv_type);
    MemoryTable {
        weights,
        kv,
        scratch,
        tables,
        swap,
        kv_type,
        num_blocks,
        num_host_blocks,
        block_size,
        kv_bytes_per_token,
    }
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
        let total = self.memory.total();
        match device.memory_bytes.filter(|&available| available < total) {
            Some(available) => Err(StartError::BeyondMemory {
                needed: total,
                device: device.id.clone(),
                available,
                remedy: remedy::remedy(&self.memory, total - available, self.bundle.has_floats()),
            }),
            None => Ok(()),
        }
    }

    /// Loads the weights and starts the engine's thread.
    pub fn load(self) -> Result<ServedModel, StartError> {
        self.check_memory()?;
        let has_floats = self.bundle.has_floats();
        let Bundle { config, checkpoint, tokenizer, chat_template, defaults, stop_ids, pooling, total_bytes, .. } =
            self.bundle;
        let neighbours = devices::share(self.backend.info(), &self.name);
        let mut times = self.times;
        let loaded = load_engine(config, checkpoint, total_bytes, self.backend, self.config, &mut times);
        let mut engine = loaded.map_err(|error| remedy::out_of_memory(error, &self.memory, has_floats))?;
        if let Some(neighbours) = neighbours {
            engine.set_neighbours(neighbours);
        }
        if let Some(cost) = self.costs.as_ref().and_then(SavedCosts::read) {
            engine.set_cost(cost);
        }
        let grammars = GrammarCompiler::new(tokenizer.clone(), stop_ids.clone(), engine.model().config.vocab_size);
        Ok(ServedModel {
            metrics: Arc::new(RequestMetrics::new(&self.name)),
            history: History::default(),
            name: self.name,
            grammars,
            tokenizer,
            chat_template,
            defaults,
            stop_ids,
            pooling,
            hidden_size: engine.model().config.dim,
            memory: self.memory,
            shares: HashMap::new(),
            costs: self.costs,
            times,
            loaded_at: unix_seconds(),
            engine: EngineHandle::spawn(engine),
        })
    }

    /// Loads the weights, for a command that drives the engine itself.
    pub fn load_engine(self) -> Result<Engine, StartError> {
        self.check_memory()?;
        let has_floats = self.bundle.has_floats();
        let Bundle { config, checkpoint, total_bytes, .. } = self.bundle;
        let mut times = self.times;
        let loaded = load_engine(config, checkpoint, total_bytes, self.backend, self.config, &mut times);
        loaded.map_err(|error| remedy::out_of_memory(error, &self.memory, has_floats))
    }
}

/// With a progress bar where there is a terminal. Refuses a latency target that the device cannot meet.
fn load_engine(
    model: ModelConfig,
    mut checkpoint: Checkpoint,
    total_bytes: u64,
    mut backend: Box<dyn Backend>,
    config: EngineConfig,
    times: &mut StartTimes,
) -> Result<Engine, StartError> {
    let bar = ProgressBar::new(total_bytes).with_style(bar_style()).with_message("loading");
    let mut progress = |read_bytes: u64| bar.set_position(read_bytes);
    let model = Model::load(model, config.state_limits(), &mut checkpoint, backend.as_mut(), &mut progress)?;
    bar.finish_and_clear();
    times.end("weights", &Parts::of(backend.settle()));
    if model.num_host_blocks() < config.num_host_blocks {
        tracing::warn!("this device cannot copy to the host's memory: preempted requests are recomputed");
    }
    let mut engine = Engine::new(config, model, backend, (random(), random()));
    engine.set_checkpoint(checkpoint);
    engine.enable_swap().map_err(LoadError::from)?;
    // A simulated device has nothing to compile, and its steps say nothing unless a target is held against them.
    let has_target = matches!(config.latency, LatencyTarget::Milliseconds(_));
    if has_target || engine.backend().info().id != "sim" {
        let step = engine.warm_up()?;
        tracing::info!(step_ms = step.as_secs_f64() * 1e3, "one sequence alone");
        config.check_target(step.as_nanos() as u64)?;
    }
    times.end("warm-up", &Parts::of(engine.settle()));
    Ok(engine)
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
pub const USUAL_LEN: u32 = 2048;
/// Tokens of prompts that may wait: as asked for, else as many as the requests that may usually have.
pub fn queued_tokens(asked: Option<u32>, max_queued_requests: u32, max_model_len: u32) -> u32 {
    asked.unwrap_or(max_queued_requests.saturating_mul(USUAL_LEN).max(max_model_len))
}

/// What counts as free where a device does not say.
const UNKNOWN_MEMORY: u64 = 2 << 30;

/// `memory_bytes` is what the device has for us before `weights` are loaded, where that is known. The K of a layer is
/// bound whole, so `max_buffer_bytes` bounds it too.
fn engine_config(
    args: &EngineArgs,
    bundle: &Bundle,
    weights: u64,
    memory_bytes: Option<u64>,
    max_buffer_bytes: u64,
) -> Result<EngineConfig, StartError> {
    let max_positions = bundle.config.max_positions;
    if let Some(asked) = args.max_model_len.filter(|&asked| asked > max_positions) {
        return Err(StartError::BeyondModel { asked, model: bundle.name.clone(), max_positions });
    }
    let kv_type = args.model.kv_type;
    bundle.config.check_kv_type(kv_type)?;
    let kv_bytes_per_token = bundle.config.kv_bytes_per_token(kv_type);
    let longest = args.max_model_len.unwrap_or(max_positions.min(DEFAULT_MODEL_LEN));
    // Anything else is refused by `check` below.
    let block_size = args.block_size.clamp(1, EngineConfig::MAX_BLOCK_SIZE);
    let mut config = EngineConfig {
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_model_len: longest,
        kv_type,
        block_size: args.block_size,
        num_blocks: args.kv_blocks.unwrap_or(longest.div_ceil(block_size)),
        num_host_blocks: 0,
        max_queued_requests: args.max_queued_requests,
        max_queued_tokens: queued_tokens(args.max_queued_tokens, args.max_queued_requests, longest),
        max_queue_ms: args.max_queue_ms,
        max_logit_rows: args.max_num_seqs.max(EngineConfig::default().max_logit_rows),
        pipeline_depth: args.pipeline_depth,
        latency: args.latency(),
        prefix_cache: !args.no_prefix_cache,
    };
    if args.kv_blocks.is_none() {
        config.check()?;
        let budget = match (args.kv_memory, args.memory_fraction) {
            (Some(bytes), _) => bytes,
            (None, Some(fraction)) => {
                let memory_bytes = memory_bytes.ok_or(StartError::UnknownMemory)?;
                let Footprint { scratch, tables, .. } = Model::footprint(&bundle.config, &config.state_limits());
                ((memory_bytes as f64 * fraction) as u64).saturating_sub(weights + scratch + tables)
            }
            (None, None) => {
                let free_bytes = memory_bytes.unwrap_or(UNKNOWN_MEMORY).saturating_sub(weights);
                default_budget(args, &bundle.config, longest, free_bytes)
            }
        };
        let least_len = args.max_model_len.unwrap_or(1);
        let bindable = max_buffer_bytes.saturating_mul(2 * u64::from(bundle.config.num_layers));
        config.num_blocks = capacity::num_blocks(kv_bytes_per_token, budget.min(bindable), block_size, least_len)?;
    }
    config.num_host_blocks = num_host_blocks(args, kv_bytes_per_token, config.num_blocks)?;
    if args.max_model_len.is_none() {
        config.max_model_len = longest.min(config.num_blocks.saturating_mul(block_size));
    }
    config.check()?;
    Ok(config)
}

/// Unless asked otherwise the host keeps as much as the KV cache holds, and no more than this.
const DEFAULT_SWAP: u64 = 1 << 30;

fn num_host_blocks(args: &EngineArgs, kv_bytes_per_token: u64, num_blocks: u32) -> Result<u32, StartError> {
    let block_size = args.block_size.max(1);
    let Some(asked) = args.swap_memory else {
        return Ok(capacity::num_host_blocks(kv_bytes_per_token, DEFAULT_SWAP, block_size).min(num_blocks));
    };
    match capacity::num_host_blocks(kv_bytes_per_token, asked, block_size) {
        0 if asked > 0 => {
            let block = kv_bytes_per_token * u64::from(block_size);
            Err(StartError::SwapTooSmall { asked, block })
        }
        num_blocks => Ok(num_blocks),
    }
}

/// Enough for every sequence at a usual length, and for one at its longest, but at most half of what is free.
fn default_budget(args: &EngineArgs, config: &ModelConfig, longest: u32, free_bytes: u64) -> u64 {
    let block_size = u64::from(args.block_size.clamp(1, EngineConfig::MAX_BLOCK_SIZE));
    let usual = u64::from(args.max_num_seqs) * u64::from(longest.min(USUAL_LEN));
    let tokens = usual.max(u64::from(longest)).next_multiple_of(block_size);
    tokens.saturating_mul(config.kv_bytes_per_token(args.model.kv_type)).min(free_bytes / 2)
}

#[cfg(test)]
mod tests {
    use fullbore_engine::tensor::KvType;

    use super::*;

    const WEIGHTS: u64 = 100 << 20;

    fn args(kv_type: KvType) -> EngineArgs {
        EngineArgs::new(ModelArgs { kv_type, ..ModelArgs::new("", "sim") })
    }

    #[test]
    fn a_fraction_of_the_memory_is_used_to_the_last_block() {
        let bundle = Bundle::simulated();
        for (kv_type, fraction) in [(KvType::F16, 0.5), (KvType::Q8_0, 0.9), (KvType::Q4_0, 1.0)] {
            let args = EngineArgs { memory_fraction: Some(fraction), ..args(kv_type) };
            let config = engine_config(&args, &bundle, WEIGHTS, Some(1 << 30), u64::MAX).expect("a valid plan");
            let table = memory_table(&bundle.config, &config, WEIGHTS);
            let block_bytes = table.kv_bytes_per_token * u64::from(table.block_size);
            let left = ((1u64 << 30) as f64 * fraction) as u64 - table.total();
            assert!(left < block_bytes, "{left} of {fraction} are left, and a block takes {block_bytes}");
        }
    }

    #[test]
    fn the_cache_of_a_layer_can_be_bound_whole() {
        let bundle = Bundle::simulated();
        let args = EngineArgs { kv_memory: Some(1 << 30), ..args(KvType::Q8_0) };
        let config = engine_config(&args, &bundle, WEIGHTS, None, 1 << 20).expect("a valid plan");
        let num_caches = 2 * u64::from(bundle.config.num_layers);
        let table = memory_table(&bundle.config, &config, WEIGHTS);
        let block_bytes = table.kv_bytes_per_token * u64::from(table.block_size) / num_caches;
        let cache_bytes = table.kv / num_caches;
        assert!(cache_bytes <= 1 << 20 && cache_bytes + block_bytes > 1 << 20, "{cache_bytes}");
    }

    #[test]
    fn what_cannot_be_planned_is_said_so() {
        let bundle = Bundle::simulated();
        let sentence =
            |args: &EngineArgs| engine_config(args, &bundle, WEIGHTS, None, u64::MAX).expect_err("no plan").to_string();
        let fraction = sentence(&EngineArgs { memory_fraction: Some(0.9), ..args(KvType::F16) });
        assert!(fraction.contains("--kv-memory instead of --memory-fraction"), "{fraction}");
        let swap = sentence(&EngineArgs { swap_memory: Some(100), ..args(KvType::F16) });
        assert!(swap.starts_with("--swap-memory of 100 B holds no block"), "{swap}");
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused_with_their_numbers() {
        let bundle = Bundle::simulated();
        let sentence =
            |args: &EngineArgs| engine_config(args, &bundle, WEIGHTS, None, u64::MAX).expect_err("no plan").to_string();
        let long = EngineArgs { max_model_len: Some(1000), ..args(KvType::F16) };
        let pool = sentence(&EngineArgs { kv_blocks: Some(31), block_size: 32, ..long.clone() });
        assert!(pool.starts_with("31 KV blocks of 32 tokens cannot hold one sequence of max_model_len 1000"), "{pool}");
        let memory = sentence(&EngineArgs { kv_memory: Some(4096), ..long.clone() });
        assert!(memory.contains("1000"), "{memory}");
        let queue = sentence(&EngineArgs { max_queued_tokens: Some(999), ..long.clone() });
        assert_eq!(queue, "max_queued_tokens is 999; it must be at least 1000");
        let slots = sentence(&EngineArgs { max_num_seqs: 600, ..long.clone() });
        assert_eq!(slots, "max_num_batched_tokens is 512; it must be at least 600");
        let target = sentence(&EngineArgs { target_itl_ms: Some(0), ..long.clone() });
        assert!(target.contains("the latency target is 0"), "{target}");
        let deadline = sentence(&EngineArgs { max_queue_ms: Some(0), ..long });
        assert_eq!(deadline, "max_queue_ms is 0; it must be at least 1");
    }

    #[test]
    fn as_many_tokens_may_wait_as_fit_the_requests_that_may_or_the_longest_one() {
        let bundle = Bundle::simulated();
        let tokens = |args: &EngineArgs| {
            engine_config(args, &bundle, WEIGHTS, None, u64::MAX).expect("a plan").max_queued_tokens
        };
        assert_eq!(tokens(&args(KvType::F16)), 256 * USUAL_LEN);
        let few = EngineArgs { max_queued_requests: 1, max_model_len: Some(4000), ..args(KvType::F16) };
        assert_eq!(tokens(&few), 4000);
    }
}
