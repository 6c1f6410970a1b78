//! A server measured by a client on the same machine: tokens a second, what a token's way to the client takes, what
//! streams cost that have nothing to say, and what long prompts do to everybody else.
//!
//! The server runs in this process on a [`telltale::Telltale`], so that one clock knows when a token was made and when
//! it was received; CPU time is told apart by threads. Nothing here starts a server.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

use crate::report::Percentiles;
use crate::statistics::Histogram;
use client::{ClientError, Connection, on_client_thread};
use process::{CpuTimes, resident_bytes};
use sink::Sink;
use telltale::{Steps, made_at};

pub mod client;
pub mod process;
pub mod sink;
pub mod telltale;

#[derive(Debug, thiserror::Error)]
pub enum HttpBenchError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("a client's thread cannot be started: {0}")]
    Thread(#[from] io::Error),
    #[error("{received} tokens came of the {expected} that were asked for")]
    Missing { received: u64, expected: u64 },
    #[error("this system does not say how much memory a process has")]
    NoMemory,
    #[error("{opened} of {streams} streams had begun after {} s", .after.as_secs())]
    NotBegun { opened: u32, streams: u32, after: Duration },
}

/// What streams cost at a rate: the server's own if it is free, else the device's.
#[derive(Clone, Debug, Serialize)]
pub struct StreamReport {
    pub streams: u32,
    pub tokens: u64,
    /// From the first request to the last byte.
    pub seconds: f64,
    pub tokens_per_s: f64,
    /// From when the device hands a step's choices to the engine, to when the client's read returns with the token;
    /// where the device does not run ahead.
    pub added_ms: Option<Percentiles>,
    pub cpu: Cpu,
}

