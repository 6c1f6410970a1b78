//! Which device computes, and how it is treated.

use std::time::Duration;

use clap::Args as ClapArgs;
use fullbore_engine::backend::wgpu as adapters;

use super::parse::parse_arithmetic;

#[derive(Clone, Debug, ClapArgs)]
pub struct DeviceArgs {
    /// auto, cpu, sim, cuda:N, cuda:UUID, vulkan:N, vulkan:PART-OF-NAME (also metal:, dx12:). A server has one or
    /// several, with commas between them or in a .toml file; every GPU by all, and by auto each that is worth it; what
    /// computes on cores may have its own: cpu@0,cpu@1-3.
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto")]
    pub name: String,
    /// Divide the model's layers over the devices, each with as many as its memory and its measured speed allow,
    /// instead of giving each all of them. Without this it is done only where no device has memory for all of it.
    #[arg(long)]
    pub split: bool,
    /// What one submission to a GPU takes, about, at most: drivers reset a device that is at one for seconds. A step
    /// that would take longer goes in parts; 0 for never.
    #[arg(long, value_name = "MS", default_value_t = MAX_SUBMIT_MS)]
    pub max_submit_ms: u64,
    /// What matmuls of a GPU compute with: f32, or, where the device has it, f16, integer-dot or matrix-units, which
    /// are meant to be faster and may change tokens.
    #[arg(long, default_value = adapters::ArithmeticChoice::F32.name(), value_parser = parse_arithmetic)]
    pub arithmetic: adapters::ArithmeticChoice,
    /// Compile a GPU's kernels with checks of every access and loop: slower, for a driver that is not trusted.
    #[arg(long)]
    pub safe_shaders: bool,
    /// Use GPUs whose driver is on the deny list too.
    #[arg(long)]
    pub any_driver: bool,
}

/// Half of what Windows allows.
const MAX_SUBMIT_MS: u64 = 1000;
/// After so long at one submission a GPU counts as hung.
const HANG: Duration = Duration::from_secs(120);

impl DeviceArgs {
    /// The defaults of the command line for `name`.
    pub fn new(name: &str) -> DeviceArgs {
        let (name, arithmetic) = (name.to_owned(), adapters::ArithmeticChoice::F32);
        let max_submit_ms = MAX_SUBMIT_MS;
        DeviceArgs { name, split: false, max_submit_ms, arithmetic, safe_shaders: false, any_driver: false }
    }

    /// What is long beside a submission, even a device's first ones; none where submissions are not split.
    pub fn max_wait(&self) -> Option<Duration> {
        self.max_submit().map(|max_submit| HANG.max(max_submit * 4))
    }

    pub fn max_submit(&self) -> Option<Duration> {
        (self.max_submit_ms > 0).then(|| Duration::from_millis(self.max_submit_ms))
    }
}
