//! `fullbore bench offline`: one engine, all requests at once, one line of JSON. It knows no HTTP.

use fullbore_bench::offline::{self, BenchError};
use fullbore_bench::workload::Workload;

use crate::args::BenchArgs;
use crate::start::{self, StartError, USUAL_LEN};

#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Bench(#[from] BenchError),
}

pub fn offline(args: &BenchArgs) -> Result<(), OfflineError> {
    let mut engine_args = args.engine.clone();
    // All are submitted before the first begins, and one tenant alone does not get every place.
    let num_places = args.num_requests.saturating_mul(2);
    engine_args.max_queued_requests = engine_args.max_queued_requests.max(num_places);
    let num_tokens = num_places.saturating_mul(args.prompt_tokens.max(USUAL_LEN));
    engine_args.max_queued_tokens = engine_args.max_queued_tokens.max(Some(num_tokens));
    let model = start::plan(&engine_args, None)?.load()?;
    let BenchArgs { num_requests, prompt_tokens, output_tokens, .. } = *args;
    let workload = Workload { num_requests, prompt_tokens, output_tokens, seed: 1 };
    let report = offline::run(&model.engine, workload, model.engine.vocab_size());
    model.end();
    println!("{}", serde_json::json!(report?));
    Ok(())
}
