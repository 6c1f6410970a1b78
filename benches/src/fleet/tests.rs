//! Fleets of a few devices, alike and unlike, which stay or are lost.

use fullbore_engine::cost::profile::{ProfiledDevice, ProfiledLimits, ProfiledModel};
use fullbore_engine::cost::{CostModel, Prices};

use super::*;
use crate::workload::{Arrivals, Lengths, generate};

/// `speed` times as fast as 20 ms a step and 0.5 ms for each row more.
fn device(speed: f64) -> FleetDevice {
    let config = EngineConfig {
        max_num_seqs: 16,
        max_num_batched_tokens: 128,
        max_logit_rows: 16,
        num_blocks: 1024,
        pipeline_depth: 1,
        ..EngineConfig::default()
    };
    config.check().expect("it is right");
    let profile = DeviceProfile {
        device: ProfiledDevice::default(),
        model: ProfiledModel { name: "a model".to_owned(), kv_bytes_per_token: 100 },
        limits: ProfiledLimits::default(),
        host_ns_per_step: 0,
        ns_per_copied_megabyte: 0.0,
        cost: CostModel::line(20e6 / speed, 0.5e6 / speed, Prices::default()),
        points: Vec::new(),
    };
    FleetDevice { name: format!("{speed} times"), profile, config, life: Life::default(), moves_kv: false }
}

fn fleet(speeds: &[f64]) -> Vec<FleetDevice> {
    speeds.iter().map(|&speed| device(speed)).collect()
}

const SHORT: Lengths = Lengths::LogNormal { prompt: 60.0, output: 40.0, sigma: 0.7 };

fn run(speeds: &[f64], requests: &[PlannedRequest], rule: Rule) -> FleetReport {
    run_on(&fleet(speeds), requests, rule)
}

fn run_on(devices: &[FleetDevice], requests: &[PlannedRequest], rule: Rule) -> FleetReport {
    let report = simulate_fleet(devices, requests, rule, 1).expect("its engines meet no bug");
    let num_told = report.num_completed + report.num_too_long + report.num_failed;
    assert_eq!(num_told, requests.len() as u32, "{report:#?}");
    let output: u64 = report.devices.iter().map(|device| device.output_tokens).sum();
    assert!(output == report.output_tokens || report.num_failed > 0, "{output}: {report:#?}");
    report
}

fn life(joins: u64, losses: &[u64], away: Option<u64>) -> Life {
    let seconds = Duration::from_secs;
    Life { joins: seconds(joins), losses: losses.iter().copied().map(seconds).collect(), away: away.map(seconds) }
}

/// Every request has all of its tokens, once, whatever becomes of the devices.
#[test]
fn nothing_is_lost_with_devices_that_come_back() {
    let requests = generate(Arrivals::Poisson { per_s: 8.0 }, SHORT, 400, 5);
    let wanted: u64 = requests.iter().map(|request| u64::from(request.output_tokens)).sum();
    let mut devices = fleet(&[1.0, 1.0, 2.0, 4.0]);
    devices[0].life = life(20, &[], None);
    devices[1].life = life(0, &[14, 31], Some(6));
    // The fastest never comes back, and from 16 to 18 seconds nobody is there.
    devices[2].life = life(0, &[16], Some(2));
    devices[3].life = life(0, &[10], None);
    for rule in Rule::ALL {
        let report = run_on(&devices, &requests, rule);
        assert_eq!((report.num_completed, report.output_tokens), (400, wanted), "{report:#?}");
        assert_eq!((report.num_losses, report.num_failed), (4, 0), "{report:#?}");
        assert!(report.num_replayed > 0, "{report:#?}");
        assert_eq!(run_on(&devices, &requests, rule), report, "the same each time");
    }
}

