//! An engine's configuration, out of arguments, a model and the memory that there is. Invariant: what is planned is
//! within what was asked for, and settings that contradict each other are refused with their numbers.

use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::memory::capacity;
use fullbore_engine::model::{Footprint, Model, ModelConfig};

use super::StartError;
use crate::args::EngineArgs;

/// Unless asked otherwise a sequence may be this long, so that a model made for 128k tokens does not claim all memory.
const DEFAULT_MODEL_LEN: u32 = 8192;
/// Of a request, prompt and answer, as far as memory is concerned.
pub const USUAL_LEN: u32 = 2048;
/// Tokens of prompts that may wait: as asked for, else as many as the requests that may usually have.
pub fn queued_tokens(asked: Option<u32>, max_queued_requests: u32, max_model_len: u32) -> u32 {
    asked.unwrap_or(max_queued_requests.saturating_mul(USUAL_LEN).max(max_model_len))
}

/// What counts as free where a device does not say.
const UNKNOWN_MEMORY: u64 = 2 << 30;

/// What a model's KV cache may take of a device's memory.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// What the device has for this process before any weights are loaded, where that is known.
    pub memory_bytes: Option<u64>,
    /// What other models take of it in any case.
    pub others_bytes: u64,
    /// KV caches that share the rest evenly, this one among them.
    pub num_sharing: u64,
}

impl Room {
    pub fn alone(memory_bytes: Option<u64>) -> Room {
        Room { memory_bytes, others_bytes: 0, num_sharing: 1 }
    }
}

/// What a model takes whatever others leave: its weights, what a step needs, and a KV cache of a size that was asked
/// for.
pub fn least_bytes(args: &EngineArgs, bundle: &Bundle, weights: u64) -> Result<u64, StartError> {
    let config = least_config(args, bundle)?;
    let Footprint { kv, scratch, tables, .. } = Model::footprint(&bundle.config, &config.state_limits());
    let kv = if args.kv_blocks.is_some() { kv } else { args.kv_memory.unwrap_or(0) };
    Ok(weights + kv + scratch + tables)
}

/// With as few blocks as there may be, unless their number was asked for.
pub fn least_config(args: &EngineArgs, bundle: &Bundle) -> Result<EngineConfig, StartError> {
    let max_positions = bundle.config.max_positions;
    if let Some(asked) = args.max_model_len.filter(|&asked| asked > max_positions) {
        return Err(StartError::BeyondModel { asked, model: bundle.name.clone(), max_positions });
    }
    let kv_type = args.model.kv_type;
    bundle.config.check_kv_type(kv_type)?;
    let longest = args.max_model_len.unwrap_or(max_positions.min(DEFAULT_MODEL_LEN));
    // Anything else is refused by `check` below.
    let block_size = args.block_size.clamp(1, EngineConfig::MAX_BLOCK_SIZE);
    let config = EngineConfig {
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_model_len: longest,
        kv_type,
        block_size: args.block_size,
        num_blocks: args.kv_blocks.unwrap_or(longest.div_ceil(block_size)),
        num_host_blocks: 0,
        max_queued_requests: args.max_queued_requests,
        max_queued_tokens: queued_tokens(args.max_queued_tokens, args.max_queued_requests, longest),
        max_queue_ms: args.max_queue_ms,
        max_logit_rows: args.max_num_seqs.max(EngineConfig::default().max_logit_rows),
        pipeline_depth: args.pipeline_depth,
        latency: args.latency(),
        max_grammar_bytes: EngineConfig::default().max_grammar_bytes,
        prefix_cache: !args.no_prefix_cache,
    };
    // Blocks whose number is not asked for are to be found yet.
    if args.kv_blocks.is_none() {
        config.check()?;
    }
    Ok(config)
}

