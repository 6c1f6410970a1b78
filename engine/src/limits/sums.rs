//! Where the time of several devices went. Invariant: a sum of partitions is one of the sum of their times.

use std::ops::AddAssign;

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
