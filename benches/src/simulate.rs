//! What a workload would do on a device that is known by its profile: the true engine, scheduler and memory manager on
//! a simulated device, whose time is what the profile predicts.
//!
//! Invariant: the same profile, limits and workload give the same report, on every machine.

use std::time::Duration;

use fullbore_engine::backend::LoadError;
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimClock, SimOptions};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::DeviceProfile;
use fullbore_engine::engine::Engine;
use fullbore_engine::model::config::RopeConfig;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::tensor::WeightFormat;

use crate::play::{Clock, PlayError, PlayOptions, play};
use crate::report::ServingReport;
use crate::workload::PlannedRequest;

/// Ids to draw prompts from; no real vocabulary matters.
pub(crate) const VOCAB_SIZE: u32 = 4096;
/// The keys of the prefix cache's hash: nobody attacks a simulation, and it must be the same each time.
pub(crate) const HASH_KEY: (u64, u64) = (1, 2);

#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Play(#[from] PlayError),
}

/// Plays `requests` on the device of `profile`; `config` has been checked.
pub fn simulate(
    profile: &DeviceProfile,
    config: EngineConfig,
    requests: &[PlannedRequest],
    options: PlayOptions,
) -> Result<ServingReport, SimulateError> {
    let (mut engine, clock) = engine(profile, config)?;
    let host_per_step = Duration::from_nanos(profile.host_ns_per_step);
    let clock = Clock::Simulated { clock, since: Duration::ZERO, host_per_step };
    let mut report = play(&mut engine, requests, &clock, options)?;
    let num_tokens = u64::from(config.num_blocks) * u64::from(config.block_size);
    report.kv.pool_bytes = num_tokens * profile.model.kv_bytes_per_token;
    Ok(report)
}

/// An engine on the device of `profile`, and the device's clock.
pub(crate) fn engine(profile: &DeviceProfile, config: EngineConfig) -> Result<(Engine, SimClock), LoadError> {
    let model = stand_in(config.max_model_len);
    // A block of the stand-in is smaller, and takes as long to copy as the real one.
    let larger = profile.model.kv_bytes_per_token as f64 / model.kv_bytes_per_token(config.kv_type) as f64;
    let mut backend = Box::new(SimBackend::new(SimOptions {
        fidelity: Fidelity::Cost,
        cost: profile.cost,
        ns_per_copied_megabyte: profile.ns_per_copied_megabyte * larger,
        ..SimOptions::default()
    }));
    let clock = backend.clock();
    let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::F32 };
    let model = Model::load(model, config.state_limits(), &checkpoint, backend.as_mut(), &mut |_| {})?;
    let mut engine = Engine::new(config, model, backend, HASH_KEY);
    engine.enable_swap().map_err(LoadError::from)?;
    engine.set_cost(profile.cost);
    Ok((engine, clock))
}

/// The smallest model that a simulated device takes, for a fleet has it a thousand times; what the real one would cost
/// is in the profile.
fn stand_in(max_positions: u32) -> ModelConfig {
    let tiny = ModelConfig::tiny(VOCAB_SIZE, 1);
    let rope = RopeConfig { rotary_dim: 2, ..tiny.rope.clone() };
    ModelConfig { max_positions, dim: 2, num_heads: 1, ffn_dim: 2, rope, ..tiny }
}

#[cfg(test)]
mod tests {
    use fullbore_engine::cost::profile::{ProfiledDevice, ProfiledLimits, ProfiledModel};
    use fullbore_engine::cost::{CostModel, Prices};

    use super::*;
    use crate::workload::{Arrivals, Lengths, SHAREGPT, Segment, generate};

    /// 10 ms a step, 1 ms more for each row after the first.
    fn profile() -> DeviceProfile {
        DeviceProfile {
            device: ProfiledDevice::default(),
            model: ProfiledModel { name: "a model".to_owned(), kv_bytes_per_token: 100 },
            limits: ProfiledLimits::default(),
            host_ns_per_step: 500_000,
            ns_per_copied_megabyte: 0.0,
            cost: CostModel::line(10e6, 1e6, Prices::default()),
            points: Vec::new(),
        }
    }

