//! `fullbore top`: the live view of a running server in a terminal, once a second, or one picture as text.
//!
//! Invariant: a client like any other: it knows what `/v1/live` tells, and nothing of this process. The terminal is
//! left as it was found.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use console::Term;
use fullbore_bench::serve::tls::{TrustError, certificates};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use ureq::Agent;
use ureq::http::StatusCode;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::api::live::Live;
use crate::args::TopArgs;
use crate::serve::KEY_VARIABLE;

mod plot;
mod recent;
mod view;

pub use recent::Recent;
pub use view::{Paint, Size, picture};

#[derive(Debug, thiserror::Error)]
pub enum TopError {
    #[error("cannot ask {url}: {source}; name a running server with --url")]
    Unreachable { url: String, source: Box<ureq::Error> },
    #[error("{url} refuses to tell: {message}")]
    Refused { url: String, message: String },
    #[error("what answers at {url} is no Fullbore server, or one of another version: {source}")]
    Unreadable { url: String, source: serde_json::Error },
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("cannot write to the terminal: {0}")]
    Write(#[from] io::Error),
    #[error("the thread that asks has ended in a way it should not")]
    Died,
}

/// For an answer; a server that takes longer is told of as one that cannot be asked.
const TIMEOUT: Duration = Duration::from_secs(5);
const PERIOD: Duration = Duration::from_secs(1);
/// Of a picture that is no terminal's.
const PLAIN_SIZE: Size = Size { columns: 100, rows: 30 };
/// A server tells of five minutes.
const MAX_BODY_BYTES: u64 = 8 << 20;

pub fn top(args: &TopArgs) -> Result<(), TopError> {
    let source = Source::new(args)?;
    if args.once {
        let mut recent = Recent::default();
        recent.add(source.ask(0)?);
        let is_terminal = io::stdout().is_terminal();
        let paint = if is_terminal { Paint::Ansi } else { Paint::Plain };
        io::stdout().write_all(picture(&recent, size(is_terminal), paint).as_bytes())?;
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let watched = runtime.block_on(watch(source));
    runtime.shutdown_background();
    watched
}

/// Until SIGINT or SIGTERM.
async fn watch(source: Source) -> Result<(), TopError> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut recent = Recent::default();
    let screen = Screen::enter()?;
    loop {
        let asked = async {
            ticks.tick().await;
            let (source, newest) = (source.clone(), recent.newest_ms());
            tokio::task::spawn_blocking(move || source.ask(newest)).await.map_err(|_| TopError::Died)?
        };
        let asked = tokio::select! {
            asked = asked => asked,
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        };
        match asked {
            Ok(live) => {
                recent.add(live);
                screen.show(&picture(&recent, size(true), Paint::Ansi))?;
            }
            Err(error) => screen.show(&format!("{error}\n"))?,
        }
    }
}

fn size(is_terminal: bool) -> Size {
    match Term::stdout().size_checked().filter(|_| is_terminal) {
        Some((rows, columns)) => Size { columns: columns.into(), rows: rows.into() },
        None => PLAIN_SIZE,
    }
}

/// Whom to ask, and how.
#[derive(Clone)]
struct Source {
    agent: Agent,
    url: String,
    key: Option<String>,
    /// All models without it.
    model: Option<String>,
}

impl Source {
    fn new(args: &TopArgs) -> Result<Source, TopError> {
        let mut config = Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false);
        if let Some(path) = &args.ca_cert {
            let trusted: Vec<_> = certificates(path)?.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
            let tls = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&trusted)).build();
            config = config.tls_config(tls);
        }
        let agent = config.build().new_agent();
        let key = args.api_key.clone().or_else(|| std::env::var(KEY_VARIABLE).ok());
        let url = args.url.trim_end_matches('/').to_owned();
        Ok(Source { agent, url, key: key.filter(|key| !key.is_empty()), model: args.model.clone() })
    }

    /// What is newer than `after_ms`.
    fn ask(&self, after_ms: u64) -> Result<Live, TopError> {
        let url = self.url.clone();
        let unreachable = |source| TopError::Unreachable { url: self.url.clone(), source: Box::new(source) };
        let mut request = self.agent.get(format!("{url}/v1/live")).query("after", after_ms.to_string());
        if let Some(model) = &self.model {
            request = request.query("model", model);
        }
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut reply = request.call().map_err(unreachable)?;
        let text = reply.body_mut().with_config().limit(MAX_BODY_BYTES).read_to_string().map_err(unreachable)?;
        match reply.status() {
            StatusCode::OK => serde_json::from_str(&text).map_err(|source| TopError::Unreadable { url, source }),
            status => Err(TopError::Refused { url, message: refusal(status, &text) }),
        }
    }
}

/// The sentence of an error, or what there is instead.
fn refusal(status: StatusCode, text: &str) -> String {
    let body: Option<serde_json::Value> = serde_json::from_str(text).ok();
    let message = body.as_ref().and_then(|body| body["error"]["message"].as_str());
    message.map_or_else(|| format!("it answers {status}"), str::to_owned)
}

/// The terminal's other screen, without a cursor, until dropped.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Screen> {
        print("\x1b[?1049h\x1b[?25l")?;
        Ok(Screen)
    }

    /// In place of what was there, line by line so that nothing flickers.
    fn show(&self, text: &str) -> io::Result<()> {
        print(&format!("\x1b[H{}\x1b[J", text.trim_end_matches('\n').replace('\n', "\x1b[K\r\n") + "\x1b[K"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing put back.
        let _ = print("\x1b[?25h\x1b[?1049l");
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
