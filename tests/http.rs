//! The server over real sockets, on the simulator, in this process. Needs nothing. `harness` has what the others share.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpStream};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use fullbore::api::ServedModel;
use fullbore::http::accept::Limits;
use fullbore::http::access::Access;
use fullbore::start::{self, Plan};
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::cost::{CostModel, Prices, StepShape};
use fullbore_engine::engine::EngineStats;
use fullbore_engine::request::{Event, Flow, Request, Share, Sink, TokenId};
use serde_json::{Value, json};

mod access;
mod answers;
mod anthropic;
mod bench;
pub mod chaos;
mod connections;
mod embeddings;
mod fleet;
mod grpc;
mod harness;
mod kv_events;
mod life;
mod limits;
mod live;
mod loads;
mod metrics;
mod openapi;
mod overload;
mod page;
mod parameters;
mod reading;
mod refusals;
mod responses;
mod results;
mod sampling;
mod several;
mod structured;
mod tenants;
mod tools;
mod traces;
mod worker;

pub use harness::*;
