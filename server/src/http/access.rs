//! Who may ask: the name a request was sent to, the web page it comes from, the key it shows.
//!
//! Invariant: no route sees a request that was not admitted here; what is open to everybody is in one list. Keys can be
//! replaced while requests run.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, PoisonError, RwLock};

use fullbore_engine::request::Share;
use warp::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN, VARY,
};
use warp::http::uri::Authority;
use warp::http::{Method, Request, StatusCode};
use warp::reply::Response;

use super::error::ApiError;
use super::keys::{Holder, Keys};
use super::page;
use super::peers;
use super::proxies::Proxies;
use super::rates::Meter;

/// What a server that was told nothing does: everybody may ask, by any name, and no other site's pages.
#[derive(Debug, Default)]
pub struct Access {
    keys: RwLock<Arc<Keys>>,
    /// Names that requests may be sent to; `None` is any.
    hosts: Option<Vec<String>>,
    /// Of web pages that may read answers; `*` is any.
    origins: Vec<String>,
    proxies: Proxies,
}

/// Who asks, as routes see it.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// The key's holder; where keys are not checked, the key that was shown.
    pub name: Option<Arc<str>>,
    pub share: Option<Share>,
    /// Where the key's rate is bounded.
    pub meter: Option<Arc<Meter>>,
    pub origin: Origin,
}

/// Whose the work for a request is, where work is shared: nobody has several by saying so.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Of the holder of a key that was checked.
    Key(Arc<str>),
    /// As [`peers::network`] has it.
    Network(IpAddr),
}

impl Default for Origin {
    /// This machine.
    fn default() -> Origin {
        Origin::Network(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }
}

/// Whoever may reach the port may see that it is alive; and have the page, which asks for a key itself.
const OPEN_PATHS: [&str; 4] = ["/health", "/health/live", "/health/ready", "/ping"];

/// What probes ask over gRPC.
const GRPC_HEALTH: &str = "/grpc.health.v1.Health/Check";
/// By gRPC everything is posted.
const LOOKS: [&str; 2] = ["/grpc.health.v1.Health/", "/vllm.Control/"];

/// Anthropic's clients show their key here.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

impl Access {
    /// A server on the loopback address `host` is asked by loopback's own names and `allowed_hosts` alone: another
    /// site's page whose name was pointed at this machine is turned away (DNS rebinding).
    pub fn new(host: IpAddr, keys: Keys, allowed_hosts: &[String], origins: &[String]) -> Access {
        let hosts = host.is_loopback() && !allowed_hosts.iter().any(|host| host == "*");
        let hosts = hosts.then(|| allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect());
        Access { keys: RwLock::new(Arc::new(keys)), hosts, origins: origins.to_vec(), proxies: Proxies::default() }
    }

    /// Has `proxies` say for whom they ask.
    pub fn with_proxies(self, proxies: Proxies) -> Access {
        Access { proxies, ..self }
    }

    /// Whether a connection from `address` may be many clients'.
    pub fn is_proxy(&self, address: IpAddr) -> bool {
        self.proxies.trust(address)
    }

    /// From the next request on.
    pub fn replace_keys(&self, keys: Keys) {
        let mut current = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(keys.with_meters_of(&current));
    }

    /// Who asks by a connection from `address`.
    pub fn admit<B>(&self, request: &Request<B>, address: IpAddr) -> Result<Client, ApiError> {
        let shown = key(request.headers());
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        if keys.is_empty() {
            let origin = Origin::Network(peers::network(self.proxies.client(address, request.headers())));
            return Ok(Client { name: shown.map(Arc::from), origin, ..Client::default() });
        }
        match shown.and_then(|key| keys.holder(key)) {
            Some(holder) => {
                let Holder { name, share, meter } = holder.clone();
                Ok(Client { origin: Origin::Key(name.clone()), name: Some(name), share, meter })
            }
            None if is_open(request) => Ok(Client::default()),
            None => Err(ApiError::no_key(shown.is_some())),
        }
    }

