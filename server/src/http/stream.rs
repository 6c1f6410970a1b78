//! Answers as server-sent events, by a body of our own.
//!
//! Invariant: nothing follows an error. While there is nothing to say, the stream says that somebody is there. Dropping
//! the body drops the generation's receivers, and so frees its blocks.

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

use crate::api::{Answer, Generation, ServedModel};

struct EventStream {
    model: Arc<ServedModel>,
    answer: Box<dyn Answer>,
    generation: Generation,
    /// Events made and not yet sent, as they are written.
    written: Vec<u8>,
    /// When there may be something to say about having nothing to say: never too late, and at first too early.
    silence: Pin<Box<Sleep>>,
    keep_alive: Duration,
    spoken_at: Instant,
    ended: bool,
}

/// What goes in one piece, about: events that came together leave together.
const PIECE_BYTES: usize = 16 << 10;

pub fn response(
    keep_alive: Duration,
    model: Arc<ServedModel>,
    mut answer: Box<dyn Answer>,
    generation: Generation,
) -> Response {
    let mut written = Vec::new();
    answer.begin(&generation).iter().for_each(|event| event.write(&mut written));
    let stream = EventStream {
        model,
        answer,
        generation,
        written,
        silence: Box::pin(sleep(keep_alive)),
        keep_alive,
        spoken_at: Instant::now(),
        ended: false,
    };
    let mut response = reply::stream(stream).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl EventStream {
    /// Writes what has come, up to about a piece.
    fn write(&mut self, context: &mut Context<'_>) {
        while !self.ended && self.written.len() < PIECE_BYTES {
            let Poll::Ready(next) = self.generation.poll_next(context) else { return };
            let usage = self.generation.usage();
            self.ended = !matches!(next, Some(Ok(_)));
            let events = match next {
                Some(Ok(delta)) => self.answer.more(&self.model, delta, usage),
                Some(Err(error)) => self.answer.fail(&error, usage),
                None => self.answer.end(usage),
            };
            events.iter().for_each(|event| event.write(&mut self.written));
        }
    }

    /// Ready when nothing was said for as long as may be.
    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.silence.as_mut().poll(context));
            // Set anew when it is over and not with every word, of which there are many.
            let (now, due) = (Instant::now(), self.spoken_at + self.keep_alive);
            self.silence.as_mut().reset(if due > now { due } else { now + self.keep_alive });
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
        this.write(context);
        if this.written.is_empty() {
            if this.ended {
                return Poll::Ready(None);
            }
            ready!(this.poll_silence(context));
            this.answer.keep_alive().write(&mut this.written);
        }
        this.spoken_at = Instant::now();
        Poll::Ready(Some(Ok(Bytes::from(std::mem::take(&mut this.written)))))
    }
}
