//! The server over real sockets, on the simulator, in this process: raw HTTP/1.1 in, bytes out. Needs nothing.
//!
//! The simulator is wrapped in a gate, so that a test decides when steps end, how long they take and whether they fail.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::time::{Duration, Instant};

use fullbore::api::ServedModel;
use fullbore::costs::SavedCosts;
use fullbore::http::accept::Limits;
use fullbore::http::access::Access;
use fullbore::http::tls::Tls;
use fullbore::serve::{Entrance, Server};
use fullbore::start::{self, Plan};
use fullbore::traces::Tracer;
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimOptions};
use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, RowSource, Ticket, WeightSpec};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::cost::profile::{DeviceProfile, ProfiledDevice, ProfiledLimits, ProfiledModel};
use fullbore_engine::cost::{CostModel, Prices, StepShape};
use fullbore_engine::engine::EngineStats;
use fullbore_engine::recording::Recording;
use fullbore_engine::request::{Event, Flow, Request, Share, Sink, TokenId};
use fullbore_engine::tensor::{BufferId, Weight};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

mod access;
mod anthropic;
mod bench;
pub mod chaos;
mod embeddings;
mod limits;
mod live;
mod openapi;
mod parameters;
mod responses;
mod several;
mod structured;
mod tools;
mod traces;

/// How steps end.
#[derive(Clone, Copy, PartialEq)]
enum Pace {
    Free,
    Each(Duration),
    /// The host takes so long to hand a step over.
    SlowSubmit(Duration),
    /// The host takes so long to see that a step has ended.
    SlowRead(Duration),
    Stalled,
    Lost,
    Panic,
}

#[derive(Clone)]
struct Gate(Arc<(Mutex<Pace>, Condvar)>);

impl Gate {
    fn new(pace: Pace) -> Gate {
        Gate(Arc::new((Mutex::new(pace), Condvar::new())))
    }

    fn set(&self, pace: Pace) {
        *self.0.0.lock().expect("no panic holds it") = pace;
        self.0.1.notify_all();
    }

    fn pace(&self) -> Pace {
        *self.0.0.lock().expect("no panic holds it")
    }

    fn pass(&self) -> Pace {
        let pace = self.0.0.lock().expect("no panic holds it");
        *self.0.1.wait_while(pace, |pace| *pace == Pace::Stalled).expect("no panic holds it")
    }
}

struct Gated {
    sim: SimBackend,
    gate: Gate,
}

impl Backend for Gated {
    fn info(&self) -> &DeviceInfo {
        self.sim.info()
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        self.sim.alloc(label, size_bytes)
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        self.sim.alloc_host(label, size_bytes)
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.sim.write(buffer, offset_bytes, data)
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        self.sim.load_weight(spec, source)
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        self.sim.weight_bytes(spec)
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        if let Pace::SlowSubmit(time) = self.gate.pace() {
            std::thread::sleep(time);
        }
        self.sim.submit(recording)
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let begun = Instant::now();
        let pace = self.gate.pass();
        match pace {
            Pace::Lost => {
                return Err(DeviceError::Lost { device: "sim".to_owned(), reason: "unplugged".to_owned() });
            }
            Pace::Panic => panic!("a bug that a test planted"),
            Pace::Each(time) => std::thread::sleep(time),
            Pace::Free | Pace::Stalled | Pace::SlowSubmit(_) | Pace::SlowRead(_) => {}
        }
        let ran = self.sim.wait(ticket, out)?;
        if let Pace::SlowRead(time) = pace {
            std::thread::sleep(time);
        }
        Ok(if matches!(pace, Pace::Each(_)) { begun..Instant::now() } else { ran })
    }

    fn settle(&mut self) -> LoadTimes {
        self.sim.settle()
    }

    fn reopen(&mut self) -> Result<(), DeviceError> {
        match self.gate.pace() {
            Pace::Lost => Err(DeviceError::Lost { device: "sim".to_owned(), reason: "still unplugged".to_owned() }),
            _ => self.sim.reopen(),
        }
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// A server on a free port, ended when dropped.
pub struct Harness {
    runtime: Runtime,
    server: Option<Server>,
    address: SocketAddr,
    gate: Gate,
}

struct Setup {
    limits: Limits,
    access: Access,
    tls: Option<Tls>,
    tracer: Option<Tracer>,
    config: EngineConfig,
    pace: Pace,
    sim: SimOptions,
    shares: Vec<(&'static str, Share)>,
    /// The folder for prices of steps.
    costs: Option<PathBuf>,
    loaded: bool,
    bundle: fn(&mut Bundle),
}

impl Default for Setup {
    fn default() -> Setup {
        let config = EngineConfig {
            max_num_seqs: 16,
            max_num_batched_tokens: 256,
            max_model_len: 1024,
            block_size: 16,
            num_blocks: 1024,
            ..EngineConfig::default()
        };
        Setup {
            limits: Limits::default(),
            access: Access::default(),
            tls: None,
            tracer: None,
            config,
            pace: Pace::Free,
            sim: SimOptions::default(),
            shares: Vec::new(),
            costs: None,
            loaded: true,
            bundle: |_| {},
        }
    }
}

impl Setup {
    fn start(mut self) -> Harness {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let access = std::mem::take(&mut self.access);
        let entrance = Entrance { limits: self.limits, access, tls: self.tls.take(), tracer: self.tracer.take() };
        let server = runtime.block_on(Server::start(host, 0, entrance)).expect("a free port");
        let gate = Gate::new(self.pace);
        let harness = Harness { runtime, address: server.address(), server: Some(server), gate };
        if self.loaded {
            harness.load(&self);
        }
        harness
    }

    fn plan(&self) -> Plan {
        self.plan_behind(Gate::new(self.pace))
    }

    fn plan_behind(&self, gate: Gate) -> Plan {
        let mut bundle = Bundle::simulated();
        (self.bundle)(&mut bundle);
        let config = self.config;
        let backend = Box::new(Gated { sim: SimBackend::new(self.sim), gate });
        let plan = Plan::of("sim-model", bundle, backend, config, 0);
        let costs = |folder: &PathBuf| {
            SavedCosts::new(folder, plan.backend.info(), &plan.bundle.name, &plan.config, &plan.memory)
        };
        Plan { costs: self.costs.as_ref().map(costs), ..plan }
    }
}

impl Harness {
    /// Serves models that were loaded as the command line does it.
    pub fn serving(models: Vec<ServedModel>) -> Harness {
        let harness = Setup { loaded: false, ..Setup::default() }.start();
        harness.server.as_ref().expect("running").set_models(models);
        harness
    }

    fn load(&self, setup: &Setup) {
        let mut model = setup.plan_behind(self.gate.clone()).load().expect("the simulator loads");
        model.shares = setup.shares.iter().map(|&(name, share)| (name.to_owned(), share)).collect();
        self.server.as_ref().expect("running").set_models(vec![model]);
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        stream
    }

    pub fn send(&self, raw: impl AsRef<[u8]>) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(raw.as_ref()).expect("the server reads");
        stream
    }

    pub fn get(&self, path: &str) -> Reply {
        read_reply(self.send(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")))
    }

    fn post_bytes(&self, path: &str, body: &[u8]) -> Reply {
        read_reply(self.send(post(path, body)))
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    pub fn complete(&self, body: Value) -> Value {
        self.post("/v1/completions", &body).ok()
    }

    pub fn chat(&self, body: Value) -> Value {
        self.post("/v1/chat/completions", &body).ok()
    }

    /// The events of a stream; the bytes around them are checked.
    fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = json!(true);
        let reply = self.post(path, &body);
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(reply.head.contains("content-type: text/event-stream"), "{}", reply.head);
        events(&reply.body, true)
    }

    /// The value of the one sample that has these labels, such as `steps_total` or `kv_blocks{state="used"}`, whatever
    /// others it has.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let split = |name: &str| {
            let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
            let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
            (name.to_owned(), labels.map(str::to_owned).collect::<Vec<String>>())
        };
        let (name, labels) = split(name);
        let samples = text.lines().filter_map(|line| line.rsplit_once(' '));
        let has = |sample: &str| {
            let (found, its) = split(sample);
            found == name && labels.iter().all(|label| its.contains(label))
        };
        let found: Vec<&str> = samples.filter(|(sample, _)| has(sample)).map(|(_, value)| value).collect();
        let [value] = found[..] else { panic!("{} of {name} {labels:?} in:\n{text}", found.len()) };
        value.parse().expect("a number")
    }

    pub fn wait_for(&self, what: &str, ready: impl Fn(&Harness) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !ready(self) {
            assert!(Instant::now() < deadline, "{what} has not come");
            std::thread::yield_now();
        }
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.gate.set(Pace::Free);
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.shutdown(Duration::from_secs(1)));
        }
    }
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    body: Vec<u8>,
}

impl Reply {
    /// `name` in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// The error's fields, after a check that they are OpenAI's.
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        let error = self.json()["error"].clone();
        let fields: Vec<_> = error.as_object().expect("an error object").keys().collect();
        assert_eq!(fields, ["message", "type", "param", "code"], "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{error}");
        assert!(error["type"].is_string(), "{error}");
        error
    }
}

