//! Who is let in, by key, by name and by web page; TLS; and how a server that ends lets go of those who are in.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use clap::Parser;
use fullbore::args::{Args, BenchCommand, Command};
use fullbore::bench::measure_serve;
use fullbore::http::access::Access;
use fullbore::http::keys::Keys;
use fullbore::http::tls::Tls;
use fullbore::top;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

use super::{Folder, Harness, Pace, Reply, Setup, events, post, read_reply};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A server whose clients are known by a file of keys, for requests to any name.
fn keyed(lines: &str) -> Harness {
    Setup { access: Access::new(LOCAL, keys(lines), &["*".to_owned()], &[]), ..Setup::default() }.start()
}

/// An empty folder of a test's own.
pub fn folder(name: &str) -> Folder {
    static NUM_FOLDERS: AtomicU32 = AtomicU32::new(0);
    let folder = Folder::new(&format!("{name}-{}", NUM_FOLDERS.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir_all(&folder.0).expect("a folder");
    folder
}

pub fn keys(lines: &str) -> Keys {
    let folder = folder("keys");
    let path = folder.0.join("keys");
    std::fs::write(&path, lines).expect("a file");
    Keys::new(&[], Some(&path)).expect("keys")
}

fn ask(server: &Harness, head: &str) -> Reply {
    read_reply(server.send(format!("{head}\r\nconnection: close\r\n\r\n")))
}

pub fn chat_as(key: &str, body: &serde_json::Value) -> Vec<u8> {
    let raw = post("/v1/chat/completions", body.to_string().as_bytes());
    let text = String::from_utf8(raw).expect("text");
    text.replacen("\r\n", &format!("\r\nauthorization: Bearer {key}\r\n"), 1).into_bytes()
}

#[test]
fn nobody_asks_without_a_key() {
    let server = keyed("the-right-key alice");
    let paths = ["/v1/models", "/v1/limits", "/v1/live", "/metrics", "/nowhere", "/page/nothing.js"];
    for path in paths {
        for header in ["", "\r\nauthorization: Bearer the-wrong-key", "\r\nauthorization: Basic the-right-key"] {
            let reply = ask(&server, &format!("GET {path} HTTP/1.1\r\nhost: x{header}"));
            assert_eq!(reply.error(401)["code"], "invalid_api_key", "{path} {header}");
            assert!(reply.head.contains("www-authenticate: bearer"), "{}", reply.head);
        }
        for header in ["authorization: Bearer the-right-key", "x-api-key: the-right-key"] {
            let reply = ask(&server, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n{header}"));
            assert_eq!(reply.status, if path.contains("no") { 404 } else { 200 }, "{path} {header}");
        }
    }
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
    server.post("/v1/chat/completions", &body).error(401);
    read_reply(server.send(chat_as("the-right-key", &body))).ok();
    for open in ["/health", "/health/live", "/health/ready", "/", "/page/page.js", "/page/page.css"] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
}

#[test]
fn keys_are_replaced_while_requests_run() {
    let mut server = Setup { pace: Pace::Each(Duration::from_millis(5)), ..Setup::default() };
    server.access = Access::new(LOCAL, keys("the-first-key alice"), &["*".to_owned()], &[]);
    let server = server.start();
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 40, "ignore_eos": true});
    let running = server.send(chat_as("the-first-key", &body));
    let running_count = |server: &Harness| {
        let reply = ask(server, "GET /metrics HTTP/1.1\r\nhost: x\r\nx-api-key: the-first-key");
        let is_one = |line: &str| line.starts_with("fullbore_requests_running{") && line.ends_with(" 1");
        reply.status == 200 && reply.text().lines().any(is_one)
    };
    server.wait_for("the request", running_count);
    server.server.as_ref().expect("running").access().replace_keys(keys("the-second-key alice"));
    read_reply(server.send(chat_as("the-first-key", &body))).error(401);
    read_reply(server.send(chat_as("the-second-key", &body))).ok();
    assert_eq!(read_reply(running).ok()["usage"]["completion_tokens"], 40);
}

#[test]
fn a_keys_rate_is_what_its_file_says() {
    let lines = "key-of-alice alice rpm=3\nkey-of-bob bob tpm=40\nkey-of-carol carol";
    let server = keyed(lines);
    let body = |max_tokens: u32| {
        let messages = json!([{"role": "user", "content": "x"}]);
        json!({"messages": messages, "max_tokens": max_tokens, "ignore_eos": true})
    };
    let chat = |key: &str, max_tokens: u32| read_reply(server.send(chat_as(key, &body(max_tokens))));
    for left in ["2", "1", "0"] {
        let reply = chat("key-of-alice", 2);
        assert_eq!(reply.header("x-ratelimit-remaining-requests"), Some(left));
        assert_eq!(reply.header("x-ratelimit-limit-requests"), Some("3"));
        reply.ok();
    }
    let refused = chat("key-of-alice", 2);
    let seconds: u64 = refused.header("retry-after").expect("waiting helps").parse().expect("a number");
    assert!((1..=20).contains(&seconds), "{seconds}");
    let error = refused.error(429);
    assert_eq!((&error["code"], &error["type"]), (&json!("rate_limit_exceeded"), &json!("rate_limit_error")));
    // Only looking on is free, a wrong body is not.
    let look = || ask(&server, "GET /v1/models HTTP/1.1\r\nhost: x\r\nx-api-key: key-of-alice");
    assert_eq!([look().status, look().status], [200; 2]);
    server.server.as_ref().expect("running").access().replace_keys(keys(lines));
    chat("key-of-alice", 2).error(429);
    // Tokens count once they are computed, and the next request waits for what is owed.
    chat("key-of-bob", 60).ok();
    let error = chat("key-of-bob", 1).error(429);
    assert!(error["message"].as_str().expect("text").contains("40 tokens a minute"), "{error}");
    for _ in 0..6 {
        chat("key-of-carol", 60).ok();
    }
}

#[test]
fn a_keys_share_is_what_its_file_says() {
    let mut setup = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() };
    setup.access = Access::new(LOCAL, keys("key-of-alice alice=1:1\nkey-of-bob bob"), &["*".to_owned()], &[]);
    let server = setup.start();
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "ignore_eos": true});
    let running = || {
        let reply = ask(&server, "GET /metrics HTTP/1.1\r\nhost: x\r\nx-api-key: key-of-bob");
        let text = reply.text();
        let line = text.lines().find(|line| line.starts_with("fullbore_requests_running{")).expect("a metric");
        line.rsplit(' ').next().expect("a value").parse::<u32>().expect("a number")
    };
    let most_of = |key: &str| {
        let streams: Vec<_> = (0..4).map(|_| server.send(chat_as(key, &body))).collect();
        let mut most = 0;
        for _ in 0..200 {
            most = most.max(running());
            std::thread::sleep(Duration::from_millis(1));
        }
        streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
        most
    };
    assert_eq!(most_of("key-of-alice"), 1);
    assert_eq!(most_of("key-of-bob"), 4);
}

