//! What a step of a model's depth costs the host before the device has it: ops recorded, encoded and submitted, in wall
//! time. The model is small in all but its layers, on which alone the number of ops depends.

use std::time::Instant;

use fullbore_engine::backend::{Backend, DeviceError, LoadError};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Request, TokenId};
use fullbore_engine::tensor::WeightFormat;
use serde::Serialize;

use crate::nobody::Nobody;
use crate::statistics::median;

const PROMPT_TOKENS: u32 = 16;

/// Decode steps of so many sequences.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SubmitReport {
    pub num_layers: u32,
    pub num_seqs: u32,
    pub num_steps: u32,
    pub record_and_submit_ms: f64,
}

/// The median over `num_steps` steps of `num_seqs` sequences that decode, one at a time.
pub fn measure(
    mut backend: Box<dyn Backend>,
    num_layers: u32,
    num_seqs: u32,
    num_steps: u32,
) -> Result<SubmitReport, LoadError> {
    let max_model_len = PROMPT_TOKENS + num_steps + 20;
    let config = EngineConfig {
        max_num_seqs: num_seqs,
        max_num_batched_tokens: num_seqs * PROMPT_TOKENS,
        max_model_len,
        block_size: 32,
        num_blocks: num_seqs * max_model_len.div_ceil(32),
        max_logit_rows: num_seqs,
        ..EngineConfig::default()
    };
    config.check().expect("a valid config");
    let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::Q4_0 };
    let limits = config.state_limits();
    let model = Model::load(ModelConfig::tiny(256, num_layers), limits, &checkpoint, backend.as_mut(), &mut |_| {});
    let mut engine = Engine::new(config, model?, backend, (1, 2));
    for first in 0..num_seqs {
        let prompt = (0..PROMPT_TOKENS).map(|position| TokenId((first * 31 + position * 7) % 256)).collect();
        engine.add(Request { prompt, max_tokens: num_steps + 20, ..Request::default() }, Box::new(Nobody));
    }
    let mut times = times(&mut engine, u64::from(num_seqs * PROMPT_TOKENS), num_steps)?;
    let record_and_submit_ms = median(&mut times).unwrap_or_default();
    Ok(SubmitReport { num_layers, num_seqs, num_steps, record_and_submit_ms })
}

/// Milliseconds a step, once the prompts are through.
fn times(engine: &mut Engine, prompt_tokens: u64, num_steps: u32) -> Result<Vec<f64>, DeviceError> {
    while engine.stats().prefill_tokens < prompt_tokens {
        engine.step()?;
    }
    while engine.num_in_flight() > 0 {
        engine.complete()?;
    }
    let mut times = Vec::new();
    for _ in 0..num_steps {
        assert!(engine.plan(), "every sequence decodes");
        let begun = Instant::now();
        engine.submit()?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        engine.complete()?;
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use fullbore_engine::backend::sim::{SimBackend, SimOptions};

    use super::*;

    #[test]
    fn every_step_is_timed() {
        let report = measure(Box::new(SimBackend::new(SimOptions::default())), 3, 4, 5).expect("the simulator loads");
        assert!(report.record_and_submit_ms > 0.0, "{report:?}");
    }
}