pub fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Reads until the server closes.
pub fn read_reply(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset && !bytes.is_empty() => {}
        Err(error) => panic!("no reply: {error}, after {}", String::from_utf8_lossy(&bytes)),
    }
    parse_reply(&bytes)
}

fn parse_reply(bytes: &[u8]) -> Reply {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8(bytes[..end + 2].to_vec()).expect("a head in ASCII").to_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    let body = &bytes[end + 4..];
    let body = if head.contains("transfer-encoding: chunked") { unchunk(body) } else { body.to_vec() };
    Reply { status, head, body }
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = body.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&body[..end]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let size = size.expect("a chunk's size");
        out.extend_from_slice(&body[end + 2..end + 2 + size]);
        body = &body[end + 2 + size + 2..];
    }
    out
}

/// The frames of a stream: each exactly `data: {...}\n\n`, the last `data: [DONE]\n\n` where the stream is `whole`.
fn events(body: &[u8], whole: bool) -> Vec<Value> {
    let text = std::str::from_utf8(body).expect("UTF-8");
    assert!(text.ends_with("\n\n"), "{text:?}");
    let mut frames: Vec<&str> = text.split_terminator("\n\n").collect();
    if whole {
        assert_eq!(frames.pop(), Some("data: [DONE]"));
    }
    let event = |frame: &&str| {
        let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("{frame:?}"));
        assert!(data.starts_with('{') && data.ends_with('}') && !data.contains('\n'), "{frame:?}");
        serde_json::from_str(data).expect("JSON")
    };
    frames.iter().map(event).collect()
}

fn prompt(index: usize) -> String {
    format!("Prompt number {index}: {}", "tell me more. ".repeat(index % 7))
}

pub fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect()
}

/// A greedy completion's ids and text.
fn greedy(server: &Harness, prompt: impl Into<Value>, max_tokens: u32) -> (Vec<u64>, String) {
    let reply = server.complete(json!({"prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true}));
    let choice = &reply["choices"][0];
    (ids(&choice["token_ids"]), choice["text"].as_str().expect("text").to_owned())
}

#[test]
fn the_model_is_listed_with_what_it_takes() {
    let server = Setup::default().start();
    let list = server.get("/v1/models").ok();
    let card = &list["data"][0];
    assert_eq!((&list["object"], &card["object"]), (&json!("list"), &json!("model")));
    assert_eq!((&card["id"], &card["max_model_len"]), (&json!("sim-model"), &json!(1024)));
    assert!(card["created"].as_u64().is_some_and(|created| created > 1_700_000_000), "{card}");
    assert_eq!(card["kv_type"], "f16");
    assert!(card["owned_by"].is_string() && card["device"].is_string(), "{card}");
    let bundle = Bundle::simulated();
    let table = start::memory_table(&bundle.config, &Setup::default().config, 0);
    assert_eq!(card["memory_bytes"], table.total());
    for path in ["/v1/models/sim-model", "/v1/models/sim%2Dmodel"] {
        assert_eq!(server.get(path).ok(), *card, "{path}");
    }
    for path in ["/v1/models/owner/another", "/v1/models/%ff"] {
        server.get(path).error(404);
    }
    assert_eq!(server.get("/v1/models/another").error(404)["code"], "model_not_found");
}

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let server = Setup::default().start();
    let page = server.get("/");
    assert!(page.text().contains("<title>Fullbore</title>"));
    assert!(page.head.contains("content-security-policy: default-src 'none'; script-src 'self'"), "{}", page.head);
    let text = page.text();
    let named = |file: &str| text.contains(&format!("\"page/{file}\""));
    assert!(["page.js", "page.css", "chat.css", "live.css"].into_iter().all(named));
    for path in page_files() {
        let asset = server.get(&path);
        assert_eq!(asset.status, 200, "{path}");
        assert!(!asset.text().contains("//cdn") && !asset.text().contains("https://"), "{path}");
        assert!(asset.head.contains("x-content-type-options: nosniff"), "{}", asset.head);
    }
    server.get("/page/").error(404);
    server.get("/page/..%2fpage.rs").error(404);
}

/// `/` and every file of the page's folder, as the server names them.
fn page_files() -> Vec<String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("server/src/page");
    let names = std::fs::read_dir(folder).expect("a folder of the tree").flatten();
    let names = names.map(|entry| entry.file_name().into_string().expect("UTF-8"));
    let path = |name: String| if name == "page.html" { "/".to_owned() } else { format!("/page/{name}") };
    names.map(path).collect()
}

#[test]
fn a_completion_has_all_its_fields() {
    let server = Setup::default().start();
    let reply = server.complete(json!({"model": "sim-model", "prompt": "Once upon a time", "ignore_eos": true,
        "return_token_ids": true, "a_field_nobody_knows": [1, {"x": null}], "user": "me"}));
    assert!(reply["id"].as_str().expect("an id").starts_with("cmpl-"));
    assert_eq!((&reply["object"], &reply["model"]), (&json!("text_completion"), &json!("sim-model")));
    let choice = &reply["choices"][0];
    assert_eq!(
        (&choice["index"], &choice["finish_reason"], &choice["logprobs"]),
        (&json!(0), &json!("length"), &json!(null))
    );
    // 16 is the API's default.
    assert_eq!(ids(&choice["token_ids"]).len(), 16);
    let num_prompt = ids(&choice["prompt_token_ids"]).len();
    let usage = json!({"prompt_tokens": num_prompt, "completion_tokens": 16, "total_tokens": num_prompt + 16,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(reply["usage"], usage);
}

#[test]
fn a_chat_has_all_its_fields_and_fills_the_context() {
    let server = Setup::default().start();
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user",
        "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]}]);
    let reply = server.chat(json!({"messages": messages, "ignore_eos": true, "return_token_ids": true}));
    assert!(reply["id"].as_str().expect("an id").starts_with("chatcmpl-"));
    assert_eq!(reply["object"], "chat.completion");
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert_eq!(choice["finish_reason"], "length");
    // The default is the rest of the context.
    assert_eq!(ids(&reply["prompt_token_ids"]).len() + ids(&choice["token_ids"]).len(), 1024);
    assert_eq!(reply["usage"]["total_tokens"], 1024);
    let short =
        server.chat(json!({"messages": messages, "ignore_eos": true, "max_tokens": 9, "max_completion_tokens": 5}));
    assert_eq!(short["usage"]["completion_tokens"], 5);
}

#[test]
fn content_of_a_message_is_never_a_special_token() {
    let server = Setup::default().start();
    let prompt_ids = |content: &str| {
        let reply = server.chat(json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1,
            "return_token_ids": true}));
        ids(&reply["prompt_token_ids"])
    };
    let special = Bundle::simulated().stop_ids[0].0;
    let spelling =
        Bundle::simulated().tokenizer.token(fullbore_engine::request::TokenId(special)).expect("a token").to_owned();
    let count = |ids: &[u64]| ids.iter().filter(|id| **id == u64::from(special)).count();
    assert_eq!(count(&prompt_ids(&spelling)), count(&prompt_ids("plain")));
}

#[test]
fn streamed_chunks_add_up_to_the_whole() {
    let server = Setup::default().start();
    for n in [1, 3] {
        let ask = json!({"prompt": ["Alpha", "Beta gamma"], "n": n, "max_tokens": 24, "temperature": 0.9, "seed": 5,
            "ignore_eos": true, "return_token_ids": true, "logprobs": 2, "echo": true,
            "stream_options": {"include_usage": true}});
        let whole = server.complete(ask.clone());
        let events = server.stream("/v1/completions", ask);
        let (last, chunks) = events.split_last().expect("events");
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        assert_eq!(whole["choices"].as_array().expect("choices").len(), 2 * n);
        for choice in whole["choices"].as_array().expect("choices") {
            let mut text = String::new();
            let (mut token_ids, mut tokens, mut offsets, mut reasons) = (vec![], vec![], vec![], vec![]);
            for chunk in chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == choice["index"]) {
                assert_eq!((&chunk["object"], &chunk["usage"]), (&json!("text_completion"), &json!(null)));
                let part = &chunk["choices"][0];
                text += part["text"].as_str().expect("text");
                token_ids.extend(ids(&part["token_ids"]));
                tokens.extend(part["logprobs"]["token_logprobs"].as_array().expect("logprobs").clone());
                offsets.extend(ids(&part["logprobs"]["text_offset"]));
                reasons.push(part["finish_reason"].clone());
            }
            assert_eq!(json!(text), choice["text"]);
            assert_eq!(json!(token_ids), choice["token_ids"]);
            assert_eq!(json!(tokens), choice["logprobs"]["token_logprobs"]);
            assert_eq!(json!(offsets), choice["logprobs"]["text_offset"]);
            assert_eq!(reasons.pop(), Some(json!("length")));
            assert!(reasons.iter().all(Value::is_null));
        }
    }
}

