//! A connection as its client treats it. Invariant: a client that takes too little of what is being written, or has
//! left, keeps nothing for ever.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::calls::PIECE_BYTES;

/// A stream whose writes fail when its client takes neither a piece within `limit` nor all that there is, and whose
/// flushes fail when he has closed his side.
pub struct ClientStream {
    stream: TcpStream,
    limit: Duration,
    /// While something waits to be taken.
    wait: Option<Wait>,
    /// Whether the last write was not taken as a whole.
    is_short: bool,
    /// Running while there is more to read than anybody reads, which hides whether he has left.
    look: Option<Pin<Box<Sleep>>>,
}

struct Wait {
    deadline: Pin<Box<Sleep>>,
    num_taken: usize,
}

/// How often it is looked whether a client has left, where that does not show by itself.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

impl ClientStream {
    pub fn new(stream: TcpStream, limit: Duration) -> ClientStream {
        ClientStream { stream, limit, wait: None, is_short: false, look: None }
    }

    /// What comes of an attempt to write `num_bytes`.
    fn written(
        &mut self,
        context: &mut Context<'_>,
        num_bytes: usize,
        taken: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        self.is_short = !matches!(taken, Poll::Ready(Ok(taken)) if taken == num_bytes);
        if let (Some(wait), Poll::Ready(Ok(taken))) = (&mut self.wait, &taken) {
            wait.num_taken += taken;
            if wait.num_taken >= PIECE_BYTES {
                self.wait = None;
            }
        }
        self.limited(context, taken)
    }

    fn limited<T>(&mut self, context: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            return done;
        }
        let wait = || Wait { deadline: Box::pin(sleep(self.limit)), num_taken: 0 };
        ready!(self.wait.get_or_insert_with(wait).deadline.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes too little")))
    }

    /// Whoever waits for an answer reads no more while he has bytes of the next request, and does not see the end that
    /// comes behind them.
    fn has_left(&mut self, context: &mut Context<'_>) -> bool {
        if self.stream.poll_read_ready(context).is_pending() {
            self.look = None;
            return false;
        }
        let ready = self.stream.ready(Interest::READABLE).now_or_never();
        if ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed())) {
            return true;
        }
        let look = self.look.get_or_insert_with(|| Box::pin(sleep(LOOK_INTERVAL)));
        while look.as_mut().poll(context).is_ready() {
            look.as_mut().reset(Instant::now() + LOOK_INTERVAL);
        }
        false
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let taken = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, bytes.len(), taken)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let taken = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.written(context, parts.iter().map(|part| part.len()).sum(), taken)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Asked for whenever a connection is looked at, and when all is written.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.is_short {
            self.wait = None;
        }
        if self.has_left(context) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the client has left")));
        }
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.limited(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.limited(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpSocket;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(300);

    /// What is written to, and its client, with buffers as small as the system has them.
    async fn pair() -> (ClientStream, TcpStream) {
        let (server, client) = (TcpSocket::new_v4(), TcpSocket::new_v4());
        let (server, client) = (server.expect("a socket"), client.expect("a socket"));
        client.set_recv_buffer_size(1 << 10).expect("an option");
        server.set_send_buffer_size(1 << 10).expect("an option");
        client.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let listener = client.listen(1).expect("it listens");
        let address = listener.local_addr().expect("an address");
        let (stream, accepted) = tokio::join!(server.connect(address), listener.accept());
        (ClientStream::new(stream.expect("it accepts"), LIMIT), accepted.expect("it connects").0)
    }

    #[tokio::test]
    async fn a_client_that_takes_a_little_now_and_then_is_let_go() {
        let (mut stream, mut client) = pair().await;
        let trickle = tokio::spawn(async move {
            let mut bytes = [0; 32];
            let mut num_taken = 0;
            while let Ok(taken @ 1..) = client.read(&mut bytes).await {
                num_taken += taken;
                sleep(Duration::from_millis(5)).await;
            }
            num_taken
        });
        let written = stream.write_all(&vec![b'x'; 1 << 20]).await;
        assert_eq!(written.expect_err("nobody waits for so long").kind(), io::ErrorKind::TimedOut);
        drop(stream);
        assert!(trickle.await.expect("no panic") > 0);
    }

    #[tokio::test]
    async fn a_client_that_takes_all_is_not() {
        let (mut stream, mut client) = pair().await;
        stream.limit = Duration::from_secs(60);
        let reading = tokio::spawn(async move {
            let mut bytes = Vec::new();
            client.read_to_end(&mut bytes).await.map(|_| (bytes.len(), client))
        });
        for _ in 0..64 {
            stream.write_all(&[b'x'; 20 << 10]).await.expect("it is taken");
            stream.flush().await.expect("it is taken");
            assert!(stream.wait.is_none(), "nothing waits");
        }
        stream.shutdown().await.expect("an end");
        assert_eq!(reading.await.expect("no panic").expect("all of it").0, 64 * (20 << 10));
    }

    /// Whatever lies before his end unread.
    #[tokio::test]
    async fn a_client_that_has_left_is_noticed_by_who_does_not_read() {
        for unread in [0, 2, 1 << 10] {
            let (mut stream, mut client) = pair().await;
            client.write_all(&vec![b'x'; unread]).await.expect("room");
            stream.flush().await.expect("he is here");
            drop(client);
            let flush = std::future::poll_fn(|context| match Pin::new(&mut stream).poll_flush(context) {
                Poll::Ready(Ok(())) => Poll::Pending,
                left => left,
            });
            let left = tokio::time::timeout(Duration::from_secs(20), flush).await.expect("it is noticed");
            assert_eq!(left.expect_err("he has left").kind(), io::ErrorKind::ConnectionAborted, "{unread}");
        }
    }
}