#[test]
fn a_page_whose_name_was_pointed_here_is_turned_away() {
    let server = Setup { access: Access::new(LOCAL, Keys::default(), &[], &[]), ..Setup::default() }.start();
    for path in ["/v1/models", "/", "/health/live"] {
        let reply = ask(&server, &format!("GET {path} HTTP/1.1\r\nhost: evil.example:8080"));
        assert_eq!(reply.error(403)["code"], "wrong_host", "{path}");
        assert_eq!(ask(&server, &format!("GET {path} HTTP/1.1\r\nhost: localhost:8080")).status, 200, "{path}");
    }
}

#[test]
fn other_sites_pages_read_nothing_unless_they_are_named() {
    let closed = keyed("the-right-key");
    let preflight = "OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: https://chat.example\r\n\
                     access-control-request-method: POST";
    let reply = ask(&closed, preflight);
    assert!(reply.status == 401 && !reply.head.contains("access-control"), "{reply:?}");

    let origins = ["https://chat.example".to_owned()];
    let access = Access::new(LOCAL, keys("the-right-key"), &["*".to_owned()], &origins);
    let server = Setup { access, ..Setup::default() }.start();
    let reply = ask(&server, preflight);
    assert_eq!(reply.status, 204, "{reply:?}");
    for header in ["allow-origin: https://chat.example", "allow-headers: authorization", "allow-methods: get, post"] {
        assert!(reply.head.contains(&format!("access-control-{header}")), "{}", reply.head);
    }
    // Official clients send headers of their own.
    let asked = "x-stainless-os, authorization";
    let reply = ask(&server, &format!("{preflight}\r\naccess-control-request-headers: {asked}"));
    assert!(reply.head.contains(&format!("access-control-allow-headers: {asked}")), "{}", reply.head);
    // What a page may not do without a key it may read about.
    let refused = ask(&server, "GET /v1/models HTTP/1.1\r\nhost: x\r\norigin: https://chat.example");
    refused.error(401);
    assert!(refused.head.contains("access-control-allow-origin: https://chat.example"), "{}", refused.head);
    for origin in ["https://other.example", "https://chat.example.evil", "null"] {
        let reply = ask(&server, &format!("GET /health/live HTTP/1.1\r\nhost: x\r\norigin: {origin}"));
        assert!(!reply.head.contains("access-control"), "{origin}: {}", reply.head);
        let reply = ask(&server, &preflight.replace("https://chat.example", origin));
        assert_eq!(reply.status, 401, "{origin}: {reply:?}");
    }
}

