//! An OpenAI-compatible server as a client sees it: what it serves, and one streamed answer after the other.
//!
//! Invariant: an answer is whole, or it is a [`Failure`] that says how it was not. Connections are kept and used again,
//! one request at a time each.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, SERVER};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::events::{Chunk, DONE, Events, Usage};
use super::tls::{self, TrustError};

/// Where requests go.
pub struct Endpoint {
    /// As it was given, but for a name and a password before its host.
    pub url: String,
    /// `host:port`.
    authority: String,
    /// Before `/v1`.
    prefix: String,
    api_key: Option<String>,
    /// How it is spoken to in secret, and who it must prove to be.
    tls: Option<(TlsConnector, ServerName<'static>)>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
    num_resent: AtomicU64,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub sent: Instant,
    pub first: Option<Instant>,
    pub last: Option<Instant>,
    /// Between events that brought tokens.
    pub gaps: Vec<Duration>,
    pub ids: Vec<u32>,
    pub text: String,
    /// Of `text`, so much was thought before anything was said.
    pub num_thought_bytes: usize,
    pub usage: Option<Usage>,
}

/// How an answer failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    #[error("it answers {status}: {message}")]
    Refused { status: u16, message: String },
    #[error("its stream tells of an error: {0}")]
    Failed(String),
    #[error("its stream ended before the answer had")]
    Truncated,
    #[error("its stream cannot be read: {0}")]
    Unreadable(String),
    #[error("it went on after max_tokens")]
    BeyondMaxTokens,
    #[error("it was silent for {} s", .0.as_secs_f64())]
    Silent(Duration),
    /// Not even the head of a response came.
    #[error("it did not answer within {} s", .0.as_secs_f64())]
    Unanswered(Duration),
    #[error("it gave neither token ids nor usage, and there is no tokenizer to count with")]
    Uncounted,
}

#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("{0} is no URL of a server; give one such as http://127.0.0.1:8080")]
    Url(String),
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("{url}: {failure}")]
    Failed { url: String, failure: Failure },
    #[error("{url} serves {models}; choose one with --served-model")]
    Models { url: String, models: String },
}

/// Of what is no stream.
const MAX_BODY_BYTES: usize = 16 << 20;
/// Of a refusal, so much is repeated.
const MAX_MESSAGE_CHARS: usize = 300;
/// For the end of a stream whose answer is over, so that its connection can be used again.
const PARTING: Duration = Duration::from_millis(10);

