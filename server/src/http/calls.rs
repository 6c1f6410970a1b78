//! Calls on a connection of HTTP/2, each with a limit of time on what its client takes. Of the connection itself
//! [`super::client_stream`] knows no more than that it is alive: its client may answer pings and give no call any room.
//! Invariant: a call whose client takes nothing of a piece that is there for it ends, and no other with it.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::rt::Executor;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// Runs calls.
#[derive(Clone)]
pub struct Calls {
    /// For a client to take a piece.
    limit: Duration,
    count: watch::Sender<Count>,
}

/// Of a connection.
#[derive(Clone, Copy, Default)]
struct Count {
    open: u64,
    begun: u64,
}

/// A call is open as long as this is there.
struct Open(watch::Sender<Count>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|count| count.open -= 1);
    }
}

impl Calls {
    pub fn new(limit: Duration) -> Calls {
        Calls { limit, count: watch::Sender::default() }
    }

    /// Until no call has been open for so long.
    pub async fn idle(&self, most: Duration) {
        let mut count = self.count.subscribe();
        loop {
            // The sender is here.
            let begun = count.wait_for(|count| count.open == 0).await.map_or(0, |count| count.begun);
            if timeout(most, count.wait_for(|count| count.begun != begun)).await.is_err() {
                return;
            }
        }
    }

    fn open(&self) -> Open {
        self.count.send_modify(|Count { open, begun }| (*open, *begun) = (*open + 1, *begun + 1));
        Open(self.count.clone())
    }
}

/// A body in pieces, whose call knows when one waits to be taken.
pub struct Pieces<B> {
    body: B,
    /// Of the last frame, what is not handed on.
    rest: Bytes,
}

/// Bytes of a piece: who takes so many within the limit is slow, and no more than that.
pub const PIECE_BYTES: usize = 16 << 10;

tokio::task_local! {
    /// Since when a piece of this call waits.
    static WAITS_SINCE: Cell<Option<Instant>>;
}

impl<F: Future + Send + 'static> Executor<F> for Calls {
    fn execute(&self, call: F) {
        let (limit, open) = (self.limit, self.open());
        let limited = async move {
            let _open = open;
            let mut call = pin!(call);
            let mut end = pin!(sleep(limit));
            poll_fn(|context| {
                if call.as_mut().poll(context).is_ready() {
                    return Poll::Ready(());
                }
                let Some(since) = WAITS_SINCE.with(Cell::get) else { return Poll::Pending };
                end.as_mut().reset(since + limit);
                ready!(end.as_mut().poll(context));
                tracing::debug!("a call ended early: its client takes nothing");
                Poll::Ready(())
            })
            .await;
        };
        tokio::spawn(WAITS_SINCE.scope(Cell::new(None), limited));
    }
}

impl<B> Pieces<B> {
    pub fn of(body: B) -> Pieces<B> {
        Pieces { body, rest: Bytes::new() }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Pieces<B> {
    type Data = Bytes;
    type Error = B::Error;

    /// Asked for more once the last piece has found room with the client.
    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        WAITS_SINCE.with(|since| since.set(None));
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(context)).map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        WAITS_SINCE.with(|since| since.set(Some(Instant::now())));
        let num_bytes = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(num_bytes)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    /// Asked for before the first piece.
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
