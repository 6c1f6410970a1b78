//! When a request that comes now would get its first token.
//!
//! An engine says of itself what it does now ([`Load`]), in plain numbers; the rest is arithmetic. A request waits for
//! one of two: for a slot and memory, which sequences that run free one after another, or for the prompts before it,
//! which are computed at the pace that the device has beside what it decodes. Invariant: more requests ahead, of one
//! size, are never predicted to be sooner. Nobody is refused for good by a guess, and what comes while nothing waits
//! and nothing runs is taken, for only from what runs can be learnt. Nothing here has a clock.

use std::time::Duration;

use crate::backlog::Ahead;

/// An engine between two steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    pub num_running: u32,
    pub free_slots: u32,
    /// Tokens that the free blocks hold, beyond what running sequences already have to compute.
    pub free_tokens: u64,
    /// Tokens of sequences that have begun, still to be computed before theirs follow one by one.
    pub begun_tokens: u64,
    /// How long a sequence runs, as far as has been seen.
    pub service_ns: u64,
    /// Of the tokens of prompts, the share that is computed: the prefix cache has the rest.
    pub computed_share: f64,
    pub num_in_flight: u32,
    /// Beside what decodes now.
    pub pace: Pace,
    /// On a device that does nothing else; `None` while what its steps take is not known.
    pub idle_pace: Option<Pace>,
}

/// Why a first token would come too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLate {
    /// For what comes before it.
    Now { predicted: Duration },
    /// For its own prompt; a shorter one would be in time.
    Ever { predicted: Duration },
}

/// How fast a device computes prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// A step without a prompt.
    pub base_ns: u64,
    /// A step with as much of a prompt as may join it.
    pub full_ns: u64,
    /// How much that is; at least 1 of what has been measured.
    pub tokens_per_step: u32,
}

impl Pace {
    /// What `num_tokens` take: one step at least.
    pub fn time_ns(&self, num_tokens: f64) -> f64 {
        let steps = num_tokens / f64::from(self.tokens_per_step.max(1));
        let (base, full) = (self.base_ns as f64, self.full_ns as f64);
        if steps < 1.0 { base + (full - base) * steps } else { full * steps }
    }

    /// Two devices at once: what both compute in the time that a full step of the faster one takes.
    fn beside(self, other: Pace) -> Pace {
        let rate = |pace: Pace| f64::from(pace.tokens_per_step) / pace.full_ns.max(1) as f64;
        let fast = if rate(self) >= rate(other) { self } else { other };
        let num_tokens = (rate(self) + rate(other)) * fast.full_ns.max(1) as f64;
        Pace { tokens_per_step: num_tokens as u32, ..fast }
    }
}

impl Load {
    /// Engines that share what comes, as if they were one as fast as all of them; `None` of none.
    pub fn together(loads: impl Iterator<Item = Load>) -> Option<Load> {
        loads.reduce(Load::beside)
    }

    fn beside(self, other: Load) -> Load {
        let num_running = self.num_running + other.num_running;
        let mean = |of: fn(&Load) -> f64| {
            let weight = |load: &Load| f64::from(load.num_running.max(1));
            let (own, others) = (weight(&self), weight(&other));
            (of(&self) * own + of(&other) * others) / (own + others)
        };
        Load {
            num_running,
            free_slots: self.free_slots + other.free_slots,
            free_tokens: self.free_tokens + other.free_tokens,
            begun_tokens: self.begun_tokens + other.begun_tokens,
            service_ns: mean(|load| load.service_ns as f64) as u64,
            computed_share: mean(|load| load.computed_share),
            num_in_flight: self.num_in_flight.max(other.num_in_flight),
            pace: self.pace.beside(other.pace),
            idle_pace: self.idle_pace.zip(other.idle_pace).map(|(own, other)| own.beside(other)),
        }
    }

    /// From now to the first token of a request whose prompt has `own_tokens`; they are among those of `ahead`.
    pub fn first_token_ns(&self, ahead: &Ahead, own_tokens: u64) -> u64 {
        let computed = |num_tokens: u64| num_tokens as f64 * self.computed_share;
        let prompts_ns = self.pace.time_ns(self.begun_tokens as f64 + computed(ahead.num_tokens));
        let slot_ns = self.slot_ns(ahead) + self.pace.time_ns(computed(own_tokens));
        let in_flight_ns = self.num_in_flight as f64 * self.pace.base_ns as f64;
        (in_flight_ns + prompts_ns.max(slot_ns)) as u64
    }

