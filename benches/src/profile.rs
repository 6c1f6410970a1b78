//! Measures what steps cost on a device: crafted requests through the true engine, every step timed, prices fitted.
//!
//! A pass computes some long prompts in chunks of one size after the other, then lets batches of each size decode on
//! contexts of several lengths (prefixes of those prompts, found in the prefix cache), then mixes chunks into decoding
//! batches. Passes repeat until the time is spent, so that a disturbance of some seconds hits no size alone. Invariant:
//! what counts as a step's shape is what the engine says it was, not what was asked for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fullbore_engine::backend::DeviceError;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::profile::MeasuredPoint;
use fullbore_engine::cost::{CostModel, StepShape, fit};
use fullbore_engine::engine::Engine;
use fullbore_engine::request::{Request, TokenId};

use crate::nobody::Nobody;
use crate::statistics::{median, quantile};
use crate::workload::SplitMix64;

/// What was measured, and what came of it.
#[derive(Clone, Debug)]
pub struct Measured {
    pub cost: CostModel,
    pub host_ns_per_step: u64,
    pub points: Vec<MeasuredPoint>,
    pub num_steps: usize,
    pub num_passes: u32,
    /// Relative errors of `cost` on the steps it was fitted on.
    pub median_error: f64,
    pub p95_error: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(
        "measuring a device takes a prefix cache and a context of at least {LEAST_MODEL_LEN} tokens and four blocks; \
         raise --max-model-len, or lower --block-size"
    )]
    TooSmall,
    #[error("the device gave {num_steps} steps only, too few to fit; give it more time")]
    TooFew { num_steps: usize },
}

/// Passes over the grid until `time` is spent, at least one. Progress is told in passes and steps.
pub fn measure(
    engine: &mut Engine,
    time: Duration,
    progress: &mut dyn FnMut(u32, usize),
) -> Result<Measured, ProfileError> {
    let config = *engine.config();
    if !config.prefix_cache || config.max_model_len < LEAST_MODEL_LEN.max(4 * config.block_size) {
        return Err(ProfileError::TooSmall);
    }
    let start = Instant::now();
    let vocab_size = engine.model().config.vocab_size;
    let mut grid = Grid { engine, config, random: SplitMix64(1), vocab_size, steps: Vec::new(), host_ns: Vec::new() };
    let mut contexts: Vec<Vec<TokenId>> = Vec::new();
    let mut pass = 0;
    grid.warm_up()?;
    while pass == 0 || start.elapsed() < time {
        grid.prefill(pass, &mut contexts)?;
        for (index, length) in grid.context_lengths().into_iter().enumerate() {
            for batch in grid.batches(pass + index as u32) {
                grid.decode(&contexts, length, batch)?;
            }
        }
        for batch in [0, config.max_num_seqs / 4, config.max_num_seqs / 4 * 3] {
            grid.mix(&contexts, batch, pass)?;
        }
        pass += 1;
        progress(pass, grid.steps.len());
    }
    summary(grid.steps, grid.host_ns, pass)
}

/// A context, a chunk and a few tokens more.
const LEAST_MODEL_LEN: u32 = 128;
/// Tokens of the longest context, at most.
const LONGEST_CONTEXT: u32 = 1024;
/// Long prompts of a pass, and those that are kept.
const NEW_CONTEXTS: usize = 2;
const MAX_CONTEXTS: usize = 32;
/// Steps of one batch.
const DECODE_STEPS: u32 = 4;

struct Grid<'a> {
    engine: &'a mut Engine,
    config: EngineConfig,
    random: SplitMix64,
    vocab_size: u32,
    steps: Vec<(StepShape, u64)>,
    /// What each step took beside the device.
    host_ns: Vec<f64>,
}

