//! Several devices behind one model: who asks sees one server, whatever becomes of a device. On simulators, each behind
//! a gate of its own.

use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use fullbore::args::{Args, Command, ServedArgs};
use fullbore::devices::cores::{Pinned, split};

use super::several::{greedy_of, served};
use super::*;

/// A server on so many simulators, called `sim@0` and so on.
struct Fleet {
    server: Harness,
    engines: fullbore_engine::fleet::Fleet,
    gates: Vec<Gate>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.gates.iter().for_each(|gate| gate.set(Pace::Free));
    }
}

fn fleet(num_devices: usize, setup: Setup) -> Fleet {
    let gates: Vec<Gate> = (0..num_devices).map(|_| Gate::new(setup.pace)).collect();
    let plan = |(index, gate): (usize, &Gate)| {
        let mut plan = setup.plan_behind(gate.clone());
        plan.seat.title = format!("sim@{index}");
        plan
    };
    let mut model = start::load(gates.iter().enumerate().map(plan).collect()).expect("simulators load");
    model.shares = setup.shares.iter().map(|&(name, share)| (name.to_owned(), share)).collect();
    let engines = model.engine.clone();
    let setup = Setup { loaded: false, ..setup };
    let server = setup.start();
    server.server.as_ref().expect("running").set_models(vec![model]);
    Fleet { server, engines, gates }
}

impl Fleet {
    fn of(&self, metric: &str, device: usize) -> f64 {
        self.server.metric(&format!("{metric}{{device=\"sim@{device}\"}}"))
    }

    /// Until so many requests of this prompt have come, wherever they are.
    fn wait_until_there(&self, num_requests: usize, prompt: &str) {
        let num_tokens =
            self.server.post("/tokenize", &json!({"prompt": prompt})).ok()["count"].as_f64().expect("a count");
        self.server.wait_for("all to be there", |server| {
            let waiting: f64 = (0..self.gates.len()).map(|device| self.of("fullbore_requests_waiting", device)).sum();
            // Told as they begin, and not after a step.
            let begun = server.metric("vllm:prefix_cache_queries_total") / num_tokens;
            waiting + begun == num_requests as f64
        });
    }

    fn wait_until_idle(&self) {
        let names = ["fullbore_requests_running", "fullbore_requests_waiting", "fullbore_kv_blocks"];
        let is_idle = |device| {
            let used = format!("{}{{device=\"sim@{device}\",state=\"used\"}}", names[2]);
            self.of(names[0], device) + self.of(names[1], device) + self.server.metric(&used) == 0.0
        };
        self.server.wait_for("idle devices", |_| (0..self.gates.len()).all(is_idle));
    }
}

