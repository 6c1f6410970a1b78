//! Somebody who takes whatever is posted, and says yes to it: what is posted to him costs what posting costs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// Listens until it is dropped, on a thread of its own.
pub struct Sink {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Sink {
    pub fn start() -> io::Result<Sink> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind((IpAddr::V4(Ipv4Addr::LOCALHOST), 0)))?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let serve = async move {
            let accept = async {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(take(stream));
                }
            };
            tokio::select! {
                () = accept => {}
                _ = stopped => {}
            }
        };
        std::thread::Builder::new().name("sink".to_owned()).spawn(move || runtime.block_on(serve))?;
        Ok(Sink { address, _stop: stop })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// One request, whole.
async fn take(mut stream: TcpStream) -> io::Result<()> {
    let mut head = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let mut num_read = 0;
    let mut expected = usize::MAX;
    while num_read < expected {
        let more = stream.read(&mut buffer).await?;
        if more == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        num_read += more;
        if expected == usize::MAX {
            head.extend_from_slice(&buffer[..more]);
            expected = length(&head).unwrap_or(usize::MAX);
        }
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await
}

/// Of a request whose head is there.
fn length(begun: &[u8]) -> Option<usize> {
    let end = begun.windows(4).position(|bytes| bytes == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&begun[..end]).ok()?;
    let body = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
    Some(end + body.parse::<usize>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::super::client::{Connection, on_client_thread};
    use super::*;

    #[test]
    fn a_request_is_taken_whole() {
        let head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n";
        assert_eq!(length(head), Some(head.len() + 5));
        assert_eq!((length(&head[..head.len() - 1]), length(b"GET / HTTP/1.1\r\n\r\n")), (None, None));
    }

    #[test]
    fn whoever_posts_is_told_yes() {
        let sink = Sink::start().expect("a free port");
        let posted = on_client_thread("client", || async {
            for num_bytes in [0, 1, 1 << 20] {
                let mut connection = Connection::open(sink.address()).await.expect("it listens");
                connection.post("/", &"x".repeat(num_bytes)).await.expect("it reads");
                connection.begun().await.expect("it answers");
            }
        });
        posted.expect("a thread");
    }
}
