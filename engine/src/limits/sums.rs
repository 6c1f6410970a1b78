//! Where the time of several devices went, or the time between two moments. Invariant: a sum of partitions is one of
//! the sum of their times, and so is a difference.

use std::ops::{AddAssign, Sub};

use super::{FactSums, Snapshot, Tally};

impl AddAssign<&Snapshot> for Snapshot {
    /// Devices unlike each other have no knee together.
    fn add_assign(&mut self, other: &Snapshot) {
        self.total += &other.total;
        self.window += &other.window;
        self.facts.iter_mut().zip(&other.facts).for_each(|(sum, more)| *sum += more);
        self.knee = self.knee.filter(|knee| other.knee.as_ref() == Some(knee));
    }
}

impl AddAssign<&Tally> for Tally {
    fn add_assign(&mut self, other: &Tally) {
        self.ns.iter_mut().zip(other.ns).for_each(|(sum, more)| *sum += more);
        self.idle_ns += other.idle_ns;
        self.num_tokens += other.num_tokens;
    }
}

impl Snapshot {
    /// What came since `before`, for its window; both are of all the time since the start.
    pub(crate) fn since(&self, before: &Snapshot) -> Snapshot {
        let facts = std::array::from_fn(|cause| self.facts[cause] - before.facts[cause]);
        Snapshot { window: self.window - before.window, facts, ..*self }
    }
}

impl Sub for Tally {
    type Output = Tally;

    fn sub(self, before: Tally) -> Tally {
        Tally {
            ns: std::array::from_fn(|cause| self.ns[cause] - before.ns[cause]),
            idle_ns: self.idle_ns - before.idle_ns,
            num_tokens: self.num_tokens - before.num_tokens,
        }
    }
}

impl Sub for FactSums {
    type Output = FactSums;

    fn sub(self, before: FactSums) -> FactSums {
        FactSums {
            us: self.us - before.us,
            num_waiting: self.num_waiting - before.num_waiting,
            waiting_tokens: self.waiting_tokens - before.waiting_tokens,
            num_running: self.num_running - before.num_running,
            referenced_blocks: self.referenced_blocks - before.referenced_blocks,
            num_rows: self.num_rows - before.num_rows,
        }
    }
}

impl AddAssign<&FactSums> for FactSums {
    fn add_assign(&mut self, other: &FactSums) {
        self.us += other.us;
        self.num_waiting += other.num_waiting;
        self.waiting_tokens += other.waiting_tokens;
        self.num_running += other.num_running;
        self.referenced_blocks += other.referenced_blocks;
        self.num_rows += other.num_rows;
    }
}