/// Of every kind that has a state: greedy, seeded, penalised, with log-probabilities, under a grammar.
fn bodies(max_tokens: u32) -> Vec<Value> {
    let own = [
        json!({"temperature": 0}),
        json!({"temperature": 0.9, "seed": 7, "top_p": 0.9}),
        json!({"temperature": 0.7, "seed": 8, "presence_penalty": 0.8, "frequency_penalty": 0.5}),
        json!({"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2}),
        json!({"temperature": 0.5, "seed": 9, "structured_outputs": {"regex": "[a-z ]{800,900}"}}),
        json!({"temperature": 0.8, "seed": 10, "min_tokens": 30, "n": 2}),
    ];
    let body = |(index, own): (usize, Value)| {
        let mut body = json!({"prompt": prompt(index), "max_tokens": max_tokens, "ignore_eos": true,
            "return_token_ids": true});
        own.as_object().expect("fields").iter().for_each(|(name, value)| body[name] = value.clone());
        body
    };
    own.into_iter().cycle().take(12).enumerate().map(body).collect()
}

/// What is said and with which tokens, choice by choice.
fn said(reply: &Value) -> Vec<Value> {
    let choices = reply["choices"].as_array().unwrap_or_else(|| panic!("no choices in {reply}"));
    choices.iter().map(|choice| json!([choice["text"], choice["token_ids"], choice["logprobs"]])).collect()
}

#[test]
fn several_devices_answer_as_one_does_and_are_told_apart() {
    let one = Setup::default().start();
    let fleet = fleet(3, Setup { pace: Pace::Each(Duration::from_millis(5)), ..Setup::default() });
    let server = &fleet.server;
    std::thread::scope(|scope| {
        for body in bodies(40) {
            let one = &one;
            scope.spawn(move || assert_eq!(said(&server.complete(body.clone())), said(&one.complete(body))));
        }
    });
    fleet.wait_until_idle();
    let all = |name: &str| (0..3).map(|device| fleet.of(name, device)).collect::<Vec<f64>>();
    let steps = all("fullbore_steps_total");
    let moved = all("fullbore_requests_moved_total");
    assert!(steps.iter().filter(|&&steps| steps > 0.0).count() > 1, "{steps:?}, {moved:?}");

    let card = server.get("/v1/models").ok()["data"][0].clone();
    assert_eq!((&card["device_id"], &card["max_num_seqs"]), (&json!("sim@0, sim@1, sim@2"), &json!(48)));
    let limits = server.get("/v1/limits").ok();
    let ids: Vec<&Value> = limits["data"].as_array().expect("reports").iter().map(|one| &one["device"]["id"]).collect();
    assert_eq!(ids, ["sim@0", "sim@1", "sim@2"]);
    // Each device's tokens are in the frames, and their sum is the model's.
    server.complete(json!({"prompt": "more", "max_tokens": 7, "ignore_eos": true}));
    fleet.wait_until_idle();
    let generated = all("fullbore_tokens_generated_total");
    let by_device = |server: &Harness| -> Vec<f64> {
        let live = server.get("/v1/live").ok();
        let frames = live["engines"][0]["frames"].as_array().expect("frames").clone();
        let of = |frame: &Value, device: usize| frame["device_tokens"][device].as_f64().expect("a count");
        frames
            .iter()
            .for_each(|frame| assert_eq!(frame["generated_tokens"], (0..3).map(|at| of(frame, at)).sum::<f64>()));
        (0..3).map(|device| frames.iter().map(|frame| of(frame, device)).sum()).collect()
    };
    server.wait_for("a frame of it", |server| by_device(server).iter().sum::<f64>() >= 7.0);
    assert!(by_device(server).iter().zip(&generated).all(|(told, all)| told <= all), "{generated:?}");
    let live = server.get("/v1/live").ok();
    assert_eq!(live["engines"].as_array().map(Vec::len), Some(1), "{live}");
    let devices = live["engines"][0]["devices"].as_array().expect("devices").iter();
    assert_eq!(devices.map(|device| &device["id"]).collect::<Vec<_>>(), ["sim@0", "sim@1", "sim@2"]);
    assert_eq!(live["engines"][0]["device"]["id"], "sim@0, sim@1, sim@2");
    server.get("/health/ready").ok();
}

/// They read one series of each name, and one rank.
#[test]
fn routers_are_told_of_all_devices_as_of_one() {
    let config = EngineConfig { max_num_seqs: 1, max_logit_rows: 1, ..Setup::default().config };
    // An answer takes 9 s until the gates are opened.
    let fleet = fleet(2, Setup { config, pace: Pace::Each(Duration::from_millis(10)), ..Setup::default() });
    let server = &fleet.server;
    let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true}).to_string();
    let streams: Vec<TcpStream> = (0..5).map(|_| server.send(post("/v1/completions", body.as_bytes()))).collect();
    let all = |name: &str, labels: &str| -> f64 {
        (0..2).map(|device| server.metric(&format!("{name}{{device=\"sim@{device}\"{labels}}}"))).sum()
    };
    server.wait_for("both to be at work", |_| all("fullbore_requests_running", "") == 2.0);
    fleet.gates.iter().for_each(|gate| gate.set(Pace::Stalled));
    // A step may still be ending.
    server.wait_for("sums", |server| {
        let used = all("fullbore_kv_blocks", ",state=\"used\"");
        let load = server.get("/v1/loads").ok()["loads"][0].clone();
        let of_router = ["running", "waiting"].map(|what| server.metric(&format!("vllm:num_requests_{what}")));
        let of_loads = ["running", "waiting"].map(|what| load[format!("num_{what}_reqs")].as_f64().expect("a count"));
        let usage = ["kv", "gpu"].map(|what| server.metric(&format!("vllm:{what}_cache_usage_perc")) * 2048.0);
        let is_told = usage == [used; 2] && load["num_used_tokens"] == used * 16.0;
        of_router == [2.0, 3.0] && of_loads == of_router && used >= 2.0 && is_told && load["gen_throughput"].is_f64()
    });
    assert_eq!(server.metric("vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"2048\"}"), 1.0);
    let loads = server.get("/v1/loads").ok();
    assert_eq!((&loads["dp_rank_count"], loads["loads"].as_array().map(Vec::len)), (&json!(1), Some(1)));
    let rank = &loads["loads"][0];
    assert_eq!(
        [&rank["dp_rank"], &rank["max_total_num_tokens"], &rank["max_running_requests"]],
        [&json!(0), &json!(2 * 16 * 1024), &json!(2)]
    );
    fleet.gates.iter().for_each(|gate| gate.set(Pace::Free));
    streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
    fleet.wait_until_idle();
    for name in ["generation_tokens_total", "iteration_tokens_total_count"] {
        assert!(server.metric(&format!("vllm:{name}")) > 0.0, "{name}");
    }
}

