//! What has been taken in and has not begun, by tenant, and how much of it there may be.
//!
//! A place is taken before a request's text is read, its tokens are added once they are known, and both are given back
//! when it begins or its client leaves. What one tenant may have falls with what is left, as in the shared buffers of
//! switches (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998), so that a
//! flood leaves room for others, those included that have not come yet. Where nothing waits, one request may take all:
//! whatever the limits allow at all is taken some time. Invariant: the totals are within their limits, and are the sums
//! over tenants; a tenant is known exactly while it has something. It knows no clock and no thread.

use std::collections::HashMap;

/// A tenant may have this many times what is left free.
const SHARE_OF_FREE: u64 = 7;

#[derive(Debug)]
pub struct Backlog {
    max_requests: u32,
    max_tokens: u64,
    total: Amount,
    tenants: HashMap<u64, Tenant>,
}

/// Waiting requests and the tokens of their prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    pub num_requests: u32,
    pub num_tokens: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tenant {
    weight: u32,
    waiting: Amount,
    /// Begun and not ended.
    num_running: u32,
}

/// What will be served before the last waiting request of a tenant, and with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Before it.
    pub num_requests: u32,
    /// Its own included.
    pub num_tokens: u64,
    /// Whether its tenant is within its share of what may run, so that others give way to it.
    pub within_share: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    Requests,
    Tokens,
}

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow {
    pub limit: Limit,
    /// What waits of it, of all tenants.
    pub num_waiting: u64,
    pub max_waiting: u64,
    /// How much of it has to begin before there is room.
    pub num_excess: u64,
}

/// Why nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There will be room.
    Full(Overflow),
    /// There never is, not even where nothing waits.
    Never { limit: Limit, wanted: u64, max: u64 },
}

impl Backlog {
    pub fn new(max_requests: u32, max_tokens: u64) -> Backlog {
        Backlog { max_requests, max_tokens, total: Amount::default(), tenants: HashMap::new() }
    }

    pub fn total(&self) -> Amount {
        self.total
    }

    /// Whether nobody could get a place, and what would have to begin for one.
    pub fn check_full(&self) -> Result<(), Overflow> {
        let (held, max) = (u64::from(self.total.num_requests), u64::from(self.max_requests));
        match held < max {
            true => Ok(()),
            false => Err(Overflow { limit: Limit::Requests, num_waiting: held, max_waiting: max, num_excess: 1 }),
        }
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.tenants.is_empty()
    }

    /// Takes `num_requests` places, all or none.
    pub fn reserve(&mut self, tenant: u64, weight: u32, num_requests: u32) -> Result<(), Refusal> {
        let own = self.tenants.get(&tenant).map_or(0, |tenant| tenant.waiting.num_requests);
        let (total, max) = (u64::from(self.total.num_requests), u64::from(self.max_requests));
        room(Limit::Requests, u64::from(own), total, max, u64::from(num_requests))?;
        let tenant = self.tenants.entry(tenant).or_default();
        tenant.weight = weight;
        tenant.waiting.num_requests += num_requests;
        self.total.num_requests += num_requests;
        Ok(())
    }

    /// Adds the tokens of places that `tenant` has, all or none.
    pub fn add_tokens(&mut self, tenant: u64, num_tokens: u64) -> Result<(), Refusal> {
        let known = self.tenants.get_mut(&tenant).expect("a tenant that has places");
        room(Limit::Tokens, known.waiting.num_tokens, self.total.num_tokens, self.max_tokens, num_tokens)?;
        known.waiting.num_tokens += num_tokens;
        self.total.num_tokens += num_tokens;
        Ok(())
    }

    /// A request of `tenant` with `num_tokens` tokens begins: it waits no longer.
    pub fn begin(&mut self, tenant: u64, num_tokens: u64) {
        self.tenants.get_mut(&tenant).expect("a tenant that has places").num_running += 1;
        self.leave(tenant, num_tokens);
    }

    /// A waiting request has left.
    pub fn leave(&mut self, tenant: u64, num_tokens: u64) {
        let known = self.tenants.get_mut(&tenant).expect("a tenant that has places");
        known.waiting.num_requests -= 1;
        known.waiting.num_tokens -= num_tokens;
        self.total.num_requests -= 1;
        self.total.num_tokens -= num_tokens;
        self.forget_if_idle(tenant);
    }