impl Endpoint {
    /// Behind `https` it must be vouched for by an authority of `ca_cert`, else by a public one.
    pub fn new(url: &str, api_key: Option<String>, ca_cert: Option<&Path>) -> Result<Endpoint, EndpointError> {
        let wrong = || EndpointError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(wrong)?;
        let (port, tls) = match uri.scheme_str() {
            Some("http") => (80, None),
            Some("https") => {
                let name = host.trim_matches(['[', ']']).to_owned();
                let name = ServerName::try_from(name).map_err(|_| wrong())?;
                (443, Some((tls::connector(ca_cert)?, name)))
            }
            _ => return Err(wrong()),
        };
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(port));
        let prefix = uri.path().trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let (idle, num_resent) = (Mutex::default(), AtomicU64::new(0));
        Ok(Endpoint { url: without_password(url), authority, prefix, api_key, tls, idle, num_resent })
    }

    /// How often a request was sent again so far, because the kept connection that it went over had been closed.
    pub fn num_resent(&self) -> u64 {
        self.num_resent.load(Ordering::Relaxed)
    }

    /// Seconds that a server of our kind has charged to each cause since its start; empty from any other.
    pub async fn device_seconds(&self, model: &str, patience: Duration) -> BTreeMap<String, f64> {
        let Ok((_, body)) = self.get("/metrics", patience).await else { return BTreeMap::new() };
        let text = String::from_utf8_lossy(&body);
        let label = |line: &str, name: &str| {
            let (_, rest) = line.split_once(&format!("{name}=\""))?;
            rest.split_once('"').map(|(value, _)| value.to_owned())
        };
        let lines = text.lines().filter(|line| line.starts_with("fullbore_device_seconds_total{"));
        let lines = lines.filter(|line| label(line, "model_name").is_none_or(|name| name == model));
        lines.filter_map(|line| Some((label(line, "cause")?, line.rsplit_once(' ')?.1.parse().ok()?))).collect()
    }

    /// The `Server` header, and the body.
    pub(super) async fn get(&self, path: &str, patience: Duration) -> Result<(Option<String>, Bytes), Failure> {
        let request = self.request("GET", path, Bytes::new());
        let asked = async {
            let (response, sender) = self.send(request).await?;
            let server = response.headers().get(SERVER).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let response = refused_unless_ok(response).await?;
            let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await;
            let body = body.map_err(|_| Failure::Truncated)?.to_bytes();
            self.keep(sender);
            Ok((server, body))
        };
        timeout(patience, asked).await.unwrap_or(Err(Failure::Silent(patience)))
    }

    /// Posts `body` and takes the stream to `[DONE]`, else to its end; gives up once more than `max_tokens` came, or no
    /// data came for as long as `patience` lasts. What is sent to keep a connection alive is no data.
    pub async fn stream(
        &self,
        path: &str,
        body: Bytes,
        max_tokens: u32,
        patience: Duration,
    ) -> Result<Answer, Failure> {
        let sent = Instant::now();
        let mut deadline = sent + patience;
        let asked = timeout_at(deadline.into(), self.send(self.request("POST", path, body))).await;
        let (response, sender) = asked.map_err(|_| Failure::Unanswered(patience))??;
        let silent = |_| Failure::Silent(patience);
        let mut body = timeout_at(deadline.into(), refused_unless_ok(response)).await.map_err(silent)??.into_body();
        let (mut events, mut reader) = (Events::default(), Reader::new(sent, max_tokens));
        while let Some(frame) = timeout_at(deadline.into(), body.frame()).await.map_err(silent)? {
            let frame = frame.map_err(|_| Failure::Truncated)?;
            let Some(bytes) = frame.data_ref() else { continue };
            let received = Instant::now();
            let pushed = events.push(bytes, |data| {
                deadline = received + patience;
                reader.take(data, received);
            });
            pushed.map_err(|error| Failure::Unreadable(error.to_string()))?;
            if let Some(failure) = reader.failure.take() {
                return Err(failure);
            }
            if reader.is_done {
                break;
            }
        }
        // What follows is nothing but the end; who holds it back loses the connection.
        let rest = async { while body.frame().await.is_some_and(|frame| frame.is_ok()) {} };
        if timeout(PARTING, rest).await.is_ok() {
            self.keep(sender);
        }
        reader.end()
    }

    fn request(&self, method: &str, path: &str, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.prefix));
        request = request.header(HOST, &self.authority).header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        request.body(Full::new(body)).expect("made of a URL that was read, and of known words")
    }

    /// Over a connection that was used before, if there is one that still holds.
    async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), Failure> {
        loop {
            let kept = self.kept();
            let was_kept = kept.is_some();
            let mut sender = match kept {
                Some(sender) => sender,
                None => self.connect().await?,
            };
            match sender.send_request(request.clone()).await {
                Ok(response) => return Ok((response, sender)),
                // The server has closed it meanwhile; whether it has read what had left nobody knows.
                Err(error) if was_kept => {
                    self.num_resent.fetch_add(u64::from(!error.is_canceled()), Ordering::Relaxed);
                }
                Err(error) => return Err(Failure::Unreachable(error.to_string())),
            }
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Failure> {
        let unreachable = |error: &dyn std::error::Error| Failure::Unreachable(error.to_string());
        let stream = TcpStream::connect(&self.authority).await.map_err(|error| unreachable(&error))?;
        stream.set_nodelay(true).map_err(|error| unreachable(&error))?;
        match &self.tls {
            None => spoken_to(stream).await,
            Some((connector, name)) => {
                let secret = connector.connect(name.clone(), stream).await.map_err(|error| unreachable(&error))?;
                spoken_to(secret).await
            }
        }
    }

    /// A connection that was used before, and has not been closed as far as is known.
    fn kept(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::from_fn(|| idle.pop()).find(|sender| !sender.is_closed())
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        if !sender.is_closed() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        }
    }
}

