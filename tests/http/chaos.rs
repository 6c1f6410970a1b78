//! Clients that do all that clients do, many at once, while the device comes and goes: afterwards nothing of them is
//! left, and no answer that anybody got was another than that of a quiet server.
//!
//! Seeded (`FULLBORE_CHAOS_SEED`); how threads take turns is not. `FULLBORE_TEST_FULL` goes on with more seeds.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::random::Random;

use super::*;

/// What a client asked for and would get from a quiet server.
struct Ask {
    body: Value,
    expected: Vec<u64>,
}

/// How clients treated the server, and it them.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    whole: u32,
    left: u32,
    /// Told in so many words: 429, 503, or an error at the end of a stream.
    refused: u32,
}

/// One seed, or more of them.
pub fn seeds() -> Range<u64> {
    let first = std::env::var("FULLBORE_CHAOS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    first..first + if std::env::var_os("FULLBORE_TEST_FULL").is_some() { 12 } else { 1 }
}

/// A device that is lost more often within a minute may be given up.
const NUM_LOSSES: u32 = 3;

/// Has clients at `server` while `destroy` takes the device away some times, and gives it back before long. Requests
/// have at most `max_tokens`; the cache has `num_blocks`.
pub fn run(server: &Harness, max_tokens: u32, num_blocks: f64, seed: u64, destroy: impl Fn(&mut Random, u32)) {
    println!("seed {seed}");
    let ask = |index: u32| {
        let body = json!({"prompt": prompt(index as usize), "max_tokens": 1 + max_tokens * (index % 7) / 6,
            "temperature": 0, "ignore_eos": true, "return_token_ids": true, "logprobs": 1,
            "stop": index.is_multiple_of(3).then_some(["a", "e", "o"]), "stream": !index.is_multiple_of(5)});
        let mut whole = body.clone();
        whole["stream"] = json!(false);
        Ask { body, expected: ids(&server.complete(whole)["choices"][0]["token_ids"]) }
    };
    let asks: Vec<Ask> = (0..24).map(ask).collect();
    let is_over = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let client = |index: u64| {
            let (asks, is_over) = (&asks, &is_over);
            move || {
                let (mut random, mut seen) = (Random::new(seed * 1000 + index), Seen::default());
                while !is_over.load(Ordering::Relaxed) {
                    be_a_client(server, &asks[random.below(asks.len() as u32) as usize], &mut random, &mut seen);
                }
                seen
            }
        };
        let clients: Vec<_> = (0..NUM_CLIENTS).map(|index| scope.spawn(client(index))).collect();
        let over = Over(&is_over);
        let mut random = Random::new(seed);
        let pause = |random: &mut Random| std::thread::sleep(Duration::from_millis(random.between(600, 1500).into()));
        let is_there = |server: &Harness| server.get("/health/ready").status == 200;
        for nth in 0..NUM_LOSSES {
            pause(&mut random);
            destroy(&mut random, nth);
            server.wait_for("the device", is_there);
        }
        pause(&mut random);
        server.wait_for("the device", is_there);
        drop(over);
        let seen = clients.into_iter().map(|client| client.join().expect("what it got is right"));
        seen.fold(Seen::default(), Seen::and)
    });
    println!("{seen:?}");
    assert!(seen.whole > 3 && seen.left > 3 && seen.refused > 0, "{seen:?}");
    let blocks = |state: &str| server.metric(&format!("fullbore_kv_blocks{{state=\"{state}\"}}"));
    let requests = |state: &str| server.metric(&format!("fullbore_requests_{state}"));
    server.wait_for("an idle server", |_| requests("running") + requests("waiting") + blocks("used") == 0.0);
    assert_eq!(blocks("free") + blocks("cached"), num_blocks);
    for Ask { body, expected } in &asks {
        let mut body = body.clone();
        body["stream"] = json!(false);
        assert_eq!(&ids(&server.complete(body)["choices"][0]["token_ids"]), expected, "afterwards");
    }
}

const NUM_CLIENTS: u64 = 10;

/// Clients go when it does, where a test fails too.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Seen {
    fn and(self, other: Seen) -> Seen {
        Seen { whole: self.whole + other.whole, left: self.left + other.left, refused: self.refused + other.refused }
    }
}