    /// A request that had begun has ended.
    pub fn end(&mut self, tenant: u64) {
        self.tenants.get_mut(&tenant).expect("a tenant that runs something").num_running -= 1;
        self.forget_if_idle(tenant);
    }

    /// What comes before the newest of `tenant`'s waiting requests, where service is shared by weight: all that the
    /// tenant itself has, and of each other what it is served meanwhile. Priorities within a tenant are left out.
    pub fn ahead(&self, tenant: u64, max_num_seqs: u32) -> Ahead {
        let Some(own) = self.tenants.get(&tenant) else { return Ahead::default() };
        let mut ahead = own.waiting;
        for (_, other) in self.tenants.iter().filter(|(id, _)| **id != tenant) {
            let share = f64::from(other.weight) / f64::from(own.weight);
            let requests = f64::from(own.waiting.num_requests) * share;
            let tokens = own.waiting.num_tokens as f64 * share;
            ahead.num_requests += other.waiting.num_requests.min(requests as u32);
            ahead.num_tokens += other.waiting.num_tokens.min(tokens as u64);
        }
        let weights: u64 = self.tenants.values().map(|tenant| u64::from(tenant.weight)).sum();
        let fair = u64::from(max_num_seqs) * u64::from(own.weight) / weights;
        let runs = u64::from(own.num_running) + u64::from(own.waiting.num_requests);
        let within_share = self.tenants.len() > 1 && runs <= fair;
        Ahead { num_requests: ahead.num_requests.saturating_sub(1), num_tokens: ahead.num_tokens, within_share }
    }

    /// Asserts every invariant.
    pub fn check(&self) {
        let (mut num_requests, mut num_tokens) = (0, 0);
        for tenant in self.tenants.values() {
            assert!(tenant.waiting.num_requests > 0 || tenant.num_running > 0, "a tenant without requests");
            num_requests += tenant.waiting.num_requests;
            num_tokens += tenant.waiting.num_tokens;
        }
        assert_eq!(self.total, Amount { num_requests, num_tokens });
        assert!(num_requests <= self.max_requests && num_tokens <= self.max_tokens, "{:?}", self.total);
    }

    fn forget_if_idle(&mut self, tenant: u64) {
        let idle = |tenant: &Tenant| tenant.num_running == 0 && tenant.waiting.num_requests == 0;
        if self.tenants.get(&tenant).is_some_and(idle) {
            self.tenants.remove(&tenant);
        }
    }
}

