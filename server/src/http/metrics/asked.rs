//! What a request asked for, in words that are few: whatever clients make up, the labels of `/metrics` are these.

use std::time::Instant;

use warp::http::{Method, Request};

pub struct Asked {
    pub since: Instant,
    /// `None` where it is not counted: the page, health and metrics.
    handler: Option<&'static str>,
    method: &'static str,
}

/// Paths of the API; what is below one that ends with a slash is as it.
const HANDLERS: [&str; 20] = [
    "/v1/chat/completions",
    "/v1/chat/completions/render",
    "/v1/completions",
    "/v1/completions/render",
    "/v1/embeddings",
    "/v1/limits",
    "/v1/live",
    "/v1/loads",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/models/",
    "/v1/responses",
    "/apply-template",
    "/detokenize",
    "/load",
    "/openapi.json",
    "/tokenize",
    "/tokenizer_info",
    "/version",
];
/// Of gRPC, where everything is posted.
const SERVICES: [&str; 3] = ["/vllm.Inference/Generate", "/vllm.Inference/GenerateStream", "/vllm.Control/"];
/// As vLLM, which counts what is asked of people's probes and scrapers nowhere.
const UNCOUNTED: [&str; 6] = ["/health", "/ping", "/metrics", "/page", "/favicon.ico", "/grpc.health.v1.Health"];

impl Asked {
    pub fn new<B>(request: &Request<B>) -> Asked {
        let method = match *request.method() {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::OPTIONS => "OPTIONS",
            _ => "other",
        };
        Asked { since: Instant::now(), handler: handler(request.uri().path()), method }
    }

    /// Handler and method.
    pub fn labels(&self) -> Option<[&'static str; 2]> {
        self.handler.map(|handler| [handler, self.method])
    }
}

fn handler(path: &str) -> Option<&'static str> {
    let is_of = |place: &str| path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if path == "/" || UNCOUNTED.iter().any(|place| is_of(place)) {
        return None;
    }
    let known = |known: &&&str| path == **known || known.ends_with('/') && path.starts_with(**known);
    Some(HANDLERS.iter().chain(&SERVICES).find(known).copied().unwrap_or("none"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::openapi;

    #[test]
    fn handlers_are_the_paths_of_the_api() {
        let document = openapi::document();
        let paths = document["paths"].as_object().expect("paths").keys();
        let told: Vec<&str> = paths.map(|path| path.trim_end_matches("{model}")).collect();
        for path in told.iter().filter(|path| UNCOUNTED.iter().all(|place| !path.starts_with(place))) {
            assert_eq!(handler(path), Some(*path), "{path}");
        }
        assert!(HANDLERS.iter().all(|known| told.contains(known)));
        assert_eq!(handler("/v1/models/owner/name"), Some("/v1/models/"));
        assert_eq!(handler("/vllm.Control/Abort"), Some("/vllm.Control/"));
        for made_up in ["/vllm.Inference/X", "/v1/modelsx", "/v2", "/healthy", "//", "/v1/completions/x"] {
            assert_eq!(handler(made_up), Some("none"), "{made_up}");
        }
        for uncounted in ["/", "/health", "/health/ready", "/metrics", "/page/chat.js"] {
            assert_eq!(handler(uncounted), None, "{uncounted}");
        }
    }
}
