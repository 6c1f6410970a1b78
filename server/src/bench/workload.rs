//! What the benches do with the requests that the command line describes: leave out what cannot run, say what is left,
//! and warm up.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use fullbore_bench::workload::PlannedRequest;
use serde_json::{Value, json};

use super::BenchCommandError;
use super::model_files::sha256;
use crate::args::WorkloadArgs;

/// Leaves out what no slot could ever hold; says how many.
pub fn leave_out_too_long(requests: &mut Vec<PlannedRequest>, max_model_len: u64) -> Result<usize, BenchCommandError> {
    let length = |request: &PlannedRequest| u64::from(request.prompt_tokens) + u64::from(request.output_tokens);
    let before = requests.len();
    requests.retain(|request| length(request) <= max_model_len);
    match requests.is_empty() {
        true => Err(BenchCommandError::AllTooLong(before, max_model_len)),
        false => Ok(before - requests.len()),
    }
}

/// What was described and is not asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeftOut {
    pub too_long: usize,
    /// Rows of a trace.
    pub without_output: usize,
}

/// Of `requests`, as a result file tells it.
pub fn described(of: &WorkloadArgs, requests: &[&PlannedRequest], left_out: LeftOut) -> BTreeMap<String, Value> {
    let mean = |length: fn(&PlannedRequest) -> u32| {
        requests.iter().map(|request| f64::from(length(request))).sum::<f64>() / requests.len().max(1) as f64
    };
    let trace = of.trace.as_deref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
    let warn = |path: &Path, error: io::Error| tracing::warn!("the result lacks {}: {error}", path.display());
    let trace_sha256 = of.trace.as_deref().and_then(|path| sha256(path).map_err(|error| warn(path, error)).ok());
    let fields = [
        ("lengths", json!(trace.clone().unwrap_or_else(|| of.lengths.to_string()))),
        ("trace", json!(trace)),
        ("trace_sha256", json!(trace_sha256)),
        ("left_out_too_long", json!(left_out.too_long)),
        ("left_out_without_output", json!(left_out.without_output)),
        ("prompt_tokens_mean", json!(mean(|request| request.prompt_tokens))),
        ("output_tokens_mean", json!(mean(|request| request.output_tokens))),
        ("shares_prefixes", json!(requests.iter().any(|request| request.shares_prefix()))),
    ];
    fields.map(|(name, value)| (name.to_owned(), value)).into()
}

/// The first `num_requests` with short answers, all at once.
pub fn warm_up(requests: &[PlannedRequest], num_requests: usize) -> Vec<PlannedRequest> {
    let short = |request: &PlannedRequest| PlannedRequest {
        arrival: Duration::ZERO,
        follows: None,
        output_tokens: request.output_tokens.min(WARM_UP_TOKENS),
        ..request.clone()
    };
    requests.iter().take(num_requests).map(short).collect()
}

const WARM_UP_TOKENS: u32 = 4;
/// Into a run's seed: so that no prompt of it has been seen.
pub const WARM_UP_SEED: u64 = 0x5741_524d;
