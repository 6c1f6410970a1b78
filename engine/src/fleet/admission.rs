//! Who is let in: a place is taken before a request's text is read, and given back as the request goes on.
//!
//! Invariant: nothing here waits. A full backlog is an answer that says when to come again; what can never be taken is
//! refused for good, and nobody else is.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Fleet, Handed, Shared, lock};
use crate::arrival::Arrival;
use crate::backlog::{Amount, Backlog, Limit, Overflow, Refusal};
use crate::config::UnfitRequest;
use crate::forecast::TooLate;
use crate::request::{Event, Flow, Request, Share, Sink};
use crate::worker::ENDED;

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    #[error("{}; try again in {} s", too_many(.0), .1.as_secs())]
    Full(Overflow, Duration),
    #[error("{}", never_fits(*.limit, *.wanted, *.max))]
    NeverFits { limit: Limit, wanted: u64, max: u64 },
    #[error(
        "{} ms are predicted to the first token, and at most {max_queue_ms} are waited; try again in {} s",
        .predicted.as_millis(), .retry_after.as_secs()
    )]
    TooLate { predicted: Duration, max_queue_ms: u32, retry_after: Duration },
    #[error(
        "the first token of a prompt of {prompt_tokens} tokens takes {} ms on this device even alone, and at most \
         {max_queue_ms} are waited; shorten the prompt", .predicted.as_millis()
    )]
    NeverInTime { prompt_tokens: u64, predicted: Duration, max_queue_ms: u32 },
    #[error(transparent)]
    Unfit(#[from] UnfitRequest),
    #[error("the engine has stopped: {reason}")]
    Stopped { reason: String },
}

/// A request's place among those that wait, later among those that run; given back when dropped.
pub struct Place {
    backlog: Arc<Mutex<Backlog>>,
    tenant: u64,
    /// Of its prompt; 0 until they are known.
    num_tokens: u64,
    begun: bool,
    /// Nothing waited and nothing ran when it was taken.
    is_first: bool,
}

impl Fleet {
    /// Whether anybody could get a place now: what is asked before a request is read.
    pub fn check_full(&self) -> Result<(), SubmitError> {
        let (full, total) = {
            let backlog = lock(&self.0.backlog);
            (backlog.check_full(), backlog.total())
        };
        full.map_err(|overflow| self.full(overflow, total))
    }

    /// Places for `num_requests` of a tenant, all or none: what is asked before their text is read.
    pub fn reserve(&self, tenant: u64, share: Share, num_requests: u32) -> Result<Vec<Place>, SubmitError> {
        let (is_first, reserved, total) = {
            let mut backlog = lock(&self.0.backlog);
            (backlog.is_idle(), backlog.reserve(tenant, share.weight, num_requests), backlog.total())
        };
        reserved.map_err(|refusal| self.refused(refusal, total))?;
        let place = |_| Place { backlog: self.0.backlog.clone(), tenant, num_tokens: 0, begun: false, is_first };
        let places = (0..num_requests).map(place).collect();
        // Those before it may be late enough already.
        self.check_in_time(tenant, 0, is_first)?;
        Ok(places)
    }

    /// Takes room for the prompt of each place, whose tokens are known before it is handed in, or for none.
    pub fn hold_tokens(&self, places: &mut [Place], prompts: impl Fn(usize) -> u64) -> Result<(), SubmitError> {
        let Some(&Place { tenant, is_first, .. }) = places.first() else { return Ok(()) };
        let missing = |(index, place): (usize, &Place)| prompts(index) - place.num_tokens;
        let num_tokens = places.iter().enumerate().map(missing).sum();
        if num_tokens == 0 {
            return Ok(());
        }
        let (added, total) = {
            let mut backlog = lock(&self.0.backlog);
            (backlog.add_tokens(tenant, num_tokens), backlog.total())
        };
        added.map_err(|refusal| self.refused(refusal, total))?;
        places.iter_mut().enumerate().for_each(|(index, place)| place.num_tokens = prompts(index));
        let longest = places.iter().map(|place| place.num_tokens).max();
        self.check_in_time(tenant, longest.unwrap_or(0), is_first)
    }

    /// Hands requests of one tenant in, each into a place that was taken for it, all or none; their events go to their
    /// sinks from engine threads.
    pub fn submit(&self, mut places: Vec<Place>, requests: Vec<Handed>) -> Result<(), SubmitError> {
        assert_eq!(places.len(), requests.len(), "a place for each request");
        for (request, _) in &requests {
            self.0.config.fits(request, self.vocab_size())?;
        }
        if let Some(reason) = self.stopped() {
            return Err(SubmitError::Stopped { reason });
        }
        self.hold_tokens(&mut places, |index| requests[index].0.prompt.len() as u64)?;
        for (place, (request, sink)) in places.into_iter().zip(requests) {
            self.send(request, Box::new(Placed { sink, place: Some(place) }))?;
        }
        Ok(())
    }

