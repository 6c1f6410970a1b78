//! Whether the process lives, and whether it can serve. Invariant: neither answer waits for the engine.

use serde_json::json;
use warp::reply::Response;

use super::App;
use super::error::{ApiError, json_response};

pub fn live() -> Response {
    json_response(&json!({"status": "ok"}))
}

pub fn ready(app: &App) -> Response {
    let answer = app.serving().and_then(|model| {
        let stalled = model.engine.stalled_for();
        match stalled > app.limits.max_stall {
            true => Err(ApiError::not_yet(&format!(
                "the device is stalled: no step has ended for {:.1} seconds",
                stalled.as_secs_f64()
            ))),
            false => Ok(json_response(&json!({"status": "ok", "model": model.name}))),
        }
    });
    answer.unwrap_or_else(|error| error.response(""))
}
