//! Errors as gRPC has them. Invariant: the sentence is HTTP's, and whoever may come again is told when.

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use warp::http::StatusCode;

use crate::http::error::ApiError;

/// As gRPC's own gateways translate them.
pub fn status(error: &ApiError) -> Status {
    let code = match error.status {
        _ if error.code == Some("aborted") => Code::Cancelled,
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::NOT_FOUND if error.code == Some(ApiError::NO_SERVICE) => Code::Unimplemented,
        StatusCode::NOT_FOUND => Code::NotFound,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::PAYLOAD_TOO_LARGE => Code::ResourceExhausted,
        StatusCode::REQUEST_TIMEOUT => Code::DeadlineExceeded,
        StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
        status if status.is_server_error() => Code::Internal,
        _ => Code::InvalidArgument,
    };
    let mut metadata = MetadataMap::new();
    if let Some(seconds) = error.retry_after {
        metadata.insert("retry-after", MetadataValue::from(seconds));
    }
    Status::with_metadata(code, error.message.clone(), metadata)
}

/// What the contract has and this server has not.
pub fn unsupported<T>(what: &str) -> Result<T, Status> {
    Err(Status::unimplemented(format!("{what} is not supported by this server")))
}
