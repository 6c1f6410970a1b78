//! How clients come in: keys, names, certificates, connections. Invariant: every default serves this machine alone.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use ipnet::IpNet;

use crate::http::proxies::parse_network;

#[derive(Clone, Debug, ClapArgs)]
pub struct AccessArgs {
    /// A key that clients must show; others get 401. Better kept in a file, or in FULLBORE_API_KEY: other users of this
    /// machine can read the command line.
    #[arg(long = "api-key", value_name = "KEY")]
    pub api_keys: Vec<String>,
    /// A file of keys: lines of KEY, KEY NAME or KEY NAME=WEIGHT[:MAX], # before remarks; read again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Serve other machines without asking for a key.
    #[arg(long)]
    pub insecure: bool,
    /// A name beside localhost that requests to a loopback --host may be sent to, as a proxy on this machine does; * is
    /// any.
    #[arg(long = "allowed-host", value_name = "NAME")]
    pub allowed_hosts: Vec<String>,
    /// A web page's origin, such as https://chat.example, whose scripts may ask; * is any.
    #[arg(long = "allowed-origin", value_name = "ORIGIN")]
    pub allowed_origins: Vec<String>,
    /// A network of proxies (10.0.0.0/8, or an address) whose X-Forwarded-For or Forwarded says for whom they ask, so
    /// that clients without keys are told apart; nobody else's is read.
    #[arg(long = "trusted-proxy", value_name = "CIDR", value_parser = parse_network)]
    pub trusted_proxies: Vec<IpNet>,
    /// A certificate (PEM, the server's own first) to speak TLS with; read again on SIGHUP.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Connections open at once, at most.
    #[arg(long, default_value_t = 1024)]
    pub max_connections: usize,
    /// Of them from one address, or one /64 of IPv6; this machine's own and trusted proxies' apart.
    #[arg(long, default_value_t = 256)]
    pub max_connections_per_ip: usize,
}
