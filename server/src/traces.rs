//! Traces of what requests went through, for a collector that speaks OTLP: a span for each sequence, and in it its
//! stages, queue, prefill and decode. A client's own trace goes on in it (W3C `traceparent`).
//!
//! Invariant: no request waits for a collector. Whoever ends a sequence puts a few numbers into a bounded queue, and
//! what finds it full is dropped and counted; a thread of its own does the rest.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use prometheus::{IntCounter, Registry};
use ureq::Agent;
use warp::http::HeaderMap;

use crate::http::metrics::register;
use crate::start::random;

mod otlp;
mod parent;

use parent::TraceParent;

/// Hands what has ended over to a collector.
pub struct Tracer {
    queue: SyncSender<Message>,
    dropped: IntCounter,
    pub registry: Registry,
}

/// A request's place in a trace.
#[derive(Clone)]
pub struct Trace {
    tracer: Arc<Tracer>,
    trace_id: u128,
    /// The client's span, where it has one.
    parent: Option<u64>,
    model: Arc<str>,
}

/// A sequence that has ended, with what it was at when.
#[derive(Clone, Debug)]
pub struct EndedSequence {
    /// As clients know it.
    pub request: String,
    pub arrived: Instant,
    /// When it had its first step, and its first token, if it came so far.
    pub started: Option<Instant>,
    pub first_token: Option<Instant>,
    pub ended: Instant,
    /// As the log has it.
    pub reason: &'static str,
    pub has_failed: bool,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
}

/// A sequence on its way to the collector.
struct Traced {
    sequence: EndedSequence,
    trace_id: u128,
    parent: Option<u64>,
    model: Arc<str>,
}

enum Message {
    Ended(Box<Traced>),
    /// Send what there is, and say when that is done.
    Flush(SyncSender<()>),
}

/// Sequences that wait to be sent at most; beside these, one batch.
const MAX_QUEUED: usize = 4096;
const MAX_BATCH: usize = 512;
/// A batch waits so long for more.
const LINGER: Duration = Duration::from_secs(1);
/// For the collector to take a batch.
const TIMEOUT: Duration = Duration::from_secs(5);

impl Tracer {
    /// To the collector at `endpoint`, the URL below which `/v1/traces` is.
    pub fn start(endpoint: &str) -> Tracer {
        Tracer::with_queue(endpoint, MAX_QUEUED)
    }

    fn with_queue(endpoint: &str, max_queued: usize) -> Tracer {
        let registry = Registry::new();
        let counter = |name, help| register(&registry, IntCounter::new(name, help));
        let sent = counter("fullbore_traces_sent_total", "Sequences whose spans a collector has taken.");
        let dropped = counter("fullbore_traces_dropped_total", "Those whose spans it did not take, or not in time.");
        let config = Agent::config_builder().timeout_global(Some(TIMEOUT));
        let (queue, receiver) = sync_channel(max_queued);
        let exporter = Exporter {
            receiver,
            agent: config.build().new_agent(),
            url: url(endpoint),
            clock: (Instant::now(), SystemTime::now()),
            sent,
            dropped: dropped.clone(),
            is_failing: false,
        };
        let thread = std::thread::Builder::new().name("traces".to_owned()).spawn(move || exporter.run());
        drop(thread.expect("the system can start one more thread"));
        Tracer { queue, dropped, registry }
    }

    /// A place in the trace that the client's headers tell, else in a new one; none where the client wants none.
    pub fn trace(self: &Arc<Tracer>, headers: &HeaderMap, model: &str) -> Option<Trace> {
        let parent = TraceParent::of(headers);
        let is_wanted = parent.is_none_or(|parent| parent.is_sampled);
        is_wanted.then(|| Trace {
            tracer: self.clone(),
            trace_id: parent
                .map_or_else(|| u128::from(random()) << 64 | u128::from(random()), |parent| parent.trace_id),
            parent: parent.map(|parent| parent.span_id),
            model: model.into(),
        })
    }