    /// Whether browsers may send requests to this name.
    pub fn check_host<B>(&self, request: &Request<B>) -> Result<(), ApiError> {
        let Some(allowed) = &self.hosts else { return Ok(()) };
        let asked = request.uri().authority().map(Authority::as_str);
        let asked = asked.or(request.headers().get(HOST).and_then(|host| host.to_str().ok())).unwrap_or_default();
        let name = asked.parse::<Authority>().map(|authority| authority.host().to_ascii_lowercase());
        let name = name.unwrap_or_default();
        let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let loopback = name == "localhost" || name.ends_with(".localhost") || address.is_ok_and(|ip| ip.is_loopback());
        match loopback || allowed.contains(&name) {
            true => Ok(()),
            false => Err(ApiError::wrong_host(asked)),
        }
    }

    /// What a browser asks before it lets another site's page ask: answered without a key, which it does not show.
    pub fn preflight<B>(&self, request: &Request<B>) -> Option<Response> {
        let origin = self.allowed_origin(request)?;
        if request.method() != Method::OPTIONS {
            return None;
        }
        let mut response = Response::new(String::new().into());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        // Official clients have many of their own; the page that may ask may say what it likes.
        let asked = request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.unwrap_or(HeaderValue::from_static(USUAL_HEADERS)));
        headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        allow(headers, origin);
        Some(response)
    }

    /// The page that asks, where it may read the answer.
    pub fn allowed_origin<B>(&self, request: &Request<B>) -> Option<HeaderValue> {
        let origin = request.headers().get(ORIGIN)?;
        let allowed = |known: &String| known == "*" || origin.to_str().is_ok_and(|origin| origin == known);
        self.origins.iter().any(allowed).then(|| origin.clone())
    }
}

const USUAL_HEADERS: &str = "authorization, content-type, x-api-key, anthropic-version";

pub fn allow(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(VARY, HeaderValue::from_static("origin"));
}

/// Whether it counts against its client's rate: what is only looked at does not.
pub fn is_work<B>(request: &Request<B>) -> bool {
    let path = request.uri().path();
    request.method() == Method::POST && !LOOKS.iter().any(|look| path.starts_with(look))
}

fn is_open<B>(request: &Request<B>) -> bool {
    let path = request.uri().path();
    path == GRPC_HEALTH
        || [Method::GET, Method::HEAD].contains(request.method()) && (OPEN_PATHS.contains(&path) || page::is_at(path))
}

fn key(headers: &HeaderMap) -> Option<&str> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let plain = text(X_API_KEY).map(str::trim).filter(|key| !key.is_empty());
    text(AUTHORIZATION).and_then(bearer_key).or(plain)
}

/// What follows `Bearer` in an Authorization header, if that is what it has.
fn bearer_key(authorization: &str) -> Option<&str> {
    let (scheme, key) = authorization.trim().split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: &[(&str, &str)]) -> Request<()> {
        let request = Request::get("/v1/models");
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.body(()).expect("a request")
    }

    #[test]
    fn a_key_is_read_off_its_header() {
        let keys = ["Bearer secret", "bearer  secret ", "Bearer a b"].map(bearer_key);
        assert_eq!(keys, [Some("secret"), Some("secret"), Some("a b")]);
        assert_eq!(["Basic secret", "Bearer", "Bearer ", "", "secret"].map(bearer_key), [None; 5]);
    }

    #[test]
    fn loopback_is_asked_by_its_own_names() {
        let local = IpAddr::from([127, 0, 0, 1]);
        let access = Access::new(local, Keys::default(), &["Models.home".to_owned()], &[]);
        let admitted = |host: &str| access.check_host(&request(&[("host", host)])).is_ok();
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.8.8.8", "[::1]:80", "app.localhost", "models.home:80"]
        {
            assert!(admitted(host), "{host}");
        }
        for host in
            ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil", "", "10.0.0.1", "a b"]
        {
            assert!(!admitted(host), "{host}");
        }
        assert!(access.check_host(&request(&[])).is_err(), "no host at all");
        let open = Access::new(IpAddr::from([0, 0, 0, 0]), Keys::default(), &[], &[]);
        assert!(open.check_host(&request(&[("host", "gpu-box.lan")])).is_ok());
    }
}
