//! One sentence: what holds this device back most, in numbers, and what to do about it.
//!
//! It is read off the last minute. The host's phases count together, for one remedy serves them all. Invariant: a
//! number in a sentence was counted, or says "about" and follows from ones that were.

use super::{Cause, FactSums, Snapshot, Tally};
use crate::config::{EngineConfig, LatencyTarget};
use crate::tensor::KvType;

/// From this share of the time on, what the device computes is what limits it.
pub const COMPUTING_DOMINATES: f64 = 0.8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Of the host's phases the one that took the most.
    pub cause: Cause,
    pub sentence: String,
}

/// What a verdict knows beside the times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    pub config: EngineConfig,
    /// By type of the KV cache, as in `KvType::ALL`; `None` where the model's heads do not fit it.
    pub kv_bytes_per_token: [Option<u64>; KvType::ALL.len()],
}

impl Verdict {
    /// `neighbours` are the names of other engines on the device.
    pub fn new(snapshot: &Snapshot, setting: &Setting, neighbours: &[String]) -> Verdict {
        let window = &snapshot.window;
        if window.wall_ns() == 0 {
            return Verdict { cause: Cause::NoRequests, sentence: "no requests: nothing has run yet".to_owned() };
        }
        let cause = largest(window);
        let words = Words { snapshot, setting, facts: Means::of(&snapshot.facts[cause as usize]) };
        let share = percent(window.share(if is_host(cause) { window.host_ns() } else { window.ns(cause) }));
        let sentence = match cause {
            Cause::Computing => words.computing(&share),
            Cause::NoRequests => words.no_requests(),
            Cause::KvMemory => words.memory(),
            Cause::Slots => words.slots(),
            Cause::LatencyTarget => words.latency(),
            Cause::StepBudget => words.budget(),
            Cause::SharedPrefix => words.shared_prefix(),
            Cause::GrammarMemory => words.grammar_memory(),
            Cause::TenantCap => words.tenant_cap(),
            Cause::Schedule | Cause::Record | Cause::Upload | Cause::ReadBack => words.host(&share),
            Cause::Neighbour => neighbour(&share, neighbours),
            Cause::DeviceLost => device_lost(&share),
        };
        Verdict { cause, sentence }
    }
}

/// The cause that is named.
fn largest(window: &Tally) -> Cause {
    if window.share(window.ns(Cause::Computing)) >= COMPUTING_DOMINATES {
        return Cause::Computing;
    }
    let others = Cause::ALL.into_iter().filter(|&cause| cause != Cause::Computing && !is_host(cause));
    let other = others.max_by_key(|&cause| window.ns(cause)).expect("there are causes");
    let host = Cause::HOST.into_iter().max_by_key(|&cause| window.ns(cause)).expect("there are phases");
    if window.host_ns() > window.ns(other) { host } else { other }
}

fn is_host(cause: Cause) -> bool {
    Cause::HOST.contains(&cause)
}

/// Means over the time that was charged to one cause.
struct Means {
    num_waiting: f64,
    waiting_tokens: f64,
    num_running: f64,
    referenced_blocks: f64,
    num_rows: f64,
}

impl Means {
    fn of(sums: &FactSums) -> Means {
        let mean = |sum: u64| sum as f64 / sums.us.max(1) as f64;
        Means {
            num_waiting: mean(sums.num_waiting),
            waiting_tokens: mean(sums.waiting_tokens),
            num_running: mean(sums.num_running),
            referenced_blocks: mean(sums.referenced_blocks),
            num_rows: mean(sums.num_rows),
        }
    }
}

struct Words<'a> {
    snapshot: &'a Snapshot,
    setting: &'a Setting,
    facts: Means,
}

