//! `fullbore bench http`: this server on loopback, before a simulated device, measured by a client on the same machine.
//!
//! Invariant: every measurement has a server of its own, with the limits of `fullbore serve` but for what the
//! measurement itself is about.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fullbore_bench::http::telltale::{Steps, Telltale};
use fullbore_bench::http::{self, LongPrompts};
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimOptions};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::model::ModelConfig;
use fullbore_engine::text::{Special, Tokenizer};
use serde_json::{Map, Value, json};

use super::BenchCommandError;
use super::loopback::Loopback;
use crate::args::{HttpArgs, HttpMeasure, Profile, latency_target};
use crate::fetch;
use crate::start::{Plan, StartError};

struct Served {
    server: Loopback,
    steps: Steps,
    tokenizer: Arc<Tokenizer>,
}

/// Prints what was measured.
pub fn http(args: &HttpArgs) -> Result<(), BenchCommandError> {
    println!("{}", measure_http(args)?);
    Ok(())
}

/// One measurement after the other, by name.
pub fn measure_http(args: &HttpArgs) -> Result<Value, BenchCommandError> {
    let mut report = Map::new();
    let mut measure = |of: HttpMeasure, name: &str, run: &dyn Fn() -> Result<Value, BenchCommandError>| {
        if args.only.is_none_or(|only| only == of) {
            eprintln!("measuring: {name}");
            report.insert(name.to_owned(), run()?);
        }
        Ok::<(), BenchCommandError>(())
    };
    // Memory comes first, before anything is freed that streams could have for nothing.
    measure(HttpMeasure::Idle, "idle_streams", &|| idle(args))?;
    measure(HttpMeasure::Delay, "delay", &|| delay(args))?;
    measure(HttpMeasure::Rate, "rate", &|| rate(args))?;
    measure(HttpMeasure::LongPrompts, "long_prompts", &|| long_prompts(args))?;
    Ok(Value::Object(report))
}

/// A step takes long enough that all can connect while few tokens come.
const IDLE_STEP: Duration = Duration::from_millis(20);

fn idle(args: &HttpArgs) -> Result<Value, BenchCommandError> {
    let max_num_seqs = args.idle.max(16);
    let config = EngineConfig { max_num_batched_tokens: 4096.max(max_num_seqs), ..config(max_num_seqs, 8192) };
    let served = Served::start(args, config, IDLE_STEP)?;
    Ok(json!(http::idle(served.address(), &served.steps, args.idle)?))
}

fn delay(args: &HttpArgs) -> Result<Value, BenchCommandError> {
    let at = |&rate: &u32| {
        let step = Duration::from_secs_f64(f64::from(args.streams) / f64::from(rate.max(1)));
        let num_tokens = (f64::from(args.seconds) / step.as_secs_f64()).ceil() as u32;
        streams(args, num_tokens, step)
    };
    args.rates.iter().map(at).collect()
}

fn rate(args: &HttpArgs) -> Result<Value, BenchCommandError> {
    streams(args, args.tokens, Duration::ZERO)
}

fn streams(args: &HttpArgs, num_tokens: u32, step: Duration) -> Result<Value, BenchCommandError> {
    let served = Served::start(args, config(args.streams, PROMPT_TOKENS + num_tokens), step)?;
    let timed = (!step.is_zero()).then_some(&served.steps);
    Ok(json!(http::streams(served.address(), timed, args.streams, num_tokens)?))
}

const DECODER_STEP: Duration = Duration::from_millis(10);
/// For long prompts to be read in.
const LONG_PROMPTS_TIME: Duration = Duration::from_secs(300);
/// Of the simulated device's memory: long prompts that run at once.
const NUM_LONG: u32 = 4;

