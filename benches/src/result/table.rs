//! A result for people at a terminal: a table for each load, ratios, and what is doubtful.

use std::collections::BTreeMap;
use std::fmt;

use super::{BenchResult, Run, Spread};

/// What is shown of all that is in a result, in this order, and what it is called.
pub const SHOWN: [(&str, &str); 22] = [
    ("output_tokens_per_s", "output, tokens/s"),
    ("steady_tokens_per_s", "while all decode, tokens/s"),
    ("total_tokens_per_s", "prompts and output, tokens/s"),
    ("requests_per_s", "requests/s"),
    ("goodput_requests_per_s", "good requests/s"),
    ("good_share", "good requests, share"),
    ("prefill_tokens_per_s", "prefill, tokens/s"),
    ("decode_tokens_per_s", "decode, tokens/s"),
    ("ttft_p50_ms", "first token p50, ms"),
    ("ttft_p99_ms", "first token p99, ms"),
    ("itl_p50_ms", "between tokens p50, ms"),
    ("itl_p99_ms", "between tokens p99, ms"),
    ("tpot_mean_ms", "a token after the first, ms"),
    ("tpot_p50_ms", "a token after the first p50, ms"),
    ("e2e_p50_ms", "whole request p50, ms"),
    ("e2e_p99_ms", "whole request p99, ms"),
    ("cached_share", "prompt from cache, share"),
    ("ready_s", "ready, s"),
    ("first_token_s", "first token from the start, s"),
    ("roofline_share", "of the roofline, share"),
    ("late_p99_ms", "sent late p99, ms"),
    ("client_core_share", "client's share of a core"),
];

/// The last of them are the client's, and no target's.
const NUM_OF_CLIENT: usize = 2;

impl fmt::Display for BenchResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for measurement in &self.measurements {
            let subject = measurement.subject.as_ref().map_or(String::new(), |subject| format!(", {subject}"));
            writeln!(f, "\n{}{subject}{}", measurement.target, loads(&measurement.at))?;
            writeln!(
                f,
                "{:<34}{:>12}{:>12}{:>12}",
                format!("{} runs", measurement.runs.len()),
                "median",
                "least",
                "most"
            )?;
            write_spreads(f, &measurement.summary, &SHOWN)?;
            if let Some(difference) = retokenized(&measurement.runs) {
                writeln!(f, "texts tokenized again: {difference}")?;
            }
            if let Some(sentence) = resent(&measurement.runs) {
                writeln!(f, "{sentence}")?;
            }
        }
        for comparison in &self.comparisons {
            writeln!(f, "\n{} beside {}{}", comparison.target, comparison.against, loads(&comparison.at))?;
            writeln!(f, "{:<34}{:>12}{:>12}{:>12}", "ratio, run by run", "median", "least", "most")?;
            write_spreads(f, &comparison.ratios, &SHOWN[..SHOWN.len() - NUM_OF_CLIENT])?;
        }
        for target in &self.targets {
            match self.knee(&target.name) {
                Some(knee) => {
                    writeln!(f, "\n{}: the knee is at{}", target.name, loads(&knee.at).replacen(',', "", 1))?;
                }
                None if self.bench == "sweep" => writeln!(f, "\n{}: no knee; more load may bring more", target.name)?,
                None => {}
            }
        }
        if let Some(diagnosis) = &self.diagnosis {
            write!(f, "\n{diagnosis}")?;
        }
        match self.valid {
            true => writeln!(f, "\nvalid"),
            false => {
                writeln!(f, "\nnot valid:")?;
                self.invalid.iter().try_for_each(|reason| writeln!(f, "  {reason}"))
            }
        }
    }
}

/// How many tokens texts of all runs have when they are read anew, where that is known, beside those that were counted.
pub fn retokenized(runs: &[Run]) -> Option<String> {
    let sum = |name: &str| runs.iter().map(|run| run.counts.get(name).copied()).sum::<Option<u64>>();
    let (counted, again) = (sum("output_tokens")?, sum("retokenized_tokens")?);
    let percent = (again as f64 / counted.max(1) as f64 - 1.0) * 100.0;
    (counted > 0).then(|| format!("{again} tokens, where {counted} were counted ({percent:+.1} %)"))
}

/// That requests of these runs were sent more than once, if any were.
pub fn resent(runs: &[Run]) -> Option<String> {
    let sum = |name: &str| runs.iter().filter_map(|run| run.counts.get(name)).sum::<u64>();
    let (resent, requests) = (sum("resent"), sum("requests"));
    (resent > 0).then(|| {
        format!("of {requests} requests {resent} were sent again, for the server had closed the kept connection")
    })
}

/// `, concurrency 16`; of numbers as few digits as tell them.
pub fn loads(at: &BTreeMap<String, f64>) -> String {
    at.iter().map(|(name, value)| format!(", {} {}", name.replace('_', " "), number(*value))).collect()
}

/// Three digits at least, and none that say nothing.
pub fn number(value: f64) -> String {
    let size = value.abs();
    match value {
        _ if size >= 1000.0 => grouped(value.round()),
        _ if size >= 100.0 => format!("{value:.0}"),
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ if size >= 10.0 => format!("{value:.1}"),
        _ if size >= 0.01 => format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
        _ if size >= 1e-3 => format!("{value:.4}"),
        _ => format!("{value:.2e}"),
    }
}

/// Whole, with commas.
pub fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let sign = if value < 0.0 { "-" } else { "" };
    let first = (digits.len() - 1) % 3 + 1;
    let rest: String =
        digits.as_bytes()[first..].chunks(3).map(|group| format!(",{}", String::from_utf8_lossy(group))).collect();
    format!("{sign}{}{rest}", &digits[..first])
}

type Shown = (&'static str, &'static str);

fn write_spreads(f: &mut fmt::Formatter<'_>, spreads: &BTreeMap<String, Spread>, shown: &[Shown]) -> fmt::Result {
    for (name, title) in shown {
        if let Some(Spread { median, min, max }) = spreads.get(*name) {
            let [median, min, max] = [median, min, max].map(|value| number(*value));
            writeln!(f, "{title:<34}{median:>12}{min:>12}{max:>12}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_texts_have_when_read_anew_is_told() {
        let run = |counts: &[(&str, u64)]| {
            let counts = counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
            Run { counts, ..Run::default() }
        };
        let runs = [
            run(&[("output_tokens", 100), ("retokenized_tokens", 90)]),
            run(&[("output_tokens", 100), ("retokenized_tokens", 100)]),
        ];
        assert_eq!(retokenized(&runs).as_deref(), Some("190 tokens, where 200 were counted (-5.0 %)"));
        assert_eq!(retokenized(&[run(&[("output_tokens", 100)])]), None);
    }

    #[test]
    fn numbers_have_as_few_digits_as_tell_them() {
        for (value, text) in [
            (0.0, "0"),
            (16.0, "16"),
            (0.5, "0.5"),
            (1.234_56, "1.235"),
            (12.34, "12.3"),
            (123.4, "123"),
            (1234.5, "1,235"),
            (1_234_567.0, "1,234,567"),
            (-1234.0, "-1,234"),
            (0.001_234, "0.0012"),
            (0.000_012_3, "1.23e-5"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