/// One connection. All that comes of it is held against what is expected.
fn be_a_client(server: &Harness, ask: &Ask, random: &mut Random, seen: &mut Seen) {
    let request = post("/v1/completions", ask.body.to_string().as_bytes());
    let mut stream = server.connect();
    let mut bytes = Vec::new();
    match random.below(10) {
        // Never heard of HTTP.
        0 => {
            let noise: Vec<u8> = (0..random.between(1, 300)).map(|_| random.next() as u8).collect();
            let _ = stream.write_all(&noise);
            seen.left += 1;
            return;
        }
        // Leaves in the middle of its request.
        1 => {
            let _ = stream.write_all(&request[..random.below(request.len() as u32) as usize]);
            seen.left += 1;
            return;
        }
        // Leaves in the middle of the answer.
        2..=4 => {
            let _ = stream.write_all(&request);
            let most = random.between(0, 3000) as usize;
            read(&mut stream, &mut bytes, most, 512);
            if random.one_in(2) {
                let _ = stream.shutdown(Shutdown::Both);
            }
            seen.left += 1;
        }
        // Says that it will say no more, and listens.
        5 => {
            let _ = stream.write_all(&request);
            let _ = stream.shutdown(Shutdown::Write);
            read(&mut stream, &mut bytes, usize::MAX, 4096);
        }
        // Is slow to listen.
        6 => {
            let _ = stream.write_all(&request);
            std::thread::sleep(Duration::from_millis(random.between(50, 400).into()));
            read(&mut stream, &mut bytes, usize::MAX, random.between(1, 700) as usize);
        }
        // Behaves.
        _ => {
            let _ = stream.write_all(&request);
            read(&mut stream, &mut bytes, usize::MAX, 4096);
        }
    }
    let got = Got::of(&bytes);
    assert!(ask.expected.starts_with(&got.tokens), "{:?} instead of {:?}", got.tokens, ask.expected);
    assert!([0, 200, 429, 503].contains(&got.status), "{}", String::from_utf8_lossy(&bytes));
    if got.is_whole {
        assert_eq!(got.tokens, ask.expected);
        seen.whole += 1;
    }
    if got.is_refused {
        seen.refused += 1;
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Until `most` bytes have come, or the connection ends either way.
fn read(stream: &mut TcpStream, bytes: &mut Vec<u8>, most: usize, at_once: usize) {
    let mut part = vec![0; at_once];
    while bytes.len() < most {
        match stream.read(&mut part) {
            Ok(0) => return,
            Ok(length) => bytes.extend_from_slice(&part[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("an answer that stands still: {error}"),
        }
    }
}

/// As much of an answer as has come.
#[derive(Debug, Default)]
struct Got {
    /// 0 where not even that has come.
    status: u16,
    tokens: Vec<u64>,
    is_whole: bool,
    is_refused: bool,
}

impl Got {
    fn of(bytes: &[u8]) -> Got {
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Got::default() };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let body = &bytes[end + 4..];
        let mut got = Got { status, ..Got::default() };
        let mut take = |value: Value| {
            got.is_refused |= value.get("error").is_some();
            if let Some(choice) = value["choices"].get(0) {
                got.tokens.extend(ids(&choice["token_ids"]));
                got.is_whole |= choice["finish_reason"].is_string();
            }
        };
        if head.contains("text/event-stream") {
            let text = String::from_utf8_lossy(&unchunk_some(body)).into_owned();
            let whole = text.rfind("\n\n").map_or("", |end| &text[..end]);
            let data = whole.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
            data.filter(|data| *data != "[DONE]").for_each(|data| take(serde_json::from_str(data).expect("JSON")));
        } else if let Ok(value) = serde_json::from_slice(body) {
            take(value);
        }
        got
    }
}

/// The chunks of a body, the last of which may be cut off.
fn unchunk_some(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = body.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&body[..end]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let rest = &body[end + 2..];
        let size = size.expect("a chunk's size").min(rest.len());
        out.extend_from_slice(&rest[..size]);
        body = rest.get(size + 2..).unwrap_or_default();
    }
    out
}

/// A cache that is too small for all of them, so that some are sent back, and a queue that fills.
#[test]
fn nothing_is_left_of_clients_and_devices_that_come_and_go() {
    for seed in seeds() {
        let limits = Limits { write_timeout: Duration::from_secs(1), ..Limits::default() };
        let pace = Pace::Each(Duration::from_micros(500));
        let mut setup = Setup { limits, pace, ..Setup::default() };
        setup.config = EngineConfig {
            max_num_seqs: 6,
            num_blocks: 40,
            max_model_len: 512,
            max_queued_requests: 3,
            ..setup.config
        };
        let server = setup.start();
        run(&server, 120, 40.0, seed, |random, _| {
            server.gate.set(Pace::Lost);
            std::thread::sleep(Duration::from_millis(random.between(20, 300).into()));
            server.gate.set(pace);
        });
        assert!(server.metric("fullbore_device_losses_total") > 0.0);
    }
}
