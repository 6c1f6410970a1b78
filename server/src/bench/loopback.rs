//! A server of this process on loopback, for benches that are its clients.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::runtime::Runtime;

use super::BenchCommandError;
use crate::api::ServedModel;
use crate::http::accept::Limits;
use crate::http::descriptors;
use crate::serve::{Entrance, Server};

/// Listens and serves until it is dropped.
pub struct Loopback {
    runtime: Runtime,
    server: Option<Server>,
}

impl Loopback {
    /// With the limits of `fullbore serve`, but for as many connections as it takes; its clients have so many to others
    /// beside.
    pub fn start(model: ServedModel, num_connections: usize, beside: usize) -> Result<Loopback, BenchCommandError> {
        let usual = Limits::default();
        let limits = Limits { max_connections: usual.max_connections.max(num_connections + SPARE), ..usual };
        // Both ends are in this process.
        make_room_for_clients(2 * limits.max_connections + beside);
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("http").build()?;
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let entrance = Entrance { limits, ..Entrance::default() };
        let server = runtime.block_on(Server::start(host, 0, entrance)).map_err(Box::new)?;
        server.set_models(vec![model]);
        Ok(Loopback { runtime, server: Some(server) })
    }

    pub fn address(&self) -> SocketAddr {
        self.server.as_ref().expect("until it is dropped").address()
    }
}

/// For whoever else asks.
const SPARE: usize = 16;

/// As `descriptors::make_room`, for the clients of a bench.
pub fn make_room_for_clients(num_ends: usize) {
    let otherwise = "requests beyond are not answered; raise the limit (ulimit -n), or have fewer at once \
        (--concurrency, --rate, --limit)";
    descriptors::make_room(num_ends, otherwise);
}

impl Drop for Loopback {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.shutdown(Duration::ZERO));
        }
    }
}
