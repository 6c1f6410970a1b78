//! Requests to come: when, how long, and with which prefix in common. Made here from a seed, or read by `trace.rs`.
//!
//! Invariant: a workload is a pure function of its seed, the same on every machine. Prompts share a prefix only where a
//! trace says so, so that no prefix cache flatters a run.

use std::str::FromStr;
use std::time::Duration;

use fullbore_engine::request::{Request, TokenId};

/// Requests of one size, as `fullbore bench offline` runs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    pub num_requests: u32,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    pub seed: u64,
}

impl Workload {
    /// The requests, greedy and without stop ids, so that each generates exactly `output_tokens`.
    pub fn requests(&self, vocab_size: u32) -> Vec<Request> {
        (0..self.num_requests)
            .map(|index| {
                let mut state = SplitMix64(self.seed ^ (u64::from(index) << 32));
                Request {
                    id: format!("bench-{index}"),
                    prompt: (0..self.prompt_tokens).map(|_| TokenId(state.below(vocab_size))).collect(),
                    max_tokens: self.output_tokens,
                    ..Request::default()
                }
            })
            .collect()
    }
}

/// One request of a workload: lengths and a time, as a trace has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlannedRequest {
    /// Its line in the file, or its number.
    pub row: u32,
    /// After the first.
    pub arrival: Duration,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    /// One number for each `TOKENS_PER_HASH` tokens of the prompt; equal numbers stand for equal tokens. Empty for a
    /// prompt of its own.
    pub hash_ids: Vec<u64>,
}

/// Tokens of a prompt that share a hash id, as in Mooncake's traces (Qin et al. 2025).
pub const TOKENS_PER_HASH: u32 = 512;

impl PlannedRequest {
    /// Greedy and without stop ids: it generates exactly its length.
    pub fn request(&self, vocab_size: u32, seed: u64) -> Request {
        let mut prompt = Vec::with_capacity(self.prompt_tokens as usize);
        let mut fill = |mut random: SplitMix64, end: u32| {
            while prompt.len() < end as usize {
                prompt.push(TokenId(random.below(vocab_size)));
            }
        };
        for (block, &hash_id) in (1..).zip(&self.hash_ids) {
            fill(SplitMix64::of(seed, hash_id, 1), self.prompt_tokens.min(block * TOKENS_PER_HASH));
        }
        fill(SplitMix64::of(seed, u64::from(self.row), 0), self.prompt_tokens);
        Request { id: format!("row-{}", self.row), prompt, max_tokens: self.output_tokens, ..Request::default() }
    }
}

/// When generated requests arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// All before the first step.
    AtOnce,
    /// Independent of each other, so many a second on average.
    Poisson { per_s: f64 },
    /// `size` at once, every `every_s` seconds.
    Burst { size: u32, every_s: f64 },
}

/// How long generated requests are, in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    Fixed {
        prompt: u32,
        output: u32,
    },
    /// Between two lengths, both included.
    Uniform {
        prompt: (u32, u32),
        output: (u32, u32),
    },
    /// Many short and a few long, with these means; sigma is the standard deviation of the logarithm.
    LogNormal {
        prompt: f64,
        output: f64,
        sigma: f64,
    },
}

/// The mean lengths of ShareGPT's conversations in Kwon et al. 2023; the spread is ours.
pub const SHAREGPT: Lengths = Lengths::LogNormal { prompt: 161.0, output: 338.0, sigma: 1.0 };

/// `num_requests` requests; generated ones are one row each.
pub fn generate(arrivals: Arrivals, lengths: Lengths, num_requests: u32, seed: u64) -> Vec<PlannedRequest> {
    let mut random = SplitMix64::of(seed, 0, 2);
    let planned = (1..=num_requests).map(|row| {
        let (prompt_tokens, output_tokens) = lengths.draw(&mut random);
        PlannedRequest { row, prompt_tokens, output_tokens, ..PlannedRequest::default() }
    });
    let mut requests: Vec<PlannedRequest> = planned.collect();
    arrivals.set(&mut requests, seed);
    requests
}

impl Arrivals {
    /// Gives `requests` these arrivals, in their order.
    pub fn set(self, requests: &mut [PlannedRequest], seed: u64) {
        let mut random = SplitMix64::of(seed, 0, 3);
        let mut time_s = 0.0;
        for (index, request) in (0..).zip(requests) {
            let at_s = match self {
                Arrivals::AtOnce => 0.0,
                Arrivals::Burst { size, every_s } => f64::from(index / size) * every_s,
                Arrivals::Poisson { .. } => time_s,
            };
            request.arrival = Duration::try_from_secs_f64(at_s).unwrap_or(Duration::MAX);
            if let Arrivals::Poisson { per_s } = self {
                time_s -= random.unit().ln() / per_s;
            }
        }
    }
}

