//! Numbers, keeps and sends what engines tell: a PUB socket for what happens, a ROUTER for who missed some of it.
//!
//! Invariant: batches are numbered from 0 without a gap, the first says that nothing is there, and all subscribers get
//! the same bytes. Who asks for batches that are not kept any more gets those that are.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fullbore_engine::memory::kv_events::{KvEvent, KvEventBatch};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio::time::sleep;

use super::batch;
use super::config::KvEventsConfig;
use super::holdings::Holdings;
use super::zmtp::{self, Incoming, SocketKind, Writer, ZmtpError};

#[derive(Debug, thiserror::Error)]
pub enum KvEventsError {
    #[error("cannot publish KV events at {address}: {source}; choose another in --kv-events-config")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("cannot start the thread of KV events: {0}")]
    Thread(#[from] io::Error),
}

/// Of one model. Its sockets are there until the runtime ends.
pub struct Publisher {
    address: SocketAddr,
    replay_address: Option<SocketAddr>,
    max_queue_size: usize,
    shared: Arc<Shared>,
}

struct Shared {
    topic: Vec<u8>,
    max_kept: usize,
    kept: Mutex<Kept>,
    live: broadcast::Sender<Arc<Numbered>>,
}

#[derive(Default)]
struct Kept {
    /// The oldest first.
    batches: VecDeque<Arc<Numbered>>,
    num_bytes: usize,
    next_seq: u64,
}

struct Numbered {
    seq: u64,
    payload: Vec<u8>,
}

/// Connections to one socket, at most.
const MAX_PEERS: usize = 64;
const MAX_TOPICS: usize = 64;
/// Of batches that are kept.
const MAX_KEPT_BYTES: usize = 64 << 20;
/// Blocks of one batch: a whole account goes in several.
const MAX_EVENTS: usize = 1024;
/// Slots for batches are taken at once.
const MAX_WAITING: usize = 1 << 16;
/// Ends a replay: -1.
const END_SEQ: [u8; 8] = [0xff; 8];

impl Publisher {
    /// Binds the sockets for the model that is served as number `nth`.
    pub async fn bind(config: &KvEventsConfig, nth: u16) -> Result<Publisher, KvEventsError> {
        let shared = Arc::new(Shared {
            topic: config.topic.clone().into_bytes(),
            max_kept: config.buffer_steps.max(1),
            kept: Mutex::default(),
            live: broadcast::Sender::new(config.hwm.clamp(1, MAX_WAITING)),
        });
        let address = listen(config.endpoint.of_model(nth), shared.clone(), SocketKind::Pub).await?;
        let replay_address = match config.replay_endpoint {
            Some(endpoint) => Some(listen(endpoint.of_model(nth), shared.clone(), SocketKind::Router).await?),
            None => None,
        };
        Ok(Publisher { address, replay_address, max_queue_size: config.max_queue_size.max(1), shared })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn replay_address(&self) -> Option<SocketAddr> {
        self.replay_address
    }

    /// Where the model's engines send their batches; KV is cut into blocks of this size.
    pub fn start(&self, block_size: u32) -> Result<SyncSender<KvEventBatch>, KvEventsError> {
        let (sender, receiver) = sync_channel(self.max_queue_size);
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("kv-events".to_owned());
        thread.spawn(move || shared.run(&receiver, block_size))?;
        Ok(sender)
    }
}

impl Shared {
    /// Until no engine can send any more.
    fn run(&self, engines: &Receiver<KvEventBatch>, block_size: u32) {
        let mut holdings = Holdings::default();
        self.send(batch::encode(&[KvEvent::Cleared], block_size));
        while let Ok(batch) = engines.recv() {
            let events = holdings.apply(batch);
            events.chunks(MAX_EVENTS).for_each(|events| self.send(batch::encode(events, block_size)));
        }
    }

    fn send(&self, payload: Vec<u8>) {
        let mut kept = self.kept();
        let numbered = Arc::new(Numbered { seq: kept.next_seq, payload });
        kept.next_seq += 1;
        kept.num_bytes += numbered.payload.len();
        kept.batches.push_back(numbered.clone());
        while kept.batches.len() > self.max_kept || kept.num_bytes > MAX_KEPT_BYTES && kept.batches.len() > 1 {
            let oldest = kept.batches.pop_front().expect("more than none are kept");
            kept.num_bytes -= oldest.payload.len();
        }
        // While it is held, so that nobody gets them in another order; there may be no subscriber.
        let _ = self.live.send(numbered);
    }

