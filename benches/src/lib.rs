//! Fullbore's benchmarks: workloads, the run that measures one, and the statistics of what came out.
//!
//! Invariant: a workload is a pure function of its seed. Nothing here opens a device or starts a server: an engine is
//! driven as the server drives it, through its handle or step by step; `http` and `serve` are clients of a server, and
//! only `ops` and `tune` record ops themselves.

pub mod doctor;
pub mod fleet;
pub mod grammar;
mod heard;
pub mod http;
pub mod latency;
mod nobody;
pub mod offline;
pub mod ops;
pub mod page;
pub mod play;
pub mod profile;
pub mod reading;
pub mod report;
pub mod result;
pub mod serve;
pub mod simulate;
pub mod statistics;
pub mod stopwatch;
pub mod submit;
pub mod trace;
pub mod tune;
pub mod workload;