/// How many have begun, by their prompts, which are of `num_tokens`.
fn num_begun(server: &Harness, num_tokens: f64) -> f64 {
    server.metric("vllm:prefix_cache_queries_total") / num_tokens
}

#[test]
fn a_tenant_runs_as_many_at_once_as_it_may_over_all_devices() {
    let share = Share { max_num_seqs: 1, ..Share::default() };
    // An answer takes 9 s until the gates are opened.
    let pace = Pace::Each(Duration::from_millis(10));
    let fleet = fleet(2, Setup { shares: vec![("bob", share)], pace, ..Setup::default() });
    let server = &fleet.server;
    let body =
        |user: &str| json!({"prompt": vec![50; 10], "max_tokens": 900, "ignore_eos": true, "user": user}).to_string();
    let asked: Vec<TcpStream> = (0..3).map(|_| server.send(post("/v1/completions", body("bob").as_bytes()))).collect();
    let num_waiting = || (0..2).map(|device| fleet.of("fullbore_requests_waiting", device)).sum::<f64>();
    server.wait_for("one to begin and two to wait", |server| {
        num_begun(server, 10.0) + num_waiting() == 3.0 && num_waiting() >= 2.0
    });
    // Nobody else waits for him; meanwhile no other of his has begun.
    let other = server.send(post("/v1/completions", body("eve").as_bytes()));
    server.wait_for("another to begin", |server| num_begun(server, 10.0) == 2.0);
    assert_eq!((num_waiting(), num_ended(server)), (2.0, 0.0));
    fleet.gates.iter().for_each(|gate| gate.set(Pace::Free));
    for reply in asked.into_iter().chain([other]) {
        assert_eq!(read_reply(reply).ok()["usage"]["completion_tokens"], 900);
    }
    fleet.wait_until_idle();
}

