//! The command line's words and defaults. Invariant: nothing here is checked against a model or a device.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use fullbore_bench::workload::{Arrivals, Lengths};
use fullbore_engine::backend::wgpu as adapters;
use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::tensor::{KvType, WeightFormat};

use crate::version::VERSION_AND_COMMIT;

mod access;
mod bench;
mod clients;
mod device;
mod doctor;
mod grammar;
mod grpc;
mod http;
mod models;
mod parse;
mod report;
mod serve;
mod simulate;
mod telemetry;

pub use access::AccessArgs;
pub use bench::{
    LatencyArgs, OfflineArgs, PromptForm, ReportArgs, ResultArgs, ServeBenchArgs, StartupArgs, SweepArgs, TargetArgs,
};
pub use clients::{RunArgs, TopArgs};
pub use device::DeviceArgs;
pub use doctor::DoctorArgs;
pub use grammar::GrammarArgs;
pub use http::{HttpArgs, HttpMeasure};
pub use models::{ModelsArgs, ServedArgs};
pub use parse::parse_bytes;
use parse::*;
pub use report::DeviceReportArgs;
pub use serve::ServeArgs;
pub use simulate::SimulateArgs;
pub use telemetry::{LogFormat, TelemetryArgs};

#[derive(Debug, Parser)]
#[command(name = "fullbore", about = "Serves language models on whatever device is there.")]
#[command(version = VERSION_AND_COMMIT)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an OpenAI-compatible API and a chat page.
    Serve(ServeArgs),
    /// Answer one prompt and end, or chat.
    Run(RunArgs),
    /// Watch a running server: where its device's time goes, its batch, memory and latencies.
    Top(TopArgs),
    /// List devices, with driver, memory and the kernel tier that each would use.
    Devices,
    /// Run every op in every variant on a device and hold it against the plain cpu: a table; fails if one is wrong.
    Verify(VerifyArgs),
    /// All about a device in one file, to attach to an issue: verify, ops, limits, and what the doctor says.
    Report(Box<DeviceReportArgs>),
    /// Try the matmul kernels that a model could use on a device, and keep the fastest for later starts.
    Tune(TuneArgs),
    /// Put a model into the cache folder and print its path.
    Fetch {
        /// smollm2, gemma3-270m, a Hugging Face repository (owner/name or owner/name:file), or a path.
        model: String,
    },
    /// Play a workload on a device that is known by its profile, in virtual time: a table, and JSON on standard output.
    Simulate(SimulateArgs),
    /// What a server starts for itself: try the grammars that come on standard input.
    #[command(hide = true)]
    TryGrammars,
    /// Measure.
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// All requests at once, no HTTP: the most tokens a second.
    Offline(OfflineArgs),
    /// One request at a time, no HTTP: prefill and decode at batch 1.
    Latency(LatencyArgs),
    /// A server under load, over HTTP: one of our own, one that runs, or either beside others: percentiles and ratios.
    Serve(Box<ServeBenchArgs>),
    /// The same under more and more load, up to the knee.
    Sweep(Box<SweepArgs>),
    /// From nothing to the first token, phase by phase.
    Startup(StartupArgs),
    /// What limits this device with these flags, which one to change and what that gains: predicted, then tried.
    Doctor(Box<DoctorArgs>),
    /// Make a page, or Markdown, of result files.
    Report(ReportArgs),
    /// Print the JSON schema of result files.
    Schema,
    /// What steps cost on this device: writes the profile that `fullbore simulate` reads.
    Profile(ProfileArgs),
    /// Play a workload in real time, no HTTP: the same report as `fullbore simulate`.
    Trace(TraceArgs),
    /// What a step of 32 layers costs the host before the device has it: JSON.
    Submit(SubmitArgs),
    /// Single ops at the shapes of a model, beside the device's own bandwidth and peak: a table, and JSON on standard
    /// output. No model is needed.
    Ops(OpsArgs),
    /// What answers under a JSON schema cost the free ones beside them, no HTTP: a ratio, as JSON.
    Grammar(GrammarArgs),
    /// This server on loopback before a simulated device: rate and delay of tokens, memory, long prompts; JSON.
    Http(HttpArgs),
}