#[test]
fn a_chat_streams_role_text_reason_and_usage() {
    let server = Setup::default().start();
    let ask = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true});
    // Once before, so that the prefix cache has the prompt for both.
    server.chat(ask.clone());
    let whole = server.chat(ask.clone());
    let mut with_usage = ask.clone();
    with_usage["stream_options"] = json!({"include_usage": true});
    let events = server.stream("/v1/chat/completions", with_usage);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"]));
    let choices: Vec<_> = events.iter().filter_map(|event| event["choices"].get(0)).collect();
    let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    assert_eq!(json!(text), whole["choices"][0]["message"]["content"]);
    let streamed: Vec<u64> = choices
        .iter()
        .filter(|choice| choice["token_ids"].is_array())
        .flat_map(|choice| ids(&choice["token_ids"]))
        .collect();
    assert_eq!(json!(streamed), whole["choices"][0]["token_ids"]);
    assert_eq!(choices.last().expect("choices")["finish_reason"], "length");
    assert_eq!(events.last().expect("events")["usage"], whole["usage"]);
    // Unasked, no chunk speaks of usage.
    assert!(server.stream("/v1/chat/completions", ask).iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn a_stream_with_nothing_to_say_says_so() {
    let limits = Limits { keep_alive: Duration::from_millis(20), ..Limits::default() };
    let server = Setup { limits, pace: Pace::Stalled, ..Setup::default() }.start();
    let body = json!({"prompt": "x", "max_tokens": 3, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = server.send(post("/v1/completions", body.as_bytes()));
    let (mut bytes, mut part) = (Vec::new(), [0; 512]);
    while String::from_utf8_lossy(&bytes).matches(": keep-alive\n\n").count() < 3 {
        let length = stream.read(&mut part).expect("comments");
        assert!(length > 0, "closed after {}", String::from_utf8_lossy(&bytes));
        bytes.extend_from_slice(&part[..length]);
    }
    server.gate.set(Pace::Free);
    stream.read_to_end(&mut bytes).expect("the rest");
    let body = parse_reply(&bytes).body;
    let events: Vec<u8> = String::from_utf8(body).expect("text").replace(": keep-alive\n\n", "").into_bytes();
    assert_eq!(self::events(&events, true).last().expect("events")["choices"][0]["finish_reason"], "length");
}

#[test]
fn sixteen_streams_equal_each_alone() {
    let server = Setup::default().start();
    let alone: Vec<_> = (0..16).map(|index| greedy(&server, prompt(index), 40)).collect();
    let barrier = Barrier::new(16);
    let together: Vec<_> = std::thread::scope(|scope| {
        let one = |index| {
            let (server, barrier) = (&server, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let body = json!({"prompt": prompt(index), "max_tokens": 40, "temperature": 0, "ignore_eos": true,
                    "return_token_ids": true});
                let events = server.stream("/v1/completions", body);
                let text = events.iter().map(|event| event["choices"][0]["text"].as_str().expect("text")).collect();
                (events.iter().flat_map(|event| ids(&event["choices"][0]["token_ids"])).collect(), text)
            })
        };
        let threads: Vec<_> = (0..16).map(one).collect();
        threads.into_iter().map(|thread| thread.join().expect("a stream")).collect::<Vec<(Vec<u64>, String)>>()
    });
    assert_eq!(together, alone);
    assert_eq!(alone[0].0.len(), 40);
}

#[test]
fn seeds_repeat_and_choices_differ() {
    let server = Setup::default().start();
    let sample = |seed: Value, n: u32| {
        let reply = server.complete(json!({"prompt": "x", "max_tokens": 24, "temperature": 1.5, "seed": seed, "n": n,
            "ignore_eos": true, "return_token_ids": true, "top_k": -1, "top_p": 1, "min_p": 0}));
        reply["choices"].as_array().expect("choices").iter().map(|choice| ids(&choice["token_ids"])).collect::<Vec<_>>()
    };
    assert_eq!(sample(json!(7), 1), sample(json!(7), 1));
    assert_ne!(sample(json!(7), 1), sample(json!(8), 1));
    assert_ne!(sample(json!(null), 1), sample(json!(null), 1));
    assert_eq!(sample(json!(-3), 1), sample(json!(-3), 1));
    assert_eq!(sample(json!(u64::MAX), 1), sample(json!(u64::MAX), 1));
    let three = sample(json!(7), 3);
    assert_eq!(three[0], sample(json!(7), 1)[0]);
    assert!(three[0] != three[1] && three[1] != three[2]);
    let top_1 = server
        .complete(json!({"prompt": "x", "max_tokens": 24, "temperature": 2, "top_k": 1, "ignore_eos": true,
        "return_token_ids": true}));
    assert_eq!(ids(&top_1["choices"][0]["token_ids"]), greedy(&server, "x", 24).0);
}

/// On a simulated device a choice is a hash of everything that its sampler has.
#[test]
fn penalties_biases_and_masks_act_on_completions_and_chats() {
    let server = Setup::default().start();
    let base = json!({"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 24,
        "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let ask = |change: Value| {
            let mut body = base.clone();
            body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
            ids(&server.post(path, &body).ok()["choices"][0]["token_ids"])
        };
        let plain = ask(json!({}));
        let unchanged = json!({"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
            "logit_bias": {}});
        assert_eq!(ask(unchanged), plain, "{path}");
        let mut seen = vec![plain];
        for change in [
            json!({"presence_penalty": 0.5}),
            json!({"presence_penalty": -0.5}),
            json!({"frequency_penalty": 2}),
            json!({"repetition_penalty": 1.1}),
            json!({"logit_bias": {"5": 1, "70": -100}}),
            json!({"logit_bias": {"5": 1, "71": -100}}),
            json!({"logit_bias": {"70": -100, "5": 1.5}}),
            json!({"allowed_token_ids": [5, 70, 71, 300]}),
        ] {
            let got = ask(change.clone());
            assert_eq!(got, ask(change.clone()), "{path}: {change} again");
            assert!(!seen.contains(&got), "{path}: {change} changes nothing");
            let allowed = |id: &u64| [5, 70, 71, 300].contains(id);
            assert_eq!(got.iter().all(allowed), change.get("allowed_token_ids").is_some(), "{path}: {change}");
            seen.push(got);
        }
        assert_eq!(ask(json!({"allowed_token_ids": [300], "temperature": 1.7})), [300; 24], "{path}");
    }
}

#[test]
fn the_models_own_defaults_apply() {
    let server = Setup { bundle: |bundle| bundle.defaults.temperature = Some(0.0), ..Setup::default() }.start();
    let ask = json!({"prompt": "x", "max_tokens": 16, "ignore_eos": true, "return_token_ids": true});
    let reply = server.complete(ask);
    assert_eq!(ids(&reply["choices"][0]["token_ids"]), greedy(&server, "x", 16).0);
    let server = Setup { bundle: |bundle| bundle.defaults.repetition_penalty = Some(1.1), ..Setup::default() }.start();
    let ask = |change: Value| {
        let mut body = json!({"prompt": "x", "max_tokens": 16, "temperature": 0, "ignore_eos": true,
            "return_token_ids": true});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        ids(&server.complete(body)["choices"][0]["token_ids"])
    };
    assert_eq!(ask(json!({})), ask(json!({"repetition_penalty": 1.1})));
    assert_ne!(ask(json!({})), ask(json!({"repetition_penalty": 1})));
}

#[test]
fn stop_ids_end_a_text_and_are_no_part_of_it() {
    let server = Setup::default().start();
    let (all, _) = greedy(&server, "stop here", 24);
    let stop_id = all[10];
    let first = all.iter().position(|id| *id == stop_id).expect("it is there");
    let reply = server.complete(json!({"prompt": "stop here", "max_tokens": 24, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "stop_token_ids": [stop_id]}));
    let choice = &reply["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["token_ids"]), (&json!("stop"), &json!(all[..=first])));
    assert_eq!(json!(greedy(&server, "stop here", first as u32).1), choice["text"]);
    assert_eq!(reply["usage"]["completion_tokens"], first + 1);
}

#[test]
fn stop_strings_end_a_text_wherever_they_begin() {
    let server = Setup::default().start();
    let (_, text) = greedy(&server, "stop strings", 64);
    let letters: Vec<char> = text.chars().collect();
    for (begin, length) in [(3, 1), (7, 2), (11, 4)] {
        let stop: String = letters[begin..begin + length].iter().collect();
        let expected = &text[..text.find(&stop).expect("it is there")];
        for stop in [json!(stop), json!([stop]), json!(["never in it", stop])] {
            let ask = json!({"prompt": "stop strings", "max_tokens": 64, "temperature": 0, "ignore_eos": true,
                "stop": stop,
                "stream_options": {"include_usage": true}});
            let reply = server.complete(ask.clone());
            assert_eq!(
                (&reply["choices"][0]["text"], &reply["choices"][0]["finish_reason"]),
                (&json!(expected), &json!("stop"))
            );
            let used = reply["usage"]["completion_tokens"].as_u64().expect("usage");
            assert!(used < 64, "the sequence ran on to {used}");
            let events = server.stream("/v1/completions", ask);
            let parts = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
            assert_eq!(parts.collect::<String>(), expected);
            assert_eq!(events.last().expect("events")["usage"], reply["usage"]);
        }
    }
    // The engine hears of it: nothing runs on.
    server.wait_for("the end of stopped sequences", |server| server.metric("fullbore_requests_running") == 0.0);
}

#[test]
fn logprobs_of_completions() {
    let server = Setup::default().start();
    let reply = server.complete(json!({"prompt": "One two", "max_tokens": 5, "temperature": 0, "ignore_eos": true,
        "logprobs": 3, "return_token_ids": true}));
    let logprobs = &reply["choices"][0]["logprobs"];
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[field].as_array().map(Vec::len), Some(5), "{field}: {logprobs}");
    }
    for (logprob, top) in logprobs["token_logprobs"]
        .as_array()
        .expect("a list")
        .iter()
        .zip(logprobs["top_logprobs"].as_array().expect("a list"))
    {
        let best = top.as_object().expect("a map").values().filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
        assert!((logprob.as_f64().expect("a number") - best).abs() < 1e-5, "greedy is the best of {top}");
        assert!(best < 0.0);
    }
    let none = server.complete(json!({"prompt": "One two", "max_tokens": 5, "logprobs": 0}));
    let top = &none["choices"][0]["logprobs"]["top_logprobs"][0];
    assert_eq!(top.as_object().map(|map| map.len()), Some(1), "the sampled token itself");
}

#[test]
fn echo_repeats_the_prompt_with_its_logprobs() {
    let server = Setup::default().start();
    let ask = json!({"prompt": "One two", "max_tokens": 0, "echo": true, "logprobs": 1, "return_token_ids": true});
    let scored = server.complete(ask.clone());
    let choice = &scored["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("One two"), &json!("length")));
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let num_prompt = ids(&choice["prompt_token_ids"]).len();
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("a list");
    assert_eq!(logprobs.len(), num_prompt);
    assert!(
        logprobs[0].is_null() && logprobs[1..].iter().all(|value| value.as_f64().is_some_and(|value| value <= 0.0))
    );
    // Again, now that the prefix cache has it.
    assert_eq!(server.complete(ask)["choices"][0]["logprobs"], choice["logprobs"]);

    let longer = server
        .complete(json!({"prompt": "One two", "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 1,
        "ignore_eos": true}));
    let (_, continued) = greedy(&server, "One two", 3);
    assert_eq!(longer["choices"][0]["text"], json!("One two".to_owned() + &continued));
    assert_eq!(longer["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(num_prompt + 3));
    let offset = &longer["choices"][0]["logprobs"]["text_offset"][num_prompt];
    assert_eq!(offset, "One two".len());
    let plain = server
        .complete(json!({"prompt": "One two", "max_tokens": 3, "temperature": 0, "echo": true, "ignore_eos": true}));
    assert_eq!(
        (&plain["choices"][0]["text"], &plain["choices"][0]["logprobs"]),
        (&longer["choices"][0]["text"], &json!(null))
    );
    let scored_only = server.complete(json!({"prompt": "One two", "max_tokens": 0, "echo": true}));
    assert_eq!(scored_only["choices"][0]["text"], "One two");
}

#[test]
fn logprobs_of_chats() {
    let server = Setup::default().start();
    let ask = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0,
        "ignore_eos": true, "logprobs": true, "top_logprobs": 3});
    let whole = server.chat(ask.clone());
    let content = whole["choices"][0]["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(content.len(), 4);
    for token in content {
        let top = token["top_logprobs"].as_array().expect("a list");
        let values: Vec<f64> = top.iter().map(|top| top["logprob"].as_f64().expect("a number")).collect();
        assert!(values.len() == 3 && values.is_sorted_by(|a, b| a >= b), "{token}");
        assert_eq!((&token["token"], &token["bytes"]), (&top[0]["token"], &top[0]["bytes"]));
        assert!(token["bytes"].as_array().is_some_and(|bytes| !bytes.is_empty()), "{token}");
    }
    let events = server.stream("/v1/chat/completions", ask);
    let lists = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(lists.flatten().collect::<Vec<_>>(), content.iter().collect::<Vec<_>>());
}

#[test]
fn prompts_are_text_ids_or_lists_of_either() {
    let server = Setup::default().start();
    let (expected, _) = greedy(&server, "Hello there", 8);
    let ask = |prompt: Value| {
        let body =
            json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
        server.complete(body)
    };
    let prompt_ids = ask(json!("Hello there"))["choices"][0]["prompt_token_ids"].clone();
    for (prompt, count) in [
        (prompt_ids.clone(), 1),
        (json!(["Hello there"]), 1),
        (json!([prompt_ids]), 1),
        (json!(["Hello there", "Hello there"]), 2),
        (json!(["Hello there", prompt_ids]), 2),
    ] {
        let reply = ask(prompt);
        let choices = reply["choices"].as_array().expect("choices");
        assert_eq!(choices.len(), count);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!((&choice["index"], ids(&choice["token_ids"])), (&json!(index), expected.clone()));
        }
        assert_eq!(reply["usage"]["prompt_tokens"], count * ids(&prompt_ids).len());
    }
}

#[test]
fn bad_fields_are_named() {
    let server = Setup::default().start();
    let long = "word ".repeat(2000);
    let completions = [
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"top_p": 3}), "top_p"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": [1]}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1.5}), "top_k"),
        (json!({"top_k": 1e30}), "top_k"),
        (json!({"min_p": -0.1}), "min_p"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1e30}), "seed"),
        (json!({"max_tokens": -5}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1e30}), "max_tokens"),
        (json!({"max_tokens": 4_000_000_000u32}), "max_tokens"),
        (json!({"max_tokens": "7"}), "max_tokens"),
        (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1_000_000_000}), "n"),
        (json!({"n": true}), "n"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": 1}), "stream_options"),
        (json!({"stream_options": {"include_usage": 1}}), "include_usage"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", 5]}), "stop"),
        (json!({"stop": vec!["a"; 17]}), "stop"),
        (json!({"stop": "a".repeat(257)}), "stop"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
        (json!({"stop_token_ids": 1}), "stop_token_ids"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": -1}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"echo": 1}), "echo"),
        (json!({"ignore_eos": "no"}), "ignore_eos"),
        (json!({"return_token_ids": 3}), "return_token_ids"),
        (json!({"model": 5}), "model"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": {"text": "x"}}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [1, 2, 99999999]}), "prompt"),
        (json!({"prompt": [1, -2]}), "prompt"),
        (json!({"prompt": [1, 2.5]}), "prompt"),
        (json!({"prompt": [1e40]}), "prompt"),
        (json!({"prompt": ["a", true]}), "prompt"),
        (json!({"prompt": vec!["a"; 129]}), "prompt"),
        (json!({"prompt": vec!["a"; 100], "n": 2}), "n"),
        (json!({"prompt": long}), "prompt"),
        (json!({"best_of": "x"}), "best_of"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"presence_penalty": "much"}), "presence_penalty"),
        (json!({"frequency_penalty": -2.1}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"repetition_penalty": -1}), "repetition_penalty"),
        (json!({"repetition_penalty": 1e9}), "repetition_penalty"),
        (json!({"logit_bias": [5, 1]}), "logit_bias"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": {"5": "high"}}), "logit_bias"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"-5": 1}}), "logit_bias"),
        (json!({"logit_bias": {"05": 1}}), "logit_bias"),
        (json!({"logit_bias": {"word": 1}}), "logit_bias"),
        (
            json!({"logit_bias": (0..1025).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>()}),
            "logit_bias",
        ),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"allowed_token_ids": 5}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [1, 99999999]}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [1.5]}), "allowed_token_ids"),
        (json!({"suffix": "end"}), "suffix"),
    ];
    for (change, name) in completions {
        let mut body = json!({"prompt": "x", "max_tokens": 1});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        let error = server.post("/v1/completions", &body).error(400);
        assert!(error["message"].as_str().expect("text").contains(name), "{change}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"], name, "{change}: {error}");
    }
    let message = |content: Value| json!([{"role": "user", "content": content}]);
    let chats = [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": ["hi"]}), "messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": 5, "content": "hi"}]}), "messages[0].role"),
        (json!({"messages": message(json!(5))}), "messages[0].content"),
        (
            json!({"messages": message(json!([{"type": "image_url", "image_url": {"url": "data:"}}]))}),
            "messages[0].content[0]",
        ),
        (json!({"messages": message(json!([{"type": "text"}]))}), "messages[0].content[0]"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"reasoning_effort": 5}), "reasoning_effort"),
    ];
    for (change, name) in chats {
        let mut body = json!({"messages": message(json!("x")), "max_tokens": 1});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        let error = server.post("/v1/chat/completions", &body).error(400);
        assert!(error["message"].as_str().expect("text").contains(name), "{change}: {error}");
        assert_eq!(error["param"], name, "{change}: {error}");
    }
    // What changes nothing is taken.
    server.complete(
        json!({"prompt": "x", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1,
        "repetition_penalty": 1, "allowed_token_ids": null, "suffix": null, "stop": null, "max_tokens": null,
        "temperature": null}),
    );
    server.chat(json!({"messages": message(json!("x")), "max_tokens": 1, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "logprobs": false, "top_logprobs": 0}));
}

