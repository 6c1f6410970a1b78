//! KV events over real sockets: subscribers of their own, who speak ZMTP by hand and know nothing but what they are
//! sent, against what the server finds of prompts. That they are the block table's truth is in `kv_events.rs` above.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};

use fullbore::kv_events::{KvEventsConfig, Publisher};
use fullbore_engine::memory::kv_events::{KvEvent, KvEventBatch, KvEventSender};

use super::*;
use crate::random::Random;

const BLOCK_SIZE: usize = 16;

/// A peer that has greeted.
struct Socket(TcpStream);

impl Socket {
    fn connect(address: SocketAddr, kind: &str) -> Socket {
        let mut socket = Socket::greeted(address, 3);
        let mut greeting = [0; 64];
        socket.0.read_exact(&mut greeting).expect("a greeting");
        assert_eq!((greeting[0], greeting[9], greeting[10], &greeting[12..17]), (0xff, 0x7f, 3, &b"NULL\0"[..]));
        let length = (kind.len() as u32).to_be_bytes();
        let ready = [&b"\x05READY\x0bSocket-Type"[..], &length, kind.as_bytes()].concat();
        socket.0.write_all(&[&[4, ready.len() as u8][..], &ready].concat()).expect("it reads");
        let (flags, ready) = socket.frame();
        assert!(flags == 4 && ready.starts_with(b"\x05READY\x0bSocket-Type"), "{ready:?}");
        socket
    }

    /// As a peer of this major version greets.
    fn greeted(address: SocketAddr, major: u8) -> Socket {
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        let mut greeting = [0; 64];
        (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, major, 1);
        greeting[12..16].copy_from_slice(b"NULL");
        stream.write_all(&greeting).expect("it reads");
        Socket(stream)
    }

    fn subscriber(address: SocketAddr, topic: &str) -> Socket {
        let mut socket = Socket::connect(address, "SUB");
        socket.send(&[&[&[1], topic.as_bytes()].concat()]);
        // Commands are read in order: with the answer to this one it is subscribed.
        socket.0.write_all(b"\x04\x09\x04PING\0\0ab").expect("it reads");
        loop {
            match socket.frame() {
                (4, pong) => assert_eq!(pong, b"\x04PONGab"),
                _ => continue,
            }
            return socket;
        }
    }

    fn send(&mut self, frames: &[&[u8]]) {
        for (index, frame) in frames.iter().enumerate() {
            let more = u8::from(index + 1 < frames.len());
            self.0.write_all(&[&[more, frame.len() as u8][..], frame].concat()).expect("it reads");
        }
    }

    fn frame(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).expect("a frame");
        let mut length = u64::from(head[1]);
        if head[0] & 2 != 0 {
            let mut rest = [0; 7];
            self.0.read_exact(&mut rest).expect("a length");
            length = rest.iter().fold(length, |length, byte| length << 8 | u64::from(*byte));
        }
        let mut frame = vec![0; length as usize];
        self.0.read_exact(&mut frame).expect("a frame");
        (head[0], frame)
    }

    /// A batch: its first frame, its number, and what it says.
    fn batch(&mut self) -> (Vec<u8>, u64, Vec<u8>) {
        let mut frames = Vec::new();
        loop {
            let (flags, frame) = self.frame();
            frames.push(frame);
            if flags & 1 == 0 {
                break;
            }
        }
        let [first, seq, payload] = frames.try_into().expect("three frames");
        (first, u64::from_be_bytes(seq.try_into().expect("8 bytes")), payload)
    }

    /// All batches that are kept from this one on.
    fn replay(address: SocketAddr, from: u64) -> Vec<(u64, Vec<u8>)> {
        let mut socket = Socket::connect(address, "REQ");
        socket.send(&[b"", &from.to_be_bytes()]);
        let mut batches = Vec::new();
        loop {
            let (delimiter, seq, payload) = socket.batch();
            assert_eq!(delimiter, b"");
            if payload.is_empty() {
                assert_eq!(seq, u64::MAX);
                return batches;
            }
            batches.push((seq, payload));
        }
    }

    fn hangs_up(mut self) -> bool {
        let mut rest = Vec::new();
        let ended = self.0.read_to_end(&mut rest);
        ended.map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |_| true)
    }
}

