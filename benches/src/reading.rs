//! What comes before an engine: requests arrive, and the texts of their prompts become tokens, on so many threads,
//! first come, first served.
//!
//! Invariant: requests come to the engine in the order of their arrival, whichever has been read first.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::play::{Clock, lock};
use crate::workload::PlannedRequest;

/// Requests on their way to the engine.
pub enum Reading {
    /// When each has been read is known beforehand.
    Timed(Vec<Duration>),
    /// Threads are at it.
    Threads(Arc<Readers>),
}

/// What it takes to read texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TextPrice {
    /// Threads that read, one text each.
    pub num_threads: u32,
    /// Of a prompt.
    pub ns_per_token: f64,
}

impl TextPrice {
    /// Prompt tokens that are read a second, on all threads.
    pub fn tokens_per_s(&self) -> f64 {
        f64::from(self.num_threads) * 1e9 / self.ns_per_token
    }
}

impl Reading {
    /// Prompts are token ids: there is nothing to read.
    pub fn of_ids(requests: &[PlannedRequest]) -> Reading {
        Reading::Timed(requests.iter().map(|request| request.arrival).collect())
    }

    /// Each takes what `price` says, on the thread that is free first.
    pub fn priced(requests: &[PlannedRequest], price: TextPrice) -> Reading {
        let mut free_at = vec![Duration::ZERO; price.num_threads.max(1) as usize];
        let mut last = Duration::ZERO;
        let read_at = requests.iter().map(|request| {
            let thread = free_at.iter_mut().min().expect("there is a thread");
            let takes = Duration::from_nanos((f64::from(request.prompt_tokens) * price.ns_per_token) as u64);
            *thread = request.arrival.max(*thread) + takes;
            last = last.max(*thread);
            last
        });
        Reading::Timed(read_at.collect())
    }

    /// Reads `texts`, one a request, by `read` on so many threads from now on, which is 0 of `clock`.
    pub fn start(
        requests: &[PlannedRequest],
        texts: Vec<String>,
        num_threads: u32,
        read: Arc<dyn Fn(&str) + Send + Sync>,
        clock: &Clock,
    ) -> std::io::Result<Reading> {
        assert_eq!(requests.len(), texts.len(), "a text for each request");
        let due = requests.iter().map(|request| request.arrival).zip(texts).collect();
        let progress = Mutex::new(Progress { is_read: vec![false; requests.len()], num_in_order: 0 });
        let readers = Arc::new(Readers { due, next: AtomicUsize::new(0), progress, is_more: Condvar::new() });
        for _ in 0..num_threads.max(1) {
            let (readers, read, clock) = (readers.clone(), read.clone(), clock.clone());
            std::thread::Builder::new().name("text".to_owned()).spawn(move || readers.run(&*read, &clock))?;
        }
        Ok(Reading::Threads(readers))
    }

    /// Requests that have been read by `now`.
    pub(crate) fn num_read(&self, now: Duration) -> usize {
        match self {
            Reading::Timed(read_at) => read_at.partition_point(|&at| at <= now),
            Reading::Threads(readers) => lock(&readers.progress).num_in_order,
        }
    }

    /// Until one more has been read; not all have been.
    pub(crate) fn wait(&self, clock: &Clock) {
        match self {
            Reading::Timed(read_at) => clock.wait_until(read_at[self.num_read(clock.now())]),
            Reading::Threads(readers) => {
                let progress = lock(&readers.progress);
                let before = progress.num_in_order;
                let waited = readers.is_more.wait_while(progress, |progress| progress.num_in_order == before);
                drop(waited.unwrap_or_else(PoisonError::into_inner));
            }
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Reading::Threads(readers) = self {
            readers.next.store(readers.due.len(), Ordering::Relaxed);
        }
    }
}

/// Threads that read texts, each the next one.
pub struct Readers {
    /// When each arrives, and what it says.
    due: Vec<(Duration, String)>,
    next: AtomicUsize,
    progress: Mutex<Progress>,
    is_more: Condvar,
}

struct Progress {
    is_read: Vec<bool>,
    /// That have been read with all before them.
    num_in_order: usize,
}

impl Readers {
    fn run(&self, read: &(dyn Fn(&str) + Send + Sync), clock: &Clock) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((arrival, text)) = self.due.get(index) else { return };
            clock.wait_until(*arrival);
            read(text);
            let mut progress = lock(&self.progress);
            progress.is_read[index] = true;
            let rest = &progress.is_read[progress.num_in_order..];
            progress.num_in_order += rest.iter().take_while(|&&is_read| is_read).count();
            self.is_more.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn requests(lengths: &[(u64, u32)]) -> Vec<PlannedRequest> {
        let request = |&(arrival_ms, prompt_tokens): &(u64, u32)| PlannedRequest {
            arrival: Duration::from_millis(arrival_ms),
            prompt_tokens,
            ..PlannedRequest::default()
        };
        lengths.iter().map(request).collect()
    }

    #[test]
    fn texts_are_read_on_the_thread_that_is_free_first_and_come_in_their_order() {
        let price = TextPrice { num_threads: 2, ns_per_token: 1e6 };
        let requests = requests(&[(0, 10), (0, 4), (0, 3), (50, 5)]);
        let Reading::Timed(read_at) = &Reading::priced(&requests, price) else { panic!("it is known beforehand") };
        // The second and the third are read by 4 and 7 ms, and wait for the first.
        assert_eq!(read_at.iter().map(Duration::as_millis).collect::<Vec<_>>(), [10, 10, 10, 55]);
        assert_eq!(price.tokens_per_s(), 2000.0);
    }

    #[test]
    fn threads_read_every_text_once() {
        let requests = requests(&[(0, 1), (0, 1), (1, 1), (2, 1)]);
        let texts: Vec<String> = (0..requests.len()).map(|index| index.to_string()).collect();
        let (sum, clock) = (Arc::new(AtomicUsize::new(0)), Clock::Real(Instant::now()));
        let seen = sum.clone();
        let read = Arc::new(move |text: &str| {
            seen.fetch_add(text.parse::<usize>().expect("a number"), Ordering::Relaxed);
        });
        let reading = Reading::start(&requests, texts, 3, read, &clock).expect("threads");
        while reading.num_read(clock.now()) < requests.len() {
            reading.wait(&clock);
        }
        assert_eq!(sum.load(Ordering::Relaxed), 6);
        assert!(clock.now() >= Duration::from_millis(2));
    }
}
