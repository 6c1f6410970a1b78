//! The doctor: what a change of flags would bring, by the planner and prices that were measured on the device.
//!
//! Invariant: a gain is a ratio of two simulations of the same requests, so that what the prices have wrong in both
//! says nothing. Nothing here opens a device, and nothing here measures.

use std::time::Duration;

use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::DeviceProfile;
use fullbore_engine::tensor::KvType;

use crate::play::{Clock, PlayOptions, play_read};
use crate::reading::{Reading, TextPrice};
use crate::report::ServingReport;
use crate::result::{Advice, Change, Diagnosis};
use crate::simulate::{SimulateError, engine};
use crate::workload::PlannedRequest;

/// A way to serve.
#[derive(Clone, Debug)]
pub struct Case {
    /// What makes it so, as people say it.
    pub change: String,
    pub config: EngineConfig,
    /// Of prompts that come as texts.
    pub text: Option<TextPrice>,
}

/// A change that brings less is not worth it.
pub const LEAST_GAIN: f64 = 1.05;
/// Of what the best change brings, the first of the list that brings so much is taken.
const ENOUGH: f64 = 0.9;

/// What `case` would do on the device of `profile`.
pub fn predict(
    profile: &DeviceProfile,
    case: &Case,
    requests: &[PlannedRequest],
) -> Result<ServingReport, SimulateError> {
    // Of the stand-in's heads not every type of cache can be made; what a block holds is in the config.
    let config = EngineConfig { kv_type: KvType::F16, ..case.config };
    let (mut engine, clock) = engine(profile, config)?;
    let (since, host_per_step) = (clock.now(), Duration::from_nanos(profile.host_ns_per_step));
    let clock = Clock::Simulated { clock, since, host_per_step };
    let reading = match case.text {
        Some(price) => Reading::priced(requests, price),
        None => Reading::of_ids(requests),
    };
    Ok(play_read(&mut engine, requests, &clock, PlayOptions::default(), &reading)?)
}

/// Requests for about so much time, `least` of them at least; `generate` makes as many as it is asked for.
pub fn fill(
    profile: &DeviceProfile,
    case: &Case,
    least: u32,
    time: Duration,
    generate: impl Fn(u32) -> Vec<PlannedRequest>,
) -> Result<Vec<PlannedRequest>, SimulateError> {
    let mut num_requests = least;
    loop {
        let requests = generate(num_requests);
        let took_s = predict(profile, case, &requests)?.duration_s;
        if took_s >= time.as_secs_f64() || num_requests >= MAX_REQUESTS || requests.len() < num_requests as usize {
            return Ok(requests);
        }
        // Straight for it, and a little beyond.
        let times = (time.as_secs_f64() / took_s.max(1e-9) * 1.1).clamp(1.2, 8.0);
        num_requests = ((f64::from(num_requests) * times).ceil() as u32).min(MAX_REQUESTS);
    }
}

const MAX_REQUESTS: u32 = 1 << 14;

/// What was simulated of a device.
pub struct Forecast {
    /// As it is.
    pub before: ServingReport,
    /// In the order in which they are preferred.
    pub changes: Vec<(Case, ServingReport)>,
}

impl Forecast {
    pub fn new(
        profile: &DeviceProfile,
        as_it_is: &Case,
        changes: Vec<Case>,
        requests: &[PlannedRequest],
    ) -> Result<Forecast, SimulateError> {
        let predicted = |case: Case| predict(profile, &case, requests).map(|report| (case, report));
        let changes = changes.into_iter().map(predicted).collect::<Result<_, _>>()?;
        Ok(Forecast { before: predict(profile, as_it_is, requests)?, changes })
    }

    fn gain(&self, report: &ServingReport) -> f64 {
        report.output_tokens_per_s / self.before.output_tokens_per_s.max(1e-9)
    }

    /// What to change, if anything is worth it.
    pub fn chosen(&self) -> Option<&(Case, ServingReport)> {
        let best = self.changes.iter().map(|(_, report)| self.gain(report)).fold(LEAST_GAIN, f64::max);
        let enough = (1.0 + (best - 1.0) * ENOUGH).max(LEAST_GAIN);
        self.changes.iter().find(|(_, report)| self.gain(report) >= enough)
    }

    /// In words and numbers: `before` was measured as it is, `after` with what is chosen.
    pub fn diagnosis(&self, as_it_is: &Case, before: &[ServingReport], after: &[ServingReport]) -> Diagnosis {
        let rate = median_rate(before);
        let advice = self.chosen().map(|(case, report)| Advice {
            change: case.change.clone(),
            predicted_gain: self.gain(report),
            predicted_itl_p99_ms: [self.before.itl_ms.p99, report.itl_ms.p99],
            measured_gain: median_rate(after).zip(rate).map(|(after, before)| after / before.max(1e-9)),
            then: limit_of(case, report).1,
        });
        let reads_less = self.chosen().is_some_and(|(case, _)| case.text.is_none() && as_it_is.text.is_some());
        let last = before.last().unwrap_or(&self.before);
        let (limit, verdict) = match as_it_is.text {
            Some(price) if reads_less => ("text".to_owned(), text_verdict(price)),
            _ => limit_of(as_it_is, last),
        };
        let changes = self.changes.iter().map(|(case, report)| {
            let (change, predicted_gain) = (case.change.clone(), self.gain(report));
            Change { change, predicted_gain }
        });
        Diagnosis {
            limit,
            verdict,
            output_tokens_per_s: rate.unwrap_or(0.0),
            predicted_output_tokens_per_s: self.before.output_tokens_per_s,
            changes: changes.collect(),
            advice,
        }
    }
}

/// A cause by its name, and in a sentence.
fn limit_of(case: &Case, report: &ServingReport) -> (String, String) {
    let prompts_per_s = report.prompt_tokens as f64 / report.duration_s.max(1e-9);
    match case.text {
        Some(price) if report.limits.limit == "no_requests" && prompts_per_s > BUSY * price.tokens_per_s() => {
            ("text".to_owned(), text_verdict(price))
        }
        _ => (report.limits.limit.to_owned(), report.limits.verdict.clone()),
    }
}

/// Readers that are at it for more of the time hold up the rest.
const BUSY: f64 = 0.5;

fn text_verdict(price: TextPrice) -> String {
    format!(
        "text: the tokenizer reads {:.0} prompt tokens a second on {} thread{}, fewer than the device takes",
        price.tokens_per_s(),
        price.num_threads,
        if price.num_threads == 1 { "" } else { "s" }
    )
}

fn median_rate(reports: &[ServingReport]) -> Option<f64> {
    let mut rates: Vec<f64> = reports.iter().map(|report| report.output_tokens_per_s).collect();
    crate::statistics::median(&mut rates)
}
