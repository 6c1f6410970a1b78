//! `fullbore bench doctor`: what limits a device with these flags, which flag to change and what that should gain, and
//! what it does gain.
//!
//! The engine is driven in this process, without HTTP, on requests that are played as `bench trace` plays them. Prices
//! of steps are measured on an engine of its own, which may be larger than what was asked for. Invariant: no change is
//! advised that was not planned as `serve` would plan it, with the memory that there is.

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fullbore_bench::doctor::{Case, Forecast, fill};
use fullbore_bench::play::{Clock, PlayOptions, play_read};
use fullbore_bench::reading::{Reading, TextPrice};
use fullbore_bench::report::ServingReport;
use fullbore_bench::result::{BenchResult, Diagnosis, Measurement, Run};
use fullbore_bench::trace::Trace;
use fullbore_bench::workload::PlannedRequest;
use fullbore_engine::backend::sim::{Fidelity, SimBackend, SimClock, SimOptions};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::cost::DeviceProfile;
use fullbore_engine::engine::Engine;
use fullbore_engine::model::ModelConfig;
use fullbore_engine::request::TokenId;
use fullbore_engine::text::{Special, Tokenizer};
use serde_json::json;

use super::BenchCommandError;
use super::interrupt::Keep;
use super::result::{measured, target_of_plan};
use super::workload::{LeftOut, WARM_UP_SEED, described, leave_out_too_long, warm_up};
use crate::args::{DoctorArgs, EngineArgs, Profile};
use crate::simulate::{tell_without_output, workload};
use crate::start::{self, Plan, StartError};
use crate::version::COMMIT;

mod changes;

use changes::{changes, most_seqs};

pub fn doctor(args: &DoctorArgs) -> Result<(), BenchCommandError> {
    measured(&args.result, |keep| measure_doctor(args, keep))
}

pub fn measure_doctor(args: &DoctorArgs, keep: Keep) -> Result<BenchResult, BenchCommandError> {
    let mut result = BenchResult::begin("doctor", args.seed, COMMIT);
    let rig = Rig::new(args)?;
    let Plan { config, bundle, backend, .. } = {
        let plan = start::plan(&args.engine, None)?;
        result.targets = vec![target_of_plan(&plan)];
        plan
    };
    drop(backend);
    let (tokenizer, model) = (bundle.tokenizer, bundle.config);
    let least = least_requests(&config);
    let (sized, left_out) = rig.requests(least, &config)?;
    let profile = rig.profile(&config, longest(&sized))?;
    let text = if args.ids { None } else { rig.text_price(&sized, &tokenizer) };
    let as_it_is = Case { change: "as it is".to_owned(), config, text };
    let left_out = Cell::new(left_out);
    let requests = match args.limit {
        Some(_) => sized,
        None => fill(&profile, &as_it_is, least, Duration::from_secs(args.seconds.max(1)), |num_requests| {
            let (requests, of_them) = rig.requests(num_requests, &config).unwrap_or_default();
            left_out.set(of_them);
            requests
        })?,
    };
    tell_without_output(left_out.get().without_output);
    let (tried, cases): (Vec<EngineArgs>, Vec<Case>) = rig.cases(&as_it_is, &model, &requests).into_iter().unzip();
    eprintln!("{} changes are simulated on {} requests", cases.len(), requests.len());
    let forecast = Forecast::new(&profile, &as_it_is, cases.clone(), &requests)?;
    result.workload = described(&args.workload(None), &requests.iter().collect::<Vec<_>>(), left_out.get());
    let fields = [
        ("arrivals", json!(args.workload(None).arrivals.map(|arrivals| arrivals.to_string()))),
        ("requests_per_run", json!(requests.len())),
        ("text_ns_per_token", json!(text.map(|price| price.ns_per_token))),
        ("text_threads", json!(text.map(|price| price.num_threads))),
    ];
    result.workload.extend(fields.map(|(name, value)| (name.to_owned(), value)));
    let [mut before, mut after] = [Vec::new(), Vec::new()];
    rig.runs(&args.engine, &as_it_is, &profile, &requests, &tokenizer, &mut |report, run| {
        before.push(report);
        add(&mut result, &as_it_is.change, run);
        result.diagnosis = Some(forecast.diagnosis(&as_it_is, &before, &[]));
        keep(&result);
    })?;
    if let Some((chosen, _)) = forecast.chosen().filter(|_| !args.no_check) {
        let index = cases.iter().position(|case| case.change == chosen.change).expect("it is one of them");
        rig.runs(&tried[index], chosen, &profile, &requests, &tokenizer, &mut |report, run| {
            after.push(report);
            add(&mut result, &format!("with {}", chosen.change), run);
            result.diagnosis = Some(forecast.diagnosis(&as_it_is, &before, &after));
            keep(&result);
        })?;
    }
    let doubts = result.diagnosis.as_ref().map(doubts).unwrap_or_default();
    result.invalid.extend(doubts);
    result.finish();
    Ok(result)
}

