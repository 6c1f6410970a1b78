//! Where a device's time goes: every nanosecond of its wall time is charged to one cause.
//!
//! A device is busy while a step runs and idle between steps. A busy nanosecond of a step with B rows counts as
//! computing for rate(B) / rate(B*): B* is the knee of the device's own cost curve and rate(B*) that of the same mix of
//! rows, grown to B*. A chunk of a prompt that has B* rows or more computes at the full rate, whoever decodes beside
//! it. The rest of the step is charged to what kept it from being larger, as the scheduler says. An idle nanosecond is
//! charged to what the host was at: to no requests where it had no work. While nothing is known of a device's prices a
//! busy nanosecond counts as computing.
//!
//! Invariant: the causes are a partition: their sum is the time from the start to the last event that was told,
//! exactly, and that of the window is its length. Plain data in, no clock, O(1) and no memory a step. Host time behind
//! a step that runs is hidden and charged to nobody. How exactly a step's end is known is the device's to say
//! (`Backend::wait`): one that tells nothing seems busy until it is asked.

use std::collections::VecDeque;

use crate::cost::{CostModel, StepShape};
use crate::scheduler::Held;

mod cause;
pub mod neighbours;
mod sums;
pub mod verdict;
mod window;

pub use cause::{Cause, NUM_CAUSES, Phase};
use window::Window;

/// Batches of at most so many sequences are asked for the knee: where the curve is flat to the end, it is near there.
const MAX_BATCH: u32 = 1024;
/// Turns of the host that can be told before the step in flight beside them has ended; later ones are not told apart.
const MAX_MARKS: usize = 32;

/// What is known of a step when it is planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepFacts {
    pub held: Held,
    /// Sequences that did not get in, and their tokens.
    pub num_waiting: u32,
    pub waiting_tokens: u64,
    pub num_running: u32,
    pub referenced_blocks: u32,
}

/// A step that has run; times in nanoseconds since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndedStep {
    pub shape: StepShape,
    pub facts: StepFacts,
    pub submitted_ns: u64,
    pub begun_ns: u64,
    pub ended_ns: u64,
    /// Whether another engine had a step on the same device meanwhile.
    pub has_company: bool,
    /// The rest of the step is still to come, and counts its tokens.
    pub is_part: bool,
}

/// Time by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    ns: [u64; NUM_CAUSES],
    /// Of the above, without a step on the device.
    pub idle_ns: u64,
    /// Rows of steps that ended.
    pub num_tokens: u64,
}

impl Tally {
    pub fn ns(&self, cause: Cause) -> u64 {
        self.ns[cause as usize]
    }

    pub fn seconds(&self, cause: Cause) -> f64 {
        self.ns(cause) as f64 / 1e9
    }

    /// All of the time.
    pub fn wall_ns(&self) -> u64 {
        self.ns.iter().sum()
    }

    /// Time in which the device waited for the host.
    pub fn host_ns(&self) -> u64 {
        Cause::HOST.into_iter().map(|cause| self.ns(cause)).sum()
    }

    /// Of all the time, 0 to 1; nothing where there was none.
    pub fn share(&self, ns: u64) -> f64 {
        ns as f64 / self.wall_ns().max(1) as f64
    }

    fn charge(&mut self, cause: Cause, ns: u64) {
        self.ns[cause as usize] += ns;
    }
}

/// Step facts that time was charged for, summed over microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FactSums {
    us: u64,
    num_waiting: u64,
    waiting_tokens: u64,
    num_running: u64,
    referenced_blocks: u64,
    num_rows: u64,
}

/// What is known of a device's time, by value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Since the start.
    pub total: Tally,
    /// The last minute.
    pub window: Tally,
    /// By cause, of the window.
    pub facts: [FactSums; NUM_CAUSES],
    /// B*, and what a step of so many decoding sequences takes; `None` while the device's prices are not known.
    pub knee: Option<Knee>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knee {
    pub batch: u32,
    pub step_ns: u64,
}

