//! What a workload would do on a fleet: true engines on simulated devices, each with a clock of its own, behind the
//! true router, or behind a plainer rule to hold it against.
//!
//! Whatever is due first happens first: an arrival, or the end of a device's step. What a step brought is known to the
//! router when the step ends and not before. Invariant: the same fleet, workload and rule give the same report, on
//! every machine; a request that did not run is counted. Devices may be lost and come back ([`life`]).

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::heard::Heard;
use crate::play::{PlayError, lock};
use crate::simulate::{HASH_KEY, SimulateError, VOCAB_SIZE};
use crate::workload::PlannedRequest;
use fullbore_engine::backend::sim::SimClock;
use fullbore_engine::batch::SequenceId;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::DeviceProfile;
use fullbore_engine::engine::Engine;
use fullbore_engine::fleet::ReplicaId;
use fullbore_engine::fleet::router::{Placement, Router, Traits};
use fullbore_engine::memory::{BlockChain, BlockHasher};
use fullbore_engine::request::{Event, FinishReason, Flow, Request, Sink, TokenId, Usage};

pub mod life;
mod moves;
mod relief;
pub mod report;
pub mod rule;
#[cfg(test)]
mod tests;

use life::{Change, Life};
use moves::Moving;
use report::{DeviceReport, FleetReport};
use rule::{Rule, Rules};

/// A device of a fleet; `config` has been checked.
#[derive(Clone, Debug)]
pub struct FleetDevice {
    pub name: String,
    pub profile: DeviceProfile,
    pub config: EngineConfig,
    pub life: Life,
    /// Whether KV goes to other devices and comes from there, at what the profile says of copies.
    pub moves_kv: bool,
}

/// What a client of one device was told, with its row.
enum Note {
    Started,
    Token(TokenId),
    Finished(Usage),
    Failed(String),
}

/// How often a device that has nothing to do looks for what waits on others: as on a server.
const IDLE_TICK: Duration = Duration::from_millis(500);

type Notes = Arc<Mutex<Vec<(usize, Note)>>>;

struct Client {
    index: usize,
    notes: Notes,
}

impl Sink for Client {
    fn event(&mut self, event: Event) -> Flow {
        let note = match event {
            Event::Started { .. } => Note::Started,
            Event::Token { id, .. } => Note::Token(id),
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
    is_there: bool,
    /// How often it was lost: what was due before is not.
    life_number: u32,
    /// All requests that it has.
    there: BTreeSet<usize>,
    /// Requests that wait there, oldest first.
    waiting: VecDeque<usize>,
    num_completed: u32,
    output_tokens: u64,
    busy: Duration,
    /// While it does nothing: how much time had been waited in when that began.
    idle_since: Option<Duration>,
    idle: Duration,
    /// Whether it is to look again for what waits elsewhere.
    looks_again: bool,
}

impl Device {
    /// The step that it begins has begun these: they wait no more, though what becomes of them is not known yet.
    fn begin(&mut self) -> u32 {
        let mut notes = lock(&self.notes);
        let num_waiting = self.waiting.len();
        notes.retain(|(index, note)| {
            let begins = matches!(note, Note::Started);
            if begins {
                let at = self.waiting.iter().position(|waiting| waiting == index).expect("it waited");
                self.waiting.remove(at);
            }
            !begins
        });
        (num_waiting - self.waiting.len()) as u32
    }
}

/// A request on its way.
struct Live {
    request: Arc<Request>,
    chain: BlockChain,
    sequence: SequenceId,
    /// While it is with a device.
    placement: Option<Placement>,
    last_token: Option<Duration>,
    generated: Vec<TokenId>,
    /// Devices that were at it when they were lost.
    num_losses: u32,
    /// Whether a device that had nothing to do has taken it while it ran.
    was_restarted: bool,
}

struct Fleet<'a> {
    requests: &'a [PlannedRequest],
    devices: Vec<Device>,
    router: Router,
    rules: Rules,
    /// By request; boxed, for most have not come or are gone.
    live: Vec<Option<Box<Live>>>,
    /// When a device's step ends, or when it is to begin one, with the number of its life.
    due: BinaryHeap<Reverse<(Duration, usize, u32)>>,
    /// What happens to devices.
    changes: BinaryHeap<Reverse<(Duration, usize, Change)>>,
    /// Requests that no device takes, oldest first.
    parked: Vec<usize>,
    now: Duration,
    num_waiting: u32,
    /// How long anybody has waited on any device so far.
    waited: Duration,
    tokens_while_waiting: u64,
    heard: Heard,
    num_moved: u64,
    num_losses: u32,
    num_replayed: u64,
    num_failed: u32,
    /// KV that is on its way between devices.
    moving: Vec<Moving>,
    /// To devices that were lost since.
    num_fetched_blocks: u64,
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
        let due = fleet.due.peek().map(|Reverse((time, ..))| *time);
        // What happens to devices when all is done matters to nobody.
        let is_over = arrival.is_none() && due.is_none() && fleet.parked.is_empty();
        let change = fleet.changes.peek().filter(|_| !is_over).map(|Reverse((time, ..))| *time);
        let Some(first) = [arrival, due, change].into_iter().flatten().min() else { break };
        fleet.turn_to(first);
        if arrival == Some(first) {
            let planned = &requests[next];
            match planned.prompt_tokens.saturating_add(planned.output_tokens) > max_model_len {
                true => num_too_long += 1,
                false => fleet.arrive(next, planned.request(VOCAB_SIZE, seed), &hasher),
            }
            next += 1;
        } else if due == Some(first) {
            fleet.advance()?;
        } else {
            let Reverse((_, id, change)) = fleet.changes.pop().expect("it is the first");
            fleet.change(id, change, devices)?;
        }
    }
    fleet.num_failed += fleet.parked.len() as u32;
    Ok(fleet.report(devices, rule, num_too_long))
}