#[test]
fn unknown_models_and_long_prompts_have_their_codes() {
    let server = Setup::default().start();
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let body = json!({"model": "gpt-9", "prompt": "x", "messages": [{"role": "user", "content": "x"}]});
        let error = server.post(path, &body).error(404);
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
        assert!(error["message"].as_str().expect("text").contains("gpt-9"), "{error}");
    }
    // The second is so long that it is refused without a look at its tokens.
    for length in [2000, 1_600_000] {
        let long = "word ".repeat(length);
        let chat = json!({"messages": [{"role": "user", "content": long}]});
        let bodies = [
            ("/v1/completions", json!({"prompt": long}), "prompt"),
            ("/v1/completions", json!({"prompt": ["x", long]}), "prompt"),
            ("/v1/chat/completions", chat, "messages"),
        ];
        for (path, body, param) in bodies {
            let error = server.post(path, &body).error(400);
            assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!(param)));
            assert!(error["message"].as_str().expect("text").contains("1024"), "{error}");
        }
    }
    let error = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2000})).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("max_tokens")));
}

#[test]
fn bodies_that_are_no_json_object_are_refused() {
    let server = Setup::default().start();
    let deep = "[".repeat(100_000);
    let deep_field = format!("{{\"prompt\": {}1{}}}", "[".repeat(500), "]".repeat(500));
    let deep_objects = "{\"a\":".repeat(100_000);
    let bodies: [&[u8]; 12] = [
        b"",
        b"{",
        b"{\"model\": ",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"\"x\"",
        b"{\"prompt\": \"x\", \"temperature\": NaN}",
        b"{\"prompt\": \"\\ud800\"}",
        deep.as_bytes(),
        deep_field.as_bytes(),
        deep_objects.as_bytes(),
    ];
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for body in bodies {
            let error = server.post_bytes(path, body).error(400);
            let message = error["message"].as_str().expect("text");
            assert!(message.contains("JSON"), "{message}");
        }
    }
    assert_eq!(server.get("/health/ready").status, 200);
}

