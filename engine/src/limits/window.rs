//! The last minute, second by second. Invariant: the sums are those of the seconds that are kept, exactly.

use std::ops::Range;

use super::{Cause, EndedStep, FactSums, NUM_CAUSES, Tally};

const NUM_SECONDS: u64 = 60;
const SECOND_NS: u64 = 1_000_000_000;

pub(super) struct Window {
    /// By second since the start, modulo their number.
    seconds: Vec<Second>,
    /// The newest.
    second: u64,
    sum: Second,
}

#[derive(Clone, Copy, Default)]
struct Second {
    tally: Tally,
    facts: [FactSums; NUM_CAUSES],
}

impl Default for Window {
    fn default() -> Window {
        let seconds = vec![Second::default(); NUM_SECONDS as usize];
        Window { seconds, second: 0, sum: Second::default() }
    }
}

impl Window {
    pub fn sums(&self) -> (Tally, [FactSums; NUM_CAUSES]) {
        (self.sum.tally, self.sum.facts)
    }

    /// `ns` from `at_ns` on, which lie in one second, or end before the window begins.
    pub fn charge(&mut self, at_ns: u64, cause: Cause, ns: u64, step: Option<&EndedStep>) {
        self.move_to(at_ns / SECOND_NS);
        for second in [&mut self.sum, &mut self.seconds[(self.second % NUM_SECONDS) as usize]] {
            second.tally.charge(cause, ns);
            if let Some(step) = step {
                second.facts[cause as usize].add(step, ns / 1000);
            }
        }
    }

    /// Counts `num_tokens` rows, and `idle_ns` without a step, at `at_ns`.
    pub fn count(&mut self, at_ns: u64, num_tokens: u64, idle_ns: u64) {
        self.move_to(at_ns / SECOND_NS);
        for second in [&mut self.sum, &mut self.seconds[(self.second % NUM_SECONDS) as usize]] {
            second.tally.num_tokens += num_tokens;
            second.tally.idle_ns += idle_ns;
        }
    }

    fn move_to(&mut self, second: u64) {
        if second >= self.second + NUM_SECONDS {
            self.seconds.fill(Second::default());
            (self.second, self.sum) = (second, Second::default());
        }
        while self.second < second {
            self.second += 1;
            let old = std::mem::take(&mut self.seconds[(self.second % NUM_SECONDS) as usize]);
            self.sum.subtract(&old);
        }
    }
}

impl Second {
    fn subtract(&mut self, old: &Second) {
        for (sum, old) in self.tally.ns.iter_mut().zip(old.tally.ns) {
            *sum -= old;
        }
        self.tally.idle_ns -= old.tally.idle_ns;
        self.tally.num_tokens -= old.tally.num_tokens;
        for (sum, old) in self.facts.iter_mut().zip(&old.facts) {
            sum.subtract(old);
        }
    }
}

impl FactSums {
    pub(super) fn add(&mut self, step: &EndedStep, us: u64) {
        let facts = &step.facts;
        self.us += us;
        self.num_waiting += us * u64::from(facts.num_waiting);
        self.waiting_tokens += us * facts.waiting_tokens;
        self.num_running += us * u64::from(facts.num_running);
        self.referenced_blocks += us * u64::from(facts.referenced_blocks);
        self.num_rows += us * u64::from(step.shape.num_tokens);
    }

    fn subtract(&mut self, old: &FactSums) {
        self.us -= old.us;
        self.num_waiting -= old.num_waiting;
        self.waiting_tokens -= old.waiting_tokens;
        self.num_running -= old.num_running;
        self.referenced_blocks -= old.referenced_blocks;
        self.num_rows -= old.num_rows;
    }
}

/// The seconds that a range of nanoseconds touches, with what lies too far back for a window in one piece.
pub(super) fn pieces(from_ns: u64, until_ns: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = from_ns;
    std::iter::from_fn(move || {
        if start >= until_ns {
            return None;
        }
        let oldest = (until_ns / SECOND_NS).saturating_sub(NUM_SECONDS) * SECOND_NS;
        let end = ((start / SECOND_NS + 1) * SECOND_NS).max(oldest).min(until_ns);
        let piece = start..end;
        start = end;
        Some(piece)
    })
}
