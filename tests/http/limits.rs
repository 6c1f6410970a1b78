//! `/v1/limits` and its metrics: for each cause a workload over HTTP that provokes it, and the verdict that must name
//! it. The simulator takes real time here, by prices that the engine knows.

use std::collections::HashMap;

use fullbore::api::ServedModel;
use fullbore_engine::backend::sim::Fidelity;
use fullbore_engine::config::LatencyTarget;
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::engine::Engine;
use fullbore_engine::fleet::Fleet;
use fullbore_engine::limits::neighbours::Membership;
use fullbore_engine::model::Model;
use fullbore_engine::request::Share;

use super::*;

/// A server and the requests that it gets, all at once.
struct Provoked {
    config: EngineConfig,
    pace: Pace,
    /// What steps take, and what the engine thinks.
    true_cost: CostModel,
    cost: CostModel,
    shares: HashMap<String, Share>,
    requests: Vec<Value>,
    num_layers: u32,
    /// Of clients in this process, and how long each takes to say whether it is still there.
    others: Vec<(Request, Duration)>,
}

/// On a device that takes `ns_at_one_row`, and `ns_per_row` for each row more.
fn provoke(config: EngineConfig, ns_at_one_row: f64, ns_per_row: f64, requests: Vec<Value>) -> Provoked {
    let cost = CostModel::line(ns_at_one_row, ns_per_row, Prices::default());
    let (shares, num_layers) = (HashMap::new(), Bundle::simulated().config.num_layers);
    let (pace, others) = (Pace::Free, Vec::new());
    Provoked { config, pace, true_cost: cost, cost, shares, requests, num_layers, others }
}

/// Room for all that these workloads ask for.
fn roomy() -> EngineConfig {
    let config = Setup::default().config;
    EngineConfig { max_num_seqs: 32, max_num_batched_tokens: 512, num_blocks: 2048, ..config }
}

/// Requests with prompts of their own.
fn asks(num_requests: u64, num_prompt_tokens: u64, max_tokens: u64) -> Vec<Value> {
    let prompt =
        |index: u64| (0..num_prompt_tokens).map(|i| 10 + (index * 31 + i * (1 + index)) % 200).collect::<Vec<_>>();
    let ask = |index| json!({"prompt": prompt(index), "max_tokens": max_tokens, "ignore_eos": true});
    (0..num_requests).map(ask).collect()
}

impl Provoked {
    fn start(&self, neighbours: Option<Membership>) -> Harness {
        let server = Setup { config: self.config, pace: self.pace, loaded: false, ..Setup::default() }.start();
        let options =
            SimOptions { fidelity: Fidelity::Cost, cost: self.true_cost, sleeps: true, ..SimOptions::default() };
        let mut backend = Box::new(Gated { sim: SimBackend::new(options), gate: server.gate.clone() });
        let Bundle { mut config, checkpoint, .. } = Bundle::simulated();
        config.num_layers = self.num_layers;
        config.windows = vec![None; self.num_layers as usize];
        let model = Model::load(config, self.config.state_limits(), &checkpoint, backend.as_mut(), &mut |_| {});
        let mut engine = Engine::new(self.config, model.expect("the simulator has memory"), backend, (1, 2));
        engine.set_cost(self.cost);
        if let Some(neighbours) = neighbours {
            engine.set_neighbours(neighbours);
        }
        let config = self.config;
        let (bundle, backend) = (Bundle::simulated(), Box::new(SimBackend::new(SimOptions::default())));
        let plan = Plan::of("sim-model", bundle, backend, config, 0);
        // All of it but the engine, whose prices a plan does not know.
        let model = plan.load().expect("the simulator loads");
        let engine = Fleet::of(engine);
        for (request, time) in &self.others {
            engine.submit_one(request.clone(), Box::new(Lingering(*time))).expect("room");
        }
        let model = ServedModel { shares: self.shares.clone(), engine, ..model };
        server.server.as_ref().expect("running").set_models(vec![model]);
        server
    }

    /// Hands all requests in.
    fn send(&self, server: &Harness) -> Vec<TcpStream> {
        let bodies = self.requests.iter().map(|body| post("/v1/completions", body.to_string().as_bytes()));
        bodies.map(|body| server.send(body)).collect()
    }

