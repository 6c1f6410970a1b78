//! HTTP: what every route shares. Invariant: the model is set once; every limit on a client is in [`accept::Limits`],
//! and who is a client is for [`access::Access`] to say.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::api::ServedModel;
use crate::traces::Tracer;
use accept::Limits;
use access::Access;
use error::ApiError;
use metrics::HttpMetrics;
use tokio::sync::watch;
use tokio::time::timeout;
use work::RequestWork;

pub mod accept;
pub mod access;
pub mod error;
mod health;
pub mod keys;
pub mod metrics;
mod page;
mod peers;
pub mod rates;
pub mod routes;
mod stream;
pub mod tls;
mod work;

pub struct App {
    pub limits: Limits,
    pub access: Access,
    pub metrics: HttpMetrics,
    work: RequestWork,
    /// Where somebody collects traces.
    pub tracer: Option<Arc<Tracer>>,
    model: OnceLock<Arc<ServedModel>>,
    draining: AtomicBool,
    /// Requests whose answer is not sent yet.
    num_open: watch::Sender<usize>,
}

/// A request while its answer is not sent.
pub struct OpenRequest(Arc<App>);

impl App {
    pub fn new(limits: Limits, access: Access, tracer: Option<Tracer>) -> App {
        App {
            limits,
            access,
            metrics: HttpMetrics::default(),
            work: RequestWork::default(),
            tracer: tracer.map(Arc::new),
            model: OnceLock::new(),
            draining: AtomicBool::new(false),
            num_open: watch::Sender::new(0),
        }
    }

    pub fn set_model(&self, model: ServedModel) {
        assert!(self.model.set(Arc::new(model)).is_ok(), "the model is set once");
    }

    pub fn model(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// The model, whether it can serve now or not.
    pub fn known_model(&self) -> Result<&Arc<ServedModel>, ApiError> {
        self.model().ok_or_else(|| ApiError::not_yet("the model is being loaded; try again shortly"))
    }

    /// From now on requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub fn open_request(self: &Arc<App>) -> OpenRequest {
        self.num_open.send_modify(|num_open| *num_open += 1);
        OpenRequest(self.clone())
    }

    /// Until no request is open; `false` if `most` is over before.
    pub async fn all_answered(&self, most: Duration) -> bool {
        timeout(most, self.num_open.subscribe().wait_for(|num_open| *num_open == 0)).await.is_ok()
    }

    /// The model, or why there is none to be had now.
    pub fn serving(&self) -> Result<&Arc<ServedModel>, ApiError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(ApiError::not_yet("the server is shutting down; ask another, or come again"));
        }
        let model = self.known_model()?;
        if let Some(reason) = model.engine.stopped() {
            return Err(ApiError::unavailable(&format!("the engine has stopped: {reason}")));
        }
        match model.engine.recovering() {
            Some(reason) => Err(ApiError::not_yet(&reason)),
            None => Ok(model),
        }
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.num_open.send_modify(|num_open| *num_open -= 1);
    }
}
