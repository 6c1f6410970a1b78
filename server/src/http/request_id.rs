//! What an answer is known by: the name that the client or a router gave its request, else the answer's own, which the
//! log has too. Invariant: every answer has one, also a refusal.

use warp::http::header::{HeaderMap, HeaderName, HeaderValue};
use warp::http::{Request, Response};

use crate::start::random;

/// OpenAI's, and routers'.
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Anthropic's.
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// In the extensions of a response: what its answer calls itself.
#[derive(Clone, Debug)]
pub struct AnswerId(pub String);

/// As the client has it, and whether he speaks Anthropic's dialect.
pub struct Asked {
    id: Option<HeaderValue>,
    is_anthropic: bool,
}

impl Asked {
    pub fn of<B>(request: &Request<B>) -> Asked {
        let is_anthropic = super::error::is_anthropic(request.uri().path());
        Asked { id: request.headers().get(X_REQUEST_ID).cloned(), is_anthropic }
    }

    pub fn tell<B>(self, response: &mut Response<B>) {
        let own = response.extensions().get::<AnswerId>().and_then(|AnswerId(id)| HeaderValue::from_str(id).ok());
        let id = self.id.or(own).unwrap_or_else(|| {
            let id = format!("req_{:016x}{:08x}", random(), random() as u32);
            HeaderValue::from_str(&id).expect("letters and digits")
        });
        let headers: &mut HeaderMap = response.headers_mut();
        if self.is_anthropic {
            headers.insert(REQUEST_ID, id.clone());
        }
        headers.insert(X_REQUEST_ID, id);
    }
}