/// What a reload of the service for systemd has read again is the file that people write to.
#[test]
fn the_unit_is_a_command_whose_keys_are_read_again() {
    let unit = include_str!("../../deploy/fullbore.service");
    let value = |name: &str| unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let words = value("ExecStart").expect("a command").split_whitespace().skip(1);
    let args = Args::try_parse_from(["fullbore"].into_iter().chain(words)).expect("our own words");
    let Command::Serve(args) = args.command else { panic!("it serves") };
    let keys = args.access.api_key_file.expect("a key file");
    assert!(keys.is_absolute(), "{}: no copy that systemd keeps", keys.display());
    assert!(value("LoadCredential").is_none() && value("ExecReload").is_some_and(|reload| reload.contains("-HUP")));
}

/// A certificate for localhost in two files of `folder`.
pub fn certify(folder: &Folder) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    std::fs::write(folder.0.join("cert.pem"), cert.pem()).expect("a file");
    std::fs::write(folder.0.join("key.pem"), signing_key.serialize_pem()).expect("a file");
    cert.der().clone()
}

/// What a client that trusts `certificate` alone gets.
fn get_by_tls(server: &Harness, certificate: &CertificateDer<'static>, path: &str) -> std::io::Result<Reply> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).expect("a certificate");
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().expect("versions");
    let connector = TlsConnector::from(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()));
    server.runtime.block_on(async {
        let stream = TcpStream::connect(server.address).await?;
        let name = ServerName::try_from("localhost").expect("a name");
        let mut stream = connector.connect(name, stream).await?;
        let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        Ok(super::parse_reply(&bytes))
    })
}

