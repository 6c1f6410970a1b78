//! Requests that can be aborted, by the names that their clients gave them. Invariant: a request is known from the
//! moment that it was read until its answer is dropped, and to its own client alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

#[derive(Default)]
pub struct Running {
    requests: Mutex<HashMap<Key, Vec<oneshot::Sender<()>>>>,
}

/// Who asks, where keys are checked, and the name of the request. Several may have one name.
type Key = (Option<Arc<str>>, String);

/// A request's place among them.
pub struct Run {
    running: Arc<Running>,
    key: Key,
    /// Told once, when it is aborted.
    pub aborted: oneshot::Receiver<()>,
}

impl Running {
    pub fn enter(self: &Arc<Running>, client: Option<Arc<str>>, request_id: &str) -> Run {
        let (sender, aborted) = oneshot::channel();
        let key = (client, request_id.to_owned());
        self.lock().entry(key.clone()).or_default().push(sender);
        Run { running: self.clone(), key, aborted }
    }

    /// What is not known is over already.
    pub fn abort(&self, client: Option<Arc<str>>, request_id: String) {
        let senders = self.lock().remove(&(client, request_id)).unwrap_or_default();
        for sender in senders {
            // One that has just ended is not there to be told.
            let _ = sender.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Vec<oneshot::Sender<()>>>> {
        // Whole after every write, so a panic elsewhere leaves it usable.
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.aborted.close();
        let mut requests = self.running.lock();
        if let Some(senders) = requests.get_mut(&self.key) {
            senders.retain(|sender| !sender.is_closed());
            if senders.is_empty() {
                requests.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_aborts_its_own_by_name() {
        let running = Arc::new(Running::default());
        let [alice, bob] = ["alice", "bob"].map(|name| Some(Arc::from(name)));
        let mut runs = [&alice, &alice, &bob, &bob].map(|client| running.enter(client.clone(), "x"));
        running.abort(alice.clone(), "y".to_owned());
        running.abort(None, "x".to_owned());
        assert!(runs.iter_mut().all(|run| run.aborted.try_recv().is_err()));
        running.abort(alice, "x".to_owned());
        let aborted = runs.each_mut().map(|run| run.aborted.try_recv().is_ok());
        assert_eq!(aborted, [true, true, false, false]);
        let [.., one, other] = runs;
        drop(one);
        assert_eq!(running.lock().len(), 1);
        drop(other);
        assert!(running.lock().is_empty());
    }
}
