//! A lean HTTP/1.1 client: raw sockets on one thread, one buffer for all of them, and no JSON read, so that it takes
//! little of the machine that the server runs on.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::ready;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the server cannot be spoken to: {0}")]
    Io(#[from] io::Error),
    #[error("the server answers otherwise than by 200: {0}")]
    Refused(String),
}

const BUFFER_BYTES: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_BYTES]);
}

/// Runs `work` on a thread of its own, by whose name its time is counted.
pub fn on_client_thread<T, F>(name: &str, work: impl FnOnce() -> F + Send) -> io::Result<T>
where
    T: Send,
    F: Future<Output = T>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn_scoped(scope, move || runtime.block_on(work()))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

pub struct Connection(TcpStream);

impl Connection {
    pub async fn open(address: SocketAddr) -> Result<Connection, ClientError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection(stream))
    }

    /// Posts JSON. The connection ends with the answer.
    pub async fn post(&mut self, path: &str, body: &str) -> Result<(), ClientError> {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        self.0.write_all(head.as_bytes()).await?;
        Ok(self.0.write_all(body.as_bytes()).await?)
    }

    /// Asks, and takes the answer, which must come in one piece; how long that took.
    pub async fn get(&mut self, path: &str) -> Result<Duration, ClientError> {
        let begun = Instant::now();
        self.0.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await?;
        let mut scanner = Scanner::default();
        self.read(|bytes| scanner.push(bytes, |_| {})).await?;
        scanner.end().map(|()| begun.elapsed())
    }

    /// Tells `on_letter` of each letter of a streamed chat, and when it was received, until the end.
    pub async fn letters(&mut self, mut on_letter: impl FnMut(u8, Instant)) -> Result<(), ClientError> {
        let mut scanner = Scanner::default();
        let mut push = |bytes: &[u8]| {
            let received = Instant::now();
            scanner.push(bytes, |letter| on_letter(letter, received));
        };
        while self.read(&mut push).await? > 0 {}
        scanner.end()
    }

    /// Until the answer has begun.
    pub async fn begun(&mut self) -> Result<(), ClientError> {
        let mut scanner = Scanner::default();
        self.read(|bytes| scanner.push(bytes, |_| {})).await?;
        scanner.end()
    }

    /// What has come, all at once; 0 bytes at the end.
    async fn read(&mut self, mut take: impl FnMut(&[u8])) -> Result<usize, ClientError> {
        let read = poll_fn(|context| {
            BUFFER.with_borrow_mut(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                ready!(Pin::new(&mut self.0).poll_read(context, &mut buffer))?;
                take(buffer.filled());
                std::task::Poll::Ready(io::Result::Ok(buffer.filled().len()))
            })
        });
        Ok(read.await?)
    }
}

/// Finds the letters in an answer, however it is cut.
#[derive(Default)]
struct Scanner {
    /// The answer's first bytes.
    head: Vec<u8>,
    /// Bytes of [`BEFORE_LETTER`] that the last ones are.
    matched: usize,
}

const OK: &[u8] = b"HTTP/1.1 200 ";
/// What stands before the text of a chunk.
const BEFORE_LETTER: &[u8] = b"\"content\":\"";
/// Of an answer that is none, so much is repeated.
const MAX_HEAD: usize = 1000;

impl Scanner {
    fn push(&mut self, bytes: &[u8], mut on_letter: impl FnMut(u8)) {
        let missing = if self.head.starts_with(OK) { 0 } else { MAX_HEAD - self.head.len() };
        self.head.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        for &byte in bytes {
            if self.matched == BEFORE_LETTER.len() {
                self.matched = 0;
                // The first chunk has an empty text.
                if byte != b'"' {
                    on_letter(byte);
                }
            } else if byte == BEFORE_LETTER[self.matched] {
                self.matched += 1;
            } else {
                self.matched = usize::from(byte == BEFORE_LETTER[0]);
            }
        }
    }

    fn end(self) -> Result<(), ClientError> {
        match self.head.starts_with(OK) {
            true => Ok(()),
            false => Err(ClientError::Refused(String::from_utf8_lossy(&self.head).into_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_found_however_the_answer_is_cut() {
        let answer = b"HTTP/1.1 200 OK\r\n\r\ndata: {\"role\":\"assistant\",\"content\":\"\"}\n\n\
            data: {\"content\":\"a\"}\n\ndata: {\"\"content\":\"b\"}\n\ndata: {\"content\": 1,\"contents\":\"c\"}\n\n";
        for size in 1..answer.len() {
            let (mut scanner, mut letters) = (Scanner::default(), Vec::new());
            answer.chunks(size).for_each(|bytes| scanner.push(bytes, |letter| letters.push(letter)));
            assert_eq!(letters, b"ab", "cut every {size} bytes");
            assert!(scanner.end().is_ok());
        }
    }

    #[test]
    fn an_answer_that_is_none_is_repeated() {
        let mut scanner = Scanner::default();
        scanner.push(b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", |_| {});
        let sentence = scanner.end().expect_err("refused").to_string();
        assert!(sentence.ends_with("Requests\r\n\r\n{}"), "{sentence}");
        assert!(Scanner::default().end().is_err(), "nothing came");
    }
}
