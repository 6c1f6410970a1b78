//! `fullbore run`: one prompt, its answer on standard output as it comes, and what it took on standard error.
//!
//! Invariant: the same path as a request over HTTP, without the HTTP.

use std::io::{self, Write};
use std::time::Instant;

use serde_json::json;

use crate::api::{self, Endpoint, Generation, ServedModel};
use crate::args::{EngineArgs, RunArgs};
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::start::{self, StartError};

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("{0}")]
    Refused(String),
    #[error("cannot write the answer: {0}")]
    Write(#[from] io::Error),
}

pub fn run(args: &RunArgs) -> Result<(), RunError> {
    let engine_args = EngineArgs { max_num_seqs: 1, ..EngineArgs::new(args.model.clone()) };
    let model = start::plan(&engine_args, None)?.load()?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let result = runtime.block_on(answer(&model, args));
    model.end();
    result
}

async fn answer(model: &ServedModel, args: &RunArgs) -> Result<(), RunError> {
    let refused = |error: ApiError| RunError::Refused(error.message);
    let raw = args.raw || model.chat_template.is_none();
    let mut body = match raw {
        true => json!({"prompt": args.prompt}),
        false => json!({"messages": [{"role": "user", "content": args.prompt}]}),
    };
    body["max_tokens"] = json!(args.max_tokens);
    body["temperature"] = json!(args.temperature);
    let endpoint = if raw { Endpoint::Completions } else { Endpoint::Chat };
    let (_, jobs) = api::prepare(endpoint, model, &Client::default(), &body).map_err(refused)?;
    let start = Instant::now();
    let mut generation = Generation::submit(model, jobs, Instant::now()).map_err(refused)?;
    let mut first = None;
    let mut out = io::stdout().lock();
    while let Some(delta) = generation.next().await {
        first.get_or_insert_with(Instant::now);
        out.write_all(delta.map_err(refused)?.text.as_bytes())?;
        out.flush()?;
    }
    writeln!(out)?;
    let usage = generation.usage();
    let first = first.unwrap_or(start);
    let rate = f64::from(usage.completion_tokens.saturating_sub(1)) / first.elapsed().as_secs_f64();
    eprintln!(
        "{} prompt tokens, first text after {:.0} ms; {} tokens at {rate:.1} a second",
        usage.prompt_tokens,
        (first - start).as_secs_f64() * 1e3,
        usage.completion_tokens,
    );
    Ok(())
}
