//! Requests to come: when, how long, and with which prefix in common. Made here from a seed, or read by `trace.rs`.
//!
//! Invariant: a workload is a pure function of its seed, the same on every machine. Prompts share a prefix only where a
//! trace says so, so that no prefix cache flatters a run.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use fullbore_engine::request::{Request, TokenId};

/// One request of a workload: lengths and a time, as a trace has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlannedRequest {
    /// Its line in the file, or its number.
    pub row: u32,
    /// Of the turn before it in its conversation, which must have ended.
    pub follows: Option<u32>,
    /// After the first.
    pub arrival: Duration,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    /// What its prompt begins with, in order; the rest, or all of it, is its own.
    pub segments: Vec<Segment>,
}

/// A stretch of a prompt that other prompts may have too: equal ids stand for equal tokens, as far as both go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub id: u64,
    pub num_tokens: u32,
}

impl PlannedRequest {
    /// Others may have the beginning of its prompt.
    pub fn shares_prefix(&self) -> bool {
        !self.segments.is_empty()
    }

    /// Greedy and without stop ids: it generates exactly its length.
    pub fn request(&self, vocab_size: u32, seed: u64) -> Request {
        let mut prompt: Vec<TokenId> = Vec::with_capacity(self.prompt_tokens as usize);
        let mut fill = |mut random: SplitMix64, num_tokens: u32| {
            let end = self.prompt_tokens.min(prompt.len() as u32 + num_tokens);
            while prompt.len() < end as usize {
                prompt.push(TokenId(random.below(vocab_size)));
            }
        };
        for segment in &self.segments {
            fill(SplitMix64::of(seed, segment.id, 1), segment.num_tokens);
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

/// How long generated requests are, in tokens, and what they have in common.
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
    /// The same, of each prompt a `share` being the beginning of one of `groups` prefixes, as often as Zipf's law says.
    SharedLogNormal {
        groups: u32,
        share: f64,
        prompt: f64,
        output: f64,
        sigma: f64,
    },
    /// One of `groups` beginnings of `prefix` tokens, in turn, then `prompt` tokens of their own.
    Shared {
        groups: u32,
        prefix: u32,
        prompt: u32,
        output: u32,
    },
    /// Conversations beside each other, turn by turn: a prompt has the `system` tokens of all, and `added` tokens a
    /// turn. Answers before it are `output` drawn tokens each, not what a model said.
    Turns {
        turns: u32,
        system: u32,
        added: u32,
        output: u32,
    },
}

/// The mean lengths of ShareGPT's conversations in Kwon et al. 2023; the spread is ours.
pub const SHAREGPT: Lengths = Lengths::LogNormal { prompt: 161.0, output: 338.0, sigma: 1.0 };
/// The means of AzurePublicDataset's code trace of 2023, and the spread of its prompts.
pub const CODE: Lengths = Lengths::LogNormal { prompt: 2048.0, output: 28.0, sigma: 1.36 };
/// Ours, as are the next two.
pub const LONG: Lengths = Lengths::Uniform { prompt: (8192, 32_768), output: (64, 256) };
pub const CHAT: Lengths = Lengths::Turns { turns: 6, system: 150, added: 60, output: 180 };
/// A tool's description before all, and what it brings in each turn.
pub const AGENT: Lengths = Lengths::Turns { turns: 12, system: 2000, added: 400, output: 60 };

/// By the words of the command line.
const NAMED: [(&str, Lengths); 5] =
    [("sharegpt", SHAREGPT), ("code", CODE), ("long", LONG), ("chat", CHAT), ("agent", AGENT)];

/// `num_requests` requests; generated ones are one row each.
pub fn generate(arrivals: Arrivals, lengths: Lengths, num_requests: u32, seed: u64) -> Vec<PlannedRequest> {
    let mut random = SplitMix64::of(seed, 0, 2);
    let plan = |row| PlannedRequest { row, ..lengths.plan(row - 1, num_requests, &mut random) };
    let mut requests: Vec<PlannedRequest> = (1..=num_requests).map(plan).collect();
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
    /// Request `index` of so many.
    fn plan(self, index: u32, num_requests: u32, random: &mut SplitMix64) -> PlannedRequest {
        let (mut segments, mut follows) = (Vec::new(), None);
        let (prompt_tokens, output_tokens) = match self {
            Lengths::Fixed { prompt, output } => (prompt, output),
            Lengths::Uniform { prompt, output } => (random.between(prompt), random.between(output)),
            Lengths::LogNormal { prompt, output, sigma } => {
                (random.log_normal(prompt, sigma), random.log_normal(output, sigma))
            }
            Lengths::SharedLogNormal { groups, share, prompt, output, sigma } => {
                let lengths = (random.log_normal(prompt, sigma), random.log_normal(output, sigma));
                let num_tokens = (share * f64::from(lengths.0)).round() as u32;
                segments.push(Segment { id: u64::from(random.rank(groups)), num_tokens });
                lengths
            }
            Lengths::Shared { groups, prefix, prompt, output } => {
                segments.push(Segment { id: u64::from(index % groups), num_tokens: prefix });
                (prefix.saturating_add(prompt), output)
            }
            Lengths::Turns { turns, system, added, output } => {
                let num_conversations = num_requests.div_ceil(turns);
                let (turn, conversation) = (index / num_conversations, index % num_conversations);
                let id = |of: u32| 1 + u64::from(conversation) * u64::from(turns) + u64::from(of);
                follows = (turn > 0).then(|| index + 1 - num_conversations);
                let before = added.saturating_add(output);
                segments.push(Segment { id: 0, num_tokens: system });
                segments.extend((0..turn).map(|of| Segment { id: id(of), num_tokens: before }));
                segments.push(Segment { id: id(turn), num_tokens: added });
                (segments.iter().map(|segment| segment.num_tokens).fold(0, u32::saturating_add), output)
            }
        };
        PlannedRequest { follows, prompt_tokens, output_tokens, segments, ..PlannedRequest::default() }
    }
}

/// As the command line has it.
impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arrivals::AtOnce => write!(f, "at-once"),
            Arrivals::Poisson { per_s } => write!(f, "poisson:{per_s}"),
            Arrivals::Burst { size, every_s } => write!(f, "burst:{size}:{every_s}"),
        }
    }
}

