//! vLLM's gRPC contract, for routers whose workers speak it: NVIDIA Dynamo, and whatever else brings `vllm.proto`.
//!
//! [`Grpc`] is what answers at the port, behind the same door as HTTP: limits, keys, TLS and drain are
//! [`crate::http`]'s. [`raw`] takes a message as it is sent, [`request`] reads it in the words of `/v1/completions`,
//! [`inference`] has it answered, and [`reply`] tells what comes. [`control`] says what the server is, [`running`]
//! knows what can be aborted, [`health`] is asked by probes, and [`model_folder`] has the files that a frontend reads.
//! Invariant: each error is a status with a sentence, the one that HTTP's clients get.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http_body_util::{BodyDataStream, Full};
use hyper::body::Incoming;
use tonic::body::Body;
use tonic_health::pb::health_server::HealthServer;
use tower_service::Service;
use vllm_proto::control_server::ControlServer;
use warp::http::header::CONTENT_TYPE;
use warp::http::{Method, Request, Response, StatusCode};

use crate::http::App;
use crate::http::accept::Protocol;
use crate::http::access::{Access, Client};
use crate::http::bodies;
use crate::http::error::ApiError;

mod control;
mod health;
mod inference;
mod model_folder;
mod raw;
mod reply;
mod request;
mod running;
mod status;

pub use control::{Identity, kv_event_source};
pub use model_folder::{ModelFolderError, model_folder};

use control::Control;
use health::Health;
use inference::Inference;
use running::Running;
use status::status;

/// The services of a server, as its port for gRPC has them.
#[derive(Clone)]
pub struct Grpc {
    app: Arc<App>,
    inference: Inference,
    control: ControlServer<Control>,
    health: HealthServer<Health>,
}

impl Grpc {
    /// `identity` is set once the models are there.
    pub fn new(app: Arc<App>, identity: Arc<OnceLock<Identity>>) -> Grpc {
        let running = Arc::new(Running::default());
        let inference = Inference { app: app.clone(), running: running.clone() };
        let control = Control { app: app.clone(), running, identity };
        Grpc {
            inference,
            control: ControlServer::new(control),
            health: HealthServer::new(Health { app: app.clone() }),
            app,
        }
    }

    async fn dispatch(mut self, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
        let content_type = request.headers().get(CONTENT_TYPE).map(|value| value.to_str().unwrap_or("no text"));
        if request.method() != Method::POST || !content_type.is_some_and(|found| found.starts_with(GRPC)) {
            return Err(ApiError::not_grpc(content_type));
        }
        let path = request.uri().path().to_owned();
        let is_of = |service: &str| path.strip_prefix('/').is_some_and(|path| path.starts_with(service));
        // Whoever would get no place in any case is not read.
        let refused = if is_of(INFERENCE) { self.app.full() } else { None };
        let (mut head, body) = request.into_parts();
        let origin = head.extensions.get::<Client>().map(|client| client.origin.clone()).unwrap_or_default();
        let body = BodyDataStream::new(body);
        let mut limits = self.app.limits;
        if !is_of(INFERENCE) {
            limits.max_body_bytes = limits.max_body_bytes.min(MAX_SMALL_BYTES);
        }
        let body = self.app.bodies.read(&limits, &origin, &head.headers, refused, body).await?;
        // tonic makes a copy of its own, and lets go of this one.
        let (bytes, counted) = body.into_parts();
        head.extensions.insert(Held { _counted: Arc::new(counted) });
        let request = Request::from_parts(head, Full::new(Bytes::from(bytes)));
        let Ok(response) = match () {
            () if is_of(INFERENCE) => return self.inference.call(&path, request).await,
            () if is_of(CONTROL) => self.control.call(request).await,
            () if is_of(HEALTH) => self.health.call(request).await,
            () => return Err(ApiError::no_service(&path)),
        };
        Ok(response)
    }
}

impl Protocol for Grpc {
    type Body = Body;

    const IS_HTTP2: bool = true;

    /// No browser speaks gRPC, so that no web page's name matters.
    fn screen(&self, _: &Access, _: &Request<Incoming>) -> Option<Response<Body>> {
        None
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let answered = self.clone().dispatch(request).await;
        answered.unwrap_or_else(|error| self.refusal(&error, ""))
    }

    fn refusal(&self, error: &ApiError, _: &str) -> Response<Body> {
        let mut response: Response<Body> = status(error).into_http();
        if error.status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            *response.status_mut() = error.status;
        }
        response.extensions_mut().insert(error.refusal());
        response
    }
}

/// In the extensions of a request: what counts its body until that has been decoded and read.
#[derive(Clone)]
pub struct Held {
    _counted: Arc<bodies::Counted>,
}

/// Of what asks for no answer of a model: names of services, and of requests that are to end.
const MAX_SMALL_BYTES: u64 = 64 << 10;

const GRPC: &str = "application/grpc";
const INFERENCE: &str = "vllm.Inference/";
const CONTROL: &str = "vllm.Control/";
const HEALTH: &str = "grpc.health.v1.Health/";