#[derive(Clone, Debug, ClapArgs)]
pub struct ModelArgs {
    /// smollm2, gemma3-270m, a Hugging Face repository (owner/name or owner/name:file), or a path.
    #[arg(long, default_value = "smollm2")]
    pub model: String,
    /// Instead of a model's: random ones, in the dimensions of --shape, to measure without a download.
    #[arg(long, value_enum, requires = "shape")]
    pub weights: Option<WeightSource>,
    /// smollm2-135m, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b or llama-3.1-70b, and :FORMAT of weights [default: q4_0].
    #[arg(long, requires = "weights", value_parser = parse_shape)]
    pub shape: Option<Shape>,
    /// Pack float weights while they are loaded, as q8_0 or q4_0; embedding and output as q8_0 in both.
    #[arg(long, conflicts_with = "weights", value_parser = parse_quantize)]
    pub quantize: Option<WeightFormat>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Elements of the KV cache: f16, q8_0 (0.53 of the memory) or q4_0 (0.28).
    #[arg(long, default_value = KvType::F16.name(), value_parser = parse_kv_type)]
    pub kv_type: KvType,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightSource {
    Random,
}

/// A known model's dimensions, and how random weights of it are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub model: String,
    pub format: WeightFormat,
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
    /// Share of the device's free memory to take in all, up to 1, instead of --kv-memory.
    #[arg(long, value_parser = parse_fraction, conflicts_with_all = ["kv_memory", "kv_blocks"])]
    pub memory_fraction: Option<f64>,
    /// Memory of the host for the KV of preempted requests, such as 4GiB; 0 recomputes them [default: as much as the KV
    /// cache, at most 1GiB].
    #[arg(long, value_parser = parse_bytes)]
    pub swap_memory: Option<u64>,
    /// Never share the KV of equal prompt prefixes.
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// What to favour: answers that never stutter while others begin, throughput, or both in turn.
    #[arg(long, value_enum, default_value_t = Profile::Balanced)]
    pub profile: Profile,
    /// Time between the tokens of an answer that prompts of others may not exceed, instead of the profile's.
    #[arg(long)]
    pub target_itl_ms: Option<u32>,
    /// Steps submitted before the oldest is read back: 2 keeps the device busy, 1 waits for each.
    #[arg(long, default_value_t = 2)]
    pub pipeline_depth: u32,
    /// Requests that wait to begin, at most; what is beyond is told when to come again (429). A tenant that hands in
    /// one after the other gets seven eighths of it, so that others find room.
    #[arg(long, default_value_t = 256)]
    pub max_queued_requests: u32,
    /// Tokens of their prompts, at most [default: 2048 for each request that may wait].
    #[arg(long)]
    pub max_queued_tokens: Option<u32>,
    /// Refuse what is predicted to have no token within so many milliseconds.
    #[arg(long)]
    pub max_queue_ms: Option<u32>,
    /// Learn what steps take on this device anew, and keep nothing of it in the cache folder.
    #[arg(long)]
    pub no_saved_costs: bool,
    /// Do not use what `fullbore tune` has found on this device.
    #[arg(long)]
    pub no_tuning: bool,
    /// Do not try the model's kernels on this device before loading.
    #[arg(long)]
    pub no_verify: bool,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
    /// base, subgroup or lavapipe, instead of the kernel tier that the device would get: Vulkan's, Metal's or DX12's.
    #[arg(long, value_parser = parse_tier)]
    pub tier: Option<adapters::Tier>,
    /// Some ops alone, such as mat_mul,attention.
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// Formats of weights that products and lookups are tried on, such as q4_0,q6_k; all unless given.
    #[arg(long, value_delimiter = ',', value_parser = parse_format)]
    pub formats: Vec<WeightFormat>,
    #[command(flatten)]
    pub golden: GoldenArgs,
}

#[derive(Clone, Debug, Default, ClapArgs)]
pub struct GoldenArgs {
    /// Instead of ops: a whole model on the device, held against what references computed for it (tests/golden).
    #[arg(long, conflicts_with_all = ["tier", "only", "formats"])]
    pub golden: Option<PathBuf>,
    /// The model that the golden is of, as in `serve`.
    #[arg(long, requires = "golden", default_value = "smollm2")]
    pub model: String,
    /// Write the device's own tokens, and how near each was to another, as JSON.
    #[arg(long, requires = "golden")]
    pub output: Option<PathBuf>,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct TuneArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Weights alone whose format and shape have this in them, such as "q4_0 28672 x 4096".
    #[arg(long, default_value = "")]
    pub only: String,
    /// Measure for about so many seconds; longer if every choice needs it, which rests on nine rounds at least.
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
}

/// How much longer than without prompts a step may take in which answers go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Half as long again.
    Latency,
    /// Three times as long.
    Balanced,
    /// As long as a full step takes.
    Throughput,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct ProfileArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// The file to write.
    #[arg(long, short, default_value = "device.json")]
    pub output: PathBuf,
    /// Measure for so many seconds; the grid is gone through at least once.
    #[arg(long, default_value_t = 90)]
    pub seconds: u64,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct SubmitArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Steps that are timed, at 1, 16 and 64 sequences.
    #[arg(long, default_value_t = 200)]
    pub steps: u32,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct OpsArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
    /// How weights are stored.
    #[arg(long, default_value = WeightFormat::Q4_0.name(), value_parser = parse_format)]
    pub format: WeightFormat,
    #[arg(long, value_enum, default_value_t = Shapes::B1)]
    pub shapes: Shapes,
    /// Rows of activations: numbers and ranges, such as 1,2,4 or 1..80.
    #[arg(long, default_value = "1,2,4,8,16,32,64,512", value_parser = parse_rows)]
    pub m: Rows,
    /// Ops whose names have this in them, such as "mat_mul ffn_down".
    #[arg(long, default_value = "")]
    pub only: String,
    /// Write the table to a file too, as CSV.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Measure twice more, and write a result file.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Measure for so many seconds; every op is run at least once.
    #[arg(long, default_value_t = 30)]
    pub seconds: u64,
}

