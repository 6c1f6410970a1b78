//! `fullbore run`: one prompt and its answer, or a chat. Answers go to standard output as they come, what they took to
//! standard error.
//!
//! Invariant: the same path as a request over HTTP, without the HTTP.

use std::io::{self, IsTerminal, Write};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::signal::unix::Signal;

use crate::api::{self, Endpoint, Generation, ServedModel};
use crate::args::{EngineArgs, RunArgs};
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::start::{self, StartError};

mod chat;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("{0}")]
    Refused(String),
    #[error("this model has no chat template, so there is no chat with it: give a prompt, which it will go on with")]
    NoTemplate,
    #[error("cannot read or write: {0}")]
    Io(#[from] io::Error),
}

/// Tokens of an answer to one prompt, where nothing was said; a chat's go on until they end or are stopped.
const MAX_TOKENS: u32 = 256;

pub fn run(args: &RunArgs) -> Result<(), RunError> {
    let engine_args = EngineArgs { max_num_seqs: 1, ..EngineArgs::new(args.model.clone()) };
    let model = start::plan(&engine_args, None)?.load()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = match &args.prompt {
        Some(prompt) => runtime.block_on(answer_once(&model, args, prompt)),
        None if model.chat_template.is_none() => Err(RunError::NoTemplate),
        None => runtime.block_on(chat::chat(&model, args)),
    };
    model.end();
    // Who reads standard input may wait for a line that never comes.
    runtime.shutdown_background();
    result
}

async fn answer_once(model: &ServedModel, args: &RunArgs, prompt: &str) -> Result<(), RunError> {
    let raw = args.raw || model.chat_template.is_none();
    let mut body = match raw {
        true => json!({"prompt": prompt}),
        false => json!({"messages": [{"role": "user", "content": prompt}]}),
    };
    body["max_tokens"] = json!(args.max_tokens.unwrap_or(MAX_TOKENS));
    body["temperature"] = json!(args.temperature);
    let endpoint = if raw { Endpoint::Completions } else { Endpoint::Chat };
    answer(model, endpoint, &body, None).await.map(drop)
}

/// Writes the answer as it comes, and gives it; a signal ends it where it is.
async fn answer(
    model: &ServedModel,
    endpoint: Endpoint,
    body: &Value,
    mut interrupt: Option<&mut Signal>,
) -> Result<String, RunError> {
    let refused = |error: ApiError| RunError::Refused(error.message);
    let (_, jobs) = api::prepare(endpoint, model, &Client::default(), body).map_err(refused)?;
    let start = Instant::now();
    let mut generation = Generation::submit(model, jobs, start, None, None).map_err(refused)?;
    let mut first = None;
    let mut said = String::new();
    loop {
        let delta = tokio::select! {
            delta = generation.next() => delta,
            () = signalled(interrupt.as_deref_mut()) => break,
        };
        let Some(delta) = delta.transpose().map_err(refused)? else { break };
        first.get_or_insert_with(Instant::now);
        show_thoughts(&delta.reasoning)?;
        write(&delta.text)?;
        said += &delta.text;
    }
    write("\n")?;
    let usage = generation.usage();
    let first = first.unwrap_or(start);
    let rate = f64::from(usage.completion_tokens.saturating_sub(1)) / first.elapsed().as_secs_f64();
    eprintln!(
        "{} prompt tokens, first text after {:.0} ms; {} tokens at {rate:.1} a second",
        usage.prompt_tokens,
        (first - start).as_secs_f64() * 1e3,
        usage.completion_tokens,
    );
    Ok(said)
}

/// When the signal comes; never where there is none.
async fn signalled(interrupt: Option<&mut Signal>) {
    match interrupt {
        Some(interrupt) => drop(interrupt.recv().await),
        None => std::future::pending().await,
    }
}

/// Dimmed, for people alone: a program that reads the answer gets the answer.
fn show_thoughts(thoughts: &str) -> io::Result<()> {
    match thoughts.is_empty() || !io::stdout().is_terminal() {
        true => Ok(()),
        false => write(&format!("\x1b[2m{thoughts}\x1b[0m")),
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