#[test]
fn bodies_that_are_not_said_to_be_json_are_refused() {
    let server = Setup::default().start();
    let ask = |path: &str, content_type: &str| {
        let body = r#"{"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}"#;
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{content_type}");
        read_reply(server.send(format!("{head}content-length: {}\r\n\r\n{body}", body.len())))
    };
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for right in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
            ask(path, &format!("Content-Type: {right}\r\n")).ok();
        }
        for wrong in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
            let error = ask(path, &format!("content-type: {wrong}\r\n")).error(415);
            assert!(error["message"].as_str().expect("text").contains(wrong), "{error}");
        }
        assert_eq!(ask(path, "").error(415)["code"], "unsupported_media_type");
    }
}

#[test]
fn large_bodies_are_refused_however_they_come() {
    let server = Setup::default().start();
    let large = vec![b'a'; 100 << 20];
    let error = server.post_bytes("/v1/completions", &large).error(413);
    assert!(error["message"].as_str().expect("text").contains("8388608"), "{error}");

    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("the server reads");
    for chunk in large.chunks(1 << 20) {
        stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes()).expect("the server reads");
        stream.write_all(chunk).expect("the server reads");
        stream.write_all(b"\r\n").expect("the server reads");
    }
    stream.write_all(b"0\r\n\r\n").expect("the server reads");
    read_reply(stream).error(413);

    // A client that asks first is told without sending anything.
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\n\
         content-length: {}\r\n\r\n",
        large.len()
    );
    read_reply(server.send(head)).error(413);

    // The largest that is taken.
    let fits = [b"{\"prompt\": \"x\", \"max_tokens\": 1, \"pad\": \"".as_slice(), &vec![b'a'; (8 << 20) - 50], b"\"}"]
        .concat();
    assert_eq!(server.post_bytes("/v1/completions", &fits).status, 200);
}

#[test]
fn paths_and_methods_that_are_not_there() {
    let server = Setup::default().start();
    for path in ["/nothing", "/v1", "/v1/", "/v1/nothing", "/v1/models-x", "/v1/completions/x", "/health/x", "/../etc"]
    {
        assert_eq!(server.get(path).error(404)["code"], "not_found", "{path}");
    }
    for path in ["/v1/completions", "/v1/chat/completions"] {
        assert_eq!(server.get(path).error(405)["code"], "method_not_allowed", "{path}");
    }
    for path in ["/v1/models", "/health/live", "/health/ready", "/metrics", "/"] {
        server.post(path, &json!({})).error(405);
    }
    let delete = server.send("DELETE /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    read_reply(delete).error(405);
}

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

/// A server with `max_queued_requests` of 2 whose one slot is taken and whose device stands still, with both places
/// taken as well.
fn full_server(change: fn(&mut EngineConfig)) -> (Harness, Vec<TcpStream>) {
    let mut setup = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() };
    setup.config = EngineConfig { max_num_seqs: 1, max_queued_requests: 2, ..setup.config };
    change(&mut setup.config);
    let server = setup.start();
    let body = |max_tokens: u32| json!({"prompt": "x", "max_tokens": max_tokens, "ignore_eos": true}).to_string();
    let mut streams = vec![server.send(post("/v1/completions", body(800).as_bytes()))];
    server.wait_for("the first to run", |server| server.metric("fullbore_requests_running") == 1.0);
    server.gate.set(Pace::Stalled);
    streams.extend((0..2).map(|_| server.send(post("/v1/completions", body(4).as_bytes()))));
    server.wait_for("both places", |server| server.metric("fullbore_requests_waiting") == 2.0);
    (server, streams)
}

fn retry_after(reply: &Reply) -> Duration {
    let line = reply.head.lines().find_map(|line| line.strip_prefix("retry-after: "));
    let seconds = line.and_then(|seconds| seconds.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or_else(|| panic!("no Retry-After in {}", reply.head)))
}

#[test]
fn a_full_queue_is_an_answer() {
    let (server, streams) = full_server(|_| {});
    let refused = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 4}));
    let error = refused.error(429);
    assert_eq!((&error["code"], &error["type"]), (&json!("queue_full"), &json!("rate_limit_error")));
    assert!(error["message"].as_str().expect("text").starts_with("2 requests wait of the 2 that may"), "{error}");
    assert!(retry_after(&refused) >= Duration::from_secs(1));
    // Nothing was read: not even that it is no JSON.
    server.post_bytes("/v1/completions", b"{no JSON").error(429);
    server.post_bytes("/v1/chat/completions", &vec![b'x'; 4 << 20]).error(429);
    // Who asks before it sends need not send.
    let mut asking = server.send(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\n\
         content-length: 1000000\r\n\r\n",
    );
    let mut beginning = [0; 12];
    asking.read_exact(&mut beginning).expect("an answer");
    assert_eq!(&beginning, b"HTTP/1.1 429");
    // Those that were taken end as usual.
    server.gate.set(Pace::Free);
    for stream in streams {
        assert!(read_reply(stream).ok()["usage"]["completion_tokens"].as_u64() >= Some(4));
    }
    server.complete(json!({"prompt": "x", "max_tokens": 4}));
}

#[test]
fn choices_count_each_and_are_counted_before_text_is_read() {
    let (server, streams) = full_server(|config| config.max_queued_requests = 4);
    // Two of four places are taken. A token that does not exist is found when the prompt is read: that comes later.
    let many = |num_choices| json!({"prompt": [99_999_999], "max_tokens": 4, "n": num_choices});
    let error = server.post("/v1/completions", &many(3)).error(429);
    assert_eq!(error["code"], "queue_full");
    server.post("/v1/completions", &json!({"prompt": ["a", "b", "c"], "max_tokens": 4})).error(429);
    server.post("/v1/completions", &many(2)).error(400);
    server.gate.set(Pace::Free);
    streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
    // Places of what was refused are given back.
    for _ in 0..3 {
        assert_eq!(server.complete(json!({"prompt": "x", "max_tokens": 4, "n": 4}))["choices"][3]["index"], 3);
    }
    assert_eq!(server.metric("fullbore_requests_waiting"), 0.0);
}

/// Waiting helps only where something is waited for: an empty server never says 429, whatever its limits.
#[test]
fn an_empty_server_takes_all_that_its_limits_allow_and_refuses_the_rest_for_good() {
    for (max_queued_requests, max_queued_tokens) in [(1, 1024), (7, 1024), (8, 1024), (9, 1500), (60, 2048)] {
        let mut setup = Setup::default();
        (setup.config.max_queued_requests, setup.config.max_queued_tokens) = (max_queued_requests, max_queued_tokens);
        let server = setup.start();
        let choices = |num_choices: u32| json!({"prompt": "x", "max_tokens": 1, "ignore_eos": true, "n": num_choices});
        let tokens = |num_tokens: u32| {
            let prompts =
                [num_tokens.min(1000), num_tokens - num_tokens.min(1000)].map(|length| vec![20; length as usize]);
            json!({"prompt": prompts.into_iter().filter(|prompt| !prompt.is_empty()).collect::<Vec<_>>(),
                "max_tokens": 1, "ignore_eos": true})
        };
        for num_choices in 1..=max_queued_requests {
            server.complete(choices(num_choices));
        }
        for num_tokens in [1, 800, 900, 1000] {
            server.complete(tokens(num_tokens));
        }
        if max_queued_requests > 1 && max_queued_tokens < 2000 {
            server.complete(tokens(max_queued_tokens));
        }
        let refused = |body: &Value, numbers: [u32; 2]| {
            let error = server.post("/v1/completions", body).error(400);
            let message = error["message"].as_str().expect("text");
            assert!(numbers.iter().all(|number| message.contains(&number.to_string())), "{numbers:?}: {error}");
            assert_eq!(error["code"], "queue_too_small");
        };
        refused(&choices(max_queued_requests + 1), [max_queued_requests + 1, max_queued_requests]);
        if max_queued_requests > 2 {
            let three = json!({"prompt": vec![vec![20; 700]; 3], "max_tokens": 1});
            refused(&three, [2100, max_queued_tokens]);
        }
        assert_eq!(server.metric("fullbore_requests_waiting"), 0.0);
    }
}

