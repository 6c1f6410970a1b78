//! Fullbore's benchmarks: workloads, the run that measures one, and the statistics of what came out.
//!
//! Invariant: a workload is a pure function of its seed. Nothing here knows HTTP or a device: an engine is driven
//! through its handle, as the server drives it.

pub mod offline;
pub mod statistics;
pub mod stopwatch;
pub mod workload;
