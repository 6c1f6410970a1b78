//! Fullbore's benchmarks: workloads, the run that measures one, and the statistics of what came out.
//!
//! Invariant: a workload is a pure function of its seed. Nothing here knows HTTP or opens a device: an engine is driven
//! as the server drives it, through its handle or step by step; only `ops` and `tune` record ops themselves.

pub mod grammar;
mod nobody;
pub mod offline;
pub mod ops;
pub mod play;
pub mod profile;
pub mod report;
pub mod simulate;
pub mod statistics;
pub mod stopwatch;
pub mod submit;
pub mod trace;
pub mod tune;
pub mod workload;
