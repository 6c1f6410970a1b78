//! What a run's answers come to: rates, percentiles, goodput, counts of what failed, and what makes the run doubtful.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::constrained;
use super::endpoint::{Answer, Failure};
use super::load::{Ask, Outcome};
use crate::result::{Run, TokenHash};
use crate::statistics::{is_told, quantile};

/// Bounds that a request must keep to count as good.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slo {
    pub ttft_ms: Option<f64>,
    /// Of the gaps between tokens of a request, 99 of 100.
    pub itl_ms: Option<f64>,
    /// The mean gap between tokens of a request.
    pub tpot_ms: Option<f64>,
    pub e2e_ms: Option<f64>,
}

/// What is known of a run beside its answers.
pub struct Facts<'a> {
    pub begun: Instant,
    pub slo: Slo,
    /// Tokens of a text.
    pub tokenizer: Option<&'a dyn Fn(&str) -> usize>,
    /// Requests share prefixes because they were asked to.
    pub shares_prefixes: bool,
    /// The client's thread had a core for so long.
    pub client: Option<Duration>,
    /// Requests that were sent again, over another connection.
    pub num_resent: u64,
    /// Seconds that the target charged to each cause meanwhile.
    pub device_seconds: BTreeMap<String, f64>,
}

/// Of a core, above which the client may have been what was measured.
const MAX_CLIENT_SHARE: f64 = 0.8;
/// Of requests that leave later than they are due.
const MAX_LATE_MS: f64 = 50.0;

/// Sums up one run.
pub fn tally(asks: &[Ask], outcomes: &[Option<Outcome>], facts: &Facts) -> Run {
    let mut tally = Tally { run: Run::default(), samples: Samples::default(), facts };
    tally.count(asks, outcomes);
    let duration = tally.samples.last.saturating_duration_since(facts.begun);
    // Of a run without an answer there is nothing to tell but how it failed.
    if tally.run.counts["completed"] > 0 {
        tally.rates(duration);
        tally.percentiles();
    }
    tally.doubts(asks, outcomes);
    tally.run
}

struct Tally<'a> {
    run: Run,
    samples: Samples,
    facts: &'a Facts<'a>,
}

/// In milliseconds, a number a request; of gaps, one a gap.
struct Samples {
    ttft: Vec<f64>,
    tpot: Vec<f64>,
    itl: Vec<f64>,
    e2e: Vec<f64>,
    late: Vec<f64>,
    num_good: u64,
    prompt_tokens: u64,
    output_tokens: u64,
    /// Answers whose server says how much of the prompt it had, the tokens of their prompts, and what it had.
    cached: Option<(u64, u64)>,
    retokenized: u64,
    /// The end of the last answer.
    last: Instant,
}

