//! `fullbore bench offline`, `latency` and `startup`: one engine in this process, without HTTP.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fullbore_bench::latency as batch_1;
use fullbore_bench::offline::{self, BenchError};
use fullbore_bench::result::{BenchResult, FIRST_START, Measurement, Run};
use fullbore_bench::stopwatch::{Dial, Stopwatch};
use fullbore_bench::trace::Trace;
use fullbore_bench::workload::{Arrivals, Lengths, PlannedRequest};
use fullbore_engine::request::{Event, FinishReason, Flow, Sink};
use serde_json::json;

use super::BenchCommandError;
use super::interrupt::Keep;
use super::result::{measured, target_of};
use super::workload::{LeftOut, WARM_UP_SEED, described, leave_out_too_long, warm_up};
use crate::api::ServedModel;
use crate::args::{EngineArgs, LatencyArgs, OfflineArgs, ServedArgs, StartupArgs, WorkloadArgs};
use crate::simulate::{self, tell_without_output};
use crate::start::{self, Plan, USUAL_LEN};
use crate::version::COMMIT;

pub fn offline(args: &OfflineArgs) -> Result<(), BenchCommandError> {
    measured(&args.result, |keep| measure_offline(args, keep))
}

/// All requests at once.
pub fn measure_offline(args: &OfflineArgs, keep: Keep) -> Result<BenchResult, BenchCommandError> {
    let workload = args.workload();
    let Trace { requests, num_without_output } = simulate::workload(&workload)?;
    tell_without_output(num_without_output);
    let left_out = LeftOut { without_output: num_without_output, ..LeftOut::default() };
    let mut engine = args.engine.clone();
    // A place is worth `USUAL_LEN` tokens unless more is asked for.
    let places = requests.iter().map(|request| request.prompt_tokens.div_ceil(USUAL_LEN).max(1));
    engine.max_queued_requests = engine.max_queued_requests.max(places.fold(0, u32::saturating_add));
    let run = |model: &ServedModel, requests: &[PlannedRequest], seed, dial: &Dial| {
        let report = offline::run(&model.engine, requests, seed, dial)?;
        eprintln!("{:.1} tokens/s; {}", report.output_tokens_per_s, report.verdict);
        Ok(report.to_run())
    };
    let (name, at_once, num_runs) = ("offline", usize::MAX, args.result.runs);
    Bench { name, engine, workload, requests, left_out, at_once, num_runs }.measure(run, keep)
}

pub fn latency(args: &LatencyArgs) -> Result<(), BenchCommandError> {
    measured(&args.result, |keep| measure_latency(args, keep))
}

pub fn measure_latency(args: &LatencyArgs, keep: Keep) -> Result<BenchResult, BenchCommandError> {
    let workload = WorkloadArgs {
        trace: None,
        arrivals: Some(Arrivals::AtOnce),
        lengths: Lengths::Fixed { prompt: args.prompt_tokens, output: args.output_tokens },
        limit: Some(args.num_requests),
        speedup: 1.0,
        seed: args.seed,
    };
    let (engine, requests, num_runs) = (args.engine.clone(), simulate::requests(&workload)?, args.result.runs);
    let run = |model: &ServedModel, requests: &[PlannedRequest], seed, dial: &Dial| {
        batch_1::run(&model.engine, requests, seed, dial)
    };
    let left_out = LeftOut::default();
    Bench { name: "latency", engine, workload, requests, left_out, at_once: 1, num_runs }.measure(run, keep)
}

/// Of one model in this process.
struct Bench {
    name: &'static str,
    engine: EngineArgs,
    workload: WorkloadArgs,
    requests: Vec<PlannedRequest>,
    left_out: LeftOut,
    /// Of its requests, at most.
    at_once: usize,
    num_runs: u32,
}

/// Of these requests, with prompts drawn from this seed.
type OneRun<'a> = &'a mut dyn FnMut(&[PlannedRequest], u64) -> Result<Run, BenchError>;

impl Bench {
    /// Runs `run` so many times on prompts of their own, after one of short answers that is not counted.
    fn measure(
        mut self,
        mut run: impl FnMut(&ServedModel, &[PlannedRequest], u64, &Dial) -> Result<Run, BenchError>,
        keep: Keep,
    ) -> Result<BenchResult, BenchCommandError> {
        let seed = self.workload.seed;
        let mut result = BenchResult::begin(self.name, seed, COMMIT);
        let dial = Dial::default();
        let timed = |plan: Plan| Plan { backend: Box::new(Stopwatch::new(plan.backend, &dial)), ..plan };
        let plans = start::plan_all(&[ServedArgs::new(self.engine.clone())])?;
        let model = start::load(plans.into_iter().map(timed).collect())?;
        result.targets = vec![target_of(&model)];
        result.measurements = vec![Measurement { target: result.targets[0].name.clone(), ..Measurement::default() }];
        let ran = self.run_all(&model, &mut result, &mut |requests, seed| run(&model, requests, seed, &dial), keep);
        model.end();
        ran?;
        result.finish();
        Ok(result)
    }

