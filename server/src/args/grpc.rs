//! Where gRPC is spoken. Invariant: unless asked otherwise nobody but this machine is served.

use std::net::{IpAddr, SocketAddr};

use clap::Args as ClapArgs;

#[derive(Clone, Debug, ClapArgs)]
pub struct GrpcArgs {
    /// Speak vLLM's gRPC contract at this port too, for NVIDIA Dynamo; 0 takes any free one.
    #[arg(long)]
    pub grpc_port: Option<u16>,
    /// The address for that; keys, TLS and limits are those of HTTP.
    #[arg(long, default_value = "127.0.0.1", requires = "grpc_port")]
    pub grpc_host: IpAddr,
}

impl GrpcArgs {
    pub fn address(&self) -> Option<SocketAddr> {
        self.grpc_port.map(|port| SocketAddr::new(self.grpc_host, port))
    }
}