impl Words<'_> {
    fn computing(&self, share: &str) -> String {
        let window = &self.snapshot.window;
        let rate = window.num_tokens as f64 * 1e9 / window.wall_ns() as f64;
        format!(
            "the device: it computes for {share} of the time, {rate:.0} tokens a second, prompts included; only a \
             faster device or a smaller model does more"
        )
    }

    fn no_requests(&self) -> String {
        let window = &self.snapshot.window;
        let idle_ns = window.idle_ns - window.host_ns();
        let idle = percent(window.share(idle_ns));
        let busy = match self.snapshot.knee {
            Some(knee) if window.ns(Cause::NoRequests) > idle_ns => {
                let rows = plural(self.facts.num_rows, "row");
                format!(", and steps had {rows} where the device is at its best from {}", knee.batch)
            }
            _ => String::new(),
        };
        format!("no requests: the device had nothing to do for {idle} of the time{busy}; send more at once")
    }

    fn memory(&self) -> String {
        let config = &self.setting.config;
        let waiting = self.waiting();
        let of_running = self.facts.referenced_blocks / self.facts.num_running.max(1.0);
        // The next token included, as admission asks for it.
        let of_waiting = self.facts.waiting_tokens / self.facts.num_waiting.max(1.0) + 1.0;
        let blocks_each = (of_waiting / f64::from(config.block_size)).ceil().max(of_running).max(1.0);
        let missing = (self.facts.num_waiting * blocks_each).round();
        let needed = format!(
            "memory: {waiting} for KV blocks, about {missing:.0} of them, and {:.0} of {} are held",
            self.facts.referenced_blocks, config.num_blocks
        );
        let bytes = self.setting.kv_bytes_per_token;
        let now = bytes[config.kv_type as usize].expect("the cache has a type that fits");
        let smaller = KvType::ALL.into_iter().find(|&kv_type| bytes[kv_type as usize].is_some_and(|bytes| bytes < now));
        let Some((kv_type, then)) = smaller.and_then(|kv_type| Some((kv_type, bytes[kv_type as usize]?))) else {
            return format!("{needed}; give more with --kv-memory, or shorter requests");
        };
        let more_blocks = f64::from(config.num_blocks) * (now as f64 / then as f64 - 1.0);
        let admitted = (more_blocks / blocks_each).floor().min(self.facts.num_waiting.round().max(1.0));
        format!("{needed}; {} KV would admit about {admitted:.0} of them", kv_type.name())
    }

    fn slots(&self) -> String {
        let most = self.setting.config.max_num_seqs;
        let best = self
            .snapshot
            .knee
            .map_or(String::new(), |knee| format!(", and the device is at its best from {} sequences", knee.batch));
        format!("slots: {} while {most} run, as many as may{best}; raise --max-num-seqs", self.waiting())
    }

    fn latency(&self) -> String {
        let target = match self.setting.config.latency {
            LatencyTarget::Milliseconds(ms) => format!("the target of {ms} ms between tokens"),
            LatencyTarget::Stretch(percent) => {
                format!("the profile's target of {:.1} times a step without prompts", f64::from(percent) / 100.0)
            }
            LatencyTarget::None => "a target between tokens".to_owned(),
        };
        let rows = plural(self.facts.num_rows, "row");
        let best = self.snapshot.knee.map_or(String::new(), |knee| {
            let step_ms = knee.step_ns as f64 / 1e6;
            format!(", and a full one of {} takes about {step_ms:.1} ms", knee.batch)
        });
        format!("latency target: {target} keeps steps at {rows}{best}; raise --target-itl-ms, or --profile throughput")
    }

    fn budget(&self) -> String {
        let EngineConfig { max_num_batched_tokens, max_logit_rows, .. } = self.setting.config;
        let rows = plural(self.facts.num_rows, "row");
        let best = self
            .snapshot
            .knee
            .map_or(String::new(), |knee| format!(", at its best from {} on this device", knee.batch));
        format!(
            "step budget: a step has {rows}{best}, and may have {max_num_batched_tokens} tokens and {max_logit_rows} \
             rows of logits; raise --max-num-batched-tokens"
        )
    }

    fn shared_prefix(&self) -> String {
        let rows = plural(self.facts.num_rows, "row");
        format!(
            "shared prefix: {} for a prefix that another one computes, {rows} a step; with a larger \
             --max-num-batched-tokens or a slacker latency target it is there sooner",
            self.waiting()
        )
    }

    fn grammar_memory(&self) -> String {
        format!(
            "grammar memory: {} for the {} MiB that grammars may take together; ask for simpler forms",
            self.waiting(),
            self.setting.config.max_grammar_bytes >> 20
        )
    }

    fn tenant_cap(&self) -> String {
        let running = self.facts.num_running.round();
        format!(
            "tenant caps: {} while {running:.0} run, because their tenants run as many as they may; raise the MAX of \
             --share NAME=WEIGHT:MAX",
            self.waiting()
        )
    }

    fn host(&self, share: &str) -> String {
        let window = &self.snapshot.window;
        let of = |cause| percent(window.share(window.ns(cause)));
        let remedy = match self.setting.config.pipeline_depth {
            1 => "use --pipeline-depth 2, which hides it behind the step that runs",
            _ => "the host needs a faster core, or one to itself",
        };
        format!(
            "host: the device waits for it {share} of the time (schedule {}, record {}, upload {}, read-back {}); \
             {remedy}",
            of(Cause::Schedule),
            of(Cause::Record),
            of(Cause::Upload),
            of(Cause::ReadBack)
        )
    }

    /// `41 requests wait`.
    fn waiting(&self) -> String {
        let num_waiting = self.facts.num_waiting;
        format!("{} wait{}", plural(num_waiting, "request"), if num_waiting.round() > 1.0 { "" } else { "s" })
    }
}

fn neighbour(share: &str, names: &[String]) -> String {
    let names = if names.is_empty() { "which has left".to_owned() } else { names.join(", ") };
    format!(
        "neighbour: {share} of the time went to another engine on this device ({names}), by which steps took longer \
         than they do alone; give each a device of its own"
    )
}

fn device_lost(share: &str) -> String {
    format!(
        "device lost: for {share} of the time there was none, because its driver gave it up and it had to be made \
         anew; update the driver, and see its log (dmesg) for the reason"
    )
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// At least one: what a sentence tells of was there.
fn plural(mean: f64, noun: &str) -> String {
    let count = mean.round().max(1.0);
    format!("{count:.0} {noun}{}", if count > 1.0 { "s" } else { "" })
}
