//! What a workload would do on a fleet: true engines on simulated devices, each with a clock of its own, behind the
//! true router, or behind a plainer rule to hold it against.
//!
//! Whatever is due first happens first: an arrival, or the end of a device's step. What a step brought is known to the
//! router when the step ends and not before. Invariant: the same fleet, workload and rule give the same report, on
//! every machine; a request that did not run is counted.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::heard::Heard;
use crate::play::{PlayError, lock};
use crate::simulate::{self, HASH_KEY, SimulateError, VOCAB_SIZE};
use crate::workload::PlannedRequest;
use fullbore_engine::backend::sim::SimClock;
use fullbore_engine::batch::SequenceId;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::DeviceProfile;
use fullbore_engine::engine::Engine;
use fullbore_engine::fleet::ReplicaId;
use fullbore_engine::fleet::router::{Placement, Router, Traits};
use fullbore_engine::memory::{BlockChain, BlockHasher};
use fullbore_engine::request::{Event, FinishReason, Flow, Request, Sink, Usage};

pub mod report;
pub mod rule;

use report::{DeviceReport, FleetReport};
use rule::{Rule, Rules};

/// A device of a fleet; `config` has been checked.
#[derive(Clone, Debug)]
pub struct FleetDevice {
    pub name: String,
    pub profile: DeviceProfile,
    pub config: EngineConfig,
}

/// What a client of one device was told, with its row.
enum Note {
    Started,
    Token,
    Finished(Usage),
    Failed(String),
}

type Notes = Arc<Mutex<Vec<(usize, Note)>>>;

struct Client {
    index: usize,
    notes: Notes,
}

