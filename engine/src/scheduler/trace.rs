//! A step in one line: the log, and the snapshot format of the scheduler's tests.
//!
//! ```text
//! step 12  decode a b c   prefill d[64..128/300]   blocks 41+7/64   preempt -   finish b:stop   held memory
//! ```
//! Blocks are referenced + cached / all. A sequence is its number, as a letter where one does. What held the step is
//! what kept it from being larger.

use std::fmt;
use std::ops::Range;

use crate::batch::SequenceId;
use crate::memory::BlockCounts;
use crate::request::FinishReason;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepTrace {
    pub step: u64,
    /// Sequences that got a slot, with the tokens that the prefix cache had of each.
    pub admitted: Vec<(SequenceId, u32)>,
    pub decoded: Vec<SequenceId>,
    /// Range of computed tokens, and all tokens the sequence has.
    pub prefilled: Vec<(SequenceId, Range<u32>, u32)>,
    pub blocks: BlockCounts,
    pub preempted: Vec<SequenceId>,
    /// Why no more tokens joined.
    pub held: Held,
    pub finished: Vec<(SequenceId, FinishReason)>,
}

/// What kept a step from being larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Held {
    /// Nobody waits, and nobody who runs has more to compute.
    #[default]
    NoRequests,
    /// `max_num_seqs` sequences run.
    Slots,
    KvMemory,
    /// The step has as many tokens, or rows of the output layer, as it may.
    Budget,
    /// One more chunk would make the gap between tokens longer than its target.
    Latency,
    /// Who waits is of tenants that run as many as they may.
    TenantCap,
    /// Who waits shares a prefix that is being computed.
    SharedPrefix,
    /// Who waits follows a grammar, and those of who runs take as much memory as they may.
    GrammarMemory,
}

impl Held {
    /// One word for the trace.
    pub const fn word(self) -> &'static str {
        match self {
            Held::NoRequests => "-",
            Held::Slots => "slots",
            Held::KvMemory => "memory",
            Held::Budget => "budget",
            Held::Latency => "latency",
            Held::TenantCap => "cap",
            Held::SharedPrefix => "prefix",
            Held::GrammarMemory => "grammars",
        }
    }
}

impl StepTrace {
    pub fn with_capacity(max_num_seqs: u32) -> StepTrace {
        let max_num_seqs = max_num_seqs as usize;
        StepTrace {
            admitted: Vec::with_capacity(max_num_seqs),
            decoded: Vec::with_capacity(max_num_seqs),
            prefilled: Vec::with_capacity(max_num_seqs),
            preempted: Vec::with_capacity(max_num_seqs),
            finished: Vec::with_capacity(max_num_seqs),
            ..StepTrace::default()
        }
    }

    /// Forgets the last step.
    pub fn begin(&mut self, step: u64) {
        self.step = step;
        self.admitted.clear();
        self.decoded.clear();
        self.prefilled.clear();
        self.preempted.clear();
        self.finished.clear();
        self.held = Held::NoRequests;
    }

    pub fn record(&mut self, sequence: SequenceId, computed: Range<u32>, num_tokens: u32) {
        match computed.len() {
            1 if computed.end == num_tokens => self.decoded.push(sequence),
            _ => self.prefilled.push((sequence, computed, num_tokens)),
        }
    }

    /// Whether more of a prompt is there than went into the step.
    pub fn is_full_of_prompts(&self) -> bool {
        let unfinished = self.prefilled.iter().any(|(_, computed, num_tokens)| computed.end < *num_tokens);
        unfinished || matches!(self.held, Held::Budget | Held::Latency)
    }

    pub fn num_prefill_tokens(&self) -> u32 {
        self.prefilled.iter().map(|(_, computed, _)| computed.len() as u32).sum()
    }
}

impl fmt::Display for StepTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| if items.is_empty() { "-".to_owned() } else { items.join(" ") };
        let decoded = list(self.decoded.iter().map(|&id| name(id)).collect());
        let prefill = |(id, computed, all): &(SequenceId, Range<u32>, u32)| {
            format!("{}[{}..{}/{all}]", name(*id), computed.start, computed.end)
        };
        let prefilled = list(self.prefilled.iter().map(prefill).collect());
        let preempted = list(self.preempted.iter().map(|&id| name(id)).collect());
        let reason = |reason: &FinishReason| match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Error(_) | FinishReason::Contradiction(_) | FinishReason::DeviceLost(_) => "error",
        };
        let finished = list(self.finished.iter().map(|(id, why)| format!("{}:{}", name(*id), reason(why))).collect());
        let BlockCounts { referenced, cached, total, .. } = self.blocks;
        write!(f, "step {}  decode {decoded}   prefill {prefilled}   ", self.step)?;
        write!(f, "blocks {referenced}+{cached}/{total}   preempt {preempted}   finish {finished}   ")?;
        write!(f, "held {}", self.held.word())
    }
}

fn name(id: SequenceId) -> String {
    match u8::try_from(id.0) {
        Ok(small) if small < 26 => char::from(b'a' + small).to_string(),
        _ => format!("#{}", id.0),
    }
}
