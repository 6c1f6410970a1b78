//! Words of `fullbore simulate`.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use fullbore_bench::fleet::rule::Rule;
use fullbore_engine::tensor::KvType;

use super::parse::{parse_bytes, parse_kv_type};
use super::{PlayArgs, Profile};

#[derive(Clone, Debug, ClapArgs)]
pub struct SimulateArgs {
    /// Of the device: written by `fullbore bench profile`, or by hand.
    #[arg(long, required_unless_present = "fleet")]
    pub profile: Option<PathBuf>,
    /// Many devices behind the router instead of one: a TOML file with a [[device]] for each kind, which has a
    /// `profile` (relative to the file), and may have a `name`, a `count` and a `speed` (times as fast as the profile
    /// says).
    #[arg(long, conflicts_with_all = ["profile", "refuse_when_full"])]
    pub fleet: Option<PathBuf>,
    /// By which requests find their device, each in a run of its own: router (what a server does), earliest-finish,
    /// omniscient, round-robin, least-requests, most-cached.
    #[arg(long, requires = "fleet", value_delimiter = ',', default_value = "router")]
    pub rule: Vec<Rule>,
    /// Take KV bytes a token and the longest context from this model [default: what the profile says].
    #[arg(long)]
    pub model: Option<String>,
    #[command(flatten)]
    pub play: PlayArgs,
    /// Requests that run at once, at most [default: the profile's; so are the next four].
    #[arg(long)]
    pub max_num_seqs: Option<u32>,
    /// Tokens of a step, at most.
    #[arg(long)]
    pub max_num_batched_tokens: Option<u32>,
    /// Tokens of one request, prompt and answer, at most.
    #[arg(long)]
    pub max_model_len: Option<u32>,
    /// Tokens that share a KV block.
    #[arg(long)]
    pub block_size: Option<u32>,
    /// KV blocks, instead of --kv-memory.
    #[arg(long, conflicts_with = "kv_memory")]
    pub kv_blocks: Option<u32>,
    /// Memory for the KV cache, such as 256MiB or 4GiB.
    #[arg(long, value_parser = parse_bytes)]
    pub kv_memory: Option<u64>,
    /// Memory of the host for the KV of preempted requests; 0 recomputes them [default: what the profile says].
    #[arg(long, value_parser = parse_bytes)]
    pub swap_memory: Option<u64>,
    /// Type of the KV cache, of which --model says the size.
    #[arg(long, default_value = "f16", value_parser = parse_kv_type)]
    pub kv_type: KvType,
    /// What `serve --profile` would favour.
    #[arg(long, value_enum, default_value_t = Profile::Balanced)]
    pub latency_profile: Profile,
    /// As of `serve`.
    #[arg(long)]
    pub target_itl_ms: Option<u32>,
    /// As of `serve`.
    #[arg(long, default_value_t = 2)]
    pub pipeline_depth: u32,
    /// Never share the KV of equal prompt prefixes.
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Requests that wait to begin, at most; so are the next two as of `serve`.
    #[arg(long, default_value_t = 256)]
    pub max_queued_requests: u32,
    /// Tokens of their prompts, at most [default: 2048 for each request that may wait].
    #[arg(long)]
    pub max_queued_tokens: Option<u32>,
    /// Milliseconds to the first token that may be predicted.
    #[arg(long)]
    pub max_queue_ms: Option<u32>,
}
