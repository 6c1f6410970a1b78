//! Commands of people at a terminal. Invariant: nothing here is checked against a model or a server.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::ModelArgs;

#[derive(Clone, Debug, ClapArgs)]
pub struct RunArgs {
    /// What to answer; without one, chat: /help lists its commands.
    pub prompt: Option<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of an answer, at most [default: 256; in a chat, as many as fit].
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// 0 is greedy [default: the model's].
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Continue the prompt as it is, without a chat template.
    #[arg(long, requires = "prompt")]
    pub raw: bool,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct TopArgs {
    /// Of a running server.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// Where it wants one; FULLBORE_API_KEY in the environment is not seen by other users of this machine.
    #[arg(long)]
    pub api_key: Option<String>,
    /// Trust a server behind https by the certificates of this PEM file, and not by public authorities.
    #[arg(long, value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// Of several models this one alone [default: all].
    #[arg(long)]
    pub model: Option<String>,
    /// Print one picture as text and end.
    #[arg(long)]
    pub once: bool,
}
