//! Servers measured over HTTP by one client: one load after the other, run by run, turn and turn about between targets.
//!
//! Invariant: every target gets the same requests in the same run, so that a machine that drifts hurts all alike. Only
//! whole runs are kept. Nothing here starts a server.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::http::client::on_client_thread;
use crate::http::process::CpuTimes;
use crate::result::{BenchResult, Measurement, Run, Target};
use crate::workload::PlannedRequest;
use chat::Chat;
use endpoint::{Endpoint, EndpointError, Failure};
use load::{Ask, Manners, Pace, drive};
use tally::{Facts, Slo, tally};

pub mod card;
pub mod chat;
mod constrained;
pub mod endpoint;
pub mod events;
pub mod load;
pub mod tally;
pub mod tls;

/// A server, and what is written of it.
pub struct Side {
    pub endpoint: Arc<Endpoint>,
    /// What requests call the model.
    pub model: String,
    pub record: Target,
    /// Fields that its requests have beside the others', or do not have: those that are null.
    pub extra: Map<String, Value>,
    /// It says where its device's time goes.
    pub is_fullbore: bool,
}

/// One load: requests in the order of their arrival, and how they are sent.
#[derive(Clone, Debug)]
pub struct Level {
    /// What tells it from others, such as `concurrency`.
    pub at: BTreeMap<String, f64>,
    pub requests: Vec<PlannedRequest>,
    pub pace: Pace,
}

/// What requests are made of.
#[derive(Clone)]
pub struct Prompts {
    /// Token ids are drawn below this.
    pub vocab_size: u32,
    pub seed: u64,
    pub form: Form,
    /// Answers follow a schema of JSON, and end where it ends.
    pub is_constrained: bool,
    /// Token ids as a text, and tokens of a text, where a tokenizer is there.
    pub text: Option<Arc<dyn TextOf>>,
}

pub trait TextOf: Send + Sync {
    fn text(&self, ids: &[u32]) -> String;
    fn num_tokens(&self, text: &str) -> usize;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `/v1/completions`, prompts as token ids.
    Ids,
    /// The same with text.
    Text,
    /// `/v1/chat/completions`.
    Chat(Chat),
}

#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    pub num_runs: u32,
    /// Requests that each target gets before anything is measured.
    pub num_warm_up: u32,
    pub slo: Slo,
    /// Between an answer and the next turn of its conversation.
    pub think: Duration,
    /// For the next event of an answer.
    pub patience: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeBenchError {
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error("the client's thread cannot be started: {0}")]
    Thread(#[from] io::Error),
    #[error("{target}: no request of the warm-up was answered; the last: {failure}")]
    WarmUp { target: String, failure: Failure },
    #[error("interrupted before a run was whole: there is nothing to tell")]
    Nothing,
}

/// Told after each whole run of a target.
pub type Progress<'a> = &'a mut (dyn FnMut(&str, &BTreeMap<String, f64>, u32, &Run) + Send);

/// Whether a load still has to be measured, given the measurements so far, those of the last load at the end.
pub type GoesOn<'a> = &'a (dyn Fn(&[Measurement]) -> bool + Sync);

/// Measures every level on every side and fills in `result`; once `stop` is there it ends with what is whole.
pub fn measure(
    bench: Bench,
    levels: &[Level],
    goes_on: GoesOn,
    progress: Progress,
    stop: impl Future<Output = ()> + Send,
    result: &mut BenchResult,
) -> Result<(), ServeBenchError> {
    result.targets = bench.sides.iter().map(|side| side.record.clone()).collect();
    let measurements = &mut result.measurements;
    let is_whole = on_client_thread("client", move || async move {
        tokio::select! {
            measured = bench.levels(levels, goes_on, progress, measurements) => measured.map(|()| true),
            () = stop => Ok(false),
        }
    })??;
    match is_whole {
        true => result.finish(),
        false => result.interrupt(),
    }
    if result.measurements.is_empty() { Err(ServeBenchError::Nothing) } else { Ok(()) }
}

