//! What a simulated fleet did, all devices together and each. Nothing here runs anything.

use std::fmt;

use serde::Serialize;

use crate::report::Percentiles;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FleetReport {
    pub rule: &'static str,
    pub num_requests: u32,
    pub num_completed: u32,
    /// Longer than a device of the fleet takes.
    pub num_too_long: u32,
    /// With three devices when they were lost, or left when no device came any more.
    pub num_failed: u32,
    /// Devices that were lost, and requests that went on elsewhere from their tokens.
    pub num_losses: u32,
    pub num_replayed: u64,
    /// From the first arrival to the last token.
    pub duration_s: f64,
    pub output_tokens: u64,
    pub output_tokens_per_s: f64,
    /// The same of the time in which requests waited, without the end of a workload, when devices run empty one by one.
    pub output_tokens_per_s_while_waiting: f64,
    pub ttft_ms: Percentiles,
    pub itl_ms: Percentiles,
    pub total_ms: Percentiles,
    /// Of prompt tokens of completed requests, those that a prefix cache had.
    pub prefix_hit_share: f64,
    /// Requests that were taken from a device where they waited to another.
    pub num_moved: u64,
    /// KV blocks that came from another device.
    pub num_fetched_blocks: u64,
    /// The largest of the devices' shares.
    pub most_idle_share: f64,
    pub devices: Vec<DeviceReport>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceReport {
    pub name: String,
    pub num_completed: u32,
    pub output_tokens: u64,
    /// Of the whole time, what a step ran in.
    pub busy_share: f64,
    /// Of the whole time, what it did nothing in while a request waited on another device.
    pub idle_share: f64,
}

impl fmt::Display for FleetReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let FleetReport { rule, num_requests, num_completed, num_too_long, duration_s, .. } = self;
        writeln!(f, "{:<18}{rule}", "rule")?;
        writeln!(f, "{:<18}{num_completed} of {num_requests}, {num_too_long} too long", "completed")?;
        write!(f, "{:<18}{duration_s:.1} s, {:.1} tokens/s, ", "time", self.output_tokens_per_s)?;
        writeln!(f, "{:.1} while requests waited", self.output_tokens_per_s_while_waiting)?;
        writeln!(f, "{:<18}{:>12}{:>12}{:>12}{:>12}", "ms", "mean", "p50", "p90", "p99")?;
        let lines = [("first token", self.ttft_ms), ("between tokens", self.itl_ms), ("whole request", self.total_ms)];
        for (name, Percentiles { mean, p50, p90, p99 }) in lines {
            writeln!(f, "{name:<18}{mean:>12.1}{p50:>12.1}{p90:>12.1}{p99:>12.1}")?;
        }
        writeln!(f, "{:<18}{} of prompt tokens", "prefix hits", percent(self.prefix_hit_share))?;
        writeln!(f, "{:<18}{} requests", "moved", self.num_moved)?;
        if self.num_fetched_blocks > 0 {
            writeln!(f, "{:<18}{} blocks of KV from other devices", "fetched", self.num_fetched_blocks)?;
        }
        if self.num_losses > 0 {
            let FleetReport { num_losses, num_replayed, num_failed, .. } = self;
            writeln!(f, "{:<18}{num_losses} devices; {num_replayed} requests went on, {num_failed} failed", "lost")?;
        }
        write!(f, "{:<18}{} at most, of a device's time while others had requests that waited", "idle", {
            percent(self.most_idle_share)
        })?;
        for device in self.devices.iter().take(MAX_DEVICES_SHOWN) {
            let DeviceReport { name, num_completed, output_tokens, busy_share, idle_share } = device;
            let (busy, idle) = (percent(*busy_share), percent(*idle_share));
            write!(
                f,
                "\n  {name:<24}{num_completed:>9} requests {output_tokens:>11} tokens, busy {busy}, idle {idle}"
            )?;
        }
        match self.devices.len().checked_sub(MAX_DEVICES_SHOWN) {
            Some(more @ 1..) => write!(f, "\n  and {more} devices more"),
            _ => Ok(()),
        }
    }
}

/// The others are in the JSON.
const MAX_DEVICES_SHOWN: usize = 16;
