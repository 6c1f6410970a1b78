//! A server on the simulator, in this process, asked over real sockets: raw HTTP/1.1 in, bytes out.
//!
//! The simulator is wrapped in a gate, so that a test decides when steps end, how long they take and whether they fail.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use fullbore::api::ServedModel;
use fullbore::costs::SavedCosts;
use fullbore::http::accept::Limits;
use fullbore::http::access::Access;
use fullbore::http::tls::Tls;
use fullbore::serve::{Entrance, Server};
use fullbore::start::Plan;
use fullbore::traces::Tracer;
use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimOptions};
use fullbore_engine::backend::{Backend, DeviceError, Ticket};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::profile::{DeviceProfile, ProfiledDevice, ProfiledLimits, ProfiledModel};
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::recording::Recording;
use fullbore_engine::request::Share;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::grammar::test_sandbox;

/// How steps end.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Pace {
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
pub(super) struct Gate(Arc<(Mutex<Pace>, Condvar)>);

impl Gate {
    pub(super) fn new(pace: Pace) -> Gate {
        Gate(Arc::new((Mutex::new(pace), Condvar::new())))
    }

    pub(super) fn set(&self, pace: Pace) {
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

pub(super) struct Gated {
    pub(super) sim: SimBackend,
    pub(super) gate: Gate,
}

impl Around for Gated {
    fn inner(&self) -> &dyn Backend {
        &self.sim
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut self.sim
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
    pub(super) runtime: Runtime,
    pub(super) server: Option<Server>,
    pub(super) address: SocketAddr,
    pub(super) gate: Gate,
}

pub(super) struct Setup {
    pub(super) limits: Limits,
    pub(super) access: Access,
    pub(super) tls: Option<Tls>,
    pub(super) tracer: Option<Tracer>,
    pub(super) config: EngineConfig,
    pub(super) pace: Pace,
    pub(super) sim: SimOptions,
    pub(super) shares: Vec<(&'static str, Share)>,
    /// The folder for prices of steps.
    pub(super) costs: Option<PathBuf>,
    pub(super) loaded: bool,
    /// Whether forms are tried in processes of their own, as `fullbore serve` does.
    pub(super) sandboxed: bool,
    pub(super) bundle: fn(&mut Bundle),
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
            sandboxed: false,
            bundle: |_| {},
        }
    }
}

impl Setup {
    pub(super) fn start(mut self) -> Harness {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let access = std::mem::take(&mut self.access);
        let (tls, tracer) = (self.tls.take(), self.tracer.take());
        let entrance = Entrance { limits: self.limits, access, tls, tracer, log: None };
        let server = runtime.block_on(Server::start(host, 0, entrance)).expect("a free port");
        let gate = Gate::new(self.pace);
        let harness = Harness { runtime, address: server.address(), server: Some(server), gate };
        if self.loaded {
            harness.load(&self);
        }
        harness
    }

    pub(super) fn plan(&self) -> Plan {
        self.plan_behind(Gate::new(self.pace))
    }

    pub(super) fn plan_behind(&self, gate: Gate) -> Plan {
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

    pub(super) fn load(&self, setup: &Setup) {
        let mut model = setup.plan_behind(self.gate.clone()).load().expect("the simulator loads");
        if setup.sandboxed {
            model.grammars = model.grammars.with_sandbox(test_sandbox());
        }
        model.shares = setup.shares.iter().map(|&(name, share)| (name.to_owned(), share)).collect();
        self.server.as_ref().expect("running").set_models(vec![model]);
    }

    pub(super) fn connect(&self) -> TcpStream {
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

    pub(super) fn post_bytes(&self, path: &str, body: &[u8]) -> Reply {
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
    pub(super) fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
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
    pub(super) body: Vec<u8>,
}

impl Reply {
    /// `name` in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    pub(super) fn json(&self) -> Value {
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

pub(super) fn parse_reply(bytes: &[u8]) -> Reply {
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
pub(super) fn events(body: &[u8], whole: bool) -> Vec<Value> {
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

pub(super) fn prompt(index: usize) -> String {
    format!("Prompt number {index}: {}", "tell me more. ".repeat(index % 7))
}

pub fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect()
}

/// A greedy completion's ids and text.
pub(super) fn greedy(server: &Harness, prompt: impl Into<Value>, max_tokens: u32) -> (Vec<u64>, String) {
    let reply = server.complete(json!({"prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true}));
    let choice = &reply["choices"][0];
    (ids(&choice["token_ids"]), choice["text"].as_str().expect("text").to_owned())
}

pub(super) fn retry_after(reply: &Reply) -> Duration {
    let line = reply.head.lines().find_map(|line| line.strip_prefix("retry-after: "));
    let seconds = line.and_then(|seconds| seconds.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or_else(|| panic!("no Retry-After in {}", reply.head)))
}

/// A device that sleeps: 5 ms a step, whatever the step.
pub(super) fn sleeping() -> SimOptions {
    let cost = CostModel::line(5e6, 0.0, Prices::default());
    SimOptions { fidelity: Fidelity::Cost, cost, sleeps: true, ..SimOptions::default() }
}

/// Has a server that is set up like this find `cost` among what earlier ones have kept.
pub(super) fn save_prices(setup: &Setup, cost: CostModel) {
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

/// A folder of one test's own, removed at its end.
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    pub(super) fn new(name: &str) -> Folder {
        Folder(std::env::temp_dir().join(format!("fullbore-http-{name}-{}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // The test may not have got as far as to make it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
