//! The accept loop: connections in, each with its limits, a port's protocol on every one.
//!
//! Invariant: a connection holds one place, and no client holds one without moving bytes: handshakes, heads, bodies
//! and writes all have a time limit. A request is admitted before what answers sees it, and is open until its answer's
//! last byte. A panic below ends one request with a sentence. Knows no route.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, TryFutureExt};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use warp::http::{Method, Request, Response, header};

use super::access::{self, Access, Client};
use super::calls::{Calls, Pieces};
use super::client_stream::ClientStream;
use super::connections::{Connections, Place};
use super::error::ApiError;
use super::tls::Tls;
use super::{App, OpenRequest, orca, request_id};

/// What a client may take of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub max_connections: usize,
    /// Of one address, or of one /64 of IPv6; this machine's own and trusted proxies' apart.
    pub max_connections_per_ip: usize,
    /// For a request's head to arrive, from the accept or the last answer on: also how long a connection may idle.
    pub head_timeout: Duration,
    /// For a connection of HTTP/2 to have no call.
    pub idle_timeout: Duration,
    /// For a request's body to arrive.
    pub body_timeout: Duration,
    /// For the client to take a piece of what is being written, or all that there is.
    pub write_timeout: Duration,
    pub max_body_bytes: u64,
    /// Of all bodies whose text is not read yet.
    pub max_bytes_of_bodies: u64,
    /// A stream with nothing to say says so this often, so that nobody between takes it for dead.
    pub keep_alive: Duration,
    /// The engine counts as stalled when work has waited this long for a step.
    pub max_stall: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_connections: 1024,
            max_connections_per_ip: 256,
            head_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(300),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            max_body_bytes: 8 << 20,
            max_bytes_of_bodies: 256 << 20,
            keep_alive: Duration::from_secs(15),
            max_stall: Duration::from_secs(30),
        }
    }
}

/// For a connection beyond the cap to hear so.
const REFUSAL_TIME: Duration = Duration::from_secs(1);

/// Of a connection, HTTP/2 alone: whether the client is still there is asked this often, and waited for as long.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// What a connection of HTTP/2 begins with.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Of a connection of HTTP/2, at once; more wait with the client.
const MAX_CALLS: u32 = 256;
/// Of one request's head in HTTP/2.
const MAX_HEAD_BYTES: u32 = 16 << 10;
/// Of a connection of HTTP/1: what is read and nobody has taken yet, as a head is that has no end; and what waits to be
/// written before more of an answer is asked for.
const MAX_BUFFER_BYTES: usize = 32 << 10;
const MAX_HEADERS: usize = 100;

/// What answers at a port, in what is spoken there.
pub trait Protocol: Clone + Send + Sync + 'static {
    type Body: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static;

    /// HTTP/2 from a connection's first byte on; otherwise HTTP/1.1.
    const IS_HTTP2: bool;

    /// The answer to what is answered whoever asks it.
    fn screen(&self, access: &Access, request: &Request<Incoming>) -> Option<Response<Self::Body>>;

    /// The answer to a request that was admitted; its [`Client`] is among its extensions.
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = Response<Self::Body>> + Send;

    /// As a client of this path expects it.
    fn refusal(&self, error: &ApiError, path: &str) -> Response<Self::Body>;
}

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Where connections come from, and what each may have.
pub struct Door {
    pub app: Arc<App>,
    pub connections: Arc<Connections>,
    pub tls: Option<Arc<Tls>>,
    /// Told when no more connections are wanted.
    pub stop: watch::Receiver<bool>,
}

/// Accepts until `stop` says so.
pub async fn accept<P: Protocol>(listener: TcpListener, mut door: Door, protocol: P) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut door.stop) => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, or a client that left at once; the first passes only with time.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let refusal = match door.connections.place(&door.app.access, address.ip()) {
            Ok(place) => {
                tokio::spawn(serve(
                    stream,
                    address.ip(),
                    door.app.clone(),
                    protocol.clone(),
                    door.tls.clone(),
                    place,
                    door.stop.clone(),
                ));
                continue;
            }
            Err(refusal) => refusal,
        };
        door.app.metrics.count_refused_connection();
        // Whoever expects TLS or HTTP/2 could not read the reason.
        let is_readable = door.tls.is_none() && !P::IS_HTTP2;
        let permit = if is_readable { door.connections.refusal() } else { None };
        if let Some(permit) = permit {
            tokio::spawn(async move {
                // A client that does not listen misses the reason.
                let _ = timeout(REFUSAL_TIME, refuse(stream, refusal)).await;
                drop(permit);
            });
        }
    }
}

