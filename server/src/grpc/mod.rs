//! vLLM's gRPC contract, for routers whose workers speak it: NVIDIA Dynamo, and whatever else brings `vllm.proto`.
//!
//! [`Grpc`] is what answers at the port, behind the same door as HTTP: limits, keys, TLS and drain are
//! [`crate::http`]'s.
//! [`request`] reads a message in the words of `/v1/completions`, [`inference`] has it answered, and [`reply`] tells
//! what comes. [`control`] says what the server is, [`running`] knows what can be aborted, [`health`] is asked by
//! probes, and [`model_folder`] has the files that a frontend reads. Invariant: each error is a status with a sentence,
//! the one that HTTP's clients get.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http_body_util::{BodyDataStream, Full};
use hyper::body::Incoming;
use tonic::body::Body;
use tonic_health::pb::health_server::HealthServer;
use tower_service::Service;
use vllm_proto::control_server::ControlServer;
use vllm_proto::inference_server::InferenceServer;
use warp::http::header::CONTENT_TYPE;
use warp::http::{Method, Request, Response, StatusCode};

use crate::api::unsupported;
use crate::http::App;
use crate::http::accept::Protocol;
use crate::http::access::{Access, Client};
use crate::http::bodies;
use crate::http::error::ApiError;

mod control;
mod health;
mod inference;
mod model_folder;
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
    inference: InferenceServer<Inference>,
    control: ControlServer<Control>,
    health: HealthServer<Health>,
}

impl Grpc {
    /// `identity` is set once the models are there.
    pub fn new(app: Arc<App>, identity: Arc<OnceLock<Identity>>) -> Grpc {
        let running = Arc::new(Running::default());
        let max_bytes = app.limits.max_body_bytes as usize;
        let inference = Inference { app: app.clone(), running: running.clone() };
        let control = Control { app: app.clone(), running, identity };
        Grpc {
            inference: InferenceServer::new(inference).max_decoding_message_size(max_bytes),
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
        if is_of(HEALTH) {
            limits.max_body_bytes = limits.max_body_bytes.min(MAX_HEALTH_BYTES);
        }
        let body = self.app.bodies.read(&limits, &origin, &head.headers, refused, body).await?;
        let held = Held(Arc::new(body));
        if is_of(INFERENCE) && held.as_ref().get(FRAME_BYTES..).is_some_and(|message| has_field(message, MEDIA)) {
            return Err(unsupported("media"));
        }
        head.extensions.insert(held.clone());
        let request = Request::from_parts(head, Full::new(Bytes::from_owner(held)));
        let Ok(response) = match () {
            () if is_of(INFERENCE) => self.inference.call(request).await,
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

/// In the extensions of a request: its body, which is counted until what was decoded of it has been read too.
#[derive(Clone)]
pub struct Held(Arc<bodies::Body>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// Whether a message has this field at its top level, as far as it can be read. It is not decoded: a few bytes of an
/// empty part become some hundred.
fn has_field(mut message: &[u8], field: u64) -> bool {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for nth in 0..10 {
            let (&byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << (7 * nth);
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
    let mut next = || {
        let key = varint(&mut message)?;
        let length = match key & 7 {
            0 => varint(&mut message).map(|_| 0)?,
            1 => 8,
            2 => usize::try_from(varint(&mut message)?).ok()?,
            5 => 4,
            _ => return None,
        };
        message = message.get(length..)?;
        Some(key >> 3)
    };
    std::iter::from_fn(&mut next).any(|found| found == field)
}

/// Of `GenerateRequest`.
const MEDIA: u64 = 14;
/// Before a message: whether it is compressed, and its length.
const FRAME_BYTES: usize = 5;
/// A service's name; nobody has to have a key for it.
const MAX_HEALTH_BYTES: u64 = 4 << 10;

const GRPC: &str = "application/grpc";
const INFERENCE: &str = "vllm.Inference/";
const CONTROL: &str = "vllm.Control/";
const HEALTH: &str = "grpc.health.v1.Health/";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_are_found_without_decoding_them() {
        // A text (1), a fixed number of 4 bytes (7) and of 8 (8), a number (20), and three empty items.
        let plain = b"\x0a\x03abc\x3d\0\0\0\x3f\x41\0\0\0\0\0\0\0\0\xa0\x01\xac\x02";
        let with = [plain.as_slice(), b"\x72\0\x72\0\x72\0"].concat();
        assert!(!has_field(plain, MEDIA) && has_field(plain, 20));
        assert!(has_field(&with, MEDIA));
        // Cut off wherever, it is what it is so far.
        assert!((0..plain.len()).all(|end| !has_field(&plain[..end], MEDIA)));
        // No field has another kind, or a length beyond the end.
        assert!(!has_field(b"\x0b\x72\0", MEDIA) && !has_field(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 1));
    }
}
