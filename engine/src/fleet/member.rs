//! What an engine's thread tells the fleet that it serves in. Invariant: it keeps no fleet alive, and waits for none.

use std::sync::{Arc, Weak};

use super::ReplicaId;
use super::dispatch::Dispatch;
use crate::engine::Engine;

#[derive(Clone)]
pub(crate) struct Member {
    id: ReplicaId,
    dispatch: Weak<Dispatch>,
}

impl Member {
    pub(super) fn new(id: ReplicaId, dispatch: &Arc<Dispatch>) -> Member {
        Member { id, dispatch: Arc::downgrade(dispatch) }
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
        self.tell(|dispatch| dispatch.lost(self.id));
    }

    /// The device is there again.
    pub fn recovered(&self) {
        self.tell(|dispatch| dispatch.recovered(self.id));
    }

    /// The thread ends by itself.
    pub fn stopped(&self) {
        self.tell(|dispatch| {
            dispatch.ended(self.id);
            dispatch.lost(self.id);
        });
    }

    fn tell(&self, what: impl FnOnce(&Dispatch)) {
        if let Some(dispatch) = self.dispatch.upgrade() {
            what(&dispatch);
        }
    }
}