impl Sink for Client {
    fn event(&mut self, event: Event) -> Flow {
        let note = match event {
            Event::Started { .. } => Note::Started,
            Event::Token { .. } => Note::Token,
            Event::Finished { reason: FinishReason::Error(reason) | FinishReason::DeviceLost(reason), .. } => {
                Note::Failed(reason)
            }
            Event::Finished { usage, .. } => Note::Finished(usage),
            Event::Prompt(_) | Event::Pooled(_) => return Flow::Continue,
        };
        lock(&self.notes).push((self.index, note));
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

struct Device {
    engine: Engine,
    clock: SimClock,
    host_per_step: Duration,
    notes: Notes,
    /// Requests that wait there, oldest first.
    waiting: VecDeque<usize>,
    num_completed: u32,
    output_tokens: u64,
    busy: Duration,
    /// While it does nothing: how much time had been waited in when that began.
    idle_since: Option<Duration>,
    idle: Duration,
}

impl Device {
    /// Of those that wait, the newest that the step that runs has not begun.
    fn last_waiting(&self) -> Option<usize> {
        let notes = lock(&self.notes);
        let has_begun = |index: usize| notes.iter().any(|(noted, _)| *noted == index);
        self.waiting.iter().rev().copied().find(|index| !has_begun(*index))
    }
}

/// A request on its way.
struct Live {
    request: Request,
    chain: BlockChain,
    sequence: SequenceId,
    placement: Placement,
    last_token: Option<Duration>,
    num_tokens: u32,
}

struct Fleet<'a> {
    requests: &'a [PlannedRequest],
    devices: Vec<Device>,
    router: Router,
    rules: Rules,
    live: Vec<Option<Live>>,
    /// When a device's step ends, or when it is to begin one.
    due: BinaryHeap<Reverse<(Duration, usize)>>,
    now: Duration,
    num_waiting: u32,
    /// How long anybody has waited on any device so far.
    waited: Duration,
    heard: Heard,
    num_moved: u64,
}

/// Plays `requests`, which are in order of arrival, on `devices`, whose blocks are of one size.
pub fn simulate_fleet(
    devices: &[FleetDevice],
    requests: &[PlannedRequest],
    rule: Rule,
    seed: u64,
) -> Result<FleetReport, SimulateError> {
    let block_size = devices[0].config.block_size;
    assert!(devices.iter().all(|device| device.config.block_size == block_size), "blocks of one size");
    let max_model_len = devices.iter().map(|device| device.config.max_model_len).min().expect("a device");
    let hasher = BlockHasher::new(HASH_KEY, block_size);
    let mut fleet = Fleet::new(devices, requests, rule)?;
    let (mut next, mut num_too_long) = (0, 0);
    loop {
        let arrival = requests.get(next).map(|request| request.arrival);
        let due = fleet.due.peek().map(|Reverse((time, _))| *time);
        match (arrival, due) {
            (Some(arrival), due) if due.is_none_or(|due| arrival <= due) => {
                let planned = &requests[next];
                fleet.turn_to(arrival);
                match planned.prompt_tokens.saturating_add(planned.output_tokens) > max_model_len {
                    true => num_too_long += 1,
                    false => fleet.arrive(next, planned.request(VOCAB_SIZE, seed), &hasher),
                }
                next += 1;
            }
            (_, Some(due)) => {
                fleet.turn_to(due);
                fleet.advance()?;
            }
            _ => break,
        }
    }
    Ok(fleet.report(devices, rule, num_too_long))
}

impl<'a> Fleet<'a> {
    fn new(specs: &[FleetDevice], requests: &'a [PlannedRequest], rule: Rule) -> Result<Fleet<'a>, SimulateError> {
        let traits = |device: &FleetDevice| Traits {
            cost: device.profile.cost,
            max_num_seqs: device.config.max_num_seqs,
            max_num_batched_tokens: device.config.max_num_batched_tokens,
        };
        let traits: Vec<Traits> = specs.iter().map(traits).collect();
        let device = |spec: &FleetDevice| {
            let (mut engine, clock) = simulate::engine(&spec.profile, spec.config)?;
            engine.cache_mut().keep_block_events();
            Ok(Device {
                engine,
                clock,
                host_per_step: Duration::from_nanos(spec.profile.host_ns_per_step),
                notes: Arc::default(),
                waiting: VecDeque::new(),
                num_completed: 0,
                output_tokens: 0,
                busy: Duration::ZERO,
                idle_since: Some(Duration::ZERO),
                idle: Duration::ZERO,
            })
        };
        Ok(Fleet {
            requests,
            devices: specs.iter().map(device).collect::<Result<_, SimulateError>>()?,
            router: Router::new(specs[0].config.block_size, &traits),
            rules: Rules::new(rule, specs.len()),
            live: requests.iter().map(|_| None).collect(),
            due: BinaryHeap::new(),
            now: Duration::ZERO,
            num_waiting: 0,
            waited: Duration::ZERO,
            heard: Heard::default(),
            num_moved: 0,
        })
    }

    fn turn_to(&mut self, time: Duration) {
        let passed = time.saturating_sub(self.now);
        if self.num_waiting > 0 {
            self.waited += passed;
        }
        self.now += passed;
    }

    fn arrive(&mut self, index: usize, request: Request, hasher: &BlockHasher) {
        let mut chain = hasher.chain(request.cache_salt);
        hasher.extend(&mut chain, &request.prompt);
        let ask = self.rules.ask(&self.requests[index], &chain);
        let placement = match self.rules.choose(&self.router, &chain) {
            Some(replica) => self.router.place_on(replica, ask),
            None => self.router.place(ask).expect("every replica is open"),
        };
        let live = Live { request, chain, sequence: SequenceId(0), placement, last_token: None, num_tokens: 0 };
        self.live[index] = Some(live);
        self.hand_in(index);
    }

    /// Gives a request to the engine of its placement.
    fn hand_in(&mut self, index: usize) {
        let live = self.live[index].as_mut().expect("it has been placed");
        let id = usize::from(live.placement.replica.0);
        let device = &mut self.devices[id];
        device.clock.advance_to(self.now);
        let sink = Box::new(Client { index, notes: device.notes.clone() });
        live.sequence = device.engine.add(live.request.clone(), sink);
        device.waiting.push_back(index);
        self.num_waiting += 1;
        if let Some(since) = device.idle_since.take() {
            device.idle += self.waited - since;
            self.due.push(Reverse((self.now, id)));
        }
    }

    /// The device that is due has ended a step, if it had begun one, and begins its next.
    fn advance(&mut self) -> Result<(), PlayError> {
        let Reverse((_, id)) = self.due.pop().expect("a device is due");
        self.hear(id)?;
        if self.rules.moves() && self.num_waiting > 0 && self.devices[id].engine.is_idle() {
            self.relieve(id);
        }
        let device = &mut self.devices[id];
        if device.engine.is_idle() {
            device.idle_since = Some(self.waited);
            return Ok(());
        }
        let begun = device.clock.now();
        device.clock.advance(device.host_per_step);
        device.engine.step()?;
        device.busy += device.clock.now() - begun;
        self.due.push(Reverse((device.clock.now(), id)));
        Ok(())
    }

    /// Takes in what a step of device `id` brought.
    fn hear(&mut self, id: usize) -> Result<(), PlayError> {
        let replica = ReplicaId(id as u16);
        let device = &mut self.devices[id];
        device.engine.cache_mut().block_events().for_each(|event| {
            self.router.tell(replica, event);
            self.rules.tell(replica, event);
        });
        let notes = std::mem::take(&mut *lock(&device.notes));
        for (index, note) in notes {
            let device = &mut self.devices[id];
            match note {
                Note::Started => {
                    let at = device.waiting.iter().position(|waiting| *waiting == index).expect("it waited");
                    device.waiting.remove(at);
                    self.num_waiting -= 1;
                }
                Note::Token => self.hear_token(id, index),
                Note::Finished(usage) => {
                    let live = self.live[index].take().expect("it runs");
                    device.num_completed += 1;
                    self.heard.finished(self.now, self.requests[index].arrival, usage, live.num_tokens);
                    self.router.end(live.placement, live.num_tokens);
                }
                Note::Failed(reason) => return Err(PlayError::Failed { row: self.requests[index].row, reason }),
            }
        }
        Ok(())
    }

    fn hear_token(&mut self, id: usize, index: usize) {
        let live = self.live[index].as_mut().expect("it runs");
        self.heard.token(self.now, self.requests[index].arrival, &mut live.last_token);
        live.num_tokens += 1;
        self.router.token(&mut live.placement);
        self.devices[id].output_tokens += 1;
    }

    /// Device `id`, which has nothing to do, takes what waits on the one that is most behind.
    fn relieve(&mut self, id: usize) {
        let replica = ReplicaId(id as u16);
        while self.router.num_placed(replica) < self.devices[id].engine.config().max_num_seqs {
            let devices = &self.devices;
            let waits = |other: ReplicaId| other != replica && !devices[usize::from(other.0)].waiting.is_empty();
            let Some(behind) = self.router.most_behind(waits) else { return };
            let from = usize::from(behind.0);
            let Some(index) = self.devices[from].last_waiting() else { return };
            let live = self.live[index].as_mut().expect("it waits");
            let ask = self.rules.ask(&self.requests[index], &live.chain);
            if !self.router.is_worth_a_move(&live.placement, ask, replica) {
                return;
            }
            let there = self.router.place_on(replica, ask);
            self.router.withdraw(std::mem::replace(&mut live.placement, there));
            self.devices[from].engine.abort(live.sequence);
            self.devices[from].waiting.retain(|waiting| *waiting != index);
            self.num_waiting -= 1;
            self.num_moved += 1;
            self.hand_in(index);
        }
    }

    fn report(mut self, specs: &[FleetDevice], rule: Rule, num_too_long: u32) -> FleetReport {
        let heard = &self.heard;
        let duration_s = heard.last_token.as_secs_f64();
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let waited = self.waited;
        let device = |(device, spec): (&mut Device, &FleetDevice)| {
            let idle = device.idle + device.idle_since.map_or(Duration::ZERO, |since| waited - since);
            DeviceReport {
                name: spec.name.clone(),
                num_completed: device.num_completed,
                output_tokens: device.output_tokens,
                busy_share: share(device.busy.as_secs_f64(), duration_s),
                idle_share: share(idle.as_secs_f64(), duration_s),
            }
        };
        let devices: Vec<DeviceReport> = self.devices.iter_mut().zip(specs).map(device).collect();
        FleetReport {
            rule: rule.name(),
            num_requests: self.requests.len() as u32,
            num_completed: heard.num_completed,
            num_too_long,
            duration_s,
            output_tokens: heard.output_tokens,
            output_tokens_per_s: share(heard.output_tokens as f64, duration_s),
            ttft_ms: (&heard.ttft).into(),
            itl_ms: (&heard.itl).into(),
            total_ms: (&heard.total).into(),
            prefix_hit_share: share(heard.cached_tokens as f64, heard.prompt_tokens as f64),
            num_moved: self.num_moved,
            most_idle_share: devices.iter().map(|device| device.idle_share).fold(0.0, f64::max),
            devices,
        }
    }
}

#[cfg(test)]
mod tests {
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
        FleetDevice { name: format!("{speed} times"), profile, config }
    }

