//! vLLM's gRPC contract, asked by its own client: what is generated, refused, aborted, drained and told.

use std::sync::atomic::{AtomicU32, Ordering};

use fullbore::grpc::{Identity, kv_event_source};
use fullbore::http::tls::Tls;
use fullbore::kv_events::{KvEventsConfig, Publisher};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use vllm_proto::candidate_tokens::Select;
use vllm_proto::control_client::ControlClient;
use vllm_proto::decoding_parameters::{StringChoices, StructuredOutput};
use vllm_proto::finish_info::{FinishReason, StopReason};
use vllm_proto::generate_request::Prompt;
use vllm_proto::inference_client::InferenceClient;
use vllm_proto::*;

use super::access::keys;
use super::*;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A server that has a port for gRPC, and a connection to that.
struct Server {
    http: Harness,
    address: std::net::SocketAddr,
    channel: Channel,
}

impl Server {
    fn start(setup: Setup) -> Server {
        let mut http = setup.start();
        let server = http.server.as_mut().expect("running");
        let address = http.runtime.block_on(server.listen_grpc((LOCAL, 0).into(), None)).expect("a free port");
        server.set_identity(Identity {
            instance_id: "one".to_owned(),
            model_folder: "/models/one".into(),
            kv_events: None,
        });
        let channel = http.runtime.block_on(async { channel(address).connect_lazy() });
        Server { http, address, channel }
    }

    /// The answer to one call.
    fn ask<T>(&self, call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
        self.http.runtime.block_on(call).map(tonic::Response::into_inner)
    }

    fn inference(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel.clone())
    }

    fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone())
    }

    fn stream(&self, request: GenerateRequest) -> Result<Streaming<GenerateResponse>, Status> {
        self.ask(self.inference().generate_stream(request))
    }

    fn next(&self, stream: &mut Streaming<GenerateResponse>) -> Result<Option<GenerateResponse>, Status> {
        self.http.runtime.block_on(stream.message())
    }

    fn rest(&self, mut stream: Streaming<GenerateResponse>) -> Result<Vec<GenerateResponse>, Status> {
        let mut replies = Vec::new();
        while let Some(reply) = self.next(&mut stream)? {
            replies.push(reply);
        }
        Ok(replies)
    }

    fn all(&self, request: GenerateRequest) -> Vec<GenerateResponse> {
        self.rest(self.stream(request).expect("taken")).expect("whole")
    }

    fn refused(&self, request: GenerateRequest) -> Status {
        let stream = self.stream(request);
        stream.and_then(|stream| self.rest(stream)).expect_err("refused")
    }

    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = self.ask(HealthClient::new(self.channel.clone()).check(request))?;
        Ok(ServingStatus::try_from(answer.status).expect("a status"))
    }
}

fn channel(address: std::net::SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("an address")
}

fn asking(num_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![50; 40] })),
        temperature: Some(0.0),
        stopping: Some(StoppingCriteria { max_new_tokens: num_tokens, ignore_eos: true, ..Default::default() }),
        response: Some(ResponseOptions {
            output_text: Some(false),
            output_token_ids: true,
            ..ResponseOptions::default()
        }),
        ..GenerateRequest::default()
    }
}

fn outputs(replies: &[GenerateResponse]) -> Vec<&SequenceOutput> {
    replies.iter().map(|reply| reply.outputs.as_ref().expect("outputs")).collect()
}

fn tokens(replies: &[GenerateResponse]) -> Vec<u64> {
    outputs(replies).iter().flat_map(|output| &output.token_ids).map(|id| u64::from(*id)).collect()
}

fn finish(replies: &[GenerateResponse]) -> &FinishInfo {
    outputs(replies).last().and_then(|output| output.finish_info.as_ref()).expect("an end")
}

