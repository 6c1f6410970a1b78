//! Changes of flags that may help, as people would type them. Whether one does, and whether there is memory for it, is
//! for others to say.

use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::model::ModelConfig;
use fullbore_engine::tensor::KvType;

use crate::args::{EngineArgs, ModelArgs, Profile};

/// Sequences at once that are simulated at most, where so many are asked for.
pub fn most_seqs(asked: u32) -> u32 {
    asked.max(asked.saturating_mul(16).min(MOST_SEQS)).max((2 * asked).min(4096))
}

const MOST_SEQS: u32 = 64;
/// Tokens of a step.
const MOST_BATCHED: u32 = 1 << 16;

/// In words, and as arguments.
pub type Change = (String, EngineArgs);

/// Those first that cost the least; `longest` is the longest request in tokens.
pub fn changes(args: &EngineArgs, config: &EngineConfig, model: &ModelConfig, longest: u32) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut add = |words: String, args: EngineArgs| changes.push((words, args));
    if config.pipeline_depth == 1 {
        add("--pipeline-depth 2".to_owned(), EngineArgs { pipeline_depth: 2, ..args.clone() });
    }
    let mut max_num_seqs = 2 * config.max_num_seqs;
    while max_num_seqs <= most_seqs(config.max_num_seqs) && max_num_seqs <= config.max_num_batched_tokens {
        add(format!("--max-num-seqs {max_num_seqs}"), EngineArgs { max_num_seqs, ..args.clone() });
        max_num_seqs *= 2;
    }
    larger_caches(args, config, model, longest).into_iter().for_each(|(words, args)| add(words, args));
    for times in [2, 4] {
        let max_num_batched_tokens = times * config.max_num_batched_tokens;
        if max_num_batched_tokens <= MOST_BATCHED {
            let args = EngineArgs { max_num_batched_tokens, ..args.clone() };
            add(format!("--max-num-batched-tokens {max_num_batched_tokens}"), args);
        }
    }
    if config.latency != LatencyTarget::None {
        let args = EngineArgs { profile: Profile::Throughput, target_itl_ms: None, ..args.clone() };
        add("--profile throughput".to_owned(), args);
    }
    changes
}

/// Caches of more blocks, up to what all slots could hold; then types that hold more in the memory there is.
fn larger_caches(args: &EngineArgs, config: &EngineConfig, model: &ModelConfig, longest: u32) -> Vec<Change> {
    let most = config.max_num_seqs.saturating_mul((longest + 1).div_ceil(config.block_size));
    let block_bytes = |kv_type| model.kv_bytes_per_token(kv_type) * u64::from(config.block_size);
    // In the flag that says it now.
    let cache = |num_blocks: u32, kv_type: KvType| {
        let bytes = (u64::from(num_blocks) * block_bytes(kv_type)).div_ceil(1 << 20);
        let (words, kv_blocks, kv_memory) = match args.kv_blocks {
            Some(_) => (format!("--kv-blocks {num_blocks}"), Some(num_blocks), None),
            None => (format!("--kv-memory {bytes}MiB"), None, Some(bytes << 20)),
        };
        let model = ModelArgs { kv_type, ..args.model.clone() };
        (words, EngineArgs { model, kv_blocks, kv_memory, memory_fraction: None, ..args.clone() })
    };
    let mut caches = Vec::new();
    let mut num_blocks = config.num_blocks;
    while num_blocks < most {
        num_blocks = num_blocks.saturating_mul(2).min(most);
        caches.push(cache(num_blocks, config.kv_type));
    }
    let is_smaller =
        |&kv_type: &KvType| model.check_kv_type(kv_type).is_ok() && block_bytes(kv_type) < block_bytes(config.kv_type);
    for kv_type in KvType::ALL.into_iter().filter(is_smaller).filter(|_| config.num_blocks < most) {
        let bytes = u64::from(config.num_blocks) * block_bytes(config.kv_type);
        let num_blocks = u32::try_from(bytes / block_bytes(kv_type)).unwrap_or(u32::MAX);
        let (words, args) = cache(num_blocks, kv_type);
        caches.push((format!("--kv-type {} {words}", kv_type.name()), args));
    }
    caches
}
