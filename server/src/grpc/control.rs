//! `vllm.Control`: what the server is, where its KV events are, and an end to requests. Invariant: numbers are those of
//! the first model, all of its devices together, for the contract knows one model and one rank.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use tonic::{Request, Response, Status};
use vllm_proto::*;

use super::running::Running;
use super::status::{status, unsupported};
use crate::api::ServedModel;
use crate::http::App;
use crate::http::access::Client;
use crate::http::error::ApiError;
use crate::kv_events::{KvEventsConfig, Publisher};

pub struct Control {
    pub app: Arc<App>,
    pub running: Arc<Running>,
    pub identity: Arc<OnceLock<Identity>>,
}

/// What others are told of a server beside its models' numbers.
pub struct Identity {
    /// Of this start alone.
    pub instance_id: String,
    /// Where the first model's tokenizer and configuration are, as Hugging Face has them.
    pub model_folder: PathBuf,
    /// Of the first model, where they are published.
    pub kv_events: Option<KvEventSource>,
}

/// What is told of a publisher, to who is on this machine where it listens on all addresses.
pub fn kv_event_source(config: &KvEventsConfig, publisher: &Publisher) -> KvEventSource {
    let endpoint = |address: SocketAddr| {
        let ip = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        format!("tcp://{}", SocketAddr::new(ip, address.port()))
    };
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    KvEventSource {
        transport: "zmq".to_owned(),
        endpoint: endpoint(publisher.address()),
        topic: config.topic.clone(),
        replay_endpoint: publisher.replay_address().map(endpoint).unwrap_or_default(),
        data_parallel_rank: Some(0),
        encoding: "msgpack".to_owned(),
        schema_version: 1,
        buffer_steps: count(config.buffer_steps),
        hwm: count(config.hwm),
        max_queue_size: count(config.max_queue_size),
    }
}

impl Control {
    fn known(&self) -> Result<(&ServedModel, &Identity), Status> {
        let models = self.app.known_models().map_err(|error| status(&error))?;
        let identity = self.identity.get().ok_or_else(|| status(&ApiError::not_yet("the server is starting")))?;
        Ok((&models[0], identity))
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl control_server::Control for Control {
    async fn get_server_info(&self, _: Request<GetServerInfoRequest>) -> Answer<ServerInfo> {
        let (model, identity) = self.known()?;
        let config = model.engine.config();
        let sum = |number: fn(&fullbore_engine::config::EngineConfig) -> u32| -> u64 {
            model.engine.engines().iter().map(|engine| u64::from(number(engine.config()))).sum()
        };
        let parallelism = ParallelismInfo {
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
            data_parallel_size: 1,
            data_parallel_rank: 0,
            decode_context_parallel_size: 1,
            world_size: 1,
            data_parallel_size_local: 1,
        };
        Ok(Response::new(ServerInfo {
            engine_version: env!("CARGO_PKG_VERSION").to_owned(),
            // The name of the contract; clients take no other.
            api_version: "vllm".to_owned(),
            instance_id: identity.instance_id.clone(),
            parallelism: Some(parallelism),
            max_model_len: config.max_model_len,
            kv_block_size: config.block_size,
            total_kv_blocks: sum(|config| config.num_blocks),
            max_running_requests: sum(|config| config.max_num_seqs),
            max_batched_tokens: sum(|config| config.max_num_batched_tokens),
            proto_version: vllm_proto::VERSION.to_owned(),
            effective_attention_block_size: Some(config.block_size.into()),
            ..ServerInfo::default()
        }))
    }

    async fn get_model_info(&self, _: Request<GetModelInfoRequest>) -> Answer<ModelInfo> {
        let (model, identity) = self.known()?;
        Ok(Response::new(ModelInfo {
            model_id: identity.model_folder.display().to_string(),
            served_model_name: model.name.clone(),
            supports_text_input: true,
            supports_token_ids_input: true,
            ..ModelInfo::default()
        }))
    }

    async fn get_kv_event_sources(&self, _: Request<GetKvEventSourcesRequest>) -> Answer<GetKvEventSourcesResponse> {
        let (_, identity) = self.known()?;
        Ok(Response::new(GetKvEventSourcesResponse { sources: identity.kv_events.iter().cloned().collect() }))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Answer<AbortResponse> {
        let client = request.extensions().get::<Client>().and_then(|client| client.name.clone());
        for id in request.into_inner().request_ids {
            self.running.abort(client.clone(), id);
        }
        Ok(Response::new(AbortResponse {}))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        Err(Status::failed_precondition("this server is ended by who started it: send it SIGTERM"))
    }

    async fn list_loras(&self, _: Request<ListLorasRequest>) -> Answer<ListLorasResponse> {
        Ok(Response::new(ListLorasResponse::default()))
    }

    async fn load_lora(&self, _: Request<LoadLoraRequest>) -> Answer<LoadLoraResponse> {
        unsupported("LoadLora")
    }

    async fn unload_lora(&self, _: Request<UnloadLoraRequest>) -> Answer<UnloadLoraResponse> {
        unsupported("UnloadLora")
    }

    async fn is_paused(&self, _: Request<IsPausedRequest>) -> Answer<IsPausedResponse> {
        Ok(Response::new(IsPausedResponse { paused: false }))
    }

    async fn pause_generation(&self, _: Request<PauseGenerationRequest>) -> Answer<PauseGenerationResponse> {
        unsupported("PauseGeneration")
    }

    async fn resume_generation(&self, _: Request<ResumeGenerationRequest>) -> Answer<ResumeGenerationResponse> {
        unsupported("ResumeGeneration")
    }

    async fn is_sleeping(&self, _: Request<IsSleepingRequest>) -> Answer<IsSleepingResponse> {
        Ok(Response::new(IsSleepingResponse { sleeping: false }))
    }

    async fn sleep(&self, _: Request<SleepRequest>) -> Answer<SleepResponse> {
        unsupported("Sleep")
    }

    async fn wake_up(&self, _: Request<WakeUpRequest>) -> Answer<WakeUpResponse> {
        unsupported("WakeUp")
    }

    async fn init_weight_transfer_engine(
        &self,
        _: Request<InitWeightTransferEngineRequest>,
    ) -> Answer<InitWeightTransferEngineResponse> {
        unsupported("InitWeightTransferEngine")
    }

    async fn start_weight_update(&self, _: Request<StartWeightUpdateRequest>) -> Answer<StartWeightUpdateResponse> {
        unsupported("StartWeightUpdate")
    }

    async fn start_draft_weight_update(
        &self,
        _: Request<StartDraftWeightUpdateRequest>,
    ) -> Answer<StartDraftWeightUpdateResponse> {
        unsupported("StartDraftWeightUpdate")
    }

    async fn update_weights(&self, _: Request<UpdateWeightsRequest>) -> Answer<UpdateWeightsResponse> {
        unsupported("UpdateWeights")
    }

    async fn finish_weight_update(&self, _: Request<FinishWeightUpdateRequest>) -> Answer<FinishWeightUpdateResponse> {
        unsupported("FinishWeightUpdate")
    }

    async fn update_weight_version(
        &self,
        _: Request<UpdateWeightVersionRequest>,
    ) -> Answer<UpdateWeightVersionResponse> {
        unsupported("UpdateWeightVersion")
    }

    async fn get_weight_version(&self, _: Request<GetWeightVersionRequest>) -> Answer<GetWeightVersionResponse> {
        unsupported("GetWeightVersion")
    }
}
