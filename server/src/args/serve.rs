//! Words of `fullbore serve` that are of the server, not of its models.

use std::net::IpAddr;

use clap::Args as ClapArgs;
use fullbore_engine::request::Share;

use super::grpc::GrpcArgs;
use super::{AccessArgs, ModelsArgs, TelemetryArgs};
use crate::api::parse_share;
use crate::kv_events::KvEventsConfig;

#[derive(Clone, Debug, ClapArgs)]
pub struct ServeArgs {
    #[command(flatten)]
    pub models: ModelsArgs,
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// 0 takes any free port.
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// Weight of a tenant (the API key of its requests, else their `user`), and how many of them run at once.
    #[arg(long = "share", value_name = "NAME=WEIGHT[:MAX]", value_parser = parse_share)]
    pub shares: Vec<(String, Share)>,
    #[command(flatten)]
    pub access: AccessArgs,
    /// Seconds that running requests have to end after SIGTERM.
    #[arg(long, default_value_t = 30)]
    pub drain_timeout: u64,
    /// Seconds before that in which the server says that it is not ready and takes requests all the same, so that
    /// routers that ask now and then send it nothing that it would refuse.
    #[arg(long, default_value_t = 0)]
    pub drain_accept_seconds: u64,
    /// Publish which KV blocks are stored and removed, for routers, as vLLM does and by its words, such as
    /// {"endpoint": "tcp://127.0.0.1:5557"}; whoever connects there is told the tokens of prompts.
    #[arg(long, value_name = "JSON")]
    pub kv_events_config: Option<KvEventsConfig>,
    #[command(flatten)]
    pub grpc: GrpcArgs,
    /// Print where memory would go and end, without loading weights.
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}
