//! Answers as server-sent events, by a body of our own.
//!
//! Invariant: each frame is `data: {...}` and an empty line; the last is `data: [DONE]`, except after an error, which
//! is the last event itself. While there is nothing to say, comments say that somebody is there. Dropping the body drops
//! the generation's receivers, and so frees its blocks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use serde_json::Value;
use tokio::time::{Instant, Sleep, sleep};
use warp::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use warp::reply::{self, Reply, Response};

use crate::api::{Exchange, Generation, ServedModel};

struct EventStream {
    model: Arc<ServedModel>,
    exchange: Exchange,
    generation: Generation,
    /// Events made and not yet sent.
    frames: VecDeque<Bytes>,
    /// When to say that there is nothing to say, and how long after the last word.
    silence: Pin<Box<Sleep>>,
    keep_alive: Duration,
    ended: bool,
}

pub fn response(keep_alive: Duration, model: Arc<ServedModel>, exchange: Exchange, generation: Generation) -> Response {
    let frames = exchange.first_chunks(&generation).iter().map(frame).collect();
    let stream = EventStream {
        model,
        exchange,
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
                this.frames.push_back(Bytes::from_static(b": keep-alive\n\n"));
                continue;
            };
            match next {
                Some(Ok(delta)) => {
                    this.frames.push_back(frame(&this.exchange.chunk(&this.model, &delta)));
                }
                Some(Err(error)) => {
                    this.frames.push_back(frame(&error.json()));
                    this.ended = true;
                }
                None => {
                    this.frames.extend(this.exchange.usage_chunk(&this.generation).iter().map(frame));
                    this.frames.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                    this.ended = true;
                }
            }
        }
    }
}

/// JSON as serde writes it has no line breaks, so one `data:` line holds it.
fn frame(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}