#[test]
fn a_stream_has_the_tokens_that_http_has() {
    let server = Server::start(Setup::default());
    let replies = server.all(asking(12));
    let (expected, text) = greedy(&server.http, vec![50; 40], 12);
    assert_eq!(tokens(&replies), expected);
    assert_eq!(replies[0].prompt_info.as_ref().map(|info| info.num_prompt_tokens), Some(40));
    assert!(replies[1..].iter().all(|reply| reply.prompt_info.is_none()));
    let outputs = outputs(&replies);
    assert!(
        outputs.iter().all(|output| output.text.is_empty() && output.num_tokens as usize == output.token_ids.len())
    );
    let end = finish(&replies);
    assert_eq!((end.num_output_tokens, end.finish_reason(), &end.stop_reason), (12, FinishReason::Length, &None));
    assert_eq!(end.num_cached_tokens, Some(0));
    // The same again has its prompt in the cache, and is whole by Generate.
    let asked = GenerateRequest { response: None, model: "sim-model".to_owned(), ..asking(12) };
    let whole = server.ask(server.inference().generate(asked)).expect("whole");
    let output = whole.outputs.as_ref().expect("outputs");
    assert_eq!((&output.text, output.num_tokens, output.token_ids.len()), (&text, 12, 0));
    assert_eq!(finish(std::slice::from_ref(&whole)).num_cached_tokens, Some(32));
}