    /// What the same request would take with nobody else there, as far as that is known.
    pub fn first_token_alone_ns(&self, own_tokens: u64) -> Option<u64> {
        Some(self.idle_pace?.time_ns(own_tokens as f64 * self.computed_share) as u64)
    }

    /// Whether the first token of a prompt of `own_tokens` is predicted within `max`; `is_first` where nothing waited
    /// and nothing ran when it came.
    pub fn check_in_time(&self, ahead: &Ahead, own_tokens: u64, is_first: bool, max: Duration) -> Result<(), TooLate> {
        let alone = |num_tokens| self.first_token_alone_ns(num_tokens).map(Duration::from_nanos);
        let some_prompt_is_in_time = alone(0).is_some_and(|least| least <= max);
        if let Some(predicted) = alone(own_tokens).filter(|&alone| some_prompt_is_in_time && alone > max) {
            return Err(TooLate::Ever { predicted });
        }
        let predicted = Duration::from_nanos(self.first_token_ns(ahead, own_tokens));
        match is_first || predicted <= max {
            true => Ok(()),
            false => Err(TooLate::Now { predicted }),
        }
    }

    /// From now until `num_requests` that wait have begun, with `num_tokens` of prompts between them.
    pub fn begun_ns(&self, num_requests: u32, num_tokens: u64) -> u64 {
        let ahead = Ahead { num_requests: num_requests.saturating_sub(1), num_tokens, within_share: false };
        self.first_token_ns(&ahead, num_tokens / u64::from(num_requests.max(1)))
    }

    /// Until the request behind `ahead` has a slot and memory.
    fn slot_ns(&self, ahead: &Ahead) -> f64 {
        let each = ahead.num_tokens / (u64::from(ahead.num_requests) + 1);
        let fitting = self.free_tokens / each.max(1);
        let room = u64::from(self.free_slots).min(fitting) as u32;
        if ahead.within_share || ahead.num_requests < room {
            return 0.0;
        }
        let num_at_once = (self.num_running + room).max(1);
        f64::from(ahead.num_requests - room + 1) * self.service_ns as f64 / f64::from(num_at_once)
    }
}

/// What an engine remembers to make a [`Load`] of: means over recent sequences, and the ages of those that run.
#[derive(Clone, Debug)]
pub struct Meter {
    num_ended: u32,
    service_ns: f64,
    computed_share: f64,
    num_prompts: u32,
    num_started: u32,
    /// Of sequences that run, when they began, on the engine's clock.
    sum_started_ns: u64,
    full: FullSteps,
}

/// Sums over recent steps that had as much of prompts as they could take, fading with every step.
#[derive(Clone, Copy, Debug, Default)]
struct FullSteps {
    count: f64,
    num_tokens: f64,
    ns: f64,
}

/// Of a mean over recent sequences, the weight of one is 1 in this many.
const MEMORY: u32 = 32;

impl Default for Meter {
    fn default() -> Meter {
        Meter {
            num_ended: 0,
            service_ns: 0.0,
            computed_share: 1.0,
            num_prompts: 0,
            num_started: 0,
            sum_started_ns: 0,
            full: FullSteps::default(),
        }
    }
}

impl Meter {
    /// A sequence begins, `cached_tokens` of its prompt being there.
    pub fn started(&mut self, now_ns: u64, prompt_tokens: u32, cached_tokens: u32) {
        self.num_started += 1;
        self.sum_started_ns += now_ns;
        let share = f64::from(prompt_tokens - cached_tokens) / f64::from(prompt_tokens);
        self.num_prompts += 1;
        self.computed_share += (share - self.computed_share) / f64::from(self.num_prompts.min(MEMORY));
    }

    /// A sequence that began at `started_ns` holds its slot no longer.
    pub fn ended(&mut self, started_ns: u64, now_ns: u64) {
        self.num_started -= 1;
        self.sum_started_ns -= started_ns;
        self.num_ended = self.num_ended.saturating_add(1);
        let ran_ns = now_ns.saturating_sub(started_ns) as f64;
        self.service_ns += (ran_ns - self.service_ns) / f64::from(self.num_ended.min(MEMORY));
    }

