//! Words of `fullbore bench http`.

use clap::{Args as ClapArgs, ValueEnum};

#[derive(Clone, Debug, ClapArgs)]
pub struct HttpArgs {
    /// One measurement alone.
    #[arg(long, value_enum)]
    pub only: Option<HttpMeasure>,
    /// Take the tokenizer and the chat template of this model [default: the simulated one's, which knows bytes].
    #[arg(long)]
    pub model: Option<String>,
    /// Answers at once where the rate or the delay of tokens is measured.
    #[arg(long, default_value_t = 256)]
    pub streams: u32,
    /// Tokens of each of them, on a device that takes no time.
    #[arg(long, default_value_t = 2000)]
    pub tokens: u32,
    /// Tokens a second of a device, on which their way to the client is timed.
    #[arg(long, default_values_t = [10_000, 60_000], value_delimiter = ',')]
    pub rates: Vec<u32>,
    /// For so many seconds each.
    #[arg(long, default_value_t = 10)]
    pub seconds: u32,
    /// Streams that have begun and have nothing to say.
    #[arg(long, default_value_t = 1000)]
    pub idle: u32,
    /// Clients that post a long prompt at the same time.
    #[arg(long, default_value_t = 200)]
    pub clients: u32,
    /// Of each such prompt.
    #[arg(long, default_value_t = 100_000)]
    pub prompt_tokens: u32,
    /// Answers that go on meanwhile, of 100 tokens a second each.
    #[arg(long, default_value_t = 16)]
    pub decoders: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HttpMeasure {
    /// Memory of streams that have nothing to say.
    Idle,
    /// How long tokens are on their way, at a rate that is the device's.
    Delay,
    /// Tokens a second from a device that takes no time.
    Rate,
    /// What long prompts do to health checks and to answers that go on.
    LongPrompts,
}