pub struct Limits {
    cost: CostModel,
    knee: u32,
    /// Positions that a row sees, lately: the knee depends on it.
    context: f64,
    /// All before it is charged.
    settled_ns: u64,
    num_in_flight: u32,
    /// Turns of the host since `settled_ns`, the first at or before it.
    marks: VecDeque<Mark>,
    total: Tally,
    total_facts: [FactSums; NUM_CAUSES],
    window: Window,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    phase: Phase,
    from_ns: u64,
}

impl Default for Limits {
    /// At time 0, without work.
    fn default() -> Limits {
        let mut marks = VecDeque::with_capacity(MAX_MARKS);
        marks.push_back(Mark { phase: Phase::NoWork, from_ns: 0 });
        Limits {
            cost: CostModel::UNKNOWN,
            knee: 1,
            context: 1.0,
            settled_ns: 0,
            num_in_flight: 0,
            marks,
            total: Tally::default(),
            total_facts: [FactSums::default(); NUM_CAUSES],
            window: Window::default(),
        }
    }
}

impl Limits {
    /// What steps take from now on. O([`MAX_BATCH`]).
    pub fn set_cost(&mut self, cost: CostModel) {
        self.cost = cost;
        self.knee = cost.knee(MAX_BATCH, self.context as u32);
    }

    /// The host is at `phase` from now on.
    pub fn turn_to(&mut self, phase: Phase, now_ns: u64) {
        if self.num_in_flight == 0 {
            self.settle_idle(now_ns);
        }
        let last = self.marks.back().expect("there is always one").phase;
        if last != phase && self.marks.len() < MAX_MARKS {
            self.marks.push_back(Mark { phase, from_ns: now_ns });
        }
    }

    /// The device has got a step.
    pub fn submitted(&mut self) {
        self.num_in_flight += 1;
    }

    /// The oldest step in flight has ended.
    pub fn ended(&mut self, step: &EndedStep) {
        self.num_in_flight = self.num_in_flight.checked_sub(1).expect("a step was submitted");
        // From its submission to its begin it is on its way.
        self.settle_idle(step.begun_ns.min(step.submitted_ns));
        self.settle_as(Cause::Upload, step.begun_ns);
        self.settle_busy(step);
        let attended = step.shape.attended_tokens as f64 / f64::from(step.shape.num_tokens.max(1));
        self.context += (attended - self.context) / CONTEXT_PACE;
    }

    /// The device is gone, and with it the steps that it had. What they had run of is not known.
    pub fn lost(&mut self, now_ns: u64) {
        if std::mem::take(&mut self.num_in_flight) == 0 {
            self.settle_idle(now_ns);
        }
        self.settle_as(Cause::DeviceLost, now_ns);
        self.turn_to(Phase::DeviceLost, now_ns);
    }

    pub fn snapshot(&self) -> Snapshot {
        let step_ns = self.cost.predict_ns(&StepShape::decode(self.knee, self.context as u32));
        let knee = Knee { batch: self.knee, step_ns };
        let (window, facts) = self.window.sums();
        Snapshot { total: self.total, window, facts, knee: self.cost.is_known().then_some(knee) }
    }

    /// As `snapshot`, with all the time since the start for its window.
    pub fn snapshot_since_start(&self) -> Snapshot {
        Snapshot { window: self.total, facts: self.total_facts, ..self.snapshot() }
    }

    /// Charges what is not charged up to `until_ns`, in which no step ran.
    fn settle_idle(&mut self, until_ns: u64) {
        while self.settled_ns < until_ns {
            let next = self.marks.get(1).map_or(until_ns, |next| next.from_ns.min(until_ns));
            self.settle_as(self.marks[0].phase.cause(), next);
        }
    }

    /// Charges idle time up to `until_ns` to one cause.
    fn settle_as(&mut self, cause: Cause, until_ns: u64) {
        for piece in window::pieces(self.settled_ns, until_ns) {
            let ns = piece.end - piece.start;
            self.charge(piece.start, cause, ns, None);
            self.count(piece.start, 0, ns);
        }
        self.settle(until_ns);
    }

    fn settle(&mut self, until_ns: u64) {
        self.settled_ns = self.settled_ns.max(until_ns);
        while self.marks.get(1).is_some_and(|next| next.from_ns <= self.settled_ns) {
            self.marks.pop_front();
        }
    }

