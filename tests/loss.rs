//! A device that is destroyed while it works: who is told, who keeps waiting, and the same tokens on the one that comes
//! after it. Needs Vulkan drivers: fails without one. `simulation` and `http` hold the same without one.

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fullbore::start::{self, Plan};
use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::wgpu::{KillSwitch, WgpuBackend, WgpuOptions};
use fullbore_engine::backend::{Backend, DeviceError, LoadError};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::{CostModel, Prices};
use fullbore_engine::engine::Engine;
use fullbore_engine::model::{Checkpoint, Model, ModelConfig};
use fullbore_engine::op::{MulAdd, Op};
use fullbore_engine::recording::Recording;
use fullbore_engine::request::{Event, FinishReason, Flow, Request, Sink, TokenId};
use fullbore_engine::tensor::{Tensor, WeightFormat};
use serde_json::{Value, json};

use crate::http::{Harness, chaos, post, read_reply};
use crate::ops::device_ids;
use crate::split::split;

/// A device by its id, and what takes it away.
fn open(selector: &str) -> (Box<dyn Backend>, KillSwitch) {
    let kill_switch = KillSwitch::default();
    let (selector, switch) = (selector.to_owned(), kill_switch.clone());
    let options = WgpuOptions { selector, checked: true, kill_switch: switch, ..WgpuOptions::default() };
    (Box::new(WgpuBackend::open(&options).expect("a listed device opens")), kill_switch)
}

/// Tokens, and why there are no more.
type Answer = (Vec<TokenId>, Option<FinishReason>);

#[derive(Clone, Default)]
struct Client(Arc<Mutex<Answer>>);

impl Client {
    fn answer(&self) -> Answer {
        self.0.lock().expect("nobody panics").clone()
    }
}