impl Default for Samples {
    fn default() -> Samples {
        let (ttft, tpot, itl, e2e, late) = Default::default();
        let (num_good, prompt_tokens, output_tokens, retokenized) = Default::default();
        let (cached, last) = (None, Instant::now());
        Samples { ttft, tpot, itl, e2e, late, num_good, prompt_tokens, output_tokens, cached, retokenized, last }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Tally<'_> {
    fn count(&mut self, asks: &[Ask], outcomes: &[Option<Outcome>]) {
        let ends = outcomes.iter().flatten().map(|outcome| outcome.ended);
        self.samples.last = ends.max().unwrap_or(self.facts.begun);
        self.run.count("requests", asks.len() as u64);
        self.run.count("resent", self.facts.num_resent);
        let mut counts: BTreeMap<&str, u64> = [("completed", 0), ("not_sent", 0)].into();
        let mut add = |name| *counts.entry(name).or_default() += 1;
        for (ask, outcome) in asks.iter().zip(outcomes) {
            match outcome {
                None => add("not_sent"),
                Some(Outcome { result: Err(failure), .. }) => add(failure.name()),
                Some(Outcome { result: Ok(answer), due, ended }) => {
                    let Some((num_tokens, by)) = answer.num_tokens(self.facts.tokenizer) else {
                        add(Failure::Uncounted.name());
                        continue;
                    };
                    add("completed");
                    add(by.name());
                    let is_cut = num_tokens >= u64::from(ask.max_tokens);
                    match ask.is_constrained {
                        true if !constrained::follows(answer.said(), is_cut) => add("not_json"),
                        false if !is_cut => add("short"),
                        _ => {}
                    }
                    if answer.usage.is_some_and(|usage| usage.completion_tokens != num_tokens) {
                        add("usage_differs");
                    }
                    self.samples.add(ask, answer, num_tokens, *due, *ended, self.facts);
                }
            }
        }
        counts.into_iter().for_each(|(name, count)| self.run.count(name, count));
        let Samples { prompt_tokens, output_tokens, retokenized, .. } = self.samples;
        self.run.count("prompt_tokens", prompt_tokens);
        self.run.count("output_tokens", output_tokens);
        if self.facts.tokenizer.is_some() {
            self.run.count("retokenized_tokens", retokenized);
        }
        let answers = || outcomes.iter().flatten().filter_map(|outcome| outcome.result.as_ref().ok());
        let is_whole = answers().any(|answer| !answer.ids.is_empty()) && self.run.has_answered_all();
        let hash = || TokenHash::of_answers(answers().map(|answer| answer.ids.iter().copied().collect()));
        self.run.output_hash = is_whole.then(|| hash().to_string());
    }

    fn rates(&mut self, duration: Duration) {
        let Samples { prompt_tokens, output_tokens, num_good, .. } = self.samples;
        let (seconds, completed) = (duration.as_secs_f64().max(1e-9), self.run.counts["completed"]);
        self.run.metric("duration_s", seconds);
        self.run.metric("output_tokens_per_s", output_tokens as f64 / seconds);
        self.run.metric("total_tokens_per_s", (prompt_tokens + output_tokens) as f64 / seconds);
        self.run.metric("requests_per_s", completed as f64 / seconds);
        if self.facts.slo != Slo::default() {
            self.run.metric("goodput_requests_per_s", num_good as f64 / seconds);
            self.run.metric("good_share", num_good as f64 / self.run.counts["requests"].max(1) as f64);
        }
        if let Some((prompt_tokens, cached)) = self.samples.cached {
            self.run.metric("cached_share", cached as f64 / prompt_tokens.max(1) as f64);
        }
        if let Some(client) = self.facts.client {
            self.run.metric("client_core_share", client.as_secs_f64() / seconds);
        }
        for (cause, seconds) in &self.facts.device_seconds {
            self.run.metric(&format!("device_{cause}_s"), *seconds);
        }
    }

    fn percentiles(&mut self) {
        let Samples { ttft, tpot, itl, e2e, late, .. } = &mut self.samples;
        for (name, sample) in [("ttft", ttft), ("tpot", tpot), ("itl", itl), ("e2e", e2e), ("late", late)] {
            if sample.is_empty() {
                continue;
            }
            self.run.metric(&format!("{name}_mean_ms"), sample.iter().sum::<f64>() / sample.len() as f64);
            for (share, label) in [(0.5, "p50"), (0.9, "p90"), (0.99, "p99")] {
                if let Some(value) = quantile(sample, share).filter(|_| is_told(share, sample.len())) {
                    self.run.metric(&format!("{name}_{label}_ms"), value);
                }
            }
            self.run.metric(&format!("{name}_max_ms"), sample.iter().copied().fold(0.0, f64::max));
        }
    }

    fn doubts(&mut self, asks: &[Ask], outcomes: &[Option<Outcome>]) {
        let (counts, metrics) = (&self.run.counts, &self.run.metrics);
        let count = |name: &str| counts.get(name).copied().unwrap_or(0);
        let mut doubts = Vec::new();
        let failures = outcomes.iter().flatten().filter_map(|outcome| outcome.result.as_ref().err());
        let mut examples: BTreeMap<&str, String> = BTreeMap::new();
        for failure in failures {
            examples.entry(failure.name()).or_insert_with(|| failure.to_string());
        }
        if count("uncounted") > 0 {
            examples.insert("uncounted", Failure::Uncounted.to_string());
        }
        for (name, example) in examples {
            doubts.push(format!("{} of {} requests failed ({name}): {example}", count(name), asks.len()));
        }
        for (name, what) in [
            ("not_sent", "were not sent, for the target was gone"),
            ("not_json", "are no JSON of the schema that was asked for"),
            ("short", "ended before the length that was asked for"),
            ("usage_differs", "have a usage that differs from the tokens that were streamed"),
        ] {
            if count(name) > 0 {
                doubts.push(format!("{} of {} requests {what}", count(name), asks.len()));
            }
        }
        if let Some(client) = metrics.get("client_core_share").filter(|share| **share > MAX_CLIENT_SHARE) {
            let percent = client * 100.0;
            doubts.push(format!("the client's thread was busy for {percent:.0} % of the time: it may be the limit"));
        }
        let lateness = [("late_p99_ms", "1 of 100 requests"), ("late_max_ms", "a request")];
        let told = lateness.into_iter().find_map(|(name, of)| Some((metrics.get(name)?, of)));
        if let Some((late, of)) = told.filter(|(late, _)| **late > MAX_LATE_MS) {
            doubts.push(format!("the client sent {of} {late:.0} ms late or more"));
        }
        self.run.invalid = doubts;
        self.run.doubt_cache(self.facts.shares_prefixes);
    }
}

impl Samples {
    fn add(&mut self, ask: &Ask, answer: &Answer, num_tokens: u64, due: Instant, ended: Instant, facts: &Facts) {
        let (first, last) = (answer.first.unwrap_or(ended), answer.last.unwrap_or(ended));
        let ttft = ms(first - due);
        let tpot = (num_tokens > 1).then(|| ms(last - first) / (num_tokens - 1) as f64);
        let mut gaps: Vec<f64> = answer.gaps.iter().copied().map(ms).collect();
        let bounds = [
            (facts.slo.ttft_ms, Some(ttft)),
            (facts.slo.tpot_ms, tpot),
            (facts.slo.itl_ms, quantile(&mut gaps, 0.99)),
            (facts.slo.e2e_ms, Some(ms(ended - due))),
        ];
        let is_kept = |&(bound, value): &(Option<f64>, Option<f64>)| bound.zip(value).is_none_or(|(most, v)| v <= most);
        self.num_good += u64::from(bounds.iter().all(is_kept));
        self.ttft.push(ttft);
        self.tpot.extend(tpot);
        self.itl.append(&mut gaps);
        self.e2e.push(ms(ended - due));
        self.late.push(ms(answer.sent - due));
        let prompt_tokens = answer.usage.map_or(u64::from(ask.prompt_tokens), |usage| usage.prompt_tokens);
        self.prompt_tokens += prompt_tokens;
        self.output_tokens += num_tokens;
        let cached = answer.usage.and_then(|usage| usage.prompt_tokens_details).and_then(|of| of.cached_tokens);
        if let Some(cached) = cached {
            let (all, had) = self.cached.unwrap_or_default();
            self.cached = Some((all + prompt_tokens, had + cached));
        }
        self.retokenized += facts.tokenizer.map_or(0, |tokenizer| tokenizer(&answer.text) as u64);
    }
}

impl FromStr for Slo {
    type Err = String;