#[test]
fn choices_logprobs_and_ends_are_told() {
    let server = Server::start(Setup::default());
    let two = GenerateRequest {
        temperature: Some(1.0),
        sampling: Some(RandomSampling { num_sequences: 2, seed: Some(-7), ..Default::default() }),
        ..asking(5)
    };
    let replies = server.all(two.clone());
    for index in 0..2 {
        let of_choice: Vec<_> = outputs(&replies).into_iter().filter(|output| output.index == index).collect();
        assert_eq!(of_choice.iter().map(|output| output.num_tokens).sum::<u32>(), 5);
        assert_eq!(of_choice.iter().filter(|output| output.finish_info.is_some()).count(), 1);
    }
    assert_eq!(server.ask(server.inference().generate(two)).expect_err("no room").code(), Code::InvalidArgument);

    let response = ResponseOptions {
        output_token_ids: true,
        output_logprobs: true,
        output_candidates: Some(CandidateTokens { select: Some(Select::TopN(3)) }),
        prompt_token_ids: true,
        prompt_logprobs: true,
        ..ResponseOptions::default()
    };
    let replies = server.all(GenerateRequest { response: Some(response), ..asking(4) });
    for output in outputs(&replies).iter().filter(|output| output.num_tokens > 0) {
        assert_eq!((output.logprobs.len(), &output.ranks), (1, &vec![1]));
        let ranks: Vec<u32> = output.candidate_tokens[0].tokens.iter().map(|token| token.rank).collect();
        assert_eq!(ranks, [2, 3], "the chosen one is told already");
    }
    let prompt = replies[0].prompt_info.as_ref().expect("first");
    assert_eq!([prompt.token_ids.len(), prompt.logprobs.len(), prompt.candidate_tokens.len()], [40; 3]);

    let ids = tokens(&replies);
    let stopping = StoppingCriteria { max_new_tokens: 9, stop_token_ids: vec![ids[2] as u32], ..Default::default() };
    let replies = server.all(GenerateRequest { stopping: Some(stopping), ..asking(9) });
    assert_eq!(tokens(&replies), ids[..tokens(&replies).len()]);
    assert_eq!(finish(&replies).finish_reason(), FinishReason::Stop);
    assert_eq!(finish(&replies).stop_reason, Some(StopReason::StopTokenId(ids[2] as u32)));

    let choice = StringChoices { choices: vec!["yes".to_owned()] };
    let decoding =
        DecodingParameters { structured_output: Some(StructuredOutput::Choice(choice)), ..Default::default() };
    let asked = GenerateRequest { decoding: Some(decoding), response: None, stopping: None, ..asking(0) };
    let replies = server.all(asked);
    assert_eq!(outputs(&replies).iter().map(|output| output.text.as_str()).collect::<String>(), "yes");
    assert_eq!(finish(&replies).finish_reason(), FinishReason::Stop);
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let server = Server::start(Setup::default());
    type Change = fn(&mut GenerateRequest);
    let wrong: [(&str, Change); 20] = [
        ("truncate_prompt_tokens", |asked| asked.truncate_prompt_tokens = 8),
        ("media", |asked| asked.media = vec![MediaItem::default()]),
        ("lora_name", |asked| asked.lora_name = "x".to_owned()),
        ("bad_words_token_ids", |asked| {
            asked.decoding =
                Some(DecodingParameters { bad_words_token_ids: vec![TokenIds::default()], ..Default::default() });
        }),
        ("structural_tag", |asked| {
            let structured_output = Some(StructuredOutput::StructuralTag("{}".to_owned()));
            asked.decoding = Some(DecodingParameters { structured_output, ..Default::default() });
        }),
        ("include_stop_strings", |asked| asked.stopping.as_mut().expect("set").include_stop_strings = true),
        ("thinking_token_budget", |asked| asked.stopping.as_mut().expect("set").thinking_token_budget = Some(4)),
        ("bypass_prefix_cache", |asked| {
            asked.kv = Some(KvCacheParameters { bypass_prefix_cache: true, ..Default::default() });
        }),
        ("output_candidates", |asked| {
            let select = Some(Select::TokenIds(TokenIds { ids: vec![1] }));
            asked.response.as_mut().expect("set").output_candidates = Some(CandidateTokens { select });
        }),
        ("temperature is -1", |asked| asked.temperature = Some(-1.0)),
        ("top_p", |asked| asked.sampling = Some(RandomSampling { top_p: Some(2.0), ..Default::default() })),
        ("temperature has NaN", |asked| asked.temperature = Some(f32::NAN)),
        ("top_p has inf", |asked| {
            asked.sampling = Some(RandomSampling { top_p: Some(f32::INFINITY), ..Default::default() });
        }),
        ("min_p has NaN", |asked| {
            asked.sampling = Some(RandomSampling { min_p: Some(f32::NAN), ..Default::default() });
        }),
        ("presence_penalty has -inf", |asked| {
            asked.decoding = Some(DecodingParameters { presence_penalty: f32::NEG_INFINITY, ..Default::default() });
        }),
        ("repetition_penalty has NaN", |asked| {
            asked.decoding = Some(DecodingParameters { repetition_penalty: f32::NAN, ..Default::default() });
        }),
        ("logit_bias has NaN", |asked| {
            let logit_bias = [(7, 1.0), (8, f32::NAN)].into();
            asked.decoding = Some(DecodingParameters { logit_bias, ..Default::default() });
        }),
        ("prompt is missing", |asked| asked.prompt = None),
        ("4000000000", |asked| asked.prompt = Some(Prompt::TokenIds(TokenIds { ids: vec![4_000_000_000] }))),
        ("context is 1024", |asked| asked.prompt = Some(Prompt::TokenIds(TokenIds { ids: vec![50; 2000] }))),
    ];
    for (part, change) in wrong {
        let mut asked = asking(4);
        change(&mut asked);
        let status = server.refused(asked);
        assert_eq!(status.code(), Code::InvalidArgument, "{part}: {status:?}");
        assert!(status.message().contains(part), "{part}: {status:?}");
    }
    let status = server.refused(GenerateRequest { model: "other".to_owned(), ..asking(4) });
    assert!(status.code() == Code::NotFound && status.message().contains("sim-model"), "{status:?}");
    // What only hints is taken.
    let hint = KvHintsEnvelope::default();
    let asked = GenerateRequest {
        session_id: Some("s".to_owned()),
        kv_hints: Some(hint),
        watermarking: Some(true),
        ..asking(4)
    };
    assert_eq!(tokens(&server.all(asked)).len(), 4);
    let sleep = server.ask(server.control().sleep(SleepRequest::default())).expect_err("none");
    assert_eq!((sleep.code(), sleep.message()), (Code::Unimplemented, "Sleep is not supported by this server"));
    let end = server.ask(server.control().shutdown(ShutdownRequest {})).expect_err("not so");
    assert_eq!(end.code(), Code::FailedPrecondition);
}

