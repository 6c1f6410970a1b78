//! Errors as OpenAI's API has them: `{"error": {"message", "type", "param", "code"}}`, and on Anthropic's paths as that
//! has them: `{"type": "error", "error": {"type", "message"}}`.
//!
//! Invariant: every failure that a client sees comes from here, and its sentence names the thing.

use std::convert::Infallible;
use std::time::Duration;

use fullbore_engine::backlog::Limit;
use fullbore_engine::config::UnfitRequest;
use fullbore_engine::fleet::SubmitError;
use serde_json::{Value, json};
use warp::http::StatusCode;
use warp::http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use warp::reject::{InvalidHeader, InvalidQuery, MethodNotAllowed, Rejection};
use warp::reply::Response;

use crate::api::{Endpoint, Event};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field of the request that is at fault.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// Seconds after which the same may succeed; `None` where no waiting helps.
    pub retry_after: Option<u64>,
}

/// In the extensions of a response that is an error: what is counted.
#[derive(Clone, Copy, Debug)]
pub struct Refusal(pub &'static str);

/// As proxies have it; nobody is told.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// Where errors are Anthropic's.
const MESSAGES_PATH: &str = "/v1/messages";

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    /// A field of the request is wrong.
    pub fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.to_owned()), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    /// The body is no JSON object.
    pub fn not_json(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message).with_code("invalid_json")
    }

    /// Text that has more tokens than the context without being counted.
    pub fn too_long(param: &str, least_tokens: usize, max_model_len: u32) -> ApiError {
        let message = format!(
            "this model's context is {max_model_len} tokens; the prompt has {least_tokens} or more: shorten the prompt"
        );
        ApiError::invalid(param, message).with_code("context_length_exceeded")
    }

    /// The same where nothing is computed of it, and more than the context may come.
    pub fn too_long_to_count(param: &str, least_tokens: usize, max_tokens: usize) -> ApiError {
        let message = format!(
            "{max_tokens} tokens of one text are counted at most; this one has {least_tokens} or more: send it in parts"
        );
        ApiError::invalid(param, message).with_code("context_length_exceeded")
    }

    /// The body is not said to be JSON. A browser asks before it sends such a type to another site, so no web page can
    /// have a request answered that its user knows nothing of.
    pub fn media_type(found: Option<&str>) -> ApiError {
        let found = found.map_or_else(|| "missing".to_owned(), |found| format!("{found:.60}"));
        let message = format!("the Content-Type of the request is {found}; it must be application/json");
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message).with_code("unsupported_media_type")
    }

    /// No key was shown, or none that is known.
    pub fn no_key(shown: bool) -> ApiError {
        let message = match shown {
            true => "this API key is not known here; ask whoever runs this server for one",
            false => "this server wants an API key: send it as `Authorization: Bearer KEY`",
        };
        ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key")
    }

    pub fn wrong_host(host: &str) -> ApiError {
        let message = format!(
            "this server is for its own machine and is not called {host:.100}; ask it as localhost, or start it with \
             --allowed-host"
        );
        ApiError::new(StatusCode::FORBIDDEN, message).with_code("wrong_host")
    }

    /// A path that no service has.
    pub fn no_service(path: &str) -> ApiError {
        let message = format!(
            "there is no service at {path:.100}; vllm.Inference, vllm.Control and grpc.health.v1.Health are here"
        );
        ApiError::new(StatusCode::NOT_FOUND, message).with_code(ApiError::NO_SERVICE)
    }

    pub const NO_SERVICE: &str = "no_service";

    /// What is no call of a gRPC client.
    pub fn not_grpc(found: Option<&str>) -> ApiError {
        let found = found.unwrap_or("missing");
        let message = format!("this port takes POST with the content type application/grpc, and it is {found:.60}");
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message).with_code("unsupported_media_type")
    }

    /// Its client has had it ended.
    pub fn aborted() -> ApiError {
        let status = StatusCode::from_u16(CLIENT_CLOSED_REQUEST).expect("a status");
        ApiError::new(status, "the request was aborted").with_code("aborted")
    }

    /// The port is for gRPC.
    pub fn not_http2() -> ApiError {
        let message = "this port speaks gRPC, which is HTTP/2 from its first byte on; HTTP/1.1 has --port";
        ApiError::new(StatusCode::BAD_REQUEST, message).with_code("not_http2")
    }

    pub fn unknown_model(asked: &str, served: &[&str]) -> ApiError {
        let message = format!("the model {asked:.200} does not exist here; this server has {}", served.join(", "));
        let error = ApiError::new(StatusCode::NOT_FOUND, message).with_code("model_not_found");
        ApiError { param: Some("model".to_owned()), ..error }
    }

    pub fn body_too_large(max_bytes: u64) -> ApiError {
        let message = format!("the request body is larger than the {max_bytes} bytes that are taken");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).with_code("request_too_large")
    }

    pub fn no_room_for_bodies(max_bytes: u64) -> ApiError {
        let message = format!(
            "other requests have as much of the {max_bytes} bytes for request bodies as may be had; try again in 1 s"
        );
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("too_many_bytes");
        ApiError { retry_after: Some(1), ..error }
    }

    pub fn body_too_slow(seconds: u64) -> ApiError {
        let message = format!("the request body had not arrived after {seconds} seconds");
        ApiError::new(StatusCode::REQUEST_TIMEOUT, message).with_code("request_timeout")
    }

    pub fn body_broken() -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "the request body ended early")
    }

    pub fn overloaded(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("queue_full")
    }

    /// The holder of a key has asked for more than its minute's worth of `what`.
    pub fn rate_limited(per_minute: u32, what: &str, wait: Duration) -> ApiError {
        let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
        let message =
            format!("this API key has {per_minute} {what} a minute, which are used up; try again in {seconds} s");
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("rate_limit_exceeded");
        ApiError { retry_after: Some(seconds), ..error }
    }

    pub fn unavailable(message: &str) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("unavailable")
    }

    /// What passes by itself, nobody knows when: to be asked again and again.
    pub fn not_yet(message: &str) -> ApiError {
        ApiError { retry_after: Some(1), ..ApiError::unavailable(message) }
    }

    /// The process is about to end.
    pub fn leaving() -> ApiError {
        ApiError::not_yet("the server is shutting down; ask another, or come again")
    }

    /// A panic of ours, of which the log says more.
    pub fn bug() -> ApiError {
        ApiError::internal("the server met a bug of its own; its log says more")
    }

    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).with_code("internal_error")
    }

    /// The engine knows prompts only; the field that has one is called as the endpoint calls it.
    pub fn of_endpoint(self, endpoint: Endpoint) -> ApiError {
        match self.param.as_deref() {
            Some("prompt") => ApiError { param: Some(endpoint.prompt_param().to_owned()), ..self },
            _ => self,
        }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    pub fn refusal(&self) -> Refusal {
        let other = if self.param.is_some() { "invalid_field" } else { "invalid_request" };
        Refusal(self.code.unwrap_or(other))
    }

    pub fn json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }

    pub fn anthropic_json(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_server_error() => "api_error",
            _ => "invalid_request_error",
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }

    /// As the first event of a stream of `endpoint`, and its last.
    pub fn event(&self, endpoint: Endpoint) -> Event {
        match endpoint {
            Endpoint::Messages => Event::Named(self.anthropic_json()),
            Endpoint::Responses => {
                let data = json!({
                    "sequence_number": 0, "code": self.code, "message": self.message, "param": self.param,
                });
                Event::named("error", data)
            }
            _ => Event::data(&self.json()),
        }
    }

    /// As a client of this path expects it.
    pub fn response(&self, path: &str) -> Response {
        let mut response = json_response(&if is_anthropic(path) { self.anthropic_json() } else { self.json() });
        *response.status_mut() = self.status;
        response.extensions_mut().insert(self.refusal());
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Whether clients of this path speak Anthropic's dialect.
pub fn is_anthropic(path: &str) -> bool {
    path.strip_prefix(MESSAGES_PATH).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> ApiError {
        let message = error.to_string();
        match error {
            SubmitError::Full(_, retry_after) => {
                ApiError { retry_after: Some(retry_after.as_secs()), ..ApiError::overloaded(message) }
            }
            SubmitError::TooLate { retry_after, .. } => ApiError {
                retry_after: Some(retry_after.as_secs()),
                ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("queue_too_slow")
            },
            SubmitError::NeverFits { limit, .. } => {
                let param = if limit == Limit::Requests { "n" } else { "prompt" };
                ApiError::invalid(param, message).with_code("queue_too_small")
            }
            SubmitError::NeverInTime { .. } => ApiError::invalid("prompt", message).with_code("prompt_too_slow"),
            SubmitError::Unfit(unfit) => unfit.into(),
            SubmitError::Stopped { .. } => ApiError::unavailable(&message),
        }
    }
}

impl From<UnfitRequest> for ApiError {
    fn from(error: UnfitRequest) -> ApiError {
        let message = error.to_string();
        match error {
            UnfitRequest::TooLong { prompt_tokens, max_model_len, .. } => {
                let param = if prompt_tokens < max_model_len { "max_tokens" } else { "prompt" };
                ApiError::invalid(param, message).with_code("context_length_exceeded")
            }
            UnfitRequest::Empty | UnfitRequest::NoSuchToken { .. } => ApiError::invalid("prompt", message),
            UnfitRequest::BadMask { .. } => ApiError::invalid("allowed_token_ids", message),
        }
    }
}

pub fn json_response(value: &Value) -> Response {
    let mut response = Response::new(value.to_string().into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// In the extensions of a response to what no route took, whose path is not known where it is made.
#[derive(Clone)]
pub struct Unrouted(pub ApiError);

/// What no route took.
pub async fn recover(rejection: Rejection) -> Result<Response, Infallible> {
    let error = if rejection.is_not_found() {
        ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this path; the API is under /v1")
            .with_code("not_found")
    } else if rejection.find::<MethodNotAllowed>().is_some() {
        let message = "this path does not take this method";
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed")
    } else if let Some(header) = rejection.find::<InvalidHeader>() {
        ApiError::new(StatusCode::BAD_REQUEST, header.to_string())
    } else if rejection.find::<InvalidQuery>().is_some() {
        let message = "what follows the ? of this address cannot be read: after is a number, model a name";
        ApiError::new(StatusCode::BAD_REQUEST, message).with_code("invalid_query")
    } else {
        tracing::error!(?rejection, "a rejection without an answer");
        ApiError::internal("the server met an error of its own")
    };
    let mut response = error.response("");
    response.extensions_mut().insert(Unrouted(error));
    Ok(response)
}
