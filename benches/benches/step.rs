//! What a step costs on the host: scheduling, packing, recording, reading back, events; the device's own time is taken
//! out. On the simulator at `cost` fidelity, with every sequence decoding. Asserts that planning takes no memory.
//!
//! `cargo bench -p fullbore-bench --bench step` prints one line of JSON a size; `cargo test` runs it small.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use fullbore_bench::statistics::median;
use fullbore_bench::stopwatch::{Dial, Stopwatch};
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimOptions};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::request::{Event, Flow, Request, Sink, TokenId};
use fullbore_engine::tensor::WeightFormat;

const VOCAB_SIZE: u32 = 1024;
const MAX_TOKENS_PER_STEP: u32 = 1 << 15;

fn main() {
    let large = std::env::args().any(|argument| argument == "--bench");
    let sizes: &[(u32, u32)] = if large {
        &[(1, 1024), (64, 1024), (256, 1024), (512, 1024), (1024, 1024), (256, 60_000)]
    } else {
        &[(4, 64), (16, 64)]
    };
    for &(num_seqs, context) in sizes {
        let cost = measure(num_seqs, context, if large { 400 } else { 20 });
        println!(
            "{}",
            serde_json::json!({
                "num_seqs": num_seqs,
                "context": context,
                "host_us_per_step": cost.step_us,
                "plan_us_per_step": cost.plan_us,
                "host_ns_per_row": cost.step_us * 1e3 / f64::from(num_seqs),
                "allocations_in_plan": cost.num_allocations,
                "output_hash": format!("{:016x}", cost.hash),
            })
        );
        assert_eq!(cost.num_allocations, 0, "planning a step took memory");
    }
}

struct Cost {
    step_us: f64,
    plan_us: f64,
    num_allocations: u64,
    hash: u64,
}

/// Decode steps of `num_seqs` sequences that have `context` tokens each.
fn measure(num_seqs: u32, context: u32, num_steps: usize) -> Cost {
    let hash = Arc::new(AtomicU64::new(0));
    // The first decode while the last are still prefilled.
    let num_prefill_steps = num_seqs * context / MAX_TOKENS_PER_STEP + 1;
    let max_tokens = num_steps as u32 + num_prefill_steps + 64;
    let (mut engine, dial) = engine(num_seqs, context + max_tokens);
    for first in 0..num_seqs {
        let token = |position: u32| TokenId((first * 31 + position * 7) % VOCAB_SIZE);
        let prompt = (0..context).map(token).collect();
        engine.add(Request { prompt, max_tokens, ..Request::default() }, Box::new(Hash(hash.clone())));
    }
    while engine.stats().prefill_tokens < u64::from(num_seqs) * u64::from(context) {
        engine.step().expect("the simulator is never lost");
    }
    // All decode; what is kept between steps gets its size.
    for _ in 0..40 {
        engine.step().expect("the simulator is never lost");
    }
    while engine.num_in_flight() > 0 {
        engine.complete().expect("the simulator is never lost");
    }
    let (mut steps, mut plans) = (Vec::new(), Vec::new());
    let num_allocations = Rc::new(Cell::new(0));
    for _ in 0..num_steps {
        let begun = Instant::now();
        let before = dial.read();
        let plan_begun = Instant::now();
        let counted = allocation_counter::measure(|| assert!(engine.plan(), "every sequence decodes"));
        plans.push(plan_begun.elapsed().as_secs_f64() * 1e6);
        num_allocations.set(num_allocations.get() + counted.count_total);
        engine.submit().expect("the simulator is never lost");
        engine.complete().expect("the simulator is never lost");
        let on_device = (dial.read() - before).inside;
        steps.push((begun.elapsed() - on_device).as_secs_f64() * 1e6);
    }
    Cost {
        step_us: median(&mut steps).expect("steps were taken"),
        plan_us: median(&mut plans).expect("steps were taken"),
        num_allocations: num_allocations.get(),
        hash: hash.load(Ordering::Relaxed),
    }
}

fn engine(num_seqs: u32, max_model_len: u32) -> (Engine, Dial) {
    let config = EngineConfig {
        max_num_seqs: num_seqs,
        max_num_batched_tokens: MAX_TOKENS_PER_STEP,
        max_model_len,
        block_size: 32,
        num_blocks: num_seqs * max_model_len.div_ceil(32),
        max_logit_rows: num_seqs,
        ..EngineConfig::default()
    };
    config.check().expect("a valid config");
    let inner = SimBackend::new(SimOptions { fidelity: Fidelity::Cost, ..SimOptions::default() });
    let dial = Dial::default();
    let mut backend = Box::new(Stopwatch::new(Box::new(inner), &dial));
    let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
    let model = ModelConfig { max_positions: max_model_len, ..ModelConfig::tiny(VOCAB_SIZE, 1) };
    let model = Model::load(model, config.state_limits(), &checkpoint, backend.as_mut(), &mut |_| {});
    (Engine::new(config, model.expect("the simulator has memory"), backend, (1, 2)), dial)
}

/// A client that folds all ids into one number, so that a faster step can be seen to do the same work.
struct Hash(Arc<AtomicU64>);

impl Sink for Hash {
    fn event(&mut self, event: Event) -> Flow {
        if let Event::Token { id, .. } = event {
            self.0.fetch_add(u64::from(id.0).wrapping_mul(0x9e37_79b9_7f4a_7c15), Ordering::Relaxed);
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}