    /// Runs it until all requests are answered and all of that time is known.
    fn run(&self) -> Harness {
        let before = Instant::now();
        let server = self.start(None);
        let begin = Instant::now();
        let replies = self.send(&server);
        replies.into_iter().for_each(|reply| drop(read_reply(reply).ok()));
        server.wait_for("the last step", |server| server.metric("fullbore_requests_running") == 0.0);
        let elapsed_s = begin.elapsed().as_secs_f64();
        // An idle engine tells of its time now and then.
        let known_s = |report: &Value| report["total"]["wall_s"].as_f64().expect("a number");
        server.wait_for("all of that time", |server| known_s(&server.get("/v1/limits").ok()) > 0.99 * elapsed_s);
        let report = server.get("/v1/limits").ok();
        assert!(known_s(&report) < before.elapsed().as_secs_f64(), "{report:#}");
        server
    }

    /// Runs it and reads the verdict, which must name `limit` with these words. A machine that is busy with other work
    /// is a truer limit than the one that is provoked here, and so it may run again.
    #[track_caller]
    fn check(&self, limit: &str, words: &[&str]) {
        let is_named = |server: &Harness| server.get("/v1/limits").ok()["limit"] == limit;
        let server = (0..2).map(|_| self.run()).find(is_named).unwrap_or_else(|| self.run());
        check_verdict(&server, limit, words);
    }
}

#[track_caller]
fn check_verdict(server: &Harness, limit: &str, words: &[&str]) -> Value {
    let report = server.get("/v1/limits").ok();
    assert_eq!(report["limit"], limit, "{report:#}");
    let verdict = report["verdict"].as_str().expect("a sentence");
    for word in words {
        assert!(verdict.contains(word), "no {word:?} in: {verdict}");
    }
    for tally in ["window", "total"].map(|name| &report[name]) {
        let wall_s = tally["wall_s"].as_f64().expect("a number");
        let sum = |name: &str| -> f64 {
            tally[name].as_object().expect("causes").values().map(|value| value.as_f64().expect("a number")).sum()
        };
        assert!((sum("seconds") - wall_s).abs() < 0.01 * wall_s, "{} of {wall_s} s have a cause", sum("seconds"));
        assert!((sum("shares") - 1.0).abs() < 0.01, "{tally}");
    }
    let counted = server.metric(&format!("fullbore_device_seconds_total{{cause=\"{limit}\"}}"));
    assert!(counted >= report["total"]["seconds"][limit].as_f64().expect("a number"), "{counted}: {report}");
    report
}

#[test]
fn too_few_requests() {
    provoke(roomy(), 2e6, 2e4, asks(1, 10, 200)).check("no_requests", &["no requests: ", "1 row where"]);
}

#[test]
fn memory() {
    let config = EngineConfig { num_blocks: 24, max_model_len: 160, ..roomy() };
    let words = ["memory: ", "wait for KV blocks", "of 24 are held", "q8_0 KV would admit about "];
    provoke(config, 2e6, 2e4, asks(24, 90, 40)).check("kv_memory", &words);
}

#[test]
fn slots() {
    let config = EngineConfig { max_num_seqs: 2, ..roomy() };
    provoke(config, 2e6, 2e4, asks(12, 10, 40)).check("slots", &["slots: ", "while 2 run", "--max-num-seqs"]);
}

#[test]
fn the_latency_target() {
    let config = EngineConfig { latency: LatencyTarget::Milliseconds(3), ..roomy() };
    let mut requests = asks(4, 10, 150);
    requests.extend(asks(10, 900, 1));
    provoke(config, 2e6, 5e4, requests).check("latency_target", &["3 ms between tokens", "--target-itl-ms"]);
}

#[test]
fn the_step_budget() {
    let config = EngineConfig { max_num_batched_tokens: 32, ..roomy() };
    provoke(config, 2e6, 1e4, asks(16, 500, 1)).check("step_budget", &["step budget: a step has 32 rows"]);
}