#[test]
fn tls_serves_and_its_files_are_replaced() {
    let files = folder("tls");
    let (cert, key) = (files.0.join("cert.pem"), files.0.join("key.pem"));
    let first = certify(&files);
    let server = Setup { tls: Some(Tls::open(&cert, &key).expect("files")), ..Setup::default() }.start();
    assert_eq!(get_by_tls(&server, &first, "/v1/models").expect("TLS").status, 200);
    // Whoever speaks plain HTTP gets no answer in it.
    let mut plain = Vec::new();
    // An error is as good as an alert.
    let _ = server.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n").read_to_end(&mut plain);
    assert!(!plain.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&plain));
    let tls = || server.server.as_ref().expect("running").tls().expect("TLS");
    std::fs::write(&cert, "no certificate").expect("a file");
    let sentence = tls().reload().expect_err("no certificate").to_string();
    assert!(sentence.contains("--tls-cert") && sentence.contains("no certificate"), "{sentence}");
    assert_eq!(get_by_tls(&server, &first, "/v1/models").expect("the old one").status, 200);
    let second = certify(&files);
    tls().reload().expect("files");
    assert_eq!(get_by_tls(&server, &second, "/v1/models").expect("the new one").status, 200);
    get_by_tls(&server, &first, "/v1/models").expect_err("the old one is gone");
    let other = folder("tls");
    certify(&other);
    let sentence = Tls::open(&cert, &other.0.join("key.pem")).err().expect("another key").to_string();
    assert!(sentence.contains("do not work together"), "{sentence}");
}

/// `fullbore bench serve` and `fullbore top`, of a server that has a certificate of its own making.
#[test]
fn clients_trust_a_certificate_that_they_are_given() {
    let files = folder("trust");
    certify(&files);
    let (cert, key) = (files.0.join("cert.pem"), files.0.join("key.pem"));
    let server = Setup { tls: Some(Tls::open(&cert, &key).expect("files")), ..Setup::default() }.start();
    let url = format!("https://localhost:{}", server.address.port());
    let command = |words: &str| {
        let words = format!("fullbore {words} --url {url}");
        Args::try_parse_from(words.split_whitespace()).expect("its own words").command
    };
    let serve = |words: &str| {
        let words = format!(
            "bench serve --device sim --concurrency 2 --limit 4 --lengths fixed:8:4 --runs 1 --warm-up 0 {words}"
        );
        let Command::Bench { command: BenchCommand::Serve(args) } = command(&words) else { panic!("it is serve") };
        measure_serve(&args).map_err(|error| error.to_string())
    };
    let top = |words: &str| {
        let Command::Top(args) = command(&format!("top --once {words}")) else { panic!("it is top") };
        top::top(&args).map_err(|error| error.to_string())
    };
    let trust = format!("--ca-cert {}", cert.display());
    let result = serve(&trust).expect("a result");
    assert_eq!(result.measurements[0].runs[0].counts["completed"], 4, "{:?}", result.invalid);
    top(&trust).expect("a picture");
    // Public authorities do not know it, and a key is no certificate.
    assert!(serve("").expect_err("no trust").contains("cannot be reached"));
    assert!(top("").expect_err("no trust").contains("cannot ask"));
    for sentence in [
        serve(&format!("--ca-cert {}", key.display())).expect_err("no certificate"),
        top(&format!("--ca-cert {}", key.display())).expect_err("no certificate"),
    ] {
        assert!(sentence.contains("key.pem has no certificate"), "{sentence}");
    }
}

#[test]
fn a_server_that_drains_answers_whom_it_has_and_refuses_others() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(5)), ..Setup::default() }.start();
    let body = json!({"prompt": "x", "max_tokens": 100, "ignore_eos": true, "stream": true}).to_string();
    let stream = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("the stream", |server| server.metric("fullbore_requests_running") == 1.0);
    let running = server.server.as_ref().expect("running");
    let most = Duration::from_secs(20);
    std::thread::scope(|scope| {
        let drained = scope.spawn(|| server.runtime.block_on(running.drain(most)));
        server.wait_for("the end", |server| server.get("/health/ready").status == 503);
        let reply = server.post("/v1/completions", &json!({"prompt": "x"}));
        assert_eq!(reply.error(503)["code"], "unavailable");
        assert!(reply.head.contains("retry-after:"), "{}", reply.head);
        assert_eq!(server.get("/health/live").status, 200);
        let all = events(&read_reply(stream).body, true);
        assert_eq!(all.last().expect("events")["choices"][0]["finish_reason"], "length");
        drained.join().expect("drained");
    });
}