/// Whether `wanted` more fit for one that has `own` of `total`.
fn room(limit: Limit, own: u64, total: u64, max: u64, wanted: u64) -> Result<(), Refusal> {
    if wanted > max {
        return Err(Refusal::Never { limit, wanted, max });
    }
    let last = wanted.saturating_sub(1);
    // As it stands for the last of them: own + last < SHARE_OF_FREE * (max - total - last).
    let used = own + last + SHARE_OF_FREE * (total + last);
    let allowed = SHARE_OF_FREE * max;
    if wanted == 0 || total == 0 || used < allowed {
        return Ok(());
    }
    // Of the tenant's own, each that begins counts in both; where all have begun, whatever may fit does.
    let num_excess = ((used - allowed) / (1 + SHARE_OF_FREE) + 1).min(total);
    Err(Refusal::Full(Overflow { limit, num_waiting: total, max_waiting: max, num_excess }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: u64 = 1;
    const BOB: u64 = 2;

    fn overflow(result: Result<(), Refusal>) -> Overflow {
        match result {
            Err(Refusal::Full(overflow)) => overflow,
            other => panic!("it is full: {other:?}"),
        }
    }

    fn fill(backlog: &mut Backlog, tenant: u64) -> u32 {
        let mut taken = 0;
        while backlog.reserve(tenant, 1, 1).is_ok() {
            taken += 1;
            backlog.check();
        }
        taken
    }

    #[test]
    fn a_flood_leaves_room_for_others() {
        let mut backlog = Backlog::new(256, 1000);
        assert_eq!(fill(&mut backlog, ALICE), 224);
        assert_eq!(fill(&mut backlog, BOB), 28);
        assert!(fill(&mut backlog, 3) > 0);
        // A short queue is not divided.
        for max in 1..=7 {
            let mut backlog = Backlog::new(max, 1000);
            assert_eq!(fill(&mut backlog, ALICE), max);
            assert!(backlog.check_full().is_err());
        }
    }

    #[test]
    fn several_places_are_taken_together_or_not_at_all() {
        let mut backlog = Backlog::new(16, 100);
        assert_eq!(backlog.reserve(ALICE, 1, 14), Ok(()));
        let overflow = overflow(backlog.reserve(BOB, 1, 3));
        assert_eq!((overflow.num_waiting, overflow.max_waiting), (14, 16));
        assert_eq!(backlog.reserve(BOB, 1, 2), Ok(()));
        assert_eq!(backlog.check_full().map_err(|overflow| overflow.num_excess), Err(1));
        backlog.check();
    }

    /// Whatever waits, it can begin; so to wait helps unless a limit itself is too low, and then nothing helps.
    #[test]
    fn an_empty_backlog_takes_all_that_its_limits_allow() {
        for max in [1, 2, 7, 8, 9, 63, 256] {
            for wanted in 1..=max + 3 {
                let never = |limit| Refusal::Never { limit, wanted: wanted.into(), max: max.into() };
                let expected = |limit| if wanted <= max { Ok(()) } else { Err(never(limit)) };
                let mut backlog = Backlog::new(max, max.into());
                assert_eq!(backlog.reserve(ALICE, 1, wanted), expected(Limit::Requests), "{wanted} of {max}");
                let mut backlog = Backlog::new(max, max.into());
                assert_eq!(backlog.reserve(ALICE, 1, 1), Ok(()));
                assert_eq!(backlog.add_tokens(ALICE, wanted.into()), expected(Limit::Tokens), "{wanted} of {max}");
                backlog.check();
            }
        }
    }

    /// What an overflow says has to begin is enough, and one less is not.
    #[test]
    fn the_excess_is_what_has_to_begin() {
        for (max, wanted) in [(2, 1), (2, 2), (40, 1), (40, 7), (40, 30), (40, 38), (40, 40)] {
            let mut backlog = Backlog::new(max, 1000);
            fill(&mut backlog, ALICE);
            let num_excess = overflow(backlog.reserve(ALICE, 1, wanted)).num_excess;
            for left in (0..num_excess).rev() {
                backlog.begin(ALICE, 0);
                let again = backlog.reserve(ALICE, 1, wanted);
                match left {
                    0 => assert_eq!(again, Ok(()), "{wanted} of {max}"),
                    left => assert_eq!(overflow(again).num_excess, left, "{wanted} of {max}"),
                }
            }
        }
    }

    #[test]
    fn tokens_have_a_limit_of_their_own() {
        let mut backlog = Backlog::new(16, 100);
        assert_eq!(backlog.reserve(ALICE, 1, 2), Ok(()));
        assert_eq!(backlog.add_tokens(ALICE, 80), Ok(()));
        let overflow = overflow(backlog.add_tokens(ALICE, 30));
        assert_eq!((overflow.limit, overflow.num_waiting, overflow.max_waiting), (Limit::Tokens, 80, 100));
        assert_eq!(backlog.total(), Amount { num_requests: 2, num_tokens: 80 });
        backlog.leave(ALICE, 0);
        backlog.begin(ALICE, 80);
        backlog.check();
        backlog.end(ALICE);
        assert_eq!((backlog.total(), backlog.tenants.len()), (Amount::default(), 0));
    }

    #[test]
    fn a_tenant_waits_for_itself_and_for_the_share_of_others() {
        let mut backlog = Backlog::new(256, 100_000);
        for (tenant, weight, num_requests) in [(ALICE, 1, 100), (BOB, 2, 3)] {
            backlog.reserve(tenant, weight, num_requests).expect("room");
            backlog.add_tokens(tenant, 10 * u64::from(num_requests)).expect("room");
        }
        // Bob's third comes after two of his own and the one that Alice is served meanwhile.
        assert_eq!(backlog.ahead(BOB, 8), Ahead { num_requests: 3, num_tokens: 45, within_share: true });
        assert_eq!(backlog.ahead(BOB, 3), Ahead { num_requests: 3, num_tokens: 45, within_share: false });
        assert_eq!(backlog.ahead(ALICE, 8), Ahead { num_requests: 102, num_tokens: 1030, within_share: false });
        assert_eq!(backlog.ahead(9, 8), Ahead::default());
    }
}