    fn fleet(speeds: &[f64]) -> Vec<FleetDevice> {
        speeds.iter().map(|&speed| device(speed)).collect()
    }

    const SHORT: Lengths = Lengths::LogNormal { prompt: 60.0, output: 40.0, sigma: 0.7 };

    fn run(speeds: &[f64], requests: &[PlannedRequest], rule: Rule) -> FleetReport {
        let report = simulate_fleet(&fleet(speeds), requests, rule, 1).expect("the simulator is never lost");
        assert_eq!(report.num_completed + report.num_too_long, requests.len() as u32, "{report:#?}");
        let output: u64 = report.devices.iter().map(|device| device.output_tokens).sum();
        assert_eq!(output, report.output_tokens);
        report
    }

    #[test]
    fn a_fleet_of_one_is_a_device() {
        let requests = generate(Arrivals::Poisson { per_s: 6.0 }, SHORT, 80, 3);
        let alone = device(1.0);
        let reports = Rule::ALL.map(|rule| run(&[1.0], &requests, rule));
        let wanted = simulate::simulate(&alone.profile, alone.config, &requests, Default::default()).expect("it runs");
        for report in reports {
            assert_eq!(
                (report.ttft_ms, report.itl_ms, report.total_ms),
                (wanted.ttft_ms, wanted.itl_ms, wanted.total_ms)
            );
            assert_eq!((report.duration_s, report.num_moved), (wanted.duration_s, 0));
        }
    }

