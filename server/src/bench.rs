//! `fullbore bench`: one engine in this process, driven without HTTP, one device without an engine, or the server
//! before a simulated device; JSON on standard output, and what a person reads on standard error.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io};

use fullbore_bench::grammar::{self, GrammarBenchError, GrammarOptions};
use fullbore_bench::http::HttpBenchError;
use fullbore_bench::offline::BenchError;
use fullbore_bench::ops::{self, ModelShape, OpsError, OpsOptions, OpsReport};
use fullbore_bench::play::{self, Clock, PlayError};
use fullbore_bench::profile::{self, Measured, ProfileError};
use fullbore_bench::report::ServingReport;
use fullbore_bench::result::{BenchResult, MIN_RUNS, ResultError};
use fullbore_bench::serve::ServeBenchError;
use fullbore_bench::simulate::SimulateError;
use fullbore_bench::submit::{self, SubmitReport};
use fullbore_engine::backend::DeviceInfo;
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::cost::profile::{ProfiledDevice, ProfiledLimits, ProfiledModel};
use fullbore_engine::cost::{CostModel, DeviceProfile, Prices};
use fullbore_engine::engine::Engine;
use fullbore_engine::grammar::{GrammarCompiler, GrammarError, GrammarSource};

use crate::args::{EngineArgs, GrammarArgs, OpsArgs, Profile, ProfileArgs, Shapes, SubmitArgs, TraceArgs};
use crate::devices::{self, DeviceChoiceError};
use crate::serve::ServeError;
use crate::simulate::{WorkloadError, play_options, requests};
use crate::start::{self, StartError};
use crate::version::COMMIT;

mod doctor;
mod http;
mod interrupt;
mod latency;
mod loopback;
mod model_files;
mod report;
mod result;
mod serve;
mod workload;

use interrupt::{Keep, until_interrupted};

pub use doctor::{doctor, measure_doctor};
pub use http::{http, measure_http};
pub use latency::{latency, measure_latency, measure_offline, measure_startup, offline, startup};
pub use report::{report, schema};
pub use serve::{measure_serve, measure_sweep, serve, sweep};

