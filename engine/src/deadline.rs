//! Work on what strangers wrote, on a thread of its own: with a deep stack, because they nest, and with a deadline.
//!
//! Invariant: the caller goes on when the deadline is over. A thread cannot be stopped, so late work goes on too;
//! whoever calls sees to it that not much of it comes together.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Why a thread gave no result.
pub(crate) enum Lost<T> {
    /// Here it may still come.
    Late(mpsc::Receiver<T>),
    /// The work met a bug.
    Failed(String),
    /// The system had no thread to give.
    NotStarted(String),
}

/// What a panic is told as; its own words are in the log.
pub(crate) const BUG: &str = "what works on it met a bug of its own";

/// Does `work` on a thread, and leaves that thread alone once the deadline is over.
pub(crate) fn with_deadline<T: Send + 'static>(
    name: &str,
    stack_bytes: usize,
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Lost<T>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let thread = thread::Builder::new().name(name.to_owned()).stack_size(stack_bytes);
    // Nobody listens any more after the deadline.
    let spawned = thread.spawn(move || drop(sender.send(work())));
    spawned.map_err(|error| Lost::NotStarted(format!("no thread could be started for it: {error}")))?;
    receiver.recv_timeout(deadline).map_err(|error| match error {
        mpsc::RecvTimeoutError::Timeout => Lost::Late(receiver),
        mpsc::RecvTimeoutError::Disconnected => Lost::Failed(BUG.to_owned()),
    })
}