impl Lengths {
    /// Prompt and output, at least 1 each.
    fn draw(self, random: &mut SplitMix64) -> (u32, u32) {
        match self {
            Lengths::Fixed { prompt, output } => (prompt, output),
            Lengths::Uniform { prompt, output } => (random.between(prompt), random.between(output)),
            Lengths::LogNormal { prompt, output, sigma } => {
                let mut draw = |mean: f64| {
                    // A log-normal variable with this mean.
                    let median = mean * (-sigma * sigma / 2.0).exp();
                    (median * (sigma * random.normal()).exp()).round().clamp(1.0, f64::from(u32::MAX)) as u32
                };
                (draw(prompt), draw(output))
            }
        }
    }
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Arrivals, String> {
        let positive = |text: &str| text.parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0);
        let parts: Vec<&str> = text.split(':').collect();
        let arrivals = match parts.as_slice() {
            ["at-once"] => Some(Arrivals::AtOnce),
            ["poisson", per_s] => positive(per_s).map(|per_s| Arrivals::Poisson { per_s }),
            ["burst", size, every_s] => {
                let size = size.parse().ok().filter(|&size| size > 0);
                size.zip(positive(every_s)).map(|(size, every_s)| Arrivals::Burst { size, every_s })
            }
            _ => None,
        };
        arrivals.ok_or_else(|| format!("{text} is none of at-once, poisson:PER-SECOND, burst:SIZE:SECONDS"))
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Lengths, String> {
        let count = |text: &str| text.parse().ok().filter(|&value: &u32| value > 0);
        let range = |text: &str| {
            let (first, last) = text.split_once('-')?;
            count(first).zip(count(last)).filter(|(first, last)| first <= last)
        };
        let number = |text: &str| text.parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0);
        let parts: Vec<&str> = text.split(':').collect();
        let lengths = match parts.as_slice() {
            ["sharegpt"] => Some(SHAREGPT),
            ["fixed", prompt, output] => {
                count(prompt).zip(count(output)).map(|(prompt, output)| Lengths::Fixed { prompt, output })
            }
            ["uniform", prompt, output] => {
                range(prompt).zip(range(output)).map(|(prompt, output)| Lengths::Uniform { prompt, output })
            }
            ["lognormal", prompt, output, sigma] => {
                let means = number(prompt).zip(number(output));
                means.zip(number(sigma)).map(|((prompt, output), sigma)| Lengths::LogNormal { prompt, output, sigma })
            }
            _ => None,
        };
        lengths.ok_or_else(|| format!("{text} is none of {LENGTHS}"))
    }
}

const LENGTHS: &str = "sharegpt, fixed:PROMPT:OUTPUT, uniform:A-B:C-D, lognormal:MEAN-PROMPT:MEAN-OUTPUT:SIGMA";

