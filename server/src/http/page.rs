//! The page: its files are in the binary, the document at `/` and the rest below `/page/`. Invariant: the page loads
//! nothing from elsewhere, and its policy says so. Nothing here is secret: whoever reaches the port may have it.

use warp::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use warp::reply::Response;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const FOLDER: &str = "/page/";
const FILES: [(&str, &str); 11] = [
    ("page.css", include_str!("../page/page.css")),
    ("chat.css", include_str!("../page/chat.css")),
    ("live.css", include_str!("../page/live.css")),
    ("page.js", include_str!("../page/page.js")),
    ("server.js", include_str!("../page/server.js")),
    ("markdown.js", include_str!("../page/markdown.js")),
    ("conversation.js", include_str!("../page/conversation.js")),
    ("chat.js", include_str!("../page/chat.js")),
    ("history.js", include_str!("../page/history.js")),
    ("chart.js", include_str!("../page/chart.js")),
    ("live.js", include_str!("../page/live.js")),
];

pub fn page() -> Response {
    asset("text/html; charset=utf-8", include_str!("../page/page.html"))
}

/// A file of the page, by its name below `/page/`.
pub fn file(name: &str) -> Option<Response> {
    let (name, text) = FILES.into_iter().find(|(known, _)| *known == name)?;
    let content_type =
        if name.ends_with(".css") { "text/css; charset=utf-8" } else { "text/javascript; charset=utf-8" };
    Some(asset(content_type, text))
}

/// Whether the page or one of its files is at this path.
pub fn is_at(path: &str) -> bool {
    path == "/" || path.strip_prefix(FOLDER).is_some_and(|name| FILES.iter().any(|(known, _)| *known == name))
}

fn asset(content_type: &'static str, text: &'static str) -> Response {
    let mut response = Response::new(text.into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    // The next version of the server has other files by the same names.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