#[test]
fn a_request_ends_when_it_is_aborted_or_its_client_leaves() {
    let server = Server::start(Setup { pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() });
    let free = |server: &Server| {
        server.http.wait_for("free memory", |http| http.metric("fullbore_kv_blocks{state=\"used\"}") == 0.0);
    };
    let mut stream = server.stream(GenerateRequest { request_id: "mine".to_owned(), ..asking(900) }).expect("taken");
    server.next(&mut stream).expect("a token");
    let request_ids = vec!["nobody's".to_owned(), "mine".to_owned()];
    server.ask(server.control().abort(AbortRequest { request_ids })).expect("done");
    let replies = server.rest(stream).expect("an end that is told");
    assert_eq!(finish(&replies).finish_reason(), FinishReason::Aborted);
    assert!((1..900).contains(&finish(&replies).num_output_tokens), "{replies:?}");
    free(&server);
    let mut stream = server.stream(asking(900)).expect("taken");
    server.next(&mut stream).expect("a token");
    drop(stream);
    free(&server);
}

#[test]
fn what_is_aborted_before_its_first_token_tells_of_its_prompt() {
    let server = Server::start(Setup { pace: Pace::Stalled, ..Setup::default() });
    let response = ResponseOptions { prompt_token_ids: true, prompt_logprobs: true, ..ResponseOptions::default() };
    let asked = GenerateRequest { request_id: "mine".to_owned(), response: Some(response), ..asking(9) };
    let stream = server.stream(asked).expect("taken");
    server.ask(server.control().abort(AbortRequest { request_ids: vec!["mine".to_owned()] })).expect("done");
    let replies = server.rest(stream).expect("an end that is told");
    let end = finish(&replies);
    assert_eq!((replies.len(), end.finish_reason(), end.num_output_tokens), (1, FinishReason::Aborted, 0));
    let prompt = replies[0].prompt_info.as_ref().expect("first");
    assert_eq!((prompt.num_prompt_tokens, &prompt.token_ids), (40, &vec![50; 40]));
    // Of which nothing has been computed.
    assert!(prompt.logprobs.is_empty() && prompt.candidate_tokens.is_empty());
}