/// SplitMix64 (Steele, Lea and Flood 2014): enough for token ids, and the same on every machine.
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// A stream of its own for each (seed, number, purpose).
    fn of(seed: u64, number: u64, purpose: u64) -> SplitMix64 {
        let mut state = SplitMix64(seed.wrapping_mul(4).wrapping_add(purpose));
        SplitMix64(state.next_u64() ^ SplitMix64(number).next_u64())
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A value in `0..bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u32
    }

    /// A value from the first to the last, both included.
    fn between(&mut self, (first, last): (u32, u32)) -> u32 {
        first + ((u128::from(self.next_u64()) * (u128::from(last - first) + 1)) >> 64) as u32
    }

    /// In (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// With mean 0 and variance 1 (Box and Muller 1958).
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_a_function_of_its_seed() {
        let workload = Workload { num_requests: 3, prompt_tokens: 5, output_tokens: 2, seed: 1 };
        let prompts = |workload: Workload| -> Vec<_> { workload.requests(100).into_iter().map(|r| r.prompt).collect() };
        assert_eq!(prompts(workload), prompts(workload));
        assert_ne!(prompts(workload), prompts(Workload { seed: 2, ..workload }));
        assert_ne!(prompts(workload)[0], prompts(workload)[1]);
        assert!(prompts(workload).iter().flatten().all(|id| id.0 < 100));
        let generated = |seed| generate(Arrivals::Poisson { per_s: 3.0 }, SHAREGPT, 20, seed);
        assert_eq!(generated(1), generated(1));
        assert_ne!(generated(1), generated(2));
    }

    #[test]
    fn equal_hash_ids_are_equal_tokens() {
        let planned = |row, prompt_tokens, hash_ids: &[u64]| {
            let hash_ids = hash_ids.to_vec();
            PlannedRequest { row, prompt_tokens, output_tokens: 1, hash_ids, ..PlannedRequest::default() }
        };
        let first = planned(1, 1100, &[7, 8, 9]).request(1000, 1).prompt;
        let second = planned(2, 1100, &[7, 8, 10]).request(1000, 1).prompt;
        let short = planned(3, 600, &[7, 8]).request(1000, 1).prompt;
        let own = planned(4, 1100, &[]).request(1000, 1).prompt;
        assert_eq!((first.len(), short.len(), own.len()), (1100, 600, 1100));
        assert_eq!(first[..1024], second[..1024]);
        assert_eq!(first[..600], short[..]);
        assert_ne!(first[1024..1040], second[1024..1040]);
        assert_ne!(first[..16], own[..16]);
    }

    #[test]
    fn arrivals_come_as_often_as_asked() {
        let times = |arrivals| -> Vec<f64> {
            let requests = generate(arrivals, Lengths::Fixed { prompt: 1, output: 1 }, 4001, 5);
            requests.iter().map(|request| request.arrival.as_secs_f64()).collect()
        };
        let poisson = times(Arrivals::Poisson { per_s: 8.0 });
        assert!(poisson[0] == 0.0 && poisson.is_sorted());
        assert!((poisson[4000] - 500.0).abs() < 25.0, "{}", poisson[4000]);
        // The gaps of a Poisson process spread as much as their mean.
        let gaps: Vec<f64> = poisson.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let variance = gaps.iter().map(|gap| (gap - 0.125).powi(2)).sum::<f64>() / 4000.0;
        assert!((variance.sqrt() - 0.125).abs() < 0.01, "{variance}");
        assert_eq!(times(Arrivals::Burst { size: 3, every_s: 2.0 })[..7], [0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 4.0]);
        assert!(times(Arrivals::AtOnce).iter().all(|&time| time == 0.0));
    }

    #[test]
    fn lengths_have_the_means_they_state() {
        let mean = |lengths| {
            let requests = generate(Arrivals::AtOnce, lengths, 20_000, 3);
            let sum = |length: fn(&PlannedRequest) -> u32| requests.iter().map(length).map(f64::from).sum::<f64>();
            (sum(|request| request.prompt_tokens) / 2e4, sum(|request| request.output_tokens) / 2e4)
        };
        let (prompt, output) = mean(SHAREGPT);
        assert!((prompt - 161.0).abs() < 8.0 && (output - 338.0).abs() < 16.0, "{prompt} {output}");
        let (prompt, output) = mean(Lengths::Uniform { prompt: (10, 30), output: (5, 5) });
        assert!((prompt - 20.0).abs() < 0.2 && output == 5.0, "{prompt} {output}");
    }

    #[test]
    fn workloads_are_read_off_the_command_line() {
        assert_eq!("poisson:2.5".parse(), Ok(Arrivals::Poisson { per_s: 2.5 }));
        assert_eq!("burst:16:4".parse(), Ok(Arrivals::Burst { size: 16, every_s: 4.0 }));
        assert_eq!("at-once".parse(), Ok(Arrivals::AtOnce));
        assert_eq!("fixed:128:64".parse(), Ok(Lengths::Fixed { prompt: 128, output: 64 }));
        assert_eq!("uniform:1-9:2-3".parse(), Ok(Lengths::Uniform { prompt: (1, 9), output: (2, 3) }));
        assert_eq!("lognormal:161:338:1".parse(), Ok(SHAREGPT));
        for wrong in ["poisson", "poisson:0", "poisson:-1", "poisson:inf", "burst:0:1", "burst:4", "often"] {
            let sentence = wrong.parse::<Arrivals>().expect_err("it is wrong");
            assert!(sentence.contains(wrong) && sentence.contains("poisson:PER-SECOND"), "{sentence}");
        }
        for wrong in ["fixed:0:1", "uniform:9-1:1-2", "uniform:1:2", "lognormal:1:2", "lognormal:1:2:-1", "short"] {
            let sentence = wrong.parse::<Lengths>().expect_err("it is wrong");
            assert!(sentence.contains(wrong), "{sentence}");
        }
    }
}