/// Whose shapes: SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B or a layer of 70B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shapes {
    Small,
    #[value(name = "1b")]
    B1,
    #[value(name = "8b")]
    B8,
    #[value(name = "70b")]
    B70,
}

/// Ascending, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows(pub Vec<u32>);

/// Which requests come when.
#[derive(Clone, Debug, ClapArgs)]
pub struct WorkloadArgs {
    /// A trace: CSV in the form of AzurePublicDataset or BurstGPT, or JSON lines in that of Mooncake. With --arrivals
    /// its lengths alone count, over and over.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// at-once, poisson:PER-SECOND, burst:SIZE:SECONDS, instead of the times of a trace.
    #[arg(long)]
    pub arrivals: Option<Arrivals>,
    /// sharegpt, code, long, chat (turns), agent (turns of tools), fixed:PROMPT:OUTPUT, uniform:A-B:C-D,
    /// lognormal:MEAN-PROMPT:MEAN-OUTPUT:SIGMA, shared-lognormal:GROUPS:SHARE:MEAN-PROMPT:MEAN-OUTPUT:SIGMA (with a
    /// share of each prompt in common), shared:GROUPS:PREFIX:PROMPT:OUTPUT, turns:TURNS:SYSTEM:ADDED:OUTPUT.
    #[arg(long, default_value = "sharegpt", conflicts_with = "trace")]
    pub lengths: Lengths,
    /// Requests, at most [default: all rows of the trace, or 1000].
    #[arg(long)]
    pub limit: Option<u32>,
    /// Arrivals come so many times as fast.
    #[arg(long, default_value_t = 1.0, value_parser = parse_speedup)]
    pub speedup: f64,
    /// Of lengths, arrivals and token ids.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// How they are played where no server lets them in.
#[derive(Clone, Debug, ClapArgs)]
pub struct PlayArgs {
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// Turn away what --max-queued-requests, --max-queued-tokens or --max-queue-ms do not let in, by the rules of a
    /// server that has one tenant; otherwise it waits before the door.
    #[arg(long)]
    pub refuse_when_full: bool,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct TraceArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Start from what this profile says steps take, as a server does that has run before [default: learn it].
    #[arg(long)]
    pub device_profile: Option<PathBuf>,
    #[command(flatten)]
    pub play: PlayArgs,
}

pub fn latency_target(target_itl_ms: Option<u32>, profile: Profile) -> LatencyTarget {
    match (target_itl_ms, profile) {
        (Some(ms), _) => LatencyTarget::Milliseconds(ms),
        (None, Profile::Latency) => LatencyTarget::Stretch(150),
        (None, Profile::Balanced) => LatencyTarget::Stretch(300),
        (None, Profile::Throughput) => LatencyTarget::None,
    }
}

impl ModelArgs {
    /// The defaults of the command line for `model` on `device`.
    pub fn new(model: &str, device: &str) -> ModelArgs {
        let (model, device) = (model.to_owned(), DeviceArgs::new(device));
        ModelArgs { model, weights: None, shape: None, quantize: None, device, kv_type: KvType::F16 }
    }
}

impl EngineArgs {
    pub fn latency(&self) -> LatencyTarget {
        latency_target(self.target_itl_ms, self.profile)
    }

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
            memory_fraction: None,
            swap_memory: None,
            no_prefix_cache: false,
            profile: Profile::Balanced,
            target_itl_ms: None,
            pipeline_depth: EngineConfig::default().pipeline_depth,
            max_queued_requests: EngineConfig::default().max_queued_requests,
            max_queued_tokens: None,
            max_queue_ms: None,
            no_saved_costs: false,
            no_tuning: false,
            no_verify: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_profile_is_refused_with_those_there_are() {
        let sentence =
            Args::try_parse_from(["fullbore", "serve", "--profile", "fastest"]).expect_err("no such profile");
        let sentence = sentence.to_string();
        let words = ["fastest", "latency", "balanced", "throughput"];
        assert!(words.iter().all(|word| sentence.contains(word)), "{sentence}");
    }

    #[test]
    fn defaults_are_written_once() {
        use clap::Parser;
        let parsed = Args::parse_from(["fullbore", "serve"]);
        let Command::Serve(parsed) = parsed.command else { panic!("serve is serve") };
        let built = EngineArgs::new(ModelArgs::new("smollm2", "auto"));
        let [served] = &parsed.models.0[..] else { panic!("one model") };
        assert_eq!(format!("{:?}", served.engine), format!("{built:?}"));
    }
}