/// Two devices with a slot each, an answer in either; of two that wait, the one that came last is to be served first.
#[test]
fn whoever_has_priority_gets_the_first_slot_of_any_device() {
    let config = EngineConfig { max_num_seqs: 1, max_logit_rows: 1, ..Setup::default().config };
    let fleet = fleet(2, Setup { config, pace: Pace::Stalled, ..Setup::default() });
    let server = &fleet.server;
    let send = |max_tokens: u32, priority: i32| {
        let body = json!({"prompt": "a word", "max_tokens": max_tokens, "ignore_eos": true, "priority": priority});
        server.send(post("/v1/completions", body.to_string().as_bytes()))
    };
    let mut running = Vec::new();
    for count in 1..=2 {
        running.push(send(40, 0));
        fleet.wait_until_there(count, "a word");
    }
    let late = send(900, 1);
    fleet.wait_until_there(3, "a word");
    let waits_at = |device: usize| fleet.of("fullbore_requests_waiting", device);
    let device = usize::from(waits_at(1) == 1.0);
    let first = send(4, -1);
    fleet.wait_until_there(4, "a word");
    assert_eq!((waits_at(0), waits_at(1)), (1.0, 1.0), "each waits on a device of its own");
    // The other device gets no further.
    fleet.gates[device].set(Pace::Each(Duration::from_millis(5)));
    assert_eq!(read_reply(first).ok()["usage"]["completion_tokens"], 4);
    assert_eq!(num_ended(server), 2.0, "who waited there has not been served first");
    fleet.gates.iter().for_each(|gate| gate.set(Pace::Free));
    for reply in running.into_iter().chain([late]) {
        read_reply(reply).ok();
    }
}

fn num_ended(server: &Harness) -> f64 {
    server.metric("vllm:request_success_total{finished_reason=\"length\"}")
}

#[test]
fn requests_that_share_a_prefix_go_where_it_is_until_that_is_full() {
    let fleet = fleet(2, Setup::default());
    let body = json!({"prompt": "The same beginning. ".repeat(20), "max_tokens": 4, "ignore_eos": true});
    let cached = |reply: Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    assert_eq!(cached(fleet.server.complete(body.clone())), 0);
    fleet.wait_until_idle();
    for _ in 0..4 {
        assert!(cached(fleet.server.complete(body.clone())) > 0, "sent where it is not");
        fleet.wait_until_idle();
    }
    let hits = [0, 1].map(|device| fleet.of("fullbore_prefix_cache_hit_tokens_total", device));
    assert!(hits.contains(&0.0) && hits.iter().sum::<f64>() > 0.0, "{hits:?}");
}

/// Sends all and reads the first bytes of each.
fn begin(server: &Harness, bodies: &[Value]) -> Vec<(TcpStream, Vec<u8>)> {
    let send = |body: &Value| {
        let mut body = body.clone();
        body["stream"] = json!(true);
        server.send(post("/v1/completions", body.to_string().as_bytes()))
    };
    let mut streams: Vec<TcpStream> = bodies.iter().map(send).collect();
    let begin = |stream: &mut TcpStream| {
        let mut bytes = vec![0; 400];
        stream.read_exact(&mut bytes).expect("a beginning");
        bytes
    };
    let begun: Vec<Vec<u8>> = streams.iter_mut().map(begin).collect();
    streams.into_iter().zip(begun).collect()
}