/// The K of a layer is bound whole, so `max_buffer_bytes` bounds it too.
pub fn engine_config(
    args: &EngineArgs,
    bundle: &Bundle,
    weights: u64,
    room: Room,
    max_buffer_bytes: u64,
) -> Result<EngineConfig, StartError> {
    let mut config = least_config(args, bundle)?;
    let (longest, block_size) = (config.max_model_len, config.block_size);
    let kv_bytes_per_token = bundle.config.kv_bytes_per_token(config.kv_type);
    if args.kv_blocks.is_none() {
        let Room { memory_bytes, others_bytes, num_sharing } = room;
        let budget = match (args.kv_memory, args.memory_fraction) {
            (Some(bytes), _) => bytes,
            (None, Some(fraction)) => {
                let memory_bytes = memory_bytes.ok_or(StartError::UnknownMemory)?;
                let others_bytes = others_bytes + least_bytes(args, bundle, weights)?;
                ((memory_bytes as f64 * fraction) as u64).saturating_sub(others_bytes) / num_sharing
            }
            (None, None) => {
                let free_bytes = memory_bytes.unwrap_or(UNKNOWN_MEMORY).saturating_sub(weights + others_bytes);
                default_budget(args, &bundle.config, longest, free_bytes / num_sharing)
            }
        };
        let least_len = args.max_model_len.unwrap_or(1);
        let bindable = max_buffer_bytes.saturating_mul(2 * u64::from(bundle.config.num_layers));
        config.num_blocks = capacity::num_blocks(kv_bytes_per_token, budget.min(bindable), block_size, least_len)?;
    }
    config.num_host_blocks = num_host_blocks(args, kv_bytes_per_token, config.num_blocks)?;
    if args.max_model_len.is_none() {
        config.max_model_len = longest.min(config.num_blocks.saturating_mul(block_size));
    }
    config.check()?;
    Ok(config)
}

/// Unless asked otherwise the host keeps as much as the KV cache holds, and no more than this.
const DEFAULT_SWAP: u64 = 1 << 30;

fn num_host_blocks(args: &EngineArgs, kv_bytes_per_token: u64, num_blocks: u32) -> Result<u32, StartError> {
    let block_size = args.block_size.max(1);
    let Some(asked) = args.swap_memory else {
        return Ok(capacity::num_host_blocks(kv_bytes_per_token, DEFAULT_SWAP, block_size).min(num_blocks));
    };
    match capacity::num_host_blocks(kv_bytes_per_token, asked, block_size) {
        0 if asked > 0 => {
            let block = kv_bytes_per_token * u64::from(block_size);
            Err(StartError::SwapTooSmall { asked, block })
        }
        num_blocks => Ok(num_blocks),
    }
}

/// Enough for every sequence at a usual length, and for one at its longest, but at most half of what is free.
fn default_budget(args: &EngineArgs, config: &ModelConfig, longest: u32, free_bytes: u64) -> u64 {
    let block_size = u64::from(args.block_size.clamp(1, EngineConfig::MAX_BLOCK_SIZE));
    let usual = u64::from(args.max_num_seqs) * u64::from(longest.min(USUAL_LEN));
    let tokens = usual.max(u64::from(longest)).next_multiple_of(block_size);
    tokens.saturating_mul(config.kv_bytes_per_token(args.model.kv_type)).min(free_bytes / 2)
}

#[cfg(test)]
mod tests {
    use fullbore_engine::tensor::KvType;

    use super::super::memory_table;
    use super::*;
    use crate::args::ModelArgs;

    const WEIGHTS: u64 = 100 << 20;

    fn args(kv_type: KvType) -> EngineArgs {
        EngineArgs::new(ModelArgs { kv_type, ..ModelArgs::new("", "sim") })
    }

    #[test]
    fn a_fraction_of_the_memory_is_used_to_the_last_block() {
        let bundle = Bundle::simulated();
        for (kv_type, fraction) in [(KvType::F16, 0.5), (KvType::Q8_0, 0.9), (KvType::Q4_0, 1.0)] {
            let args = EngineArgs { memory_fraction: Some(fraction), ..args(kv_type) };
            let config =
                engine_config(&args, &bundle, WEIGHTS, Room::alone(Some(1 << 30)), u64::MAX).expect("a valid plan");
            let table = memory_table(&bundle.config, &config, WEIGHTS);
            let block_bytes = table.kv_bytes_per_token * u64::from(table.block_size);
            let left = ((1u64 << 30) as f64 * fraction) as u64 - table.total();
            assert!(left < block_bytes, "{left} of {fraction} are left, and a block takes {block_bytes}");
        }
    }

