//! `fullbore bench offline`, `latency` and `startup`: one engine in this process, without HTTP.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fullbore_bench::latency as batch_1;
use fullbore_bench::offline::{self, BenchError};
use fullbore_bench::result::{BenchResult, Measurement, Run};
use fullbore_bench::stopwatch::{Dial, Stopwatch};
use fullbore_bench::workload::Workload;
use fullbore_engine::request::{Event, FinishReason, Flow, Sink};
use serde_json::json;

use super::BenchCommandError;
use super::interrupt::{Keep, until_interrupted};
use super::result::{measured, target_of};
use crate::api::ServedModel;
use crate::args::{BenchArgs, EngineArgs, LatencyArgs, ServedArgs, StartupArgs};
use crate::start::{self, Plan, USUAL_LEN};
use crate::version::COMMIT;

/// All requests at once, one line of JSON a run.
pub fn offline(args: &BenchArgs) -> Result<(), BenchCommandError> {
    let mut engine_args = args.engine.clone();
    // All are submitted at once, and a place is worth `USUAL_LEN` tokens unless more is asked for.
    let num_places = args.num_requests.saturating_mul(args.prompt_tokens.div_ceil(USUAL_LEN).max(1));
    engine_args.max_queued_requests = engine_args.max_queued_requests.max(num_places);
    let BenchArgs { num_requests, prompt_tokens, output_tokens, .. } = *args;
    let workload = Workload { num_requests, prompt_tokens, output_tokens, seed: 1 };
    let run = |model: &ServedModel, workload, dial: &Dial| {
        let report = offline::run(&model.engine, workload, dial)?;
        println!("{}", json!(report));
        Ok(report.to_run())
    };
    let output = args.output.clone();
    let write = move |result: &BenchResult| output.as_deref().map_or(Ok(()), |path| Ok(result.write(path)?));
    let measure = |keep: Keep| measure("offline", &engine_args, workload, args.runs, run, keep);
    write(&until_interrupted(measure, write.clone())?)
}

pub fn latency(args: &LatencyArgs) -> Result<(), BenchCommandError> {
    measured(&args.result, |keep| measure_latency(args, keep))
}

pub fn measure_latency(args: &LatencyArgs, keep: Keep) -> Result<BenchResult, BenchCommandError> {
    let LatencyArgs { num_requests, prompt_tokens, output_tokens, seed, .. } = *args;
    let workload = Workload { num_requests, prompt_tokens, output_tokens, seed };
    let run = |model: &ServedModel, workload, dial: &Dial| batch_1::run(&model.engine, workload, dial);
    measure("latency", &args.engine, workload, args.result.runs, run, keep)
}

/// Runs `run` so many times on one model, on prompts of their own, after one of a single request.
fn measure(
    bench: &str,
    args: &EngineArgs,
    workload: Workload,
    num_runs: u32,
    mut run: impl FnMut(&ServedModel, Workload, &Dial) -> Result<Run, BenchError>,
    keep: Keep,
) -> Result<BenchResult, BenchCommandError> {
    let mut result = BenchResult::begin(bench, workload.seed, COMMIT);
    let dial = Dial::default();
    let timed = |plan: Plan| Plan { backend: Box::new(Stopwatch::new(plan.backend, &dial)), ..plan };
    let plans = start::plan_all(&[ServedArgs::new(args.clone())])?;
    let model = start::load(plans.into_iter().map(timed).collect())?;
    result.targets = vec![target_of(&model)];
    let Workload { num_requests, prompt_tokens, output_tokens, seed } = workload;
    let lengths = [("num_requests", num_requests), ("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)];
    result.workload = lengths.map(|(name, value)| (name.to_owned(), json!(value))).into();
    let with_seed = |nth: u32| Workload { seed: seed ^ (u64::from(nth) << 48), ..workload };
    let target = result.targets[0].name.clone();
    result.measurements = vec![Measurement { target, ..Measurement::default() }];
    let ran = (0..num_runs).try_for_each(|nth| {
        let run = run(&model, with_seed(nth), &dial)?;
        is_whole(&mut result, run, num_runs, keep);
        Ok::<_, BenchError>(())
    });
    model.end();
    ran?;
    result.finish();
    Ok(result)
}

/// One more run of the only measurement.
fn is_whole(result: &mut BenchResult, run: Run, num_runs: u32, keep: Keep) {
    let runs = &mut result.measurements[0].runs;
    runs.push(run);
    eprintln!("run {} of {num_runs} is whole", runs.len());
    keep(result);
}

pub fn startup(args: &StartupArgs) -> Result<(), BenchCommandError> {
    measured(&args.result, |keep| measure_startup(args, keep))
}

/// Starts as often as asked; every start but the first finds what the one before left in the caches.
pub fn measure_startup(args: &StartupArgs, keep: Keep) -> Result<BenchResult, BenchCommandError> {
    let mut result = BenchResult::begin("startup", STARTUP_SEED, COMMIT);
    result.workload = BTreeMap::from([("prompt_tokens".to_owned(), json!(STARTUP_PROMPT_TOKENS))]);
    result.measurements = vec![Measurement::default()];
    for _ in 0..args.result.runs {
        let begun = Instant::now();
        let model = start::plan(&args.engine, None)?.load()?;
        let ready = begun.elapsed();
        let first = first_token(&model);
        result.targets = vec![target_of(&model)];
        result.measurements[0].target = result.targets[0].name.clone();
        let mut run = Run::default();
        model.times.phases().for_each(|(phase, took)| run.metric(&format!("start_{phase}_s"), took.as_secs_f64()));
        model.end();
        run.metric("ready_s", ready.as_secs_f64());
        run.metric("first_token_s", (ready + first?).as_secs_f64());
        is_whole(&mut result, run, args.result.runs, keep);
    }
    result.finish();
    Ok(result)
}

const STARTUP_SEED: u64 = 1;
const STARTUP_PROMPT_TOKENS: u32 = 8;

/// What the first token of a short prompt takes.
fn first_token(model: &ServedModel) -> Result<Duration, BenchError> {
    let begun = Instant::now();
    let workload =
        Workload { num_requests: 1, prompt_tokens: STARTUP_PROMPT_TOKENS, output_tokens: 1, seed: STARTUP_SEED };
    let (sender, receiver) = mpsc::sync_channel(8);
    for request in workload.requests(model.engine.vocab_size()) {
        model.engine.submit_one(request, Box::new(First(sender.clone())))?;
    }
    drop(sender);
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
