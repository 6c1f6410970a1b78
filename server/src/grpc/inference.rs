//! `vllm.Inference`: prompts as token ids, or as text, and answers as they come. Invariant: whoever leaves frees what
//! his request holds, for the stream that he reads has it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body_util::Full;
use prost::Message;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::{ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};
use vllm_proto::{GenerateRequest, GenerateResponse};
use warp::http;

use super::Held;
use super::raw::{Raw, Unread, fields, without};
use super::reply::{Replies, Reply, replies};
use super::request::{Told, body};
use super::running::{Run, Running};
use super::status::status;
use crate::api::{self, Generation, Jobs, ServedModel, unsupported};
use crate::http::App;
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::start::random;

#[derive(Clone)]
pub struct Inference {
    pub app: Arc<App>,
    pub running: Arc<Running>,
}

/// `Generate`: the answer in one piece, of one choice.
struct Whole(Inference);

/// `GenerateStream`.
struct Streamed(Inference);

/// A request whose answer is about to come.
struct Begun {
    generation: Generation,
    reply: Reply,
    run: Run,
}

impl Inference {
    /// The answer to what `path` names.
    pub async fn call(
        &self,
        path: &str,
        request: http::Request<Full<Bytes>>,
    ) -> Result<http::Response<Body>, ApiError> {
        let max_bytes = Some(self.app.limits.max_body_bytes as usize);
        let mut grpc = tonic::server::Grpc::new(Raw).apply_max_message_size_config(max_bytes, None);
        match path {
            "/vllm.Inference/Generate" => Ok(grpc.unary(Whole(self.clone()), request).await),
            "/vllm.Inference/GenerateStream" => Ok(grpc.server_streaming(Streamed(self.clone()), request).await),
            _ => Err(ApiError::no_service(path)),
        }
    }

    async fn begin(&self, request: Request<Bytes>, is_whole: bool) -> Result<Begun, Status> {
        let begun = self.try_begin(request, is_whole).await;
        begun.map_err(|error| {
            self.app.metrics.count_late_error(&error);
            status(&error)
        })
    }

    async fn try_begin(&self, request: Request<Bytes>, is_whole: bool) -> Result<Begun, ApiError> {
        let arrived = Instant::now();
        let client = request.extensions().get::<Client>().cloned().unwrap_or_default();
        let held = request.extensions().get::<Held>().cloned();
        let (metadata, _, message) = request.into_parts();
        self.app.open_models()?;
        let id = request_id(&message);
        // It can be aborted from now on, also while it waits to be read.
        let mut run = self.running.enter(client.name.clone(), &id);
        let asked = Asked { message, id, is_whole, held };
        let begin = self.generate(asked, &client, arrived, metadata);
        let (generation, reply) = tokio::select! {
            begun = begin => begun?,
            _ = &mut run.aborted => return Err(ApiError::aborted()),
        };
        Ok(Begun { generation, reply, run })
    }

    async fn generate(
        &self,
        asked: Asked,
        client: &Client,
        arrived: Instant,
        metadata: MetadataMap,
    ) -> Result<(Generation, Reply), ApiError> {
        let (of_app, of_client) = (self.app.clone(), client.clone());
        let num_bytes = asked.message.len();
        let prepare = move || asked.read(&of_app, &of_client);
        let (model, told, jobs) = self.app.work.read(&client.origin, num_bytes, prepare).await?;
        let headers = self.app.tracer.is_some().then(|| metadata.into_headers());
        let num_choices = jobs.jobs.len();
        let generation = self.app.generate(&model, jobs, client, arrived, headers).await?;
        Ok((generation, Reply::new(told, &model.stop_ids, num_choices)))
    }
}

/// A message that is not read yet.
struct Asked {
    message: Bytes,
    id: String,
    is_whole: bool,
    /// Counts its bytes, until it is read.
    held: Option<Held>,
}

impl Asked {
    fn read(self, app: &App, client: &Client) -> Result<(Arc<ServedModel>, Told, Jobs), ApiError> {
        let Asked { message, id, is_whole, held: _held } = self;
        let message = decode(message)?;
        if is_whole && message.sampling.as_ref().is_some_and(|sampling| sampling.num_sequences > 1) {
            let sentence = "Generate has room for one sequence; ask GenerateStream for num_sequences above 1";
            return Err(ApiError::invalid("num_sequences", sentence));
        }
        let told = Told::of(&message);
        let asked = Some(message.model.as_str()).filter(|model| !model.is_empty());
        let model = app.serving(asked)?.clone();
        let body = body(&model, message)?;
        let jobs = api::prepare_tokens(&model, &id, client, &body)?;
        Ok((model, told, jobs))
    }
}

/// What would only be passed over or refused is not decoded: two bytes of an empty part become some hundred.
fn decode(message: Bytes) -> Result<GenerateRequest, ApiError> {
    let refuse = |why: &str| ApiError::not_json(format!("the message is no GenerateRequest: {why}"));
    let unread = |Unread| refuse("it has a group, or a field that is cut off");
    for field in fields(&message) {
        let (number, part) = field.map_err(unread)?;
        if number == MEDIA {
            return Err(unsupported("media"));
        }
        if REFUSED_WITHIN.iter().any(|(within, ..)| *within == number) {
            for field in fields(part) {
                let (inner, _) = field.map_err(unread)?;
                let refused = REFUSED_WITHIN.iter().find(|(within, refused, _)| (*within, *refused) == (number, inner));
                refused.map_or(Ok(()), |(.., name)| Err(unsupported(name)))?;
            }
        }
    }
    GenerateRequest::decode(without(message, &PASSED_OVER)).map_err(|error| refuse(&error.to_string()))
}

