//! Connections: used again, dropped, slow, deaf, half closed, too many.

use fullbore::http::tls::Tls;

use super::*;

#[test]
fn a_connection_serves_one_request_after_the_other() {
    let server = Setup::default().start();
    let mut stream = server.connect();
    for _ in 0..3 {
        let body = br#"{"prompt": "x", "max_tokens": 2}"#;
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body].concat()).expect("the server reads");
        let mut bytes = Vec::new();
        let mut part = [0; 4096];
        while !bytes.ends_with(b"}}") {
            let length = stream.read(&mut part).expect("an answer");
            assert!(length > 0, "closed after {}", String::from_utf8_lossy(&bytes));
            bytes.extend_from_slice(&part[..length]);
        }
        assert_eq!(parse_reply(&bytes).ok()["usage"]["completion_tokens"].as_u64().map(|used| used <= 2), Some(true));
    }
}

#[test]
fn a_dropped_connection_frees_its_blocks() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(5)), ..Setup::default() }.start();
    // What lies behind a request, its own end of a line or the next one, hides nobody's leaving.
    let next = vec![b'x'; 20_000];
    let behind: [&[u8]; 3] = [b"", b"\r\n", &next];
    for (stream, behind) in [true, false].into_iter().flat_map(|stream| behind.map(|behind| (stream, behind))) {
        let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": stream, "n": 2});
        let request = post("/v1/completions", body.to_string().as_bytes());
        let mut connection = server.send([request.as_slice(), behind].concat());
        server.wait_for("both choices to run", |server| server.metric("fullbore_requests_running") == 2.0);
        assert!(server.metric("fullbore_kv_blocks{state=\"used\"}") >= 2.0);
        if stream {
            connection.read_exact(&mut [0; 64]).expect("a beginning");
        }
        connection.shutdown(Shutdown::Both).expect("an open connection");
        drop(connection);
        // 900 steps would take 4.5 s at least.
        let left = Instant::now();
        server.wait_for("the blocks", |server| server.metric("fullbore_kv_blocks{state=\"used\"}") == 0.0);
        assert!(left.elapsed() < Duration::from_millis(4000), "it ran on for {:?}", left.elapsed());
        assert_eq!(server.metric("fullbore_requests_running"), 0.0);
    }
    assert_eq!(server.metric("fullbore_requests_finished_total{reason=\"aborted\"}"), 12.0);
}

#[test]
fn a_slow_client_holds_up_nobody_and_misses_nothing() {
    let server = Setup::default().start();
    let body = json!({"prompt": "slow", "max_tokens": 900, "temperature": 0, "ignore_eos": true, "stream": true,
        "return_token_ids": true, "logprobs": 5});
    let mut slow = server.send(post("/v1/completions", body.to_string().as_bytes()));
    server.wait_for("the whole answer", |server| server.metric("fullbore_tokens_generated_total") >= 900.0);
    let (expected, _) = greedy(&server, "slow", 900);
    // Now it reads, in small pieces.
    let mut bytes = Vec::new();
    let mut part = [0; 997];
    while let Ok(length @ 1..) = slow.read(&mut part) {
        bytes.extend_from_slice(&part[..length]);
    }
    let events = events(&parse_reply(&bytes).body, true);
    let got: Vec<u64> = events.iter().flat_map(|event| ids(&event["choices"][0]["token_ids"])).collect();
    assert_eq!(got, expected);
}

#[test]
fn a_client_that_never_reads_is_let_go() {
    let limits = Limits { write_timeout: Duration::from_millis(300), max_connections: 8, ..Limits::default() };
    let server = Setup { limits, ..Setup::default() }.start();
    // More than the system's buffers between us take.
    let body = json!({"prompt": vec!["deaf"; 8], "max_tokens": 900, "ignore_eos": true, "stream": true, "logprobs": 20,
        "return_token_ids": true, "n": 2});
    let deaf: Vec<_> = (0..2).map(|_| server.send(post("/v1/completions", body.to_string().as_bytes()))).collect();
    server.wait_for("both to begin", |server| server.metric("fullbore_requests_running") > 0.0);
    server.wait_for("their end", |server| server.metric("fullbore_requests_running") == 0.0);
    // Their connections are free for others.
    server.wait_for("eight free connections", |server| {
        let open: Vec<_> = (0..8).map(|_| server.send("GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")).collect();
        open.into_iter().all(|mut stream| {
            let mut status = [0; 12];
            stream.read_exact(&mut status).is_ok() && status.ends_with(b"200")
        })
    });
    drop(deaf);
}

#[test]
fn connections_over_the_cap_are_told_so() {
    let limits = Limits { max_connections: 2, ..Limits::default() };
    let server = Setup { limits, ..Setup::default() }.start();
    let mut open: Vec<TcpStream> = (0..2).map(|_| server.connect()).collect();
    for stream in &mut open {
        stream.write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n").expect("the server reads");
        stream.read_exact(&mut [0; 16]).expect("it is served");
    }
    let refused = server.get("/health/live");
    assert!(refused.error(503)["message"].as_str().expect("text").contains("connections"));
    assert!(refused.head.contains("retry-after: "), "{}", refused.head);
    drop(open);
    server.wait_for("a free connection", |server| server.get("/health/live").status == 200);
    assert!(server.metric("fullbore_connections_refused_total") >= 1.0);
}