impl Grid<'_> {
    /// A device's first steps are not like the others: memory is touched, kernels are made.
    fn warm_up(&mut self) -> Result<(), ProfileError> {
        let prompt = self.tokens(self.longest() as usize);
        self.add(prompt, 4);
        self.run()?;
        self.steps.clear();
        self.host_ns.clear();
        Ok(())
    }

    /// The longest context, in whole blocks: half of what a sequence may have is left for chunks on top of it.
    fn longest(&self) -> u32 {
        self.in_blocks((self.config.max_model_len / 2).min(LONGEST_CONTEXT))
    }

    fn in_blocks(&self, num_tokens: u32) -> u32 {
        num_tokens / self.config.block_size * self.config.block_size
    }

    fn context_lengths(&self) -> Vec<u32> {
        let longest = self.longest();
        let mut lengths = vec![0, self.in_blocks(longest / 4), self.in_blocks(longest / 2), longest];
        lengths.dedup();
        lengths
    }

    /// Powers of two up to the most sequences there are, and one between two of them.
    fn batches(&self, pass: u32) -> Vec<u32> {
        let most = self.config.max_num_seqs;
        let mut batches: Vec<u32> = (0..).map(|k| 1 << k).take_while(|&batch| batch < most).collect();
        batches.push(most);
        let between = 3 << (pass % 8);
        if between < most {
            batches.push(between);
        }
        batches
    }

    /// Chunks of rows: eighths of the largest step and small ones, in an order of their own for each pass.
    fn chunks(&self, pass: u32) -> Vec<u32> {
        let most = self.config.max_num_batched_tokens;
        let mut chunks: Vec<u32> = (0..).map(|k| 2 << k).take_while(|&chunk| chunk < most).collect();
        chunks.extend([most / 8 * 3, most / 4 * 3, most]);
        let turn = pass as usize % chunks.len();
        chunks.rotate_left(turn);
        chunks
    }

    /// Computes new contexts in chunks of unlike size, and keeps them for the batches to come.
    fn prefill(&mut self, pass: u32, contexts: &mut Vec<Vec<TokenId>>) -> Result<(), ProfileError> {
        let (longest, block_size) = (self.longest(), self.config.block_size);
        let half_the_pool = self.config.num_blocks as usize / 2;
        let kept = (half_the_pool / longest.div_ceil(block_size) as usize).clamp(1, MAX_CONTEXTS);
        for index in 0..NEW_CONTEXTS.min(kept) {
            let prompt = self.tokens(longest as usize);
            // Only whole blocks are found again, so each chunk ends with one; the first pass is in the largest chunks.
            let chunk = match pass as usize * NEW_CONTEXTS + index {
                0 => longest,
                turn => (self.config.max_num_batched_tokens >> (turn % 4)).next_multiple_of(block_size),
            };
            let mut end = 0;
            while end < longest {
                end = (end + chunk).min(longest);
                self.add(prompt[..end as usize].to_vec(), 1);
                self.run()?;
            }
            if contexts.len() >= kept {
                contexts.remove(0);
            }
            contexts.push(prompt);
        }
        Ok(())
    }

    /// `batch` sequences decode after `context` positions each.
    fn decode(&mut self, contexts: &[Vec<TokenId>], context: u32, batch: u32) -> Result<(), ProfileError> {
        self.add_decoding(contexts, context, batch, DECODE_STEPS);
        self.run()
    }

    /// Chunks of every size, one a step, into a batch that decodes on contexts of half the longest.
    fn mix(&mut self, contexts: &[Vec<TokenId>], batch: u32, pass: u32) -> Result<(), ProfileError> {
        let context = self.in_blocks(self.longest() / 2);
        let chunks = self.chunks(pass);
        self.add_decoding(contexts, context, batch, chunks.len() as u32 + 2);
        self.step()?;
        for (index, chunk) in chunks.into_iter().enumerate() {
            // Decoding rows come first, and the rest of the step is this chunk's.
            let chunk = chunk.min(self.config.max_num_batched_tokens.saturating_sub(batch));
            if chunk == 0 {
                continue;
            }
            // Every other one goes on from a context that is known.
            let mut prompt = match (index as u32 + pass) % 2 {
                0 => Vec::new(),
                _ => contexts[index % contexts.len()][..context as usize].to_vec(),
            };
            prompt.extend(self.tokens(chunk as usize));
            self.add(prompt, 1);
            self.step()?;
        }
        self.run()
    }

    fn add_decoding(&mut self, contexts: &[Vec<TokenId>], context: u32, batch: u32, num_steps: u32) {
        for index in 0..batch as usize {
            let mut prompt = contexts[index % contexts.len()][..context as usize].to_vec();
            prompt.extend(self.tokens(1));
            self.add(prompt, num_steps + 1);
        }
    }

    fn tokens(&mut self, count: usize) -> Vec<TokenId> {
        (0..count).map(|_| TokenId(self.random.below(self.vocab_size))).collect()
    }

    fn add(&mut self, mut prompt: Vec<TokenId>, max_tokens: u32) {
        prompt.truncate(self.config.max_model_len.saturating_sub(max_tokens) as usize);
        let request = Request { prompt, max_tokens, ..Request::default() };
        self.engine.add(request, Box::new(Nobody));
    }

    fn run(&mut self) -> Result<(), ProfileError> {
        while !self.engine.is_idle() {
            self.step()?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), ProfileError> {
        let begun = Instant::now();
        if self.engine.step()? {
            let whole_ns = begun.elapsed().as_nanos() as u64;
            let step = self.engine.last_step();
            self.steps.push((step.shape, step.device_ns));
            self.host_ns.push(whole_ns.saturating_sub(step.device_ns) as f64);
        }
        Ok(())
    }
}

