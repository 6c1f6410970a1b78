//! `fullbore bench serve` and `sweep`: a server of our own on a device, or one at a URL, and others beside it, under
//! the same load.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fullbore_bench::result::{BenchResult, Measurement, Run, Target, table};
use fullbore_bench::serve::card::Card;
use fullbore_bench::serve::chat::Chat;
use fullbore_bench::serve::endpoint::{Endpoint, without_password};
use fullbore_bench::serve::load::Pace;
use fullbore_bench::serve::{
    self, Bench, Form, Level, Prompts, ServeBenchError, ServeOptions, Side, TextOf, before_knee,
};
use fullbore_bench::trace::Trace;
use fullbore_bench::workload::{Arrivals, Lengths, PlannedRequest};
use fullbore_engine::request::TokenId;
use fullbore_engine::text::{Special, Tokenizer};
use serde_json::{Map, Value, json};

use super::BenchCommandError;
use super::interrupt::INTERRUPTED;
use super::loopback::{Loopback, make_room_for_clients};
use super::result::{finish, target_of};
use super::workload::{self, LeftOut};
use crate::args::{
    EngineArgs, PromptForm, ResultArgs, ServeBenchArgs, ServedArgs, SweepArgs, TargetArgs, WorkloadArgs,
};
use crate::serve::KEY_VARIABLE;
use crate::simulate::{self, tell_without_output};
use crate::start::{self, USUAL_LEN};
use crate::version::COMMIT;

pub fn serve(args: &ServeBenchArgs) -> Result<(), BenchCommandError> {
    end(&measure_serve(args)?, &args.result)
}

pub fn measure_serve(args: &ServeBenchArgs) -> Result<BenchResult, BenchCommandError> {
    let has_times = args.workload.arrivals.is_some() || args.workload.trace.is_some();
    let level = match args.concurrency {
        None if has_times => open(&args.workload)?,
        concurrency => closed(&args.workload, concurrency.unwrap_or(DEFAULT_CONCURRENCY))?,
    };
    measure("serve", &args.targets, &args.workload, args.result.runs, vec![level], &|_| true)
}

pub fn sweep(args: &SweepArgs) -> Result<(), BenchCommandError> {
    end(&measure_sweep(args)?, &args.result)
}

/// As every bench that was interrupted.
fn end(result: &BenchResult, args: &ResultArgs) -> Result<(), BenchCommandError> {
    finish(result, args)?;
    if result.was_interrupted() {
        std::process::exit(INTERRUPTED);
    }
    Ok(())
}

pub fn measure_sweep(args: &SweepArgs) -> Result<BenchResult, BenchCommandError> {
    if args.workload.arrivals.is_some() || args.workload.speedup != 1.0 {
        return Err(BenchCommandError::SweepArrivals);
    }
    let at_rate = |&per_s: &f64| {
        let arrivals = Some(Arrivals::Poisson { per_s });
        let limit = args.workload.limit.or(Some((per_s * SWEEP_SECONDS).ceil().max(8.0) as u32));
        open(&WorkloadArgs { arrivals, limit, ..args.workload.clone() })
    };
    let levels: Result<Vec<_>, _> = match (args.rate.is_empty(), args.concurrency.is_empty()) {
        (false, _) => args.rate.iter().map(at_rate).collect(),
        (true, false) => args.concurrency.iter().map(|&clients| closed(&args.workload, clients)).collect(),
        // Without a knee to end at, all of them would take long.
        (true, true) => SWEEP
            .into_iter()
            .filter(|&clients| !args.all || clients <= MAX_CLIENTS_OF_ALL)
            .map(|clients| closed(&args.workload, clients))
            .collect(),
    };
    let num_sides = 1 + args.targets.against.len();
    let metric = if args.targets.slo.is_some() { "goodput_requests_per_s" } else { "output_tokens_per_s" };
    let goes_on = |measurements: &[Measurement]| args.all || before_knee(num_sides, metric, measurements);
    measure("sweep", &args.targets, &args.workload, args.result.runs, levels?, &goes_on)
}