#[test]
fn heads_and_bodies_that_trickle_are_cut_off() {
    let limits = Limits {
        head_timeout: Duration::from_millis(200),
        body_timeout: Duration::from_millis(300),
        max_connections: 8,
        ..Limits::default()
    };
    let server = Setup { limits, ..Setup::default() }.start();
    // Eight of them take every connection: some send on, and others fall silent.
    let heads = ["", "G", "GET /health/live HTTP/1.1\r\nx-slow: ", "GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"];
    std::thread::scope(|scope| {
        for (head, next) in heads.into_iter().flat_map(|head| [(head, None), (head, Some(b'x'))]) {
            let server = &server;
            scope.spawn(move || {
                let answer = is_cut_off(server.send(head), next).unwrap_or_else(|| panic!("{head:?}, {next:?}"));
                assert_eq!(answer.starts_with(b"HTTP/1.1 200"), head.ends_with("\r\n\r\n"), "{head:?}, {next:?}");
            });
        }
    });
    server.wait_for("a free connection", |server| server.get("/health/live").status == 200);
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 1000\r\n\r\n{\"pro";
    for next in [None, Some(b' ')] {
        let answer = is_cut_off(server.send(head), next).expect("an end");
        assert_eq!(parse_reply(&answer).error(408)["code"], "request_timeout");
    }
    // One that ends early is no request, and no harm.
    let half = server.send("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"pro");
    half.shutdown(Shutdown::Write).expect("an open connection");
    drop(half);
    drop(server.send("\x16\x03\x01\x02 no HTTP at all\r\n\r\n"));
    assert_eq!(server.get("/health/live").status, 200);
}

/// Sends `next` again and again until the server hangs up, and gives what it said; `None` if it listens to the end.
fn is_cut_off(mut stream: TcpStream, next: Option<u8>) -> Option<Vec<u8>> {
    const MOST: usize = 200;
    let mut writer = stream.try_clone().expect("the same connection");
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let sent = |_: &usize| {
                std::thread::sleep(Duration::from_millis(50));
                next.is_none_or(|next| writer.write_all(&[next]).is_ok())
            };
            next.map_or(0, |_| (0..MOST).take_while(sent).count())
        });
        let mut answer = Vec::new();
        // A reset is as good an end as a close.
        let ended = stream.read_to_end(&mut answer);
        let is_ended = !ended.is_err_and(|error| [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()));
        drop(stream);
        (sending.join().expect("no panic") < MOST && is_ended).then_some(answer)
    })
}

#[test]
fn a_handshake_that_stops_is_cut_off() {
    let files = access::folder("handshake");
    access::certify(&files);
    let tls = Tls::open(&files.0.join("cert.pem"), &files.0.join("key.pem")).expect("files");
    let limits = Limits { head_timeout: Duration::from_millis(200), ..Limits::default() };
    let server = Setup { limits, tls: Some(tls), ..Setup::default() }.start();
    // The first bytes of a greeting of 512.
    for (head, next) in [(&b"\x16\x03\x01\x02\x00\x01"[..], None), (b"\x16\x03\x01\x02\x00\x01", Some(0)), (b"", None)]
    {
        assert!(is_cut_off(server.send(head), next).is_some(), "{head:?}, {next:?}");
    }
}

#[test]
fn heads_are_bounded_before_any_key_is_looked_at() {
    let server = Setup::default().start();
    let of = |num_bytes: usize, num_headers: usize| {
        let headers = format!("x-pad: {}\r\n", "a".repeat(num_bytes / num_headers)).repeat(num_headers);
        format!("GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}")
    };
    assert_eq!(read_reply(server.send(of(30_000, 1) + "\r\n")).status, 200);
    // Refused though it does not end, and whatever it says next.
    assert_eq!(read_reply(server.send(of(40_000, 1))).status, 431);
    assert_eq!(read_reply(server.send(of(2_000, 100) + "\r\n")).status, 431);
}

/// Half a connection is none: who will hear nothing of an answer cannot be told from who has left.
#[test]
fn a_half_closed_connection_is_let_go_and_frees_its_blocks() {
    // More than those that are open and those whose end their clients know before the server does.
    let limits = Limits { max_connections: 16, ..Limits::default() };
    let server = Setup { limits, pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    for stream in [true, false] {
        let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": stream}).to_string();
        let mut halves: Vec<_> = (0..3).map(|_| server.send(post("/v1/completions", body.as_bytes()))).collect();
        server.wait_for("all to run", |server| server.metric("fullbore_requests_running") == 3.0);
        halves.iter().for_each(|half| half.shutdown(Shutdown::Write).expect("an open connection"));
        for half in &mut halves {
            // What was said before that may still come, and an end does.
            let _ = half.read_to_end(&mut Vec::new());
        }
        server.wait_for("the blocks", |server| server.metric("fullbore_kv_blocks{state=\"used\"}") == 0.0);
        assert_eq!(server.metric("fullbore_requests_running"), 0.0);
    }
    assert_eq!(server.metric("fullbore_requests_finished_total{reason=\"aborted\"}"), 6.0);
    // Nor do those keep a place that never said a word.
    let silent: Vec<_> = (0..16).map(|_| server.connect()).collect();
    silent.iter().for_each(|half| half.shutdown(Shutdown::Write).expect("an open connection"));
    server.wait_for("a free connection", |server| server.get("/health/live").status == 200);
}
