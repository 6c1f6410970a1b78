//! `vllm.Inference`: prompts as token ids, or as text, and answers as they come. Invariant: whoever leaves frees what
//! his request holds, for the stream that he reads has it.

use std::sync::Arc;
use std::time::Instant;

use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use vllm_proto::inference_server;
use vllm_proto::{GenerateRequest, GenerateResponse};

use super::Held;
use super::reply::{Replies, Reply, replies};
use super::request::{Told, body};
use super::running::{Run, Running};
use super::status::status;
use crate::api::{self, Generation, ServedModel};
use crate::http::App;
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::start::random;

pub struct Inference {
    pub app: Arc<App>,
    pub running: Arc<Running>,
}

/// A request whose answer is about to come.
struct Begun {
    generation: Generation,
    reply: Reply,
    run: Run,
}

impl Inference {
    async fn begin(&self, request: Request<GenerateRequest>) -> Result<Begun, Status> {
        let begun = self.try_begin(request).await;
        begun.map_err(|error| {
            self.app.metrics.count_late_error(&error);
            status(&error)
        })
    }

    async fn try_begin(&self, request: Request<GenerateRequest>) -> Result<Begun, ApiError> {
        let arrived = Instant::now();
        let client = request.extensions().get::<Client>().cloned().unwrap_or_default();
        let held = request.extensions().get::<Held>().cloned();
        let (metadata, _, mut message) = request.into_parts();
        self.app.open_models()?;
        if message.request_id.is_empty() {
            message.request_id = format!("grpc-{:016x}", random());
        }
        let mut run = self.running.enter(client.name.clone(), &message.request_id);
        let begin = self.generate(message, held, &client, arrived, metadata);
        let (generation, reply) = tokio::select! {
            begun = begin => begun?,
            _ = &mut run.aborted => return Err(ApiError::aborted()),
        };
        Ok(Begun { generation, reply, run })
    }

    async fn generate(
        &self,
        message: GenerateRequest,
        held: Option<Held>,
        client: &Client,
        arrived: Instant,
        metadata: MetadataMap,
    ) -> Result<(Generation, Reply), ApiError> {
        let told = Told::of(&message);
        let (of_app, of_client) = (self.app.clone(), client.clone());
        let num_bytes = held.as_ref().map_or(0, |held| held.as_ref().len());
        let prepare = move || {
            let _held = held;
            let asked = Some(message.model.as_str()).filter(|model| !model.is_empty());
            let model: Arc<ServedModel> = of_app.serving(asked)?.clone();
            let id = message.request_id.clone();
            let body = body(&model, message)?;
            let jobs = api::prepare_tokens(&model, &id, &of_client, &body)?;
            Ok((model, jobs))
        };
        let (model, jobs) = self.app.work.read(&client.origin, num_bytes, prepare).await?;
        let headers = self.app.tracer.is_some().then(|| metadata.into_headers());
        let num_choices = jobs.jobs.len();
        let generation = self.app.generate(&model, jobs, client, arrived, headers).await?;
        Ok((generation, Reply::new(told, &model.stop_ids, num_choices)))
    }
}

#[tonic::async_trait]
impl inference_server::Inference for Inference {
    /// The same in one piece, of one choice.
    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<GenerateResponse>, Status> {
        let n = request.get_ref().sampling.as_ref().map_or(1, |sampling| sampling.num_sequences);
        if n > 1 {
            let sentence = "Generate has room for one sequence; ask GenerateStream for num_sequences above 1";
            return Err(Status::invalid_argument(sentence));
        }
        let Begun { generation, mut reply, mut run } = self.begin(request).await?;
        let collect = api::collect_choices(generation);
        let (choices, usage) = tokio::select! {
            collected = collect => collected.map_err(|error| {
                self.app.metrics.count_late_error(&error);
                status(&error)
            })?,
            _ = &mut run.aborted => return Err(status(&ApiError::aborted())),
        };
        let choice = choices.into_iter().next().expect("one was asked for");
        Ok(Response::new(reply.more(choice, usage)))
    }

    type GenerateStreamStream = Replies;

    async fn generate_stream(&self, request: Request<GenerateRequest>) -> Result<Response<Replies>, Status> {
        let Begun { generation, reply, run } = self.begin(request).await?;
        Ok(Response::new(replies(self.app.clone(), generation, reply, run)))
    }
}