    /// `ttft=200,itl=50`, in milliseconds.
    fn from_str(text: &str) -> Result<Slo, String> {
        let mut slo = Slo::default();
        for part in text.split(',') {
            let (name, bound) = part.split_once('=').unwrap_or((part, ""));
            let bound = bound.trim_end_matches("ms").trim().parse().ok();
            let bound = bound.filter(|bound: &f64| bound.is_finite() && *bound > 0.0);
            let field = match name.trim() {
                "ttft" => &mut slo.ttft_ms,
                "itl" => &mut slo.itl_ms,
                "tpot" => &mut slo.tpot_ms,
                "e2e" => &mut slo.e2e_ms,
                _ => return Err(format!("{part} is no bound; there are ttft, itl, tpot and e2e, as in {SLO_EXAMPLE}")),
            };
            *field = Some(bound.ok_or_else(|| format!("{part} has no milliseconds; write it as in {SLO_EXAMPLE}"))?);
        }
        Ok(slo)
    }
}

const SLO_EXAMPLE: &str = "ttft=200,itl=50";

impl Slo {
    pub fn to_json(self) -> Value {
        let Slo { ttft_ms, itl_ms, tpot_ms, e2e_ms } = self;
        let bounds = [("ttft_ms", ttft_ms), ("itl_ms", itl_ms), ("tpot_ms", tpot_ms), ("e2e_ms", e2e_ms)];
        json!(bounds.into_iter().filter_map(|(name, bound)| Some((name, bound?))).collect::<BTreeMap<_, _>>())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::events::{PromptDetails, Usage};
    use super::*;

    fn ask() -> Ask {
        let (due, body) = (Duration::ZERO, Bytes::new());
        Ask {
            due,
            follows: None,
            path: "/v1/completions",
            body,
            prompt_tokens: 10,
            max_tokens: 3,
            is_constrained: false,
        }
    }

    /// Three tokens, the first 100 ms after it was due, the others 10 and 30 ms later.
    fn outcome(due: Instant, cached_tokens: u64) -> Option<Outcome> {
        let at = |ms| due + Duration::from_millis(ms);
        let prompt_tokens_details = Some(PromptDetails { cached_tokens: Some(cached_tokens) });
        let answer = Answer {
            sent: at(2),
            first: Some(at(100)),
            last: Some(at(140)),
            gaps: vec![Duration::from_millis(10), Duration::from_millis(30)],
            ids: vec![1, 2, 3],
            text: "abc".to_owned(),
            num_thought_bytes: 0,
            usage: Some(Usage { prompt_tokens: 10, completion_tokens: 3, prompt_tokens_details }),
        };
        Some(Outcome { due, ended: at(140), result: Ok(answer) })
    }

    fn facts(begun: Instant, slo: &str) -> Facts<'static> {
        let slo = slo.parse().expect("bounds");
        let (client, num_resent, device_seconds) = (None, 0, BTreeMap::new());
        let tokenizer: Option<&dyn Fn(&str) -> usize> = Some(&|text| text.len());
        Facts { begun, slo, tokenizer, shares_prefixes: false, client, num_resent, device_seconds }
    }