/// The ids of a stream's choices, each a list, once it has ended.
fn end((mut stream, mut bytes): (TcpStream, Vec<u8>), num_choices: usize) -> Vec<Vec<u64>> {
    stream.read_to_end(&mut bytes).expect("an orderly end");
    let reply = parse_reply(&bytes);
    let mut tokens = vec![Vec::new(); num_choices];
    for event in events(&reply.body, true) {
        assert!(event["error"].is_null(), "{event}");
        for choice in event["choices"].as_array().expect("choices") {
            let index = choice["index"].as_u64().expect("an index") as usize;
            tokens[index].extend(choice["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
        }
    }
    tokens
}

fn ids_of_choices(reply: &Value) -> Vec<Vec<u64>> {
    reply["choices"].as_array().expect("choices").iter().map(|choice| ids(&choice["token_ids"])).collect()
}

/// What is asked for, what one device answers to it, and two that take a millisecond a step.
fn long_answers() -> (Vec<Value>, Vec<Vec<Vec<u64>>>, Fleet) {
    let one = Setup::default().start();
    let bodies = bodies(600);
    let expected = bodies.iter().map(|body| ids_of_choices(&one.complete(body.clone()))).collect();
    (bodies, expected, fleet(2, Setup { pace: Pace::Each(Duration::from_millis(1)), ..Setup::default() }))
}

#[test]
fn a_device_that_is_lost_under_streams_is_a_pause_to_them() {
    let (bodies, expected, fleet) = long_answers();
    let (server, gate) = (&fleet.server, &fleet.gates[0]);
    // Until the device had some of them as it was lost.
    for round in 1.. {
        assert!(round < 20, "all streams ended before the device was lost");
        let streams = begin(server, &bodies);
        gate.set(Pace::Stalled);
        let num_moved = || fleet.of("fullbore_requests_moved_total", 0);
        let (num_running, moved_before) = (fleet.of("fullbore_requests_running", 0), num_moved());
        gate.set(Pace::Lost);
        for (stream, expected) in streams.into_iter().zip(&expected) {
            assert_eq!(&end(stream, expected.len()), expected);
        }
        server.get("/health/ready").ok();
        // It comes back, and is given work again.
        gate.set(Pace::Each(Duration::from_millis(1)));
        let steps = fleet.of("fullbore_steps_total", 0);
        server.wait_for("the device", |server| {
            let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
            let streams: Vec<TcpStream> =
                (0..8).map(|_| server.send(post("/v1/completions", body.as_bytes()))).collect();
            streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
            fleet.of("fullbore_steps_total", 0) > steps
        });
        if num_running > 0.0 && num_moved() > moved_before {
            break;
        }
    }
    assert!(fleet.of("fullbore_device_losses_total", 0) >= 1.0);
    assert_eq!(fleet.of("fullbore_device_losses_total", 1), 0.0);
    fleet.wait_until_idle();
    let failed = |device: usize| {
        server.metric(&format!("fullbore_requests_finished_total{{device=\"sim@{device}\",reason=\"error\"}}"))
    };
    assert_eq!([failed(0), failed(1)], [0.0, 0.0]);
}

/// As if it hung, and came back when all is over.
#[test]
fn streams_of_a_stalled_device_go_on_where_nothing_is_to_do() {
    let (bodies, expected, fleet) = long_answers();
    let (server, gate) = (&fleet.server, &fleet.gates[0]);
    for round in 1.. {
        assert!(round < 20, "all streams ended before the device stalled");
        let streams = begin(server, &bodies);
        gate.set(Pace::Stalled);
        for (stream, expected) in streams.into_iter().zip(&expected) {
            assert_eq!(&end(stream, expected.len()), expected);
        }
        gate.set(Pace::Each(Duration::from_millis(1)));
        fleet.wait_until_idle();
        if fleet.of("fullbore_requests_moved_total", 0) > 0.0 {
            break;
        }
    }
    assert_eq!(fleet.of("fullbore_device_losses_total", 0), 0.0);
}

/// Time of an idle device is told apart by why it is idle, while requests wait elsewhere.
#[test]
fn imbalance_is_told() {
    let config = EngineConfig { max_num_seqs: 1, max_logit_rows: 1, ..Setup::default().config };
    let fleet = fleet(2, Setup { config, pace: Pace::Stalled, ..Setup::default() });
    let body = json!({"prompt": "x", "max_tokens": 5, "ignore_eos": true}).to_string();
    let streams: Vec<TcpStream> = (0..4).map(|_| fleet.server.send(post("/v1/completions", body.as_bytes()))).collect();
    fleet.wait_until_there(4, "x");
    fleet.gates[0].set(Pace::Lost);
    let seconds = |cause: &str, device: usize| {
        let name = "fullbore_imbalance_seconds_total";
        fleet.server.metric(&format!("{name}{{device=\"sim@{device}\",cause=\"{cause}\"}}"))
    };
    fleet.server.wait_for("the device's time", |_| seconds("device_lost", 0) > 0.01);
    assert_eq!(seconds("device_lost", 1), 0.0);
    let report = fleet.server.get("/v1/limits").ok()["data"][0].clone();
    assert!(report["imbalance"]["device_lost"].as_f64().is_some_and(|seconds| seconds > 0.01), "{report}");
    fleet.gates.iter().for_each(|gate| gate.set(Pace::Free));
    streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
}

#[test]
fn what_waits_while_all_devices_are_gone_is_served_when_one_is_back() {
    let config = EngineConfig { max_num_seqs: 1, max_logit_rows: 1, ..Setup::default().config };
    let fleet = fleet(2, Setup { config, pace: Pace::Stalled, ..Setup::default() });
    let body = json!({"prompt": "x", "max_tokens": 5, "ignore_eos": true}).to_string();
    let streams: Vec<TcpStream> = (0..6).map(|_| fleet.server.send(post("/v1/completions", body.as_bytes()))).collect();
    fleet.wait_until_there(6, "x");
    fleet.gates.iter().for_each(|gate| gate.set(Pace::Lost));
    fleet.server.wait_for("both to be lost", |server| server.get("/health/ready").status == 503);
    // No device has those that have not begun, and routers are told of them.
    let waiting = || fleet.server.metric("vllm:num_requests_waiting");
    let at_devices = || (0..2).map(|device| fleet.of("fullbore_requests_waiting", device)).sum::<f64>();
    fleet.server.wait_for("none to wait at a device", |_| at_devices() == 0.0);
    assert_eq!(waiting(), 6.0, "two of them had begun");
    fleet.gates[1].set(Pace::Free);
    for stream in streams {
        assert_eq!(read_reply(stream).ok()["usage"]["completion_tokens"], 5);
    }
    fleet.server.get("/health/ready").ok();
}

/// However long its driver takes to reset it: nobody waits for it, and the process, whose end might bring it back,
/// serves.
#[test]
fn a_device_that_does_not_come_back_is_tried_on_while_another_serves() {
    let limits = Limits { max_stall: Duration::from_millis(100), ..Limits::default() };
    let fleet = fleet(2, Setup { limits, pace: Pace::Each(Duration::from_millis(1)), ..Setup::default() });
    let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true}).to_string();
    let streams: Vec<TcpStream> = (0..6).map(|_| fleet.server.send(post("/v1/completions", body.as_bytes()))).collect();
    fleet.server.wait_for("some to run on each", |_| (0..2).all(|id| fleet.of("fullbore_requests_running", id) > 0.0));
    fleet.gates[1].set(Pace::Stalled);
    fleet.gates[0].set(Pace::Lost);
    // What is lost is no free memory, nor a device that is not stalled.
    let blocks =
        |state: &str| fleet.server.metric(&format!("fullbore_kv_blocks{{device=\"sim@1\",state=\"{state}\"}}"));
    fleet.server.wait_for("the other's share", |server| {
        let (used, total) = (blocks("used"), ["used", "cached", "free"].map(blocks).iter().sum::<f64>());
        used > 0.0 && (server.metric("vllm:kv_cache_usage_perc") - used / total).abs() < 1e-9
    });
    fleet.server.wait_for("the other's stall", |server| server.get("/health/ready").status == 503);
    fleet.gates[1].set(Pace::Free);
    streams.into_iter().for_each(|stream| drop(read_reply(stream).ok()));
    let told = || fleet.engines.engines()[0].recovering().unwrap_or_default();
    fleet.server.wait_for("an attempt beyond those of one alone", |_| told().contains("attempt 7, after 8s"));
    assert_eq!(fleet.engines.engines()[0].stopped(), None);
    fleet.server.get("/health/ready").ok();
}