/// Parent and tokens of each block, as events say.
#[derive(Debug, Default, PartialEq)]
struct Index {
    blocks: HashMap<u64, (Option<u64>, Vec<u64>)>,
    next_seq: u64,
}

impl Index {
    fn replayed(address: SocketAddr) -> Index {
        let mut index = Index::default();
        Socket::replay(address, 0).iter().for_each(|(seq, payload)| index.apply(*seq, payload));
        index
    }

    fn apply(&mut self, seq: u64, payload: &[u8]) {
        assert_eq!(seq, self.next_seq, "a gap");
        self.next_seq += 1;
        let batch: Value = rmp_serde::from_slice(payload).expect("MessagePack");
        assert_eq!((batch[0].is_f64(), &batch[2]), (true, &json!(0)), "{batch}");
        for event in batch[1].as_array().expect("events") {
            match event["type"].as_str().expect("a type") {
                "BlockStored" => self.store(event),
                "BlockRemoved" => {
                    for hash in ids(&event["block_hashes"]) {
                        assert!(self.blocks.remove(&hash).is_some(), "{hash} was not there");
                    }
                }
                "AllBlocksCleared" => self.blocks.clear(),
                other => panic!("{other}"),
            }
        }
    }

    fn store(&mut self, event: &Value) {
        assert_eq!((&event["block_size"], &event["medium"]), (&json!(BLOCK_SIZE), &json!("GPU")));
        let (hashes, tokens) = (ids(&event["block_hashes"]), ids(&event["token_ids"]));
        assert_eq!(tokens.len(), hashes.len() * BLOCK_SIZE);
        let mut parent = event["parent_block_hash"].as_u64();
        for (hash, tokens) in hashes.into_iter().zip(tokens.chunks(BLOCK_SIZE)) {
            assert!(self.blocks.insert(hash, (parent, tokens.to_vec())).is_none(), "{hash} is stored twice");
            parent = Some(hash);
        }
    }

    /// Tokens of a prompt, which has one more at least, that are there.
    fn num_cached(&self, prompt: &[u64]) -> u64 {
        let mut parent = None;
        let found = prompt[..prompt.len() - 1].chunks_exact(BLOCK_SIZE).take_while(|chunk| {
            let block = self.blocks.iter().find(|(_, (before, tokens))| *before == parent && tokens == chunk);
            parent = block.map(|(hash, _)| *hash);
            parent.is_some()
        });
        (found.count() * BLOCK_SIZE) as u64
    }
}

/// A server on so many devices with few blocks, and what tells of them.
fn published(num_devices: u16) -> (Harness, Publisher) {
    published_through(num_devices, |sender| sender)
}

/// The same, with each device's events through what is in between.
fn published_through(
    num_devices: u16,
    mut between: impl FnMut(KvEventSender) -> KvEventSender,
) -> (Harness, Publisher) {
    let config = EngineConfig { max_num_seqs: 4, max_model_len: 256, num_blocks: 48, ..Setup::default().config };
    let setup = Setup { config, loaded: false, ..Setup::default() };
    let mut plans: Vec<Plan> = (0..num_devices).map(|_| setup.plan_behind(Gate::new(Pace::Free))).collect();
    let server = setup.start();
    let config: KvEventsConfig =
        r#"{"endpoint": "tcp://127.0.0.1:0", "replay_endpoint": "tcp://127.0.0.1:0", "topic": "kv@here@sim-model"}"#
            .parse()
            .expect("a config");
    let publisher = server.runtime.block_on(Publisher::bind(&config, 0)).expect("free ports");
    let to = publisher.start(BLOCK_SIZE as u32).expect("a thread");
    for (source, plan) in (0..).zip(&mut plans) {
        plan.seat.title = format!("sim@{source}");
        plan.kv_events = Some(between(KvEventSender { source, to: to.clone() }));
    }
    drop(to);
    server.server.as_ref().expect("running").set_models(vec![start::load(plans).expect("simulators load")]);
    (server, publisher)
}

