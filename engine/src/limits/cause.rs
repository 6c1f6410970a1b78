//! The causes that a device's time is charged to, and what the host is at. Invariant: a cause has one name everywhere:
//! in metrics, in JSON and in the docs.

use crate::scheduler::Held;

pub const NUM_CAUSES: usize = 15;

/// What a nanosecond of a device is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Computing,
    NoRequests,
    KvMemory,
    /// `max_num_seqs`.
    Slots,
    LatencyTarget,
    /// `max_num_batched_tokens`, or rows of the output layer.
    StepBudget,
    SharedPrefix,
    /// `max_grammar_bytes`.
    GrammarMemory,
    TenantCap,
    /// The host takes in requests and plans.
    Schedule,
    /// The host writes a batch as ops.
    Record,
    /// The host hands ops and their integers to the device, which begins.
    Upload,
    /// The host sees that a step has ended, reads it back and tells clients.
    ReadBack,
    /// Another engine on the same device.
    Neighbour,
    /// There is no device: it was lost, and is made anew.
    DeviceLost,
}

impl Cause {
    pub const ALL: [Cause; NUM_CAUSES] = [
        Cause::Computing,
        Cause::NoRequests,
        Cause::KvMemory,
        Cause::Slots,
        Cause::LatencyTarget,
        Cause::StepBudget,
        Cause::SharedPrefix,
        Cause::GrammarMemory,
        Cause::TenantCap,
        Cause::Schedule,
        Cause::Record,
        Cause::Upload,
        Cause::ReadBack,
        Cause::Neighbour,
        Cause::DeviceLost,
    ];
    /// The device was idle, and there was work.
    pub const HOST: [Cause; 4] = [Cause::Schedule, Cause::Record, Cause::Upload, Cause::ReadBack];

    /// As metrics label it.
    pub const fn name(self) -> &'static str {
        match self {
            Cause::Computing => "computing",
            Cause::NoRequests => "no_requests",
            Cause::KvMemory => "kv_memory",
            Cause::Slots => "slots",
            Cause::LatencyTarget => "latency_target",
            Cause::StepBudget => "step_budget",
            Cause::SharedPrefix => "shared_prefix",
            Cause::GrammarMemory => "grammar_memory",
            Cause::TenantCap => "tenant_cap",
            Cause::Schedule => "host_schedule",
            Cause::Record => "host_record",
            Cause::Upload => "host_upload",
            Cause::ReadBack => "host_read_back",
            Cause::Neighbour => "neighbour",
            Cause::DeviceLost => "device_lost",
        }
    }
}

impl From<Held> for Cause {
    fn from(held: Held) -> Cause {
        match held {
            Held::NoRequests => Cause::NoRequests,
            Held::Slots => Cause::Slots,
            Held::KvMemory => Cause::KvMemory,
            Held::Budget => Cause::StepBudget,
            Held::Latency => Cause::LatencyTarget,
            Held::TenantCap => Cause::TenantCap,
            Held::SharedPrefix => Cause::SharedPrefix,
            Held::GrammarMemory => Cause::GrammarMemory,
        }
    }
}

/// What the host is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing waits, runs or is in flight.
    NoWork,
    /// All that waits is of tenants that run as many as they may, on other engines.
    TenantCap,
    /// All that waits is for blocks that come from another engine.
    SharedPrefix,
    Schedule,
    Record,
    Upload,
    ReadBack,
    DeviceLost,
}

impl Phase {
    /// What an idle device is charged to meanwhile.
    pub fn cause(self) -> Cause {
        match self {
            Phase::NoWork => Cause::NoRequests,
            Phase::TenantCap => Cause::TenantCap,
            Phase::SharedPrefix => Cause::SharedPrefix,
            Phase::Schedule => Cause::Schedule,
            Phase::Record => Cause::Record,
            Phase::Upload => Cause::Upload,
            Phase::ReadBack => Cause::ReadBack,
            Phase::DeviceLost => Cause::DeviceLost,
        }
    }
}