/// `http://user:password@host` as `http://host`, whatever stands before; what is no URL stays as it is.
pub fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

async fn spoken_to(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<SendRequest<Full<Bytes>>, Failure> {
    let begun = handshake(TokioIo::new(stream)).await;
    let (sender, connection) = begun.map_err(|error| Failure::Unreachable(error.to_string()))?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn refused_unless_ok(response: Response<Incoming>) -> Result<Response<Incoming>, Failure> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let parsed: Value = serde_json::from_slice(&body).unwrap_or_default();
    let message = parsed["error"]["message"].as_str().or(parsed["message"].as_str());
    let message = message.map_or_else(|| String::from_utf8_lossy(&body).into_owned(), str::to_owned);
    Err(Failure::Refused { status, message: message.trim().chars().take(MAX_MESSAGE_CHARS).collect() })
}

/// Takes an answer's events one by one.
struct Reader {
    answer: Answer,
    max_tokens: usize,
    /// Events that brought tokens.
    num_events: usize,
    has_ended: bool,
    /// Nothing follows.
    is_done: bool,
    failure: Option<Failure>,
}

impl Reader {
    fn new(sent: Instant, max_tokens: u32) -> Reader {
        let (gaps, ids, text) = (Vec::new(), Vec::new(), String::new());
        let answer = Answer { sent, first: None, last: None, gaps, ids, text, num_thought_bytes: 0, usage: None };
        Reader {
            answer,
            max_tokens: max_tokens as usize,
            num_events: 0,
            has_ended: false,
            is_done: false,
            failure: None,
        }
    }

    fn take(&mut self, data: &[u8], received: Instant) {
        if data == DONE {
            (self.has_ended, self.is_done) = (true, true);
            return;
        }
        let chunk: Chunk = match serde_json::from_slice(data) {
            Ok(chunk) => chunk,
            Err(error) => {
                self.failure.get_or_insert(Failure::Unreadable(format!("an event is no chunk: {error}")));
                return;
            }
        };
        if let Some(error) = &chunk.error {
            let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            self.failure.get_or_insert(Failure::Failed(message));
        }
        let answer = &mut self.answer;
        answer.usage = chunk.usage.or(answer.usage);
        for choice in &chunk.choices {
            let text = choice.text();
            let ids = choice.token_ids.as_deref().unwrap_or_default();
            if !ids.is_empty() || text.iter().any(|text| !text.is_empty()) {
                self.num_events += 1;
                answer.gaps.extend(answer.last.map(|last| received - last));
                answer.first.get_or_insert(received);
                answer.last = Some(received);
            }
            answer.ids.extend_from_slice(ids);
            text.iter().for_each(|text| answer.text.push_str(text));
            answer.num_thought_bytes += text[0].len();
            self.has_ended |= choice.finish_reason.is_some();
        }
        // Each event has a token at least.
        if answer.ids.len().max(self.num_events) > self.max_tokens {
            self.failure.get_or_insert(Failure::BeyondMaxTokens);
        }
    }

    fn end(self) -> Result<Answer, Failure> {
        let said = self.answer.usage.map_or(0, |usage| usage.completion_tokens);
        match self.has_ended {
            true if said > self.max_tokens as u64 => Err(Failure::BeyondMaxTokens),
            true => Ok(self.answer),
            false => Err(Failure::Truncated),
        }
    }
}

impl Answer {
    /// What is no thought.
    pub fn said(&self) -> &str {
        self.text.get(self.num_thought_bytes..).unwrap_or(&self.text)
    }

    /// How many tokens, by the best that there is, and what that was.
    pub fn num_tokens(&self, tokenizer: Option<&dyn Fn(&str) -> usize>) -> Option<(u64, Counted)> {
        match (self.ids.len(), self.usage, tokenizer) {
            (1.., _, _) => Some((self.ids.len() as u64, Counted::Ids)),
            (0, Some(usage), _) => Some((usage.completion_tokens, Counted::Usage)),
            (0, None, Some(tokenizer)) => Some((tokenizer(&self.text) as u64, Counted::Text)),
            (0, None, None) => None,
        }
    }
}

/// What tokens were counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counted {
    Ids,
    Usage,
    Text,
}

