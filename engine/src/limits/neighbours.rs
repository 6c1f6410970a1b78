//! Engines of this process that share a device, and whether one was busy while another's step ran.
//!
//! Invariant: an engine is a neighbour of those that joined under the same device id, while it lives. It knows no time:
//! only whether a step of another was in flight, at some moment between a step's submission and its end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

static DEVICES: Mutex<Option<HashMap<String, Members>>> = Mutex::new(None);

type Members = Arc<Mutex<Vec<Arc<Member>>>>;

#[derive(Debug)]
struct Member {
    name: String,
    num_submitted: AtomicU64,
    num_in_flight: AtomicU32,
}

/// An engine's place among those of its device.
#[derive(Debug)]
pub struct Membership {
    me: Arc<Member>,
    all: Members,
}

/// What others had done when a step was submitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Company {
    is_busy: bool,
    num_submitted: u64,
}

impl Membership {
    /// Joins the engines on `device_id` under a name that people know this one by.
    pub fn join(device_id: &str, name: &str) -> Membership {
        let mut devices = lock(&DEVICES);
        let all = devices.get_or_insert_default().entry(device_id.to_owned()).or_default().clone();
        let me = Member { name: name.to_owned(), num_submitted: AtomicU64::new(0), num_in_flight: AtomicU32::new(0) };
        let me = Arc::new(me);
        lock(&all).push(me.clone());
        Membership { me, all }
    }

    /// Names of the others.
    pub fn others(&self) -> Vec<String> {
        lock(&self.all).iter().filter(|other| !Arc::ptr_eq(other, &self.me)).map(|other| other.name.clone()).collect()
    }

    /// This engine has submitted a step.
    pub fn submitted(&self) -> Company {
        self.me.num_submitted.fetch_add(1, Ordering::AcqRel);
        self.me.num_in_flight.fetch_add(1, Ordering::AcqRel);
        self.company()
    }

    /// Its oldest step, beside which `then` was seen, has ended; whether it ran in company.
    pub fn ended(&self, then: Company) -> bool {
        self.me.num_in_flight.fetch_sub(1, Ordering::AcqRel);
        self.had(then)
    }

    /// Whether that step has run in company until now.
    pub fn had(&self, then: Company) -> bool {
        let now = self.company();
        then.is_busy || now.is_busy || now.num_submitted > then.num_submitted
    }

    fn company(&self) -> Company {
        let all = lock(&self.all);
        let others = all.iter().filter(|other| !Arc::ptr_eq(other, &self.me));
        others.fold(Company::default(), |company, other| Company {
            is_busy: company.is_busy || other.num_in_flight.load(Ordering::Acquire) > 0,
            num_submitted: company.num_submitted + other.num_submitted.load(Ordering::Acquire),
        })
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        lock(&self.all).retain(|other| !Arc::ptr_eq(other, &self.me));
    }
}

/// Lists and numbers, whole after every write.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_step_of_another_is_company() {
        let device = "a device of this test";
        let (a, b) = (Membership::join(device, "a"), Membership::join(device, "b"));
        let elsewhere = Membership::join("another device of this test", "c");
        assert_eq!((a.others(), b.others(), elsewhere.others()), (vec!["b".to_owned()], vec!["a".to_owned()], vec![]));
        elsewhere.submitted();
        let alone = a.submitted();
        assert!(!a.ended(alone));
        // It was there when the step began, or came and went, or is there at the end.
        let (of_b, of_a) = (b.submitted(), a.submitted());
        assert!(b.ended(of_b));
        assert!(a.ended(of_a));
        let of_a = a.submitted();
        let of_b = b.submitted();
        assert!(b.ended(of_b) && a.ended(of_a));
        let of_a = a.submitted();
        let of_b = b.submitted();
        assert!(a.ended(of_a) && b.ended(of_b));
        drop(b);
        assert_eq!(a.others(), Vec::<String>::new());
    }
}