impl Sink for Client {
    fn event(&mut self, event: Event) -> Flow {
        let mut answer = self.0.lock().expect("nobody panics");
        match event {
            Event::Token { id, .. } => answer.0.push(id),
            Event::Finished { reason, .. } => answer.1 = Some(reason),
            Event::Started { .. } | Event::Prompt(_) | Event::Pooled(_) => {}
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// Requests of which half begin alike, so that they share blocks.
fn requests() -> Vec<Request> {
    let request = |index: u32| {
        let shared = (0..40).map(|i| TokenId(3 + i * 5 % 200));
        let own = (0..20).map(|i| TokenId((17 * index + 3 * i) % 256));
        let prompt = if index.is_multiple_of(2) { shared.chain(own).collect() } else { own.collect() };
        Request { prompt, max_tokens: 24, ..Request::default() }
    };
    (0..8).map(request).collect()
}

fn add_all(engine: &mut Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Client> {
    let add = |request: Request| {
        let client = Client::default();
        engine.add(request, Box::new(client.clone()));
        client
    };
    requests.into_iter().map(add).collect()
}

fn config() -> EngineConfig {
    let config = EngineConfig {
        max_num_seqs: 3,
        max_num_batched_tokens: 32,
        max_model_len: 96,
        block_size: 16,
        num_blocks: 24,
        num_host_blocks: 4,
        max_logit_rows: 3,
        ..EngineConfig::default()
    };
    config.check().expect("a valid config");
    config
}

const CHECKPOINT: Checkpoint = Checkpoint::Random { seed: 3, format: WeightFormat::Q4_0 };

fn load(backend: &mut dyn Backend, progress: &mut dyn FnMut(u64)) -> Result<Model, LoadError> {
    Model::load(ModelConfig::tiny(256, 2), config().state_limits(), &CHECKPOINT, backend, progress)
}

fn engine_on(mut backend: Box<dyn Backend>) -> Engine {
    let model = load(backend.as_mut(), &mut |_| {}).expect("a small model");
    let mut engine = Engine::new(config(), model, backend, (1, 2));
    engine.set_checkpoint(CHECKPOINT);
    engine.enable_swap().expect("the device is there");
    engine
}

fn run(engine: &mut Engine) {
    while engine.step().expect("the device is there") {
        engine.check();
    }
}

/// A driver that neither ends nor resets what hangs would be waited for for ever.
#[test]
fn a_device_that_hangs_is_lost_and_opened_anew() {
    for selector in device_ids() {
        // A fifth of a second of software Vulkan at the least.
        let max_wait = Some(Duration::from_millis(1));
        let options = WgpuOptions { selector: selector.clone(), max_wait, ..WgpuOptions::default() };
        let mut backend = WgpuBackend::open(&options).expect("a listed device opens");
        let upload = backend.alloc("upload", 4).expect("a few bytes");
        let buffer = backend.alloc("x", 1 << 22).expect("a few bytes");
        let x = Tensor { buffer, ..Tensor::f32(upload, 1, 1 << 20) };
        let mut recording = Recording::new(upload);
        recording.push(Op::MulAdd(MulAdd { x, scale: 0.5, offset: 1.0, rounds: 1 << 13 }));
        let ticket = backend.submit(&recording).expect("it is there");
        let error = backend.wait(ticket, &mut Vec::new()).expect_err("it takes too long").to_string();
        assert!(error.contains("was lost: it has not done one submission in 1ms"), "{error}");
        let again = backend.submit(&recording).expect_err("it is lost");
        assert!(matches!(again, DeviceError::Lost { .. }), "{again}");
        backend.reopen().expect("the same device");
        assert_eq!(backend.info().id, selector);
        let upload = backend.alloc("upload", 4).expect("a few bytes");
        backend.submit(&Recording::new(upload)).expect("it is there");
    }
}

/// What a driver's own loss is heard by.
#[test]
fn a_loss_that_wgpu_tells_of_is_a_loss() {
    for id in device_ids() {
        let (mut backend, kill_switch) = open(&id);
        let upload = backend.alloc("upload", 4).expect("a few bytes");
        let ticket = backend.submit(&Recording::new(upload)).expect("it is there");
        kill_switch.destroy_unnoted();
        let error = backend.wait(ticket, &mut Vec::new()).expect_err("it is gone");
        assert!(matches!(error, DeviceError::Lost { .. }) && error.to_string().contains(&id), "{error}");
        let again = backend.submit(&Recording::new(upload)).expect_err("it is gone");
        assert!(matches!(again, DeviceError::Lost { .. }), "{again}");
        backend.reopen().expect("the same device");
        let upload = backend.alloc("upload", 4).expect("a few bytes");
        let ticket = backend.submit(&Recording::new(upload)).expect("it is there");
        backend.wait(ticket, &mut Vec::new()).expect("it is there");
    }
}

/// Wherever in a load that is; what is written to memory that the device could not give any more is no bug of ours.
#[test]
fn a_device_that_is_destroyed_while_a_model_is_loaded_is_lost() {
    for id in device_ids() {
        for destroyed_at in 0.. {
            let (mut backend, kill_switch) = open(&id);
            let mut num_told = 0;
            if destroyed_at == 0 {
                kill_switch.destroy();
            }
            let mut progress = |_| {
                num_told += 1;
                if num_told == destroyed_at {
                    kill_switch.destroy();
                }
            };
            let loaded = load(backend.as_mut(), &mut progress).map(|_| ());
            let is_whole = num_told < destroyed_at;
            let then = loaded.map_err(|error| error.to_string()).and_then(|()| {
                let upload = backend.alloc("upload", 4).map_err(|error| error.to_string())?;
                backend.submit(&Recording::new(upload)).map(|_| ()).map_err(|error| error.to_string())
            });
            match then {
                Ok(()) => assert!(is_whole, "{id} computes after its end"),
                Err(error) => assert!(!is_whole && error.contains("was lost: Destroyed"), "{error}"),
            }
            if is_whole {
                break;
            }
        }
    }
}

#[test]
fn a_destroyed_device_comes_back_with_its_weights_and_nothing_else() {
    for id in device_ids() {
        let (backend, kill_switch) = open(&id);
        lose(&id, backend, &kill_switch);
    }
}

/// All stages begin anew, for none is worth anything without the others.
#[test]
fn a_split_that_loses_a_device_comes_back_whole() {
    let id = &device_ids()[0];
    let cpu = || Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started"));
    for is_last in [false, true] {
        let (backend, kill_switch) = open(id);
        let stages: Vec<(Box<dyn Backend>, u32)> =
            if is_last { vec![(cpu(), 1), (backend, 1)] } else { vec![(backend, 1), (cpu(), 1)] };
        lose(id, split(stages), &kill_switch);
    }
}

/// Whoever `id` was at fails, and the rest and those who come later get what they would have got.
fn lose(id: &str, backend: Box<dyn Backend>, kill_switch: &KillSwitch) {
    let mut engine = engine_on(backend);
    let expected: Vec<Answer> = {
        let clients = add_all(&mut engine, requests());
        run(&mut engine);
        clients.iter().map(Client::answer).collect()
    };
    assert!(engine.stats().cached_tokens > 0, "{id}: nothing was shared");
    let clients = add_all(&mut engine, requests());
    for _ in 0..6 {
        engine.step().expect("the device is there");
    }
    while engine.has_room() {
        assert!(engine.begin().expect("the device is there"));
    }
    assert_eq!(engine.num_in_flight(), 2);
    kill_switch.destroy();
    // What was handed over may still be done; nothing else is.
    let error = (0..4).find_map(|_| engine.step().err()).expect("the device is gone");
    assert!(matches!(error, DeviceError::Lost { .. }), "{error}");
    let begun: Vec<bool> = clients.iter().map(|client| !client.answer().0.is_empty()).collect();
    engine.lose_device(&error.to_string());
    engine.check();
    let blocks = engine.stats().blocks;
    assert_eq!((blocks.free, blocks.cached, blocks.referenced), (blocks.total, 0, 0), "{id}");

    kill_switch.refuse(1);
    let refused = engine.recover().expect_err("a test does not let it be").to_string();
    assert!(refused.starts_with(&format!("device {id} was lost: ")), "{refused}");
    engine.recover().expect("it can be opened again");
    assert_eq!(kill_switch.num_opened(), 2);
    engine.check();
    let mut num_failed = 0;
    run(&mut engine);
    for (index, (client, expected)) in clients.iter().zip(&expected).enumerate() {
        let (tokens, reason) = client.answer();
        match reason {
            Some(FinishReason::DeviceLost(sentence)) => {
                num_failed += 1;
                assert_eq!(sentence, error.to_string());
                assert_eq!(tokens, expected.0[..tokens.len()], "{id}: request {index} before the loss");
            }
            _ => {
                assert!(!begun[index], "{id}: request {index} had begun");
                assert_eq!(&(tokens, reason), expected, "{id}: request {index}, which waited");
            }
        }
    }
    assert!((1..=3).contains(&num_failed), "{id}: {num_failed} failed, and 3 ran");
    let again = add_all(&mut engine, requests());
    run(&mut engine);
    let again: Vec<Answer> = again.iter().map(Client::answer).collect();
    assert_eq!(again, expected, "{id}: after the loss");
    let blocks = engine.stats().blocks;
    assert_eq!(blocks.free + blocks.cached, blocks.total, "{id}");
}

fn serving(id: &str) -> (Harness, KillSwitch) {
    let (backend, kill_switch) = open(id);
    let bundle = Bundle::simulated();
    let config = EngineConfig {
        max_num_seqs: 2,
        max_num_batched_tokens: 64,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: 256,
        max_logit_rows: 2,
        ..EngineConfig::default()
    };
    let plan = Plan::of("tiny", bundle, backend, config, 0);
    (Harness::serving(vec![plan.load().expect("a small model loads")]), kill_switch)
}

fn plan_on(backend: Box<dyn Backend>, title: &str) -> Plan {
    let config = EngineConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: 256,
        max_logit_rows: 4,
        ..EngineConfig::default()
    };
    let mut plan = Plan::of("tiny", Bundle::simulated(), backend, config, 0);
    plan.seat.title = title.to_owned();
    plan
}

/// Beside a device of another kind: no stream ends or changes, and it takes part again.
#[test]
fn what_a_lost_device_was_at_goes_on_on_another_kind_of_device() {
    let id = device_ids().into_iter().next().expect("a device");
    let cpu = || -> Box<dyn Backend> {
        Box::new(CpuBackend::new(CpuOptions { num_threads: 1, ..CpuOptions::default() }).expect("threads"))
    };
    let with_ids = |nth: usize| {
        let mut body = body(&format!("the story of number {nth}, as it"), 300);
        body["return_token_ids"] = json!(true);
        body
    };
    let tokens = |reply: &Value| reply["choices"][0]["token_ids"].clone();
    let alone = |backend: Box<dyn Backend>| -> Vec<Value> {
        let server = Harness::serving(vec![plan_on(backend, "alone").load().expect("a small model loads")]);
        (0..8).map(|nth| tokens(&server.complete(with_ids(nth)))).collect()
    };
    let expected = alone(cpu());
    assert_eq!(alone(open(&id).0), expected, "{id} and the cpu differ by themselves");
    let (backend, kill_switch) = open(&id);
    // All begin where a step is thought to take a thousandth of the other's.
    let mut plans = [plan_on(backend, "gpu"), plan_on(cpu(), "cpu")];
    for (plan, step_ns) in plans.iter_mut().zip([1e6, 1e9]) {
        plan.tuned_cost = Some(CostModel::line(step_ns, 0.0, Prices::default()));
    }
    let model = start::load(plans.into()).expect("a small model loads");
    let server = Harness::serving(vec![model]);
    let of = |metric: &str, device: &str| server.metric(&format!("{metric}{{device=\"{device}\"}}"));
    let send = |body: Value| server.send(post("/v1/completions", body.to_string().as_bytes()));
    let streams: Vec<_> = (0..8).map(|nth| send(with_ids(nth))).collect();
    server.wait_for("tokens of the device", |_| of("fullbore_tokens_generated_total", "gpu") > 0.0);
    kill_switch.destroy();
    for (nth, stream) in streams.into_iter().enumerate() {
        assert_eq!(tokens(&read_reply(stream).ok()), expected[nth], "request {nth}");
    }
    assert!(of("fullbore_requests_moved_total", "gpu") > 0.0, "the device had ended all of them");
    // It is made anew, and given work again when the other has more than it can do.
    let steps = of("fullbore_steps_total", "gpu");
    server.wait_for("the device", |_| {
        let streams: Vec<_> = (0..64).map(|nth| send(body(&format!("number {nth}"), 20))).collect();
        streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
        of("fullbore_steps_total", "gpu") > steps
    });
    assert_eq!((of("fullbore_device_losses_total", "gpu"), kill_switch.num_opened()), (1.0, 2));
    assert_eq!(of("fullbore_device_losses_total", "cpu"), 0.0);
}

fn body(prompt: &str, max_tokens: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

#[test]
fn a_server_whose_device_is_destroyed_says_so_and_serves_again() {
    for id in device_ids() {
        let (server, kill_switch) = serving(&id);
        let complete = |prompt: &str| server.complete(body(prompt, 12))["choices"][0]["text"].clone();
        let prompts = ["once upon a time", "the quick brown fox", "once upon a time there was"];
        let before: Vec<Value> = prompts.iter().map(|prompt| complete(prompt)).collect();

        let long = |stream: bool| {
            let mut body = body("a long answer", 900);
            body["stream"] = json!(stream);
            server.send(post("/v1/completions", body.to_string().as_bytes()))
        };
        let (mut streamed, whole) = (long(true), long(false));
        let mut beginning = vec![0; 600];
        streamed.read_exact(&mut beginning).expect("a beginning");
        server.wait_for("both to run", |server| server.metric("fullbore_requests_running") == 2.0);
        let waiting = server.send(post("/v1/completions", body(prompts[1], 12).to_string().as_bytes()));
        server.wait_for("one to wait", |server| server.metric("fullbore_requests_waiting") == 1.0);
        // Three attempts are in vain: 0.75 s without a device, at least.
        kill_switch.refuse(3);
        let destroyed_at = Instant::now();
        kill_switch.destroy();
        streamed.read_to_end(&mut beginning).expect("an orderly end");
        let told = read_reply(whole);
        assert!(told.head.contains("retry-after"), "{}", told.head);
        let told = told.error(503);
        let took = destroyed_at.elapsed();
        assert!(took < Duration::from_secs(1), "{id}: clients were told after {took:?}");
        let text = String::from_utf8_lossy(&beginning).into_owned();
        for text in [&text, told["message"].as_str().expect("text")] {
            assert!(text.contains(&format!("device {id} was lost: ")) && text.contains("try again shortly"), "{text}");
        }

        let ready = server.get("/health/ready");
        assert!(ready.head.contains("retry-after"), "{}", ready.head);
        let sentence = ready.error(503)["message"].to_string();
        assert!(sentence.contains("was lost") && sentence.contains("being made anew"), "{sentence}");
        assert_eq!(server.get("/health/live").status, 200);
        server.post("/v1/completions", &body("x", 1)).error(503);

        server.wait_for("the device", |server| server.get("/health/ready").status == 200);
        assert_eq!(read_reply(waiting).ok()["choices"][0]["text"], before[1], "{id}: what waited");
        let after: Vec<Value> = prompts.iter().map(|prompt| complete(prompt)).collect();
        assert_eq!(after, before, "{id}");
        assert_eq!(kill_switch.num_opened(), 2);
        assert_eq!(server.metric("fullbore_device_losses_total"), 1.0);
        let lost = server.metric("fullbore_device_seconds_total{cause=\"device_lost\"}");
        assert!(lost > 0.7, "{id}: {lost} s without a device");
        let blocks = |state: &str| server.metric(&format!("fullbore_kv_blocks{{state=\"{state}\"}}"));
        server.wait_for("all blocks", |_| blocks("used") == 0.0 && blocks("free") + blocks("cached") == 256.0);
    }
}

/// The same clients as on the simulator, on a device that computes.
#[test]
fn nothing_is_left_of_clients_while_the_device_is_destroyed() {
    let id = device_ids().into_iter().next().expect("a device");
    for seed in chaos::seeds() {
        let (server, kill_switch) = serving(&id);
        chaos::run(&server, 40, 256.0, seed, |random, nth| {
            kill_switch.refuse(if nth == 0 { random.below(3) } else { 0 });
            kill_switch.destroy();
        });
        assert!(kill_switch.num_opened() > 1);
    }
}