    fn run_all(
        &mut self,
        model: &ServedModel,
        result: &mut BenchResult,
        run: OneRun,
        keep: Keep,
    ) -> Result<(), BenchCommandError> {
        let (config, num_devices) = (model.engine.config(), model.engine.engines().len());
        self.left_out.too_long = leave_out_too_long(&mut self.requests, config.max_model_len.into())?;
        result.workload = described(&self.workload, &self.requests.iter().collect::<Vec<_>>(), self.left_out);
        result.workload.insert("requests_per_run".to_owned(), json!(self.requests.len()));
        let num_warm_up = self.at_once.min(config.max_num_seqs as usize * num_devices);
        let seed = self.workload.seed;
        run(&warm_up(&self.requests, num_warm_up), seed ^ WARM_UP_SEED)?;
        for nth in 1..=self.num_runs {
            let run = run(&self.requests, seed ^ (u64::from(nth) << 48))?;
            is_whole(result, run, self.num_runs, keep);
        }
        Ok(())
    }
}

/// One more run of the measurement that is repeated.
fn is_whole(result: &mut BenchResult, run: Run, num_runs: u32, keep: Keep) {
    let runs = &mut result.measurements[0].runs;
    runs.push(run);
    eprintln!("run {} of {num_runs} is whole", runs.len());
    keep(result);
}

pub fn startup(args: &StartupArgs) -> Result<(), BenchCommandError> {
    measured(&args.result, |keep| measure_startup(args, keep))
}

/// Starts once, and then as often as asked: those find what the start before left in the caches.
pub fn measure_startup(args: &StartupArgs, keep: Keep) -> Result<BenchResult, BenchCommandError> {
    let mut result = BenchResult::begin("startup", STARTUP_SEED, COMMIT);
    result.workload = BTreeMap::from([("prompt_tokens".to_owned(), json!(STARTUP_PROMPT_TOKENS))]);
    let first = started(args, |model| result.targets = vec![target_of(model)])?;
    let name = result.targets[0].name.clone();
    let first_start =
        Measurement { subject: Some(FIRST_START.to_owned()), runs: vec![first], ..Measurement::default() };
    let later = Measurement { target: name.clone(), ..Measurement::default() };
    result.measurements = vec![later, Measurement { target: name, ..first_start }];
    for _ in 0..args.result.runs {
        let run = started(args, |_| {})?;
        is_whole(&mut result, run, args.result.runs, keep);
    }
    result.finish();
    Ok(result)
}

/// One start, until a short prompt has its first token; `look` is shown what is there then.
fn started(args: &StartupArgs, look: impl FnOnce(&ServedModel)) -> Result<Run, BenchCommandError> {
    let begun = Instant::now();
    let model = start::plan(&args.engine, None)?.load()?;
    let ready = begun.elapsed();
    let first = first_token(&model);
    look(&model);
    let mut run = Run::default();
    model.times.phases().for_each(|(phase, took)| run.metric(&format!("start_{phase}_s"), took.as_secs_f64()));
    model.end();
    run.metric("ready_s", ready.as_secs_f64());
    run.metric("first_token_s", (ready + first?).as_secs_f64());
    Ok(run)
}

const STARTUP_SEED: u64 = 1;
const STARTUP_PROMPT_TOKENS: u32 = 8;

/// What the first token of a short prompt takes.
fn first_token(model: &ServedModel) -> Result<Duration, BenchError> {
    let begun = Instant::now();
    let planned =
        PlannedRequest { prompt_tokens: STARTUP_PROMPT_TOKENS, output_tokens: 1, ..PlannedRequest::default() };
    let (sender, receiver) = mpsc::sync_channel(8);
    let request = planned.request(model.engine.vocab_size(), STARTUP_SEED);
    model.engine.submit_one(request, Box::new(First(sender)))?;
    match receiver.recv() {
        Ok(Ok(at)) => Ok(at.saturating_duration_since(begun)),
        Ok(Err(reason)) => Err(BenchError::Failed { index: 0, reason }),
        Err(_) => Err(BenchError::EngineGone),
    }
}

/// Tells when the first token came, or why none did.
struct First(mpsc::SyncSender<Result<Instant, String>>);

impl Sink for First {
    fn event(&mut self, event: Event) -> Flow {
        let told = match event {
            Event::Token { .. } => Ok(Instant::now()),
            Event::Finished { reason: FinishReason::Error(reason) | FinishReason::DeviceLost(reason), .. } => {
                Err(reason)
            }
            _ => return Flow::Continue,
        };
        // Whoever waits has gone, or has been told.
        let _ = self.0.try_send(told);
        Flow::Stop
    }

    fn is_closed(&self) -> bool {
        false
    }
}