/// Until `stop` says so, or nobody can say it any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn serve<P: Protocol>(
    stream: TcpStream,
    address: IpAddr,
    app: Arc<App>,
    protocol: P,
    tls: Option<Arc<Tls>>,
    _place: Place,
    stop: watch::Receiver<bool>,
) {
    // Tokens are small and wanted at once. Without the option they only come later.
    let _ = stream.set_nodelay(true);
    let Limits { head_timeout, write_timeout, .. } = app.limits;
    let stream = ClientStream::new(stream, write_timeout);
    let Some(tls) = tls else { return converse(stream, address, app, protocol, stop).await };
    match timeout(head_timeout, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => converse(stream, address, app, protocol, stop).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake did not end in time"),
    }
}

async fn converse<P, T>(stream: T, address: IpAddr, app: Arc<App>, protocol: P, stop: watch::Receiver<bool>)
where
    P: Protocol,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let ended = match P::IS_HTTP2 {
        // Ten thousand idle connections of HTTP/1 have no room for what another protocol needs.
        true => Box::pin(converse_http2(stream, address, app, protocol, stop)).await,
        false => converse_http1(stream, address, app, protocol, stop).await,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn converse_http1<P, T>(
    stream: T,
    address: IpAddr,
    app: Arc<App>,
    protocol: P,
    mut stop: watch::Receiver<bool>,
) -> Result<(), hyper::Error>
where
    P: Protocol,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let head_timeout = app.limits.head_timeout;
    let answer = service_fn(move |request| answer(app.clone(), protocol.clone(), address, request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER_BYTES)
        // Pieces are small: one copy is less than a list of them.
        .writev(false)
        .serve_connection(TokioIo::new(stream), answer);
    last(connection, http1::Connection::graceful_shutdown, stopped(&mut stop)).await
}

/// Many requests at a time, and none for a while.
async fn converse_http2<P, T>(
    mut stream: T,
    address: IpAddr,
    app: Arc<App>,
    protocol: P,
    mut stop: watch::Receiver<bool>,
) -> Result<(), hyper::Error>
where
    P: Protocol,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Nothing else would end a connection that does not begin.
    let begun = timeout(app.limits.head_timeout, read_preface(&mut stream)).await;
    match begun {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => {
            // A client that does not listen misses the reason.
            let _ = timeout(REFUSAL_TIME, refuse(stream, ApiError::not_http2())).await;
            return Ok(());
        }
        Ok(Err(_)) | Err(_) => return Ok(()),
    }
    let (reader, writer) = tokio::io::split(stream);
    let stream = tokio::io::join(PREFACE.chain(reader), writer);
    let Limits { write_timeout, idle_timeout, .. } = app.limits;
    let calls = Calls::new(write_timeout);
    let idle = calls.clone();
    let answer = service_fn(move |request| {
        let answer = answer(app.clone(), protocol.clone(), address, request);
        answer.map_ok(|response| response.map(Pieces::of))
    });
    let connection = http2::Builder::new(calls)
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .max_header_list_size(MAX_HEAD_BYTES)
        .max_concurrent_streams(MAX_CALLS)
        .serve_connection(TokioIo::new(stream), answer);
    let leaving = async {
        tokio::select! {
            () = stopped(&mut stop) => {}
            () = idle.idle(idle_timeout) => tracing::debug!("a connection ends: no call has come"),
        }
    };
    last(connection, http2::Connection::graceful_shutdown, leaving).await
}

/// Until a connection ends: by itself, or told to by `leave`, with the answers that it is at, when it is `leaving`.
async fn last<C: Future>(
    connection: C,
    leave: impl FnOnce(Pin<&mut C>),
    leaving: impl Future<Output = ()>,
) -> C::Output {
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended,
        () = leaving => {
            leave(connection.as_mut());
            connection.await
        }
    }
}

