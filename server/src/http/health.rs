//! Whether the process lives, and whether it can serve. Invariant: neither answer waits for the engine.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use warp::reply::Response;

use super::App;
use super::error::{ApiError, json_response};
use crate::api::ServedModel;

pub fn live() -> Response {
    json_response(&json!({"status": "ok"}))
}

pub fn ready(app: &App) -> Response {
    let told = |models: &[Arc<ServedModel>]| {
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        json_response(&json!({"status": "ok", "model": names[0], "models": names}))
    };
    check_ready(app).map_or_else(|error| error.response(""), told)
}

/// Ready when every model is; otherwise why the first that is not cannot serve.
pub fn check_ready(app: &App) -> Result<&[Arc<ServedModel>], ApiError> {
    let models = app.ready_models()?;
    for model in models {
        check(model, app.limits.max_stall).map_err(|error| match models.len() {
            1 => error,
            _ => ApiError { message: format!("{}: {}", model.name, error.message), ..error },
        })?;
    }
    Ok(models)
}

fn check(model: &ServedModel, max_stall: Duration) -> Result<(), ApiError> {
    model.check_serving()?;
    let stalled = model.engine.stalled_for();
    match stalled > max_stall {
        true => {
            let seconds = stalled.as_secs_f64();
            Err(ApiError::not_yet(&format!("the device is stalled: no step has ended for {seconds:.1} seconds")))
        }
        false => Ok(()),
    }
}
