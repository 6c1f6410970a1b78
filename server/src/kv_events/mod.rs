//! KV events for routers of other machines, as vLLM publishes them: batches in MessagePack over ZeroMQ, and again for
//! who missed some.
//!
//! [`config`] reads what vLLM's `--kv-events-config` has, [`holdings`] makes one worker of several devices, [`batch`]
//! writes what happened, [`publisher`] numbers, keeps and sends it, and [`zmtp`] is the wire. Invariant: nothing here
//! slows an engine down, and nobody who connects is trusted: a subscriber that is slow misses batches, which it sees by
//! their numbers.

mod batch;
pub mod config;
mod holdings;
mod publisher;
mod zmtp;

pub use config::KvEventsConfig;
pub use publisher::{KvEventsError, Publisher};
