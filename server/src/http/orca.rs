//! How full the server is, in a header of each answer to who asks for it: ORCA's named metrics, as vLLM tells them to
//! proxies that weigh their backends. Invariant: numbers are those of `/metrics`.

use std::sync::Arc;

use serde_json::json;
use warp::http::HeaderMap;
use warp::http::header::{HeaderName, HeaderValue};

use crate::api::ServedModel;

/// Of the request: TEXT or JSON.
const FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
const METRICS: HeaderName = HeaderName::from_static("endpoint-load-metrics");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

/// What a request asks for. `None` where it asks for nothing that is known.
pub fn asked(headers: &HeaderMap) -> Option<Format> {
    let format = headers.get(FORMAT)?.to_str().ok()?.trim();
    let is = |name: &str| format.eq_ignore_ascii_case(name);
    is("TEXT").then_some(Format::Text).or(is("JSON").then_some(Format::Json))
}

/// The fullest model's cache, and what waits for all.
pub fn tell(headers: &mut HeaderMap, format: Format, models: &[Arc<ServedModel>]) {
    let usage = models.iter().map(|model| model.engine.kv_usage()).fold(0.0, f64::max);
    let num_waiting: u64 = models.iter().map(|model| model.engine.num_waiting()).sum();
    let told = match format {
        Format::Text => {
            format!("TEXT named_metrics.kv_cache_usage_perc={usage}, named_metrics.num_requests_waiting={num_waiting}")
        }
        Format::Json => {
            let metrics = json!({"kv_cache_usage_perc": usage, "num_requests_waiting": num_waiting});
            format!("JSON {}", json!({"named_metrics": metrics}))
        }
    };
    headers.insert(METRICS, HeaderValue::try_from(told).expect("numbers and words"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_no_known_format_is_told_nothing() {
        let asked = |format: &'static str| {
            let headers = [(FORMAT, HeaderValue::from_static(format))];
            asked(&HeaderMap::from_iter(headers))
        };
        assert_eq!(
            [asked("TEXT"), asked("text "), asked("JSON")],
            [Some(Format::Text), Some(Format::Text), Some(Format::Json)]
        );
        assert_eq!([asked("BIN"), asked(""), super::asked(&HeaderMap::new())], [None; 3]);
    }
}
