//! Who is served next: waiting sequences by tenant, priority and arrival.
//!
//! A tenant is whoever a request is served for: an API key, a `user` field. Each has a virtual counter of the service
//! it got (VTC: Sheng et al., "Fairness in Serving Large Language Models", 2024), divided by its weight; the tenant
//! with the least is served next, and one that comes back from idleness starts no lower than the least of the others,
//! so that nobody saves up. Within a tenant: lower `priority` first, then order of arrival.
//!
//! Invariant: a tenant is known exactly while it has sequences; the same history gives the same order. Where several
//! engines serve the same tenants, the counters are of all of them, and are looked at once a round; caps of what runs
//! at once hold over all of them too. The queue knows no memory and no budget.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::batch::SequenceId;
use crate::request::Share;
use crate::sequence::Sequence;

mod ledger;

use ledger::Account;
pub use ledger::Ledger;

/// What a computed prompt token and a generated one cost a tenant. Tokens found in the prefix cache cost nothing: they
/// are not computed. A generated token occupies a row of a step of its own, so it counts double (as in VTC's paper).
/// What is computed again after a preemption costs nothing: a counter says how much service a tenant has got, and it
/// gets none twice; nobody asks to be preempted, and whoever paid for it would be served later for having been.
pub const PREFILL_COST: u64 = 1;
pub const DECODE_COST: u64 = 2;
/// Virtual time of a unit of cost at weight 1.
const UNIT: u64 = 1 << 10;

/// A known tenant; valid while it has sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantIndex(u32);

#[derive(Debug, Default)]
pub struct Queue {
    tenants: Vec<Tenant>,
    /// Known tenants by their requests' `tenant`.
    by_id: HashMap<u64, TenantIndex>,
    /// Entries of `tenants` that are nobody's.
    vacant: Vec<TenantIndex>,
    /// Where known tenants have their accounts.
    ledger: Arc<Ledger>,
    num_waiting: usize,
    waiting_tokens: u64,
    /// Of waiting sequences those that ran before, and their tokens.
    num_preempted: u32,
    preempted_tokens: u64,
}

#[derive(Debug, Default)]
struct Tenant {
    id: u64,
    share: Share,
    account: Account,
    /// What was in it when it was last looked at.
    counter: u64,
    num_running: u32,
    /// In order of service.
    waiting: VecDeque<Sequence>,
    /// Sequences at the front that were passed over in this round.
    num_passed: usize,
}

impl Queue {
    /// Has `ledger`, which other engines have too, keep the accounts; while nobody is known.
    pub fn share_ledger(&mut self, ledger: Arc<Ledger>) {
        assert!(self.by_id.is_empty(), "somebody has an account already");
        self.ledger = ledger;
    }

    pub fn len(&self) -> usize {
        self.num_waiting
    }

    pub fn is_empty(&self) -> bool {
        self.num_waiting == 0
    }

    /// Tokens of waiting sequences, those that a prefix cache may have included.
    pub fn waiting_tokens(&self) -> u64 {
        self.waiting_tokens
    }

    /// Waiting sequences that have run before.
    pub fn num_preempted(&self) -> u32 {
        self.num_preempted
    }

    /// Their tokens.
    pub fn preempted_tokens(&self) -> u64 {
        self.preempted_tokens
    }