#[test]
fn a_shared_prefix() {
    let config = EngineConfig { max_num_batched_tokens: 32, ..roomy() };
    let prompt = |own: u64| (0..900).map(|i| 10 + i * 7 % 200).chain([own + 1]).collect::<Vec<u64>>();
    let ask = |own| json!({"prompt": prompt(own), "max_tokens": 1, "ignore_eos": true});
    let words = ["shared prefix: ", "for a prefix that another one computes"];
    provoke(config, 4e6, 1e4, (0..16).map(ask).collect()).check("shared_prefix", &words);
}

#[test]
fn caps_of_tenants() {
    let mut requests = asks(12, 10, 40);
    requests.iter_mut().for_each(|request| request["user"] = json!("batch"));
    let mut provoked = provoke(roomy(), 2e6, 2e4, requests);
    provoked.shares = HashMap::from([("batch".to_owned(), Share { weight: 1, max_num_seqs: 2 })]);
    provoked.check("tenant_cap", &["tenant caps: ", "while 2 run", "--share"]);
}

#[test]
fn the_host_that_hands_steps_over() {
    let mut provoked = provoke(roomy(), 1e6, 2e4, asks(16, 10, 40));
    provoked.pace = Pace::SlowSubmit(Duration::from_millis(8));
    provoked.check("host_upload", &["host: the device waits for it ", "upload "]);
}

#[test]
fn the_host_that_reads_back() {
    let mut provoked = provoke(roomy(), 1e6, 2e4, asks(16, 10, 40));
    provoked.pace = Pace::SlowRead(Duration::from_millis(8));
    provoked.check("host_read_back", &["host: the device waits for it ", "read-back "]);
}

/// A client that is slow to answer whether it is still there; the engine asks before each step.
struct Lingering(Duration);

impl Sink for Lingering {
    fn event(&mut self, _: Event) -> Flow {
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        std::thread::sleep(self.0);
        false
    }
}

#[test]
fn the_host_that_plans() {
    let mut provoked = provoke(roomy(), 1e6, 2e4, asks(15, 10, 40));
    let request = Request { prompt: vec![TokenId(9); 10], max_tokens: 60, ..Request::default() };
    provoked.others = vec![(request, Duration::from_millis(8))];
    provoked.check("host_schedule", &["host: the device waits for it ", "schedule "]);
}

/// Of a model with so many layers, on a device that takes next to no time.
#[test]
fn the_host_that_records() {
    let config = EngineConfig { max_num_seqs: 1, num_blocks: 64, ..roomy() };
    let mut provoked = provoke(config, 1e3, 1e1, asks(8, 10, 900));
    provoked.num_layers = 250;
    provoked.check("host_record", &["host: the device waits for it ", "record "]);
}

#[test]
fn the_device() {
    let words = ["the device: it computes for ", "tokens a second"];
    provoke(roomy(), 1e6, 1e6, asks(6, 10, 60)).check("computing", &words);
}

/// Two servers on one device, on which steps take three times as long as they do alone.
#[test]
fn another_engine_on_the_device() {
    let names = ["the first server", "the second server"];
    let mut provoked = provoke(roomy(), 1e6, 1e6, asks(4, 10, 40));
    provoked.true_cost = CostModel::line(3e6, 3e6, Prices::default());
    let servers = names.map(|name| provoked.start(Some(Membership::join("one device for two servers", name))));
    let replies: Vec<TcpStream> = servers.iter().flat_map(|server| provoked.send(server)).collect();
    replies.into_iter().for_each(|reply| drop(read_reply(reply).ok()));
    for (server, other) in servers.iter().zip([names[1], names[0]]) {
        check_verdict(server, "neighbour", &["neighbour: ", other]);
    }
}

#[test]
fn an_idle_server_goes_on_counting() {
    let server = Setup::default().start();
    assert_eq!(server.get("/v1/limits").ok()["verdict"], "no requests: nothing has run yet");
    server.wait_for("a second of idleness", |server| {
        server.metric("fullbore_device_seconds_total{cause=\"no_requests\"}") > 0.9
    });
    let report = check_verdict(&server, "no_requests", &["for 100 % of the time"]);
    assert_eq!(report["knee"], Value::Null);
}
