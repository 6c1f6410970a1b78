//! What a request's text takes before the engine has it: templates, tokenizers, grammars. Computed on threads of its
//! own, so that no connection waits for another's text.
//!
//! Invariant: long texts are read a few at a time, first come, first served, so that they leave cores to the engine and
//! to everybody else; short ones never wait for them. Whoever leaves meanwhile leaves the queue.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::error::ApiError;

pub struct RequestWork {
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
}

/// Above this a body is long: about 4000 tokens, which take a tokenizer some milliseconds.
const LONG_BYTES: usize = 16 << 10;
/// Some of them wait for a grammar and not for a core.
const MAX_SHORT: usize = 64;

impl Default for RequestWork {
    /// Long texts have half of the cores.
    fn default() -> RequestWork {
        let num_cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let lane = |most| Arc::new(Semaphore::new(most));
        RequestWork { short: lane(MAX_SHORT), long: lane((num_cores / 2).max(1)) }
    }
}

impl RequestWork {
    /// Does `work` for a body of `num_bytes`, when its turn has come.
    pub async fn run<T: Send + 'static>(
        &self,
        num_bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let lane = if num_bytes > LONG_BYTES { &self.long } else { &self.short };
        let turn = lane.clone().acquire_owned().await.expect("lanes are never closed");
        let done = spawn_blocking(move || {
            // Kept to the end also where nobody waits for it any more.
            let _turn = turn;
            work()
        });
        done.await.map_err(|_| ApiError::internal("the server met a bug of its own"))?
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::sync::mpsc::channel;
    use std::task::Poll;

    use super::*;

    #[test]
    fn short_texts_do_not_wait_for_long_ones() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let work = RequestWork { long: Arc::new(Semaphore::new(1)), ..RequestWork::default() };
            let (release, released) = channel::<()>();
            let long = work.run(LONG_BYTES + 1, move || Ok(released.recv()));
            let next = work.run(LONG_BYTES + 1, || Ok("next"));
            let (mut long, mut next) = (std::pin::pin!(long), std::pin::pin!(next));
            // The first has its turn, and the second waits for it.
            let begin = poll_fn(|context| {
                let pending = [long.as_mut().poll(context).is_pending(), next.as_mut().poll(context).is_pending()];
                Poll::Ready(pending)
            });
            assert_eq!(begin.await, [true, true]);
            assert_eq!(work.run(LONG_BYTES, || Ok("short")).await.ok(), Some("short"));
            release.send(()).expect("it waits");
            assert!(long.await.is_ok());
            assert_eq!(next.await.ok(), Some("next"));
        });
    }
}