#[derive(Debug, thiserror::Error)]
pub enum BenchCommandError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Bench(#[from] BenchError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    DeviceProfile(#[from] fullbore_engine::cost::profile::ProfileError),
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error(transparent)]
    Play(#[from] PlayError),
    #[error(transparent)]
    Device(#[from] DeviceChoiceError),
    #[error(transparent)]
    Ops(#[from] OpsError),
    #[error(transparent)]
    Grammar(#[from] GrammarBenchError),
    #[error(transparent)]
    Http(#[from] HttpBenchError),
    #[error(transparent)]
    Serve(#[from] Box<ServeError>),
    #[error(transparent)]
    ServeBench(#[from] ServeBenchError),
    #[error(transparent)]
    Result(#[from] ResultError),
    #[error("none of the {0} requests fits into max_model_len, {1} tokens; take shorter --lengths")]
    AllTooLong(usize, u64),
    #[error("--about tells of {0}, and no target has that name; the names are those that --url and --against give")]
    About(String),
    #[error("two targets are called {0}; name one by --against NAME=URL")]
    SameName(String),
    #[error("a sweep makes its own arrivals; leave --arrivals and --speedup out")]
    SweepArrivals,
    #[error("cannot start the threads of a bench: {0}")]
    Runtime(#[from] io::Error),
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    #[error("the device sim takes no time of its own; say which device it is with --device-profile FILE")]
    NoPrices,
    #[error("the bench's own schema does not compile: {0}")]
    Schema(#[from] GrammarError),
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Measures the device and writes its profile.
pub fn profile(args: &ProfileArgs) -> Result<(), BenchCommandError> {
    // One step at a time, and nothing but the grid decides what is in it.
    let engine_args =
        EngineArgs { pipeline_depth: 1, profile: Profile::Throughput, target_itl_ms: None, ..args.engine.clone() };
    let mut engine = start::plan(&engine_args, None)?.load_engine()?;
    let (profile, measured) = measure(&mut engine, &args.engine.model.model, Duration::from_secs(args.seconds))?;
    fs::write(&args.output, profile.to_json())
        .map_err(|source| BenchCommandError::Write { path: args.output.clone(), source })?;
    let Measured { num_steps, num_passes, median_error, p95_error, .. } = measured;
    let knee = profile.cost.knee(profile.limits.max_num_seqs, KNEE_CONTEXT);
    eprintln!(
        "{}: error of the fit {:.1} % (median), {:.1} % (p95); knee at {knee} sequences; {} us of the host a step",
        args.output.display(),
        median_error * 100.0,
        p95_error * 100.0,
        profile.host_ns_per_step / 1000,
    );
    let summary = serde_json::json!({
        "profile": args.output,
        "num_steps": num_steps,
        "num_passes": num_passes,
        "median_error": median_error,
        "p95_error": p95_error,
        "host_ns_per_step": profile.host_ns_per_step,
        "knee": knee,
    });
    println!("{summary}");
    Ok(())
}

/// Layers of an 8B model.
const SUBMIT_LAYERS: u32 = 32;

/// Measures what steps cost the host, at several widths.
pub fn submit(args: &SubmitArgs) -> Result<(), BenchCommandError> {
    measure_submit(args, &mut |DeviceInfo { id, name, driver, .. }, report| {
        println!("{}", serde_json::json!({"device": id, "name": name, "driver": driver, "step": report}));
    })
}

/// Tells what each width costs, and on what.
pub fn measure_submit(
    args: &SubmitArgs,
    told: &mut dyn FnMut(&DeviceInfo, SubmitReport),
) -> Result<(), BenchCommandError> {
    for num_seqs in [1, 16, 64] {
        let backend = devices::open(&args.device)?;
        let device = backend.info().clone();
        let report = submit::measure(backend, SUBMIT_LAYERS, num_seqs, args.steps).map_err(StartError::from)?;
        told(&device, report);
    }
    Ok(())
}

/// More than the caches of a processor hold.
const COLD_BYTES: u64 = 128 << 20;

/// Measures single ops on a device.
pub fn ops(args: &OpsArgs) -> Result<(), BenchCommandError> {
    let (model, context) = match args.shapes {
        Shapes::Small => ("smollm2-135m", 256),
        Shapes::B1 => ("llama-3.2-1b", 1024),
        Shapes::B8 => ("llama-3.1-8b", 1024),
        Shapes::B70 => ("llama-3.1-70b", 1024),
    };
    let shape = ModelShape::of_model(model, context).expect("the engine knows these models");
    let mut backend = devices::open(&args.device)?;
    let options = OpsOptions {
        shape,
        format: args.format,
        rows: args.m.0.clone(),
        only: args.only.clone(),
        time: Duration::from_secs(args.seconds),
        cold_bytes: devices::cold_bytes(backend.info(), COLD_BYTES),
    };
    let mut progress = |num_passes, num_ops| eprintln!("{num_passes} passes over {num_ops} ops");
    let (begun, device) = (BenchResult::begin("ops", 0, COMMIT), backend.info().clone());
    let num_runs = if args.output.is_some() { MIN_RUNS } else { 1 };
    let measure = |keep: Keep| {
        let mut reports = Vec::new();
        while reports.len() < num_runs {
            let report = ops::measure(backend.as_mut(), &options, &mut progress)?;
            if reports.is_empty() {
                tell(&report, args.csv.as_deref())?;
            }
            reports.push(report);
            keep(&result::of_ops(&begun, &reports, &device));
        }
        Ok(result::of_ops(&begun, &reports, &device))
    };
    let output = args.output.clone();
    let write = move |result: &BenchResult| output.as_deref().map_or(Ok(()), |path| Ok(result.write(path)?));
    write(&until_interrupted(measure, write.clone())?)
}

/// The first of several runs is told as it comes.
fn tell(report: &OpsReport, csv: Option<&Path>) -> Result<(), BenchCommandError> {
    eprint!("{report}");
    println!("{}", serde_json::json!(report));
    let Some(path) = csv else { return Ok(()) };
    fs::write(path, report.csv()).map_err(|source| BenchCommandError::Write { path: path.to_owned(), source })
}

/// A usual one, for what is told of a device in one number.
const KNEE_CONTEXT: u32 = 512;

/// The profile of an engine's device, and how it was come by.
pub fn measure(engine: &mut Engine, model: &str, time: Duration) -> Result<(DeviceProfile, Measured), ProfileError> {
    let mut progress = |num_passes, num_steps| eprintln!("{num_passes} passes over the grid, {num_steps} steps");
    let measured = profile::measure(engine, time, &mut progress)?;
    Ok((device_profile(engine, model, measured.clone()), measured))
}

fn device_profile(engine: &Engine, model: &str, measured: Measured) -> DeviceProfile {
    let (device, config) = (engine.backend().info(), engine.config());
    let kv_bytes_per_token = engine.model().config.kv_bytes_per_token(engine.config().kv_type);
    let block_bytes = (kv_bytes_per_token * u64::from(config.block_size)) as f64;
    DeviceProfile {
        device: ProfiledDevice { id: device.id.clone(), name: device.name.clone(), driver: device.driver.clone() },
        model: ProfiledModel { name: model.to_owned(), kv_bytes_per_token },
        limits: ProfiledLimits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_model_len: config.max_model_len,
            block_size: config.block_size,
            num_blocks: config.num_blocks,
            num_host_blocks: engine.model().num_host_blocks(),
        },
        host_ns_per_step: measured.host_ns_per_step,
        ns_per_copied_megabyte: engine.copy_ns() as f64 * 1e6 / block_bytes,
        cost: measured.cost,
        points: measured.points,
    }
}

/// Measures what constrained answers cost the others.
pub fn grammar(args: &GrammarArgs) -> Result<(), BenchCommandError> {
    let mut plan = start::plan(&args.engine, None)?;
    if plan.backend.info().id == "sim" {
        let cost = CostModel::line(args.sim_ms.max(0.0) * 1e6, 0.0, Prices::default());
        plan.backend = Box::new(SimBackend::new(SimOptions { sleeps: true, cost, ..SimOptions::default() }));
    }
    let (tokenizer, stop_ids) = (plan.bundle.tokenizer.clone(), plan.bundle.stop_ids.clone());
    let compiler = GrammarCompiler::new(tokenizer, stop_ids, plan.bundle.config.vocab_size);
    let schema = serde_json::from_str(grammar::SCHEMA).expect("our own schema is JSON");
    let compiled = compiler.compile(&GrammarSource::JsonSchema(schema))?;
    let options = GrammarOptions {
        num_seqs: args.num_seqs,
        num_constrained: args.constrained,
        prompt_tokens: args.prompt_tokens,
        num_steps: args.steps,
        num_rounds: args.rounds,
    };
    let report = grammar::measure(&mut plan.load_engine()?, &compiled, &options)?;
    println!("{}", serde_json::json!(report));
    Ok(())
}

/// Plays a workload in real time.
pub fn trace(args: &TraceArgs) -> Result<(), BenchCommandError> {
    let report = play_trace(args)?;
    eprintln!("{report}");
    println!("{}", serde_json::json!(report));
    Ok(())
}

pub fn play_trace(args: &TraceArgs) -> Result<ServingReport, BenchCommandError> {
    let requests = requests(&args.play.workload)?;
    let costs = args.device_profile.as_deref().map(DeviceProfile::open).transpose()?.map(|profile| profile.cost);
    let mut engine = start::plan(&args.engine, None)?.load_engine()?;
    if let Some(costs) = costs {
        engine.set_cost(costs);
        engine.config().check_target_at(&costs).map_err(StartError::from)?;
    }
    let clock = Clock::Real(Instant::now());
    Ok(play::play(&mut engine, &requests, &clock, play_options(&args.play))?)
}