/// As the message has it, the last if it has several, or one of ours.
fn request_id(message: &[u8]) -> String {
    let given = fields(message).map_while(Result::ok).filter(|(number, _)| *number == REQUEST_ID).last();
    let given = given.and_then(|(_, id)| std::str::from_utf8(id).ok()).filter(|id| !id.is_empty());
    given.map_or_else(|| format!("grpc-{:016x}", random()), str::to_owned)
}

/// Fields of `GenerateRequest`.
const REQUEST_ID: u64 = 1;
const MEDIA: u64 = 14;
/// `kv_hints` and `engine_reasoning_gate`: what has no word in an answer here, and JSON of any size within.
const PASSED_OVER: [u64; 2] = [17, 18];
/// Fields of its parts `decoding` and `kv` that are refused by these names.
const REFUSED_WITHIN: [(u64, u64, &str); 3] =
    [(7, 12, "bad_words_token_ids"), (10, 3, "kv_transfer_params"), (10, 4, "ec_transfer_params")];

impl UnaryService<Bytes> for Whole {
    type Response = GenerateResponse;
    type Future = BoxFuture<'static, Result<Response<GenerateResponse>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let Whole(inference) = self;
        let inference = inference.clone();
        async move {
            let Begun { generation, mut reply, mut run } = inference.begin(request, true).await?;
            let collect = api::collect_choices(generation);
            let (choices, usage) = tokio::select! {
                collected = collect => collected.map_err(|error| {
                    inference.app.metrics.count_late_error(&error);
                    status(&error)
                })?,
                _ = &mut run.aborted => return Err(status(&ApiError::aborted())),
            };
            let choice = choices.into_iter().next().expect("one was asked for");
            Ok(Response::new(reply.more(choice, usage)))
        }
        .boxed()
    }
}

impl ServerStreamingService<Bytes> for Streamed {
    type Response = GenerateResponse;
    type ResponseStream = Replies;
    type Future = BoxFuture<'static, Result<Response<Replies>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let Streamed(inference) = self;
        let inference = inference.clone();
        async move {
            let Begun { generation, reply, run } = inference.begin(request, false).await?;
            Ok(Response::new(replies(inference.app, generation, reply, run)))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread::available_parallelism;

    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::config::EngineConfig;

    use super::*;
    use crate::http::accept::Limits;
    use crate::http::access::{Access, Origin};
    use crate::start::Plan;

    #[test]
    fn what_is_not_used_is_not_decoded() {
        let field = |number: u64, part: &[u8]| {
            let mut bytes = Vec::<u8>::new();
            prost::encoding::encode_key(number as u32, prost::encoding::WireType::LengthDelimited, &mut bytes);
            prost::encoding::encode_varint(part.len() as u64, &mut bytes);
            [bytes.as_slice(), part].concat()
        };
        // Half a million actions, each of two bytes.
        let actions = b"\x1a\0".repeat(500_000);
        let message = [field(1, b"x"), field(17, &actions), field(18, &field(2, &actions)), field(3, b"text")].concat();
        let decoded = decode(message.clone().into()).expect("hints are passed over");
        assert_eq!((decoded.request_id.as_str(), decoded.kv_hints, decoded.engine_reasoning_gate), ("x", None, None));
        assert!(decoded.prompt.is_some());
        let seen = GenerateRequest::decode(message.as_slice()).expect("it is one");
        assert_eq!(seen.kv_hints.map(|hints| hints.actions.len()), Some(500_000), "they would have been");
        for (within, refused, name) in REFUSED_WITHIN {
            let error = decode(field(within, &field(refused, &actions)).into()).expect_err("refused");
            assert!(error.message.contains(name), "{error:?}");
            decode(field(within, b"\x0b").into()).expect_err("a group within");
            decode(field(within, b"").into()).expect("nothing is refused of it");
        }
    }

    #[tokio::test]
    async fn a_long_message_waits_for_its_turn_to_be_decoded_and_can_be_aborted_before() {
        let app = Arc::new(App::new(Limits::default(), Access::default(), None, None));
        let backend = Box::new(SimBackend::new(SimOptions::default()));
        let plan = Plan::of("sim", Bundle::simulated(), backend, EngineConfig::default(), 0);
        app.set_models(vec![plan.load().expect("the simulator loads")]);
        // No message at all, behind a name.
        let mut bytes = vec![0xff; 20 << 10];
        bytes[..3].copy_from_slice(b"\x0a\x01x");
        let inference = Inference { app: app.clone(), running: Arc::default() };
        let ask = || inference.try_begin(Request::new(bytes.clone().into()), false);
        // Others have all turns for long texts there can be.
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..available_parallelism().map_or(1, usize::from)).map(|_| channel::<()>()).unzip();
        let origin = Origin::default();
        let hold = |receiver: std::sync::mpsc::Receiver<()>| {
            let hold = move || {
                // Until there is nobody to send.
                let _ = receiver.recv();
                Ok(())
            };
            Box::pin(app.work.read(&origin, bytes.len(), hold))
        };
        let mut held: Vec<_> = receivers.into_iter().map(hold).collect();
        for held in &mut held {
            assert!(held.now_or_never().is_none());
        }
        let (mut aborted, mut waiting) = (Box::pin(ask()), Box::pin(ask()));
        assert!((&mut aborted).now_or_never().is_none());
        inference.running.abort(None, "x".to_owned());
        assert_eq!(aborted.await.err().and_then(|error| error.code), Some("aborted"));
        assert!((&mut waiting).now_or_never().is_none());
        drop(senders);
        futures_util::future::join_all(held).await;
        let error = waiting.await.err().expect("it is no message");
        assert!(error.message.contains("no GenerateRequest"), "{error:?}");
        app.models()[0].end();
    }
}