    fn settle_busy(&mut self, step: &EndedStep) {
        let ended_ns = step.ended_ns.max(self.settled_ns);
        let busy_ns = ended_ns - self.settled_ns;
        let beyond_ns = match step.has_company && self.cost.is_known() {
            true => busy_ns.saturating_sub(self.cost.predict_ns(&step.shape)),
            false => 0,
        };
        let beyond = beyond_ns as f64 / busy_ns.max(1) as f64;
        let computing = self.computing_share(&step.shape);
        let held = Cause::from(step.facts.held);
        for piece in window::pieces(self.settled_ns, ended_ns) {
            let ns = piece.end - piece.start;
            let of_neighbour = ((ns as f64 * beyond) as u64).min(ns);
            let own = ns - of_neighbour;
            let of_computing = ((own as f64 * computing) as u64).min(own);
            self.charge(piece.start, Cause::Neighbour, of_neighbour, Some(step));
            self.charge(piece.start, Cause::Computing, of_computing, None);
            self.charge(piece.start, held, own - of_computing, Some(step));
        }
        self.settle(ended_ns);
        self.count(ended_ns, if step.is_part { 0 } else { u64::from(step.shape.num_tokens) }, 0);
    }

    fn charge(&mut self, at_ns: u64, cause: Cause, ns: u64, step: Option<&EndedStep>) {
        self.total.charge(cause, ns);
        if let Some(step) = step {
            self.total_facts[cause as usize].add(step, ns / 1000);
        }
        self.window.charge(at_ns, cause, ns, step);
    }

    fn count(&mut self, at_ns: u64, num_tokens: u64, idle_ns: u64) {
        self.total.num_tokens += num_tokens;
        self.total.idle_ns += idle_ns;
        self.window.count(at_ns, num_tokens, idle_ns);
    }

    /// rate(B) / rate(B*), at most 1.
    fn computing_share(&self, shape: &StepShape) -> f64 {
        if !self.cost.is_known() || shape.num_tokens >= self.knee {
            return 1.0;
        }
        let growth = f64::from(self.knee) / f64::from(shape.num_tokens.max(1));
        let grown = StepShape {
            num_tokens: self.knee,
            num_logit_rows: (f64::from(shape.num_logit_rows) * growth).round() as u32,
            num_sequences: (f64::from(shape.num_sequences) * growth).round() as u32,
            attended_tokens: (shape.attended_tokens as f64 * growth) as u64,
            loaded_tokens: (shape.loaded_tokens as f64 * growth) as u64,
        };
        let ns_per_row = self.cost.predict_ns(shape) as f64 / f64::from(shape.num_tokens.max(1));
        let best_ns_per_row = self.cost.predict_ns(&grown) as f64 / f64::from(self.knee);
        if ns_per_row > 0.0 { (best_ns_per_row / ns_per_row).min(1.0) } else { 1.0 }
    }
}

