//! The chat page: three files in the binary. Invariant: the page loads nothing from elsewhere, and its policy says so.

use warp::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use warp::reply::Response;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub fn page() -> Response {
    asset("text/html; charset=utf-8", include_str!("../page.html"))
}

pub fn script() -> Response {
    asset("text/javascript; charset=utf-8", include_str!("../page.js"))
}

pub fn style() -> Response {
    asset("text/css; charset=utf-8", include_str!("../page.css"))
}

fn asset(content_type: &'static str, text: &'static str) -> Response {
    let mut response = Response::new(text.into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