/// Hands on what a device tells, and keeps the names of the blocks that it has by that.
fn overheard(sender: KvEventSender, names: Arc<Mutex<HashSet<u64>>>) -> KvEventSender {
    let (source, (to, batches)) = (sender.source, sync_channel::<KvEventBatch>(1));
    std::thread::spawn(move || {
        for batch in batches {
            let mut names = names.lock().expect("nobody panics");
            for event in &batch.events {
                let is_new = match event {
                    KvEvent::Stored(block) => names.insert(block.hash.0 as u64),
                    KvEvent::Removed(hash) => names.remove(&(hash.0 as u64)),
                    KvEvent::Cleared => {
                        names.clear();
                        true
                    }
                };
                assert!(is_new, "{event:?} was so already");
            }
            drop(names);
            sender.to.send(batch).expect("somebody publishes");
        }
    });
    KvEventSender { source, to }
}

/// Several begin alike, and all together are more than there is room for.
fn prompts(seed: u64) -> Vec<Vec<u64>> {
    let mut random = Random::new(seed);
    let mut tokens = |least: u32, most: u32| -> Vec<u64> {
        (0..random.between(least, most)).map(|_| u64::from(random.between(40, 90))).collect()
    };
    let prefixes: Vec<Vec<u64>> = (0..5).map(|_| tokens(20, 90)).collect();
    (0..60).map(|index| [prefixes[index % 5].clone(), tokens(1, 70)].concat()).collect()
}

fn ask(server: &Harness, prompts: &[Vec<u64>]) {
    std::thread::scope(|scope| {
        for some in prompts.chunks(prompts.len().div_ceil(4)) {
            scope.spawn(move || {
                for prompt in some {
                    server.complete(json!({"prompt": prompt, "max_tokens": 20, "ignore_eos": true}));
                }
            });
        }
    });
}

fn num_cached(reply: &Value) -> u64 {
    reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
}

/// Engines tell after a step, of which a client may hear before.
fn wait_until_told(server: &Harness, publisher: &Publisher) -> Index {
    let replay = publisher.replay_address().expect("it was asked for");
    server.wait_for("events of all blocks", |server| {
        let of = |state: &str| server.metric(&format!("fullbore_kv_blocks{{state=\"{state}\"}}"));
        of("used") == 0.0 && of("cached") == Index::replayed(replay).blocks.len() as f64
    });
    Index::replayed(replay)
}