/// One more run of what `subject` says.
fn add(result: &mut BenchResult, subject: &str, run: Run) {
    let is_it = |of: &Measurement| of.subject.as_deref() == Some(subject);
    if !result.measurements.last().is_some_and(is_it) {
        let (target, subject) = (result.targets[0].name.clone(), Some(subject.to_owned()));
        result.measurements.push(Measurement { target, subject, ..Measurement::default() });
    }
    result.measurements.last_mut().expect("it is there").runs.push(run);
}

/// As a share of what was measured.
const MAX_ERROR: f64 = 0.25;

fn doubts(diagnosis: &Diagnosis) -> Vec<String> {
    let off = diagnosis.predicted_output_tokens_per_s / diagnosis.output_tokens_per_s.max(1e-9) - 1.0;
    let rate = (off.abs() > MAX_ERROR).then(|| {
        format!("the rate as it is was predicted {:+.0} % off: other work may have run, or too little", off * 100.0)
    });
    let error = diagnosis.advice.as_ref().and_then(|advice| advice.error()).filter(|error| error.abs() > MAX_ERROR);
    let gain = error.map(|error| format!("the gain was predicted {:+.0} % off", error * 100.0));
    rate.into_iter().chain(gain).collect()
}

/// Enough that there are some for every slot that may be advised, and not only once.
fn least_requests(config: &EngineConfig) -> u32 {
    most_seqs(config.max_num_seqs) * 3 / 2
}

/// How engines are made on the device that is asked about, and the time that they run in.
struct Rig<'a> {
    args: &'a DoctorArgs,
    given: Option<DeviceProfile>,
    is_simulated: bool,
}

/// An engine, and the clock of its device where that is a simulated one.
type Loaded = (Engine, Option<SimClock>);