#[test]
fn waiting_tokens_have_a_limit_too() {
    let (server, streams) = full_server(|config| (config.max_queued_requests, config.max_queued_tokens) = (64, 1024));
    let prompt: Vec<u32> = vec![20; 800];
    let taken = json!({"prompt": prompt, "max_tokens": 4, "ignore_eos": true}).to_string();
    let taken = server.send(post("/v1/completions", taken.as_bytes()));
    server.wait_for("the long one", |server| server.metric("fullbore_requests_waiting") == 3.0);
    let refused = server.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 4}));
    let error = refused.error(429);
    assert!(error["message"].as_str().expect("text").contains("tokens wait of the 1024 that may"), "{error}");
    assert!(retry_after(&refused) >= Duration::from_secs(1));
    assert_eq!(server.metric("fullbore_requests_waiting"), 3.0);
    server.gate.set(Pace::Free);
    for stream in streams.into_iter().chain([taken]) {
        read_reply(stream).ok();
    }
    server.complete(json!({"prompt": prompt, "max_tokens": 4}));
}

/// A device that sleeps: 5 ms a step, whatever the step.
fn sleeping() -> SimOptions {
    let cost = CostModel::line(5e6, 0.0, Prices::default());
    SimOptions { fidelity: Fidelity::Cost, cost, sleeps: true, ..SimOptions::default() }
}

#[test]
fn what_would_miss_its_deadline_is_told_when_to_come_again() {
    let mut setup = Setup { sim: sleeping(), ..Setup::default() };
    setup.config = EngineConfig { max_num_seqs: 2, max_queue_ms: Some(500), ..setup.config };
    let server = setup.start();
    let body = json!({"prompt": "x", "max_tokens": 60, "ignore_eos": true});
    // 300 ms each; how long they run is learned from those that ended.
    for _ in 0..2 {
        server.complete(body.clone());
    }
    let send = |_| server.send(post("/v1/completions", body.to_string().as_bytes()));
    let replies: Vec<Reply> = (0..10).map(send).collect::<Vec<_>>().into_iter().map(read_reply).collect();
    // Both slots, and a wait of 150 ms for each in the queue: some fit, some do not.
    let (served, refused): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| reply.status == 200);
    assert!(served.len() >= 3 && refused.len() >= 2, "{} served, {} refused", served.len(), refused.len());
    for reply in &refused {
        let error = reply.error(429);
        assert_eq!(error["code"], "queue_too_slow");
        let message = error["message"].as_str().expect("text");
        assert!(message.contains("ms are predicted to the first token, and at most 500 are waited"), "{message}");
    }
    // Again a crowd; whoever is refused comes again when told, and is served.
    let crowd: Vec<TcpStream> = (0..10).map(send).collect();
    let replies: Vec<Reply> = crowd.into_iter().map(read_reply).collect();
    let refused = replies.iter().find(|reply| reply.status == 429).expect("a crowd again");
    std::thread::sleep(retry_after(refused));
    server.complete(body);
}

/// Has a server that is set up like this find `cost` among what earlier ones have kept.
fn save_prices(setup: &Setup, cost: CostModel) {
    let plan = setup.plan();
    let info = plan.backend.info();
    let profile = DeviceProfile {
        device: ProfiledDevice {
            id: info.id.clone(),
            name: info.name.clone(),
            driver: format!("{}, {}", info.driver, info.tier),
        },
        model: ProfiledModel {
            name: format!("{}, 0 B of weights", plan.bundle.name),
            kv_bytes_per_token: plan.memory.kv_bytes_per_token,
        },
        limits: ProfiledLimits {
            max_num_seqs: 1,
            max_num_batched_tokens: 1,
            max_model_len: 1,
            block_size: 1,
            num_blocks: 1,
            num_host_blocks: 0,
        },
        host_ns_per_step: 0,
        ns_per_copied_megabyte: 0.0,
        cost,
        points: Vec::new(),
    };
    let path = plan.costs.expect("they are kept").path().to_owned();
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    std::fs::write(path, profile.to_json()).expect("a file");
}

/// What no waiting would help is another answer.
#[test]
fn a_prompt_that_is_too_slow_even_alone_is_refused_for_good() {
    let cost = CostModel::line(1e6, 1e6, Prices::default());
    let folder = Folder::new("slow");
    let mut setup = Setup { sim: SimOptions { cost, ..sleeping() }, costs: Some(folder.0.clone()), ..Setup::default() };
    setup.config.max_queue_ms = Some(250);
    save_prices(&setup, cost);
    let server = setup.start();
    let error = server.post("/v1/completions", &json!({"prompt": vec![20; 600], "max_tokens": 4})).error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("prompt_too_slow"), &json!("prompt")));
    assert!(error["message"].as_str().expect("text").contains("even alone"), "{error}");
    server.complete(json!({"prompt": vec![20; 60], "max_tokens": 4}));
}

/// Whatever a device has shown so far or is said to take: an idle server takes a request, and learns from it.
#[test]
fn an_idle_server_is_never_locked_by_what_it_thinks_of_its_device() {
    let cost = CostModel::line(1e6, 1e6, Prices::default());
    let short = json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true});
    // All that was seen is one step, of 250 ms.
    let mut setup = Setup { sim: SimOptions { cost, ..sleeping() }, ..Setup::default() };
    setup.config.max_queue_ms = Some(100);
    let server = setup.start();
    server.complete(json!({"prompt": vec![20; 250], "max_tokens": 1}));
    for _ in 0..4 {
        server.complete(short.clone());
    }
    // Nor are two at once refused for good: what comes while nothing waits is taken.
    server.complete(json!({"prompt": vec![20; 250], "max_tokens": 1, "n": 2}));
    server.complete(short.clone());

    // What was kept is wrong by far: a step of 10 s.
    let folder = Folder::new("wrong");
    let mut setup = Setup { sim: sleeping(), costs: Some(folder.0.clone()), ..Setup::default() };
    setup.config.max_queue_ms = Some(100);
    save_prices(&setup, CostModel::line(10e9, 0.0, Prices::default()));
    let server = setup.start();
    for _ in 0..4 {
        server.complete(short.clone());
    }
}

#[test]
fn cached_tokens_are_in_the_usage() {
    let server = Setup::default().start();
    let completion = json!({"prompt": vec![50; 100], "max_tokens": 6, "ignore_eos": true});
    let messages = json!([{"role": "user", "content": "Name the largest city of each country, please."}]);
    let chat = json!({"messages": messages, "max_tokens": 6, "ignore_eos": true});
    for (path, body) in [("/v1/completions", completion), ("/v1/chat/completions", chat)] {
        let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
        let first = server.post(path, &body).ok();
        let num_prompt = first["usage"]["prompt_tokens"].as_u64().expect("a number");
        assert_eq!(cached(&first["usage"]), 0, "{path}");
        // Whole blocks of 16, and at least one token is computed.
        let expected = (num_prompt - 1) / 16 * 16;
        assert!(expected > 0, "{path}: {num_prompt} tokens");
        assert_eq!(cached(&server.post(path, &body).ok()["usage"]), expected, "{path}");
        let mut streamed = body.clone();
        streamed["stream_options"] = json!({"include_usage": true});
        let events = server.stream(path, streamed);
        assert_eq!(cached(&events.last().expect("events")["usage"]), expected, "{path}, streamed");
        // A prompt counts once, however many choices it has, and also where a stop string ends them all.
        let mut stopped = body.clone();
        (stopped["n"], stopped["stop"]) = (json!(3), json!(["a", "e", "i", "o", "u", " ", "s", "t"]));
        assert_eq!(cached(&server.post(path, &stopped).ok()["usage"]), expected, "{path}, stopped");
        let mut salted = body;
        salted["cache_salt"] = json!("of my own");
        assert_eq!(cached(&server.post(path, &salted).ok()["usage"]), 0, "{path}, salted");
    }
}

/// A completion for who has `key`.
fn with_key(server: &Harness, key: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    server.send(format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))
}

