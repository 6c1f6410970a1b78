//! Answers as server-sent events, by a body of our own.
//!
//! Invariant: nothing follows an error. While there is nothing to say, the stream says that somebody is there. Dropping
//! the body drops the generation's receivers, and so frees its blocks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use tokio::time::{Instant, Sleep, sleep};
use warp::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use warp::reply::{self, Reply, Response};

use crate::api::{Answer, Event, Generation, ServedModel};

struct EventStream {
    model: Arc<ServedModel>,
    answer: Box<dyn Answer>,
    generation: Generation,
    /// Events made and not yet sent.
    frames: VecDeque<Bytes>,
    /// When to say that there is nothing to say, and how long after the last word.
    silence: Pin<Box<Sleep>>,
    keep_alive: Duration,
    ended: bool,
}

pub fn response(
    keep_alive: Duration,
    model: Arc<ServedModel>,
    mut answer: Box<dyn Answer>,
    generation: Generation,
) -> Response {
    let frames = answer.begin(&generation).iter().map(Event::frame).collect();
    let stream = EventStream {
        model,
        answer,
        generation,
        frames,
        silence: Box::pin(sleep(keep_alive)),
        keep_alive,
        ended: false,
    };
    let mut response = reply::stream(stream).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl Stream for EventStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(frame) = this.frames.pop_front() {
                this.silence.as_mut().reset(Instant::now() + this.keep_alive);
                return Poll::Ready(Some(Ok(frame)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            let Poll::Ready(next) = this.generation.poll_next(context) else {
                ready!(this.silence.as_mut().poll(context));
                this.frames.push_back(this.answer.keep_alive());
                continue;
            };
            let usage = this.generation.usage();
            this.ended = !matches!(next, Some(Ok(_)));
            let events = match next {
                Some(Ok(delta)) => this.answer.more(&this.model, delta, usage),
                Some(Err(error)) => this.answer.fail(&error, usage),
                None => this.answer.end(usage),
            };
            this.frames.extend(events.iter().map(Event::frame));
        }
    }
}