    /// A step took `ns`, with `num_tokens` of prompts; where it `is_full`, no more would have gone into it.
    pub fn stepped(&mut self, num_tokens: u32, ns: u64, is_full: bool) {
        let FullSteps { count, num_tokens: sum_tokens, ns: sum_ns } = &mut self.full;
        let added = if is_full { [1.0, f64::from(num_tokens), ns as f64] } else { [0.0; 3] };
        for (sum, added) in [count, sum_tokens, sum_ns].into_iter().zip(added) {
            *sum += added - *sum / f64::from(MEMORY);
        }
    }

    /// Nothing runs: a crowd that was there says nothing of what comes next.
    pub fn rest(&mut self) {
        self.full = FullSteps::default();
    }

    /// `pace`, what the present decode load allows, unless many of the last steps were full: where prompts crowd, loads
    /// change from step to step, and what they took together says more.
    pub fn pace(&self, pace: Pace) -> Pace {
        let FullSteps { count, num_tokens, ns } = self.full;
        if count < f64::from(MEMORY) / 4.0 || num_tokens < count {
            return pace;
        }
        Pace { full_ns: (ns / count) as u64, tokens_per_step: (num_tokens / count) as u32, ..pace }
    }

    pub fn computed_share(&self) -> f64 {
        self.computed_share
    }

