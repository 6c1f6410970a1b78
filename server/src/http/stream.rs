//! Answers as server-sent events, by a body of our own.
//!
//! Invariant: each frame is `data: {...}` and an empty line; the last is `data: [DONE]`, except after an error, which
//! is the last event itself. Dropping the body drops the generation's receivers, and so frees its blocks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures_util::Stream;
use serde_json::Value;
use warp::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use warp::reply::{self, Reply, Response};

use super::App;
use crate::api::{Exchange, Generation, ServedModel};

struct EventStream {
    app: Arc<App>,
    model: Arc<ServedModel>,
    exchange: Exchange,
    generation: Generation,
    arrived: Instant,
    /// Events made and not yet sent.
    frames: VecDeque<Bytes>,
    has_token: bool,
    ended: bool,
}

pub fn response(
    app: Arc<App>,
    model: Arc<ServedModel>,
    exchange: Exchange,
    generation: Generation,
    arrived: Instant,
) -> Response {
    let frames = exchange.first_chunks(&generation).iter().map(frame).collect();
    let stream = EventStream { app, model, exchange, generation, arrived, frames, has_token: false, ended: false };
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
                return Poll::Ready(Some(Ok(frame)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            match ready!(this.generation.poll_next(context)) {
                Some(Ok(delta)) => {
                    if !std::mem::replace(&mut this.has_token, true) {
                        this.app.metrics.observe_first_token(this.arrived.elapsed());
                    }
                    this.frames.push_back(frame(&this.exchange.chunk(&this.model, &delta)));
                }
                Some(Err(error)) => {
                    this.frames.push_back(frame(&error.json()));
                    this.ended = true;
                }
                None => {
                    this.app.metrics.observe_end(this.arrived.elapsed());
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
