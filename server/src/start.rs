//! From arguments to a running engine: device chosen, model opened, memory planned, weights loaded.
//!
//! Invariant: a plan keeps nothing on the device but the small tensors that its kernels were tried on; what it prints
//! is what loading takes.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::time::Instant;

use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo, LoadError};
use fullbore_engine::bundle::{Bundle, BundleError};
use fullbore_engine::config::{ConfigError, EngineConfig, LatencyTarget};
use fullbore_engine::cost::CostModel;
use fullbore_engine::engine::Engine;
use fullbore_engine::memory::capacity::{BudgetTooSmall, MemoryTable, human_bytes};
use fullbore_engine::memory::kv_events::KvEventSender;
use fullbore_engine::model::{Footprint, Model, ModelConfig, UnfitKvType, Weights};
use fullbore_engine::tuning::TunedMatMul;
use fullbore_engine::verify::start::{
    StartCheckError, apart_in_company, cases_in_company, cases_of_model, first_right, kernels_of_model,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::api::ServedModel;
use crate::args::{EngineArgs, ModelArgs};
use crate::costs::SavedCosts;
use crate::devices::asked::{Asked, asked};
use crate::devices::cores::{Cores, Pinned};
use crate::devices::{self, DeviceChoiceError};
use crate::fetch::{self, FetchError};
use crate::tuning;

mod auto;
mod config;
mod load;
mod remedy;
mod split;
mod times;
mod together;

use config::Room;
pub use config::{USUAL_LEN, queued_tokens};
pub use load::load;
use split::StagePlan;
use times::Parts;
pub use times::StartTimes;
pub use together::{by_model, plan_all, table};

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
    #[error("{device} has {}, and all models together need {} ({each}): give them less by --kv-memory, \
        --memory-fraction or smaller models, or one of them another device: --model NAME=MODEL,device=DEVICE",
        human_bytes(*.available), human_bytes(*.needed))]
    TogetherBeyondMemory { device: String, available: u64, needed: u64, each: String },
    #[error("two models are called {0}: give each a name of its own, as in --model NAME=MODEL")]
    TwoOfOneName(String),
    #[error("the model {model}: {source}")]
    OfModel { model: String, source: Box<StartError> },
    #[error("none of its devices can serve {model}; the warnings before this say why")]
    NoDevice { model: String },
    #[error("on {device}: {source}")]
    OnDevice { device: String, source: Box<StartError> },
    #[error("{device} makes up its tokens, and serves no model beside other devices: leave it out")]
    Simulated { device: String },
    #[error(
        "--split divides a model over several devices, and one was given: name more, as in --device vulkan:0,vulkan:1"
    )]
    SplitOverOne,
    #[error(
        "no device has memory for all of {0}, and a model that is divided over its devices has them to itself: serve \
        it alone"
    )]
    SplitBesideOthers(String),
    #[error(
        "the model's {num_layers} layers do not fit on its {num_devices} devices together ({each}): give it more \
        devices, or lower --kv-memory, --max-model-len or --max-num-batched-tokens"
    )]
    TooSmallTogether { num_layers: u32, num_devices: usize, each: String },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Lost(#[from] DeviceError),
    #[error(transparent)]
    Verify(#[from] StartCheckError<DeviceChoiceError>),
}

impl StartError {
    /// The same, told of a model by its name unless it `is_alone`.
    pub fn of_model(self, model: &str, is_alone: bool) -> StartError {
        match is_alone {
            true => self,
            false => StartError::OfModel { model: model.to_owned(), source: Box::new(self) },
        }
    }

    /// The same, told of one of several devices.
    fn on_device(self, device: &str, is_alone: bool) -> StartError {
        match is_alone {
            true => self,
            false => StartError::OnDevice { device: device.to_owned(), source: Box::new(self) },
        }
    }
}

/// Everything decided for a model on one device, nothing loaded.
pub struct Plan {
    pub name: String,
    pub seat: Seat,
    pub bundle: Bundle,
    pub backend: Box<dyn Backend>,
    pub config: EngineConfig,
    pub memory: MemoryTable,
    /// Where the model is divided over several devices.
    pub stages: Vec<StagePlan>,
    /// Of a model's first device: what `auto` made of several, and why.
    pub choice: Option<String>,
    /// Where prices of steps are kept, if they are.
    pub costs: Option<SavedCosts>,
    /// What is known of steps without those.
    pub tuned_cost: Option<CostModel>,
    /// Where others are told of its KV blocks.
    pub kv_events: Option<KvEventSender>,
    pub times: StartTimes,
}

/// The device of a plan among those of its model.
#[derive(Clone, Debug)]
pub struct Seat {
    /// What people call the device.
    pub title: String,
    pub cores: Option<Cores>,
    /// Whether the model's other devices go on without it.
    pub is_optional: bool,
}

/// A model and its device, not fitted into memory yet.
struct Opened {
    name: String,
    seat: Seat,
    /// Whether a share of the memory was asked for it alone.
    has_own_fraction: bool,
    args: EngineArgs,
    bundle: Bundle,
    backend: Box<dyn Backend>,
    /// Its tables that are not its own, with what products take.
    tuned: Vec<TunedMatMul>,
    /// Where the model is divided over several devices.
    stages: Vec<StagePlan>,
    /// See [`Plan::choice`].
    choice: Option<String>,
    /// Bytes that they will take.
    weights: u64,
    times: StartTimes,
}

/// Opens model and device and fits the engine into memory.
pub fn plan(args: &EngineArgs, served_name: Option<&str>) -> Result<Plan, StartError> {
    let not_one = || DeviceChoiceError::NotOne { asked: args.model.device.name.clone() };
    let opened = match &asked(&args.model.device)?[..] {
        [asked] if !args.model.device.split => Opened::open(args, asked, None, served_name)?,
        _ if !args.model.device.split => return Err(not_one().into()),
        _ => together::open_divided(args, served_name)?,
    };
    let room = Room::alone(opened.measured_bytes());
    opened.plan(room)
}

impl Opened {
    /// `bundle` is the model's where another device has opened it.
    fn open(
        args: &EngineArgs,
        asked: &Asked,
        bundle: Option<&Bundle>,
        served_name: Option<&str>,
    ) -> Result<Opened, StartError> {
        let _pinned = asked.pin()?;
        let mut args = args.clone();
        args.model.device = asked.args.clone();
        asked.listed.iter().for_each(|listed| listed.apply(&mut args));
        let mut times = StartTimes::default();
        let mut backend = devices::open(&args.model.device)?;
        times.end("device", &Parts::of(backend.settle()));
        let device = backend.info();
        let DeviceInfo { id, name, driver, tier, arithmetic, .. } = device;
        tracing::info!(device = id, name, driver, tier, arithmetic, "device chosen");
        let bundle = bundle.map_or_else(|| open_bundle(&args.model, &device.id), |bundle| Ok(bundle.clone()))?;
        times.end("model", &Parts::tokenizer(bundle.tokenizer_took));
        let backend = if args.no_verify { backend } else { verified(backend, &bundle, &args.model)? };
        let shapes = Weights::mat_mul_shapes(&bundle.config, &bundle.checkpoint);
        let (mut backend, tuned) = match tuning::folder() {
            Ok(folder) if !args.no_tuning => {
                tuning::tuned(backend, &args.model.device, &folder, &shapes, !args.no_verify)?
            }
            _ => (backend, Vec::new()),
        };
        times.end("verify", &Parts::of(backend.settle()));
        let weights = Weights::size_bytes(&bundle.config, &bundle.checkpoint, backend.as_ref());
        let names_itself = args.model.shape.is_some() || Path::new(&args.model.model).exists();
        let default_name = if names_itself { &bundle.name } else { &args.model.model };
        let name = served_name.unwrap_or(default_name).to_owned();
        let seat = Seat::new(asked, backend.info());
        let (has_own_fraction, stages, choice) = (false, Vec::new(), None);
        Ok(Opened { name, seat, has_own_fraction, args, bundle, backend, tuned, stages, choice, weights, times })
    }

    /// What the device has, where the size of the cache depends on it and it is known.
    fn measured_bytes(&self) -> Option<u64> {
        let depends = self.args.kv_blocks.is_none() && self.args.kv_memory.is_none();
        depends.then(|| devices::memory_bytes(self.backend.info())).flatten()
    }

    fn plan(self, room: Room) -> Result<Plan, StartError> {
        let Opened { name, seat, args, bundle, backend, tuned, stages, choice, weights, times, .. } = self;
        let device = backend.info();
        let config = config::engine_config(&args, &bundle, weights, room, device.max_buffer_bytes)?;
        check_widths(&bundle.config, &config)?;
        let mut memory = memory_table(&bundle.config, &config, weights);
        let stages: Vec<_> = stages.into_iter().map(|stage| stage.planned(&bundle.config, &config)).collect();
        if !stages.is_empty() {
            memory = split::sum(&stages, memory);
        }
        // What steps take on the simulator is made up.
        let keeps = !args.no_saved_costs && device.id != "sim";
        let folder = keeps.then(fetch::cache_folder).and_then(Result::ok).map(|folder| folder.join("costs"));
        let costs = folder.map(|folder| SavedCosts::new(&folder, device, &bundle.name, &config, &memory));
        let products = Weights::products(&bundle.config, &bundle.checkpoint);
        let tuned_cost = products.and_then(|products| tuning::cost_of(&tuned, &products));
        let kv_events = None;
        Ok(Plan { name, seat, bundle, backend, config, memory, stages, choice, costs, tuned_cost, kv_events, times })
    }
}

impl Seat {
    fn new(asked: &Asked, device: &DeviceInfo) -> Seat {
        let title = if asked.cores.is_some() { &asked.title } else { &device.id };
        Seat { title: title.clone(), cores: asked.cores.clone(), is_optional: asked.is_optional }
    }

    /// All of a device by this id.
    fn whole(id: &str) -> Seat {
        Seat { title: id.to_owned(), cores: None, is_optional: false }
    }

    fn pin(&self) -> Result<Option<Pinned>, DeviceChoiceError> {
        devices::cores::pin(self.cores.as_ref(), &self.title)
    }
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
    let cases = cases_of_model(backend.as_ref(), &bundle.config, &formats, args.kv_type);
    let kernels = kernels_of_model(&bundle.config, &formats, args.kv_type);
    let backend = first_right(&cases, &kernels, backend, &mut |info| devices::plainer(info, &args.device))?;
    let (mut backend, apart) = apart_in_company(&cases_in_company(&bundle.config, &formats, args.kv_type), backend);
    let DeviceInfo { id: device, driver, tier, .. } = backend.info().clone();
    match apart {
        Ok(None) => {}
        Ok(Some(what)) => {
            tracing::warn!(device, driver, what, "the driver adds in orders of its own: answers may depend on others");
        }
        // No more than a look: no start ends by it, unless the device is gone.
        Err(error) => {
            tracing::warn!(device, driver, %error, "whether answers depend on others is not known");
            if matches!(error, DeviceError::Lost { .. }) {
                backend.reopen()?;
            }
        }
    }
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
    /// Of what is given, `weights` bytes of it; nothing is known from earlier runs, nor kept for later ones.
    pub fn of(name: &str, bundle: Bundle, backend: Box<dyn Backend>, config: EngineConfig, weights: u64) -> Plan {
        let memory = memory_table(&bundle.config, &config, weights);
        let (name, times) = (name.to_owned(), StartTimes::default());
        let seat = Seat::whole(&backend.info().id);
        let (costs, tuned_cost, kv_events) = (None, None, None);
        let (stages, choice) = (Vec::new(), None);
        Plan { name, seat, bundle, backend, config, memory, stages, choice, costs, tuned_cost, kv_events, times }
    }

    /// Refuses what the device's memory, where that is known, cannot hold.
    pub fn check_memory(&self) -> Result<(), StartError> {
        let device = self.backend.info();
        let stages = self.stages.iter().map(|stage| (&stage.device, stage.available, &stage.memory));
        for (device, available, memory) in stages.chain([(&device.id, device.memory_bytes, &self.memory)]) {
            let needed = memory.total();
            if let Some(available) = available.filter(|&available| available < needed) {
                let remedy = remedy::remedy(memory, needed - available, self.bundle.has_floats());
                return Err(StartError::BeyondMemory { needed, device: device.clone(), available, remedy });
            }
        }
        Ok(())
    }

    /// Loads the weights and starts the engine's thread.
    pub fn load(self) -> Result<ServedModel, StartError> {
        load::load(vec![self])
    }

    /// Loads the weights, for a command that drives the engine itself.
    pub fn load_engine(self) -> Result<Engine, StartError> {
        Ok(self.load_replica((random(), random()))?.engine)
    }
}

/// With a progress bar where there is a terminal. Refuses a latency target that the device cannot meet.
fn load_engine(
    bundle: Bundle,
    mut backend: Box<dyn Backend>,
    config: EngineConfig,
    hash_key: (u64, u64),
    times: &mut StartTimes,
) -> Result<Engine, StartError> {
    let Bundle { config: model, checkpoint, total_bytes, .. } = bundle;
    let bar = ProgressBar::new(total_bytes).with_style(bar_style()).with_message("loading");
    let mut progress = |read_bytes: u64| bar.set_position(read_bytes);
    let model = Model::load(model, config.state_limits(), &checkpoint, backend.as_mut(), &mut progress)?;
    bar.finish_and_clear();
    times.end("weights", &Parts::of(backend.settle()));
    if model.num_host_blocks() < config.num_host_blocks {
        tracing::warn!("this device cannot copy to the host's memory: preempted requests are recomputed");
    }
    let mut engine = Engine::new(config, model, backend, hash_key);
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