/// Who is measured, with what and how often.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    pub sides: &'a [Side],
    pub prompts: &'a Prompts,
    pub options: &'a ServeOptions,
}

impl Bench<'_> {
    async fn levels(
        &self,
        levels: &[Level],
        goes_on: GoesOn<'_>,
        progress: Progress<'_>,
        measurements: &mut Vec<Measurement>,
    ) -> Result<(), ServeBenchError> {
        for side in self.sides {
            self.warm_up(side, &levels[0]).await?;
        }
        for (nth, level) in (0..).zip(levels) {
            if nth > 0 && !goes_on(measurements) {
                break;
            }
            let first = measurements.len();
            let empty = |side: &Side| {
                let (target, at) = (side.record.name.clone(), level.at.clone());
                Measurement { target, at, ..Measurement::default() }
            };
            measurements.extend(self.sides.iter().map(empty));
            for run in 0..self.options.num_runs {
                // Who begins changes from run to run.
                let mut order: Vec<usize> = (0..self.sides.len()).collect();
                if run % 2 == 1 {
                    order.reverse();
                }
                let seed = self.prompts.seed ^ ((1 + u64::from(run) + (nth << 20)) << 24);
                for index in order {
                    let measured = self.run(&self.sides[index], level, seed).await;
                    progress(&self.sides[index].record.name, &level.at, run + 1, &measured);
                    measurements[first + index].runs.push(measured);
                }
            }
        }
        Ok(())
    }

    async fn warm_up(&self, side: &Side, level: &Level) -> Result<(), ServeBenchError> {
        let num_warm_up = (self.options.num_warm_up as usize).min(level.requests.len());
        let requests = level.requests[..num_warm_up].iter().map(|request| {
            let (arrival, output_tokens) = (Duration::ZERO, request.output_tokens.min(WARM_UP_TOKENS));
            PlannedRequest { arrival, output_tokens, follows: None, ..request.clone() }
        });
        let requests: Vec<_> = requests.collect();
        let asks = Arc::new(self.prompts.asks(side, &requests, self.prompts.seed ^ WARM_UP_SEED));
        let manners = Manners { think: Duration::ZERO, patience: self.options.patience };
        let outcomes = drive(side.endpoint.clone(), asks, Pace::Closed(2), manners).await;
        let mut results = outcomes.into_iter().flatten().map(|outcome| outcome.result).peekable();
        if results.peek().is_none() {
            return Ok(());
        }
        match results.try_fold(None, |_, result| result.err().map(Some)) {
            Some(Some(failure)) => Err(ServeBenchError::WarmUp { target: side.record.name.clone(), failure }),
            _ => Ok(()),
        }
    }

    async fn run(&self, side: &Side, level: &Level, seed: u64) -> Run {
        let ServeOptions { slo, think, patience, .. } = *self.options;
        let asks = Arc::new(self.prompts.asks(side, &level.requests, seed));
        let seconds_before = self.device_seconds(side).await;
        let (client_before, resent_before, begun) = (client_time(), side.endpoint.num_resent(), Instant::now());
        let outcomes = drive(side.endpoint.clone(), asks.clone(), level.pace, Manners { think, patience }).await;
        let client = client_time().zip(client_before).map(|(after, before)| after.saturating_sub(before));
        let num_resent = side.endpoint.num_resent() - resent_before;
        let mut device_seconds = self.device_seconds(side).await;
        device_seconds.iter_mut().for_each(|(cause, s)| *s -= seconds_before.get(cause).copied().unwrap_or(0.0));
        let tokenizer = self.prompts.text.as_ref().map(|text| |of: &str| text.num_tokens(of));
        let tokenizer = tokenizer.as_ref().map(|tokenizer| tokenizer as &dyn Fn(&str) -> usize);
        let shares_prefixes = level.requests.iter().any(|request| request.shares_prefix());
        let facts = Facts { begun, slo, tokenizer, shares_prefixes, client, num_resent, device_seconds };
        tally(&asks, &outcomes, &facts)
    }

    async fn device_seconds(&self, side: &Side) -> BTreeMap<String, f64> {
        match side.is_fullbore {
            true => side.endpoint.device_seconds(&side.model, self.options.patience).await,
            false => BTreeMap::new(),
        }
    }
}

