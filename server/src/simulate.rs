//! `fullbore simulate`: a profile, limits and a workload in; what would happen out. Nothing here measures or predicts.

use std::path::Path;
use std::time::{Duration, Instant};

use fullbore_bench::play::PlayOptions;
use fullbore_bench::report::ServingReport;
use fullbore_bench::simulate::{self, SimulateError};
use fullbore_bench::trace::{self, Trace, TraceError};
use fullbore_bench::workload::{PlannedRequest, generate};
use fullbore_engine::bundle::{Bundle, BundleError};
use fullbore_engine::config::{ConfigError, EngineConfig};
use fullbore_engine::cost::DeviceProfile;
use fullbore_engine::cost::profile::{ProfileError, ProfiledLimits};
use fullbore_engine::memory::capacity::{self, BudgetTooSmall};

use crate::args::{PlayArgs, SimulateArgs, WorkloadArgs, latency_target};
use crate::fetch::{self, FetchError};
use crate::start::queued_tokens;

mod fleet;

use fleet::FleetError;

#[derive(Debug, thiserror::Error)]
pub enum SimulateCommandError {
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Budget(#[from] BudgetTooSmall),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("--swap-memory needs to know what a copy takes: give the profile an `ns_per_copied_megabyte` above 0")]
    NoCopyPrice,
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    Simulate(#[from] SimulateError),
}

/// Why there are no requests to play.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("a workload needs --trace or --arrivals")]
    Missing,
    #[error("--limit is 0; there would be no request")]
    Empty,
    #[error("request {row} would come after more than 31 years; raise the rate or --speedup")]
    TooLate { row: u32 },
}

pub fn simulate(args: &SimulateArgs) -> Result<(), SimulateCommandError> {
    let begun = Instant::now();
    let profile = match (&args.fleet, &args.profile) {
        (Some(path), _) => return fleet::simulate(path, args),
        (None, profile) => profile.as_deref().expect("one of the two is asked for"),
    };
    let report = report(profile, args)?;
    let (took_s, num_tokens) = (begun.elapsed().as_secs_f64(), report.scheduled_tokens_per_s * report.duration_s);
    eprintln!("{report}");
    eprintln!("simulated in {took_s:.2} s, {:.0} scheduled tokens a second", num_tokens / took_s);
    println!("{}", serde_json::json!(report));
    Ok(())
}

pub fn report(profile: &Path, args: &SimulateArgs) -> Result<ServingReport, SimulateCommandError> {
    let requests = requests(&args.play.workload)?;
    let (profile, config) = device(profile, args)?;
    Ok(simulate::simulate(&profile, config, &requests, play_options(&args.play))?)
}

/// What is simulated of a device, and with which limits.
fn device(path: &Path, args: &SimulateArgs) -> Result<(DeviceProfile, EngineConfig), SimulateCommandError> {
    let mut profile = DeviceProfile::open(path)?;
    let mut max_positions = u32::MAX;
    if let Some(model) = &args.model {
        let model = Bundle::open(&fetch::fetch(model)?)?.config;
        profile.model.kv_bytes_per_token = model.kv_bytes_per_token(args.kv_type);
        max_positions = model.max_positions;
    }
    let config = engine_config(args, &profile, max_positions)?;
    let ProfiledLimits { max_num_batched_tokens: measured, .. } = profile.limits;
    if config.max_num_batched_tokens > measured {
        tracing::warn!("steps of more than {measured} rows were not measured; what they take is extrapolated");
    }
    Ok((profile, config))
}

/// The profile's limits, where the command line gives no other.
fn engine_config(
    args: &SimulateArgs,
    profile: &DeviceProfile,
    max_positions: u32,
) -> Result<EngineConfig, SimulateCommandError> {
    let limits = profile.limits;
    let max_num_seqs = args.max_num_seqs.unwrap_or(limits.max_num_seqs);
    let block_size = args.block_size.unwrap_or(limits.block_size).max(1);
    let max_model_len = args.max_model_len.unwrap_or(limits.max_model_len.min(max_positions));
    let kv_bytes_per_token = profile.model.kv_bytes_per_token;
    let num_blocks = match (args.kv_blocks, args.kv_memory) {
        (Some(num_blocks), _) => num_blocks,
        (None, Some(budget)) => capacity::num_blocks(kv_bytes_per_token, budget, block_size, max_model_len)?,
        // As many tokens as were measured with, in blocks of this size.
        (None, None) => {
            let num_tokens = u64::from(limits.num_blocks) * u64::from(limits.block_size);
            u32::try_from(num_tokens / u64::from(block_size)).unwrap_or(u32::MAX)
        }
    };
    let config = EngineConfig {
        max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens.unwrap_or(limits.max_num_batched_tokens),
        max_model_len,
        kv_type: args.kv_type,
        block_size,
        num_blocks,
        num_host_blocks: num_host_blocks(args, profile, block_size)?,
        max_queued_requests: args.max_queued_requests,
        max_queued_tokens: queued_tokens(args.max_queued_tokens, args.max_queued_requests, max_model_len),
        max_queue_ms: args.max_queue_ms,
        max_logit_rows: max_num_seqs.max(EngineConfig::default().max_logit_rows),
        pipeline_depth: args.pipeline_depth,
        latency: latency_target(args.target_itl_ms, args.latency_profile),
        max_grammar_bytes: EngineConfig::default().max_grammar_bytes,
        prefix_cache: !args.no_prefix_cache,
    };
    config.check()?;
    config.check_target_at(&profile.cost)?;
    Ok(config)
}

/// None where the profile does not say what a copy takes.
fn num_host_blocks(args: &SimulateArgs, profile: &DeviceProfile, block_size: u32) -> Result<u32, SimulateCommandError> {
    let is_priced = profile.ns_per_copied_megabyte > 0.0;
    match args.swap_memory {
        Some(1..) if !is_priced => Err(SimulateCommandError::NoCopyPrice),
        Some(bytes) => Ok(capacity::num_host_blocks(profile.model.kv_bytes_per_token, bytes, block_size)),
        None if !is_priced => Ok(0),
        None => {
            let num_tokens = u64::from(profile.limits.num_host_blocks) * u64::from(profile.limits.block_size);
            Ok(u32::try_from(num_tokens / u64::from(block_size)).unwrap_or(u32::MAX / block_size))
        }
    }
}

/// The requests that the command line describes, in order of arrival; says on standard error what a trace has beside
/// them.
pub fn requests(args: &WorkloadArgs) -> Result<Vec<PlannedRequest>, WorkloadError> {
    let Trace { requests, num_without_output } = workload(args)?;
    tell_without_output(num_without_output);
    Ok(requests)
}

pub fn tell_without_output(num_rows: usize) {
    if num_rows > 0 {
        eprintln!("left out: {num_rows} rows of the trace without output tokens, of requests that failed");
    }
}

/// `requests`, and how many rows of a trace were none.
pub fn workload(args: &WorkloadArgs) -> Result<Trace, WorkloadError> {
    if args.limit == Some(0) {
        return Err(WorkloadError::Empty);
    }
    let limit = args.limit.map_or(usize::MAX, |limit| limit as usize);
    let mut num_without_output = 0;
    let mut requests = match (&args.trace, args.arrivals) {
        (Some(path), arrivals) => {
            let mut rows;
            Trace { requests: rows, num_without_output } = trace::read(path, limit)?;
            if let Some(arrivals) = arrivals {
                let num_rows = args.limit.map_or(rows.len(), |limit| limit as usize);
                rows = rows.iter().cycle().take(num_rows).cloned().collect();
                (1..).zip(&mut rows).for_each(|(row, request)| request.row = row);
                arrivals.set(&mut rows, args.seed);
            }
            rows
        }
        (None, Some(arrivals)) => generate(arrivals, args.lengths, args.limit.unwrap_or(DEFAULT_REQUESTS), args.seed),
        (None, None) => return Err(WorkloadError::Missing),
    };
    for request in &mut requests {
        let arrival = Duration::try_from_secs_f64(request.arrival.as_secs_f64() / args.speedup);
        request.arrival = arrival.unwrap_or(Duration::MAX);
        if request.arrival > MAX_ARRIVAL {
            return Err(WorkloadError::TooLate { row: request.row });
        }
    }
    Ok(Trace { requests, num_without_output })
}

const DEFAULT_REQUESTS: u32 = 1000;
/// Some 31 years, well within what a clock of nanoseconds counts.
const MAX_ARRIVAL: Duration = Duration::from_secs(1_000_000_000);

pub fn play_options(args: &PlayArgs) -> PlayOptions {
    PlayOptions { refuse_when_full: args.refuse_when_full, seed: args.workload.seed }
}