#[test]
fn who_outlives_three_devices_or_all_of_them_fails_and_is_counted() {
    let long = Lengths::Fixed { prompt: 50, output: 200 };
    let requests = generate(Arrivals::AtOnce, long, 4, 5);
    // 200 tokens take 4 seconds at least.
    let mut devices = fleet(&[1.0]);
    devices[0].life = life(0, &[2], Some(1));
    let report = run_on(&devices, &requests, Rule::Router);
    assert_eq!((report.num_completed, report.num_failed, report.num_replayed), (4, 0, 4), "{report:#?}");
    devices[0].life = life(0, &[1, 3, 5], Some(1));
    let report = run_on(&devices, &requests, Rule::Router);
    assert_eq!((report.num_completed, report.num_failed, report.num_replayed), (0, 4, 8), "{report:#?}");
    devices[0].life = life(0, &[1], None);
    let report = run_on(&devices, &requests, Rule::Router);
    assert_eq!((report.num_completed, report.num_failed, report.num_replayed), (0, 4, 4), "{report:#?}");
}

#[test]
fn a_fleet_of_one_is_a_device() {
    let requests = generate(Arrivals::Poisson { per_s: 6.0 }, SHORT, 80, 3);
    let alone = device(1.0);
    let reports = Rule::ALL.map(|rule| run(&[1.0], &requests, rule));
    let wanted =
        crate::simulate::simulate(&alone.profile, alone.config, &requests, Default::default()).expect("it runs");
    for report in reports {
        assert_eq!((report.ttft_ms, report.itl_ms, report.total_ms), (wanted.ttft_ms, wanted.itl_ms, wanted.total_ms));
        assert_eq!((report.duration_s, report.num_moved), (wanted.duration_s, 0));
    }
}

#[test]
fn unlike_devices_end_together() {
    let requests = generate(Arrivals::AtOnce, SHORT, 4000, 5);
    let report = run(&[1.0, 1.0, 2.0, 4.0], &requests, Rule::Router);
    let alone: f64 =
        [1.0, 1.0, 2.0, 4.0].map(|speed| run(&[speed], &requests, Rule::Router).output_tokens_per_s).iter().sum();
    assert!(report.output_tokens_per_s > 0.95 * alone, "{} of {alone}", report.output_tokens_per_s);
    assert!(report.most_idle_share < 0.02, "{report:#?}");
    let plain = run(&[1.0, 1.0, 2.0, 4.0], &requests, Rule::RoundRobin);
    assert!(plain.output_tokens_per_s < 0.6 * alone, "{} of {alone}", plain.output_tokens_per_s);
}

/// What is asked of the router: eight devices of speeds 1 to 8, skewed lengths, 30 % of each prompt shared with others.
#[test]
fn unlike_devices_bring_what_they_bring_alone_and_wait_for_nobody() {
    let speeds = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 8.0];
    let lengths = Lengths::SharedLogNormal { groups: 16, share: 0.3, prompt: 200.0, output: 40.0, sigma: 1.0 };
    let at_once = generate(Arrivals::AtOnce, lengths, 6000, 5);
    let rate = |speeds: &[f64]| run(speeds, &at_once, Rule::Router).output_tokens_per_s_while_waiting;
    let alone: f64 = speeds.iter().map(|&speed| speed * rate(&[1.0])).sum();
    let together = rate(&speeds);
    assert!(together > 0.95 * alone, "{together} of {alone}");
    let per_s = 0.9 * alone / 40.0;
    let requests = generate(Arrivals::Poisson { per_s }, lengths, 6000, 7);
    let [ours, omniscient, least] =
        [Rule::Router, Rule::Omniscient, Rule::LeastRequests].map(|rule| run(&speeds, &requests, rule));
    assert!(ours.ttft_ms.p99 < 1.3 * omniscient.ttft_ms.p99, "{ours:#?} {omniscient:#?}");
    assert!(ours.most_idle_share < 0.02, "{ours:#?}");
    assert!(ours.total_ms.mean < least.total_ms.mean && ours.ttft_ms.p99 < least.ttft_ms.p99, "{ours:#?} {least:#?}");
}

/// Sixty at once, on two devices of which one is twenty times as fast: the slow one's go on there when it is done.
#[test]
fn a_slow_device_holds_up_no_burst() {
    let requests = generate(Arrivals::AtOnce, SHORT, 60, 5);
    let [both, fast] = [&[1.0, 20.0][..], &[20.0]].map(|speeds| run(speeds, &requests, Rule::Router));
    assert!(both.duration_s < 1.3 * fast.duration_s, "{} {}", both.duration_s, fast.duration_s);
    let wanted: u64 = requests.iter().map(|request| u64::from(request.output_tokens)).sum();
    assert_eq!((both.num_completed, both.output_tokens), (60, wanted));
}