impl Rig<'_> {
    fn new(args: &DoctorArgs) -> Result<Rig<'_>, BenchCommandError> {
        let given = args.device_profile.as_deref().map(DeviceProfile::open).transpose()?;
        let is_simulated = args.engine.model.device.name == "sim";
        if is_simulated && given.is_none() {
            return Err(BenchCommandError::NoPrices);
        }
        Ok(Rig { args, given, is_simulated })
    }

    fn load(&self, args: &EngineArgs) -> Result<Loaded, BenchCommandError> {
        let mut plan = start::plan(args, None)?;
        let Some(given) = self.given.as_ref().filter(|_| self.is_simulated) else {
            return Ok((plan.load_engine()?, None));
        };
        let backend = SimBackend::new(SimOptions {
            fidelity: Fidelity::Cost,
            cost: given.cost,
            ns_per_copied_megabyte: given.ns_per_copied_megabyte,
            ..SimOptions::default()
        });
        let clock = backend.clock();
        plan.backend = Box::new(backend);
        Ok((plan.load_engine()?, Some(clock)))
    }

    /// What steps take in requests of up to `longest` tokens, given or measured.
    fn profile(&self, config: &EngineConfig, longest: u32) -> Result<DeviceProfile, BenchCommandError> {
        if let Some(given) = self.given.as_ref().filter(|_| !self.is_simulated) {
            return Ok(given.clone());
        }
        let time = Duration::from_secs(if self.is_simulated { 0 } else { self.args.seconds });
        eprintln!("prices of steps are measured");
        let (mut engine, _) = self.load(&probe(&self.args.engine, config, longest))?;
        let (profile, measured) = super::measure(&mut engine, &self.args.engine.model.model, time)?;
        eprintln!("{} steps, error of the fit {:.1} % (median)", measured.num_steps, measured.median_error * 100.0);
        let host_ns_per_step =
            self.given.as_ref().map_or(profile.host_ns_per_step, |simulated| simulated.host_ns_per_step);
        Ok(DeviceProfile { host_ns_per_step, ..profile })
    }

    /// As many as were asked for, or as there are; what no slot could ever hold is left out.
    fn requests(
        &self,
        num_requests: u32,
        config: &EngineConfig,
    ) -> Result<(Vec<PlannedRequest>, LeftOut), BenchCommandError> {
        let limit = self.args.limit.unwrap_or(num_requests);
        let Trace { mut requests, num_without_output } = workload(&self.args.workload(Some(limit)))?;
        let too_long = leave_out_too_long(&mut requests, config.max_model_len.into())?;
        Ok((requests, LeftOut { too_long, without_output: num_without_output }))
    }

    /// What it takes to read the prompts of `requests`; on a simulated device what was asked for, and nothing else.
    fn text_price(&self, requests: &[PlannedRequest], tokenizer: &Arc<Tokenizer>) -> Option<TextPrice> {
        if self.is_simulated {
            let price = TextPrice { num_threads: SIMULATED_THREADS, ns_per_token: self.args.slow_tokenizer * 1e3 };
            return (price.ns_per_token > 0.0).then_some(price);
        }
        let texts = texts(&requests[..requests.len().min(TEXT_SAMPLE)], tokenizer, self.args.seed);
        let (read, begun) = (self.reader(tokenizer), Instant::now());
        let read_for = || begun.elapsed().as_secs_f64();
        let read = texts.iter().take_while(|_| read_for() < MAX_TEXT_SAMPLE_S).map(|text| read(text));
        let num_tokens: usize = read.sum();
        let num_threads = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        Some(TextPrice { num_threads, ns_per_token: read_for() * 1e9 / num_tokens.max(1) as f64 })
    }

    /// What reads a text, and says how many tokens it has: the tokenizer, as slow as was asked for.
    fn reader(&self, tokenizer: &Arc<Tokenizer>) -> impl Fn(&str) -> usize + Send + Sync + 'static {
        let (tokenizer, more_us) = (tokenizer.clone(), self.args.slow_tokenizer);
        move |text| {
            let num_tokens = tokenizer.encode(text, Special::AsText).len();
            std::thread::sleep(Duration::from_secs_f64(more_us * num_tokens as f64 / 1e6));
            num_tokens
        }
    }

    /// Every change that can be planned, in the order in which they are preferred.
    fn cases(&self, as_it_is: &Case, model: &ModelConfig, requests: &[PlannedRequest]) -> Vec<(EngineArgs, Case)> {
        let mut cases = Vec::new();
        for (change, args) in changes(&self.args.engine, &as_it_is.config, model, longest(requests)) {
            let config = planned(&args);
            cases.extend(config.map(|config| (args, Case { change, config, text: as_it_is.text })));
        }
        if as_it_is.text.is_some() {
            let change = "prompts as token ids".to_owned();
            cases.push((self.args.engine.clone(), Case { change, text: None, ..as_it_is.clone() }));
        }
        cases
    }

    /// As many runs as were asked for, each on prompts of its own, after a short one that is not counted; each is told
    /// to `is_whole`.
    fn runs(
        &self,
        args: &EngineArgs,
        case: &Case,
        profile: &DeviceProfile,
        requests: &[PlannedRequest],
        tokenizer: &Arc<Tokenizer>,
        is_whole: &mut dyn FnMut(ServingReport, Run),
    ) -> Result<(), BenchCommandError> {
        let (mut engine, simulated) = self.load(args)?;
        engine.set_cost(profile.cost);
        let before = warm_up(requests, engine.config().max_num_seqs as usize);
        let mut play = |requests: &[PlannedRequest], text: Option<TextPrice>, seed: u64| {
            let clock = match &simulated {
                Some(clock) => Clock::Simulated {
                    clock: clock.clone(),
                    since: clock.now(),
                    host_per_step: Duration::from_nanos(profile.host_ns_per_step),
                },
                None => Clock::Real(Instant::now()),
            };
            let reading = self.reading(requests, text, tokenizer, seed, &clock)?;
            let options = PlayOptions { seed, ..PlayOptions::default() };
            let report = play_read(&mut engine, requests, &clock, options, &reading)?;
            let mut run = report.to_run();
            run.doubt_cache(requests.iter().any(PlannedRequest::shares_prefix));
            Ok::<_, BenchCommandError>((report, run))
        };
        play(&before, None, self.args.seed ^ WARM_UP_SEED)?;
        for nth in 1..=self.args.result.runs {
            let (report, run) = play(requests, case.text, self.args.seed ^ (u64::from(nth) << 24))?;
            let rate = report.output_tokens_per_s;
            eprintln!("{}, run {nth} of {}: {rate:.1} output tokens/s", case.change, self.args.result.runs);
            is_whole(report, run);
        }
        Ok(())
    }

    fn reading(
        &self,
        requests: &[PlannedRequest],
        text: Option<TextPrice>,
        tokenizer: &Arc<Tokenizer>,
        seed: u64,
        clock: &Clock,
    ) -> Result<Reading, BenchCommandError> {
        let Some(price) = text else { return Ok(Reading::of_ids(requests)) };
        if self.is_simulated {
            return Ok(Reading::priced(requests, price));
        }
        let texts = texts(requests, tokenizer, seed);
        let read = self.reader(tokenizer);
        let read = Arc::new(move |text: &str| {
            read(text);
        });
        Ok(Reading::start(requests, texts, price.num_threads, read, clock)?)
    }
}