/// As the command line has it.
impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = NAMED.iter().find(|(_, named)| named == self) {
            return write!(f, "{name}");
        }
        match *self {
            Lengths::Fixed { prompt, output } => write!(f, "fixed:{prompt}:{output}"),
            Lengths::Uniform { prompt: (a, b), output: (c, d) } => write!(f, "uniform:{a}-{b}:{c}-{d}"),
            Lengths::LogNormal { prompt, output, sigma } => write!(f, "lognormal:{prompt}:{output}:{sigma}"),
            Lengths::SharedLogNormal { groups, share, prompt, output, sigma } => {
                write!(f, "shared-lognormal:{groups}:{share}:{prompt}:{output}:{sigma}")
            }
            Lengths::Shared { groups, prefix, prompt, output } => {
                write!(f, "shared:{groups}:{prefix}:{prompt}:{output}")
            }
            Lengths::Turns { turns, system, added, output } => write!(f, "turns:{turns}:{system}:{added}:{output}"),
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
        let four = |words: [&str; 4]| {
            let counts: Vec<u32> = words.into_iter().filter_map(count).collect();
            <[u32; 4]>::try_from(counts).ok()
        };
        let parts: Vec<&str> = text.split(':').collect();
        let lengths = match *parts.as_slice() {
            [name] => NAMED.iter().find(|(known, _)| *known == name).map(|(_, lengths)| *lengths),
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
            ["shared-lognormal", groups, share, prompt, output, sigma] => {
                let shares = count(groups).zip(number(share).filter(|share| *share <= 1.0));
                let means = number(prompt).zip(number(output)).zip(number(sigma));
                shares.zip(means).map(|((groups, share), ((prompt, output), sigma))| Lengths::SharedLogNormal {
                    groups,
                    share,
                    prompt,
                    output,
                    sigma,
                })
            }
            ["shared", a, b, c, d] => four([a, b, c, d]).map(|[groups, prefix, prompt, output]| Lengths::Shared {
                groups,
                prefix,
                prompt,
                output,
            }),
            ["turns", a, b, c, d] => {
                four([a, b, c, d]).map(|[turns, system, added, output]| Lengths::Turns { turns, system, added, output })
            }
            _ => None,
        };
        lengths.ok_or_else(|| format!("{text} is none of {LENGTHS}"))
    }
}