    pub fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.tenants.iter().flat_map(|tenant| &tenant.waiting)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.tenants.iter_mut().flat_map(|tenant| &mut tenant.waiting)
    }

    /// Tenants that have sequences, waiting or running.
    pub fn num_tenants(&self) -> u32 {
        self.by_id.len() as u32
    }

    pub fn push(&mut self, mut sequence: Sequence) {
        self.count(&sequence);
        sequence.tenant = self.know(sequence.request.tenant, sequence.request.share);
        let tenant = &mut self.tenants[sequence.tenant.0 as usize];
        let rank = rank(&sequence);
        let at = tenant.waiting.partition_point(|other| self::rank(other) < rank);
        tenant.waiting.insert(at, sequence);
    }

    /// A running sequence goes back to wait.
    pub fn push_preempted(&mut self, sequence: Sequence) {
        self.stop(sequence.tenant);
        self.push(sequence);
    }

    /// Begins a round of [`Queue::peek`]: nobody has been passed over.
    pub fn rewind(&mut self) {
        for tenant in &mut self.tenants {
            (tenant.num_passed, tenant.counter) = (0, tenant.account.read());
        }
    }

    /// The sequence that is to be served next, of those not passed over and of tenants below their cap.
    pub fn peek(&mut self) -> Option<&mut Sequence> {
        let tenant = self.next_tenant()?;
        let tenant = &mut self.tenants[tenant];
        tenant.waiting.get_mut(tenant.num_passed)
    }

    /// Passes over what `peek` gave, until the next `rewind`.
    pub fn pass(&mut self) {
        if let Some(tenant) = self.next_tenant() {
            self.tenants[tenant].num_passed += 1;
        }
    }

    /// Takes what `peek` gave; it runs from now on. `None` where another engine has meanwhile begun what its tenant may
    /// still run.
    pub fn take(&mut self) -> Option<Sequence> {
        let tenant = self.next_tenant()?;
        let tenant = &mut self.tenants[tenant];
        if !tenant.account.begin(tenant.share.max_num_seqs) {
            return None;
        }
        let sequence = tenant.waiting.remove(tenant.num_passed)?;
        tenant.num_running += 1;
        self.discount(&sequence);
        Some(sequence)
    }

    pub fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.iter_mut().find(|sequence| sequence.id == id)
    }

    /// Ends a waiting sequence.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let place = |tenant: &Tenant| tenant.waiting.iter().position(|sequence| sequence.id == id);
        let (tenant, place) = self.tenants.iter().enumerate().find_map(|(i, tenant)| Some((i, place(tenant)?)))?;
        let sequence = self.tenants[tenant].waiting.remove(place)?;
        self.discount(&sequence);
        self.forget_if_idle(sequence.tenant);
        Some(sequence)
    }

    /// A running sequence has ended.
    pub fn ended(&mut self, tenant: TenantIndex) {
        self.stop(tenant);
        self.forget_if_idle(tenant);
    }

    /// Charges a tenant for what a step computes for it.
    pub fn charge(&mut self, tenant: TenantIndex, cost: u64) {
        let tenant = &mut self.tenants[tenant.0 as usize];
        tenant.counter = tenant.account.charge(cost * UNIT / u64::from(tenant.share.weight));
    }

    /// The service that a tenant has got, over its weight.
    pub fn counter(&self, tenant: TenantIndex) -> u64 {
        self.tenants[tenant.0 as usize].counter
    }

    /// Running sequences of a tenant beyond its fair share of `num_at_once`; negative below it.
    pub fn above_share(&self, tenant: TenantIndex, num_at_once: u32) -> i64 {
        let weights = self.by_id.values().map(|index| u64::from(self.tenants[index.0 as usize].share.weight));
        let Tenant { share, num_running, .. } = self.tenants[tenant.0 as usize];
        let fair = u64::from(num_at_once) * u64::from(share.weight) / weights.sum::<u64>();
        i64::from(num_running) - fair.max(1) as i64
    }

    /// Asserts every invariant; `running` are the tenants of all running sequences.
    pub fn check(&self, running: impl Iterator<Item = TenantIndex>) {
        let mut counts = vec![0; self.tenants.len()];
        running.for_each(|tenant| counts[tenant.0 as usize] += 1);
        for (index, tenant) in self.tenants.iter().enumerate() {
            assert_eq!(tenant.num_running, counts[index], "tenant {}", tenant.id);
            let is_known = self.by_id.values().any(|known| known.0 as usize == index);
            let has_sequences = tenant.num_running > 0 || !tenant.waiting.is_empty();
            assert_eq!(has_sequences, is_known, "tenant {} is known without sequences, or has some unknown", tenant.id);
            assert!(tenant.waiting.iter().is_sorted_by_key(rank), "tenant {} is out of order", tenant.id);
        }
        assert_eq!(self.num_waiting, self.iter().count());
        let preempted = || self.iter().filter(|sequence| sequence.num_preemptions > 0);
        assert_eq!(self.num_preempted as usize, preempted().count());
        assert_eq!(self.preempted_tokens, preempted().map(|sequence| u64::from(sequence.num_tokens())).sum::<u64>());
        assert_eq!(self.waiting_tokens, self.iter().map(|sequence| u64::from(sequence.num_tokens())).sum::<u64>());
    }

    fn count(&mut self, sequence: &Sequence) {
        let num_tokens = u64::from(sequence.num_tokens());
        self.num_waiting += 1;
        self.waiting_tokens += num_tokens;
        if sequence.num_preemptions > 0 {
            self.num_preempted += 1;
            self.preempted_tokens += num_tokens;
        }
    }

    fn discount(&mut self, sequence: &Sequence) {
        let num_tokens = u64::from(sequence.num_tokens());
        self.num_waiting -= 1;
        self.waiting_tokens -= num_tokens;
        if sequence.num_preemptions > 0 {
            self.num_preempted -= 1;
            self.preempted_tokens -= num_tokens;
        }
    }

    /// The entry of a tenant, made if there is none; its share is what its last request says.
    fn know(&mut self, id: u64, share: Share) -> TenantIndex {
        if let Some(&index) = self.by_id.get(&id) {
            self.tenants[index.0 as usize].share = share;
            return index;
        }
        let account = self.ledger.open(id);
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.tenants.push(Tenant::default());
            TenantIndex(self.tenants.len() as u32 - 1)
        });
        let tenant = &mut self.tenants[index.0 as usize];
        (tenant.id, tenant.share, tenant.counter, tenant.num_passed) = (id, share, account.read(), 0);
        tenant.account = account;
        self.by_id.insert(id, index);
        index
    }

    /// A sequence of it runs no longer.
    fn stop(&mut self, tenant: TenantIndex) {
        let tenant = &mut self.tenants[tenant.0 as usize];
        tenant.num_running -= 1;
        tenant.account.end(1);
    }

    fn forget_if_idle(&mut self, index: TenantIndex) {
        let tenant = &self.tenants[index.0 as usize];
        if tenant.num_running == 0 && tenant.waiting.is_empty() {
            self.ledger.close(tenant.id);
            self.by_id.remove(&self.tenants[index.0 as usize].id);
            self.vacant.push(index);
        }
    }

    fn next_tenant(&self) -> Option<usize> {
        let next = |(index, tenant): (usize, &Tenant)| {
            let waits = tenant.waiting.len() > tenant.num_passed;
            (waits && tenant.account.num_running() < tenant.share.max_num_seqs).then_some((
                tenant.counter,
                tenant.num_running,
                tenant.id,
                index,
            ))
        };
        self.tenants.iter().enumerate().filter_map(next).min().map(|(.., index)| index)
    }
}

/// What an engine that is gone was at, by a bug of its own, holds up nobody elsewhere.
impl Drop for Queue {
    fn drop(&mut self) {
        self.tenants.iter().for_each(|tenant| tenant.account.end(tenant.num_running));
    }
}

/// Order of service within a tenant: of one priority what has begun elsewhere is first.
fn rank(sequence: &Sequence) -> (i32, bool, SequenceId) {
    (sequence.request.priority, sequence.request.generated.is_empty(), sequence.id)
}