#[test]
fn what_waits_behind_a_stalled_device_is_taken_by_one_that_has_nothing_to_do() {
    let config = EngineConfig { max_num_seqs: 2, max_logit_rows: 2, ..Setup::default().config };
    let fleet = fleet(2, Setup { config, pace: Pace::Stalled, ..Setup::default() });
    let body = json!({"prompt": "x", "max_tokens": 5, "ignore_eos": true}).to_string();
    let mut streams: Vec<TcpStream> =
        (0..12).map(|_| fleet.server.send(post("/v1/completions", body.as_bytes()))).collect();
    fleet.wait_until_there(12, "x");
    fleet.gates[1].set(Pace::Free);
    let ended = |device: usize| {
        fleet.server.metric(&format!("fullbore_requests_finished_total{{device=\"sim@{device}\",reason=\"length\"}}"))
    };
    // The stalled one has begun one or two.
    fleet.server.wait_for("all others", |_| ended(1) >= 10.0 && fleet.of("fullbore_requests_waiting", 0) == 0.0);
    assert_eq!(ended(0), 0.0);
    fleet.gates[0].set(Pace::Free);
    streams.drain(..).for_each(|stream| assert_eq!(read_reply(stream).ok()["usage"]["completion_tokens"], 5));
    fleet.wait_until_idle();
    assert!(fleet.of("fullbore_requests_moved_total", 0) >= 4.0);
    assert_eq!(ended(0) + ended(1), 12.0);
}

