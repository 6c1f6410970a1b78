//! `fullbore bench offline`: one engine, all requests at once, one line of JSON. It knows no HTTP.

use fullbore_bench::offline::{self, BenchError};
use fullbore_bench::stopwatch::Stopwatch;
use fullbore_bench::workload::Workload;

use crate::args::BenchArgs;
use crate::start::{self, Plan, StartError};

#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Bench(#[from] BenchError),
}

pub fn offline(args: &BenchArgs) -> Result<(), OfflineError> {
    let mut engine_args = args.engine.clone();
    // All are submitted before the first is admitted.
    engine_args.max_waiting = engine_args.max_waiting.max(args.num_requests);
    let plan = start::plan(&engine_args, None)?;
    let stopwatch = Stopwatch::new(plan.backend);
    let dial = stopwatch.dial();
    let model = Plan { backend: Box::new(stopwatch), ..plan }.load()?;
    let BenchArgs { num_requests, prompt_tokens, output_tokens, .. } = *args;
    let workload = Workload { num_requests, prompt_tokens, output_tokens, seed: 1 };
    let report = offline::run(&model.engine, workload, &dial);
    model.engine.shutdown();
    println!("{}", serde_json::json!(report?));
    Ok(())
}