/// CPU time by the names of threads.
#[derive(Clone, Debug, Serialize)]
pub struct Cpu {
    pub us_per_token: BTreeMap<String, f64>,
    /// Cores that were busy with this process.
    pub cores: f64,
    /// Of that time.
    pub client_share: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct IdleReport {
    pub streams: u32,
    /// Of the whole process, the client's sockets included, from before the first stream to when all have begun.
    pub growth_bytes: u64,
    pub bytes_per_stream: u64,
}

/// What others see before and while long prompts are posted, all at once, until the last has its answer begun; and
/// while the same is posted to somebody who throws it away, which is the clients' part of it.
#[derive(Clone, Debug, Serialize)]
pub struct LongPromptsReport {
    pub clients: u32,
    pub prompt_bytes: usize,
    /// From the first post to the last answer's head.
    pub seconds: f64,
    pub decoders: u32,
    /// Between two tokens of a stream that decodes, as its client sees it.
    pub gap_ms: Phases<Percentiles>,
    /// Answers of `/health/live`.
    pub health_ms: Phases<Percentiles>,
    /// Cores that threads were busy on, by their names.
    pub cores: Phases<BTreeMap<String, f64>>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Phases<T> {
    pub before: T,
    /// Once a second everything is posted to a [`Sink`].
    pub sink: T,
    pub during: T,
}

const CHAT: &str = "/v1/chat/completions";

fn chat(content: &str, max_tokens: u32) -> String {
    let messages = json!([{"role": "user", "content": content}]);
    json!({"messages": messages, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0, "stream": true})
        .to_string()
}

/// `num_streams` answers of `num_tokens`, all at once; tokens are timed where the device's `steps` are given.
pub fn streams(
    address: SocketAddr,
    steps: Option<&Steps>,
    num_streams: u32,
    num_tokens: u32,
) -> Result<StreamReport, HttpBenchError> {
    let (cpu_before, begun) = (CpuTimes::now(), Instant::now());
    let (received, cpu) = on_client_thread("client", || async move {
        let received = receive(address, num_streams, num_tokens).await;
        // While this thread is there to be seen.
        (received, CpuTimes::now())
    })?;
    let (received, seconds) = (received?, begun.elapsed().as_secs_f64());
    let tokens = received.len() as u64;
    let expected = u64::from(num_streams) * u64::from(num_tokens);
    if tokens != expected {
        return Err(HttpBenchError::Missing { received: tokens, expected });
    }
    let added = steps.map(|steps| {
        let (ended, mut added) = (steps.ended(), Histogram::default());
        let made = received.iter().filter_map(|(letter, at)| Some(*at - made_at(&ended, *letter, *at)?));
        made.for_each(|delay| added.record(delay));
        Percentiles::from(&added)
    });
    Ok(StreamReport {
        streams: num_streams,
        tokens,
        seconds,
        tokens_per_s: tokens as f64 / seconds,
        added_ms: added,
        cpu: Cpu::of(&cpu.since(&cpu_before), tokens, seconds),
    })
}

/// Every letter that came, and when.
async fn receive(address: SocketAddr, num_streams: u32, num_tokens: u32) -> Result<Vec<(u8, Instant)>, ClientError> {
    let mut streams = JoinSet::new();
    for nth in 0..num_streams {
        streams.spawn(async move {
            let mut letters = Vec::with_capacity(num_tokens as usize);
            let mut connection = Connection::open(address).await?;
            connection.post(CHAT, &chat(&nth.to_string(), num_tokens)).await?;
            connection.letters(|letter, received| letters.push((letter, received))).await?;
            Ok::<_, ClientError>(letters)
        });
    }
    let mut all = Vec::new();
    while let Some(letters) = streams.join_next().await {
        all.extend(letters.expect("a stream is not cancelled, and does not panic")?);
    }
    Ok(all)
}

impl Cpu {
    fn of(taken_ns: &BTreeMap<String, u64>, tokens: u64, seconds: f64) -> Cpu {
        let total_ns: u64 = taken_ns.values().sum();
        let client_ns = taken_ns.get("client").copied().unwrap_or(0);
        let us_per_token = |(name, ns): (&String, &u64)| (name.clone(), *ns as f64 / tokens as f64 / 1e3);
        Cpu {
            us_per_token: taken_ns.iter().map(us_per_token).collect(),
            cores: total_ns as f64 / 1e9 / seconds,
            client_share: client_ns as f64 / total_ns.max(1) as f64,
        }
    }
}

/// For streams to begin.
const BEGIN_TIME: Duration = Duration::from_secs(60);
/// For what is left to be done after that.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// Memory of `num_streams` answers that have begun, on a device that is held then.
pub fn idle(address: SocketAddr, steps: &Steps, num_streams: u32) -> Result<IdleReport, HttpBenchError> {
    let grown = on_client_thread("client", || async {
        // What the first answers leave behind is not of those that follow.
        receive(address, 16, 16).await?;
        sleep(SETTLE_TIME).await;
        let before = resident_bytes().ok_or(HttpBenchError::NoMemory)?;
        let opened = Arc::new(AtomicU32::new(0));
        let mut streams = JoinSet::new();
        for nth in 0..num_streams {
            let opened = opened.clone();
            streams.spawn(async move {
                let mut connection = Connection::open(address).await?;
                connection.post(CHAT, &chat(&nth.to_string(), IDLE_TOKENS)).await?;
                let mut num_letters = 0;
                let count = |_, _| {
                    num_letters += 1;
                    opened.fetch_add(u32::from(num_letters == 1), Ordering::Relaxed);
                };
                connection.letters(count).await
            });
        }
        let begun = Instant::now();
        while opened.load(Ordering::Relaxed) < num_streams {
            if let Some(ended) = streams.try_join_next() {
                ended.expect("a stream is not cancelled, and does not panic")?;
            }
            if begun.elapsed() > BEGIN_TIME {
                let opened = opened.load(Ordering::Relaxed);
                return Err(HttpBenchError::NotBegun { opened, streams: num_streams, after: BEGIN_TIME });
            }
            sleep(Duration::from_millis(10)).await;
        }
        steps.hold(true);
        sleep(SETTLE_TIME).await;
        let after = resident_bytes().ok_or(HttpBenchError::NoMemory);
        steps.hold(false);
        Ok(after?.saturating_sub(before))
    })??;
    Ok(IdleReport {
        streams: num_streams,
        growth_bytes: grown,
        bytes_per_stream: grown / u64::from(num_streams.max(1)),
    })
}

/// More than come until the device is held.
const IDLE_TOKENS: u32 = 4000;

/// What is posted, and whom it may disturb.
#[derive(Clone, Copy, Debug)]
pub struct LongPrompts {
    pub num_clients: u32,
    pub prompt_bytes: usize,
    pub num_decoders: u32,
    /// Tokens of a decoder: more than come while this is measured.
    pub decoder_tokens: u32,
    /// How long others are watched before anything is posted.
    pub before: Duration,
}

/// Between two looks at `/health/live`.
const HEALTH_PERIOD: Duration = Duration::from_millis(5);

/// Between two times that everything is posted to a sink: about what a server takes for it.
const SINK_PERIOD: Duration = Duration::from_secs(1);

/// Of what others see.
#[derive(Clone, Debug, Default)]
struct Seen {
    gaps: Histogram,
    health: Histogram,
}

/// Where it is noted now.
#[derive(Clone, Default)]
struct Watch(Arc<Mutex<Seen>>);

/// What was seen in a phase, for how many seconds, and what threads took meanwhile.
struct Phase {
    seen: Seen,
    seconds: f64,
    taken_ns: BTreeMap<String, u64>,
}

impl Watch {
    fn note(&self, note: impl FnOnce(&mut Seen)) {
        note(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What is seen while `work` is done.
    async fn during<T>(&self, work: impl Future<Output = Result<T, ClientError>>) -> Result<Phase, ClientError> {
        let (before, begun) = (CpuTimes::now(), Instant::now());
        self.take();
        // What it made is kept until the phase is over: connections that close are work too.
        let _made = work.await?;
        Ok(Phase {
            seen: self.take(),
            seconds: begun.elapsed().as_secs_f64(),
            taken_ns: CpuTimes::now().since(&before),
        })
    }

    fn take(&self) -> Seen {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

pub fn long_prompts(address: SocketAddr, options: &LongPrompts) -> Result<LongPromptsReport, HttpBenchError> {
    let LongPrompts { num_clients, prompt_bytes, num_decoders, .. } = *options;
    let (sink, watch) = (Sink::start()?, Watch::default());
    let (ends, over) = oneshot::channel();
    let phases = std::thread::scope(|scope| {
        // A thread of its own: one that posts megabytes reads no tokens meanwhile.
        let watched = scope.spawn(|| on_client_thread("watch", || watch_all(address, options, &watch, over)));
        let phases = on_client_thread("client", || post_phases([sink.address(), address], options, &watch, ends));
        let watched = watched.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        watched??;
        Ok::<_, HttpBenchError>(phases??)
    })?;
    fn each<T>(phases: &[Phase; 3], of: impl Fn(&Phase) -> T) -> Phases<T> {
        let [before, sink, during] = phases.each_ref().map(of);
        Phases { before, sink, during }
    }
    let seconds = phases[2].seconds;
    Ok(LongPromptsReport {
        clients: num_clients,
        prompt_bytes,
        seconds,
        decoders: num_decoders,
        gap_ms: each(&phases, |phase| Percentiles::from(&phase.seen.gaps)),
        health_ms: each(&phases, |phase| Percentiles::from(&phase.seen.health)),
        cores: each(&phases, Phase::cores),
    })
}

/// Decoders, and one who looks at the server's health, until there is an answer at the end of `over`.
async fn watch_all(
    address: SocketAddr,
    options: &LongPrompts,
    watch: &Watch,
    over: oneshot::Receiver<()>,
) -> Result<(), ClientError> {
    let mut watched = JoinSet::new();
    for nth in 0..options.num_decoders {
        watched.spawn(decode(address, nth, options.decoder_tokens, watch.clone()));
    }
    watched.spawn(look(address, watch.clone()));
    tokio::select! {
        _ = over => Ok(()),
        Some(ended) = watched.join_next() => {
            let ended = ended.expect("nobody is cancelled, or panics");
            let early = || ClientError::Refused("a decoder ended before the long prompts had their answers".to_owned());
            Err(ended.err().unwrap_or_else(early))
        }
    }
}

/// Nothing is posted, then all of it to a sink, then to the server; `_ends` is dropped at the end.
async fn post_phases(
    [sink, address]: [SocketAddr; 2],
    options: &LongPrompts,
    watch: &Watch,
    _ends: oneshot::Sender<()>,
) -> Result<[Phase; 3], ClientError> {
    let LongPrompts { num_clients, prompt_bytes, before, .. } = *options;
    // Before anybody is watched: this takes time of its own.
    let bodies: Vec<String> = (0..num_clients).map(|nth| chat(&long_prompt(nth, prompt_bytes), 1)).collect();
    let bodies: Vec<Arc<str>> = bodies.into_iter().map(Arc::from).collect();
    sleep(SETTLE_TIME).await;
    let wait = async {
        sleep(before).await;
        Ok(())
    };
    let quiet = watch.during(wait).await?;
    let to_sink = async {
        let begun = Instant::now();
        while begun.elapsed() < before {
            let next = tokio::time::Instant::now() + SINK_PERIOD;
            post_all(sink, &bodies).await?;
            sleep_until(next).await;
        }
        Ok(())
    };
    let posting = watch.during(to_sink).await?;
    let busy = watch.during(post_all(address, &bodies)).await?;
    Ok([quiet, posting, busy])
}

impl Phase {
    fn cores(&self) -> BTreeMap<String, f64> {
        self.taken_ns.iter().map(|(name, ns)| (name.clone(), *ns as f64 / 1e9 / self.seconds)).collect()
    }
}

async fn decode(address: SocketAddr, nth: u32, num_tokens: u32, watch: Watch) -> Result<(), ClientError> {
    let mut connection = Connection::open(address).await?;
    connection.post(CHAT, &chat(&format!("decoder {nth}"), num_tokens)).await?;
    let mut last: Option<Instant> = None;
    let on_letter = |_, received: Instant| {
        if let Some(last) = last.replace(received) {
            watch.note(|seen| seen.gaps.record(received - last));
        }
    };
    connection.letters(on_letter).await
}

async fn look(address: SocketAddr, watch: Watch) -> Result<(), ClientError> {
    let mut connection = Connection::open(address).await?;
    loop {
        let took = connection.get("/health/live").await?;
        watch.note(|seen| seen.health.record(took));
        sleep(HEALTH_PERIOD).await;
    }
}

/// Words that begin like no other such prompt's.
pub fn long_prompt(nth: u32, num_bytes: usize) -> String {
    let words = format!("{nth} is the number of this prompt, and it says so again. ");
    let mut prompt = words.repeat(num_bytes.div_ceil(words.len()));
    prompt.truncate(num_bytes);
    prompt
}

/// Posts all at once, and waits until the last has its answer begun.
async fn post_all(address: SocketAddr, bodies: &[Arc<str>]) -> Result<Vec<Connection>, ClientError> {
    let mut posts = JoinSet::new();
    for body in bodies {
        posts.spawn(post_long(address, body.clone()));
    }
    let mut begun = Vec::new();
    while let Some(posted) = posts.join_next().await {
        begun.push(posted.expect("a post is not cancelled, and does not panic")?);
    }
    Ok(begun)
}

/// Posts a request, and waits until its answer has begun.
async fn post_long(address: SocketAddr, body: Arc<str>) -> Result<Connection, ClientError> {
    let mut connection = Connection::open(address).await?;
    connection.post(CHAT, &body).await?;
    connection.begun().await?;
    Ok(connection)
}