    /// How long a sequence runs. Those that run now have a say, for short ones end first: while few have ended the
    /// others are taken to be half way, and always to be no shorter than they are.
    pub fn service_ns(&self, now_ns: u64) -> u64 {
        if self.num_started == 0 {
            return self.service_ns as u64;
        }
        let num_started = f64::from(self.num_started);
        let age_ns = now_ns as f64 - self.sum_started_ns as f64 / num_started;
        let ended = f64::from(self.num_ended.min(MEMORY));
        let running = (num_started - f64::from(self.num_ended) / 2.0).max(0.0);
        let mean_ns = (ended * self.service_ns + running * 2.0 * age_ns) / (ended + running);
        mean_ns.max(age_ns) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 ms a step, 40 ms with 100 tokens of a prompt; 8 slots, sequences of 2 s.
    fn full() -> Load {
        Load {
            num_running: 8,
            free_slots: 0,
            free_tokens: 10_000,
            begun_tokens: 0,
            service_ns: 2_000_000_000,
            computed_share: 1.0,
            num_in_flight: 2,
            pace: Pace { base_ns: 10_000_000, full_ns: 40_000_000, tokens_per_step: 100 },
            idle_pace: Some(Pace { base_ns: 5_000_000, full_ns: 20_000_000, tokens_per_step: 400 }),
        }
    }

    fn ahead(num_requests: u32, num_tokens: u64) -> Ahead {
        Ahead { num_requests, num_tokens, within_share: false }
    }

    #[test]
    fn a_pace_is_steps_and_the_part_of_one() {
        let pace = full().pace;
        let ms = |num_tokens| pace.time_ns(num_tokens) / 1e6;
        assert_eq!([0.0, 50.0, 100.0, 250.0].map(ms), [10.0, 25.0, 40.0, 100.0]);
        assert_eq!(Pace::default().time_ns(500.0), 0.0);
    }

    #[test]
    fn a_slot_is_free_when_those_before_have_one_and_one_more_ends() {
        let load = full();
        let ms = |ahead: &Ahead, own| load.first_token_ns(ahead, own) / 1_000_000;
        // Every 250 ms a slot; two steps in flight; then the own prompt.
        assert_eq!(ms(&ahead(0, 50), 50), 20 + 250 + 25);
        assert_eq!(ms(&ahead(3, 200), 50), 20 + 4 * 250 + 25);
        // Whoever is within its share takes a slot from others.
        assert_eq!(ms(&Ahead { within_share: true, ..ahead(3, 200) }, 50), 20 + 80);
        assert_eq!(load.begun_ns(4, 200) / 1_000_000, 20 + 4 * 250 + 25);
    }

    #[test]
    fn with_slots_to_spare_prompts_are_what_is_waited_for() {
        let load = Load { free_slots: 4, begun_tokens: 300, ..full() };
        assert_eq!(load.first_token_ns(&ahead(2, 700), 50) / 1_000_000, 20 + 400);
        // The fifth has to wait for memory or a slot all the same, but not as long.
        let fifth = load.first_token_ns(&ahead(4, 100), 20) / 1_000_000;
        assert_eq!(fifth, 20 + 2000 / 12 + 16);
        // What the prefix cache has is not computed.
        let shared = Load { computed_share: 0.25, ..load };
        assert_eq!(shared.first_token_ns(&ahead(2, 800), 40) / 1_000_000, 20 + 200);
        assert_eq!(shared.first_token_alone_ns(800), Some(12_500_000));
    }

    #[test]
    fn slots_without_memory_are_none() {
        let load = Load { free_slots: 4, free_tokens: 99, ..full() };
        assert!(load.first_token_ns(&ahead(0, 100), 100) > 250_000_000);
        assert!(load.first_token_ns(&ahead(0, 99), 99) < 100_000_000);
    }

    #[test]
    fn more_ahead_is_never_sooner() {
        for load in [full(), Load { free_slots: 3, free_tokens: 900, begun_tokens: 70, ..full() }] {
            let mut last = 0;
            for num_requests in 0..40 {
                let next = load.first_token_ns(&ahead(num_requests, 100 + 60 * u64::from(num_requests)), 100);
                assert!(next >= last, "{num_requests}");
                last = next;
            }
        }
    }

    #[test]
    fn a_crowd_of_prompts_is_measured() {
        let (pace, mut meter) = (full().pace, Meter::default());
        for _ in 0..5 {
            meter.stepped(20, 30_000_000, true);
        }
        assert_eq!(meter.pace(pace), pace, "five steps say little");
        for _ in 0..20 {
            meter.stepped(20, 30_000_000, true);
            meter.stepped(500, 90_000_000, true);
        }
        let Pace { base_ns, full_ns, tokens_per_step } = meter.pace(pace);
        assert_eq!(base_ns, pace.base_ns);
        assert!((240..280).contains(&tokens_per_step) && (57_000_000..63_000_000).contains(&full_ns), "{full_ns}");
        for _ in 0..100 {
            meter.stepped(0, 10_000_000, false);
        }
        assert_eq!(meter.pace(pace), pace);
        for _ in 0..40 {
            meter.stepped(500, 90_000_000, true);
        }
        assert_ne!(meter.pace(pace), pace);
        meter.rest();
        assert_eq!(meter.pace(pace), pace, "whoever comes to an idle device meets no crowd");
    }

    #[test]
    fn nobody_is_refused_by_a_guess_and_an_idle_device_takes_whoever_comes() {
        let (load, nobody) = (Load { num_in_flight: 0, num_running: 0, free_slots: 8, ..full() }, ahead(0, 400));
        let guess = Load { idle_pace: None, ..load };
        let ms = Duration::from_millis;
        // 20 ms for 400 tokens alone, 160 ms as it is now.
        assert_eq!(load.check_in_time(&nobody, 400, false, ms(160)), Ok(()));
        let now = Err(TooLate::Now { predicted: ms(160) });
        assert_eq!(load.check_in_time(&nobody, 400, false, ms(159)), now);
        assert_eq!(load.check_in_time(&nobody, 400, true, ms(20)), Ok(()));
        assert_eq!(load.check_in_time(&nobody, 400, true, ms(19)), Err(TooLate::Ever { predicted: ms(20) }));
        assert_eq!(guess.check_in_time(&nobody, 400, true, ms(1)), Ok(()));
        assert_eq!(guess.check_in_time(&nobody, 400, false, ms(19)), now);
        // Where no prompt at all would be in time, prices may be wrong.
        assert_eq!(load.check_in_time(&nobody, 400, true, ms(4)), Ok(()));
        assert_eq!(load.check_in_time(&nobody, 400, false, ms(4)), now);
    }

    #[test]
    fn a_meter_knows_what_has_ended_and_what_runs() {
        let mut meter = Meter::default();
        assert_eq!((meter.service_ns(5), meter.computed_share()), (0, 1.0));
        meter.started(1000, 10, 0);
        meter.started(2000, 10, 5);
        assert_eq!(meter.service_ns(3500), 2 * 2000);
        assert_eq!(meter.computed_share(), 0.75);
        meter.ended(1000, 4000);
        // One that took 3000, and half of one that is half way at 2000.
        assert_eq!(meter.service_ns(4000), (3000 + 4000 / 2) * 2 / 3);
        // The other has outlived the mean by far.
        assert_eq!(meter.service_ns(19_000), 17_000);
        meter.ended(2000, 9000);
        assert_eq!(meter.service_ns(9000), 5000);
    }
}
