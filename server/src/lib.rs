//! The server: HTTP, JSON, server-sent events, a chat page and the command line around engines,
//! one for each model.
//!
//! Invariant: the only crate with an async runtime. Text is made and read here, never on the engine thread but for
//! stop strings; the engine sees token ids, and what it says comes back through a bounded channel that never blocks it.
//! It knows no kernels.

pub mod api;
pub mod args;
pub mod bench;
pub mod costs;
pub mod device_report;
pub mod devices;
pub mod fetch;
mod files;
pub mod grpc;
pub mod http;
pub mod kv_events;
pub mod live;
pub mod log;
pub mod run;
pub mod sandbox;
pub mod serve;
pub mod simulate;
pub mod start;
pub mod top;
pub mod traces;
pub mod tune;
pub mod tuning;
pub mod verify;
pub mod version;