    fn kept_from(&self, seq: u64) -> Vec<Arc<Numbered>> {
        self.kept().batches.iter().filter(|batch| batch.seq >= seq).cloned().collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn listen(address: SocketAddr, shared: Arc<Shared>, kind: SocketKind) -> Result<SocketAddr, KvEventsError> {
    let bind = |source| KvEventsError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(bind)?;
    let address = listener.local_addr().map_err(bind)?;
    tokio::spawn(accept(listener, shared, kind));
    Ok(address)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, kind: SocketKind) {
    let places = Arc::new(Semaphore::new(MAX_PEERS));
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of file descriptors, which passes only with time.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%peer, "a subscriber of KV events is one too many");
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let _place = place;
            let served = match kind {
                SocketKind::Pub => serve_subscriber(stream, &shared).await,
                SocketKind::Router => serve_replays(stream, &shared).await,
            };
            match served {
                Err(ZmtpError::Io(error)) => tracing::debug!(%peer, %error, "a subscriber of KV events has left"),
                Err(error) => tracing::warn!(%peer, %error, "a subscriber of KV events is hung up on"),
                Ok(()) => {}
            }
        });
    }
}

async fn serve_subscriber(stream: TcpStream, shared: &Shared) -> Result<(), ZmtpError> {
    let (mut reader, mut writer) = zmtp::open(stream, SocketKind::Pub).await?;
    let topics = Mutex::new(Vec::<Vec<u8>>::new());
    let topics = || topics.lock().unwrap_or_else(PoisonError::into_inner);
    let (pinged, mut pings) = mpsc::channel(4);
    let read = async {
        loop {
            match reader.read().await? {
                Incoming::Message(frames) => match frames[0].split_first() {
                    Some((1, topic)) if topics().len() < MAX_TOPICS => topics().push(topic.to_vec()),
                    Some((0, topic)) => unsubscribe(&mut topics(), topic),
                    _ => return Err(ZmtpError::Frame),
                },
                // Its context follows a time to live.
                Incoming::Command { name, body } if name == b"PING" => {
                    let _ = pinged.send(body.get(2..).unwrap_or_default().to_vec()).await;
                }
                Incoming::Command { .. } => {}
            }
        }
    };
    let mut live = shared.live.subscribe();
    let write = async {
        loop {
            tokio::select! {
                batch = live.recv() => match batch {
                    Ok(batch) => {
                        let is_wanted = topics().iter().any(|topic| shared.topic.starts_with(topic));
                        if is_wanted {
                            writer.message(&[&shared.topic, &batch.seq.to_be_bytes(), &batch.payload]).await?;
                        }
                    }
                    Err(RecvError::Lagged(num)) => tracing::debug!(num, "a slow subscriber has missed KV events"),
                    Err(RecvError::Closed) => return Ok(()),
                },
                Some(context) = pings.recv() => writer.command("PONG", &context).await?,
            }
        }
    };
    tokio::select! {
        end = read => end,
        end = write => end,
    }
}

fn unsubscribe(topics: &mut Vec<Vec<u8>>, topic: &[u8]) {
    if let Some(index) = topics.iter().position(|known| known == topic) {
        topics.swap_remove(index);
    }
}

/// Each request is the number of the first batch that is wanted, behind an envelope that goes back with the answers.
async fn serve_replays(stream: TcpStream, shared: &Shared) -> Result<(), ZmtpError> {
    let (mut reader, mut writer) = zmtp::open(stream, SocketKind::Router).await?;
    loop {
        match reader.read().await? {
            Incoming::Message(mut frames) => {
                let first = frames.pop().and_then(|frame| frame.try_into().ok()).map(u64::from_be_bytes);
                let first = first.ok_or(ZmtpError::Frame)?;
                for batch in shared.kept_from(first) {
                    answer(&mut writer, &frames, &batch.seq.to_be_bytes(), &batch.payload).await?;
                }
                answer(&mut writer, &frames, &END_SEQ, &[]).await?;
            }
            Incoming::Command { name, body } if name == b"PING" => {
                writer.command("PONG", body.get(2..).unwrap_or_default()).await?;
            }
            Incoming::Command { .. } => {}
        }
    }
}

async fn answer(writer: &mut Writer, envelope: &[Vec<u8>], seq: &[u8], payload: &[u8]) -> Result<(), ZmtpError> {
    let envelope = envelope.iter().map(Vec::as_slice);
    writer.message(&envelope.chain([seq, payload]).collect::<Vec<_>>()).await
}