#[test]
fn a_key_is_a_tenant_and_shares_no_prefix() {
    let shares = vec![("alice", Share { weight: 1, max_num_seqs: 1 }), ("bob", Share { weight: 1, max_num_seqs: 2 })];
    let server = Setup { shares, pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    let body = json!({"prompt": vec![50; 100], "max_tokens": 2, "ignore_eos": true, "user": "bob"});
    let cached = |key| {
        let reply = read_reply(with_key(&server, key, &body)).ok();
        reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
    };
    assert_eq!([cached("alice"), cached("alice"), cached("carol"), cached("carol")], [0, 96, 0, 96]);
    // Who has a key is its owner, whatever `user` says.
    for (key, most) in [(Some("alice"), 1.0), (None, 2.0), (Some("carol"), 4.0)] {
        let body = json!({"prompt": "y", "max_tokens": 900, "ignore_eos": true, "user": "bob"});
        let send = |_| match key {
            Some(key) => with_key(&server, key, &body),
            None => server.send(post("/v1/completions", body.to_string().as_bytes())),
        };
        let counts =
            |server: &Harness| ["running", "waiting"].map(|s| server.metric(&format!("fullbore_requests_{s}")));
        // A client has its answer before the engine has told of the step.
        server.wait_for("the last one to be gone", |server| counts(server) == [0.0, 0.0]);
        let streams: Vec<TcpStream> = (0..4).map(send).collect();
        server.wait_for("as many as may run", |server| counts(server) == [most, 4.0 - most]);
        for _ in 0..20 {
            assert_eq!(counts(&server), [most, 4.0 - most], "{key:?}");
        }
        drop(streams);
        server.wait_for("them to leave", |server| counts(server) == [0.0, 0.0]);
    }
}

/// A tenant that always has three requests under way, less than half of what runs at once, is served beside a flood as
/// it is without: exact bounds are held in virtual time by `overload`; here it is the whole way over sockets. Time is
/// counted in steps of the device, so that it does not matter how busy this machine is with other things; and they are
/// so long that it takes a hiccup of some 100 ms to be seen, which may happen, but not again and again.
#[test]
fn a_flood_over_http_leaves_another_tenants_p99_as_it_was() {
    let cost = CostModel::line(30e6, 2e4, Prices::default());
    let folder = Folder::new("flood");
    let mut setup = Setup { sim: SimOptions { cost, ..sleeping() }, costs: Some(folder.0.clone()), ..Setup::default() };
    // Hardly longer than without prompts.
    let latency = LatencyTarget::Stretch(105);
    setup.config = EngineConfig { max_num_seqs: 8, max_queued_requests: 96, latency, ..setup.config };
    save_prices(&setup, cost);
    let model = setup.plan().load().expect("the simulator loads");
    let engine = model.engine.clone();
    let server = Harness::serving(vec![model]);
    let quiet = json!({"prompt": "a quiet one", "max_tokens": 24, "ignore_eos": true, "user": "quiet"});
    let one = || {
        let begun = engine.stats().num_steps;
        server.complete(quiet.clone());
        engine.stats().num_steps - begun
    };
    // Of 30 the worst is the 99th percentile.
    let worst = || {
        let client = || (0..10).map(|_| one()).max().expect("ten");
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..3).map(|_| scope.spawn(client)).collect();
            clients.into_iter().map(|client| client.join().expect("it is served")).max().expect("three")
        })
    };
    let alone = worst();
    let loud = json!({"prompt": "a loud one ".repeat(20), "max_tokens": 600, "ignore_eos": true, "user": "loud"});
    let flood: Vec<TcpStream> =
        (0..80).map(|_| server.send(post("/v1/completions", loud.to_string().as_bytes()))).collect();
    server.wait_for("the flood", |server| server.metric("fullbore_requests_running") == 8.0);
    // Who has just begun is not sent back before it has advanced by a block of 16.
    let begun = engine.stats().num_steps;
    server.wait_for("20 steps of it", |_| engine.stats().num_steps >= begun + 20);
    let is_as_alone = || {
        let flooded = worst();
        println!("the worst of 30 took {alone} steps alone and {flooded} beside a flood");
        5 * flooded <= 6 * alone
    };
    assert!((0..3).any(|_| is_as_alone()), "over 1.2 times as many steps");
    assert!(server.metric("fullbore_requests_waiting") > 8.0, "the flood was over too soon");
    drop(flood);
}

