//! The service that tenants have got, summed over all engines that serve them.
//!
//! Invariant: an account is open exactly while an engine knows its tenant; who comes back from idleness everywhere
//! starts no lower than the least of the others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub struct Ledger(Mutex<Accounts>);

/// A tenant's service, in virtual time.
#[derive(Clone, Debug, Default)]
pub(super) struct Account(Arc<AtomicU64>);

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
        let account = Account(Arc::new(AtomicU64::new(accounts.floor)));
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
        self.0.load(Ordering::Relaxed)
    }

    /// Adds to it; gives what it is then.
    pub(super) fn charge(&self, cost: u64) -> u64 {
        self.0.fetch_add(cost, Ordering::Relaxed) + cost
    }
}

#[cfg(test)]
mod tests {
    use super::super::Queue;
    use super::*;
    use crate::batch::SequenceId;
    use crate::memory::BlockChain;
    use crate::request::{Request, TokenId};
    use crate::sequence::Sequence;

    fn sequence(id: u64, tenant: u64) -> Sequence {
        let request = Request { prompt: vec![TokenId(0)], tenant, ..Request::default() };
        Sequence::new(SequenceId(id), Arc::new(request), BlockChain::default())
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
