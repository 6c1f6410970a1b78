//! What an engine's thread tells the fleet that it serves in. Invariant: it keeps no fleet alive, and waits for none.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use super::ReplicaId;
use super::dispatch::Dispatch;
use crate::engine::Engine;

#[derive(Clone)]
pub(crate) struct Member {
    id: ReplicaId,
    dispatch: Weak<Dispatch>,
    /// By replica, of the whole fleet: whether its device is there.
    there: Arc<[AtomicBool]>,
}

impl Member {
    /// One for each of so many replicas.
    pub(super) fn all(num_replicas: usize, dispatch: &Arc<Dispatch>) -> Vec<Member> {
        let there: Arc<[AtomicBool]> = (0..num_replicas).map(|_| AtomicBool::new(true)).collect();
        let member = |id| Member { id, dispatch: Arc::downgrade(dispatch), there: there.clone() };
        (0..).map(ReplicaId).take(num_replicas).map(member).collect()
    }

    /// Before its thread starts.
    pub fn join(&self, engine: &mut Engine) {
        engine.cache_mut().keep_block_events();
        self.tell(|dispatch| engine.share_ledger(dispatch.ledger.clone()));
    }

    /// After a step, and now and then while there is nothing to do.
    pub fn stepped(&self, engine: &mut Engine) {
        self.tell(|dispatch| dispatch.stepped(self.id, engine));
    }

    /// The device is gone; its engine tells next whom it was working for.
    pub fn lost(&self) {
        self.set_there(false);
        self.tell(|dispatch| dispatch.lost(self.id));
    }

    /// The device is there again.
    pub fn recovered(&self) {
        self.set_there(true);
        self.tell(|dispatch| dispatch.recovered(self.id));
    }

    /// The thread ends by itself.
    pub fn stopped(&self) {
        self.set_there(false);
        self.tell(|dispatch| {
            dispatch.ended(self.id);
            dispatch.lost(self.id);
        });
    }

    /// Whether another device is there.
    pub fn others_serve(&self) -> bool {
        let mut all = (0..).map(ReplicaId).zip(self.there.iter());
        all.any(|(id, is_there)| id != self.id && is_there.load(Ordering::Relaxed))
    }

    fn set_there(&self, is_there: bool) {
        self.there[usize::from(self.id.0)].store(is_there, Ordering::Relaxed);
    }

    fn tell(&self, what: impl FnOnce(&Dispatch)) {
        if let Some(dispatch) = self.dispatch.upgrade() {
            what(&dispatch);
        }
    }
}
