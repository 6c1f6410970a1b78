//! Which device computes, and how it is treated.

use std::time::Duration;

use clap::Args as ClapArgs;
use fullbore_engine::backend::wgpu as adapters;

use super::parse::parse_arithmetic;

#[derive(Clone, Debug, ClapArgs)]
pub struct DeviceArgs {
    /// auto, cpu, sim, vulkan:N, vulkan:PART-OF-NAME (also metal:, dx12:).
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto")]
    pub name: String,
    /// What one submission to a GPU takes, about, at most: drivers reset a device that is at one for seconds. A step
    /// that would take longer goes in parts; 0 for never.
    #[arg(long, value_name = "MS", default_value_t = MAX_SUBMIT_MS)]
    pub max_submit_ms: u64,
    /// What matmuls of a GPU compute with: f32, or, where the device has it, f16, integer-dot or matrix-units, which
    /// are meant to be faster and may change tokens.
    #[arg(long, default_value = adapters::ArithmeticChoice::F32.name(), value_parser = parse_arithmetic)]
    pub arithmetic: adapters::ArithmeticChoice,
}

/// Half of what Windows allows.
const MAX_SUBMIT_MS: u64 = 1000;

impl DeviceArgs {
    /// The defaults of the command line for `name`.
    pub fn new(name: &str) -> DeviceArgs {
        DeviceArgs { name: name.to_owned(), max_submit_ms: MAX_SUBMIT_MS, arithmetic: adapters::ArithmeticChoice::F32 }
    }

    pub fn max_submit(&self) -> Option<Duration> {
        (self.max_submit_ms > 0).then(|| Duration::from_millis(self.max_submit_ms))
    }
}