    /// Waits until all is sent that has ended, and at most `most`. Blocks.
    pub fn flush(&self, most: Duration) {
        let (done, is_done) = sync_channel(1);
        // A full queue is one that the collector has not kept up with; what is in it is lost.
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            let _ = is_done.recv_timeout(most);
        }
    }
}

impl Trace {
    /// Tells of a sequence of this request. Never waits.
    pub fn end(self, sequence: EndedSequence) {
        let Trace { tracer, trace_id, parent, model } = self;
        let message = Message::Ended(Box::new(Traced { sequence, trace_id, parent, model }));
        if tracer.queue.try_send(message).is_err() {
            tracer.dropped.inc();
        }
    }
}

/// As OTLP has it, also where the whole address was given.
fn url(endpoint: &str) -> String {
    let base = endpoint.trim_end_matches('/');
    if base.ends_with("/v1/traces") { base.to_owned() } else { format!("{base}/v1/traces") }
}

struct Exporter {
    receiver: Receiver<Message>,
    agent: Agent,
    url: String,
    /// The same moment on both clocks.
    clock: (Instant, SystemTime),
    sent: IntCounter,
    dropped: IntCounter,
    /// The last batch was not taken, and the log says so already.
    is_failing: bool,
}

impl Exporter {
    /// Until nobody can send any more.
    fn run(mut self) {
        while let Ok(first) = self.receiver.recv() {
            let (mut batch, mut flushed) = (Vec::new(), None);
            let until = Instant::now() + LINGER;
            let mut next = Ok(first);
            loop {
                match next {
                    Ok(Message::Ended(traced)) => batch.push(*traced),
                    Ok(Message::Flush(done)) => flushed = Some(done),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
                }
                if batch.len() == MAX_BATCH || flushed.is_some() {
                    break;
                }
                next = self.receiver.recv_timeout(until.saturating_duration_since(Instant::now()));
            }
            self.send(&batch);
            if let Some(done) = flushed {
                // Whoever asked may have waited long enough.
                let _ = done.try_send(());
            }
        }
    }

    fn send(&mut self, batch: &[Traced]) {
        if batch.is_empty() {
            return;
        }
        let body = otlp::request(batch, self.clock).to_string();
        let sent = self.agent.post(&self.url).header("content-type", "application/json").send(body);
        match sent {
            Ok(_) => {
                self.sent.inc_by(batch.len() as u64);
                self.is_failing = false;
            }
            Err(error) => {
                self.dropped.inc_by(batch.len() as u64);
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(url = self.url, %error, "traces are dropped: the collector does not take them");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_collectors_address_may_be_given_whole_or_as_a_base() {
        for endpoint in ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"] {
            assert_eq!(url(endpoint), "http://c:4318/v1/traces");
        }
        assert_eq!(url("http://c/otlp"), "http://c/otlp/v1/traces");
    }

    /// A collector that takes connections and says nothing keeps the thread for `TIMEOUT`; ends go on all the same.
    #[test]
    fn a_full_queue_drops_and_counts() {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = silent.local_addr().expect("an address");
        let tracer = Arc::new(Tracer::with_queue(&format!("http://{address}"), 2));
        let trace = tracer.trace(&HeaderMap::new(), "model").expect("a trace of its own");
        let now = Instant::now();
        let sequence = EndedSequence {
            request: "id".to_owned(),
            arrived: now,
            started: None,
            first_token: None,
            ended: now,
            reason: "stop",
            has_failed: false,
            prompt_tokens: 1,
            cached_tokens: 0,
            generated_tokens: 0,
        };
        // A batch is with the thread, two are queued, and of the rest each is counted.
        let num_ended = 3 * MAX_BATCH;
        (0..num_ended).for_each(|_| trace.clone().end(sequence.clone()));
        let dropped = tracer.dropped.get();
        assert!(dropped > 0 && dropped < num_ended as u64, "{dropped}");
    }
}