#[test]
fn a_target_below_one_step_is_refused_at_start() {
    let plan = |target_ms| {
        let mut config = Setup::default().config;
        config.latency = LatencyTarget::Milliseconds(target_ms);
        Setup { config, pace: Pace::Each(Duration::from_millis(20)), ..Setup::default() }.plan()
    };
    let sentence = plan(5).load().err().expect("a step takes 20 ms at least").to_string();
    let step_ms = sentence.split("alone takes ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
    assert!(sentence.starts_with("the target between tokens is 5 ms") && step_ms >= Some(20.0), "{sentence}");
    let loaded = plan(5000).load().expect("a step takes less");
    // Nothing is left of what was measured.
    let blocks = loaded.engine.stats().blocks;
    assert_eq!(loaded.engine.stats(), EngineStats { blocks, ..EngineStats::default() });
    assert_eq!((blocks.cached, blocks.referenced), (0, 0));
    loaded.end();
}

#[test]
fn prices_of_steps_outlive_the_server() {
    let folder = Folder::new("prices");
    let server = || {
        let setup = Setup { costs: Some(folder.0.clone()), ..Setup::default() };
        // In virtual time, so that every step takes what it should.
        let backend = Box::new(SimBackend::new(SimOptions { sleeps: false, ..sleeping() }));
        Plan { backend, ..setup.plan() }.load().expect("the simulator loads")
    };
    let known = |model: &ServedModel| model.engine.cost().is_known();
    let ask = |model: &ServedModel, num_tokens| {
        let request = Request { prompt: vec![TokenId(9); 20], max_tokens: num_tokens, ..Request::default() };
        let (sender, receiver) = std::sync::mpsc::channel();
        model.engine.submit_one(request, Box::new(Until(sender))).expect("room");
        receiver.recv_timeout(Duration::from_secs(20)).expect("an end");
    };
    let first = server();
    assert!(!known(&first));
    // Too few steps to keep.
    ask(&first, 10);
    first.end();
    assert!(!folder.0.exists());
    let second = server();
    ask(&second, 150);
    second.end();
    let third = server();
    assert!(known(&third), "prices of the second");
    let step_ns = third.engine.cost().predict_ns(&StepShape::decode(1, 20)) as f64;
    assert!((4.5e6..5.5e6).contains(&step_ns), "{step_ns} ns, of a device that takes 5 ms");
    third.end();
}

/// A folder of one test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        Folder(std::env::temp_dir().join(format!("fullbore-http-{name}-{}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // The test may not have got as far as to make it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Tells of a request's end.
struct Until(std::sync::mpsc::Sender<()>);

impl Sink for Until {
    fn event(&mut self, event: Event) -> Flow {
        if matches!(event, Event::Finished { .. }) {
            let _ = self.0.send(());
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

#[test]
fn a_dropped_connection_frees_its_blocks() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    for stream in [true, false] {
        let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": stream, "n": 2});
        let mut connection = server.send(post("/v1/completions", body.to_string().as_bytes()));
        server.wait_for("both choices to run", |server| server.metric("fullbore_requests_running") == 2.0);
        assert!(server.metric("fullbore_kv_blocks{state=\"used\"}") >= 2.0);
        if stream {
            connection.read_exact(&mut [0; 64]).expect("a beginning");
        }
        connection.shutdown(Shutdown::Both).expect("an open connection");
        drop(connection);
        // 900 steps would take 1.8 s at least.
        let left = Instant::now();
        server.wait_for("the blocks", |server| server.metric("fullbore_kv_blocks{state=\"used\"}") == 0.0);
        assert!(left.elapsed() < Duration::from_millis(1500), "it ran on for {:?}", left.elapsed());
        assert_eq!(server.metric("fullbore_requests_running"), 0.0);
    }
    assert_eq!(server.metric("fullbore_requests_finished_total{reason=\"aborted\"}"), 4.0);
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
    // Eight of them take every connection.
    let mut trickles: Vec<_> = (0..8).map(|_| server.send("GET /health/live HTTP/1.1\r\nx-slow: ")).collect();
    let begin = Instant::now();
    for stream in &mut trickles {
        let mut rest = Vec::new();
        // A reset is as good an end as a close.
        let _ = stream.read_to_end(&mut rest);
    }
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    server.wait_for("a free connection", |server| server.get("/health/live").status == 200);
    let body = server
        .send("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{\"pro");
    assert_eq!(read_reply(body).error(408)["code"], "request_timeout");
    // One that ends early is no request, and no harm.
    let half = server.send("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"pro");
    half.shutdown(Shutdown::Write).expect("an open connection");
    drop(half);
    drop(server.send("\x16\x03\x01\x02 no HTTP at all\r\n\r\n"));
    assert_eq!(server.get("/health/live").status, 200);
}

/// Half a connection is none: who will hear nothing of an answer cannot be told from who has left.
#[test]
fn a_half_closed_connection_is_let_go_and_frees_its_blocks() {
    let limits = Limits { max_connections: 4, ..Limits::default() };
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
    let silent: Vec<_> = (0..4).map(|_| server.connect()).collect();
    silent.iter().for_each(|half| half.shutdown(Shutdown::Write).expect("an open connection"));
    server.wait_for("a free connection", |server| server.get("/health/live").status == 200);
}

#[test]
fn health_says_why_it_is_not_ready() {
    let limits = Limits { max_stall: Duration::from_millis(100), ..Limits::default() };
    let server = Setup { limits, loaded: false, ..Setup::default() }.start();
    let not_ready = |word: &str| {
        let error = server.get("/health/ready").error(503);
        assert!(error["message"].as_str().expect("text").contains(word), "{error}");
        assert_eq!(server.get("/health/live").status, 200);
    };
    not_ready("loaded");
    let loading = server.post("/v1/completions", &json!({"prompt": "x"}));
    assert_eq!(retry_after(&loading), Duration::from_secs(1));
    loading.error(503);
    server.get("/v1/models").error(503);
    assert_eq!(server.get("/").status, 200);
    assert_eq!(server.get("/metrics").status, 200);

    server.load(&Setup::default());
    assert_eq!(server.get("/health/ready").ok()["status"], "ok");

    server.gate.set(Pace::Stalled);
    let body = json!({"prompt": "x", "max_tokens": 3, "ignore_eos": true}).to_string();
    let waiting = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("the stall", |server| server.get("/health/ready").status == 503);
    not_ready("stalled");
    assert!(server.metric("fullbore_stalled_seconds") > 0.0);
    server.gate.set(Pace::Free);
    assert_eq!(read_reply(waiting).ok()["usage"]["completion_tokens"], 3);
    assert_eq!(server.get("/health/ready").status, 200);
}

#[test]
fn a_lost_device_is_told_to_everyone() {
    let server = Setup { pace: Pace::Each(Duration::from_millis(1)), ..Setup::default() }.start();
    let body =
        |stream: bool| json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": stream}).to_string();
    let mut streamed = server.send(post("/v1/completions", body(true).as_bytes()));
    let whole = server.send(post("/v1/completions", body(false).as_bytes()));
    let mut beginning = vec![0; 400];
    streamed.read_exact(&mut beginning).expect("a beginning");
    server.wait_for("both to run", |server| server.metric("fullbore_requests_running") == 2.0);
    server.gate.set(Pace::Lost);
    streamed.read_to_end(&mut beginning).expect("an orderly end");
    let events = events(&parse_reply(&beginning).body, false);
    let (last, before) = events.split_last().expect("events");
    assert!(last["error"]["message"].as_str().expect("text").contains("unplugged"), "{last}");
    assert_eq!(last["error"]["type"], "server_error");
    assert!(before.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
    let error = read_reply(whole).error(503);
    assert!(error["message"].as_str().expect("text").contains("unplugged"), "{error}");
    // Until it is given up, it may come back.
    let gives_up = |server: &Harness| server.get("/health/ready").text().contains("the engine has stopped");
    server.wait_for("the last attempt", gives_up);
    // The command ends with it, as an error, so that whoever watches the process starts it again.
    let (model, reason) = server.runtime.block_on(server.server.as_ref().expect("running").engine_stopped());
    assert_eq!(model, "sim-model");
    assert!(reason.contains("6 attempts to make it anew did not"), "{reason}");
    let after = server.post("/v1/completions", &json!({"prompt": "x"}));
    // No waiting helps.
    assert!(!after.head.contains("retry-after"), "{}", after.head);
    let after = after.error(503);
    let sentence = after["message"].as_str().expect("text");
    let parts = ["unplugged; 6 attempts to make it anew did not", "still unplugged", "restart the server"];
    assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    assert!(server.get("/health/ready").error(503)["message"].as_str().expect("text").contains("unplugged"));
    assert_eq!(server.get("/health/live").status, 200);
    server.wait_for("the blocks", |server| server.metric("fullbore_kv_blocks{state=\"used\"}") == 0.0);
}

/// Ends by itself once the engine is told to, also between two attempts.
#[test]
fn a_server_whose_device_is_lost_can_be_ended() {
    let mut server = Setup { pace: Pace::Lost, ..Setup::default() }.start();
    server.post("/v1/completions", &json!({"prompt": "x"})).error(503);
    let running = server.server.take().expect("running");
    let begin = Instant::now();
    server.runtime.block_on(running.shutdown(Duration::from_secs(1)));
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[test]
fn no_panic_reaches_a_client() {
    let server = Setup { pace: Pace::Panic, ..Setup::default() }.start();
    let reply = server.post("/v1/completions", &json!({"prompt": "x"}));
    let error = reply.error(503);
    assert!(!error["message"].as_str().expect("text").contains("planted"), "{error}");
    server.post("/v1/completions", &json!({"prompt": "x"})).error(503);
    let ready = server.get("/health/ready").error(503);
    assert!(ready["message"].as_str().expect("text").contains("bug of its own"), "{ready}");
    assert_eq!(server.get("/health/live").status, 200);
}

#[test]
fn metrics_count_what_happened() {
    let server = Setup::default().start();
    for _ in 0..2 {
        server.complete(json!({"prompt": "count these tokens, all of them", "max_tokens": 10, "ignore_eos": true}));
    }
    server.get("/nothing");
    let reply = server.get("/metrics");
    assert!(reply.head.contains("content-type: text/plain"), "{}", reply.head);
    let text = reply.text();
    let known = ["#", "fullbore_", "vllm:"];
    assert!(text.lines().all(|line| known.iter().any(|start| line.starts_with(start))), "{text}");
    // A client may have its answer before the engine has told of the step.
    server.wait_for("20 tokens", |server| server.metric("fullbore_tokens_generated_total") == 20.0);
    assert_eq!(server.metric("fullbore_requests_finished_total{reason=\"length\"}"), 2.0);
    assert_eq!(server.metric("fullbore_requests_running"), 0.0);
    assert_eq!(server.metric("fullbore_requests_waiting"), 0.0);
    assert_eq!(server.metric("fullbore_http_responses_total{status=\"404\"}"), 1.0);
    let of_model = |name: &str| server.metric(&format!("vllm:{name}{{engine=\"0\",model_name=\"sim-model\"}}"));
    for (name, count) in [
        ("time_to_first_token_seconds_count", 2.0),
        ("inter_token_latency_seconds_count", 18.0),
        ("e2e_request_latency_seconds_count", 2.0),
        ("request_queue_time_seconds_count", 2.0),
        ("request_prefill_time_seconds_count", 2.0),
        ("request_decode_time_seconds_count", 2.0),
        ("request_generation_tokens_sum", 20.0),
        ("generation_tokens_total", 20.0),
        ("num_requests_running", 0.0),
        ("num_requests_waiting", 0.0),
        ("kv_cache_usage_perc", 0.0),
    ] {
        assert_eq!(of_model(name), count, "{name}");
    }
    let parts = ["request_queue_time", "request_prefill_time", "request_decode_time"];
    let parts: f64 = parts.iter().map(|part| of_model(&format!("{part}_seconds_sum"))).sum();
    let whole = of_model("e2e_request_latency_seconds_sum");
    assert!((parts - whole).abs() < 1e-6, "{parts} of {whole}");
    assert!(of_model("prefix_cache_hits_total") > 0.0);
    assert!(server.metric("fullbore_steps_total") >= 20.0);
    assert!(server.metric("fullbore_prefix_cache_hit_tokens_total") > 0.0);
    let blocks =
        ["free", "cached", "used"].map(|state| server.metric(&format!("fullbore_kv_blocks{{state=\"{state}\"}}")));
    assert_eq!(blocks.iter().sum::<f64>(), 1024.0);
}

#[test]
fn shutdown_lets_streams_end() {
    let mut server = Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() }.start();
    let body = json!({"prompt": "x", "max_tokens": 60, "ignore_eos": true, "stream": true}).to_string();
    let stream = server.send(post("/v1/completions", body.as_bytes()));
    let idle = server.send("GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n");
    server.wait_for("the stream", |server| server.metric("fullbore_requests_running") == 1.0);
    let running = server.server.take().expect("running");
    let begin = Instant::now();
    server.runtime.block_on(running.shutdown(Duration::from_secs(20)));
    assert!(begin.elapsed() < Duration::from_secs(15), "an idle connection held it: {:?}", begin.elapsed());
    assert!(events(&read_reply(stream).body, true).len() > 1);
    drop(idle);
    assert!(TcpStream::connect(server.address).is_err(), "it still listens");
}

#[test]
fn shutdown_ends_what_takes_too_long() {
    let mut server = Setup { pace: Pace::Each(Duration::from_millis(10)), ..Setup::default() }.start();
    let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": true}).to_string();
    let stream = server.send(post("/v1/completions", body.as_bytes()));
    server.wait_for("the stream", |server| server.metric("fullbore_requests_running") == 1.0);
    let running = server.server.take().expect("running");
    server.runtime.block_on(running.shutdown(Duration::from_millis(100)));
    let events = events(&read_reply(stream).body, false);
    let last = events.last().expect("events");
    assert!(last["error"]["message"].as_str().expect("text").contains("shutting down"), "{last}");
}
