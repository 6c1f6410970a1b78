//! HTTP: what every route shares, and gRPC with them. Invariant: the models are set once, all together; every limit on
//! a client is in [`accept::Limits`], and who is a client is for [`access::Access`] to say.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::api::{Generation, Jobs, ServedModel};
use crate::log::Log;
use crate::traces::Tracer;
use accept::Limits;
use access::{Access, Client};
use bodies::Bodies;
use error::ApiError;
use metrics::{Asked, HttpMetrics};
use tokio::sync::watch;
use tokio::time::timeout;
use warp::http::{HeaderMap, Request, Response};
use work::RequestWork;

pub mod accept;
pub mod access;
pub mod bodies;
mod calls;
mod client_stream;
pub mod connections;
pub mod descriptors;
pub mod error;
pub mod health;
pub mod keys;
mod lane;
pub mod metrics;
mod orca;
mod page;
mod peers;
pub mod proxies;
pub mod rates;
mod request_id;
pub mod routes;
mod stream;
pub mod tls;
pub mod work;

pub struct App {
    pub limits: Limits,
    pub access: Access,
    pub metrics: HttpMetrics,
    pub work: RequestWork,
    pub bodies: Arc<Bodies>,
    /// Where somebody collects traces.
    pub tracer: Option<Arc<Tracer>>,
    log: Option<Log>,
    /// In the order of the command line; none while they are loaded.
    models: OnceLock<Vec<Arc<ServedModel>>>,
    leaving: AtomicBool,
    draining: AtomicBool,
    /// Requests whose answer is not sent yet.
    num_open: watch::Sender<usize>,
}

/// A request while its answer is not sent.
pub struct OpenRequest {
    app: Arc<App>,
    asked: Asked,
}

impl App {
    pub fn new(limits: Limits, access: Access, tracer: Option<Tracer>, log: Option<Log>) -> App {
        App {
            limits,
            access,
            metrics: HttpMetrics::default(),
            work: RequestWork::default(),
            bodies: Bodies::new(limits.max_bytes_of_bodies),
            tracer: tracer.map(Arc::new),
            log,
            models: OnceLock::new(),
            leaving: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            num_open: watch::Sender::new(0),
        }
    }

    pub fn set_models(&self, models: Vec<ServedModel>) {
        assert!(!models.is_empty(), "a server has a model");
        let models = models.into_iter().map(Arc::new).collect();
        assert!(self.models.set(models).is_ok(), "the models are set once");
    }

    /// None while they are loaded.
    pub fn models(&self) -> &[Arc<ServedModel>] {
        self.models.get().map_or(&[], Vec::as_slice)
    }

    /// The models, whether they can serve now or not.
    pub fn known_models(&self) -> Result<&[Arc<ServedModel>], ApiError> {
        match self.models() {
            [] => Err(ApiError::not_yet("the model is being loaded; try again shortly")),
            models => Ok(models),
        }
    }

    /// The model of this name, or the first, whether it can serve now or not.
    pub fn known_model(&self, asked: Option<&str>) -> Result<&Arc<ServedModel>, ApiError> {
        let models = self.known_models()?;
        let Some(asked) = asked else { return Ok(&models[0]) };
        let found = models.iter().find(|model| model.name == asked);
        found.ok_or_else(|| {
            let served: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
            ApiError::unknown_model(asked, &served)
        })
    }

    /// From now on the server says that it is not ready, and serves whoever comes all the same.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed) || self.draining.load(Ordering::Relaxed)
    }

    /// The models, where more requests are wanted, or why they are not.
    pub fn ready_models(&self) -> Result<&[Arc<ServedModel>], ApiError> {
        match self.leaving.load(Ordering::Relaxed) {
            true => Err(ApiError::leaving()),
            false => self.open_models(),
        }
    }

    /// From now on requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub fn open_request<B>(self: &Arc<App>, request: &Request<B>) -> OpenRequest {
        self.num_open.send_modify(|num_open| *num_open += 1);
        OpenRequest { app: self.clone(), asked: Asked::new(request) }
    }

    /// Until no request is open; `false` if `most` is over before.
    pub async fn all_answered(&self, most: Duration) -> bool {
        timeout(most, self.num_open.subscribe().wait_for(|num_open| *num_open == 0)).await.is_ok()
    }

    /// The models, or why none of them is to be had now.
    pub fn open_models(&self) -> Result<&[Arc<ServedModel>], ApiError> {
        match self.draining.load(Ordering::Relaxed) {
            true => Err(ApiError::leaving()),
            false => self.known_models(),
        }
    }

    /// The model of this name, or the first; or why it is not to be had now.
    pub fn serving(&self, asked: Option<&str>) -> Result<&Arc<ServedModel>, ApiError> {
        self.open_models()?;
        let model = self.known_model(asked)?;
        model.check_serving().map(|()| model)
    }

    /// Has the engine of `model` at work, once what the texts must follow is compiled; `headers` may name a trace.
    pub async fn generate(
        &self,
        model: &Arc<ServedModel>,
        mut jobs: Jobs,
        client: &Client,
        arrived: Instant,
        headers: Option<HeaderMap>,
    ) -> Result<Generation, ApiError> {
        if let Some(form) = jobs.form.take() {
            jobs.follow(&self.work.compile(&client.origin, model, &form).await?);
        }
        let tracer = self.tracer.as_ref().zip(headers);
        let trace = tracer.and_then(|(tracer, headers)| tracer.trace(&headers, &model.name));
        let (model, meter, num_tokens) = (model.clone(), client.meter.clone(), jobs.num_prompt_tokens());
        self.work.hand_in(num_tokens, move || Generation::submit(&model, jobs, arrived, meter, trace)).await
    }

    /// The refusal of whoever would get no place, whichever model is asked.
    pub fn full(&self) -> Option<ApiError> {
        let models = self.open_models().ok()?;
        let full = |model: &Arc<ServedModel>| {
            model.check_serving().ok()?;
            model.engine.check_full().err()
        };
        let refusals: Option<Vec<_>> = models.iter().map(full).collect();
        refusals?.into_iter().next().map(ApiError::from)
    }
}

impl OpenRequest {
    /// Its answer is known, and yet to be sent.
    pub fn answered<B>(&mut self, response: &Response<B>) {
        self.app.metrics.count_response(&self.asked, response);
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.app.metrics.count_sent(&self.asked);
        self.app.num_open.send_modify(|num_open| *num_open -= 1);
    }
}