    fn config() -> EngineConfig {
        EngineConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            max_logit_rows: 4,
            pipeline_depth: 1,
            ..EngineConfig::default()
        }
    }

    fn run(config: EngineConfig, requests: &[PlannedRequest], options: PlayOptions) -> ServingReport {
        config.check().expect("it is right");
        simulate(&profile(), config, requests, options).expect("the simulator is never lost")
    }

    fn close(found: f64, wanted: f64) {
        assert!((found - wanted).abs() <= 0.006 * wanted, "{found} for {wanted}");
    }

    #[test]
    fn a_lone_request_takes_what_the_profile_says() {
        let request = |row, arrival_s| PlannedRequest {
            row,
            arrival: Duration::from_secs(arrival_s),
            prompt_tokens: 100,
            output_tokens: 5,
            ..PlannedRequest::default()
        };
        let report = run(config(), &[request(1, 0), request(2, 60)], PlayOptions::default());
        // Chunks of 64 and 36 rows, each with half a millisecond of the host; then 4 steps of one row.
        let (first, gap) = (73.5 + 45.5, 10.5);
        for percentile in [report.ttft_ms.mean, report.ttft_ms.p50, report.ttft_ms.p99] {
            close(percentile, first);
        }
        close(report.itl_ms.p50, gap);
        close(report.itl_ms.p99, gap);
        close(report.total_ms.p90, first + 4.0 * gap);
        close(report.duration_s, 60.0 + (first + 4.0 * gap) / 1e3);
        close(report.output_tokens_per_s, 10.0 / report.duration_s);
        close(report.scheduled_tokens_per_s, 208.0 / report.duration_s);
        assert_eq!((report.num_completed, report.num_steps, report.output_tokens), (2, 12, 10));
        assert_eq!((report.max_waiting, report.num_preemptions, report.prefix_hit_share), (1, 0, 0.0));
        // 4 of 256 blocks of 32 tokens.
        close(report.kv.max_share, 4.0 / 256.0);
        assert_eq!(report.kv.pool_bytes, 256 * 32 * 100);
    }

    /// The device goes from one step to the next; only the first waits for the host.
    #[test]
    fn a_second_step_in_flight_hides_the_host() {
        let requests = generate(Arrivals::AtOnce, Lengths::Fixed { prompt: 10, output: 101 }, 4, 1);
        let gap = |pipeline_depth| run(EngineConfig { pipeline_depth, ..config() }, &requests, PlayOptions::default());
        close(gap(1).itl_ms.p50, 13.5);
        close(gap(2).itl_ms.p50, 13.0);
    }

    #[test]
    fn a_simulation_comes_out_the_same_each_time() {
        let requests = generate(Arrivals::Poisson { per_s: 2.0 }, SHAREGPT, 60, 7);
        let report = run(config(), &requests, PlayOptions::default());
        assert_eq!(report, run(config(), &requests, PlayOptions::default()));
        assert_eq!(report.num_completed + report.too_long.count, 60);
        let output: u64 = requests.iter().map(|request| u64::from(request.output_tokens)).sum();
        assert!(report.output_tokens > 0 && report.output_tokens <= output);
    }

    #[test]
    fn what_cannot_run_is_named() {
        let mut requests = generate(Arrivals::AtOnce, Lengths::Fixed { prompt: 20, output: 3 }, 12, 1);
        requests[4].prompt_tokens = 2046;
        requests[5].prompt_tokens = 2045;
        let report = run(config(), &requests, PlayOptions::default());
        assert_eq!((report.too_long.count, report.too_long.rows.as_slice()), (1, [5].as_slice()));
        assert_eq!((report.num_completed, report.refused.count), (11, 0));
        let strict = PlayOptions { refuse_when_full: true, ..PlayOptions::default() };
        let report = run(EngineConfig { max_queued_requests: 6, ..config() }, &requests, strict);
        assert_eq!((report.num_completed, report.refused.count, report.refused.rows[0]), (6, 5, 8));
        assert!(report.to_string().contains("5 (rows 8, 9, 10, 11, 12)"), "{report}");
    }

    #[test]
    fn shared_prefixes_and_scarce_memory_show() {
        let mut requests = generate(Arrivals::AtOnce, Lengths::Fixed { prompt: 600, output: 200 }, 8, 1);
        let scarce = EngineConfig { max_model_len: 1024, num_blocks: 60, ..config() };
        let report = run(scarce, &requests, PlayOptions::default());
        assert!(report.num_preemptions > 0, "{report}");
        assert!(report.kv.max_share > 0.95 && report.kv.mean_share > 0.5, "{report}");
        assert_eq!((report.prefix_hit_share, report.num_completed), (0.0, 8));
        for request in &mut requests {
            request.segments = [3, 100 + u64::from(request.row)].map(|id| Segment { id, num_tokens: 512 }).to_vec();
            request.arrival = Duration::from_secs(30 * u64::from(request.row - 1));
        }
        let report = run(scarce, &requests, PlayOptions::default());
        // All but the first find 512 of 600 tokens.
        close(report.prefix_hit_share, 7.0 * 512.0 / (8.0 * 600.0));
    }
}