    #[test]
    fn the_cache_of_a_layer_can_be_bound_whole() {
        let bundle = Bundle::simulated();
        let args = EngineArgs { kv_memory: Some(1 << 30), ..args(KvType::Q8_0) };
        let config = engine_config(&args, &bundle, WEIGHTS, Room::alone(None), 1 << 20).expect("a valid plan");
        let num_caches = 2 * u64::from(bundle.config.num_layers);
        let table = memory_table(&bundle.config, &config, WEIGHTS);
        let block_bytes = table.kv_bytes_per_token * u64::from(table.block_size) / num_caches;
        let cache_bytes = table.kv / num_caches;
        assert!(cache_bytes <= 1 << 20 && cache_bytes + block_bytes > 1 << 20, "{cache_bytes}");
    }

    #[test]
    fn what_cannot_be_planned_is_said_so() {
        let bundle = Bundle::simulated();
        let sentence = |args: &EngineArgs| {
            engine_config(args, &bundle, WEIGHTS, Room::alone(None), u64::MAX).expect_err("no plan").to_string()
        };
        let fraction = sentence(&EngineArgs { memory_fraction: Some(0.9), ..args(KvType::F16) });
        assert!(fraction.contains("--kv-memory instead of --memory-fraction"), "{fraction}");
        let swap = sentence(&EngineArgs { swap_memory: Some(100), ..args(KvType::F16) });
        assert!(swap.starts_with("--swap-memory of 100 B holds no block"), "{swap}");
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused_with_their_numbers() {
        let bundle = Bundle::simulated();
        let sentence = |args: &EngineArgs| {
            engine_config(args, &bundle, WEIGHTS, Room::alone(None), u64::MAX).expect_err("no plan").to_string()
        };
        let long = EngineArgs { max_model_len: Some(1000), ..args(KvType::F16) };
        let pool = sentence(&EngineArgs { kv_blocks: Some(31), block_size: 32, ..long.clone() });
        assert!(pool.starts_with("31 KV blocks of 32 tokens cannot hold one sequence of max_model_len 1000"), "{pool}");
        let memory = sentence(&EngineArgs { kv_memory: Some(4096), ..long.clone() });
        assert!(memory.contains("1000"), "{memory}");
        let queue = sentence(&EngineArgs { max_queued_tokens: Some(999), ..long.clone() });
        assert_eq!(queue, "max_queued_tokens is 999; it must be at least 1000");
        let slots = sentence(&EngineArgs { max_num_seqs: 600, ..long.clone() });
        assert_eq!(slots, "max_num_batched_tokens is 512; it must be at least 600");
        let target = sentence(&EngineArgs { target_itl_ms: Some(0), ..long.clone() });
        assert!(target.contains("the latency target is 0"), "{target}");
        let deadline = sentence(&EngineArgs { max_queue_ms: Some(0), ..long });
        assert_eq!(deadline, "max_queue_ms is 0; it must be at least 1");
    }

    #[test]
    fn as_many_tokens_may_wait_as_fit_the_requests_that_may_or_the_longest_one() {
        let bundle = Bundle::simulated();
        let tokens = |args: &EngineArgs| {
            engine_config(args, &bundle, WEIGHTS, Room::alone(None), u64::MAX).expect("a plan").max_queued_tokens
        };
        assert_eq!(tokens(&args(KvType::F16)), 256 * USUAL_LEN);
        let few = EngineArgs { max_queued_requests: 1, max_model_len: Some(4000), ..args(KvType::F16) };
        assert_eq!(tokens(&few), 4000);
    }
}
