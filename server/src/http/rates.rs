//! What the holder of a key may ask for in a minute: requests, and tokens that are computed for it.
//!
//! A token bucket each (Turner, 1986): it holds a minute's worth, fills evenly, and a request is admitted while neither
//! is empty. Tokens are taken as they are computed, so that a bucket may be overdrawn by what is under way; the debt is
//! waited for. Invariant: over any stretch of time no more requests are admitted than a minute's worth and what filled
//! meanwhile, and a refusal says exactly when the next may be.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use warp::http::header::{HeaderMap, HeaderName, HeaderValue};

use super::error::ApiError;

/// Of a minute; `None` is any number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    pub requests: Option<u32>,
    pub tokens: Option<u32>,
}

impl Rate {
    /// Takes in a word of a key's line, `rpm=60` or `tpm=100000`.
    pub fn set(&mut self, word: &str) -> Result<(), String> {
        let expected = || format!("{word} is no rpm=N or tpm=N, with N at least 1");
        let (name, number) = word.split_once('=').ok_or_else(expected)?;
        let number = number.parse().ok().filter(|&number| number > 0).ok_or_else(expected)?;
        match name {
            "rpm" => self.requests = Some(number),
            "tpm" => self.tokens = Some(number),
            _ => return Err(expected()),
        }
        Ok(())
    }

    pub fn is_any(&self) -> bool {
        *self == Rate::default()
    }
}

/// The buckets of one holder.
#[derive(Debug)]
pub struct Meter {
    rate: Rate,
    buckets: Mutex<[Option<Bucket>; 2]>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_minute: f64,
    level: f64,
    /// When it had that.
    at: Instant,
}

const REQUESTS: usize = 0;
const TOKENS: usize = 1;
/// OpenAI's words in its headers.
const NAMES: [&str; 2] = ["requests", "tokens"];

impl Meter {
    pub fn new(rate: Rate, now: Instant) -> Meter {
        let bucket = |per_minute: Option<u32>| {
            per_minute.map(f64::from).map(|per_minute| Bucket { per_minute, level: per_minute, at: now })
        };
        Meter { rate, buckets: Mutex::new([bucket(rate.requests), bucket(rate.tokens)]) }
    }

    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Takes a request, or says after how long there is one.
    pub fn admit(&self, now: Instant) -> Result<(), ApiError> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        for (bucket, name) in buckets.iter_mut().zip(NAMES) {
            let Some(bucket) = bucket else { continue };
            bucket.fill(now);
            let wait = bucket.until(1.0);
            if wait > Duration::ZERO {
                return Err(ApiError::rate_limited(bucket.per_minute as u32, name, wait));
            }
        }
        if let Some(bucket) = &mut buckets[REQUESTS] {
            bucket.level -= 1.0;
        }
        Ok(())
    }

    /// Tokens were computed.
    pub fn charge(&self, num_tokens: u32, now: Instant) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = &mut buckets[TOKENS] {
            bucket.fill(now);
            bucket.level -= f64::from(num_tokens);
        }
    }

    /// What is left, in the headers that OpenAI's clients read.
    pub fn tell(&self, headers: &mut HeaderMap, now: Instant) {
        let mut buckets = *self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        for (bucket, name) in buckets.iter_mut().zip(NAMES) {
            let Some(bucket) = bucket else { continue };
            bucket.fill(now);
            let values = [
                ("limit", bucket.per_minute.to_string()),
                ("remaining", bucket.level.max(0.0).floor().to_string()),
                ("reset", format!("{:.3}s", bucket.until(bucket.per_minute).as_secs_f64())),
            ];
            for (what, value) in values {
                let header = HeaderName::try_from(format!("x-ratelimit-{what}-{name}")).expect("a name of letters");
                headers.insert(header, HeaderValue::try_from(value).expect("a number"));
            }
        }
    }
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + elapsed * self.per_minute / 60.0).min(self.per_minute);
        self.at = self.at.max(now);
    }

    /// Until it holds so much.
    fn until(&self, level: f64) -> Duration {
        Duration::from_secs_f64(((level - self.level) * 60.0 / self.per_minute).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(requests: u32, tokens: u32) -> Rate {
        let some = |number| Some(number).filter(|&number| number > 0);
        Rate { requests: some(requests), tokens: some(tokens) }
    }

    /// A client that asks as soon as it may gets its minute's worth and the rate from then on, whatever it asks for.
    #[test]
    fn a_rate_holds_over_any_time_and_a_refusal_says_when_to_come() {
        for (rate, tokens, expected) in [(rate(30, 0), 5, 60 + 30), (rate(600, 300), 50, 12 + 6), (rate(7, 0), 0, 21)] {
            let begin = Instant::now();
            let meter = Meter::new(rate, begin);
            let (mut now, mut num_admitted) = (begin, 0);
            while now < begin + Duration::from_secs(120) {
                match meter.admit(now) {
                    Ok(()) => {
                        num_admitted += 1;
                        meter.charge(tokens, now);
                    }
                    Err(refusal) => {
                        let wait = Duration::from_secs(refusal.retry_after.expect("waiting helps"));
                        assert!(wait > Duration::ZERO);
                        now += wait;
                        assert!(meter.admit(now).is_ok(), "{rate:?}: refused after {wait:?}");
                        meter.charge(tokens, now);
                        num_admitted += 1;
                    }
                }
            }
            assert!((expected - 2..=expected + 1).contains(&num_admitted), "{rate:?}: {num_admitted}, not {expected}");
        }
    }

    #[test]
    fn a_debt_of_tokens_is_waited_for() {
        let begin = Instant::now();
        let meter = Meter::new(rate(0, 60), begin);
        meter.admit(begin).expect("a full bucket");
        meter.charge(180, begin);
        let refusal = meter.admit(begin).expect_err("120 tokens are owed");
        assert_eq!(refusal.retry_after, Some(121));
        assert!(refusal.message.contains("60 tokens a minute"), "{}", refusal.message);
        let mut headers = HeaderMap::new();
        meter.tell(&mut headers, begin + Duration::from_secs(130));
        let told = |name: &str| headers.get(name).map(|value| value.to_str().expect("text").to_owned());
        assert_eq!(told("x-ratelimit-limit-tokens").as_deref(), Some("60"));
        assert_eq!(told("x-ratelimit-remaining-tokens").as_deref(), Some("10"));
        assert_eq!(told("x-ratelimit-reset-tokens").as_deref(), Some("50.000s"));
        assert_eq!(told("x-ratelimit-limit-requests"), None);
    }

    #[test]
    fn words_that_are_no_rate_are_said() {
        let mut rate = Rate::default();
        for word in ["rpm", "rpm=", "rpm=0", "tpm=-1", "tpm=1e9", "rps=5", "rpm=4294967296"] {
            assert!(rate.set(word).expect_err(word).contains(word));
        }
        assert!(rate.is_any());
        rate.set("rpm=60").expect("a rate");
        rate.set("tpm=100000").expect("a rate");
        assert_eq!(rate, Rate { requests: Some(60), tokens: Some(100_000) });
    }
}
