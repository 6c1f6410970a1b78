//! `grpc.health.v1`, for probes and clients that wait until a server can serve. Invariant: what is told is what
//! `/health/ready` says, of the server as a whole and of each of its services.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::status::status;
use crate::http::error::ApiError;
use crate::http::{App, health};

pub struct Health {
    pub app: Arc<App>,
}

/// The server, and what of it may be asked for by name.
const SERVICES: [&str; 3] = ["", "vllm.Inference", "vllm.Control"];
/// Of those who watch.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

fn serving(app: &App) -> ServingStatus {
    health::check_ready(app).map_or(ServingStatus::NotServing, |_| ServingStatus::Serving)
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        if !SERVICES.contains(&service.as_str()) {
            return Err(Status::not_found(format!("there is no service {service:.100} here")));
        }
        Ok(Response::new(HealthCheckResponse { status: serving(&self.app).into() }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// Each change, until the server ends.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let is_known = SERVICES.contains(&request.into_inner().service.as_str());
        let app = self.app.clone();
        let look = move |last: Option<ServingStatus>| {
            let app = app.clone();
            async move {
                loop {
                    let now = if is_known { serving(&app) } else { ServingStatus::ServiceUnknown };
                    if last != Some(now) {
                        return Some((Ok(HealthCheckResponse { status: now.into() }), Some(now)));
                    }
                    // An answer that never ends would hold up the end of the server.
                    if app.is_leaving() {
                        return None;
                    }
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            }
        };
        let ended = stream::once(async { Err(status(&ApiError::leaving())) });
        let changes = futures_util::StreamExt::chain(stream::unfold(None, look), ended);
        Ok(Response::new(Box::pin(changes)))
    }
}