fn summary(steps: Vec<(StepShape, u64)>, mut host_ns: Vec<f64>, num_passes: u32) -> Result<Measured, ProfileError> {
    let cost = fit::fit(&steps);
    if !cost.is_known() {
        return Err(ProfileError::TooFew { num_steps: steps.len() });
    }
    let error = |(shape, ns): &(StepShape, u64)| (cost.predict_ns(shape) as f64 / *ns as f64 - 1.0).abs();
    let mut errors: Vec<f64> = steps.iter().map(error).collect();
    Ok(Measured {
        cost,
        host_ns_per_step: median(&mut host_ns).unwrap_or(0.0) as u64,
        num_steps: steps.len(),
        num_passes,
        median_error: median(&mut errors).unwrap_or(0.0),
        p95_error: quantile(&mut errors, 0.95).unwrap_or(0.0),
        points: points(steps),
    })
}

/// Steps of one number of rows and about one context, as one point.
fn points(steps: Vec<(StepShape, u64)>) -> Vec<MeasuredPoint> {
    let mut groups: BTreeMap<(u32, u32, u32), Vec<(StepShape, u64)>> = BTreeMap::new();
    for (shape, ns) in steps {
        let key = (shape.num_tokens, shape.num_logit_rows, shape.attended_tokens.ilog2());
        groups.entry(key).or_default().push((shape, ns));
    }
    let point = |mut group: Vec<(StepShape, u64)>| {
        group.sort_by_key(|(_, ns)| *ns);
        let (shape, median_ns) = group[group.len() / 2];
        MeasuredPoint {
            num_tokens: shape.num_tokens,
            num_logit_rows: shape.num_logit_rows,
            num_sequences: shape.num_sequences,
            attended_tokens: shape.attended_tokens,
            loaded_tokens: shape.loaded_tokens,
            num_steps: group.len() as u32,
            median_ns,
        }
    };
    groups.into_values().map(point).collect()
}

#[cfg(test)]
mod tests {
    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::cost::Prices;
    use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
    use fullbore_engine::tensor::WeightFormat;

    use super::*;

    fn engine(config: EngineConfig, cost: CostModel) -> Engine {
        config.check().expect("it is right");
        let mut backend = Box::new(SimBackend::new(SimOptions { cost, sleeps: true, ..SimOptions::default() }));
        let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
        let model = ModelConfig::tiny(512, 1);
        let model = Model::load(model, config.state_limits(), &checkpoint, backend.as_mut(), &mut |_| {});
        Engine::new(config, model.expect("the simulator has memory"), backend, (1, 2))
    }

    #[test]
    fn the_prices_of_a_device_are_found() {
        let prices = Prices { ns_per_attended_token: 300.0, ns_for_logits: 4e5, ..Prices::default() };
        let truth = CostModel::line(2e6, 3e4, prices);
        let config = EngineConfig {
            max_num_seqs: 8,
            max_logit_rows: 8,
            max_num_batched_tokens: 128,
            max_model_len: 512,
            ..EngineConfig::default()
        };
        let measured =
            measure(&mut engine(config, truth), Duration::ZERO, &mut |_, _| {}).expect("the simulator is never lost");
        assert_eq!(measured.num_passes, 1);
        // A sleep is never too short, and what the simulator itself takes comes on top.
        for shape in [
            StepShape::decode(1, 100),
            StepShape::decode(8, 250),
            StepShape::default().with_slice(0, 128, 1),
            StepShape::decode(3, 128).with_slice(128, 100, 1),
        ] {
            let (found, wanted) = (measured.cost.predict_ns(&shape) as f64, truth.predict_ns(&shape) as f64);
            assert!(found > 0.9 * wanted && found < 1.5 * wanted + 1e6, "{found} for {wanted} of {shape:?}");
        }
        let rows: Vec<u32> = measured.points.iter().map(|point| point.num_tokens).collect();
        for wanted in [1, 2, 4, 8, 128] {
            assert!(rows.contains(&wanted), "no step of {wanted} rows in {rows:?}");
        }
        assert!(measured.points.iter().any(|point| point.num_tokens > point.num_sequences && point.num_sequences > 1));
    }

    #[test]
    fn an_engine_that_cannot_be_measured_says_so() {
        let small = EngineConfig { max_model_len: 100, ..EngineConfig::default() };
        let refused =
            measure(&mut engine(small, CostModel::UNKNOWN), Duration::ZERO, &mut |_, _| {}).expect_err("too small");
        assert!(refused.to_string().contains("128"), "{refused}");
    }
}