/// Whether a connection begins as HTTP/2 does.
async fn read_preface(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
    let mut begun = [0; PREFACE.len()];
    let mut num_read = 0;
    while num_read < begun.len() && PREFACE.starts_with(&begun[..num_read]) {
        match stream.read(&mut begun[num_read..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => num_read += more,
        }
    }
    Ok(begun == *PREFACE)
}

async fn answer<P: Protocol>(
    app: Arc<App>,
    protocol: P,
    address: IpAddr,
    mut request: Request<Incoming>,
) -> Result<Response<impl Body<Data = Bytes, Error = <P::Body as Body>::Error>>, Infallible> {
    let mut open = app.open_request(&request);
    let origin = app.access.allowed_origin(&request);
    let screened = protocol.screen(&app.access, &request);
    let client = app.access.admit(&request, address);
    let meter = client.as_ref().ok().and_then(|client| client.meter.clone());
    let request_id = request_id::Asked::of(&request);
    let load = client.as_ref().ok().and_then(|_| orca::asked(request.headers()));
    let mut response = match (screened, client.and_then(|client| in_rate(client, &request))) {
        (Some(response), _) => response,
        (None, Err(error)) => protocol.refusal(&error, request.uri().path()),
        (None, Ok(client)) => {
            request.extensions_mut().insert(client);
            if request.method() == Method::HEAD {
                // Answered as GET is; hyper keeps the body back.
                *request.method_mut() = Method::GET;
            }
            let path = request.uri().path().to_owned();
            let answered = AssertUnwindSafe(protocol.answer(request)).catch_unwind().await;
            // The panic's message is in the log already.
            answered.unwrap_or_else(|_| {
                app.metrics.count_panic();
                protocol.refusal(&ApiError::bug(), &path)
            })
        }
    };
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    if let Some(meter) = meter {
        meter.tell(response.headers_mut(), std::time::Instant::now());
    }
    request_id.tell(&mut response);
    if let Some(format) = load {
        orca::tell(response.headers_mut(), format, app.models());
    }
    if let Some(origin) = origin {
        access::allow(response.headers_mut(), origin);
    }
    open.answered(&response);
    Ok(response.map(|body| Answer { body, _open: open }))
}

/// What is only looked at is asked for as often as anybody likes.
fn in_rate<B>(client: Client, request: &Request<B>) -> Result<Client, ApiError> {
    match &client.meter {
        Some(meter) if access::is_work(request) => meter.admit(std::time::Instant::now()).map(|()| client),
        _ => Ok(client),
    }
}

/// A body whose request counts as open until it is sent or dropped.
struct Answer<B> {
    body: B,
    _open: OpenRequest,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Says why and hangs up, but reads on for a while: closing on unread bytes would take the answer back.
async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin, error: ApiError) -> io::Result<()> {
    let body = error.json().to_string();
    let text = format!(
        "HTTP/1.1 {}\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        error.status,
        body.len()
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await?;
    let mut unread = [0; 4096];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tower_service::Service;
    use warp::reply::Response;

    use super::*;
    use crate::http::access::Origin;
    use crate::http::error::json_response;
    use crate::http::routes::Routes;

    /// Routes with bugs: in the route itself, and in the work that it has done elsewhere.
    #[derive(Clone)]
    struct Buggy(Arc<App>);

    impl Service<Request<Incoming>> for Buggy {
        type Response = Response;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Incoming>) -> Self::Future {
            let app = self.0.clone();
            Box::pin(async move {
                let bug = || -> Result<(), ApiError> { panic!("a bug that a test planted") };
                match request.uri().path() {
                    "/v1/completions" => bug(),
                    "/v1/messages" => app.work.read(&Origin::default(), 1, bug).await,
                    _ => Ok(()),
                }
                .map_or_else(|error| Ok(error.response("")), |()| Ok(json_response(&json!({}))))
            })
        }
    }

    async fn post(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("it reads");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("it answers");
        reply
    }

    #[tokio::test]
    async fn a_panic_ends_one_request_with_a_sentence() {
        let app = Arc::new(App::new(Limits::default(), Access::default(), None, None));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = watch::channel(false);
        let connections = Connections::new(&app.limits);
        let door = Door { app: app.clone(), connections, tls: None, stop: stopped };
        let accepting = tokio::spawn(accept(listener, door, Routes(Buggy(app.clone()))));
        for num_bugs in 1..4 {
            let reply = post(address, "/v1/completions").await;
            assert!(reply.starts_with("HTTP/1.1 500 ") && reply.contains(r#""type":"server_error""#), "{reply}");
            assert!(reply.contains("a bug of its own") && !reply.contains("planted"), "{reply}");
            let reply = post(address, "/v1/messages").await;
            assert!(reply.starts_with("HTTP/1.1 500 ") && reply.contains(r#""type":"api_error""#), "{reply}");
            assert!(post(address, "/").await.starts_with("HTTP/1.1 200 "));
            assert_eq!(app.metrics.num_panics(), 2 * num_bugs);
        }
        stop.send(true).expect("it accepts");
        accepting.await.expect("no panic of its own");
        assert!(app.all_answered(Duration::from_secs(5)).await, "a request was left open");
    }
}
