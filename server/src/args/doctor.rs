//! Words of `fullbore bench doctor`.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use fullbore_bench::workload::{Arrivals, Lengths};

use super::{EngineArgs, ResultArgs, WorkloadArgs};

#[derive(Clone, Debug, ClapArgs)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Take prices of steps from this profile instead of measuring them; on sim, be the device that it tells of, in
    /// virtual time.
    #[arg(long)]
    pub device_profile: Option<PathBuf>,
    /// A trace to play, as of `fullbore simulate`; with --arrivals its lengths alone count.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// When requests come [default: at-once, or the times of the trace].
    #[arg(long)]
    pub arrivals: Option<Arrivals>,
    /// How long requests are, as of `fullbore simulate`.
    #[arg(long, default_value = "uniform:32-128:32-64", conflicts_with = "trace")]
    pub lengths: Lengths,
    /// Requests of a run [default: as many as take --seconds].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// About how long a run may take, and the measurement of prices, which takes one pass at least.
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Of lengths, arrivals and token ids.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Clients send token ids: no text is read.
    #[arg(long)]
    pub ids: bool,
    /// Predict, and do not try.
    #[arg(long)]
    pub no_check: bool,
    /// Have the tokenizer wait so many microseconds more for each token, as one does that asks elsewhere: to see what
    /// is said of it, which is measured and not told.
    #[arg(long, default_value_t = 0.0, value_name = "MICROSECONDS", value_parser = super::parse::parse_microseconds)]
    pub slow_tokenizer: f64,
    #[command(flatten)]
    pub result: ResultArgs,
}

impl DoctorArgs {
    /// At most `limit` requests, or all there are.
    pub fn workload(&self, limit: Option<u32>) -> WorkloadArgs {
        let arrivals = self.arrivals.or(self.trace.is_none().then_some(Arrivals::AtOnce));
        let (trace, lengths, seed) = (self.trace.clone(), self.lengths, self.seed);
        WorkloadArgs { trace, arrivals, lengths, limit, speedup: 1.0, seed }
    }
}