#[test]
fn an_index_of_events_alone_knows_what_the_server_finds() {
    let (server, publisher) = published(1);
    let mut first = Socket::subscriber(publisher.address(), "kv@");
    let mut other = Socket::subscriber(publisher.address(), "kv@there");
    let prompts = prompts(1);
    ask(&server, &prompts[..30]);
    let mut late = Socket::subscriber(publisher.address(), "");
    ask(&server, &prompts[30..]);
    let mut index = wait_until_told(&server, &publisher);
    assert!(!index.blocks.is_empty() && index.next_seq > 20, "{index:?}");
    // Who was there all along, but for its first moment, and who came later: both ask for what they missed.
    for subscriber in [&mut first, &mut late] {
        let mut own = Index::default();
        while own.next_seq < index.next_seq {
            let (topic, seq, payload) = subscriber.batch();
            assert_eq!(topic, b"kv@here@sim-model");
            if seq > own.next_seq {
                let missed = Socket::replay(publisher.replay_address().expect("there"), own.next_seq);
                missed.iter().filter(|(missed, _)| *missed < seq).for_each(|(seq, payload)| own.apply(*seq, payload));
            }
            own.apply(seq, &payload);
        }
        assert_eq!(own, index);
    }
    let mut num_found = 0;
    for prompt in prompts.iter().rev().chain(&prompts) {
        let reply = server.complete(json!({"prompt": prompt, "max_tokens": 1, "ignore_eos": true}));
        assert_eq!(num_cached(&reply), index.num_cached(prompt), "{prompt:?}");
        num_found += num_cached(&reply);
        index = wait_until_told(&server, &publisher);
    }
    assert!(num_found > 1000, "{num_found}");
    // Of another topic nothing was sent.
    other.0.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
    assert!(other.0.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
}

#[test]
fn salts_are_told_with_the_first_block() {
    let (server, publisher) = published(1);
    let body = json!({"prompt": vec![50; 40], "max_tokens": 1, "cache_salt": "tenant-7"});
    server.complete(body);
    wait_until_told(&server, &publisher);
    let batches = Socket::replay(publisher.replay_address().expect("there"), 1);
    let batch: Value = rmp_serde::from_slice(&batches[0].1).expect("MessagePack");
    assert_eq!(batch[1][0]["extra_keys"], json!([["tenant-7"], null]), "{batch}");
}

#[test]
fn devices_of_one_worker_are_told_as_one() {
    let tables = [0, 1].map(|_| Arc::new(Mutex::new(HashSet::new())));
    let (server, publisher) = published_through(2, |sender| {
        let table = tables[usize::from(sender.source)].clone();
        overheard(sender, table)
    });
    let prompts = prompts(2);
    // What a device tells is its table, and what the worker tells is what any of them has: no block less or more.
    let wait_for_the_truth = || {
        server.wait_for("events of all blocks of both devices", |server| {
            let told: HashSet<u64> =
                Index::replayed(publisher.replay_address().expect("there")).blocks.into_keys().collect();
            let tables = [0, 1].map(|device: usize| tables[device].lock().expect("nobody panics").clone());
            let is_its_table = |device: usize| {
                let of = |state| server.metric(&format!("fullbore_kv_blocks{{device=\"sim@{device}\",{state}}}"));
                of("state=\"used\"") == 0.0 && of("state=\"cached\"") == tables[device].len() as f64
            };
            (0..2).all(is_its_table) && !told.is_empty() && told == &tables[0] | &tables[1]
        });
    };
    ask(&server, &prompts);
    wait_for_the_truth();
    for prompt in &prompts {
        // What one device has, the worker has; the request may be with the other.
        server.wait_for("what is found to have been told", |server| {
            let index = Index::replayed(publisher.replay_address().expect("there"));
            let told = index.num_cached(prompt);
            let reply = server.complete(json!({"prompt": prompt, "max_tokens": 1, "ignore_eos": true}));
            num_cached(&reply) <= told
        });
    }
    wait_for_the_truth();
}

#[test]
fn a_server_that_is_started_anew_begins_at_0_with_nothing() {
    let (server, publisher) = published(1);
    server.wait_for("the first batch", |_| Index::replayed(publisher.replay_address().expect("there")).next_seq > 0);
    let batches = Socket::replay(publisher.replay_address().expect("there"), 0);
    let batch: Value = rmp_serde::from_slice(&batches[0].1).expect("MessagePack");
    assert_eq!((batches[0].0, &batch[1]), (0, &json!([{"type": "AllBlocksCleared"}])));
}

#[test]
fn peers_that_are_older_or_odd_are_hung_up_on_and_others_go_on() {
    let (server, publisher) = published(1);
    let (address, replay) = (publisher.address(), publisher.replay_address().expect("there"));
    // ZMTP 2.0 sends its socket's type after its version, and 1.0 a length.
    assert!(Socket::greeted(address, 1).hangs_up());
    let mut web = TcpStream::connect(address).expect("it listens");
    web.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").expect("it reads");
    assert!(Socket(web).hangs_up());
    let mut huge = Socket::connect(replay, "DEALER");
    huge.0.write_all(&[2, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).expect("it reads");
    assert!(huge.hangs_up());
    let mut short = Socket::connect(replay, "REQ");
    short.send(&[b"", b"0"]);
    assert!(short.hangs_up());
    server.complete(json!({"prompt": vec![50; 100], "max_tokens": 1}));
    assert!(wait_until_told(&server, &publisher).num_cached(&[50; 100]) == 96);
}