/// Others come for as long as the first are not served, so that somebody waits everywhere.
#[test]
fn what_is_with_a_stalled_device_is_served_by_one_that_always_has_more_to_do() {
    const OTHERS: usize = 6;
    let config = EngineConfig { max_num_seqs: 2, max_logit_rows: 2, ..Setup::default().config };
    let fleet = fleet(2, Setup { config, pace: Pace::Stalled, ..Setup::default() });
    let body = |prompt: &str| json!({"prompt": prompt, "max_tokens": 20, "ignore_eos": true}).to_string();
    let send = |prompt: &str| fleet.server.send(post("/v1/completions", body(prompt).as_bytes()));
    let first: Vec<TcpStream> = (0..12).map(|_| send("x")).collect();
    fleet.wait_until_there(12, "x");
    fleet.gates[1].set(Pace::Each(Duration::from_millis(1)));
    let are_served = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..OTHERS {
            scope.spawn(|| {
                for _ in 0..2000 {
                    read_reply(send("y")).ok();
                    if are_served.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        for stream in first {
            assert_eq!(read_reply(stream).ok()["usage"]["completion_tokens"], 20);
        }
        are_served.store(true, Ordering::Relaxed);
    });
    let ended = fleet.server.metric("fullbore_requests_finished_total{device=\"sim@0\",reason=\"length\"}");
    assert_eq!(ended, 0.0, "it is stalled still");
}

#[test]
fn who_leaves_frees_its_memory_wherever_it_was() {
    let fleet = fleet(2, Setup { pace: Pace::Each(Duration::from_millis(1)), ..Setup::default() });
    let body = json!({"prompt": "x", "max_tokens": 900, "ignore_eos": true, "stream": true}).to_string();
    let streams: Vec<TcpStream> =
        (0..40).map(|_| fleet.server.send(post("/v1/completions", body.as_bytes()))).collect();
    fleet.server.wait_for("some to run on each", |_| (0..2).all(|id| fleet.of("fullbore_requests_running", id) > 0.0));
    drop(streams);
    fleet.wait_until_idle();
    fleet.server.complete(json!({"prompt": "x", "max_tokens": 1}));
}

/// An engine that meets a bug of ours takes its own streams with it, and nothing else.
#[test]
fn a_bug_on_one_device_leaves_the_others() {
    let fleet = fleet(2, Setup::default());
    fleet.gates[0].set(Pace::Panic);
    let ask = || fleet.server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 3, "ignore_eos": true}));
    // One at a time may all be answered by the other.
    let at_once = || {
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..4).map(|_| scope.spawn(|| ask().status)).collect();
            asked.into_iter().map(|asked| asked.join().expect("an answer")).collect::<Vec<u16>>()
        })
    };
    let met = (0..50).find(|_| at_once().iter().any(|status| *status != 200));
    assert!(met.is_some(), "no request came to the device");
    assert_eq!(at_once(), [200; 4]);
    fleet.server.get("/health/ready").ok();
    fleet.gates[1].set(Pace::Panic);
    assert!(ask().status >= 500);
    assert!(ask().error(503)["message"].as_str().is_some_and(|text| text.contains("bug of its own")));
}