fn long_prompts(args: &HttpArgs) -> Result<Value, BenchCommandError> {
    let decoder_tokens = (LONG_PROMPTS_TIME.as_secs_f64() / DECODER_STEP.as_secs_f64()) as u32;
    // Its length is as good as a sample.
    let longest = PROMPT_TOKENS + (args.prompt_tokens + args.prompt_tokens / 64).max(decoder_tokens);
    let short = config(args.decoders + NUM_LONG, longest);
    // All of them are let in: what is refused costs less.
    let num_queued = short.max_queued_requests + 2 * args.clients;
    let config = EngineConfig {
        max_queued_requests: num_queued,
        max_queued_tokens: num_queued.saturating_mul(longest),
        ..short
    };
    let served = Served::start(args, config, DECODER_STEP)?;
    let options = LongPrompts {
        num_clients: args.clients,
        prompt_bytes: served.bytes_of(args.prompt_tokens, args.clients.saturating_sub(1)),
        num_decoders: args.decoders,
        decoder_tokens,
        before: Duration::from_secs(u64::from(args.seconds)),
    };
    Ok(json!(http::long_prompts(served.address(), &options)?))
}

/// Of the chat template around a short prompt, at most.
const PROMPT_TOKENS: u32 = 256;
const BLOCK_SIZE: u32 = 32;

/// What `num_seqs` sequences of `max_model_len` tokens need to run at once, and the defaults.
fn config(num_seqs: u32, max_model_len: u32) -> EngineConfig {
    let default = EngineConfig::default();
    EngineConfig {
        max_num_seqs: num_seqs,
        max_num_batched_tokens: default.max_num_batched_tokens.max(num_seqs),
        max_logit_rows: default.max_logit_rows.max(num_seqs),
        // Of which a part is kept for other tenants.
        max_queued_requests: default.max_queued_requests.max(2 * num_seqs),
        max_queued_tokens: default.max_queued_tokens.max(max_model_len),
        max_model_len,
        block_size: BLOCK_SIZE,
        latency: latency_target(None, Profile::Balanced),
        num_blocks: num_seqs * max_model_len.div_ceil(BLOCK_SIZE),
        ..default
    }
}

impl Served {
    /// Serves on a device whose every step takes `step`.
    fn start(args: &HttpArgs, config: EngineConfig, step: Duration) -> Result<Served, BenchCommandError> {
        config.check().map_err(StartError::from)?;
        let bundle = bundle(args, config.max_model_len)?;
        let cost = CostModel::line(step.as_nanos() as f64, 0.0, Prices::default());
        let sim = SimOptions { fidelity: Fidelity::Cost, sleeps: true, cost, ..SimOptions::default() };
        let tokenizer = bundle.tokenizer.clone();
        let id = |letter: u8| match tokenizer.encode(&char::from(letter).to_string(), Special::AsText)[..] {
            [.., id] => id.0,
            [] => 0,
        };
        let backend = Telltale::new(SimBackend::new(sim), id);
        let steps = backend.steps();
        let name = bundle.name.clone();
        let model = Plan::of(&name, bundle, Box::new(backend), config, 0).load()?;
        Ok(Served { server: Loopback::start(model, 0, 0)?, steps, tokenizer })
    }

    /// How long a prompt is that has so many tokens: that of client `nth`, for larger numbers have more of them.
    fn bytes_of(&self, num_tokens: u32, nth: u32) -> usize {
        let sample = http::long_prompt(nth, 1 << 16);
        let sample_tokens = self.tokenizer.encode(&sample, Special::AsText).len();
        (num_tokens as usize).saturating_mul(sample.len()) / sample_tokens.max(1)
    }

    fn address(&self) -> SocketAddr {
        self.server.address()
    }
}

/// The simulated model for texts of `max_positions`, with another's tokenizer and template where that was asked for.
fn bundle(args: &HttpArgs, max_positions: u32) -> Result<Bundle, BenchCommandError> {
    let simulated = Bundle::simulated();
    let num_layers = simulated.config.num_layers;
    let (tokenizer, chat_template) = match &args.model {
        None => (simulated.tokenizer, simulated.chat_template),
        Some(model) => {
            let path = fetch::fetch(model).map_err(StartError::from)?;
            let Bundle { tokenizer, chat_template, .. } = Bundle::open(&path).map_err(StartError::from)?;
            (tokenizer, chat_template)
        }
    };
    let config = ModelConfig { max_positions, ..ModelConfig::tiny(tokenizer.vocab_size() as u32, num_layers) };
    Ok(Bundle { config, tokenizer, chat_template, stop_ids: Vec::new(), ..simulated })
}
