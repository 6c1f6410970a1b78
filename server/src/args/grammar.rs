//! Words of `fullbore bench grammar`.

use clap::Args as ClapArgs;

use super::EngineArgs;

#[derive(Clone, Debug, ClapArgs)]
pub struct GrammarArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Answers at once, and how many of them follow the schema.
    #[arg(long, default_value_t = 16)]
    pub num_seqs: u32,
    #[arg(long, default_value_t = 4)]
    pub constrained: u32,
    #[arg(long, default_value_t = 128)]
    pub prompt_tokens: u32,
    /// What a pass takes where the device is sim, which else would take no time.
    #[arg(long, default_value_t = 5.0)]
    pub sim_ms: f64,
    /// Of a round, and rounds of either kind.
    #[arg(long, default_value_t = 64)]
    pub steps: u32,
    #[arg(long, default_value_t = 9)]
    pub rounds: u32,
}