const LENGTHS: &str = "sharegpt, code, long, chat, agent, fixed:PROMPT:OUTPUT, uniform:A-B:C-D, \
    lognormal:MEAN-PROMPT:MEAN-OUTPUT:SIGMA, shared-lognormal:GROUPS:SHARE:MEAN-PROMPT:MEAN-OUTPUT:SIGMA, \
    shared:GROUPS:PREFIX:PROMPT:OUTPUT, turns:TURNS:SYSTEM:ADDED:OUTPUT";

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

    /// A log-normal length with this mean, one token at least.
    fn log_normal(&mut self, mean: f64, sigma: f64) -> u32 {
        let median = mean * (-sigma * sigma / 2.0).exp();
        (median * (sigma * self.normal()).exp()).round().clamp(1.0, f64::from(u32::MAX)) as u32
    }

    /// From 1 to `most`, each the less often the larger it is: Zipf's law, which ln(1 + 1 / rank) is nearly.
    fn rank(&mut self, most: u32) -> u32 {
        ((f64::from(most) + 1.0).powf(self.unit()) as u32).clamp(1, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_a_function_of_its_seed() {
        let planned = generate(Arrivals::AtOnce, Lengths::Fixed { prompt: 5, output: 2 }, 3, 1);
        let prompts = |seed: u64| -> Vec<_> { planned.iter().map(|of| of.request(100, seed).prompt).collect() };
        assert_eq!(prompts(1), prompts(1));
        assert_ne!(prompts(1), prompts(2));
        assert_ne!(prompts(1)[0], prompts(1)[1]);
        assert!(prompts(1).iter().flatten().all(|id| id.0 < 100));
        let generated = |seed| generate(Arrivals::Poisson { per_s: 3.0 }, SHAREGPT, 20, seed);
        assert_eq!(generated(1), generated(1));
        assert_ne!(generated(1), generated(2));
    }

    #[test]
    fn equal_segments_are_equal_tokens() {
        let planned = |row, prompt_tokens, segments: &[(u64, u32)]| {
            let segments = segments.iter().map(|&(id, num_tokens)| Segment { id, num_tokens }).collect();
            PlannedRequest { row, prompt_tokens, output_tokens: 1, segments, ..PlannedRequest::default() }
        };
        let first = planned(1, 1100, &[(7, 512), (8, 512), (9, 512)]).request(1000, 1).prompt;
        let second = planned(2, 1100, &[(7, 512), (8, 512), (10, 512)]).request(1000, 1).prompt;
        let short = planned(3, 600, &[(7, 512), (8, 512)]).request(1000, 1).prompt;
        let own = planned(4, 1100, &[]).request(1000, 1).prompt;
        assert_eq!((first.len(), short.len(), own.len()), (1100, 600, 1100));
        assert_eq!(first[..1024], second[..1024]);
        assert_eq!(first[..600], short[..]);
        assert_ne!(first[1024..1040], second[1024..1040]);
        assert_ne!(first[..16], own[..16]);
    }

    #[test]
    fn a_turn_begins_with_the_one_before_and_conversations_differ() {
        let lengths = Lengths::Turns { turns: 3, system: 10, added: 4, output: 6 };
        let requests = generate(Arrivals::AtOnce, lengths, 6, 1);
        let prompts: Vec<_> = requests.iter().map(|request| request.request(1000, 1).prompt).collect();
        assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [14, 14, 24, 24, 34, 34]);
        assert_eq!(prompts[0][..], prompts[2][..14]);
        assert_eq!(prompts[2][..], prompts[4][..24]);
        assert_eq!(prompts[0][..10], prompts[1][..10], "the system prompt is everybody's");
        assert_ne!(prompts[0][10..], prompts[1][10..]);
        let follows: Vec<_> = requests.iter().map(|request| request.follows).collect();
        assert_eq!(follows, [None, None, Some(1), Some(2), Some(3), Some(4)]);
        let shared = generate(Arrivals::AtOnce, Lengths::Shared { groups: 2, prefix: 8, prompt: 3, output: 1 }, 4, 1);
        let prompts: Vec<_> = shared.iter().map(|request| request.request(1000, 1).prompt).collect();
        assert_eq!((&prompts[0][..8], prompts[0].len()), (&prompts[2][..8], 11));
        assert_ne!(prompts[0][..8], prompts[1][..8]);
        assert_ne!(prompts[0][8..], prompts[2][8..]);
    }

    #[test]
    fn prompts_of_unlike_length_share_what_they_are_to() {
        let lengths = Lengths::SharedLogNormal { groups: 4, share: 0.3, prompt: 200.0, output: 50.0, sigma: 1.0 };
        let requests = generate(Arrivals::AtOnce, lengths, 4000, 1);
        let sum = |tokens: fn(&PlannedRequest) -> u32| requests.iter().map(tokens).map(f64::from).sum::<f64>();
        let [prompts, shared] = [sum(|request| request.prompt_tokens), sum(|request| request.segments[0].num_tokens)];
        assert!((prompts / 4e3 - 200.0).abs() < 12.0 && (shared / prompts - 0.3).abs() < 0.002, "{prompts} {shared}");
        let [often, seldom] = [1, 4].map(|id| requests.iter().filter(|request| request.segments[0].id == id).count());
        // ln 2 / ln 5 and ln 1.25 / ln 5 of them.
        assert!(often.abs_diff(1723) < 90 && seldom.abs_diff(555) < 60, "{often} {seldom}");
        let mut first = requests.iter().filter(|request| request.segments[0].id == 1 && request.prompt_tokens > 100);
        let [a, b] = [first.next(), first.next()].map(|of| of.expect("many").request(1000, 1).prompt);
        assert_eq!(a[..30], b[..30]);
        assert_ne!(a[a.len() / 2..][..20], b[b.len() / 2..][..20]);
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
        assert_eq!("turns:12:2000:400:60".parse(), Ok(AGENT));
        let own = ["fixed:1:2", "uniform:1-2:3-4", "shared:1:2:3:4", "shared-lognormal:8:0.3:200:50:1"];
        for lengths in NAMED.map(|(name, _)| name).into_iter().chain(own) {
            assert_eq!(lengths.parse::<Lengths>().map(|read| read.to_string()), Ok(lengths.to_owned()));
        }
        for wrong in ["poisson", "poisson:0", "poisson:-1", "poisson:inf", "burst:0:1", "burst:4", "often"] {
            let sentence = wrong.parse::<Arrivals>().expect_err("it is wrong");
            assert!(sentence.contains(wrong) && sentence.contains("poisson:PER-SECOND"), "{sentence}");
        }
        for wrong in [
            "fixed:0:1",
            "uniform:9-1:1-2",
            "uniform:1:2",
            "lognormal:1:2",
            "lognormal:1:2:-1",
            "short",
            "turns:1:2:3",
            "shared-lognormal:8:1.5:200:50:1",
            "shared-lognormal:0:0.3:200:50:1",
            "shared-lognormal:8:0.3:200:50",
        ] {
            let sentence = wrong.parse::<Lengths>().expect_err("it is wrong");
            assert!(sentence.contains(wrong), "{sentence}");
        }
    }
}
