//! Answers as server-sent events, by a body of our own.
//!
//! Invariant: nothing follows an error, of which a panic is one. While there is nothing to say, the stream says that
//! somebody is there, also before the answer is prepared. Dropping the body drops the generation's receivers, and so
//! frees its blocks.

use std::convert::Infallible;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream};
use tokio::time::{Instant, Interval, Sleep, interval, sleep};
use warp::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use warp::reply::{self, Reply, Response};

use super::App;
use super::error::ApiError;
use crate::api::{Answer, Endpoint, Event, Generation, ServedModel};

/// An answer that is about to begin.
pub struct Prepared {
    pub model: Arc<ServedModel>,
    pub answer: Box<dyn Answer>,
    pub generation: Generation,
}

struct EventStream {
    app: Arc<App>,
    prepared: Prepared,
    /// Events made and not yet sent, as they are written.
    written: Vec<u8>,
    /// When there may be something to say about having nothing to say: never too late, and at first too early.
    silence: Pin<Box<Sleep>>,
    spoken_at: Instant,
    ended: bool,
}

/// A stream whose answer is still being prepared.
struct LateStream {
    app: Arc<App>,
    endpoint: Endpoint,
    stage: Stage,
    silence: Interval,
}

enum Stage {
    /// Never locked: a stream has to be `Sync`, and is polled by one alone.
    Preparing(Mutex<BoxFuture<'static, Result<Prepared, ApiError>>>),
    Answering(EventStream),
    Ended,
}

/// What goes in one piece, about: events that came together leave together.
const PIECE_BYTES: usize = 16 << 10;

pub fn response(app: Arc<App>, prepared: Prepared) -> Response {
    respond(EventStream::new(app, prepared))
}

/// Begins with a sign of life; an answer that cannot be prepared is an event then, for the status is told.
pub fn late_response(
    app: Arc<App>,
    endpoint: Endpoint,
    prepared: impl Future<Output = Result<Prepared, ApiError>> + Send + 'static,
) -> Response {
    // Its first tick is at once.
    let silence = interval(app.limits.keep_alive);
    respond(LateStream { app, endpoint, stage: Stage::Preparing(Mutex::new(prepared.boxed())), silence })
}

fn respond(stream: impl Stream<Item = Result<Bytes, Infallible>> + Send + Sync + 'static) -> Response {
    let mut response = reply::stream(stream).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl EventStream {
    fn new(app: Arc<App>, mut prepared: Prepared) -> EventStream {
        let mut written = Vec::new();
        prepared.answer.begin(&prepared.generation).iter().for_each(|event| event.write(&mut written));
        let silence = Box::pin(sleep(app.limits.keep_alive));
        EventStream { app, prepared, written, silence, spoken_at: Instant::now(), ended: false }
    }

    /// Writes what has come, up to about a piece.
    fn write(&mut self, context: &mut Context<'_>) {
        let Prepared { model, answer, generation } = &mut self.prepared;
        while !self.ended && self.written.len() < PIECE_BYTES {
            let Poll::Ready(next) = generation.poll_next(context) else { return };
            let usage = generation.usage();
            self.ended = !matches!(next, Some(Ok(_)));
            let events = match next {
                Some(Ok(delta)) => answer.more(model, delta, usage),
                Some(Err(error)) => {
                    self.app.metrics.count_late_error(&error);
                    answer.fail(&error, usage)
                }
                None => answer.end(usage),
            };
            events.iter().for_each(|event| event.write(&mut self.written));
        }
    }

    /// Ready when nothing was said for as long as may be.
    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.silence.as_mut().poll(context));
            // Set anew when it is over and not with every word, of which there are many.
            let keep_alive = self.app.limits.keep_alive;
            let (now, due) = (Instant::now(), self.spoken_at + keep_alive);
            self.silence.as_mut().reset(if due > now { due } else { now + keep_alive });
            if due <= now {
                return Poll::Ready(());
            }
        }
    }
}

impl Stream for EventStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if catch_unwind(AssertUnwindSafe(|| this.write(context))).is_err() {
            this.app.metrics.count_panic();
            this.ended = true;
            let error = ApiError::bug();
            this.app.metrics.count_late_error(&error);
            let Prepared { answer, generation, .. } = &mut this.prepared;
            generation.fail();
            let told = answer.fail(&error, generation.usage());
            told.iter().for_each(|event| event.write(&mut this.written));
        }
        if this.written.is_empty() {
            if this.ended {
                return Poll::Ready(None);
            }
            ready!(this.poll_silence(context));
            this.prepared.answer.keep_alive().write(&mut this.written);
        }
        this.spoken_at = Instant::now();
        Poll::Ready(Some(Ok(Bytes::from(std::mem::take(&mut this.written)))))
    }
}