impl<'a> Fleet<'a> {
    fn new(specs: &[FleetDevice], requests: &'a [PlannedRequest], rule: Rule) -> Result<Fleet<'a>, SimulateError> {
        let traits = |device: &FleetDevice| Traits {
            cost: device.profile.cost,
            max_num_seqs: device.config.max_num_seqs,
            max_num_batched_tokens: device.config.max_num_batched_tokens,
            kv_tokens: u64::from(device.config.num_blocks) * u64::from(device.config.block_size),
        };
        let traits: Vec<Traits> = specs.iter().map(traits).collect();
        let device = |spec: &FleetDevice| {
            let (engine, clock) = spec.engine()?;
            Ok(Device {
                engine,
                clock,
                host_per_step: Duration::from_nanos(spec.profile.host_ns_per_step),
                notes: Arc::default(),
                is_there: spec.life.joins.is_zero(),
                life_number: 0,
                there: BTreeSet::new(),
                waiting: VecDeque::new(),
                num_completed: 0,
                output_tokens: 0,
                busy: Duration::ZERO,
                idle_since: spec.life.joins.is_zero().then_some(Duration::ZERO),
                idle: Duration::ZERO,
                looks_again: false,
            })
        };
        let devices = specs.iter().map(device).collect::<Result<Vec<Device>, SimulateError>>()?;
        let mut router = Router::new(specs[0].config.block_size, &traits);
        if rule == Rule::Omniscient {
            router.expect_max_tokens();
        }
        if matches!(rule, Rule::EarliestFinish | Rule::Omniscient) {
            router.mind_own_end_alone();
        }
        router.set_moves(devices.iter().map(|device| device.engine.move_prices()).collect());
        let late = (0..).map(ReplicaId).zip(specs).filter(|(_, spec)| !spec.life.joins.is_zero());
        late.for_each(|(replica, _)| router.set_open(replica, false));
        let changes = |(id, spec): (usize, &FleetDevice)| {
            spec.life.changes().into_iter().map(move |(at, change)| Reverse((at, id, change)))
        };
        Ok(Fleet {
            requests,
            devices,
            router,
            rules: Rules::new(rule, specs.len()),
            live: requests.iter().map(|_| None).collect(),
            due: BinaryHeap::new(),
            changes: specs.iter().enumerate().flat_map(changes).collect(),
            parked: Vec::new(),
            now: Duration::ZERO,
            num_waiting: 0,
            waited: Duration::ZERO,
            tokens_while_waiting: 0,
            heard: Heard::default(),
            num_moved: 0,
            num_losses: 0,
            num_replayed: 0,
            num_failed: 0,
            moving: Vec::new(),
            num_fetched_blocks: 0,
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
        let (placement, last_token, generated, num_losses) = (None, None, Vec::new(), 0);
        let (request, sequence) = (Arc::new(request), SequenceId(0));
        let was_restarted = false;
        let live = Live { request, chain, sequence, placement, last_token, generated, num_losses, was_restarted };
        self.live[index] = Some(Box::new(live));
        self.place(index);
    }

    /// Hands a request that is with no device to one, or parks it.
    fn place(&mut self, index: usize) {
        let live = self.live[index].as_mut().expect("it goes on");
        let ask = self.rules.ask(&self.requests[index], &live.chain, live.generated.len() as u32);
        live.placement = match self.rules.choose(&self.router, &live.chain) {
            Some(replica) => Some(self.router.place_on(replica, ask)),
            None => self.router.place(ask),
        };
        match live.placement {
            Some(_) => self.hand_in(index),
            None => self.parked.push(index),
        }
    }

    /// Gives a request to the engine of its placement.
    fn hand_in(&mut self, index: usize) {
        let request = self.next_attempt(index);
        self.fetch(index);
        let live = self.live[index].as_mut().expect("it goes on");
        let id = usize::from(live.placement.as_ref().expect("it has been placed").replica.0);
        let device = &mut self.devices[id];
        device.clock.advance_to(self.now);
        let sink = Box::new(Client { index, notes: device.notes.clone() });
        live.sequence = device.engine.add(request, sink);
        device.waiting.push_back(index);
        device.there.insert(index);
        self.num_waiting += 1;
        self.wake(id);
    }

    /// There may be something to do for device `id` if it does nothing.
    fn wake(&mut self, id: usize) {
        let device = &mut self.devices[id];
        if let Some(since) = device.idle_since.take() {
            device.clock.advance_to(self.now);
            device.idle += self.waited - since;
            self.is_due(id);
        }
    }

    /// Device `id` is to look now what there is to do.
    fn is_due(&mut self, id: usize) {
        self.due.push(Reverse((self.now, id, self.devices[id].life_number)));
    }

    /// The device that is due has ended a step, if it had begun one, and begins its next.
    fn advance(&mut self) -> Result<(), PlayError> {
        let Reverse((_, id, life_number)) = self.due.pop().expect("a device is due");
        if life_number < self.devices[id].life_number {
            return Ok(());
        }
        self.hear(id)?;
        self.pass_on(id);
        self.relieve(id);
        let device = &mut self.devices[id];
        if device.engine.is_idle() {
            device.idle_since = Some(self.waited);
            if self.rules.moves() && !std::mem::replace(&mut device.looks_again, true) {
                self.changes.push(Reverse((self.now + IDLE_TICK, id, Change::Looks)));
            }
            return Ok(());
        }
        let begun = device.clock.now();
        device.clock.advance(device.host_per_step);
        let has_stepped = device.engine.step()?;
        self.num_waiting -= device.begin();
        let device = &mut self.devices[id];
        if !has_stepped {
            // It waits for what comes from another device.
            device.idle_since = Some(self.waited);
            self.pass_on(id);
            return Ok(());
        }
        device.busy += device.clock.now() - begun;
        self.due.push(Reverse((device.clock.now(), id, life_number)));
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
                Note::Started => unreachable!("who begins is heard when the step begins"),
                Note::Token(token) => self.hear_token(id, index, token),
                Note::Finished(usage) => {
                    let live = self.live[index].take().expect("it runs");
                    device.num_completed += 1;
                    device.there.remove(&index);
                    let num_tokens = live.generated.len() as u32;
                    self.heard.finished(self.now, self.requests[index].arrival, usage, num_tokens);
                    self.router.end(live.placement.expect("it runs"), num_tokens);
                }
                Note::Failed(reason) => return Err(PlayError::Failed { row: self.requests[index].row, reason }),
            }
        }
        Ok(())
    }

    fn hear_token(&mut self, id: usize, index: usize, token: TokenId) {
        let live = self.live[index].as_mut().expect("it runs");
        self.heard.token(self.now, self.requests[index].arrival, &mut live.last_token);
        live.generated.push(token);
        self.router.token(live.placement.as_mut().expect("it runs"));
        self.devices[id].output_tokens += 1;
        self.tokens_while_waiting += u64::from(self.num_waiting > 0);
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
        let fetched = self.devices.iter().map(|device| device.engine.stats().num_fetched_blocks);
        let num_fetched_blocks = self.num_fetched_blocks + fetched.sum::<u64>();
        let devices: Vec<DeviceReport> = self.devices.iter_mut().zip(specs).map(device).collect();
        FleetReport {
            rule: rule.name(),
            num_requests: self.requests.len() as u32,
            num_completed: heard.num_completed,
            num_too_long,
            num_failed: self.num_failed,
            num_losses: self.num_losses,
            num_replayed: self.num_replayed,
            duration_s,
            output_tokens: heard.output_tokens,
            output_tokens_per_s: share(heard.output_tokens as f64, duration_s),
            output_tokens_per_s_while_waiting: share(self.tokens_while_waiting as f64, waited.as_secs_f64()),
            ttft_ms: (&heard.ttft).into(),
            itl_ms: (&heard.itl).into(),
            total_ms: (&heard.total).into(),
            prefix_hit_share: share(heard.cached_tokens as f64, heard.prompt_tokens as f64),
            num_moved: self.num_moved,
            num_fetched_blocks,
            most_idle_share: devices.iter().map(|device| device.idle_share).fold(0.0, f64::max),
            devices,
        }
    }
}