/// A tiny model on these devices, as the command line reads them.
fn on_devices(devices: &str) -> Vec<ServedArgs> {
    let model = format!("--model=tiny={}/tests/golden/tiny/llama", env!("CARGO_MANIFEST_DIR"));
    let devices = format!("--device={devices}");
    let common = ["--kv-memory=4MiB", "--max-model-len=64", "--max-num-batched-tokens=64", "--no-saved-costs"];
    let words = ["fullbore", "serve", "--max-num-seqs=4", &model, &devices].into_iter().chain(common);
    let Command::Serve(args) = Args::try_parse_from(words).expect("words of serve").command else {
        panic!("serve is serve")
    };
    args.models.0
}

/// The first of this machine that this process may use.
fn two_cores() -> [usize; 2] {
    let may_use = |core: &usize| Pinned::to(&split(&format!("cpu@{core}")).1.expect("cores")).is_ok();
    let mut cores = (0..1024).filter(may_use);
    [(); 2].map(|()| cores.next().expect("two cores"))
}

#[test]
fn two_replicas_on_cores_of_their_own_answer_as_one_does() {
    let [first, second] = two_cores();
    let titles = [first, second].map(|core| format!("cpu@{core}"));
    let server = served(&on_devices(&titles.join(",")));
    let one = served(&on_devices("cpu"));
    let prompts: Vec<Vec<u32>> =
        (0..6).map(|index| (0..8 + index).map(|i| 3 + (index * 7 + i * 5) % 100).collect()).collect();
    let steps = |title: &str| server.metric(&format!("fullbore_steps_total{{device=\"{title}\"}}"));
    // Where they come one after the other, one replica answers all of them.
    for round in 1.. {
        assert!(round < 20, "one replica has answered all");
        std::thread::scope(|scope| {
            for prompt in &prompts {
                let (server, one) = (&server, &one);
                scope.spawn(move || assert_eq!(greedy_of(server, "tiny", prompt), greedy_of(one, "tiny", prompt)));
            }
        });
        if titles.iter().all(|title| steps(title) > 0.0) {
            break;
        }
    }
    assert_eq!(server.get("/v1/models").ok()["data"][0]["device_id"], titles.join(", "));
}

#[test]
fn devices_that_cannot_serve_are_named() {
    let [core, _] = two_cores();
    let sentence = |devices: &str| start::plan_all(&on_devices(devices)).map(|_| ()).expect_err("refused").to_string();
    assert!(sentence(&format!("cpu@{core},vulkan:none")).contains("on vulkan:none: there is no device vulkan:none"));
    assert!(sentence("cpu,cpu").contains("cpu and cpu are one device"));
    assert!(sentence(&format!("cpu@{core},sim")).contains("sim makes up its tokens"));
    assert!(sentence("cpu@5000").contains("cpu@5000 cannot run on those cores"));
    assert!(sentence("/no/such/devices.toml").contains("/no/such/devices.toml"));
}