/// Of a simulated machine, whatever this one has.
const SIMULATED_THREADS: u32 = 2;
/// Texts on which a tokenizer is timed, at most, and for how long.
const TEXT_SAMPLE: usize = 64;
const MAX_TEXT_SAMPLE_S: f64 = 3.0;

/// The limits that `serve` would have with these flags; `None` where it would refuse them.
fn planned(args: &EngineArgs) -> Option<EngineConfig> {
    let args = EngineArgs { no_verify: true, no_tuning: true, ..args.clone() };
    let plan = start::plan(&args, None).and_then(|plan| plan.check_memory().map(|()| plan));
    plan.map_err(|error: StartError| tracing::debug!(%error, "a change that cannot be")).ok().map(|plan| plan.config)
}

/// Tokens of the longest of `requests`.
fn longest(requests: &[PlannedRequest]) -> u32 {
    requests.iter().map(|request| request.prompt_tokens + request.output_tokens).max().unwrap_or(1)
}

/// Twice the longest context on which steps are priced, at least and at most.
const PROBED_LEN: RangeInclusive<u32> = 256..=1024;

/// An engine on which steps are priced one at a time, on contexts of up to `longest` tokens: as many sequences as any
/// change would have, and no more memory than that takes.
fn probe(args: &EngineArgs, config: &EngineConfig, longest: u32) -> EngineArgs {
    let max_num_seqs = most_seqs(config.max_num_seqs);
    let probed_len = longest.saturating_mul(2).clamp(*PROBED_LEN.start(), *PROBED_LEN.end());
    let max_model_len = config.max_model_len.min(probed_len);
    let blocks = |num_tokens: u32| num_tokens.div_ceil(config.block_size);
    // Four contexts that are kept, the last one, and what each sequence has of its own.
    let num_blocks = 5 * blocks(max_model_len) + max_num_seqs * 4;
    EngineArgs {
        max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens.max(max_num_seqs),
        max_model_len: Some(max_model_len),
        kv_blocks: Some(num_blocks),
        kv_memory: None,
        memory_fraction: None,
        no_prefix_cache: false,
        pipeline_depth: 1,
        profile: Profile::Throughput,
        target_itl_ms: None,
        ..args.clone()
    }
}

fn texts(requests: &[PlannedRequest], tokenizer: &Tokenizer, seed: u64) -> Vec<String> {
    let vocab_size = tokenizer.vocab_size() as u32;
    let text = |of: &PlannedRequest| {
        let ids: Vec<TokenId> = of.request(vocab_size, seed).prompt;
        tokenizer.decode(&ids)
    };
    requests.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use fullbore_bench::result::Advice;

    use super::*;

    #[test]
    fn a_prediction_that_misses_by_more_than_a_quarter_is_doubted() {
        let diagnosis = |predicted_rate: f64, predicted_gain: f64, measured_gain: Option<f64>| Diagnosis {
            limit: "slots".to_owned(),
            verdict: String::new(),
            output_tokens_per_s: 100.0,
            predicted_output_tokens_per_s: predicted_rate,
            changes: Vec::new(),
            advice: Some(Advice {
                change: "--max-num-seqs 4".to_owned(),
                predicted_gain,
                predicted_itl_p99_ms: [1.0, 1.0],
                measured_gain,
                then: String::new(),
            }),
        };
        for (rate, predicted, measured, num_doubts) in [
            (124.0, 2.0, Some(1.7), 0),
            (126.0, 2.0, Some(1.7), 1),
            (74.0, 2.0, None, 1),
            (100.0, 2.0, Some(1.5), 1),
            (100.0, 1.4, Some(2.0), 1),
            (150.0, 1.4, Some(2.0), 2),
        ] {
            let found = doubts(&diagnosis(rate, predicted, measured));
            assert_eq!(found.len(), num_doubts, "{rate}, {predicted} for {measured:?}: {found:?}");
        }
    }
}