impl Counted {
    pub fn name(self) -> &'static str {
        match self {
            Counted::Ids => "by_ids",
            Counted::Usage => "by_usage",
            Counted::Text => "by_tokenizing",
        }
    }
}

impl Failure {
    /// As results count it.
    pub fn name(&self) -> &'static str {
        match self {
            Failure::Unreachable(_) => "unreachable",
            Failure::Refused { .. } => "refused",
            Failure::Failed(_) => "failed",
            Failure::Truncated => "truncated",
            Failure::Unreadable(_) => "unreadable",
            Failure::BeyondMaxTokens => "beyond_max_tokens",
            Failure::Silent(_) | Failure::Unanswered(_) => "silent",
            Failure::Uncounted => "uncounted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_with_and_without_v1() {
        for (url, authority, prefix) in [
            ("http://127.0.0.1:8080", "127.0.0.1:8080", ""),
            ("http://a.example/v1/", "a.example:80", ""),
            ("http://a.example:9/proxy/v1", "a.example:9", "/proxy"),
            ("http://[::1]:9/", "[::1]:9", ""),
            ("https://a.example/v1", "a.example:443", ""),
            ("https://[::1]:9", "[::1]:9", ""),
        ] {
            let endpoint = Endpoint::new(url, None, None).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!((endpoint.authority.as_str(), endpoint.prefix.as_str()), (authority, prefix));
        }
        let secret = Endpoint::new("http://me:pass@a.example:9/v1", None, None).expect("a URL");
        assert_eq!((secret.url.as_str(), secret.authority.as_str()), ("http://a.example:9/v1", "a.example:9"));
        for wrong in ["localhost:8080", "ftp://a", "/v1", ""] {
            let sentence = Endpoint::new(wrong, None, None).err().expect("no URL").to_string();
            assert!(sentence.contains("http://127.0.0.1:8080"), "{sentence}");
        }
        let nothing = Endpoint::new("https://a", None, Some(Path::new("/no/such.pem"))).err().expect("no file");
        assert!(nothing.to_string().contains("--ca-cert /no/such.pem"), "{nothing}");
    }

    #[test]
    fn an_answer_is_whole_or_says_how_it_is_not() {
        let read = |max_tokens, events: &[&str]| {
            let mut reader = Reader::new(Instant::now(), max_tokens);
            events.iter().for_each(|data| reader.take(data.as_bytes(), Instant::now()));
            match reader.failure.take() {
                Some(failure) => Err(failure),
                None => reader.end(),
            }
        };
        let token = r#"{"choices":[{"text":"ab","token_ids":[1]}]}"#;
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
        let answer = read(2, &[token, token, usage, "[DONE]"]).expect("whole");
        assert_eq!((answer.ids.as_slice(), answer.text.as_str(), answer.gaps.len()), (&[1, 1][..], "abab", 1));
        assert_eq!(answer.num_tokens(None), Some((2, Counted::Ids)));
        let plain = r#"{"choices":[{"delta":{"content":"ab"}}]}"#;
        let counted = |events: &[&str], tokenizer| read(9, events).expect("whole").num_tokens(tokenizer);
        assert_eq!(counted(&[plain, usage, "[DONE]"], None), Some((2, Counted::Usage)));
        assert_eq!(counted(&[plain, "[DONE]"], None), None);
        assert_eq!(counted(&[plain, "[DONE]"], Some(&|text: &str| text.len())), Some((2, Counted::Text)));
        assert_eq!(read(2, &[token, token]).err(), Some(Failure::Truncated));
        assert_eq!(read(1, &[token, token]).err(), Some(Failure::BeyondMaxTokens));
        assert_eq!(read(1, &[plain, usage, "[DONE]"]).err(), Some(Failure::BeyondMaxTokens));
        assert_eq!(read(1, &[r#"{"error":{"message":"lost"}}"#]).err(), Some(Failure::Failed("lost".to_owned())));
        assert!(matches!(read(1, &["{\"choices\":7}"]).err(), Some(Failure::Unreadable(_))));
    }
}