/// Of an answer before anything is measured.
const WARM_UP_TOKENS: u32 = 8;
const WARM_UP_SEED: u64 = 0x5741_524d;

/// Time that the client's thread had a core for, since its start.
fn client_time() -> Option<Duration> {
    CpuTimes::now().since(&CpuTimes::default()).get("client").copied().map(Duration::from_nanos)
}

impl Prompts {
    /// `requests` as `side` is sent them.
    fn asks(&self, side: &Side, requests: &[PlannedRequest], seed: u64) -> Vec<Ask> {
        let places: HashMap<u32, usize> = requests.iter().map(|request| request.row).zip(0..).collect();
        let ask = |request: &PlannedRequest| {
            // One whose turn before was left out begins.
            let follows = request.follows.and_then(|row| places.get(&row).copied());
            Ask { follows, ..self.ask(side, request, seed) }
        };
        requests.iter().map(ask).collect()
    }

    fn ask(&self, side: &Side, request: &PlannedRequest, seed: u64) -> Ask {
        let ids: Vec<u32> = request.request(self.vocab_size, seed).prompt.iter().map(|id| id.0).collect();
        let text = |ids: &[u32]| self.text.as_ref().expect("texts are made by a tokenizer").text(ids);
        let (path, mut body) = match self.form {
            Form::Ids => ("/v1/completions", json!({"prompt": ids})),
            Form::Text => ("/v1/completions", json!({"prompt": text(&ids)})),
            Form::Chat(chat) => ("/v1/chat/completions", chat.fields(request, &ids, &text)),
        };
        let mut put = |name: &str, value: Value| body[name] = value;
        put("model", json!(side.model));
        put("max_tokens", json!(request.output_tokens));
        put("temperature", json!(0));
        put("stream", json!(true));
        put("stream_options", json!({"include_usage": true}));
        put("return_token_ids", json!(true));
        match self.is_constrained {
            true => {
                let schema: Value = serde_json::from_str(constrained::SCHEMA).expect("it is ours");
                let schema = json!({"name": "answer", "schema": schema, "strict": true});
                put("response_format", json!({"type": "json_schema", "json_schema": schema}));
            }
            false => put("ignore_eos", json!(true)),
        }
        side.extra.iter().for_each(|(name, value)| put(name, value.clone()));
        // Some servers refuse what they do not know, and `null` too.
        let fields = body.as_object_mut().expect("it is one");
        fields.retain(|name, _| !side.extra.get(name).is_some_and(Value::is_null));
        Ask {
            due: request.arrival,
            follows: None,
            path,
            body: Bytes::from(body.to_string()),
            prompt_tokens: request.prompt_tokens,
            max_tokens: request.output_tokens,
            is_constrained: self.is_constrained,
        }
    }
}

/// More load brings less than this share more tokens a second: the knee is behind.
const KNEE_GAIN: f64 = 0.05;

/// The load at which a target gives about all that it can: the least whose rate is within [`KNEE_GAIN`] of the best;
/// `None` where it gives nothing, or the last load still brought more.
pub fn knee<'a>(target: &str, metric: &str, measurements: &'a [Measurement]) -> Option<&'a Measurement> {
    let rate = |measurement: &Measurement| median_of(measurement, metric);
    let of: Vec<&Measurement> = measurements.iter().filter(|m| m.target == target && rate(m).is_some()).collect();
    let best = of.iter().filter_map(|m| rate(m)).fold(0.0, f64::max);
    let [.., before, last] = of.as_slice() else { return None };
    let is_rising = rate(last) > rate(before).map(|rate| rate * (1.0 + KNEE_GAIN)) && rate(last) >= Some(best);
    if best == 0.0 || is_rising {
        return None;
    }
    of.into_iter().find(|m| rate(m).is_some_and(|rate| rate >= best * (1.0 - KNEE_GAIN)))
}