    #[test]
    fn unlike_devices_end_together() {
        let requests = generate(Arrivals::AtOnce, SHORT, 4000, 5);
        let report = run(&[1.0, 1.0, 2.0, 4.0], &requests, Rule::EarliestFinish);
        let alone: f64 = [1.0, 1.0, 2.0, 4.0]
            .map(|speed| run(&[speed], &requests, Rule::EarliestFinish).output_tokens_per_s)
            .iter()
            .sum();
        assert!(report.output_tokens_per_s > 0.95 * alone, "{} of {alone}", report.output_tokens_per_s);
        assert!(report.most_idle_share < 0.02, "{report:#?}");
        let plain = run(&[1.0, 1.0, 2.0, 4.0], &requests, Rule::RoundRobin);
        assert!(plain.output_tokens_per_s < 0.6 * alone, "{} of {alone}", plain.output_tokens_per_s);
    }

    #[test]
    fn prefixes_are_found_where_they_are() {
        let lengths = Lengths::Shared { groups: 9, prefix: 256, prompt: 30, output: 20 };
        let requests = generate(Arrivals::Poisson { per_s: 20.0 }, lengths, 400, 7);
        let [ours, turns] = [Rule::EarliestFinish, Rule::RoundRobin].map(|rule| run(&[1.0; 4], &requests, rule));
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
}