    #[test]
    fn answers_are_summed_up() {
        let begun = Instant::now();
        let outcomes = [outcome(begun, 0), outcome(begun + Duration::from_millis(60), 0)];
        let run = tally(&[ask(), ask()], &outcomes, &facts(begun, "ttft=200,tpot=20"));
        for (name, wanted) in [
            ("duration_s", 0.2),
            ("output_tokens_per_s", 30.0),
            ("total_tokens_per_s", 130.0),
            ("goodput_requests_per_s", 10.0),
            ("good_share", 1.0),
            ("ttft_p50_ms", 100.0),
            ("tpot_max_ms", 20.0),
            ("itl_mean_ms", 20.0),
            ("itl_max_ms", 30.0),
            ("late_p50_ms", 2.0),
            ("cached_share", 0.0),
        ] {
            let found = run.metrics[name];
            assert!((found - wanted).abs() < 1e-6 * wanted.max(1.0), "{name}: {found}, not {wanted}");
        }
        assert_eq!((run.counts["completed"], run.counts["by_ids"], run.counts["output_tokens"]), (2, 2, 6));
        assert_eq!((run.counts["retokenized_tokens"], run.output_hash.as_deref().map(str::len)), (6, Some(16)));
        assert!(run.invalid.is_empty(), "{:?}", run.invalid);
    }

    #[test]
    fn a_bound_that_one_gap_breaks_makes_a_request_no_good() {
        let begun = Instant::now();
        for (slo, good) in [("itl=29", 0.0), ("itl=30", 1.0), ("ttft=99", 0.0), ("e2e=140,tpot=20ms", 1.0)] {
            let run = tally(&[ask()], &[outcome(begun, 0)], &facts(begun, slo));
            assert_eq!(run.metrics["good_share"], good, "{slo}");
        }
        for wrong in ["ttft", "ttft=", "ttft=-1", "speed=3", ""] {
            let sentence = wrong.parse::<Slo>().expect_err("no bounds");
            assert!(sentence.contains("ttft=200,itl=50"), "{sentence}");
        }
    }

    #[test]
    fn what_makes_a_run_doubtful_is_said_with_counts() {
        let begun = Instant::now();
        let failed = |failure| Some(Outcome { due: begun, ended: begun, result: Err(failure) });
        let mut asks = vec![ask(); 5];
        asks[0].max_tokens = 4;
        let outcomes =
            [outcome(begun, 5), failed(Failure::Truncated), failed(Failure::Truncated), None, outcome(begun, 0)];
        let run = tally(&asks, &outcomes, &facts(begun, "ttft=1000"));
        let all = run.invalid.join("; ");
        for part in [
            "2 of 5 requests failed (truncated)",
            "1 of 5 requests were not sent",
            "1 of 5 requests ended before",
            "25.0 % of prompt tokens came from a cache",
        ] {
            assert!(all.contains(part), "{part}: {all}");
        }
        assert_eq!(run.metrics["good_share"], 0.4, "what failed was asked for too");
        let none = tally(&asks[..1], &[failed(Failure::Truncated)], &facts(begun, "ttft=1000"));
        assert!(none.metrics.is_empty() && none.invalid.len() == 1, "{none:?}");
        let asked = Facts { shares_prefixes: true, ..facts(begun, "ttft=1000") };
        assert!(!tally(&asks, &outcomes, &asked).invalid.join("").contains("cache"));
    }
}