    /// Hands one request in.
    pub fn submit_one(&self, request: impl Into<Arc<Request>>, sink: Box<dyn Sink>) -> Result<(), SubmitError> {
        let request = request.into();
        self.0.config.fits(&request, self.vocab_size())?;
        let places = self.reserve(request.tenant, request.share, 1)?;
        self.submit(places, vec![(request, sink)])
    }

    fn refused(&self, refusal: Refusal, total: Amount) -> SubmitError {
        match refusal {
            Refusal::Full(overflow) => self.full(overflow, total),
            Refusal::Never { limit, wanted, max } => SubmitError::NeverFits { limit, wanted, max },
        }
    }

    /// An overflow, with when there will be room.
    fn full(&self, overflow: Overflow, total: Amount) -> SubmitError {
        let each = (total.num_tokens / u64::from(total.num_requests.max(1))).max(1);
        let num_requests = match overflow.limit {
            Limit::Requests => overflow.num_excess,
            Limit::Tokens => overflow.num_excess.div_ceil(each),
        };
        let begun_ns = self.load().begun_ns(num_requests as u32, num_requests * each);
        SubmitError::Full(overflow, whole_seconds(Duration::from_nanos(begun_ns)))
    }

    /// Whether the last of a tenant's waiting requests, with a prompt of `own_tokens`, is predicted to have its first
    /// token within `max_queue_ms`.
    fn check_in_time(&self, tenant: u64, own_tokens: u64, is_first: bool) -> Result<(), SubmitError> {
        let Some(max_queue_ms) = self.0.config.max_queue_ms else { return Ok(()) };
        let max = Duration::from_millis(u64::from(max_queue_ms));
        let ahead = lock(&self.0.backlog).ahead(tenant, self.0.config.max_num_seqs);
        self.load().check_in_time(&ahead, own_tokens, is_first, max).map_err(|late| match late {
            TooLate::Ever { predicted } => {
                SubmitError::NeverInTime { prompt_tokens: own_tokens, predicted, max_queue_ms }
            }
            TooLate::Now { predicted } => {
                SubmitError::TooLate { predicted, max_queue_ms, retry_after: whole_seconds(predicted - max) }
            }
        })
    }

    fn send(&self, request: Arc<Request>, sink: Box<dyn Sink>) -> Result<(), SubmitError> {
        let Shared { engines, hasher, dispatch, .. } = &*self.0;
        let chain = hasher.map(|hasher| hasher.of_prompt(&request)).unwrap_or_default();
        if let Some(dispatch) = dispatch {
            dispatch.submit(request, chain, sink);
            return Ok(());
        }
        let stopped = |_| SubmitError::Stopped { reason: self.stopped().unwrap_or_else(|| ENDED.to_owned()) };
        engines[0].submit(Arrival::new(request, chain, hasher.as_ref()), sink).map_err(stopped)
    }
}

/// Rounded up, and at least one: what `Retry-After` can say.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs_f64().ceil().max(1.0) as u64)
}

fn too_many(overflow: &Overflow) -> String {
    let Overflow { limit, num_waiting, max_waiting, .. } = overflow;
    let what = match limit {
        Limit::Requests => "requests",
        Limit::Tokens => "tokens",
    };
    format!("{num_waiting} {what} wait of the {max_waiting} that may, of which some are kept for other tenants")
}

fn never_fits(limit: Limit, wanted: u64, max: u64) -> String {
    match limit {
        Limit::Requests => format!(
            "{wanted} answers were asked for, and no more than {max} requests may wait at a time \
             (max_queued_requests): ask for fewer at once"
        ),
        Limit::Tokens => format!(
            "the prompts have {wanted} tokens together, and no more than {max} may wait at a time \
             (max_queued_tokens): ask for less at once"
        ),
    }
}

/// A request's sink, which gives up its place in the backlog as the request goes on: whoever is told of the end finds
/// it free.
struct Placed {
    sink: Box<dyn Sink>,
    /// Until the end.
    place: Option<Place>,
}

impl Sink for Placed {
    fn event(&mut self, event: Event) -> Flow {
        match (&event, &mut self.place) {
            (Event::Started { .. }, Some(Place { backlog, tenant, num_tokens, begun, .. })) => {
                lock(backlog).begin(*tenant, *num_tokens);
                *begun = true;
            }
            (Event::Finished { .. }, place) => *place = None,
            _ => {}
        }
        self.sink.event(event)
    }

    fn is_closed(&self) -> bool {
        self.sink.is_closed()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut backlog = lock(&self.backlog);
        match self.begun {
            true => backlog.end(self.tenant),
            false => backlog.leave(self.tenant, self.num_tokens),
        }
    }
}
