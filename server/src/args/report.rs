//! Words of `fullbore report`.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::EngineArgs;

#[derive(Clone, Debug, ClapArgs)]
pub struct DeviceReportArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// On sim, be the device that this profile tells of.
    #[arg(long)]
    pub device_profile: Option<PathBuf>,
    /// The file to write, in Markdown.
    #[arg(long, short, default_value = "fullbore-report.md", value_name = "FILE")]
    pub output: PathBuf,
    /// In seconds: one case of each kind, few ops, short runs.
    #[arg(long)]
    pub small: bool,
}