/// Whether a sweep should go on: the last load brought some target more than the one before.
pub fn before_knee(num_sides: usize, metric: &str, measurements: &[Measurement]) -> bool {
    let Some(before) = measurements.len().checked_sub(2 * num_sides) else { return true };
    let (before, last) = measurements[before..].split_at(num_sides);
    let gains = |(before, last): (&Measurement, &Measurement)| {
        median_of(last, metric).unwrap_or(0.0) > median_of(before, metric).unwrap_or(0.0) * (1.0 + KNEE_GAIN)
    };
    before.iter().zip(last).any(gains)
}

fn median_of(measurement: &Measurement, metric: &str) -> Option<f64> {
    let mut values: Vec<f64> = measurement.runs.iter().filter_map(|run| run.metrics.get(metric).copied()).collect();
    crate::statistics::median(&mut values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_fields_are_added_and_null_takes_one_away() {
        let extra = json!({"cache_prompt": false, "temperature": 0.5, "return_token_ids": null, "ignore_eos": null});
        let side = Side {
            endpoint: Arc::new(Endpoint::new("http://127.0.0.1:1", None, None).expect("a URL")),
            model: "a".to_owned(),
            record: Target::default(),
            extra: extra.as_object().expect("it is one").clone(),
            is_fullbore: false,
        };
        let prompts = Prompts { vocab_size: 9, seed: 1, form: Form::Ids, is_constrained: false, text: None };
        let request = PlannedRequest { prompt_tokens: 2, output_tokens: 3, ..PlannedRequest::default() };
        let body = |side: &Side| -> Value {
            serde_json::from_slice(&prompts.ask(side, &request, 1).body).expect("a body is JSON")
        };
        let sent = body(&side);
        assert_eq!(
            (&sent["cache_prompt"], &sent["temperature"], &sent["max_tokens"]),
            (&json!(false), &json!(0.5), &json!(3))
        );
        let plain = body(&Side { extra: Map::new(), ..side });
        for name in ["return_token_ids", "ignore_eos"] {
            assert_eq!((sent.get(name), plain.get(name)), (None, Some(&json!(true))));
        }
    }

    fn sweep(rates: &[f64]) -> Vec<Measurement> {
        let run = |rate| Run { metrics: [("output_tokens_per_s".to_owned(), rate)].into(), ..Run::default() };
        let measurement = |(nth, &rate): (usize, &f64)| Measurement {
            target: "a".to_owned(),
            at: [("concurrency".to_owned(), f64::from(1 << nth))].into(),
            runs: vec![run(rate)],
            ..Measurement::default()
        };
        rates.iter().enumerate().map(measurement).collect()
    }

    #[test]
    fn the_knee_is_the_least_load_that_gives_nearly_all() {
        let measurements = sweep(&[10.0, 19.0, 30.0, 31.0, 30.5]);
        let knee = knee("a", "output_tokens_per_s", &measurements).expect("a knee");
        assert_eq!(knee.at["concurrency"], 4.0);
        let dip = sweep(&[10.0, 30.0, 20.0, 22.0]);
        let knee = super::knee("a", "output_tokens_per_s", &dip).expect("the last rises, and is not the best");
        assert_eq!(knee.at["concurrency"], 2.0);
        let goes_on = |num| before_knee(1, "output_tokens_per_s", &measurements[..num]);
        assert_eq!([1, 2, 3, 4].map(goes_on), [true, true, true, false]);
        for (target, measurements) in
            [("b", measurements), ("a", sweep(&[10.0, 19.0, 30.0])), ("a", sweep(&[0.0, 0.0]))]
        {
            assert!(super::knee(target, "output_tokens_per_s", &measurements).is_none(), "{measurements:?}");
        }
    }
}
