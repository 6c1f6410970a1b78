//! The command line's words and defaults. Invariant: nothing here is checked against a model or a device.

use std::net::IpAddr;

use clap::{Args as ClapArgs, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "fullbore", version, about = "Serves language models on whatever device is there.")]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an OpenAI-compatible API and a chat page.
    Serve(ServeArgs),
    /// Answer one prompt and end.
    Run(RunArgs),
    /// List devices, with driver, memory and the kernel tier that each would use.
    Devices,
    /// Put a model into the cache folder and print its path.
    Fetch {
        /// smollm2, gemma3-270m, a Hugging Face repository (owner/name or owner/name:file), or a path.
        model: String,
    },
    /// Measure.
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// All requests at once, no HTTP: prints tokens a second as JSON.
    Offline(BenchArgs),
}

#[derive(Clone, Debug, ClapArgs)]
pub struct ModelArgs {
    /// smollm2, gemma3-270m, a Hugging Face repository (owner/name or owner/name:file), or a path.
    #[arg(long, default_value = "smollm2")]
    pub model: String,
    /// auto, cpu, sim, vulkan:N, vulkan:PART-OF-NAME (also metal:, dx12:).
    #[arg(long, default_value = "auto")]
    pub device: String,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct EngineArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Requests that run at once, at most.
    #[arg(long, default_value_t = 32)]
    pub max_num_seqs: u32,
    /// Tokens of a step, at most.
    #[arg(long, default_value_t = 512)]
    pub max_num_batched_tokens: u32,
    /// Tokens of one request, prompt and answer, at most [default: the model's, as far as memory goes].
    #[arg(long)]
    pub max_model_len: Option<u32>,
    /// Tokens that share a KV block.
    #[arg(long, default_value_t = 32)]
    pub block_size: u32,
    /// KV blocks, instead of --kv-memory.
    #[arg(long, conflicts_with = "kv_memory")]
    pub kv_blocks: Option<u32>,
    /// Memory for the KV cache, such as 256MiB or 4GiB [default: 2048 tokens a request, at most half of what is free].
    #[arg(long, value_parser = parse_bytes)]
    pub kv_memory: Option<u64>,
    /// Never share the KV of equal prompt prefixes.
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Requests that wait for admission, at most.
    #[arg(long, default_value_t = 256)]
    pub max_waiting: u32,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct ServeArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// 0 takes any free port.
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// The model's name in the API [default: the name it was asked for by].
    #[arg(long)]
    pub served_model_name: Option<String>,
    /// Connections open at once, at most.
    #[arg(long, default_value_t = 1024)]
    pub max_connections: usize,
    /// Print where memory would go and end, without loading weights.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct RunArgs {
    pub prompt: String,
    #[command(flatten)]
    pub model: ModelArgs,
    #[arg(long, default_value_t = 256)]
    pub max_tokens: u32,
    /// 0 is greedy [default: the model's].
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Continue the prompt as it is, without a chat template.
    #[arg(long)]
    pub raw: bool,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct BenchArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    #[arg(long, default_value_t = 16)]
    pub num_requests: u32,
    #[arg(long, default_value_t = 128)]
    pub prompt_tokens: u32,
    #[arg(long, default_value_t = 64)]
    pub output_tokens: u32,
}

impl EngineArgs {
    /// The defaults of the command line, for commands that have no flags for them.
    pub fn new(model: ModelArgs) -> EngineArgs {
        EngineArgs {
            model,
            max_num_seqs: 32,
            max_num_batched_tokens: 512,
            max_model_len: None,
            block_size: 32,
            kv_blocks: None,
            kv_memory: None,
            no_prefix_cache: false,
            max_waiting: 256,
        }
    }
}

/// `4096`, `512KiB`, `256MiB`, `1.5GiB`; KB, MB and GB are powers of ten.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_alphabetic() || letter == ' ');
    let unit = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" | "k" => 1024.0,
        "mib" | "m" => 1024.0 * 1024.0,
        "gib" | "g" => 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        unit => return Err(format!("{unit} is no unit of memory; write a size as 256MiB or 4GiB")),
    };
    match digits.parse::<f64>() {
        Ok(value) if value > 0.0 && value * unit < u64::MAX as f64 => Ok((value * unit) as u64),
        _ => Err(format!("{text} is not a size; write it as 256MiB or 4GiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("256MiB"), Ok(256 << 20));
        assert_eq!(parse_bytes("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("2GB"), Ok(2_000_000_000));
        for wrong in ["", "MiB", "-1MiB", "1TiBB", "nan", "inf", "1e30GiB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn defaults_are_written_once() {
        use clap::Parser;
        let parsed = Args::parse_from(["fullbore", "serve"]);
        let Command::Serve(parsed) = parsed.command else { panic!("serve is serve") };
        let built = EngineArgs::new(ModelArgs { model: "smollm2".to_owned(), device: "auto".to_owned() });
        assert_eq!(format!("{:?}", parsed.engine), format!("{built:?}"));
    }
}