#[test]
fn a_client_that_takes_nothing_loses_its_call_and_no_other() {
    let limits = Limits { write_timeout: Duration::from_millis(300), ..Limits::default() };
    let server = Server::start(Setup { limits, ..Setup::default() });
    // The client's own half answers pings all the time, and has room for a small part of the answer.
    let endpoint = channel(server.address).initial_stream_window_size(4 << 10);
    let channel = server.http.runtime.block_on(async { endpoint.connect_lazy() });
    let inference = || InferenceClient::new(channel.clone());
    let candidates = Some(CandidateTokens { select: Some(Select::TopN(20)) });
    let response = ResponseOptions { output_logprobs: true, output_candidates: candidates, ..Default::default() };
    let asked = GenerateRequest { response: Some(response), ..asking(900) };
    let mut deaf = server.ask(inference().generate_stream(asked)).expect("taken");
    let sent = "http_request_duration_seconds_count{handler=\"/vllm.Inference/GenerateStream\"";
    server.http.wait_for("the end of its call", |http| http.get("/metrics").text().contains(sent));
    assert_eq!(server.http.metric("fullbore_kv_blocks{state=\"used\"}"), 0.0);
    // On the same connection another is served.
    let whole = server.ask(inference().generate(asking(3))).expect("whole");
    assert_eq!(whole.outputs.expect("outputs").num_tokens, 3);
    // What it was sent, and then a word that this is not all.
    let end = loop {
        match server.next(&mut deaf) {
            Ok(Some(reply)) => assert!(reply.outputs.expect("outputs").finish_info.is_none()),
            Ok(None) => panic!("an end as if it were whole"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Cancelled, "{end:?}");
}

#[test]
fn ports_share_the_places_for_connections() {
    let limits = Limits { max_connections: 2, ..Limits::default() };
    let server = Server::start(Setup { limits, ..Setup::default() });
    assert_eq!(server.health("").expect("a place"), ServingStatus::Serving);
    let mut open = server.http.connect();
    open.write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n").expect("the server reads");
    open.read_exact(&mut [0; 16]).expect("it is served");
    assert!(server.http.get("/health/live").error(503)["message"].as_str().expect("text").contains("connections"));
    let other = server.http.runtime.block_on(async { channel(server.address).connect_lazy() });
    let request = HealthCheckRequest { service: String::new() };
    assert!(server.ask(HealthClient::new(other).check(request)).is_err(), "a third place of two");
    drop(open);
    server.http.wait_for("a free place", |http| http.get("/health/live").status == 200);
}

/// One that has a call stays, however long that takes.
#[test]
fn an_idle_connection_gives_its_place_back() {
    let limits = Limits { max_connections: 1, idle_timeout: Duration::from_millis(300), ..Limits::default() };
    let server = Server::start(Setup { limits, pace: Pace::Each(Duration::from_millis(10)), ..Setup::default() });
    assert_eq!(server.health("").expect("the only place"), ServingStatus::Serving);
    server.http.wait_for("its place", |http| http.get("/health/live").status == 200);
    // Whoever comes back is connected anew, as soon as the other has left.
    server.http.wait_for("a place again", |_| server.health("").is_ok());
    // Three times as long as a connection may be idle.
    let replies = server.all(asking(100));
    assert_eq!((tokens(&replies).len(), finish(&replies).num_output_tokens), (100, 100));
}

#[test]
fn who_finds_it_full_or_lost_is_told_when_to_come_again() {
    let config = EngineConfig { max_num_seqs: 1, max_queued_requests: 1, ..Setup::default().config };
    let server = Server::start(Setup { config, pace: Pace::Stalled, ..Setup::default() });
    let runs = server.stream(asking(4)).expect("runs");
    server.http.wait_for("it to run", |http| http.metric("vllm:num_requests_waiting") == 0.0);
    let waits = server.stream(asking(4)).expect("waits");
    let status = server.refused(asking(4));
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.metadata().get("retry-after").is_some(), "{status:?}");
    assert!(server.http.metric("fullbore_requests_refused_total{cause=\"queue_full\"}") >= 1.0);
    server.http.gate.set(Pace::Free);
    assert_eq!(
        [tokens(&server.rest(runs).expect("whole")).len(), tokens(&server.rest(waits).expect("whole")).len()],
        [4; 2]
    );
    server.http.gate.set(Pace::Stalled);
    let lost = server.stream(asking(4)).expect("taken");
    server.http.wait_for("it to run", |http| http.metric("vllm:num_requests_waiting") == 0.0);
    server.http.gate.set(Pace::Lost);
    let status = server.rest(lost).expect_err("lost");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

#[test]
fn it_says_what_it_is_and_whether_it_serves() {
    let setup = Setup { loaded: false, ..Setup::default() };
    let server = Server::start(setup);
    assert_eq!(server.health("").expect("known"), ServingStatus::NotServing);
    let status = server.ask(server.control().get_model_info(GetModelInfoRequest {})).expect_err("loading");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(server.refused(asking(1)).code(), Code::Unavailable);
    let mut health = HealthClient::new(server.channel.clone());
    let mut watch = server.ask(health.watch(HealthCheckRequest::default())).expect("a watch");
    let mut watched = || server.http.runtime.block_on(watch.message()).map(|told| told.map(|told| told.status()));
    assert_eq!(watched().expect("told"), Some(ServingStatus::NotServing));
    server.http.load(&Setup::default());
    assert_eq!(watched().expect("told"), Some(ServingStatus::Serving));
    for service in ["", "vllm.Inference", "vllm.Control"] {
        assert_eq!(server.health(service).expect("known"), ServingStatus::Serving);
    }
    assert_eq!(server.health("vllm.Other").expect_err("unknown").code(), Code::NotFound);
    let model = server.ask(server.control().get_model_info(GetModelInfoRequest {})).expect("told");
    assert_eq!((model.model_id.as_str(), model.served_model_name.as_str()), ("/models/one", "sim-model"));
    assert!(model.supports_token_ids_input && !model.supports_lora && !model.supports_multimodal);
    let info = server.ask(server.control().get_server_info(GetServerInfoRequest {})).expect("told");
    assert_eq!((info.api_version.as_str(), info.proto_version.as_str()), ("vllm", VERSION));
    assert_eq!((info.max_model_len, info.kv_block_size, info.total_kv_blocks), (1024, 16, 1024));
    assert_eq!((info.max_running_requests, info.max_batched_tokens), (16, 256));
    let parallelism = info.parallelism.expect("told");
    assert_eq!((parallelism.world_size, parallelism.data_parallel_rank), (1, 0));
    let sources = server.ask(server.control().get_kv_event_sources(GetKvEventSourcesRequest {})).expect("told");
    assert!(sources.sources.is_empty());
    // It is about to end: that is told at once, requests are still taken, and who watches is let go.
    let ending = server.http.server.as_ref().expect("running");
    server.http.runtime.block_on(ending.leave(Duration::ZERO));
    assert_eq!(server.health("").expect("known"), ServingStatus::NotServing);
    assert_eq!(watched().expect("told"), Some(ServingStatus::NotServing));
    assert_eq!(watched().expect_err("the end").code(), Code::Unavailable);
    assert_eq!(tokens(&server.all(asking(1))).len(), 1);
    server.http.runtime.block_on(ending.drain(Duration::from_secs(5)));
    let status = server.refused(asking(1));
    assert!(status.code() == Code::Unavailable && status.message().contains("shutting down"), "{status:?}");
}

#[test]
fn running_requests_end_before_the_server_does() {
    let server = Server::start(Setup { pace: Pace::Stalled, ..Setup::default() });
    let stream = server.stream(asking(6)).expect("taken");
    let Server { http, .. } = &server;
    let ending = http.server.as_ref().expect("running");
    let ((), replies) = http.runtime.block_on(async {
        let rest = async {
            let mut stream = stream;
            let mut replies = Vec::new();
            http.gate.set(Pace::Free);
            while let Some(reply) = stream.message().await.expect("whole") {
                replies.push(reply);
            }
            replies
        };
        tokio::join!(ending.drain(Duration::from_secs(20)), rest)
    });
    assert_eq!(tokens(&replies).len(), 6);
}

#[test]
fn keys_are_asked_for_and_keep_clients_apart() {
    let access = Access::new(LOCAL, keys("key-of-alice alice rpm=3\nkey-of-bob bob"), &[], &[]);
    let server = Server::start(Setup { access, pace: Pace::Each(Duration::from_millis(2)), ..Setup::default() });
    let shown = |key: &str, message: GenerateRequest| {
        let mut request = tonic::Request::new(message);
        let key = MetadataValue::try_from(format!("Bearer {key}")).expect("ASCII");
        request.metadata_mut().insert("authorization", key);
        request
    };
    assert_eq!(server.refused(asking(1)).code(), Code::Unauthenticated);
    let control = server.ask(server.control().get_server_info(GetServerInfoRequest {})).expect_err("no key");
    assert_eq!(control.code(), Code::Unauthenticated);
    assert_eq!(server.health("").expect("open to everybody"), ServingStatus::Serving);
    let asked = GenerateRequest { request_id: "x".to_owned(), ..asking(20) };
    let stream = server.ask(server.inference().generate_stream(shown("key-of-alice", asked))).expect("taken");
    // Of another client it aborts nothing.
    let mut abort = tonic::Request::new(AbortRequest { request_ids: vec!["x".to_owned()] });
    abort.metadata_mut().insert("authorization", MetadataValue::from_static("Bearer key-of-bob"));
    server.ask(server.control().abort(abort)).expect("done");
    assert_eq!(tokens(&server.rest(stream).expect("whole")).len(), 20);
    let ask = || server.ask(server.inference().generate(shown("key-of-alice", asking(1))));
    let statuses: Vec<Status> = (0..3).filter_map(|_| ask().err()).collect();
    assert!(statuses.iter().all(|status| status.code() == Code::ResourceExhausted) && !statuses.is_empty());
}

#[test]
fn what_is_no_grpc_is_told_so_and_many_share_a_connection() {
    let server = Server::start(Setup::default());
    let mut stream = TcpStream::connect(server.address).expect("it listens");
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").expect("it reads");
    let reply = read_reply(stream);
    assert_eq!(reply.error(400)["code"], "not_http2");
    // A body above the limit, and a path that nobody has.
    let large = GenerateRequest { prompt: Some(Prompt::Text("x".repeat(9 << 20))), ..asking(1) };
    assert_eq!(server.refused(large).code(), Code::ResourceExhausted);
    let count = AtomicU32::new(0);
    let inference = server.inference();
    server.http.runtime.block_on(async {
        let calls = (0..64).map(|_| {
            let (mut inference, count) = (inference.clone(), &count);
            async move {
                let mut stream = inference.generate_stream(asking(3)).await.expect("taken").into_inner();
                while let Some(reply) = stream.message().await.expect("whole") {
                    count.fetch_add(reply.outputs.expect("outputs").num_tokens, Ordering::Relaxed);
                }
            }
        });
        futures_join(calls).await;
    });
    assert_eq!(count.into_inner(), 64 * 3);
}

/// All at the same time.
async fn futures_join(calls: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut calls: Vec<_> = calls.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        calls.retain_mut(|call| call.as_mut().poll(context).is_pending());
        if calls.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[test]
fn it_speaks_tls_as_http_does() {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let folder = Folder::new("grpc-tls");
    std::fs::create_dir_all(&folder.0).expect("a folder");
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| folder.0.join(name));
    std::fs::write(&certificate, cert.pem()).expect("a file");
    std::fs::write(&key, signing_key.serialize_pem()).expect("a file");
    let tls = Tls::open(&certificate, &key).expect("a certificate").for_http2().expect("the same");
    let mut http = Setup::default().start();
    let server = http.server.as_mut().expect("running");
    let address = http.runtime.block_on(server.listen_grpc((LOCAL, 0).into(), Some(tls))).expect("a free port");
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(cert.pem())).domain_name("localhost");
    let endpoint = Endpoint::from_shared(format!("https://{address}")).expect("an address").tls_config(config);
    let (endpoint, runtime) = (endpoint.expect("a configuration"), &http.runtime);
    let told = runtime.block_on(async {
        let mut inference = InferenceClient::new(endpoint.connect().await.expect("a connection"));
        inference.generate(asking(3)).await.expect("an answer").into_inner()
    });
    assert_eq!(told.outputs.expect("outputs").token_ids.len(), 3);
}

#[test]
fn kv_events_are_where_it_says() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let config: KvEventsConfig =
        r#"{"endpoint": "tcp://*:0", "replay_endpoint": "tcp://127.0.0.1:0", "topic": "kv@x"}"#
            .parse()
            .expect("a configuration");
    let publisher = runtime.block_on(Publisher::bind(&config, 0)).expect("free ports");
    let source = kv_event_source(&config, &publisher);
    assert_eq!((source.transport.as_str(), source.encoding.as_str(), source.schema_version), ("zmq", "msgpack", 1));
    // Without a rank Dynamo's sidecar ends.
    assert_eq!((source.data_parallel_rank, source.topic.as_str()), (Some(0), "kv@x"));
    for (endpoint, port) in [
        (&source.endpoint, publisher.address().port()),
        (&source.replay_endpoint, publisher.replay_address().expect("bound").port()),
    ] {
        assert_eq!(*endpoint, format!("tcp://127.0.0.1:{port}"));
    }
}