const DEFAULT_CONCURRENCY: u32 = 16;
const SWEEP: [u32; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
const MAX_CLIENTS_OF_ALL: u32 = 64;
/// Of arrivals at one rate of a sweep.
const SWEEP_SECONDS: f64 = 30.0;
/// Requests of a client in a closed loop, and of an open loop that is made up.
const REQUESTS_PER_CLIENT: u32 = 4;
const DEFAULT_REQUESTS: u32 = 100;

/// A load, before it is known what its targets take.
struct Load {
    level: Level,
    /// Rows without output tokens that were passed over for it in a trace.
    without_output: usize,
    /// Of a Poisson process, with all of its requests.
    per_s: Option<f64>,
}

fn closed(workload: &WorkloadArgs, clients: u32) -> Result<Load, BenchCommandError> {
    let per_client = match workload.lengths {
        // A conversation for each.
        Lengths::Turns { turns, .. } if workload.trace.is_none() => turns,
        _ => REQUESTS_PER_CLIENT,
    };
    let limit = workload.limit.or(Some(clients.saturating_mul(per_client).max(8)));
    let args = WorkloadArgs { arrivals: Some(Arrivals::AtOnce), limit, ..workload.clone() };
    let at = BTreeMap::from([("concurrency".to_owned(), f64::from(clients))]);
    let Trace { requests, num_without_output } = simulate::workload(&args)?;
    let level = Level { at, requests, pace: Pace::Closed(clients) };
    Ok(Load { level, without_output: num_without_output, per_s: None })
}

fn open(workload: &WorkloadArgs) -> Result<Load, BenchCommandError> {
    let limit = workload.limit.or(workload.trace.is_none().then_some(DEFAULT_REQUESTS));
    let args = WorkloadArgs { limit, ..workload.clone() };
    let Trace { requests, num_without_output } = simulate::workload(&args)?;
    let per_s = match workload.arrivals {
        Some(Arrivals::Poisson { per_s }) => Some(per_s * workload.speedup),
        _ => None,
    };
    let level = Level { at: BTreeMap::new(), requests, pace: Pace::Open };
    Ok(Load { level, without_output: num_without_output, per_s })
}

impl Load {
    /// What of it can be sent, from its first request on, and what cannot.
    fn settle(self, max_model_len: u64) -> Result<(Level, LeftOut), BenchCommandError> {
        let Load { mut level, without_output, per_s } = self;
        let num_planned = level.requests.len();
        let too_long = workload::leave_out_too_long(&mut level.requests, max_model_len)?;
        if level.pace == Pace::Open {
            let requests = &mut level.requests;
            let (begun, num_left) = (requests[0].arrival, requests.len());
            requests.iter_mut().for_each(|request| request.arrival -= begun);
            let seconds = requests[num_left - 1].arrival.as_secs_f64();
            let rate = match per_s {
                Some(per_s) => Some(per_s * num_left as f64 / num_planned as f64),
                None => (seconds > 0.0).then(|| (num_left - 1) as f64 / seconds),
            };
            level.at.extend(rate.map(|per_s| ("rate_per_s".to_owned(), per_s)));
        }
        Ok((level, LeftOut { too_long, without_output }))
    }
}

fn measure(
    bench: &str,
    args: &TargetArgs,
    workload: &WorkloadArgs,
    num_runs: u32,
    loads: Vec<Load>,
    goes_on: serve::GoesOn,
) -> Result<BenchResult, BenchCommandError> {
    let mut result = BenchResult::begin(bench, workload.seed, COMMIT);
    tell_without_output(loads.iter().map(|load| load.without_output).max().unwrap_or(0));
    let chat = Chat::of(workload.trace.is_none().then_some(workload.lengths));
    let setup = Setup::start(args, workload.seed, chat, AtOnce::most(&loads))?;
    let settled: Result<Vec<_>, _> = loads.into_iter().map(|load| load.settle(setup.max_model_len)).collect();
    let (levels, left_out): (Vec<_>, Vec<_>) = settled?.into_iter().unzip();
    let options = ServeOptions {
        num_runs,
        num_warm_up: args.warm_up,
        slo: args.slo.unwrap_or_default(),
        think: Duration::from_millis(args.think),
        patience: Duration::from_secs(args.patience.max(1)),
    };
    let mut progress = |target: &str, at: &BTreeMap<String, f64>, run: u32, measured: &Run| {
        let rate = measured.metrics.get("output_tokens_per_s").copied().unwrap_or(0.0);
        let doubts =
            if measured.invalid.is_empty() { String::new() } else { format!("; {}", measured.invalid.join("; ")) };
        eprintln!("{target}{}, run {run} of {num_runs}: {rate:.1} tokens/s{doubts}", table::loads(at));
    };
    let bench = Bench { sides: &setup.sides, prompts: &setup.prompts, options: &options };
    // Where the signal cannot be listened to, nothing stops it but its end.
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    serve::measure(bench, &levels, goes_on, &mut progress, interrupt, &mut result)?;
    let num_measured = result.measurements.len().div_ceil(setup.sides.len());
    result.workload = described(args, workload, &levels[..num_measured], &left_out[..num_measured]);
    Ok(result)
}

/// What may be open at the same time.
#[derive(Clone, Copy)]
struct AtOnce {
    requests: u32,
    /// In a queue: one for every [`USUAL_LEN`] tokens of a prompt.
    places: u64,
}

impl AtOnce {
    fn most(loads: &[Load]) -> AtOnce {
        let of_one = |Load { level, .. }: &Load| {
            let requests = match level.pace {
                Pace::Closed(clients) => clients,
                Pace::Open => level.requests.len() as u32,
            };
            let places = level.requests.iter().map(|request| request.prompt_tokens.div_ceil(USUAL_LEN).max(1));
            let mut places: Vec<u32> = places.collect();
            places.sort_unstable_by(|a, b| b.cmp(a));
            (requests, places.into_iter().take(requests as usize).map(u64::from).sum::<u64>())
        };
        let (requests, places): (Vec<u32>, Vec<u64>) = loads.iter().map(of_one).unzip();
        AtOnce { requests: requests.into_iter().max().unwrap_or(0), places: places.into_iter().max().unwrap_or(0) }
    }
}

fn described(args: &TargetArgs, of: &WorkloadArgs, levels: &[Level], left_out: &[LeftOut]) -> BTreeMap<String, Value> {
    // Every load begins at the head of the trace.
    let most = |of: fn(&LeftOut) -> usize| left_out.iter().map(of).max().unwrap_or(0);
    let left_out = LeftOut { too_long: most(|of| of.too_long), without_output: most(|of| of.without_output) };
    let all: Vec<&PlannedRequest> = levels.iter().flat_map(|level| &level.requests).collect();
    let fields = [
        ("arrivals", json!(of.arrivals.map(|arrivals| arrivals.to_string()))),
        ("speedup", json!(of.speedup)),
        ("requests_per_run", json!(levels.iter().map(|level| level.requests.len()).collect::<Vec<_>>())),
        ("prompts", json!(format!("{:?}", args.prompts).to_lowercase())),
        ("constrained", json!(args.constrained)),
        ("slo", args.slo.map_or(Value::Null, |slo| slo.to_json())),
        ("warm_up_requests", json!(args.warm_up)),
        ("think_ms", json!(args.think)),
    ];
    let mut described = workload::described(of, &all, left_out);
    described.extend(fields.map(|(name, value)| (name.to_owned(), value)));
    described
}

/// Everything that is measured, for as long as this lives.
struct Setup {
    sides: Vec<Side>,
    prompts: Prompts,
    /// Of the target that takes the least; of others it is not known.
    max_model_len: u64,
    _own: Option<Loopback>,
}

impl Setup {
    fn start(args: &TargetArgs, seed: u64, chat: Chat, at_once: AtOnce) -> Result<Setup, BenchCommandError> {
        let (mut sides, mut own, mut max_model_len) = (Vec::new(), None, u64::MAX);
        // Connections are kept: to each server as many as requests were ever open at once.
        let num_elsewhere = args.url.iter().chain(&args.against).count() * at_once.requests as usize;
        let (tokenizer, vocab_size) = if args.url.is_none() {
            let (loopback, side, tokenizer, vocab_size) = start_own(&args.engine, at_once, num_elsewhere)?;
            max_model_len = side.record.limits["max_model_len"].as_u64().unwrap_or(u64::MAX);
            sides.push(side);
            own = Some(loopback);
            (tokenizer, vocab_size)
        } else {
            make_room_for_clients(num_elsewhere);
            let bundle = start::open_bundle(&args.engine.model, &args.engine.model.device.name)?;
            (bundle.tokenizer.clone(), bundle.config.vocab_size)
        };
        for url in args.url.iter().chain(&args.against) {
            let (side, longest) = remote(args, url)?;
            if sides.iter().any(|before| before.record.name == side.record.name) {
                return Err(BenchCommandError::SameName(side.record.name));
            }
            max_model_len = max_model_len.min(longest.unwrap_or(u64::MAX));
            sides.push(side);
        }
        if let Some((name, _)) = args.about.iter().find(|(name, _)| sides.iter().all(|of| of.record.name != *name)) {
            return Err(BenchCommandError::About(name.clone()));
        }
        let form = match args.prompts {
            PromptForm::Ids => Form::Ids,
            PromptForm::Text => Form::Text,
            PromptForm::Chat => Form::Chat(chat),
        };
        let text: Option<Arc<dyn TextOf>> = Some(Arc::new(Texts(tokenizer)));
        let prompts = Prompts { vocab_size, seed, form, is_constrained: args.constrained, text };
        Ok(Setup { sides, prompts, max_model_len, _own: own })
    }
}

/// As many as an engine takes tokens for.
const MAX_PLACES: u64 = (1 << 30) / USUAL_LEN as u64;

type Own = (Loopback, Side, Arc<Tokenizer>, u32);

fn start_own(args: &EngineArgs, at_once: AtOnce, num_elsewhere: usize) -> Result<Own, BenchCommandError> {
    // What a closed loop sends is let in; of the places one tenant gets seven eighths.
    let places = (at_once.places * 8).div_ceil(7).min(MAX_PLACES) as u32;
    let max_queued_requests = args.max_queued_requests.max(places);
    let engine = EngineArgs { max_queued_requests, ..args.clone() };
    let model = start::load(start::plan_all(&[ServedArgs::new(engine)])?)?;
    let (record, tokenizer) = (target_of(&model), model.tokenizer.clone());
    let (name, vocab_size) = (model.name.clone(), model.engine.vocab_size());
    let loopback = Loopback::start(model, at_once.requests as usize, num_elsewhere)?;
    let endpoint =
        Endpoint::new(&format!("http://{}", loopback.address()), None, None).map_err(ServeBenchError::from)?;
    let endpoint = Arc::new(endpoint);
    let side = Side { endpoint, model: name, record, extra: Map::new(), is_fullbore: true };
    Ok((loopback, side, tokenizer, vocab_size))
}

/// A server at `URL` or `NAME=URL`, and the longest request that it takes, where it says so.
fn remote(args: &TargetArgs, spec: &str) -> Result<(Side, Option<u64>), BenchCommandError> {
    let (name, url) = spec.split_once('=').filter(|(name, _)| !name.contains('/')).unwrap_or((spec, spec));
    let key = args.api_key.clone().or_else(|| std::env::var(KEY_VARIABLE).ok()).filter(|key| !key.is_empty());
    let name = &without_password(name);
    let endpoint = Endpoint::new(url, key, args.ca_cert.as_deref()).map_err(ServeBenchError::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let asked = runtime.block_on(Card::of(&endpoint, args.served_model.as_deref(), CARD_PATIENCE));
    let Card { model, is_fullbore, dtype, max_model_len, version, limits } = asked.map_err(ServeBenchError::from)?;
    // Some call a model by its path.
    let file = Path::new(&model).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let record = Target {
        name: name.to_owned(),
        url: Some(endpoint.url.clone()),
        version,
        about: args.about.iter().find(|(of, _)| of == name).map(|(_, about)| about.clone()),
        model: Some(file),
        weights: dtype,
        limits,
        ..Target::default()
    };
    let extra = args.extra.clone().unwrap_or_default();
    let side = Side { endpoint: Arc::new(endpoint), model, record, extra, is_fullbore };
    Ok((side, max_model_len))
}

const CARD_PATIENCE: Duration = Duration::from_secs(10);

struct Texts(Arc<Tokenizer>);

impl TextOf for Texts {
    fn text(&self, ids: &[u32]) -> String {
        self.0.decode(&ids.iter().copied().map(TokenId).collect::<Vec<_>>())
    }

    fn num_tokens(&self, text: &str) -> usize {
        self.0.encode(text, Special::AsText).len()
    }
}
