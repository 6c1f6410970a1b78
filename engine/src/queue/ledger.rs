//! The service that tenants have got and what they run, summed over all engines that serve them.
//!
//! Invariant: an account is open exactly while an engine knows its tenant; no tenant runs more than its cap over all
//! engines; who comes back from idleness everywhere starts no lower than the least of the others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub struct Ledger(Mutex<Accounts>);

#[derive(Clone, Debug, Default)]
pub(super) struct Account(Arc<Sums>);

#[derive(Debug, Default)]
struct Sums {
    /// A tenant's service, in virtual time.
    service: AtomicU64,
    num_running: AtomicU32,
}

#[derive(Debug, Default)]
struct Accounts {
    by_tenant: HashMap<u64, Open>,
    /// What the least served tenant had got when an account was last opened or closed.
    floor: u64,
}

#[derive(Debug)]
struct Open {
    account: Account,
    num_engines: u32,
}

impl Ledger {
    /// For one more engine.
    pub(super) fn open(&self, tenant: u64) -> Account {
        let mut accounts = self.lock();
        if let Some(open) = accounts.by_tenant.get_mut(&tenant) {
            open.num_engines += 1;
            return open.account.clone();
        }
        accounts.floor = accounts.least();
        let sums = Sums { service: AtomicU64::new(accounts.floor), ..Sums::default() };
        let account = Account(Arc::new(sums));
        accounts.by_tenant.insert(tenant, Open { account: account.clone(), num_engines: 1 });
        account
    }

    /// For one engine less.
    pub(super) fn close(&self, tenant: u64) {
        let mut accounts = self.lock();
        let open = accounts.by_tenant.get_mut(&tenant).expect("who is known has an account");
        open.num_engines -= 1;
        if open.num_engines == 0 {
            accounts.floor = accounts.least();
            accounts.by_tenant.remove(&tenant);
        }
    }

    /// Numbers, whole after every write.
    fn lock(&self) -> MutexGuard<'_, Accounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Accounts {
    fn least(&self) -> u64 {
        self.by_tenant.values().map(|open| open.account.read()).min().unwrap_or(self.floor)
    }
}

impl Account {
    pub(super) fn read(&self) -> u64 {
        self.0.service.load(Ordering::Relaxed)
    }

    /// Adds to it; gives what it is then.
    pub(super) fn charge(&self, cost: u64) -> u64 {
        self.0.service.fetch_add(cost, Ordering::Relaxed) + cost
    }

    pub(super) fn num_running(&self) -> u32 {
        self.0.num_running.load(Ordering::Relaxed)
    }

    /// One more runs, if fewer than `cap` do.
    pub(super) fn begin(&self, cap: u32) -> bool {
        let one_more = |num_running| (num_running < cap).then_some(num_running + 1);
        self.0.num_running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    pub(super) fn end(&self, count: u32) {
        self.0.num_running.fetch_sub(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Queue;
    use super::*;
    use crate::arrival::Arrival;
    use crate::batch::SequenceId;
    use crate::memory::BlockChain;
    use crate::request::{Request, Share, TokenId};
    use crate::sequence::Sequence;

    fn sequence(id: u64, tenant: u64) -> Sequence {
        let request = Request { prompt: vec![TokenId(0)], tenant, ..Request::default() };
        Sequence::new(SequenceId(id), Arrival::new(Arc::new(request), BlockChain::default(), None))
    }

    #[test]
    fn who_got_much_on_one_engine_is_served_later_on_another() {
        let ledger = Arc::new(Ledger::default());
        let (mut here, mut there) = (Queue::default(), Queue::default());
        here.share_ledger(ledger.clone());
        there.share_ledger(ledger);
        here.push(sequence(0, 1));
        here.rewind();
        let running = here.take().expect("it waits");
        there.push(sequence(0, 1));
        there.push(sequence(1, 2));
        let next = |queue: &mut Queue| {
            queue.rewind();
            queue.peek().map(|sequence| sequence.request.tenant)
        };
        assert_eq!(next(&mut there), Some(1));
        here.charge(running.tenant, 10);
        // A round that has begun goes on as it began.
        assert_eq!(there.peek().map(|sequence| sequence.request.tenant), Some(1));
        assert_eq!(next(&mut there), Some(2));
        here.ended(running.tenant);
        assert_eq!(next(&mut there), Some(2));
    }

    #[test]
    fn a_cap_holds_over_all_engines_and_an_engine_that_is_gone_runs_nothing() {
        let ledger = Arc::new(Ledger::default());
        let (mut here, mut there) = (Queue::default(), Queue::default());
        here.share_ledger(ledger.clone());
        there.share_ledger(ledger);
        let push = |queue: &mut Queue, id: u64, tenant: u64| {
            let share = Share { max_num_seqs: 2, ..Share::default() };
            let request = Request { prompt: vec![TokenId(0)], tenant, share, ..Request::default() };
            queue.push(Sequence::new(SequenceId(id), Arrival::new(Arc::new(request), BlockChain::default(), None)));
        };
        for id in 0..3 {
            push(&mut here, id, 1);
            push(&mut there, id, 1);
        }
        push(&mut there, 3, 2);
        here.rewind();
        there.rewind();
        let first = here.take().expect("none runs");
        // Both have seen the head of their queues when the last place is taken.
        assert!(here.peek().is_some() && there.peek().is_some());
        let second = there.take().expect("one runs");
        assert!(here.take().is_none() && here.peek().is_none());
        assert_eq!(there.take().map(|sequence| sequence.request.tenant), Some(2));
        here.push_preempted(first);
        assert!(there.take().is_some() && here.peek().is_none());
        there.ended(second.tenant);
        assert!(here.take().is_some() && there.peek().is_none());
        drop(here);
        assert!(there.peek().is_some());
    }

    #[test]
    fn engines_share_an_account_and_nobody_saves_up() {
        let ledger = Ledger::default();
        let (here, there) = (ledger.open(1), ledger.open(1));
        assert_eq!((here.charge(30), there.charge(12)), (30, 42));
        ledger.close(1);
        // Still open elsewhere.
        assert_eq!(ledger.open(2).read(), 42);
        ledger.close(1);
        assert_eq!(ledger.open(1).read(), 42);
    }
}