/// Steps over which the context is averaged.
const CONTEXT_PACE: f64 = 64.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::Prices;

    const MS: u64 = 1_000_000;

    /// 10 ms and 0.1 ms a row: the knee is where a step is 90 % rows' time of what a large one's is.
    fn known() -> Limits {
        let mut limits = Limits::default();
        limits.set_cost(CostModel::line(10e6, 1e5, Prices::default()));
        limits
    }

    /// Begun as it is submitted.
    fn step(num_rows: u32, held: Held, begun_ns: u64, ended_ns: u64) -> EndedStep {
        let facts = StepFacts { held, num_waiting: 3, ..StepFacts::default() };
        EndedStep {
            shape: StepShape::decode(num_rows, 1),
            facts,
            submitted_ns: begun_ns,
            begun_ns,
            ended_ns,
            has_company: false,
            is_part: false,
        }
    }

    fn check(limits: &Limits, wall_ns: u64) -> Snapshot {
        let snapshot = limits.snapshot();
        assert_eq!(snapshot.total.wall_ns(), wall_ns, "{snapshot:?}");
        assert!(snapshot.total.idle_ns <= wall_ns && snapshot.window.idle_ns <= snapshot.window.wall_ns());
        assert!(snapshot.window.wall_ns() <= wall_ns.min(60_000 * MS));
        snapshot
    }

    #[test]
    fn a_step_computes_as_far_as_its_rate_is_that_of_the_knee() {
        let mut limits = known();
        let knee = limits.snapshot().knee.expect("known");
        // rate(B) is B / (9.9 + 0.1 B) a ms, 9.1 at 1024 and so 90 % of that at about 450.
        assert!((430..470).contains(&knee.batch), "{knee:?}");
        limits.submitted();
        limits.ended(&step(50, Held::KvMemory, 0, 20 * MS));
        let snapshot = check(&limits, 20 * MS);
        let rate = |rows: f64| rows / (9.9 + 0.1 * rows);
        let computing = rate(50.0) / rate(f64::from(knee.batch));
        assert!((snapshot.total.seconds(Cause::Computing) - 0.020 * computing).abs() < 1e-6, "{snapshot:?}");
        assert!((snapshot.total.seconds(Cause::KvMemory) - 0.020 * (1.0 - computing)).abs() < 1e-6);
        // At the knee and beyond, and for a whole chunk of a prompt, all of it.
        let chunk = StepShape::decode(3, 100).with_slice(0, knee.batch, 0);
        for (shape, at) in [(StepShape::decode(knee.batch, 1), 20), (StepShape::decode(900, 1), 40), (chunk, 60)] {
            limits.submitted();
            limits.ended(&EndedStep { shape, ..step(1, Held::Slots, at * MS, (at + 20) * MS) });
        }
        assert_eq!(check(&limits, 80 * MS).total.ns(Cause::Slots), 0);
    }

    #[test]
    fn an_unknown_device_computes_while_it_is_busy() {
        let mut limits = Limits::default();
        limits.turn_to(Phase::Schedule, 5 * MS);
        limits.submitted();
        limits.ended(&step(1, Held::Slots, 7 * MS, 9 * MS));
        let snapshot = check(&limits, 9 * MS);
        assert_eq!(snapshot.knee, None);
        let of = |cause| snapshot.total.ns(cause);
        assert_eq!((of(Cause::NoRequests), of(Cause::Schedule), of(Cause::Computing)), (5 * MS, 2 * MS, 2 * MS));
        assert_eq!(snapshot.total.idle_ns, 7 * MS);
    }

    /// Of what the host does, only that is charged during which no step ran, also where that is seen afterwards.
    #[test]
    fn host_time_behind_a_step_is_hidden() {
        let mut limits = known();
        limits.turn_to(Phase::Schedule, 0);
        limits.turn_to(Phase::Record, MS);
        limits.turn_to(Phase::Upload, 3 * MS);
        limits.submitted();
        // The next is planned and handed over while the first runs, from 6 to 26; but the host takes until 40.
        limits.turn_to(Phase::Schedule, 6 * MS);
        limits.turn_to(Phase::Record, 28 * MS);
        limits.turn_to(Phase::Upload, 33 * MS);
        limits.submitted();
        limits.turn_to(Phase::ReadBack, 40 * MS);
        limits.ended(&step(100, Held::NoRequests, 6 * MS, 26 * MS));
        let of = |snapshot: &Snapshot| Cause::HOST.map(|cause| snapshot.total.ns(cause) / MS);
        assert_eq!(of(&check(&limits, 26 * MS)), [1, 2, 3, 0]);
        // It runs until 60; the host sees that at 62 and tells clients until 65.
        limits.ended(&EndedStep { begun_ns: 42 * MS, ..step(100, Held::NoRequests, 40 * MS, 60 * MS) });
        assert_eq!(of(&check(&limits, 60 * MS)), [1 + 2, 2 + 5, 3 + 7 + 2, 0]);
        limits.turn_to(Phase::NoWork, 65 * MS);
        limits.turn_to(Phase::Schedule, 70 * MS);
        let snapshot = check(&limits, 70 * MS);
        assert_eq!(of(&snapshot), [3, 7, 12, 5]);
        assert_eq!(snapshot.total.host_ns(), 27 * MS);
        assert_eq!(snapshot.total.idle_ns, 32 * MS);
    }

    #[test]
    fn what_a_step_takes_beyond_its_price_is_the_neighbours_if_there_is_one() {
        let price = CostModel::line(10e6, 1e5, Prices::default()).predict_ns(&StepShape::decode(1000, 1));
        for has_company in [false, true] {
            let mut limits = known();
            limits.submitted();
            let step = EndedStep { has_company, ..step(1000, Held::NoRequests, 0, 3 * price) };
            limits.ended(&step);
            let snapshot = check(&limits, 3 * price);
            let expected = if has_company { 2 * price } else { 0 };
            assert!(snapshot.total.ns(Cause::Neighbour).abs_diff(expected) < 1000, "{snapshot:?}");
        }
    }

    #[test]
    fn the_window_forgets_what_is_older_than_a_minute() {
        let mut limits = known();
        limits.turn_to(Phase::Schedule, 500 * MS);
        limits.submitted();
        limits.ended(&step(1, Held::Slots, 1500 * MS, 4500 * MS));
        let snapshot = check(&limits, 4500 * MS);
        assert_eq!(snapshot.window, snapshot.total);
        limits.turn_to(Phase::NoWork, 4500 * MS);
        limits.turn_to(Phase::NoWork, 61_200 * MS);
        let snapshot = check(&limits, 61_200 * MS);
        // Seconds 2 to 61 are kept: of the step 2.5, of the host nothing.
        assert_eq!(snapshot.window.wall_ns(), 59_200 * MS);
        assert_eq!(snapshot.window.wall_ns() - snapshot.window.idle_ns, 2500 * MS);
        assert_eq!((snapshot.window.ns(Cause::Schedule), snapshot.total.ns(Cause::Schedule)), (0, 1000 * MS));
        // A long rest in one piece, and in many.
        limits.turn_to(Phase::NoWork, 10_000_300 * MS);
        let snapshot = check(&limits, 10_000_300 * MS);
        assert_eq!(snapshot.window.wall_ns(), 59_300 * MS);
        assert_eq!(snapshot.window.ns(Cause::NoRequests), 59_300 * MS);
        assert_eq!(snapshot.facts, [FactSums::default(); NUM_CAUSES]);
    }

    /// Whatever is told in whatever order, nothing is lost and nothing is charged twice.
    #[test]
    fn causes_are_a_partition() {
        let mut state = 1u64;
        let mut random = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        let mut limits = known();
        let (mut now, mut free_at, mut in_flight) = (0, 0, VecDeque::new());
        let phases = [Phase::NoWork, Phase::Schedule, Phase::Record, Phase::Upload, Phase::ReadBack];
        let all_held = [Held::NoRequests, Held::Slots, Held::KvMemory, Held::Latency, Held::Budget, Held::TenantCap];
        let never_held = [Cause::SharedPrefix, Cause::GrammarMemory];
        for _ in 0..20_000 {
            now += random(60) * MS + random(1000);
            limits.turn_to(phases[random(5) as usize], now);
            if random(1000) == 0 {
                in_flight.clear();
                limits.lost(now);
                free_at = now;
                check(&limits, limits.settled_ns);
            } else if in_flight.len() < 2 && random(2) == 0 {
                limits.submitted();
                let ended: u64 = free_at.max(now) + random(90) * MS;
                free_at = ended;
                in_flight.push_back((now, ended));
            } else if let Some((begun_ns, ended_ns)) = in_flight.pop_front() {
                now = now.max(ended_ns) + random(3);
                let held = all_held[random(6) as usize];
                let has_company = random(3) == 0;
                let step = step(1 + random(700) as u32, held, begun_ns, ended_ns);
                limits.ended(&EndedStep { has_company, ..step });
                check(&limits, ended_ns.max(limits.settled_ns));
            }
        }
        while let Some((begun_ns, ended_ns)) = in_flight.pop_front() {
            limits.ended(&step(1, Held::Slots, begun_ns, ended_ns));
        }
        let end = now.max(free_at);
        limits.turn_to(Phase::NoWork, end);
        let snapshot = check(&limits, end);
        assert!(Cause::ALL.iter().all(|&cause| snapshot.total.ns(cause) > 0 || never_held.contains(&cause)));
        // The newest second is kept as far as it has gone, and 59 whole ones.
        assert_eq!(snapshot.window.wall_ns(), 59_000 * MS + end % (1000 * MS));
    }
}
