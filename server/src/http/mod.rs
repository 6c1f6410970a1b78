//! HTTP: what every route shares. Invariant: the model is set once; every limit on a client is in [`accept::Limits`].

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::api::ServedModel;
use accept::Limits;
use error::ApiError;
use metrics::HttpMetrics;

pub mod accept;
pub mod error;
mod health;
pub mod metrics;
mod page;
pub mod routes;
mod stream;

pub struct App {
    pub limits: Limits,
    pub metrics: HttpMetrics,
    model: OnceLock<Arc<ServedModel>>,
    draining: AtomicBool,
}

impl App {
    pub fn new(limits: Limits) -> App {
        App { limits, metrics: HttpMetrics::default(), model: OnceLock::new(), draining: AtomicBool::new(false) }
    }

    pub fn set_model(&self, model: ServedModel) {
        assert!(self.model.set(Arc::new(model)).is_ok(), "the model is set once");
    }

    pub fn model(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// From now on requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The model, or why there is none to be had now.
    pub fn serving(&self) -> Result<&Arc<ServedModel>, ApiError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        let model = self.model().ok_or_else(|| ApiError::not_yet("the model is being loaded; try again shortly"))?;
        match model.engine.stopped() {
            Some(reason) => return Err(ApiError::unavailable(&format!("the engine has stopped: {reason}"))),
            None => {}
        }
        match model.engine.recovering() {
            Some(reason) => Err(ApiError::not_yet(&reason)),
            None => Ok(model),
        }
    }
}