#[test]
fn prefixes_are_found_where_they_are() {
    let lengths = Lengths::Shared { groups: 9, prefix: 256, prompt: 30, output: 20 };
    let requests = generate(Arrivals::Poisson { per_s: 20.0 }, lengths, 400, 7);
    let [ours, turns] = [Rule::Router, Rule::RoundRobin].map(|rule| run(&[1.0; 4], &requests, rule));
    assert!(ours.prefix_hit_share > turns.prefix_hit_share, "{} {}", ours.prefix_hit_share, turns.prefix_hit_share);
    assert!(ours.ttft_ms.p99 < turns.ttft_ms.p99, "{:?} {:?}", ours.ttft_ms, turns.ttft_ms);
}

#[test]
fn a_simulation_of_a_fleet_comes_out_the_same_each_time() {
    let requests = generate(Arrivals::Burst { size: 40, every_s: 1.0 }, SHORT, 300, 9);
    for rule in Rule::ALL {
        assert_eq!(run(&[1.0, 3.0], &requests, rule), run(&[1.0, 3.0], &requests, rule));
    }
}

/// Devices of speed 1 with a slot each, on which a block of KV takes so long to be read and as long to be written.
fn moving(num_devices: usize, copy_ms: f64, kv_bytes_per_token: u64) -> Vec<FleetDevice> {
    let mut devices = fleet(&vec![1.0; num_devices]);
    for device in &mut devices {
        device.moves_kv = true;
        device.config.max_num_seqs = 1;
        device.profile.model.kv_bytes_per_token = kv_bytes_per_token;
        let block_bytes = kv_bytes_per_token as f64 * f64::from(device.config.block_size);
        device.profile.ns_per_copied_megabyte = copy_ms * 1e12 / block_bytes;
    }
    devices
}

/// The second begins with ten blocks of what the first has computed, on a device that has no slot.
#[test]
fn a_prefix_that_comes_from_another_device_takes_what_its_copies_take() {
    let lengths = Lengths::Shared { groups: 1, prefix: 320, prompt: 10, output: 100 };
    let requests = generate(Arrivals::Burst { size: 1, every_s: 1.0 }, lengths, 2, 5);
    let report = run_on(&moving(2, 4.0, 100), &requests, Rule::Router);
    assert_eq!((report.num_fetched_blocks, report.num_completed), (10, 2), "{report:#?}");
    assert_eq!(report.prefix_hit_share, 320.0 / 660.0);
    // It is read after the step that runs, of 20 ms at most, comes with the end of the next, and is written; then 10
    // tokens are computed.
    let soonest = 40.0 + 20.0 + 40.0 + 24.5;
    assert!((0.99 * soonest..soonest + 21.0).contains(&report.ttft_ms.p50), "{report:#?}");
    // To compute it all takes 224 ms.
    let dear = run_on(&moving(2, 11.0, 100), &requests, Rule::Router);
    assert_eq!((dear.num_fetched_blocks, dear.prefix_hit_share), (0, 0.0), "{dear:#?}");
    assert!((220.0..226.0).contains(&dear.ttft_ms.p50), "{dear:#?}");
}

/// In chunks and whole, with devices that are lost while they have a part in a move.
#[test]
fn moves_lose_nothing_and_come_out_the_same_each_time() {
    let lengths = Lengths::Shared { groups: 5, prefix: 640, prompt: 20, output: 12 };
    let requests = generate(Arrivals::Poisson { per_s: 6.0 }, lengths, 300, 7);
    // A chunk has eight blocks, of the twenty that are to move.
    let mut devices = moving(4, 1.0, 32_000);
    for (device, first) in devices.iter_mut().zip([7, 9, 15, 21]) {
        device.life = life(0, &[first, first + 20], Some(3));
    }
    for rule in [Rule::Router, Rule::RoundRobin, Rule::LeastRequests] {
        let report = run_on(&devices, &requests, rule);
        assert_eq!((report.num_completed, report.num_failed), (300, 0), "{report:#?}");
        assert!(report.num_fetched_blocks > 100, "{report:#?}");
        assert_eq!(run_on(&devices, &requests, rule), report, "the same each time");
    }
}