impl Stream for LateStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let mut written = Vec::new();
        match &mut this.stage {
            Stage::Answering(stream) => return Pin::new(stream).poll_next(context),
            Stage::Ended => return Poll::Ready(None),
            Stage::Preparing(prepared) => {
                let prepared = prepared.get_mut().unwrap_or_else(PoisonError::into_inner);
                let polled = catch_unwind(AssertUnwindSafe(|| prepared.as_mut().poll(context)));
                let polled = polled.unwrap_or_else(|_| {
                    this.app.metrics.count_panic();
                    Poll::Ready(Err(ApiError::bug()))
                });
                match polled {
                    Poll::Ready(Ok(prepared)) => {
                        this.stage = Stage::Answering(EventStream::new(this.app.clone(), prepared));
                        return self.poll_next(context);
                    }
                    Poll::Ready(Err(error)) => {
                        this.stage = Stage::Ended;
                        this.app.metrics.count_late_error(&error);
                        error.event(this.endpoint).write(&mut written);
                    }
                    Poll::Pending => {
                        ready!(this.silence.poll_tick(context));
                        Event::KEEP_ALIVE.write(&mut written);
                    }
                }
            }
        }
        Poll::Ready(Some(Ok(Bytes::from(written))))
    }
}

#[cfg(test)]
mod tests {
    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::config::EngineConfig;
    use http_body_util::BodyExt;
    use serde_json::{Value, json};

    use super::*;
    use crate::api::{self, Delta, Usage};
    use crate::http::accept::Limits;
    use crate::http::access::{Access, Client};
    use crate::http::metrics;
    use crate::start::Plan;

    /// An answer with a bug in it.
    struct Buggy(Box<dyn Answer>);

    impl Answer for Buggy {
        fn is_streamed(&self) -> bool {
            true
        }

        fn more(&mut self, _: &ServedModel, _: Delta, _: Usage) -> Vec<Event> {
            panic!("a bug that a test planted")
        }

        fn fail(&mut self, error: &ApiError, usage: Usage) -> Vec<Event> {
            self.0.fail(error, usage)
        }

        fn whole(&mut self, model: &ServedModel, choices: Vec<Delta>, usage: Usage) -> Value {
            self.0.whole(model, choices, usage)
        }
    }

    #[tokio::test]
    async fn a_panic_ends_one_stream_with_a_sentence() {
        let backend = Box::new(SimBackend::new(SimOptions::default()));
        let plan = Plan::of("sim", Bundle::simulated(), backend, EngineConfig::default(), 0);
        let model = Arc::new(plan.load().expect("the simulator loads"));
        let app = Arc::new(App::new(Limits::default(), Access::default(), None, None));
        let body = json!({"prompt": "x", "max_tokens": 8, "stream": true, "ignore_eos": true});
        let prepared = api::prepare(Endpoint::Completions, &model, &Client::default(), &body);
        let (answer, jobs) = prepared.expect("a request");
        let generation = Generation::submit(&model, jobs, std::time::Instant::now(), None, None).expect("a place");
        let answer = Box::new(Buggy(answer));
        let response = response(app.clone(), Prepared { model: model.clone(), answer, generation });
        let told = response.into_body().collect().await.expect("an end").to_bytes();
        let told = String::from_utf8(told.to_vec()).expect("text");
        let event = told.strip_prefix("data: ").and_then(|rest| rest.strip_suffix("\n\n")).expect("one event");
        let event: Value = serde_json::from_str(event).expect("JSON");
        assert_eq!((&event["error"]["code"], app.metrics.num_panics()), (&json!("internal_error"), 1), "{event}");
        let counted = metrics::metrics(&app).into_body().collect().await.expect("an end").to_bytes();
        let counted = String::from_utf8(counted.to_vec()).expect("text");
        assert!(counted.contains("fullbore_requests_refused_total{cause=\"internal_error\"} 1\n"), "{counted}");
        model.end();
        assert_eq!(model.engine.stats().blocks.referenced, 0);
    }
}
