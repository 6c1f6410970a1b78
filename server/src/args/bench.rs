//! Words of the benches that leave a result file, and of the page made of those.

use std::path::PathBuf;

use clap::{ArgGroup, Args as ClapArgs, ValueEnum};
use fullbore_bench::serve::tally::Slo;
use fullbore_bench::workload::{Arrivals, Lengths};

use super::{EngineArgs, WorkloadArgs};

/// Where the result goes, and how often it is measured.
#[derive(Clone, Debug, ClapArgs)]
pub struct ResultArgs {
    /// Measure so many times over; fewer than 3 make no valid result.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Write the result to this file [default: standard output].
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Who is measured: a server of this program's on a device of this machine, or one that runs somewhere; and beside it
/// others that get the same requests.
#[derive(Clone, Debug, ClapArgs)]
pub struct TargetArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Measure the server at this URL instead of one that is started here; --model is still whose tokenizer makes
    /// prompts.
    #[arg(long, value_name = "[NAME=]URL")]
    pub url: Option<String>,
    /// Measure this OpenAI-compatible server too, run by run in turn, and print ratios; may be given more than once.
    #[arg(long, value_name = "[NAME=]URL")]
    pub against: Vec<String>,
    /// How the target of that name was built and started, for the result; may be given more than once.
    #[arg(long, value_name = "NAME=TEXT", value_parser = parse_about)]
    pub about: Vec<(String, String)>,
    /// The model to ask a server for that has several.
    #[arg(long, value_name = "NAME")]
    pub served_model: Option<String>,
    /// For servers at URLs; FULLBORE_API_KEY in the environment is not seen by other users of this machine.
    #[arg(long)]
    pub api_key: Option<String>,
    /// Trust servers behind https by the certificates of this PEM file, and not by public authorities.
    #[arg(long, value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// A JSON object whose fields go into each request to servers at URLs, such as {"cache_prompt": false}; null takes
    /// a field away, such as {"ignore_eos": null, "return_token_ids": null} for servers that refuse these.
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub extra: Option<serde_json::Map<String, serde_json::Value>>,
    /// How prompts are sent.
    #[arg(long, value_enum, default_value_t = PromptForm::Ids)]
    pub prompts: PromptForm,
    /// Answers follow a JSON schema, and end where it ends.
    #[arg(long)]
    pub constrained: bool,
    /// Bounds in milliseconds that make a request count as good: ttft, itl (its p99), tpot, e2e; as in ttft=200,itl=50.
    #[arg(long)]
    pub slo: Option<Slo>,
    /// Requests that each target gets before anything is measured.
    #[arg(long, default_value_t = 4)]
    pub warm_up: u32,
    /// Milliseconds between an answer and the next turn of its conversation, where there are any (chat, agent, turns).
    #[arg(long, default_value_t = 0)]
    pub think: u64,
    /// Give a request up that has brought no data for so many seconds; comments that keep a stream alive are none.
    #[arg(long, default_value_t = 120)]
    pub patience: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PromptForm {
    /// Token ids to /v1/completions: both sides compute the same tokens.
    Ids,
    /// Text to /v1/completions.
    Text,
    /// Messages to /v1/chat/completions: of turns one each, with calls of a tool where --lengths is agent, else one.
    Chat,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct ServeBenchArgs {
    #[command(flatten)]
    pub targets: TargetArgs,
    /// Closed loop: so many clients send one request after the other [default: 16, without --arrivals and --trace].
    #[arg(long, conflicts_with_all = ["arrivals", "speedup"], value_parser = clap::value_parser!(u32).range(1..))]
    pub concurrency: Option<u32>,
    #[command(flatten)]
    pub workload: WorkloadArgs,
    #[command(flatten)]
    pub result: ResultArgs,
}

#[derive(Clone, Debug, ClapArgs)]
#[command(group(ArgGroup::new("load").args(["concurrency", "rate"])))]
pub struct SweepArgs {
    #[command(flatten)]
    pub targets: TargetArgs,
    /// Clients at once, ascending, such as 1,2,4,8 [default: 1, 2, 4 and so on, up to 1024; with --all to 64].
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub concurrency: Vec<u32>,
    /// Or requests a second, ascending, of a Poisson process.
    #[arg(long, value_delimiter = ',')]
    pub rate: Vec<f64>,
    /// Go on beyond the knee: the load from which on more brings no target 5 % more.
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub workload: WorkloadArgs,
    #[command(flatten)]
    pub result: ResultArgs,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct OfflineArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// A trace, as of `fullbore simulate`: its lengths count, and its times do not.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// How long requests are, as of `fullbore simulate`.
    #[arg(long, default_value = "uniform:64-192:32-96", conflicts_with = "trace")]
    pub lengths: Lengths,
    /// Requests of a run, at most [default: all rows of the trace, or 32].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Of lengths and token ids.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    #[command(flatten)]
    pub result: ResultArgs,
}

impl OfflineArgs {
    pub fn workload(&self) -> WorkloadArgs {
        let limit = self.limit.or(self.trace.is_none().then_some(OFFLINE_REQUESTS));
        let (trace, lengths, seed) = (self.trace.clone(), self.lengths, self.seed);
        WorkloadArgs { trace, arrivals: Some(Arrivals::AtOnce), lengths, limit, speedup: 1.0, seed }
    }
}

const OFFLINE_REQUESTS: u32 = 32;

#[derive(Clone, Debug, ClapArgs)]
pub struct LatencyArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Requests of a run, one after the other.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub num_requests: u32,
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: u32,
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    pub output_tokens: u32,
    /// Of token ids.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    #[command(flatten)]
    pub result: ResultArgs,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct StartupArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub result: ResultArgs,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct ReportArgs {
    /// Result files.
    #[arg(required = true, value_name = "RESULT")]
    pub results: Vec<PathBuf>,
    /// The page to write; as Markdown if its name ends in .md.
    #[arg(long, short, default_value = "report.html", value_name = "FILE")]
    pub output: PathBuf,
}

fn parse_about(text: &str) -> Result<(String, String), String> {
    let (name, text) =
        text.split_once('=').ok_or("write it as NAME=TEXT, with the name that --url or --against gives")?;
    Ok((name.to_owned(), text.to_owned()))
}

fn parse_object(text: &str) -> Result<serde_json::Map<String, serde_json::Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("it is no JSON object: {error}"))
}
